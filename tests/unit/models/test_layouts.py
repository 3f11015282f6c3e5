"""Packing and slicing are inverses for every shape, and a rank's slice is the attention of its own groups."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_llm.errors import UserError
from mindspeed_llm.models import layouts, packing
from mindspeed_llm.models.hf_config import shape_from_hf
from mindspeed_llm.models.shape import ModelShape

TAILS = {"weight": (5,), "bias": (), "lora_B": (3,)}


@st.composite
def attention(draw):
    """(heads, groups, head_dim, tp) with tp dividing groups dividing heads."""
    tp = draw(st.sampled_from([1, 2, 4]))
    groups = tp * draw(st.integers(1, 3))
    return groups * draw(st.integers(1, 4)), groups, draw(st.integers(1, 5)), tp


def numbered(rows, tail, start):
    return torch.arange(start, start + rows * int(np.prod(tail)), dtype=torch.float32).reshape(rows, *tail)


@settings(deadline=None, max_examples=60)
@given(attention(), st.sampled_from(sorted(TAILS)), st.booleans())
def test_qkv_unpacks_to_what_was_packed(sizes, kind, as_numpy):
    heads, groups, dim, _ = sizes
    tail = TAILS[kind]
    q, k, v = numbered(heads * dim, tail, 0), numbered(groups * dim, tail, 10_000), numbered(groups * dim, tail, 20_000)
    if as_numpy:
        q, k, v = q.numpy(), k.numpy(), v.numpy()
    packed = packing.pack_qkv(q, k, v, groups)
    assert packed.shape == ((heads + 2 * groups) * dim, *tail)
    assert all((a == b).all() for a, b in zip(packing.unpack_qkv(packed, heads, groups, dim), (q, k, v)))


@settings(deadline=None, max_examples=60)
@given(attention(), st.sampled_from(["weight", "bias"]))
def test_a_tensor_parallel_slice_is_the_packing_of_its_own_groups(sizes, kind):
    heads, groups, dim, tp = sizes
    shape = ModelShape("llama", 1, 5, 4 * tp, heads, groups, dim, 10, 10, add_qkv_bias=True)
    tail = (5,) if kind == "weight" else ()
    parts = [numbered(rows, tail, 10_000 * i) for i, rows in enumerate(packing.part_rows("qkv", shape))]
    whole = packing.pack(parts, "qkv", shape)
    name = f"decoder.layers.0.self_attention.linear_qkv.{kind}"
    shards = [layouts.shard(whole, name, shape, rank, tp) for rank in range(tp)]
    for rank, shard in enumerate(shards):
        cut = [part.chunk(tp)[rank] for part in parts]  # HF's own slicing by head
        assert torch.equal(shard, packing.pack_qkv(*cut, num_groups=groups // tp))
        assert shard.shape == layouts.local_shape(name, shape, tp)
        # megatron cuts its interleaved tensor into contiguous rows, which must be the same thing
        assert torch.equal(shard, whole.chunk(tp)[rank])
    assert torch.equal(layouts.unshard(shards, name, shape), whole)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_fc1_of_a_rank_holds_its_gate_rows_then_its_up_rows(tp):
    shape = ModelShape("llama", 1, 3, 8, 4, 4, 2, 10, 10)
    gate, up = numbered(8, (3,), 0), numbered(8, (3,), 1000)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    whole = packing.pack_gate_up(gate, up)
    shards = [layouts.shard(whole, name, shape, rank, tp) for rank in range(tp)]
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]]))
    assert torch.equal(layouts.unshard(shards, name, shape), whole)
    if tp > 1:  # negative control: contiguous rows would be wrong
        assert not torch.equal(shards[0], whole.chunk(tp)[0])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 7, 16, 128]))
def test_vocabulary_is_padded_with_zeros_and_unpadded_exactly(vocab, tp, multiple):
    shape = ModelShape("llama", 1, 3, 8, 8, 8, 2, vocab, 10)
    padded = layouts.padded_vocab_size(vocab, tp, multiple)
    assert padded % (multiple * tp) == 0 and vocab <= padded < vocab + multiple * tp
    table = numbered(vocab, (3,), 1)
    name = "embedding.word_embeddings.weight"
    shards = [layouts.shard(table, name, shape, rank, tp, padded) for rank in range(tp)]
    assert all(shard.shape == layouts.local_shape(name, shape, tp, padded) for shard in shards)
    assert torch.equal(layouts.unshard(shards, name, shape), table)
    assert torch.cat(shards)[vocab:].eq(0).all()


@pytest.mark.parametrize("vocab,tp,expected", [(97, 2, 256), (128, 1, 128), (151936, 4, 152064), (32000, 2, 32000)])
def test_padding_follows_megatrons_rule(vocab, tp, expected):
    assert layouts.padded_vocab_size(vocab, tp) == expected


def test_an_illegal_tensor_parallel_size_names_the_legal_ones():
    shape = ModelShape("llama", 1, 64, 112, 8, 4, 16, 10, 10)
    with pytest.raises(UserError, match="num_query_groups=4.*tensor-parallel-size=8.*legal for this model: 1, 2, 4"):
        layouts.check_tensor_parallel(shape, 8)


def test_row_parallel_tensors_are_cut_along_their_columns():
    shape = ModelShape("llama", 1, 6, 8, 4, 4, 2, 10, 10)
    whole = numbered(6, (8,), 0)
    for name in ("decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.0.self_attention.linear_proj.weight"):
        shards = [layouts.shard(whole, name, shape, rank, 2) for rank in range(2)]
        assert torch.equal(torch.cat(shards, 1), whole) and shards[0].shape == (6, 4)
        assert torch.equal(layouts.unshard(shards, name, shape), whole)


def test_an_unknown_tensor_has_no_layout():
    # norms and projection of a prediction layer belong to no layer of the model itself
    for name in ("decoder.layers.0.mlp.gate.weight", "decoder.layers.0.enorm.weight", "mtp.layers.0.norm.weight"):
        with pytest.raises(UserError, match="no known layout"):
            layouts.layout_of(name)


def test_full_shapes_are_those_of_the_real_model():
    """Against transformers' parameters, through the family's table."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from mindspeed_llm.models.mapping import tensor_pairs

    config = Qwen2Config(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=2, intermediate_size=112,
        vocab_size=97, head_dim=16,
    )  # fmt: skip
    real = {name: tuple(p.shape) for name, p in Qwen2ForCausalLM(config).named_parameters()}
    described = {hf: dims for p in tensor_pairs(shape_from_hf(config.to_dict())) for hf, dims in zip(p.hf, p.hf_dims)}
    assert described == real
