"""Weights in NF4 as bitsandbytes writes them into safetensors: a tensor of codes, and its scales and tables beside it.

    x.weight                                  uint8 [numel / 2, 1], two codes in a byte
    x.weight.absmax                           block scales, uint8 with double quantisation, fp32 without
    x.weight.quant_map                        fp32 [16]
    x.weight.nested_absmax, .nested_quant_map with double quantisation: fp32 [blocks / 256], fp32 [256]
    x.weight.quant_state.bitsandbytes__nf4    uint8, a json object: type, shape, sizes of blocks, mean of the scales

Source: `QuantState.as_dict` in bitsandbytes 0.50.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.errors import UserError
from mindspeed_llm.ops.nf4 import BLOCK_SIZE, NF4, SCALE_BLOCK_SIZE, dynamic_codes
from mindspeed_llm.ops.nf4_matrix import Nf4Matrix, check_blocks

STATE = ".quant_state.bitsandbytes__"
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
# The json object is followed by spaces up to this length: a file is laid out before the mean of the scales is known.
STATE_BYTES = 256
INT8 = (".SCB", ".weight_format")


@dataclass(frozen=True)
class Nf4State:
    """What is known about a weight in NF4 without reading its codes."""

    dims: tuple[int, ...]
    dtype: torch.dtype
    offset: float | None


def quantized_weights(names: Iterable[str], origin: str) -> dict[str, str]:
    """Weight -> the key of its state, for a file's weights in NF4.

    Raises:
        UserError: weights are quantised in another way.
    """
    found = {}
    for name in names:
        if name.endswith(INT8):
            raise _refusal(name, origin, "is of 8-bit weights")
        weight, is_state, kind = name.partition(STATE)
        if is_state and kind != "nf4":
            raise _refusal(name, origin, f"is of {kind} weights")
        if is_state:
            found[weight] = name
    return found


def parse_state(stored: Tensor, name: str, origin: str) -> Nf4State:
    """The state of a weight.

    Raises:
        UserError: it is damaged, or its blocks are of other sizes than ours.
    """
    try:
        state = json.loads(bytes(stored.numpy()).decode("utf-8"))
        dims, dtype = tuple(state["shape"]), getattr(torch, state["dtype"])
    except (ValueError, KeyError, AttributeError, TypeError) as wrong:
        raise UserError(f"checkpoint: {name} in {origin} is damaged ({wrong!r}); try: copy it again") from None
    expected = {"quant_type": "nf4", "blocksize": BLOCK_SIZE}
    if "nested_offset" in state:
        expected |= {"nested_blocksize": SCALE_BLOCK_SIZE, "nested_dtype": "float32"}
    for field, value in expected.items():
        if state.get(field) != value:
            raise _refusal(name, origin, f"has {field}={state.get(field)!r}", f"{field}={value!r}")
    return Nf4State(dims, dtype, state.get("nested_offset"))


def read_matrix(read: Callable[[str], Tensor], weight: str, state: Nf4State, origin: str) -> Nf4Matrix:
    """A weight in NF4.

    Args:
        read: the stored tensor of a name.

    Raises:
        UserError: it is no matrix whose rows are whole blocks, or other tables were used.
    """
    out, columns = state.dims
    check_blocks(columns, f"matrix ({weight} in {origin})")
    _check_table(read(weight + ".quant_map"), torch.tensor(NF4), weight, origin)
    absmax = read(weight + ".absmax")
    first = torch.arange(out, dtype=torch.int32) * (columns // BLOCK_SIZE)
    groups = torch.empty(0, 2)
    if state.offset is not None:
        _check_table(read(weight + ".nested_quant_map"), dynamic_codes(), weight, origin)
        nested = read(weight + ".nested_absmax")
        groups = torch.stack((nested, torch.full_like(nested, state.offset)), dim=1)
    # bnb_4bit_quant_storage may call the bytes numbers of another type
    codes = read(weight).reshape(-1).view(torch.uint8).view(out, columns // 2)
    return Nf4Matrix(codes, absmax.view(out, columns // BLOCK_SIZE), first, groups)


def stored_dims(weight: str, dims: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and type of everything that a matrix in NF4 with double quantisation is written as, in order."""
    numbers = dims[0] * dims[1]
    blocks = numbers // BLOCK_SIZE
    return {
        weight: ((numbers // 2, 1), torch.uint8),
        f"{weight}.absmax": ((blocks,), torch.uint8),
        f"{weight}.nested_absmax": ((-(-blocks // SCALE_BLOCK_SIZE),), torch.float32),
        f"{weight}.nested_quant_map": ((256,), torch.float32),
        f"{weight}.quant_map": ((16,), torch.float32),
        f"{weight}{STATE}nf4": ((STATE_BYTES,), torch.uint8),
    }


def stored_tensors(weight: str, matrix: Nf4Matrix, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `stored_dims` of a whole matrix, as `quantize_matrix` gives it.

    Args:
        dtype: of the weight before it was quantised.
    """
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(matrix.shape),
        "nested_blocksize": SCALE_BLOCK_SIZE,
        "nested_dtype": "float32",
        "nested_offset": float(matrix.groups[0, 1]),
    }
    text = json.dumps(state).encode("utf-8").ljust(STATE_BYTES)
    assert len(text) == STATE_BYTES, f"the state of {weight} does not fit"
    yield weight, matrix.codes.reshape(-1, 1)
    yield f"{weight}.absmax", matrix.scales.reshape(-1)
    yield f"{weight}.nested_absmax", torch.empty(len(matrix.groups)).copy_(matrix.groups[:, 0])
    yield f"{weight}.nested_quant_map", dynamic_codes()
    yield f"{weight}.quant_map", torch.tensor(NF4)
    yield f"{weight}{STATE}nf4", torch.tensor(list(text), dtype=torch.uint8)


def quantization_config(skipped: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says about weights in NF4, for transformers.

    Args:
        skipped: names of linears that are not quantised.
        dtype: of the products.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(skipped),
    }


def _check_table(found: Tensor, ours: Tensor, weight: str, origin: str) -> None:
    if found.shape != ours.shape or not torch.allclose(found, ours, rtol=1e-6, atol=0.0):
        raise _refusal(weight, origin, "has a table of other values")


def _refusal(name: str, origin: str, what: str, legal: str = "4-bit weights of type nf4") -> UserError:
    return UserError(f"checkpoint: {name} in {origin} {what}; legal: {legal}, or unquantised weights")
