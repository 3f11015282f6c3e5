"""Parts of layers that are computed once more in the backward pass, and in which layers.

megatron-core recomputes whole layers, core attention, MLPs and expert layers by itself. What is here drops the output
of a cheap function that a linear behind it would keep: norms, activation functions, the up projections of latent
attention. Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016); Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models" (2022).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from mindspeed_llm.models.recompute_options import ALL_LAYERS

if TYPE_CHECKING:
    from mindspeed_llm.models.config import ModelConfig


def whole_layers(config: ModelConfig) -> int:
    """Layers at the beginning of a chunk (or rank) that are recomputed as a whole."""
    if config.recompute_granularity != "full":
        return 0
    return config.recompute_num_layers if config.recompute_method == "block" else ALL_LAYERS


def layers_before(config: ModelConfig, vp_stage: int | None) -> int:
    """Layers of this rank that count before those of a chunk: those of its earlier chunks, where a rank is counted."""
    if not config.recompute.per_rank:
        return 0
    return sum(get_num_layers_to_build(config, stage) for stage in range(vp_stage or 0))


def is_chosen(config: ModelConfig, layer_number: int, vp_stage: int | None, count: int) -> bool:
    """Whether a layer is among `count` of its chunk (or rank) behind those that are recomputed as a whole.

    Args:
        layer_number: from 1, in the whole model.
    """
    place = layer_number - 1 - get_transformer_layer_offset(config, vp_stage) + layers_before(config, vp_stage)
    whole = whole_layers(config)
    return whole <= place < whole + count


def count_over_rank(decoder: nn.Module, config: ModelConfig, vp_stage: int | None) -> None:
    """Give megatron's block the number of layers to recompute that is left for its chunk, where a rank is counted."""
    if not config.recompute.per_rank or config.recompute_method != "block":
        return
    decoder.config = copy.copy(config)
    decoder.config.recompute_num_layers = max(config.recompute_num_layers - layers_before(config, vp_stage), 0)


def pass_padding_mask(decoder: nn.Module) -> None:
    """Let the layers behind those that are recomputed as a whole get the padding mask too.

    With --recompute-method block megatron-core 0.16 gives it to the recomputed layers alone, so that the routers of the
    others would count padding in their losses and score biases.
    """
    if decoder.config.recompute_method != "block":
        return
    original, behind = decoder._checkpointed_forward, decoder.layers[decoder.config.recompute_num_layers :]

    def forward(*, padding_mask: Tensor | None = None, **others: Any) -> Tensor:
        def give(_layer: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return arguments, {**keywords, "padding_mask": padding_mask}

        hooks = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in behind]
        try:
            return original(padding_mask=padding_mask, **others)
        finally:
            for hook in hooks:
                hook.remove()

    decoder._checkpointed_forward = forward


def stream_of_rank(config: ModelConfig) -> AbstractContextManager:
    """The context inside a layer in which tensor-parallel ranks draw different dropout masks.

    Under sequence parallelism megatron's block runs all of its layers in that stream. To enter it once more would draw
    the same numbers, but not when the layer is recomputed: that happens outside of the block, with the random state of
    within, while megatron's tracker still has the one with which the block began.
    """
    return nullcontext() if config.sequence_parallel else tensor_parallel.get_cuda_rng_tracker().fork()


def keep(_later: Tensor) -> None:
    """What `without_output` returns where nothing is dropped."""


def without_output(
    function: Callable[..., Any], *inputs: Any, dropped: int | None = None
) -> tuple[Any, Callable[[Tensor], None]]:
    """function(*inputs), and what drops it.

    Args:
        dropped: of several results only so many, the first ones.

    Returns:
        The result, a tensor or several; and `drop(later)`, to be called when everything that uses the result has run:
        its memory is given back, and filled again when the gradient of `later`, computed from it, is known.
    """
    if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return function(*inputs), keep
    # megatron takes False for eight bits too.
    checkpoint = tensor_parallel.CheckpointWithoutOutput(fp8=None)
    result = checkpoint.checkpoint(function, *inputs)
    if dropped is not None:
        checkpoint.outputs = checkpoint.outputs[:dropped]
    return result, checkpoint.discard_output_and_register_recompute
