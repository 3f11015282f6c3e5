"""What layers save for the backward pass, counted from the shape: bytes of a token, by the part that saves them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed_llm.checkpoint.names import EMBEDDING
from mindspeed_llm.config.memory import SMALL_BYTES
from mindspeed_llm.models.mapping import tensor_pairs
from mindspeed_llm.models.recompute_options import ALL_LAYERS, RecomputeOptions
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.models.tensor_names import layer_index
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.plan.adaptable import Adaptable, adaptable_linears
from mindspeed_llm.plan.adapters import AdapterSettings
from mindspeed_llm.plan.trained import EVERYTHING, TrainedParts

# What layers that are recomputed as a whole keep.
LAYER_INPUTS = "layer inputs"
# What was dropped, of the layers whose backward pass runs.
RECOMPUTED = "recomputed layers"
# What embedding, final norm, output layer and loss save.
OUTSIDE = "outside the layers"
# Of a token sent to an expert: its share in fp32 twice, and three integers that say where it came from and goes.
ROUTING_BYTES = 2 * 4 + 3 * 8


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


@dataclass(frozen=True)
class WholeLayers:
    """Layers that are recomputed as a whole.

    Attributes:
        count: of each pipeline chunk (or rank, where those are counted), from its first on.
        at_once: layers that keep one input together.
    """

    count: int = ALL_LAYERS
    at_once: int = 1


ALL_WHOLE, NONE_WHOLE = WholeLayers(), WholeLayers(count=0)
NOTHING_SWAPPED = Swapping()


@dataclass(frozen=True)
class LayerActivations:
    """What the layers of a stage save, by the options of a run.

    Attributes:
        dtype_bytes: of activations.
        whole: layers that keep their input alone.
        dropping: parts of the others that are computed once more.
        swapping: what goes to the host.
        score_bytes: that attention keeps of a token's probabilities, for each head.
        adapted: the adapters.
        trained: what is trained of the model itself; other linears without adapters save no input.
        mask_bytes: of a number that adapters' dropout keeps or not; 0 where the mask is drawn once more.
    """

    shape: ModelShape
    layout: ParallelLayout
    sequence_parallel: bool
    dtype_bytes: int
    whole: WholeLayers
    dropping: RecomputeOptions
    swapping: Swapping
    score_bytes: float = 0.0
    adapted: AdapterSettings | None = None
    trained: TrainedParts = EVERYTHING
    mask_bytes: int = 0

    @property
    def shares(self) -> int:
        """Ranks that share the rows of what is not cut by heads or channels."""
        return self.layout.tp if self.sequence_parallel else 1

    def of_stage(self, stage: int, tokens: int, in_flight: float, outside: int) -> tuple[dict[str, int], int]:
        """Bytes by part at the peak of a stage, and bytes on the host then.

        The peak is at the end of a forward pass, with what final norm and loss save, or in the backward pass of a layer
        with what it recomputes, when those behind it are done.

        Args:
            tokens: of a micro-batch on this rank.
            in_flight: micro-batches whose activations are held at once.
            outside: bytes that are saved outside the layers.
        """
        idle = self._layers_without_gradient() if stage == 0 else set()
        layers = [({}, 0.0) if layer in idle else self._layer(layer, place) for layer, place in self._places(stage)]
        last, again, highest = len(layers), 0.0, outside / tokens
        before = list(itertools.accumulate(sum(kept.values()) for kept, _ in layers))
        for number, (_, recomputed) in enumerate(layers):
            until = before[number] - before[-1] + recomputed
            if until > highest:
                highest, last, again, outside = until, number + 1, recomputed, 0
        parts, swapped = self._kept([kept for kept, _ in layers], last, tokens, in_flight)
        parts |= {RECOMPUTED: again * tokens, OUTSIDE: outside}
        return {part: int(size) for part, size in parts.items() if size}, swapped

    def _kept(
        self, kept: list[dict[str, float]], last: int, tokens: int, in_flight: float
    ) -> tuple[dict[str, float], int]:
        """Bytes that the layers keep, of the newest micro-batch the first `last` alone, and bytes on the host."""
        modules = (*self.swapping.modules, *[LAYER_INPUTS] * self.swapping.layer_inputs)
        if tokens * self.shape.hidden_size * self.dtype_bytes / self.shares < SMALL_BYTES:
            modules = ()
        going = [sum(each.get(part, 0) for part in modules) * tokens for each in kept]
        swapped = self.swapping.away(going, in_flight)
        total: Counter[str] = Counter()
        for number, each in enumerate(kept):
            times = tokens * (in_flight - (number >= last))
            total.update({part: size * times for part, size in each.items()})
        everything = sum(total[part] for part in modules)
        for part in modules:
            total[part] *= 1 - swapped / max(everything, 1)
        return dict(total), swapped

    def _layer(self, layer: int, place: int) -> tuple[dict[str, float], float]:
        """What a layer keeps, and what comes back for its backward pass, for each token."""
        saved = activation_bytes_per_token(
            self.shape, self.layout, layer, sequence_parallel=self.sequence_parallel, dtype_bytes=self.dtype_bytes
        )
        saved["self_attention"] += self.shape.num_attention_heads / self.layout.tp * self.score_bytes
        for part, size in self._saved_by_adapters(layer).items():
            saved[part] += size
        if place < self.whole.count:
            first = place % self.whole.at_once == 0
            kept = {LAYER_INPUTS: self.shape.hidden_size * self.dtype_bytes / self.shares} if first else {}
            return kept, sum(saved.values()) * self.whole.at_once
        gone = dropped_bytes_per_token(
            self.shape,
            self.layout,
            layer,
            place - self.whole.count,
            self.dropping,
            shares=self.shares,
            dtype_bytes=self.dtype_bytes,
        )
        unsaved = self._unsaved(layer)
        kept = {part: size - max(gone.get(part, 0), unsaved.get(part, 0)) for part, size in saved.items()}
        return kept, sum(max(size - unsaved.get(part, 0), 0) for part, size in gone.items())

    def _layers_without_gradient(self) -> set[int]:
        """The first layers, where nothing up to them is trained: they save nothing, unless they are recomputed, which
        asks for a gradient of their input. Later stages are given an input that asks for one."""
        first = self.layout.layers.layers(0, 0).values()
        if self.trained.everything or self.whole.count or self.dropping != RecomputeOptions():
            return set()
        if self.trained.has(EMBEDDING) or (self.adapted is not None and "word_embeddings" in self.adapted.targets):
            return set()
        # A large model has tens of thousands of tensors, and advice estimates it many times.
        tensors = [] if self.trained.nothing else [pair.mcore for pair in tensor_pairs(self.shape)]
        learning = {layer_index(name) for name in tensors if self.trained.has_tensor(name)} - {None}
        if self.adapted is not None:
            learning.update(
                layer
                for linear in adaptable_linears(self.shape)
                for layer in linear.layers or ()
                if self.adapted.adapts(linear.module, layer)
            )
        return {layer for layer in first if layer < min(learning, default=self.shape.num_layers)}

    def _unsaved(self, layer: int) -> dict[str, float]:
        """What frozen linears of a layer do not save, their inputs, for each token; an expert's are counted all the
        same."""
        if self.trained.everything:
            return {}
        is_moe, latent = self.shape.is_moe_layer(layer), self.shape.multi_latent_attention
        hidden = self.shape.hidden_size / self.shares * self.dtype_bytes
        fc2 = 0 if is_moe else self.shape.ffn_hidden_size / self.layout.tp * self.dtype_bytes
        return {
            "self_attention": 0 if latent or self._learns(layer, "self_attention.linear_qkv") else hidden,
            "mlp": (not self._learns(layer, "mlp.linear_fc1")) * hidden
            + (not self._learns(layer, "mlp.linear_fc2")) * fc2,
        }

    def _learns(self, layer: int, linear: str) -> bool:
        """Whether a linear of a layer (in layers with experts: one of theirs) is trained or has an adapter."""
        parent, module = linear.split(".")
        if self.adapted is not None and module in self.adapted.targets:
            return True
        experts = ".experts.local_experts.0" if parent == "mlp" and self.shape.is_moe_layer(layer) else ""
        return self.trained.has_tensor(f"decoder.layers.{layer}.{parent}{experts}.{module}.weight")

    def _saved_by_adapters(self, layer: int) -> dict[str, float]:
        """Beside what the linears of a layer save: the outputs that DoRA's magnitudes multiply; of dropout its mask,
        and the dropped input where the input is saved all the same, for each token."""
        saved: Counter[str] = Counter()
        if self.adapted is None or not (self.adapted.use_dora or self._drops):
            return saved
        for linear in adaptable_linears(self.shape):
            if linear.layers is None or layer not in linear.layers or not self.adapted.adapts(linear.module, layer):
                continue
            is_mlp = ".mlp." in linear.mcore
            size = 0.0
            if self.adapted.use_dora:
                size += sum(out for _, out in linear.parts.values()) * self._rows(linear, "column") * self.dtype_bytes
            if self._drops:
                # Attention saves its output all the same; other inputs were saved for the adapter alone.
                copy = self.dtype_bytes if linear.module == "linear_proj" else 0
                size += linear.in_features * self._rows(linear, "row") * (self.mask_bytes + copy)
            saved["mlp" if is_mlp else "self_attention"] += size
        return saved

    @property
    def _drops(self) -> bool:
        """Whether adapters' dropout saves something."""
        return self.adapted is not None and self.adapted.dropout > 0 and self.mask_bytes > 0

    def _rows(self, linear: Adaptable, cut: str) -> float:
        """Share of a token that a rank has of what a linear reads or writes; `cut` is that by which it is cut too."""
        if linear.experts:
            rows = self.shape.moe_router_topk * self.layout.expert_tp / self.layout.tp
            return rows / (self.layout.expert_tp if linear.cut == cut else 1)
        return 1 / (self.layout.tp if linear.cut == cut else self.shares)

    def _places(self, stage: int) -> Iterator[tuple[int, int]]:
        """The stage's layers, and their places in what the options count: a chunk or a rank."""
        before = 0
        for chunk in range(self.layout.layers.vpp):
            layers = list(self.layout.layers.layers(stage, chunk).values())
            yield from zip(layers, range(before, before + len(layers)))
            before += len(layers) if self.dropping.per_rank else 0


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
    # What the activation function gives is saved before and after its row's share of the token.
    rows = shape.hidden_size + (width + 1) * shape.moe_ffn_hidden_size / layout.expert_tp
    sent = shape.moe_router_topk * layout.expert_tp / tp
    values = sent * rows + width * (shape.moe_shared_expert_intermediate_size or 0) / tp
    return values * dtype_bytes + sent * ROUTING_BYTES + 4 * shape.num_moe_experts / shares


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
        gone["mlp"] = gone.get("mlp", 0) + shape.moe_router_topk * (parts + 1) * shape.moe_ffn_hidden_size / layout.tp
    elif is_moe and place < max(options.activation, options.expert_activation):
        gone["mlp"] = gone.get("mlp", 0) + 2 * shape.moe_router_topk * shape.moe_ffn_hidden_size / layout.tp
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
    # q, k, the output, the up-projected keys and values that v is a view of, and the latent vectors.
    up = n * (shape.qk_head_dim + shape.v_head_dim)
    latent = 2 * ((shape.q_lora_rank or 0) + shape.kv_lora_rank) + shape.qk_pos_emb_head_dim
    return (2 * n * d + n * shape.v_head_dim + up) / tp + latent / shares
