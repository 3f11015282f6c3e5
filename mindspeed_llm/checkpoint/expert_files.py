"""Experts in mp_rank files: which file of a stage holds which experts, under which name, and where in a stack.

Megatron numbers the files of a stage by tensor- and expert-parallel rank. Ranks count through tensor parallelism
first; within the experts they count through expert tensor parallelism, then through the experts. With expert tensor
parallel size 1 not every pair of numbers therefore exists.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import Tensor

from mindspeed_llm.errors import UserError
from mindspeed_llm.models import tensor_names
from mindspeed_llm.models.shape import ModelShape

_TE_GROUPED = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")


@dataclass(frozen=True)
class ExpertLayout:
    """How a checkpoint's experts are cut.

    Args:
        ep, etp: expert-parallel size, and tensor-parallel size within an expert; etp None means the dense layers'.
        grouped: all experts of a rank stacked in weight1 and weight2, as megatron's GroupedMLP holds them.
    """

    ep: int = 1
    etp: int | None = None
    grouped: bool = False

    def within(self, tp: int) -> int:
        """Tensor-parallel size within an expert, for dense layers cut `tp` times.

        Raises:
            UserError: the experts are cut in a way that the files cannot say.
        """
        if self.etp is not None and tp % self.etp:
            legal = ", ".join(str(n) for n in range(1, tp + 1) if tp % n == 0)
            raise UserError(
                f"parallel: expert-tensor-parallel-size={self.etp} is wrong for mp_rank files, which are numbered by "
                f"tensor-parallel rank, of {tp}; legal: {legal}"
            )
        return tp if self.etp is None else self.etp

    def files(self, tp: int) -> list[tuple[int, int]]:
        """(tensor-parallel rank, expert-parallel rank) of the files of a stage, in order."""
        etp = self.within(tp)
        ranks = range(math.lcm(tp, etp * self.ep))
        return sorted({(rank % tp, rank // etp % self.ep) for rank in ranks})


def stored_name(name: str, shape: ModelShape, experts: ExpertLayout, transformer_engine: bool) -> str:
    """How an expert's tensor is called in the file that holds it: by local number, or the stack's name."""
    local = tensor_names.expert_index(name) % (shape.num_moe_experts // experts.ep)
    if not experts.grouped:
        return tensor_names.with_expert(name, local)
    if not transformer_engine:
        return tensor_names.stacked_expert_name(name)
    prefix, linear = name.split(".local_experts.")
    return f"{prefix}.{linear.split('.')[1]}.weight{local}"


def sequential_name(name: str) -> str:
    """`...experts.linear_fc1.weight3`, as Transformer Engine's grouped linears say it, as a local expert's tensor."""
    return _TE_GROUPED.sub(r".experts.local_experts.\2.\1.weight", name)


def stack_dims(name: str, dims: tuple[int, int], num_local: int) -> tuple[int, int]:
    """Dimensions of megatron's stack: weight1 [in, experts * out], weight2 [experts * in, out].

    In memory either is [experts, in, out].

    Args:
        name: of the stack, or of an expert's tensor in it.
        dims: (out, in) of one expert on this rank.
    """
    out_features, in_features = dims
    if name.endswith(("weight1", "linear_fc1.weight")):
        return in_features, num_local * out_features
    return num_local * in_features, out_features


def slice_of_stack(stack: Tensor, dims: tuple[int, int], slot: int) -> Tensor:
    """A view [out, in] of one local expert in megatron's stack.

    Args:
        dims: (out, in) of the expert on this rank.
    """
    out_features, in_features = dims
    return stack.reshape(-1, in_features, out_features)[slot].t()
