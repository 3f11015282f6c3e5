"""Matrix products of consecutive rows, each group with a weight of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from simulator.kernels.registry import kernel, require

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ROWS, INNER = 0, 2  # group_type: what the groups divide


def sizes_of(group_list: Tensor | list[int], kind: int) -> list[int]:
    """Sizes of the groups from their ends (kind 0) or sizes (kind 1)."""
    given = group_list.tolist() if isinstance(group_list, Tensor) else list(group_list)
    if kind == 1:
        return given
    require(all(a <= b for a, b in zip(given, given[1:])), "grouped matmul", "group_list decreases")
    return [stop - start for start, stop in zip([0, *given[:-1]], given)]


def _check(x: list[Tensor], weight: list[Tensor]) -> None:
    rule = "grouped matmul"
    require(len(x) <= 128 and len(weight) <= 128, rule, "more than 128 tensors")
    for tensor in (*x, *weight):
        require(tensor.dtype in FLOATS, rule, f"{tensor.dtype} is not float16, bfloat16 or float32")
        require(tensor.shape[-1] < 65536, rule, "a last dimension is not below 65536")
    require(all(a.dtype == b.dtype for a, b in zip(x, weight)), rule, "x and weight differ in type")


@kernel("npu_grouped_matmul")
def npu_grouped_matmul(
    x, weight, *, bias=None, group_list=None, split_item=0, group_type=None, group_list_type=0, **others
):
    """-> list of products; of one tensor for all groups with split_item 2 or 3."""
    require(not [name for name, value in others.items() if value], "grouped matmul", "quantisation is not simulated")
    require(bias is None, "grouped matmul", "bias is not simulated")
    _check(x, weight)
    require(group_list is not None and group_list.dtype == torch.int64, "grouped matmul", "group_list must be int64")
    sizes = sizes_of(group_list, group_list_type)
    if group_type == INNER:
        inner = sum(sizes)
        require(inner <= x[0].shape[1], "grouped matmul", "group_list exceeds the inner dimension")
        parts = zip(x[0][:, :inner].split(sizes, 1), weight[0][:inner].split(sizes))
        return [torch.stack([(a.float() @ b.float()).to(x[0].dtype) for a, b in parts])]
    require(group_type == ROWS, "grouped matmul", f"group_type {group_type} is not simulated")
    require(sum(sizes) <= x[0].shape[0], "grouped matmul", "group_list exceeds the rows")
    weights = weight[0].unbind(0) if len(weight) == 1 and weight[0].dim() == 3 else weight
    rows = x[0][: sum(sizes)].split(sizes)
    products = [(a.float() @ b.float()).to(x[0].dtype) for a, b in zip(rows, weights)]
    return products if split_item in (0, 1) else [torch.cat(products)]


@kernel("npu_grouped_matmul_add_")
def npu_grouped_matmul_add_(
    self, x, weight, group_list, *, transpose_x=True, transpose_weight=False, group_type=2, group_list_type=0
):
    """self[g] += x_g^T weight_g, in fp32."""
    require(self.dtype == torch.float32, "npu_grouped_matmul_add_", "the sum must be float32")
    require(x.dtype in FLOATS[:2], "npu_grouped_matmul_add_", f"{x.dtype} is not float16 or bfloat16")
    sizes = sizes_of(group_list, group_list_type)
    for index, (a, b) in enumerate(zip(x.split(sizes), weight.split(sizes))):
        self[index] += a.float().t() @ b.float()
    return self
