"""Which parts of a model swap what they save: modules by upstream's names, and the inputs that recomputation keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mindspeed_llm.memory.swap import ActivationSwap, in_backward, unpack
from mindspeed_llm.memory.swapped import SavedView, SavedWhole

# --swap-modules -> the module of a decoder layer, and its methods that compute. The norm before the MLP is computed
# with the sum it normalises (models.layer), ahead of the call that returns it.
MODULES = {
    "input_norm": ("input_layernorm", ("forward",)),
    "self_attention": ("self_attention", ("forward",)),
    "post_attention_norm": ("pre_mlp_layernorm", ("forward", "of_sum")),
    "mlp": ("mlp", ("forward",)),
}


def install(swap: ActivationSwap, chunks: Sequence[nn.Module], modules: Sequence[str], layer_inputs: bool) -> None:
    """Let the layers of built chunks swap; of every layer the methods of its own are wrapped, nothing else changes.

    Args:
        modules: names of `MODULES`.
        layer_inputs: of recomputed layers, also swap the inputs they are recomputed from.
    """
    for number, chunk in enumerate(chunks):
        decoder = chunk.decoder
        _wrap(decoder, "forward", functools.partial(_chunk, swap, decoder))
        if layer_inputs:
            _wrap(decoder, "_checkpointed_forward", functools.partial(_recomputed, swap, number))
        for index, layer in enumerate([*decoder.layers, *_prediction_layers(chunk)]):
            _wrap(layer, "forward", functools.partial(_layer, swap, (number, index), layer_inputs))
            for name in modules:
                attribute, methods = MODULES[name]
                module = getattr(layer, attribute)
                for method in methods:
                    if hasattr(module, method):
                        _wrap(module, method, functools.partial(_region, swap))


def _prediction_layers(chunk: nn.Module) -> list[nn.Module]:
    """The transformer layers inside those that predict further tokens, behind the decoder's on the last stage."""
    return [layer.transformer_layer for layer in chunk.mtp.layers] if chunk.mtp_process else []


def _wrap(module: nn.Module, method: str, around: Callable[..., Any]) -> None:
    """Replace a method of this very module by `around(original, *arguments)`."""
    original = getattr(module, method)
    setattr(module, method, functools.wraps(original)(functools.partial(around, original)))


def _chunk(swap: ActivationSwap, decoder: nn.Module, original: Callable, *arguments: Any, **keywords: Any) -> Any:
    """The layers of a chunk: what they are given is held by the caller until they are done, or longer."""
    if not torch.is_grad_enabled():
        return original(*arguments, **keywords)
    swap.begin_chunk(_tensors((arguments, keywords, decoder.input_tensor)))
    return original(*arguments, **keywords)


def _layer(
    swap: ActivationSwap,
    place: tuple[int, int],
    shielded: bool,
    original: Callable,
    *arguments: Any,
    **keywords: Any,
) -> Any:
    """A layer: a pass of its own, unless it runs to be recomputed later, or is recomputed now."""
    if not torch.is_grad_enabled() or in_backward():
        if not in_backward():
            swap.allowance.begin_layer()
        return original(*arguments, **keywords)
    swap.allowance.begin_layer()
    swap.begin_layer(place)
    if shielded:  # from the hooks for the inputs of recomputed layers
        with saved_tensors_hooks(_same, _same):
            output = original(*arguments, **keywords)
    else:
        output = original(*arguments, **keywords)
    swap.end_layer(output[0])
    return output


def _region(swap: ActivationSwap, original: Callable, *arguments: Any, **keywords: Any) -> Any:
    """A chosen module of a layer."""
    if swap.running is None or not torch.is_grad_enabled():
        return original(*arguments, **keywords)
    with swap.running.saving():
        return original(*arguments, **keywords)


def _recomputed(swap: ActivationSwap, chunk: int, original: Callable, *arguments: Any, **keywords: Any) -> Any:
    """The layers of a chunk under full recomputation, each of which keeps its input: a pass for each of those."""
    if not torch.is_grad_enabled():
        return original(*arguments, **keywords)
    with saved_tensors_hooks(_InputPasses(swap, chunk).pack, unpack):
        return original(*arguments, **keywords)


class _InputPasses:
    """Passes that save one tensor each, at their end."""

    def __init__(self, swap: ActivationSwap, chunk: int):
        self._swap, self._chunk, self._count = swap, chunk, 0

    def pack(self, tensor: Tensor) -> SavedView | SavedWhole:
        if not self._swap.may_go(tensor):
            return SavedWhole(tensor, tensor._version)
        layer = self._swap.begin_layer((self._chunk, "input", self._count))
        self._count += 1
        saved = layer.pack(tensor)
        self._swap.end_input()
        return saved


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments, those of megatron-core's description of packed rows included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSeqParams):
        yield from _tensors(vars(value))
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
