"""A bound of attention scores acts in training, with packed documents and in generation, and is refused elsewhere."""

import dataclasses

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from mindspeed_llm.errors import UserError
from mindspeed_llm.inference.decode import DecodeStep, decode_step
from mindspeed_llm.models.build import BuildOptions, build_model, model_config
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.ops.attention import attention
from mindspeed_llm.parallel.setup import initialize_distributed

torch.set_num_threads(1)
PLAIN = ModelShape("llama", 2, 48, 80, 6, 2, 12, 131, 64, init_method_std=0.5)
CAPPED = dataclasses.replace(PLAIN, attention_softcap=0.5)


@pytest.fixture(scope="module", autouse=True)
def parallel_state():
    initialize_distributed()


def ids(*shape):
    return torch.randint(0, 131, shape, generator=torch.Generator().manual_seed(3))


def test_the_formula_is_that_of_gemma_2():
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, 7, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups, module.head_dim, module.training = 2, 8, False
    mask = torch.full((7, 7), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    expected, _ = eager_attention_forward(module, q, k, v, mask, scaling=0.4, softcap=1.5)
    found = attention(q, k, v, scale=0.4, softcap=1.5, layout="BNSD")
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-6, atol=1e-6)  # its softmax is in fp32


def test_it_changes_the_model_and_a_high_bound_does_not():
    plain, capped, high = (
        build_model(shape)(ids(2, 12)) for shape in (PLAIN, CAPPED, dataclasses.replace(PLAIN, attention_softcap=1e6))
    )
    torch.testing.assert_close(high, plain, rtol=1e-3, atol=1e-4)
    assert float((capped - plain)[..., :131].detach().abs().max()) > 0.1  # beyond are padded columns


def test_documents_of_a_packed_row_are_as_alone():
    model, tokens = build_model(CAPPED), ids(1, 12)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    together = model(tokens, packed_seq_params=packed)
    torch.testing.assert_close(together[:, 5:], model(tokens[:, 5:]), rtol=1e-5, atol=1e-5)


class Kept:
    """The plainest cache: what was stored, joined."""

    def __init__(self):
        self.layers = {}

    def update(self, layer, key, value):
        before = self.layers.get(layer)
        joined = (key, value) if before is None else tuple(torch.cat(pair) for pair in zip(before, (key, value)))
        self.layers[layer] = joined
        return joined


@torch.no_grad()
def test_generation_bounds_scores_too():
    model, tokens, cache = build_model(CAPPED).eval(), ids(1, 9), Kept()
    whole = model(tokens)
    model(tokens[:, :6], inference_context=cache)
    for position in range(6, 9):
        places = torch.tensor([[position]])
        out = model(tokens[:, position : position + 1], places, inference_context=cache)
        torch.testing.assert_close(out[:, 0, :131], whole[:, position, :131], rtol=1e-4, atol=1e-4)
    # The short way of computing one token has no bound, so it is not taken.
    assert not isinstance(decode_step(model, None, 16), DecodeStep)


def test_what_cannot_bound_scores_refuses():
    with pytest.raises(UserError, match="attn_logit_softcapping: 0.5 is wrong"):
        model_config(CAPPED, BuildOptions(context_parallel_size=2))
    with pytest.raises(ValueError, match="no soft cap"):
        build_model(CAPPED)(ids(1, 6), attention_mask=torch.zeros(1, 1, 6, 6, dtype=torch.bool))
