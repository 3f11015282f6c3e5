"""Sizes of HCCL's buffers by group: what is read, what is refused, and that the groups are megatron-core's."""

import inspect

import pytest

from mindspeed_llm.config.hccl_groups import DESCRIPTIONS, buffers_problem, parse_buffers, short_name


def test_groups_and_sizes_are_read():
    assert parse_buffers("dp:200;tp:300") == {"dp": 200, "tp": 300}
    assert parse_buffers(" ep : 50 ; default:100;") == {"ep": 50, "default": 100}


@pytest.mark.parametrize(
    "text, wrong",
    [("xx:1", "'xx' is no group"), ("tp", "has no size"), ("tp:0", "has no size"), ("tp:1;tp:2", "twice")],
)
def test_anything_else_is_refused(text, wrong):
    assert wrong in buffers_problem(text)
    assert buffers_problem("tp:1") is None


def test_every_group_is_one_that_megatron_makes():
    from megatron.core import parallel_state

    source = inspect.getsource(parallel_state)
    for descriptions in DESCRIPTIONS.values():
        assert all(f'"{description}"' in source for description in descriptions)
    assert short_name("TENSOR_MODEL_PARALLEL_GROUP") == "tp" and short_name("OTHER") is None
