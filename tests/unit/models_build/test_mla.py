"""Multi-head latent attention computes the same in every way a model's forward can be called."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from mindspeed_llm.models.build import BuildOptions, build_model
from mindspeed_llm.models.rope import rope_frequencies, softmax_scale
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.ops.rotary import apply_interleaved_rotary, rotary_table
from mindspeed_llm.parallel.setup import initialize_distributed

torch.set_num_threads(1)

SHAPE = ModelShape(
    "deepseek", 4, 48, 80, 6, 6, 20, 131, 256, init_method_std=0.1, multi_latent_attention=True, q_lora_rank=24,
    kv_lora_rank=16, qk_head_dim=12, qk_pos_emb_head_dim=8, v_head_dim=10, rotary_interleaved=True,
    rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0,
                  "mscale_all_dim": 0.7},
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    initialize_distributed()
    return build_model(SHAPE)


def ids(*shape):
    return torch.randint(0, 131, shape, generator=torch.Generator().manual_seed(1))


def test_the_layer_is_the_formula(model):
    """One layer's attention against the definition, heads one by one."""
    attention = model.decoder.layers[1].self_attention
    x = torch.randn(9, 1, 48)
    table = rotary_table(torch.arange(9)[None], *rope_frequencies(SHAPE), torch.float32)
    found, _ = attention(x, rotary_pos_emb=table)

    def norm(v, weight):
        return v / (v.pow(2).mean(-1, keepdim=True) + SHAPE.norm_epsilon).sqrt() * weight

    def weight(name):
        return getattr(attention, name).weight

    queries = norm(x @ weight("linear_q_down_proj").t(), weight("q_layernorm")) @ weight("linear_q_up_proj").t()
    compressed = x @ weight("linear_kv_down_proj").t()
    latent = norm(compressed[..., :16], weight("kv_layernorm"))
    shared = apply_interleaved_rotary(compressed[..., 16:].unsqueeze(2), table)[:, 0, 0]
    heads = []
    for head in range(6):
        rows = weight("linear_kv_up_proj")[head * 22 : (head + 1) * 22]
        key = torch.cat(((latent @ rows[:12].t())[:, 0], shared), dim=-1)
        query = queries[:, 0, head * 20 : (head + 1) * 20]
        turned = apply_interleaved_rotary(query[:, None, None, 12:], table)[:, 0, 0]
        scores = torch.cat((query[:, :12], turned), -1) @ key.t() * softmax_scale(SHAPE)
        seen = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf")).softmax(-1)
        heads.append(seen @ (latent @ rows[12:].t())[:, 0])
    expected = F.linear(torch.cat(heads, -1), weight("linear_proj"))
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_neighbouring_channels_turn_together():
    table = rotary_table(torch.tensor([[3]]), torch.tensor([1.0, 0.5]), 1.0, torch.float32)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = apply_interleaved_rotary(x.view(1, 1, 1, 4), table).flatten()
    turned = torch.view_as_complex(x.view(2, 2)) * torch.polar(torch.ones(2), torch.tensor([3.0, 1.5]))
    torch.testing.assert_close(found, torch.cat((turned.real, turned.imag)))


def test_the_scores_carry_the_temperature_of_yarn():
    import math

    assert softmax_scale(SHAPE) == pytest.approx((0.07 * math.log(4) + 1) ** 2 / math.sqrt(20))
    plain = dataclasses.replace(SHAPE, rope_scaling=None)
    assert softmax_scale(plain) is None
    assert softmax_scale(dataclasses.replace(SHAPE, multi_latent_attention=False)) is None


def packed(boundaries):
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = torch.tensor(boundaries, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)


def test_a_packed_row_is_its_documents_one_by_one(model):
    row, labels = ids(1, 20), ids(1, 20).flip(1)
    together = model(row, labels=labels, packed_seq_params=packed([0, 7, 8, 20]))
    pieces = [model(row[:, a:b], labels=labels[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 20))]
    assert float(together) == pytest.approx(float(sum(pieces)), rel=1e-6)
    assert float(model(row, labels=labels)) != pytest.approx(float(together), rel=1e-3)


def test_a_cache_gives_the_same_logits_token_by_token(model):
    from mindspeed_llm.inference.cache import Cache
    from mindspeed_llm.inference.decode import ModelStep, decode_step

    model.eval()
    row = ids(2, 12)
    cache = Cache([1, 2, 3, 4], 2, 6, 12, SHAPE.kv_channels, torch.float32, row.device, SHAPE.value_channels)
    with torch.no_grad():
        expected = model(row, gather_logits=True)
        context = cache.rows([0, 1])
        model(row[:, :5], inference_context=context)
        context.advance(5)
        step = decode_step(model, cache, 12)
        assert isinstance(step, ModelStep)
        found = [step.step(row[:, position]) for position in range(5, 12)]
    model.train()
    torch.testing.assert_close(torch.stack(found, 1), expected[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity, method", [("selective", None), ("full", "uniform")])
def test_recomputation_gives_the_same_gradients(granularity, method):
    def gradients(**options):
        model = build_model(SHAPE, BuildOptions(**options))
        model(ids(2, 12), labels=ids(2, 12)).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients()
    found = gradients(
        recompute_granularity=granularity, recompute_method=method, recompute_num_layers=1 if method else None
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_memory_of_a_shape_is_its_parameters(model):
    padded = (model.config.padded_vocab_size - SHAPE.vocab_size) * SHAPE.hidden_size
    count = sum(p.numel() for p in model.parameters())
    assert count == SHAPE.num_parameters() + padded * (1 if SHAPE.tie_word_embeddings else 2)
