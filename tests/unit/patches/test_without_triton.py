"""What megatron leaves to CUDA's kernels, in torch: rows of the states of requests, the choice among equal scores."""

import pytest
import torch

from mindspeed_llm.patches.core.inference.contexts.attention_context.triton import tensor_ops
from mindspeed_llm.patches.core.transformer.experimental_attention_variant import dsa

WRAPS = {patch.target.rpartition(":")[2]: patch.wrap for patch in (*tensor_ops.PATCHES, *dsa.PATCHES)}


def refused(*_args, **_options):
    raise AssertionError("the kernel of CUDA was called")


def wrapped(name):
    return WRAPS[name](refused)


ROWS = torch.arange(12.0).view(6, 2)


@pytest.mark.parametrize("place", [0, 2, 6])
def test_rows_after_a_place_come_first_and_the_rest_stays(place):
    out = torch.full((6, 2), -1.0)
    wrapped("tensor_get_slice_after")(ROWS, out, torch.tensor([place]), check_bounds=True)
    assert out[: 6 - place].equal(ROWS[place:]) and (out[6 - place :] == -1).all()
    short = torch.full((1, 2), -1.0)
    wrapped("tensor_get_slice_after")(ROWS, short, torch.tensor([4]))
    assert short.equal(ROWS[4:5])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("place", [0, 2, 5])
def test_two_are_merged_at_a_place(place, in_place):
    a, b = ROWS.clone(), -ROWS[:3] - 1
    out = a if in_place else torch.full((7, 2), 9.0)
    wrapped("tensor_merge")(a, b, torch.tensor([place]), None if in_place else out, check_bounds=True)
    fits = min(3, len(out) - place)
    assert out[:place].equal(ROWS[:place]) and out[place : place + fits].equal(b[:fits])
    assert out[place + fits :].equal(ROWS[place + fits :]) if in_place else (out[place + fits :] == 9).all()


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 4)])
def test_states_are_updated_but_for_those_without_a_place(shape):
    states, new = torch.zeros(5, *shape), torch.randn(3, *shape)
    wrapped("tensor_masked_update")(states, torch.tensor([3, -1, 0]), new)
    assert states[3].equal(new[0]) and states[0].equal(new[2])
    assert not states[[1, 2, 4]].any()  # -1 is no place from the end


def test_what_does_not_fit_is_refused():
    with pytest.raises(AssertionError, match="legal: 0 to 6"):
        wrapped("tensor_get_slice_after")(ROWS, ROWS.clone(), torch.tensor([7]), check_bounds=True)
    with pytest.raises(AssertionError, match="do not fit"):
        wrapped("tensor_get_slice_after")(ROWS, ROWS[:1].clone(), torch.tensor([0]), check_bounds=True)
    with pytest.raises(AssertionError, match="dimensions must match"):
        wrapped("tensor_masked_update")(torch.zeros(5, 2), torch.tensor([0]), torch.zeros(1, 3))


def test_of_equal_scores_the_first_are_chosen():
    scores = torch.randn(1, 64, 64).masked_fill(torch.ones(64, 64).triu(1).bool(), float("-inf"))
    plain = scores.topk(32, dim=-1).indices
    _, chosen = WRAPS["DSAIndexer.forward_with_scores"](lambda _self: (scores, plain))(None)
    last = torch.arange(64).clamp(min=31)
    assert (chosen <= last[:, None]).all() and chosen.shape == plain.shape
    assert not (plain <= last[:, None]).all(), "topk takes the first of equals by itself: the patch is needed no more"
    above = scores.gather(-1, chosen).min(-1).values
    assert above.equal(scores.topk(32, dim=-1).values[..., -1])
