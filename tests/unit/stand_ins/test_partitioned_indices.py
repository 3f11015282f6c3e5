"""Which packed tokens each context-parallel rank has, by Transformer Engine's compiled module."""

import pytest
import torch

from mindspeed_llm.models.stand_ins.transformer_engine_torch import thd_get_partitioned_indices

BOUNDS = torch.tensor([0, 8, 8, 12, 28], dtype=torch.int32)


def test_a_rank_has_the_chunk_of_its_number_from_both_ends_of_each_document():
    first, second = (thd_get_partitioned_indices(BOUNDS, 28, 2, rank) for rank in range(2))
    assert first.dtype == torch.int32
    assert first.tolist() == [0, 1, 6, 7, 8, 11, 12, 13, 14, 15, 24, 25, 26, 27]
    assert second.tolist() == [2, 3, 4, 5, 9, 10, 16, 17, 18, 19, 20, 21, 22, 23]


def test_one_rank_has_all():
    assert thd_get_partitioned_indices(BOUNDS, 28, 1, 0).tolist() == list(range(28))


@pytest.mark.parametrize("total, ranks, what", [(32, 2, "ends at 28"), (28, 4, "documents of")])
def test_what_cannot_be_shared_is_refused(total, ranks, what):
    with pytest.raises(ValueError, match=what):
        thd_get_partitioned_indices(BOUNDS, total, ranks, 0)
