"""Patches of megatron.core.inference.contexts.attention_context.triton.tensor_ops: its kernels in torch.

They move rows of the states of requests, from or to a place that only the device knows. As in megatron, what does not
fit is an AssertionError, and bounds are looked at only with `check_bounds`: they cost a wait for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from mindspeed_llm.patching import Patch


def _check(*tensors: Tensor) -> None:
    first = tensors[0]
    assert all(other.device == first.device for other in tensors), "all tensors must be on one device"
    assert all(other.dtype == first.dtype for other in tensors), "all tensors must have one dtype"
    assert all(other.is_contiguous() for other in tensors), "all tensors must be contiguous"


def _check_rows(place: int, first: Tensor, *others: Tensor) -> None:
    assert all(other.shape[1:] == first.shape[1:] for other in others), "all tensors must have rows of one shape"
    assert 0 <= place <= first.shape[0], f"the place is {place}; legal: 0 to {first.shape[0]}"


def _slice_after(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def tensor_get_slice_after(
        input_tensor: Tensor, output_tensor: Tensor, pos_on_device: Tensor, check_bounds: bool = False
    ) -> None:
        if input_tensor.is_cuda:
            return original(input_tensor, output_tensor, pos_on_device, check_bounds)
        _check(input_tensor, output_tensor)
        place = int(pos_on_device[0])
        rows = input_tensor[max(place, 0) :]
        if check_bounds:
            _check_rows(place, input_tensor, output_tensor)
            assert len(rows) <= output_tensor.shape[0], f"{len(rows)} rows do not fit in {output_tensor.shape[0]}"
        rows = rows[: output_tensor.shape[0]]
        output_tensor[: len(rows)] = rows

    return tensor_get_slice_after


def _merge(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def tensor_merge(
        tensor_a: Tensor,
        tensor_b: Tensor,
        pos_on_device: Tensor,
        output_tensor: Tensor | None = None,
        check_bounds: bool = False,
    ) -> None:
        if tensor_a.is_cuda:
            return original(tensor_a, tensor_b, pos_on_device, output_tensor, check_bounds)
        output = tensor_a if output_tensor is None else output_tensor
        _check(tensor_a, tensor_b, output)
        place = int(pos_on_device[0])
        if check_bounds:
            _check_rows(place, tensor_a, tensor_b, output)
            assert output.shape[0] >= tensor_a.shape[0], f"{tensor_a.shape[0]} rows do not fit in {output.shape[0]}"
        if output is not tensor_a:
            output[:place] = tensor_a[:place]
        end = min(place + tensor_b.shape[0], output.shape[0])
        output[place:end] = tensor_b[: end - place]

    return tensor_merge


def _masked_update(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def tensor_masked_update(states: Tensor, idx: Tensor, new_states: Tensor) -> None:
        if states.is_cuda:
            return original(states, idx, new_states)
        assert idx.ndim == 1, "idx must have one dimension"
        assert states.shape[1:] == new_states.shape[1:], "State dimensions must match"
        assert states.ndim in (2, 3, 4), "states must have two to four dimensions"
        meant = idx != -1
        states[idx[meant].long()] = new_states[: len(idx)][meant]

    return tensor_masked_update


def _patch(name: str, function: str, wrap: Callable[..., Callable[..., None]], fingerprint: str) -> Patch:
    return Patch(
        name=name,
        target=f"megatron.core.inference.contexts.attention_context.triton.tensor_ops:{function}",
        why="it is a Triton kernel, which runs on CUDA alone",
        wrap=wrap,
        versions=">=0.16",
        fingerprints={"0.16.1": fingerprint},
        needs="triton",
    )


PATCHES = (
    _patch("states-slice-after", "tensor_get_slice_after", _slice_after, "48ff47058b3b"),
    _patch("states-merge", "tensor_merge", _merge, "d7bf851ff853"),
    _patch("states-masked-update", "tensor_masked_update", _masked_update, "18a5051fcbc9"),
)
