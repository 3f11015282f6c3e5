"""DeepSeek-V2 and V3: config.json field by field, tensors both ways, and the same outputs as transformers."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.convert import convert
from mindspeed_llm.checkpoint.expert_files import ExpertLayout
from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.toy import edit_config, make_toy
from mindspeed_llm.checkpoint.verify import verify
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf
from mindspeed_llm.models.mapping import tensor_pairs

torch.set_num_threads(1)

# config.json as published (deepseek-ai/DeepSeek-V3 without its quantization_config, DeepSeek-V2, DeepSeek-V2-Lite).
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
V2 = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {}, "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "ep_size": 1,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
    "intermediate_size": 12288, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 160, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 128, "num_experts_per_tok": 6, "num_hidden_layers": 60,
    "num_key_value_heads": 128, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 3, "topk_method": "group_limited_greedy", "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
V2_LITE = {
    **V2, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
PUBLISHED = {
    # of all tensors, less the prediction layer's copies of embedding and output layer and 59 layers' biases of experts
    "DeepSeek-V3": (V3, 684_489_845_504 - 2 * 129280 * 7168 - 59 * 256),
    "DeepSeek-V2": (V2, 235_741_434_880),
    "DeepSeek-V2-Lite": (V2_LITE, 15_706_484_224),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_and_have_their_number_of_parameters(name):
    config, parameters = PUBLISHED[name]
    assert shape_from_hf(config).num_parameters() == parameters


def test_every_parameter_of_a_table_is_counted():
    for config in (V3, V2_LITE):
        shape = shape_from_hf({**config, "num_hidden_layers": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 2})
        biases = [p for p in tensor_pairs(shape) if not p.mcore.endswith("expert_bias")]
        assert shape.num_parameters() == sum(torch.Size(p.dims).numel() for p in biases)


def test_what_distinguishes_the_models_arrives():
    v3, v2, lite = (shape_from_hf(config) for config in (V3, V2, V2_LITE))
    assert v3.moe_router_score_function == "sigmoid" and v3.moe_router_enable_expert_bias and v3.norm_topk_prob
    assert (v3.moe_router_num_groups, v3.moe_router_group_topk, v3.moe_router_group_score_topk) == (8, 4, 2)
    assert (v2.moe_router_num_groups, v2.moe_router_group_topk, v2.moe_router_group_score_topk) == (8, 3, 1)
    assert lite.moe_router_num_groups is None and lite.q_lora_rank is None and not lite.moe_router_enable_expert_bias
    assert [layer for layer in range(62) if not v3.is_moe_layer(layer)] == [0, 1, 2] and v3.mtp_num_layers == 1
    assert v2.moe_shared_expert_intermediate_size == 2 * 1536 and v2.moe_router_topk_scaling_factor == 16.0
    assert v3.kv_channels == 192 and v3.value_channels == 128 and v3.rotary_dim == 64
    assert v3.rope_scaling["mscale_all_dim"] == 1.0 and v2.rope_scaling["mscale_all_dim"] == 0.707


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("topk_method", "greedy", "topk_method=greedy.*noaux_tc"),
        ("scoring_func", "softmax", "scoring_func=softmax.*sigmoid"),
        ("attention_bias", True, "attention_bias=True"),
        ("num_key_value_heads", 8, "num_key_value_heads=8.*legal: 128"),
        ("qk_head_dim", 128, "qk_head_dim=128"),
        ("head_dim", 128, "head_dim=128.*64"),
        ("topk_group", 9, "9 of 8 groups"),
        ("num_nextn_predict_layers", -1, "num_nextn_predict_layers=-1"),
        ("index_topk", 2048, "index_topk"),
    ],
)
def test_what_is_not_implemented_is_refused(field, value, words):
    with pytest.raises(UserError, match=words):
        shape_from_hf({**V3, field: value})


def test_a_shape_survives_json():
    shape = shape_from_hf(V3)
    assert type(shape).from_json(json.loads(json.dumps(shape.to_json()))) == shape


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "mscale": 1.0, "mscale_all_dim": 0.7}  # fmt: skip
TOYS = {
    "v2 lite": ("deepseek_v2", {"q_lora_rank": None}),
    "v2": ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
                           "routed_scaling_factor": 4.0, "rope_parameters": YARN}),
    "v3": ("deepseek_v3", {"rope_parameters": YARN}),
    "v3 dense, halves": ("deepseek_v3", {"first_k_dense_replace": 4, "rope_interleave": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", TOYS)
def test_logits_are_those_of_transformers(name, tmp_path):
    model_type, fields = TOYS[name]
    report = verify(make_toy(model_type, tmp_path, **fields))
    assert report.passed, f"{report}\n{report.table()}"


@pytest.mark.parametrize(
    "change", [{"rotary_interleaved": False}, {"rope_scaling": None}, {"latent_norm_epsilon": 1e-2}]
)
def test_parity_would_notice(change, tmp_path):
    from mindspeed_llm.checkpoint.load import load_into
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.parallel.setup import initialize_distributed

    directory = make_toy("deepseek_v3", tmp_path, rope_parameters=YARN)
    initialize_distributed()
    source = HfSource(directory)
    model = build_model(dataclasses.replace(source.shape, **change), BuildOptions(initialize=False))
    load_into(model, source, quiet=True)
    assert not verify(directory, model).passed


@pytest.fixture(scope="module")
def with_prediction(tmp_path_factory):
    return make_toy(
        "deepseek_v3", tmp_path_factory.mktemp("v3") / "model", num_nextn_predict_layers=2, dtype="bfloat16"
    )


def same_tensors(one, other):
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tp, pp, ep, grouped", [(1, 1, 1, False), (2, 1, 2, True), (1, 2, 2, False), (2, 2, 1, True)])
def test_conversion_there_and_back_keeps_every_bit(with_prediction, tp, pp, ep, grouped, tmp_path):
    convert(with_prediction, tmp_path / "mg", tp=tp, pp=pp, experts=ExpertLayout(ep, grouped=grouped), quiet=True)
    convert(tmp_path / "mg", tmp_path / "hf", save_type="hf", quiet=True)
    assert same_tensors(with_prediction, tmp_path / "hf")


def test_copies_of_the_embedding_are_checked_and_written(with_prediction, tmp_path):
    names = load_file(with_prediction / "model.safetensors").keys()
    for layer in (4, 5):
        assert {f"model.layers.{layer}.embed_tokens.weight", f"model.layers.{layer}.shared_head.head.weight"} <= names
    tensors = load_file(with_prediction / "model.safetensors")
    tensors["model.layers.5.shared_head.head.weight"][3, 4] += 1
    (tmp_path / "config.json").write_text((with_prediction / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight and model.layers.5.shared_head.head.weight.*differ"):
        HfSource(tmp_path)


def test_prediction_layers_are_dropped_only_when_asked(with_prediction, tmp_path):
    lacking = make_toy("deepseek_v3", tmp_path / "lacking", dtype="bfloat16")
    edit_config(lacking, num_nextn_predict_layers=1)
    with pytest.raises(UserError, match="missing.*--mtp-num-layers 0"):
        HfSource(lacking)
    with pytest.raises(UserError, match="--mtp-num-layers: 3 contradicts"):
        convert(with_prediction, tmp_path / "no", mtp_num_layers=3, quiet=True)
    convert(with_prediction, tmp_path / "mg", tp=2, mtp_num_layers=0, quiet=True)
    convert(tmp_path / "mg", tmp_path / "hf", save_type="hf", quiet=True)
    assert read_hf_config(tmp_path / "hf")["num_nextn_predict_layers"] == 0
    kept, every = (load_file(d / "model.safetensors") for d in (tmp_path / "hf", with_prediction))
    assert {name for name in every if not name.startswith(("model.layers.4.", "model.layers.5."))} == kept.keys()
    convert(with_prediction, tmp_path / "all", pp=2, quiet=True)
    convert(tmp_path / "all", tmp_path / "one", save_type="hf", mtp_num_layers=1, quiet=True)
    assert shape_from_hf(read_hf_config(tmp_path / "one")).mtp_num_layers == 1
    assert len(HfSource(tmp_path / "one").names()) < len(HfSource(with_prediction).names())


def resolved(words):
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.plan import resolve

    parsed = parse("posttrain", [*words.split(), "--train-iters", "1"])
    return resolve(parsed.config, parsed.problems)


FROM_FLAGS = (
    "--num-layers 4 --hidden-size 48 --ffn-hidden-size 80 --num-attention-heads 6 --vocab-size 131 --swiglu "
    "--disable-bias-linear --normalization RMSNorm --untie-embeddings-and-output-weights --allow-random-init "
)
LATENT = (
    "--multi-latent-attention --kv-lora-rank 16 --qk-nope-head-dim 12 --qk-rope-head-dim 8 --v-head-dim 10 "
    "--qk-layernorm "
)


def test_a_shape_comes_from_flags_alone():
    shape = resolved(FROM_FLAGS + LATENT + "--q-lora-rank 24 --mtp-num-layers 1").shape
    assert (shape.family, shape.kv_channels, shape.num_query_groups, shape.qk_layernorm) == ("deepseek", 20, 6, False)
    assert shape.rotary_interleaved and shape.mtp_num_layers == 1 and shape.q_lora_rank == 24
    assert len(tensor_pairs(shape)) == 5 * 11 + 4 + 3


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--kv-lora-rank 16", "--multi-latent-attention is missing"),
        ("--mtp-num-layers 1", "--mtp-num-layers: only DeepSeek"),
        ("--multi-latent-attention --kv-lora-rank 16", "--qk-head-dim is missing"),
        (LATENT + "--group-query-attention --num-query-groups 2", "leave the flag out"),
        (LATENT + "--model-type-hf qwen3", "--multi-latent-attention: needs --model-type-hf deepseek"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        resolved(FROM_FLAGS + flags)


def test_what_contradicts_the_checkpoint_is_refused(with_prediction):
    load = f"--load {with_prediction} "
    assert resolved(load + "--mtp-num-layers 1").shape.mtp_num_layers == 1
    for flags, words in {
        "--mtp-num-layers 3": "--mtp-num-layers: 3 contradicts",
        "--v-head-dim 64": "--v-head-dim: 64 contradicts",
    }.items():
        with pytest.raises(UserError, match=words):
            resolved(load + flags)


def test_a_layout_that_prediction_layers_cannot_take_is_refused(with_prediction, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    load = f"--load {with_prediction} --pipeline-model-parallel-size 3 "
    assert resolved(load + "--noop-layers 0,1").layout.pp == 3
    with pytest.raises(UserError, match="the last stage holds the last layer"):
        resolved(load + "--noop-layers 4,5")
