"""Published configurations of models with experts: which layers have them, sizes, and values that are refused."""

import pytest

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import shape_from_hf
from mindspeed_llm.models.shape import ModelShape

# config.json of mistralai/Mixtral-8x7B-v0.1 and Qwen/Qwen3-30B-A3B and Qwen/Qwen1.5-MoE-A2.7B, architecture alone
MIXTRAL = dict(
    model_type="mixtral", architectures=["MixtralForCausalLM"], hidden_size=4096, intermediate_size=14336,
    max_position_embeddings=32768, num_attention_heads=32, num_experts_per_tok=2, num_hidden_layers=32,
    num_key_value_heads=8, num_local_experts=8, output_router_logits=False, rms_norm_eps=1e-05, rope_theta=1000000.0,
    router_aux_loss_coef=0.02, sliding_window=None, tie_word_embeddings=False, vocab_size=32000, hidden_act="silu",
)  # fmt: skip
QWEN3 = dict(
    model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], attention_bias=False, decoder_sparse_step=1,
    head_dim=128, hidden_act="silu", hidden_size=2048, intermediate_size=6144, max_position_embeddings=40960,
    max_window_layers=48, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_attention_heads=32,
    num_experts=128, num_experts_per_tok=8, num_hidden_layers=48, num_key_value_heads=4, rms_norm_eps=1e-06,
    rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False, use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
QWEN2 = dict(
    model_type="qwen2_moe", architectures=["Qwen2MoeForCausalLM"], decoder_sparse_step=1, hidden_act="silu",
    hidden_size=2048, intermediate_size=5632, max_position_embeddings=8192, max_window_layers=21,
    moe_intermediate_size=1408, norm_topk_prob=False, num_attention_heads=16, num_experts=60, num_experts_per_tok=4,
    num_hidden_layers=24, num_key_value_heads=16, rms_norm_eps=1e-06, rope_theta=1000000.0,
    shared_expert_intermediate_size=5632, sliding_window=32768, tie_word_embeddings=False, use_sliding_window=False,
    vocab_size=151936,
)  # fmt: skip


@pytest.mark.parametrize(
    "config, billions, active",
    [(MIXTRAL, 46.7, 12.9), (QWEN3, 30.5, 3.3), (QWEN2, 14.3, 2.7)],
    ids=["mixtral", "qwen3_moe", "qwen2_moe"],
)
def test_published_sizes(config, billions, active):
    shape = shape_from_hf(config)
    assert shape.num_parameters() / 1e9 == pytest.approx(billions, abs=0.05)
    idle = shape.num_moe_experts - shape.moe_router_topk
    used = shape.num_parameters() - shape.num_layers * idle * shape.mlp_parameters(shape.moe_ffn_hidden_size)
    assert used / 1e9 == pytest.approx(active, abs=0.1)


def test_layers_with_experts():
    assert shape_from_hf(QWEN3).moe_layers is None
    shape = shape_from_hf({**QWEN3, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert shape.moe_layers == (1, 5) and not shape.is_moe_layer(3)
    dense = shape_from_hf({**QWEN3, "num_hidden_layers": 2, "mlp_only_layers": [0, 1]})
    assert dense.num_moe_experts is None and dense.moe_ffn_hidden_size is None
    assert ModelShape.from_json(shape.to_json()) == shape


@pytest.mark.parametrize(
    "config, message",
    [
        ({**MIXTRAL, "router_jitter_noise": 0.1}, "router_jitter_noise=0.1.*not implemented"),
        ({**QWEN3, "num_experts_per_tok": 129}, "129 experts per token is wrong"),
        ({**QWEN3, "use_sliding_window": True}, "use_sliding_window=true.*not implemented"),
        ({**QWEN3, "decoder_sparse_step": 0}, "decoder_sparse_step=0.*wrong"),
    ],
)
def test_what_is_not_implemented_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        shape_from_hf(config)
