"""Which part of a data set a run may see: `--split 949,50,1` divides it into training, validation and test."""

from __future__ import annotations

from mindspeed_llm.config.data import PARTS, proportions
from mindspeed_llm.errors import UserError

SPLITS = ("train", "valid", "test")


class EmptyPart(UserError):
    """A part of a data set that holds no whole sample."""


def split_bounds(split: str, total: int, name: str) -> tuple[int, int]:
    """[start, stop) of one part of `total` documents or rows, as Megatron rounds it.

    Args:
        split: one to three proportions joined by commas; they need not sum to anything in particular.
        total: how many there are.
        name: "train", "valid" or "test".

    Raises:
        UserError: the proportions cannot be read.
    """
    weights = proportions(split)
    if weights is None:
        raise UserError(
            f"split: {split!r} is no list of proportions; legal: up to three numbers >= 0, such as 949,50,1"
        )
    weights += [0.0] * (PARTS - len(weights))
    # Cumulated fractions are rounded, so that the parts cover everything exactly once.
    index = SPLITS.index(name)
    before, upto = sum(weights[:index]) / sum(weights), sum(weights[: index + 1]) / sum(weights)
    return round(before * total), round(upto * total)
