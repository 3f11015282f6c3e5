"""What names in a trace mean: tables of collectives, parts of a model and phases of an iteration."""

from __future__ import annotations

import re

# A piece of a name, compared without case, - and _ -> the collective; the first that fits.
COLLECTIVES = (
    ("reducescatter", "reduce-scatter"),
    ("allreduce", "all-reduce"),
    ("allgather", "all-gather"),
    ("alltoall", "all-to-all"),
    ("broadcast", "broadcast"),
    ("barrier", "barrier"),
    ("sendrecv", "send and receive"),
    ("batchsend", "send and receive"),
    ("send", "send and receive"),
    ("receive", "send and receive"),
    ("recv", "send and receive"),
    ("scatter", "scatter"),
    ("gather", "gather"),
    ("reduce", "reduce"),
)
OTHER_COLLECTIVE = "other communication"

# A pattern in a module's name -> the part of the model; the first that fits.
PARTS = (
    (r"\brouter\b", "router"),
    (r"\bshared_experts\b", "shared experts"),
    (r"\bexperts\b", "experts"),
    (r"\b(self_|cross_|core_)?attention\b", "attention"),
    (r"\bmlp\b", "MLP"),
    (r"\bembedding\b", "embedding"),
    (r"\boutput_layer\b", "output layer and loss"),
    (r"norm\b", "norms between"),
    (r"\bmtp\b", "multi-token prediction, rest"),
    (r"\blayers\b", "layers, rest"),
)
REST_OF_MODEL = "model, rest"
OUTSIDE = "outside the model"
ADAPTERS = "adapters"

MODULE, PHASE, ADAPTER, ITERATION = "module: ", "phase: ", "lora: adapter", "iteration "
# torch's own name of an iteration, in traces of other programs.
STEP = "ProfilerStep#"

FORWARD, BACKWARD = "forward", "backward"
# megatron-core's timers -> phase of the ranges that --profile makes of them; timers of other names are passed over.
TIMERS = {
    "forward-compute": FORWARD,
    "backward-compute": BACKWARD,
    "all-grads-sync": "gradient sync",
    "conditional-embedder-grads-all-reduce": "gradient sync",
    "non-tensor-parallel-grads-all-reduce": "gradient sync",
    "embedding-grads-all-reduce": "gradient sync",
    "forward-recv": "pipeline",
    "forward-send": "pipeline",
    "backward-recv": "pipeline",
    "backward-send": "pipeline",
    "forward-send-backward-recv": "pipeline",
    "backward-send-forward-recv": "pipeline",
    "forward-send-forward-recv": "pipeline",
    "backward-send-backward-recv": "pipeline",
    "forward-backward-send-forward-backward-recv": "pipeline",
}
DATA, SCHEDULE, OPTIMIZER, BETWEEN = "data", "schedule", "optimizer", "between iterations"
UNKNOWN_PHASE = "outside phases"


def collective(name: str) -> str:
    """The kind of a kernel or call that communicates."""
    plain = re.sub(r"[-_ ]", "", name.lower())
    return next((kind for piece, kind in COLLECTIVES if piece in plain), OTHER_COLLECTIVE)


def part(module: str) -> str:
    """Of the model that a module with this name belongs to."""
    return next((name for pattern, name in PARTS if re.search(pattern, module)), REST_OF_MODEL)
