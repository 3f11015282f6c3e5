"""Transformer Engine's attention over documents one after the other, each shared by the ranks of a group."""

import pytest
import torch

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.stand_ins import transformer_engine as te
from mindspeed_llm.parallel.context_split import SequenceSplit
from mindspeed_llm.testing.pool import pool

HEADS, GROUPS, SIZE = 4, 2, 8
# Documents of 5, 0, 8 and 3 tokens; with padding 8, 0, 8 and 4, and 4 tokens that belong to nobody.
LENGTHS, STARTS, TOTAL = [0, 5, 5, 13, 16], [0, 8, 8, 16, 20], 24


def problem():
    generator = torch.Generator().manual_seed(3)
    make = lambda heads: torch.randn(TOTAL, heads, SIZE, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(HEADS), make(GROUPS), make(GROUPS), make(HEADS).flatten(1)


def outcome(inputs, weights, mask_type, group, starts=STARTS, starts_of_keys=STARTS):
    """Output, and gradients of query, key and value."""
    module = te.pytorch.DotProductAttention(
        HEADS, SIZE, GROUPS, attn_mask_type=mask_type, qkv_format="thd", cp_group=group
    )
    inputs = [x.clone().requires_grad_() for x in inputs]
    lengths, starts, of_keys = (torch.tensor(bounds) for bounds in (LENGTHS, starts, starts_of_keys))
    padded = {"cu_seqlens_q_padded": starts, "cu_seqlens_kv_padded": of_keys}
    out = module(*inputs, cu_seqlens_q=lengths, cu_seqlens_kv=lengths, **padded)
    (out * weights).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


def held_by(rank, size):
    """The rows of the whole that a rank has."""
    rows = []
    for start, stop in zip(STARTS, STARTS[1:]):
        for first, last in SequenceSplit(size).ranges(rank, stop - start):
            rows += range(start + first, start + last)
    share = (TOTAL - STARTS[-1]) // size
    return rows + [STARTS[-1] + rank * share + index for index in range(share)]


def worst(mask_type):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    *inputs, weights = problem()
    whole = outcome(inputs, weights, mask_type, None)
    rows = held_by(rank, size)
    shared = outcome([x[rows] for x in inputs], weights[rows], mask_type, torch.distributed.group.WORLD)
    return [(left - right[rows]).abs().max().item() for left, right in zip(shared, whole)]


@pytest.mark.parametrize("mask_type", ["padding_causal", "padding", "no_mask"])
def test_ranks_together_compute_what_one_does(mask_type):
    for differences in pool(2).run(worst, mask_type):
        assert max(differences) < 1e-12


def shuffled():
    """As `worst`, where documents are not shared chunk by chunk but rank after rank."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    *inputs, weights = problem()
    whole = outcome(inputs, weights, "padding_causal", None)
    rows = list(range(rank * TOTAL // size, (rank + 1) * TOTAL // size))
    shared = outcome([x[rows] for x in inputs], weights[rows], "padding_causal", torch.distributed.group.WORLD)
    return (shared[0] - whole[0][rows]).abs().max().item()


def test_the_comparison_notices_another_share():
    assert min(pool(2).run(shuffled)) > 1e-3


def refused():
    group, (*inputs, weights) = torch.distributed.group.WORLD, problem()
    rows = held_by(group.rank(), group.size())
    inputs, weights = [x[rows] for x in inputs], weights[rows]
    found = []
    for bounds in (
        {"starts_of_keys": [0, 8, 12, 16, 20]},
        {"starts": [0, 7] + STARTS[2:], "starts_of_keys": [0, 7] + STARTS[2:]},
    ):
        try:
            outcome(inputs, weights, "padding_causal", group, **bounds)
        except (UserError, ValueError) as error:
            found.append(str(error))
    return found


def test_what_ranks_cannot_share_is_refused():
    for cross, uneven in pool(2).run(refused):
        assert "cross attention" in cross and "multiple of 4" in uneven
