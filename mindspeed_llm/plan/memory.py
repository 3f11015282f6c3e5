"""Bytes per device, estimated from the shape and the layout before anything is allocated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from mindspeed_llm.checkpoint.names import EMBEDDING
from mindspeed_llm.models.layouts import local_shape
from mindspeed_llm.models.mapping import tensor_pairs
from mindspeed_llm.models.nf4_weight import is_quantized
from mindspeed_llm.models.recompute_options import RecomputeOptions
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.models.tensor_names import layer_index
from mindspeed_llm.ops.nf4 import BLOCK_SIZE, SCALE_BLOCK_SIZE
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.plan.activations import (
    ALL_WHOLE,
    NONE_WHOLE,
    NOTHING_SWAPPED,
    LayerActivations,
    Swapping,
    WholeLayers,
    micro_batches_in_flight,
)
from mindspeed_llm.plan.adapters import AdapterSettings
from mindspeed_llm.plan.optimizer_memory import PLAIN, OptimizerForm
from mindspeed_llm.plan.trained import EVERYTHING, TrainedParts, head_name

# Adam's two moments in fp32; with 16-bit weights also their fp32 masters.
MOMENT_BYTES, MASTER_BYTES, GRADIENT_BYTES = 8, 4, 4
# Of a number in NF4 with double quantisation: its code, its share of its block's scale, of a group's scale and mean.
NF4_BYTES = 1 / 2 + 1 / BLOCK_SIZE + 8 / (BLOCK_SIZE * SCALE_BLOCK_SIZE)

NOTHING_DROPPED = RecomputeOptions()


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on a device of one pipeline stage at the peak of a step. Activations and temporary tensors are estimates.

    Attributes:
        activations: what is saved for the backward pass.
        temporary: the loss's logits of one chunk; a weight in NF4 made dense; what the optimizer's step needs beyond
            these and the activations, which are gone by then.
        stage: number of the pipeline stage.
        optimizer_on_host: bytes of optimizer state in memory of the host; those of `optimizer` are without them.
        swapped: bytes of activations that lie on the host at the peak; those of `activations` are without them.
        parts: of `activations`, by what saves them: modules of the layers (`--swap-modules`), and the names that stand
            in `plan.activations`.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int = 0
    stage: int = 0
    optimizer_on_host: int = 0
    swapped: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All five together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


@dataclass
class LocalParameters:
    """Parameters on one device: of routed experts, and all others. Their replicas are different ranks."""

    dense: int = 0
    expert: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.expert


@dataclass(frozen=True)
class _Sizing:
    """What the sizes of a device's tensors depend on. A shape has dictionaries in it, and so no hash."""

    shape: ModelShape = field(hash=False)
    tp: int
    expert_tp: int
    padded_vocab: int


def local_sizes(shape: ModelShape, layout: ParallelLayout, padded_vocab: int) -> tuple[tuple[str, bool, int], ...]:
    """Of every parameter: its mcore name, whether it is a routed expert's, and its numbers on a device that has it."""
    return _sizes(_Sizing(shape, layout.tp, layout.expert_tp, padded_vocab))


# Advice estimates some thousand plans of one model, which may have ten thousand experts.
@functools.lru_cache(maxsize=8)
def _sizes(of: _Sizing) -> tuple[tuple[str, bool, int], ...]:
    found = []
    for pair in tensor_pairs(of.shape):
        if not pair.mcore.endswith("expert_bias"):  # a buffer
            tp = of.expert_tp if pair.layout.expert else of.tp
            size = prod(local_shape(pair.mcore, of.shape, tp, of.padded_vocab))
            found.append((pair.mcore, bool(pair.layout.expert), size))
    return tuple(found)


def parameters_by_stage(
    shape: ModelShape,
    layout: ParallelLayout,
    padded_vocab: int,
    counted: Callable[[str], bool] = lambda name: True,
) -> list[LocalParameters]:
    """Parameters of one device of each pipeline stage, exactly, by the family's tensor table.

    Args:
        counted: whether a tensor of that mcore name counts.
    """
    stages = [LocalParameters() for _ in range(layout.pp)]
    for name, is_expert, size in local_sizes(shape, layout, padded_vocab):
        if not counted(name):
            continue
        for stage in _stages_of(name, shape, layout):
            if is_expert:
                stages[stage].expert += size
            else:
                stages[stage].dense += size
    for stage in stages:
        stage.expert //= layout.ep
    return stages


def count_parameters(shape: ModelShape, counted: Callable[[str], bool]) -> int:
    """Parameters of the unpadded model whose tensors count."""
    return sum(size for name, _, size in _sizes(_Sizing(shape, 1, 1, shape.vocab_size)) if counted(name))


def largest_quantized(shape: ModelShape, layout: ParallelLayout) -> int:
    """Numbers of the largest matrix of a device that --qlora holds in NF4."""
    return max(
        prod(local_shape(pair.mcore, shape, layout.expert_tp if pair.layout.expert else layout.tp, None))
        for pair in tensor_pairs(shape)
        if is_quantized(pair.mcore)
    )


def _stages_of(name: str, shape: ModelShape, layout: ParallelLayout) -> set[int]:
    """Pipeline stages that hold a tensor; the last one needs the embedding too if it is tied, or predicts more."""
    layer, last = layer_index(name), layout.pp - 1
    if layer is not None:
        return {layout.layers.place(layer)[0]}
    if name == EMBEDDING:
        return {0, last} if shape.tie_word_embeddings or shape.mtp_num_layers else {0}
    return {last}


def estimate(shape: ModelShape, layout: ParallelLayout, **of_the_run: Any) -> MemoryEstimate:
    """The estimate of the fullest pipeline stage; arguments of `estimate_stages`."""
    return max(estimate_stages(shape, layout, **of_the_run), key=lambda stage: stage.total)


def estimate_stages(
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    padded_vocab: int,
    dtype_bytes: int,
    adapter_parameters: int,
    tokens_per_microbatch: int,
    micro_batches: int,
    sequence_parallel: bool,
    distributed_optimizer: bool,
    recompute: str | None,
    loss_chunk: int | None,
    whole_layers: WholeLayers = ALL_WHOLE,
    swapping: Swapping = NOTHING_SWAPPED,
    dropping: RecomputeOptions = NOTHING_DROPPED,
    quantized: bool = False,
    score_bytes: float = 0.0,
    adapted: AdapterSettings | None = None,
    trained: TrainedParts = EVERYTHING,
    mask_bytes: int = 0,
    optimizer: OptimizerForm = PLAIN,
    prepacked: Container[str] = (),
) -> list[MemoryEstimate]:
    """The estimate for one training process of every pipeline stage.

    Args:
        dtype_bytes: of weights and activations (2 for bf16/fp16, 4 for fp32).
        adapter_parameters: of all ranks of a replica, beside the model's own.
        tokens_per_microbatch: micro-batch size x sequence length.
        recompute: None, "selective" or "full".
        loss_chunk: rows of logits that are held at once; None for all of them, saved for the backward pass.
        whole_layers: with "full", which layers.
        swapping: what of the activations goes to the host.
        dropping: parts of layers that are computed once more.
        quantized: the linears of the layers are in NF4, and one of them is made dense at a time.
        score_bytes: that attention keeps of a token's probabilities, for each head.
        adapted: the adapters.
        trained: what is trained of the model itself.
        mask_bytes: of a number that adapters' dropout keeps or not; 0 where nothing of it is saved.
        optimizer: how its state is kept.
        prepacked: mcore names of the weights that lie in memory twice more, laid out for their products.
    """
    whole = whole_layers if recompute == "full" else NONE_WHOLE
    layers = LayerActivations(
        shape,
        layout,
        sequence_parallel,
        dtype_bytes,
        whole,
        dropping,
        swapping,
        score_bytes,
        adapted,
        trained,
        mask_bytes,
    )
    numbers = _numbers_by_stage(shape, layout, padded_vocab, adapter_parameters, quantized, trained)
    laid_out = parameters_by_stage(shape, layout, padded_vocab, lambda name: name in prepacked) if prepacked else None
    dense_copy = largest_quantized(shape, layout) * dtype_bytes if quantized else 0
    tokens = -(-tokens_per_microbatch // layout.cp)
    rows = padded_vocab // layout.tp
    head = rows * shape.hidden_size if trained.has(head_name(shape)) else 0
    estimates = []
    for stage, of_stage in enumerate(numbers):
        outside = logits = 0
        if stage == layout.pp - 1:
            outside, logits = _loss_bytes(layers, tokens, rows, head, loss_chunk)
        in_flight = micro_batches_in_flight(layout, stage, micro_batches)
        parts, swapped = layers.of_stage(stage, tokens, in_flight, outside)
        own, activations = of_stage.stepped(layout, distributed_optimizer), sum(parts.values())
        estimates.append(
            MemoryEstimate(
                weights=of_stage.weight_bytes(dtype_bytes)
                + (2 * laid_out[stage].total * dtype_bytes if laid_out else 0),
                gradients=of_stage.trained.total * GRADIENT_BYTES,
                optimizer=optimizer.resident(own, dtype_bytes),
                activations=activations,
                temporary=max(logits + dense_copy, optimizer.in_step(own, dtype_bytes) - activations),
                stage=stage,
                optimizer_on_host=optimizer.on_host(own, dtype_bytes),
                swapped=swapped,
                parts=parts,
            )
        )
    return estimates


@dataclass(frozen=True)
class _StageNumbers:
    """Parameters of one device of a stage.

    Attributes:
        model: the model's own, of which `in_nf4` are quantised.
        adapters: beside them.
        trained: of both.
    """

    model: LocalParameters
    in_nf4: LocalParameters
    adapters: LocalParameters
    trained: LocalParameters

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Of everything that the device multiplies by."""
        dense = int((self.model.total - self.in_nf4.total) * dtype_bytes + self.in_nf4.total * NF4_BYTES)
        return dense + self.adapters.total * dtype_bytes

    def stepped(self, layout: ParallelLayout, distributed_optimizer: bool) -> float:
        """Numbers whose state is here: the distributed optimizer shares it among all ranks that hold a copy."""
        copies, expert_copies = (layout.dp * layout.cp, layout.edp) if distributed_optimizer else (1, 1)
        return self.trained.dense / copies + self.trained.expert / expert_copies


def _numbers_by_stage(
    shape: ModelShape,
    layout: ParallelLayout,
    padded_vocab: int,
    adapter_parameters: int,
    quantized: bool,
    trained: TrainedParts,
) -> list[_StageNumbers]:
    model = parameters_by_stage(shape, layout, padded_vocab)
    in_nf4 = parameters_by_stage(shape, layout, padded_vocab, is_quantized if quantized else lambda name: False)
    stepped = model
    if trained.nothing:
        stepped = [LocalParameters() for _ in model]
    elif not trained.everything:
        stepped = parameters_by_stage(shape, layout, padded_vocab, trained.has_tensor)
    adapters = LocalParameters(dense=adapter_parameters // (layout.tp * layout.pp))
    return [
        _StageNumbers(own, coded, adapters, LocalParameters(part.dense + adapters.dense, part.expert))
        for own, coded, part in zip(model, in_nf4, stepped)
    ]


def _loss_bytes(layers: LayerActivations, tokens: int, rows: int, head: int, loss_chunk: int | None) -> tuple[int, int]:
    """What final norm and loss save, and the logits they hold for a while.

    Args:
        rows: of the output layer on this device.
        head: trained numbers of the output layer on this device.
    """
    hidden = layers.shape.hidden_size * tokens
    if loss_chunk is None:  # inputs of norm and head, and the logarithms of all probabilities in fp32
        every = rows * layers.layout.tp * tokens
        return 2 * hidden // layers.shares * layers.dtype_bytes + 4 * every, every * (4 + layers.dtype_bytes)
    # The loss has the gradients of the head and of what it is given before its backward pass, the head's in fp32 where
    # it is a sum over chunks.
    wide = 4 if tokens > loss_chunk else layers.dtype_bytes
    saved = hidden * (1 + 1 / layers.shares) * layers.dtype_bytes + head * wide
    return int(saved), min(loss_chunk, tokens) * rows * layers.dtype_bytes
