"""Bytes per device, estimated from the shape and the layout before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from mindspeed_llm.checkpoint.names import EMBEDDING
from mindspeed_llm.config.memory import SMALL_BYTES
from mindspeed_llm.models.layouts import local_shape
from mindspeed_llm.models.mapping import tensor_pairs
from mindspeed_llm.models.nf4_weight import is_quantized
from mindspeed_llm.models.recompute_options import RecomputeOptions
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.models.tensor_names import layer_index
from mindspeed_llm.ops.nf4 import BLOCK_SIZE, SCALE_BLOCK_SIZE
from mindspeed_llm.parallel.layout import ParallelLayout

# Adam's two moments in fp32; with 16-bit weights also their fp32 masters.
MOMENT_BYTES, MASTER_BYTES, GRADIENT_BYTES = 8, 4, 4
# Of a number in NF4 with double quantisation: its code, its share of its block's scale, of a group's scale and mean.
NF4_BYTES = 1 / 2 + 1 / BLOCK_SIZE + 8 / (BLOCK_SIZE * SCALE_BLOCK_SIZE)

NOTHING_DROPPED = RecomputeOptions()


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on a device of the fullest stage. Activations are an estimate: the layers' saved tensors and the loss.

    Attributes:
        stage: number of the pipeline stage.
        swapped: bytes of activations that lie on the host at the peak; those of `activations` are without them.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    stage: int = 0
    swapped: int = 0

    @property
    def total(self) -> int:
        """All four together."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Swapping:
    """What activation swap moves: `--swap-attention` with its modules, `--swap-layer-input`, and the bytes allowed."""

    modules: tuple[str, ...] = ()
    layer_inputs: bool = False
    limit: int | None = None

    def away(self, layers: list[float], micro_batches: float) -> int:
        """Bytes on the host at the peak, of layers that each let so many bytes go, for so many micro-batches at once.

        The layer that runs and the one before or behind it have theirs on the device (`memory.swap`).
        """
        everything = sum(layers) * micro_batches - sum(sorted(layers)[-2:])
        return int(max(min(everything, self.limit or everything), 0))


@dataclass
class LocalParameters:
    """Parameters on one device: of routed experts, and all others. Their replicas are different ranks."""

    dense: int = 0
    expert: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.expert


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
    for pair in tensor_pairs(shape):
        if pair.mcore.endswith("expert_bias") or not counted(pair.mcore):  # a buffer
            continue
        size = 1
        tp = layout.expert_tp if pair.layout.expert else layout.tp
        for dim in local_shape(pair.mcore, shape, tp, padded_vocab):
            size *= dim
        for stage in _stages_of(pair.mcore, shape, layout):
            if pair.layout.expert:
                stages[stage].expert += size
            else:
                stages[stage].dense += size
    for stage in stages:
        stage.expert //= layout.ep
    return stages


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


def estimate(
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    padded_vocab: int,
    dtype_bytes: int,
    adapter_parameters: int | None,
    tokens_per_microbatch: int,
    micro_batches: int,
    sequence_parallel: bool,
    distributed_optimizer: bool,
    recompute: str | None,
    loss_chunk: int,
    swapping: Swapping = Swapping(),
    dropping: RecomputeOptions = NOTHING_DROPPED,
    quantized: bool = False,
) -> MemoryEstimate:
    """The estimate for one training process of the fullest pipeline stage.

    Args:
        dtype_bytes: of weights and activations (2 for bf16/fp16, 4 for fp32).
        adapter_parameters: trained parameters when the model itself is frozen; None trains all of it.
        tokens_per_microbatch: micro-batch size x sequence length.
        recompute: None, "selective" or "full".
        swapping: what of the activations goes to the host.
        dropping: parts of layers that are computed once more.
        quantized: the linears of the layers are in NF4, and one of them is made dense at a time.
    """
    per_parameter = MOMENT_BYTES + (MASTER_BYTES if dtype_bytes == 2 else 0)
    # The distributed optimizer shares the state of a parameter among all ranks that hold a copy of it.
    copies, expert_copies = (layout.dp * layout.cp, layout.edp) if distributed_optimizer else (1, 1)
    tokens = -(-tokens_per_microbatch // layout.cp)
    layer_parts = [
        activation_bytes_per_token(shape, layout, layer, sequence_parallel=sequence_parallel, dtype_bytes=dtype_bytes)
        for layer in range(shape.num_layers)
    ]
    shares = layout.tp if sequence_parallel else 1
    in_nf4 = parameters_by_stage(shape, layout, padded_vocab, is_quantized if quantized else lambda name: False)
    dense_copy = largest_quantized(shape, layout) * dtype_bytes if quantized else 0
    estimates = []
    for stage, local in enumerate(parameters_by_stage(shape, layout, padded_vocab)):
        trained = local
        if adapter_parameters is not None:
            trained = LocalParameters(dense=adapter_parameters // (layout.tp * layout.pp))
        indices = [layer for v in range(layout.layers.vpp) for layer in _layers(layout, stage, v)]
        here = [int(sum(layer_parts[layer].values())) for layer in indices]
        # Embedding output, final norm, and what the loss computes in advance.
        held = 4 * shape.hidden_size * dtype_bytes // shares if stage in (0, layout.pp - 1) else 0
        in_flight = micro_batches_in_flight(layout, stage, micro_batches)
        if recompute == "full":
            kept = [shape.hidden_size * dtype_bytes / shares] * len(here)
            held += max(here, default=0)
            going = kept if swapping.layer_inputs else []
        else:
            sizes = [len(_layers(layout, stage, v)) for v in range(layout.layers.vpp)]
            places = range(len(indices)) if dropping.per_rank else [place for size in sizes for place in range(size)]
            dropped = [
                dropped_bytes_per_token(shape, layout, layer, place, dropping, shares=shares, dtype_bytes=dtype_bytes)
                for place, layer in zip(places, indices)
            ]
            kept = [sum(layer_parts[layer].values()) - sum(gone.values()) for layer, gone in zip(indices, dropped)]
            # While a layer's backward pass runs, it has what was dropped.
            held += max(map(int, (sum(gone.values()) for gone in dropped)), default=0)
            going = [
                sum(layer_parts[layer][part] - gone.get(part, 0) for part in swapping.modules)
                for layer, gone in zip(indices, dropped)
            ]
        if tokens * shape.hidden_size * dtype_bytes / shares < SMALL_BYTES:
            going = []
        swapped = swapping.away([each * tokens for each in going], in_flight)
        activations = int((held + sum(kept) * in_flight) * tokens) - swapped
        if stage == layout.pp - 1:
            activations += min(loss_chunk, tokens) * (padded_vocab // layout.tp) * 4 * 2
            # The loss has the gradient of the head before its backward pass.
            activations += padded_vocab * shape.hidden_size * 4 // layout.tp if adapter_parameters is None else 0
        estimates.append(
            MemoryEstimate(
                weights=int((local.total - in_nf4[stage].total) * dtype_bytes + in_nf4[stage].total * NF4_BYTES),
                gradients=trained.total * GRADIENT_BYTES,
                optimizer=int(per_parameter * (trained.dense / copies + trained.expert / expert_copies)),
                activations=activations + dense_copy,
                stage=stage,
                swapped=swapped,
            )
        )
    return max(estimates, key=lambda estimate: estimate.total)


def _layers(layout: ParallelLayout, stage: int, chunk: int) -> list[int]:
    return list(layout.layers.layers(stage, chunk).values())


def micro_batches_in_flight(layout: ParallelLayout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once; with virtual stages, in units of all its chunks.

    1F1B runs (stages behind this one) + 1 forward passes before the first backward pass. The interleaved schedule runs
    2 (stages behind) + (chunks - 1) stages + 1 of them, each of one chunk (Narayanan et al. 2021, section 2.2, and
    megatron-core's `get_pp_rank_microbatches`).
    """
    behind = layout.pp - 1 - stage
    chunks = layout.layers.vpp
    if chunks == 1:
        return min(behind + 1, micro_batches)
    return min(2 * behind + (chunks - 1) * layout.pp + 1, micro_batches * chunks) / chunks


def activation_bytes_per_token(
    shape: ModelShape, layout: ParallelLayout, layer: int, *, sequence_parallel: bool, dtype_bytes: int
) -> dict[str, float]:
    """Saved tensors of one layer for each of this rank's tokens, by the part that saves them (`--swap-modules`).

    Norm inputs and outputs, q, k, v, attention output, inputs and outputs of the activation function; of experts also
    the rows sent to them and back, with an even spread of the tokens. The counting of Korthikanti et al., "Reducing
    Activation Recomputation in Large Transformer Models" (2022), section 4, for a gated MLP, an attention without
    stored scores and no dropout masks.
    """
    shares = layout.tp if sequence_parallel else 1
    hidden = shape.hidden_size / shares
    return {
        "input_norm": hidden * dtype_bytes,
        "self_attention": (hidden + _attention_values(shape, layout.tp, shares)) * dtype_bytes,
        "post_attention_norm": hidden * dtype_bytes,
        "mlp": hidden * dtype_bytes + _mlp_bytes(shape, layout, layer, shares, dtype_bytes),
    }


def _mlp_bytes(shape: ModelShape, layout: ParallelLayout, layer: int, shares: int, dtype_bytes: int) -> float:
    """Saved bytes of a rank's part of an MLP or of experts, per token, without its input."""
    tp = layout.tp
    width = 3 if shape.gated_linear_unit else 2
    if not shape.is_moe_layer(layer):
        return width * shape.ffn_hidden_size / tp * dtype_bytes
    rows = 2 * shape.hidden_size + width * shape.moe_ffn_hidden_size / layout.expert_tp
    values = shape.moe_router_topk * rows * layout.expert_tp / tp
    values += width * (shape.moe_shared_expert_intermediate_size or 0) / tp
    return values * dtype_bytes + 4 * shape.num_moe_experts / shares


def dropped_bytes_per_token(
    shape: ModelShape,
    layout: ParallelLayout,
    layer: int,
    place: int,
    options: RecomputeOptions,
    *,
    shares: int,
    dtype_bytes: int,
) -> dict[str, float]:
    """Of `activation_bytes_per_token`, what a layer drops and computes once more, by the part that would save it.

    Args:
        place: of the layer in what the numbers of `options` count, a chunk or a rank, from 0.
    """
    hidden, is_moe, gone = shape.hidden_size / shares, shape.is_moe_layer(layer), {}
    mlp = _mlp_bytes(shape, layout, layer, shares, dtype_bytes) / dtype_bytes
    parts = 3 if shape.gated_linear_unit else 2  # in and out of the activation function
    if place < options.norm:
        gone = {"self_attention": hidden, "mlp": hidden}
    if is_moe and place < options.expert_layer:
        gone["mlp"] = gone.get("mlp", 0) + mlp
    elif is_moe and place < options.experts:
        gone["mlp"] = gone.get("mlp", 0) + shape.moe_router_topk * parts * shape.moe_ffn_hidden_size / layout.tp
    elif is_moe and place < max(options.activation, options.expert_activation):
        gone["mlp"] = gone.get("mlp", 0) + shape.moe_router_topk * shape.moe_ffn_hidden_size / layout.tp
    elif not is_moe and place < options.activation:
        gone["mlp"] = gone.get("mlp", 0) + shape.ffn_hidden_size / layout.tp
    if options.latent:
        made = shape.num_attention_heads * (2 * shape.kv_channels + shape.v_head_dim)
        made += shape.num_attention_heads * (shape.qk_head_dim + shape.v_head_dim)
        latents = 2 * ((shape.q_lora_rank or 0) + shape.kv_lora_rank) if options.latent == "all" else 0
        gone["self_attention"] = gone.get("self_attention", 0) + made / layout.tp + latents / shares
    return {part: values * dtype_bytes for part, values in gone.items()}


def _attention_values(shape: ModelShape, tp: int, shares: int) -> float:
    """Saved values of a rank's part of an attention per token; what is not cut by heads is cut into `shares`."""
    n, d = shape.num_attention_heads, shape.kv_channels
    if not shape.multi_latent_attention:
        return (2 * n + 2 * shape.num_query_groups) * d / tp
    # q, k, v, the output, the up-projected keys and values that k and v were cut from, and the latent vectors.
    up = n * (shape.qk_head_dim + shape.v_head_dim)
    latent = 2 * ((shape.q_lora_rank or 0) + shape.kv_lora_rank) + shape.qk_pos_emb_head_dim
    return (2 * n * d + 2 * n * shape.v_head_dim + up) / tp + latent / shares
