"""Divisibility and combination rules of a layout and a batch, each with the values that would be legal."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Rule:
    """One condition on the plan.

    Attributes:
        says: the condition with its numbers, e.g. "num_query_groups 4 % tensor parallel 8".
        legal: values that satisfy it.
    """

    area: str
    says: str
    ok: bool
    legal: str

    def problem(self) -> str:
        """The rule as an error line."""
        return f"{self.area}: {self.says} does not hold; legal: {self.legal}"


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def layout_rules(shape: ModelShape, layout: ParallelLayout) -> list[Rule]:
    """Conditions on a layout for a model; that the layers divide is the layer map's."""
    tp = layout.tp
    legal_tp = [d for d in divisors(shape.num_query_groups) if shape.ffn_hidden_size % d == 0]
    tp_text = ", ".join(map(str, legal_tp)) + " for --tensor-model-parallel-size"
    rules = [
        Rule("parallel", f"{name} {value} % tensor parallel {tp} = 0", value % tp == 0, tp_text)
        for name, value in (
            ("num_attention_heads", shape.num_attention_heads),
            ("num_query_groups", shape.num_query_groups),
            ("ffn_hidden_size", shape.ffn_hidden_size),
        )
    ]
    size = tp * layout.pp * layout.cp
    rules += _stage_rules(shape, layout)
    rules += expert_rules(shape, layout)
    rules += prediction_rules(shape, layout)
    rules.append(
        Rule(
            "launch",
            f"world size {layout.world_size} % (tensor parallel {tp} x pipeline parallel {layout.pp} x context "
            f"parallel {layout.cp}) = 0",
            layout.world_size % size == 0,
            f"{size}, {2 * size}, {3 * size}, ... processes (torchrun --nproc-per-node x --nnodes; with --dry-run also "
            "--world-size)",
        )
    )
    return rules


def prediction_rules(shape: ModelShape, layout: ParallelLayout) -> list[Rule]:
    """Conditions on multi-token prediction layers, which follow the last layer on the last stage."""
    if not shape.mtp_num_layers:
        return []
    h, tp, last = shape.hidden_size, layout.tp, layout.layers.layers(layout.pp - 1, layout.layers.vpp - 1)
    sizes = ", ".join(map(str, divisors(h)))
    says = "the last stage holds the last layer, after which multi-token prediction goes on"
    return [
        Rule("parallel", f"hidden_size {h} % tensor parallel {tp} = 0 (multi-token prediction)", h % tp == 0, sizes),
        Rule("pipeline", says, bool(last), "--noop-layers that leave a layer to the last stage and chunk"),
    ]


def _stage_rules(shape: ModelShape, layout: ParallelLayout) -> list[Rule]:
    """What the layer map has checked already, for the values that would be legal too."""
    slots, pp = layout.layers.num_slots, layout.pp
    if pp == 1:
        return []
    chunks = [slots // (pp * layers) for layers in divisors(slots) if slots % (pp * layers) == 0]
    even = f"{', '.join(map(str, divisors(slots)))} for --pipeline-model-parallel-size without --num-layer-list"
    virtual = f"; {', '.join(map(str, sorted(chunks)))} chunks per stage" if chunks else ""
    counted = f"{slots} layers" + (f" ({slots - shape.num_layers} no-op)" if slots > shape.num_layers else "")
    per_stage = f" x {layout.layers.vpp} chunks" if layout.vpp else ""
    return [Rule("pipeline", f"{counted} are shared by {pp} stages{per_stage}", True, even + virtual)]


def expert_rules(shape: ModelShape, layout: ParallelLayout) -> list[Rule]:
    """Conditions on expert parallelism; a model without experts has none to share."""
    ep, etp, experts = layout.ep, layout.expert_tp, shape.num_moe_experts
    if experts is None:
        if ep == 1 and layout.etp is None:
            return []
        says = f"the model has experts for expert parallel {ep} x expert tensor parallel {etp}"
        return [Rule("experts", says, False, "no --expert-model-parallel-size, no --expert-tensor-parallel-size")]
    width, per_stage = shape.moe_ffn_hidden_size, layout.world_size // layout.pp
    sizes = [d for d in divisors(experts) if per_stage % (etp * d) == 0]
    tensor = [d for d in divisors(width) if d <= layout.tp and per_stage % (ep * d) == 0]
    return [
        Rule(
            "experts",
            f"num_moe_experts {experts} % expert parallel {ep} = 0",
            experts % ep == 0,
            f"{', '.join(map(str, sizes))} for --expert-model-parallel-size",
        ),
        Rule(
            "experts",
            f"moe_ffn_hidden_size {width} % expert tensor parallel {etp} = 0",
            width % etp == 0,
            f"{', '.join(map(str, tensor))} for --expert-tensor-parallel-size",
        ),
        Rule(
            "experts",
            f"{per_stage} ranks per stage % (expert parallel {ep} x expert tensor parallel {etp}) = 0",
            per_stage % (ep * etp) == 0,
            f"{', '.join(map(str, sizes))} for --expert-model-parallel-size with these processes",
        ),
    ]


def context_rules(shape: ModelShape, layout: ParallelLayout, *, attention_dropout: float) -> list[Rule]:
    """Conditions on context parallelism, none without it."""
    cp, heads = layout.cp, shape.num_attention_heads // layout.tp
    if cp == 1:
        return []
    exchanging = [d for d in divisors(heads) if cp % d == 0]
    window = layout.ring_window
    ring = cp // layout.ulysses
    return [
        Rule(
            "context",
            f"context parallel {cp} and {heads} heads per rank % {layout.ulysses} ranks that exchange heads = 0",
            layout.ulysses in exchanging,
            f"{', '.join(map(str, exchanging))} ranks (--ulysses-degree-in-cp between 1 and {cp} with "
            f"hybrid_cp_algo, 1 is megatron_cp_algo, {cp} is ulysses_cp_algo)",
        ),
        Rule(
            "context",
            f"ring of {ring} % inner ring of {window} = 0",
            window <= ring and ring % window == 0,
            ", ".join(map(str, divisors(ring))) + " for --cp-window-size",
        ),
        Rule("context", f"attention_dropout {attention_dropout} = 0", attention_dropout == 0, "--attention-dropout 0"),
        Rule(
            "context",
            "no bound of attention scores (--attn-logit-softcapping)",
            shape.attention_softcap is None,
            "--context-parallel-size 1",
        ),
    ]


def batch_rules(micro: int, global_batch: int, data_parallel: int) -> list[Rule]:
    """The batch equation: global = micro x data parallel x k."""
    unit = micro * data_parallel
    below = max(global_batch // unit, 1) * unit
    legal = ", ".join(str(v) for v in dict.fromkeys((below, below + unit)))
    return [
        Rule(
            "batch",
            f"global batch {global_batch} = micro batch {micro} x data parallel {data_parallel} x k",
            global_batch % unit == 0,
            f"nearest for --global-batch-size: {legal}",
        )
    ]


def interleaving_rules(micro: int, global_batch: int, layout: ParallelLayout) -> list[Rule]:
    """The interleaved schedule hands micro-batches around in groups of as many as there are stages."""
    if layout.vpp is None:
        return []
    unit = micro * layout.dp
    group = unit * layout.pp
    below = max(global_batch // group, 1) * group
    legal = ", ".join(str(v) for v in dict.fromkeys((below, below + group)))
    return [
        Rule(
            "batch",
            f"micro-batches {global_batch // unit} % pipeline parallel {layout.pp} = 0 (virtual pipeline)",
            global_batch % group == 0,
            f"nearest for --global-batch-size: {legal}; or no virtual stages",
        )
    ]


def sequence_rules(
    shape: ModelShape, *, seq_length: int, tp: int, sequence_parallel: bool, padded: bool, chunks: int = 1
) -> list[Rule]:
    """Conditions on the sample length; `chunks` are those of --coc-parallel-num."""
    rules = [
        Rule(
            "sequence",
            f"seq_length {seq_length} <= max_position_embeddings {shape.max_position_embeddings}",
            seq_length <= shape.max_position_embeddings,
            f"--seq-length up to {shape.max_position_embeddings}, or a stretched rope in config.json",
        )
    ]
    if sequence_parallel and padded:
        parts = tp * chunks
        lower = seq_length // parts * parts
        divisor = f"tensor parallel {tp}" if chunks == 1 else f"(tensor parallel {tp} * chunks {chunks})"
        rules.append(
            Rule(
                "sequence",
                f"seq_length {seq_length} % {divisor} = 0 (sequence parallel)",
                seq_length % parts == 0,
                f"{lower}, {lower + parts} for --seq-length",
            )
        )
    return rules
