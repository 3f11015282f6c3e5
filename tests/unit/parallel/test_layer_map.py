"""The layer map is a partition for every legal combination, and refuses the others with a legal suggestion."""

import itertools

import pytest

from mindspeed_llm.config.parallel import ParallelConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.parallel.layer_map import even_split, layer_map, layers_of_options


def flattened(layers):
    """All layers in forward order: chunk by chunk, stage by stage."""
    return [i for v in range(layers.vpp) for p in range(layers.pp) for i in layers.chunk(p, v) if i is not None]


@pytest.mark.parametrize("num_layers,pp,vpp", itertools.product(range(1, 13), range(1, 5), (None, 1, 2, 3)))
def test_every_accepted_combination_is_a_partition_in_forward_order(num_layers, pp, vpp):
    try:
        layers = layer_map(num_layers, pp, vpp)
    except UserError:
        divides = num_layers % (pp * (vpp or 1)) == 0
        assert not divides or pp > num_layers or (pp == 1 and (vpp or 1) > 1)
        return
    assert flattened(layers) == list(range(num_layers))
    assert {len(c) for stage in layers.chunks for c in stage} == {num_layers // pp // (vpp or 1)}


@pytest.mark.parametrize("num_layers,pp", [(n, p) for n in range(1, 40) for p in range(1, 9) if p <= n])
def test_the_suggested_uneven_split_is_accepted(num_layers, pp):
    layers = layer_map(num_layers, pp, layer_list=even_split(num_layers, pp))
    assert flattened(layers) == list(range(num_layers)) and layers.pp == pp


def test_thirty_layers_over_four_stages_is_refused_with_a_list_that_works():
    with pytest.raises(UserError, match=r"--num-layer-list 8,8,7,7"):
        layer_map(30, 4)
    assert [len(stage[0]) for stage in layer_map(30, 4, layer_list=[8, 8, 7, 7]).chunks] == [8, 8, 7, 7]


def test_virtual_chunks_interleave_as_megatron_orders_them():
    layers = layer_map(8, 2, 2)
    assert layers.chunks == (((0, 1), (4, 5)), ((2, 3), (6, 7)))
    assert layers.place(5) == (0, 1, 1) and layers.place(2) == (1, 0, 0)
    assert layers.is_first(0, 0) and not layers.is_first(0, 1)
    assert layers.is_last(1, 1) and not layers.is_last(1, 0)


@pytest.mark.parametrize("noops", [(0,), (7,), (3,), (0, 5, 6), (8, 9)])
def test_noop_layers_take_slots_but_no_layer_is_lost(noops):
    num_layers = 10 - len(noops)
    layers = layer_map(num_layers, 2, noop_layers=noops)
    assert flattened(layers) == list(range(num_layers))
    assert layers.noop_layers == noops and layers.num_slots == 10
    assert all(layers.layers(p)[layers.place(i)[2]] == i for i in range(num_layers) for p in [layers.place(i)[0]])


def test_noop_layers_and_virtual_chunks_go_together():
    layers = layer_map(6, 2, 2, noop_layers=[0, 7])
    assert layers.chunks == (((None, 0), (3, 4)), ((1, 2), (5, None)))
    assert flattened(layers) == list(range(6)) and layers.noop_layers == (0, 7)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (dict(num_layers=4, pp=5), "would be empty"),
        (dict(num_layers=4, pp=2, layer_list=[3, 2]), "sum to 4"),
        (dict(num_layers=4, pp=2, layer_list=[4, 0]), "positive"),
        (dict(num_layers=4, pp=2, layer_list=[4]), "2 stages"),
        (dict(num_layers=8, pp=2, vpp=2, layer_list=[4, 4]), "virtual pipeline"),
        (dict(num_layers=7, pp=2, noop_layers=[8]), r"0\.\.7"),
        (dict(num_layers=6, pp=2, noop_layers=[1, 1]), "distinct"),
        (dict(num_layers=8, pp=2, vpp=3), "virtual chunks that fit: 1, 2, 4"),
        (dict(num_layers=8, pp=1, vpp=2), "pipeline-parallel-size > 1"),
        (dict(num_layers=0), "positive"),
    ],
)
def test_illegal_combinations_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        layer_map(**arguments)


@pytest.mark.parametrize(
    "num_layers, pp, vpp, embedding, loss, sizes",
    [
        (7, 2, None, True, False, (3, 4)),
        (7, 2, None, False, True, (4, 3)),
        (6, 4, None, True, True, (1, 2, 2, 1)),
        (6, 2, 2, True, True, (1, 2, 2, 1)),
        (2, 4, None, True, True, (0, 1, 1, 0)),
    ],
)
def test_embedding_and_loss_count_as_layers(num_layers, pp, vpp, embedding, loss, sizes):
    layers = layer_map(num_layers, pp, vpp, embedding_as_layer=embedding, loss_as_layer=loss)
    assert layers.built_sizes == sizes and flattened(layers) == list(range(num_layers))


def test_a_built_model_numbers_its_layers_without_gaps():
    layers = layer_map(6, 2, 2, noop_layers=[0, 7])
    assert layers.layers(0, 0) == {1: 0} and layers.built_layers(0, 0) == (0,)
    assert layers.built_sizes == (1, 2, 2, 1)


def test_options_say_the_same_split_in_two_ways():
    by_size, by_count = ParallelConfig(), ParallelConfig()
    by_size.num_layers_per_virtual_pipeline_stage = by_count.num_virtual_stages_per_pipeline_rank = 2
    assert layers_of_options(by_size, 8, 2) == layers_of_options(by_count, 8, 2) == layer_map(8, 2, 2)
    by_size.num_virtual_stages_per_pipeline_rank = 2
    with pytest.raises(UserError, match="exclude each other"):
        layers_of_options(by_size, 8, 2)


@pytest.mark.parametrize("split", [dict(embedding_as_layer=True), dict(loss_as_layer=True)])
def test_ends_that_count_need_stages_and_an_even_split(split):
    with pytest.raises(UserError, match="need pipeline-parallel-size > 1"):
        layer_map(3, 1, **split)
    with pytest.raises(UserError, match="cannot be combined with --account-for"):
        layer_map(3, 2, layer_list=[1, 2], **split)
    with pytest.raises(UserError, match=r"4 layers \+ (embedding|loss) over 2 stages is uneven"):
        layer_map(4, 2, **split)
