"""`ReduceOp.PREMUL_SUM`, a sum of what each rank has multiplied by a factor, for backends without it: only nccl has it.

As with nccl the factor is rounded to the tensor's dtype, then the product is, and what a collective only reads is not
changed: `all_reduce` multiplies in place, `reduce` does so on its root, other inputs are copied. megatron-fsdp asks for
it where gradients are averaged in the collective.

It takes the functions that the program calls. The groups themselves cannot be taught: `ProcessGroup` has no subclass
that holds a store, and below it torch calls gloo in C++. So what torch's own modules start is as torch has it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

# What nccl multiplies.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The arguments of a collective by name, and a product with the factor, written to `out` where given.
Product = Callable[..., Tensor]


def _all_reduce(given: dict[str, Any], product: Product) -> None:
    product(given["tensor"], out=given["tensor"])


def _all_reduce_coalesced(given: dict[str, Any], product: Product) -> None:
    tensors = given["tensors"]
    for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
        product(tensor, out=tensor)


def _reduce(given: dict[str, Any], product: Product) -> None:
    rank_in_group, root = torch.distributed.get_rank(given["group"]), given["group_dst"]
    is_root = torch.distributed.get_rank() == given["dst"] if root is None else rank_in_group == root
    given["tensor"] = product(given["tensor"], out=given["tensor"] if is_root else None)


def _reduce_scatter(given: dict[str, Any], product: Product) -> None:
    given["input_list"] = [product(tensor) for tensor in given["input_list"]]


def _reduce_scatter_tensor(given: dict[str, Any], product: Product) -> None:
    given["input"] = product(given["input"])


# Name of a collective -> what multiplies its inputs.
COLLECTIVES: dict[str, Callable[[dict[str, Any], Product], None]] = {
    "all_reduce": _all_reduce,
    "all_reduce_coalesced": _all_reduce_coalesced,
    "reduce": _reduce,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "_reduce_scatter_base": _reduce_scatter_tensor,
}


def premultiplied(name: str, function: Callable) -> Callable:
    """The collective `function`, known as `name`, with inputs multiplied before a sum where PREMUL_SUM is asked for.

    Raises:
        TypeError: by the collective, for a factor and a tensor that is not of `DTYPES`.
    """
    signature = inspect.signature(function)
    multiply = COLLECTIVES[name]

    def collective(*args: Any, **kwargs: Any) -> Any:
        if not any(_is_premultiplied(value) for value in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if torch.distributed.get_rank(given["group"]) >= 0:  # torch warns those that are not of the group
            multiply(given, functools.partial(_product, _factor(given["op"])))
        given["op"] = ReduceOp.SUM
        return function(*bound.args, **bound.kwargs)

    return collective


def _is_premultiplied(value: object) -> bool:
    # The members of ReduceOp, which have no factor, are of another type.
    return type(value) is ReduceOp and value == ReduceOp.PREMUL_SUM


def _factor(op: ReduceOp) -> float | Tensor:
    return op.__getstate__()[1]  # `op.factor` of torch 2.13


def _product(factor: float | Tensor, tensor: Tensor, out: Tensor | None = None) -> Tensor:
    if tensor.dtype not in DTYPES:
        legal = ", ".join(map(str, DTYPES))
        raise TypeError(f"ReduceOp.PREMUL_SUM: a tensor of {tensor.dtype} is wrong; legal: {legal}; try: ReduceOp.SUM")
    rounded = torch.as_tensor(factor, dtype=tensor.dtype, device=tensor.device).reshape(())
    with torch.no_grad():
        return torch.mul(tensor, rounded, out=out)
