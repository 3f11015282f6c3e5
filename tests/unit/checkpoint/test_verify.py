"""verify says PASS for every family and configuration, and FAIL, with the layer, for every kind of damage."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.convert import convert
from mindspeed_llm.checkpoint.toy import edit_config, make_toy
from mindspeed_llm.checkpoint.verify import verify
from mindspeed_llm.errors import UserError

ROPE = dict(rope_theta=10000.0, original_max_position_embeddings=64)
FACTORS = dict(short_factor=[1.0 + i / 50 for i in range(8)], long_factor=[1.0 + i for i in range(8)])
CONFIGURATIONS = {
    "llama": ("llama", {}),
    "multi-head": ("llama", dict(num_key_value_heads=8)),
    "multi-query": ("llama", dict(num_key_value_heads=1)),
    "biased-tied": ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "linear": ("llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "dynamic": ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0))),
    "llama3": (
        "llama",
        dict(rope_parameters=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ROPE)),
    ),
    "yarn": ("qwen2", dict(rope_parameters=dict(rope_type="yarn", factor=4.0, **ROPE))),
    "longrope": ("llama", dict(rope_parameters=dict(rope_type="longrope", factor=4.0, **FACTORS, **ROPE))),
    "mistral-window": ("mistral", dict(sliding_window=5)),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    "qwen3": ("qwen3", {}),
    "qwen3-biased-tied": ("qwen3", dict(attention_bias=True, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_equals_transformers(name, tmp_path):
    model_type, overrides = CONFIGURATIONS[name]
    report = verify(make_toy(model_type, tmp_path, **overrides))
    assert report.passed and report.exit_code == 0, report
    assert str(report).startswith("PASS: fp32 logits max|diff| ") and str(report).endswith("top-1 64/64")
    assert report.first_divergence is None


def test_a_converted_checkpoint_is_verified(toys, tmp_path):
    convert(toys["qwen3-tied"], tmp_path / "mg", tp=2, pp=2, quiet=True)
    assert verify(toys["qwen3-tied"], tmp_path / "mg").passed


def test_megatrons_own_strict_loading_takes_our_files(toys, tmp_path):
    """What a Megatron program does with a rank's file: `load_state_dict(content["model"], strict=True)`."""
    import torch

    from mindspeed_llm.checkpoint.hf import HfSource
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.parallel.setup import initialize_distributed

    out = convert(toys["qwen3-tied"], tmp_path / "mg", quiet=True)
    content = torch.load(out / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    initialize_distributed()
    model = build_model(HfSource(toys["qwen3-tied"]).shape, BuildOptions(initialize=False))
    model.load_state_dict(content["model"], strict=True)
    assert verify(toys["qwen3-tied"], model).passed


@pytest.fixture
def copy(toys, tmp_path):
    shutil.copytree(toys["llama"], tmp_path / "copy")
    return tmp_path / "copy"


def change_tensor(directory, name, change):
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def swap_heads(weight):
    weight[:16], weight[16:32] = weight[16:32].clone(), weight[:16].clone()
    return weight


@pytest.mark.parametrize(
    "damage,place",
    [
        (lambda d: edit_config(d, rms_norm_eps=1e-4), "layer 0"),
        (lambda d: edit_config(d, rope_parameters=dict(rope_type="default", rope_theta=20000.0)), "layer 0"),
        (lambda d: edit_config(d, rope_parameters=dict(rope_type="linear", factor=1.01)), "layer 0"),
        (lambda d: change_tensor(d, "model.layers.2.self_attn.q_proj.weight", swap_heads), "layer 2"),
        (lambda d: change_tensor(d, "model.layers.1.mlp.down_proj.weight", lambda w: w * 1.01), "layer 1"),
        (lambda d: change_tensor(d, "model.norm.weight", lambda w: w + 0.01), "final norm"),
        (lambda d: change_tensor(d, "model.embed_tokens.weight", lambda w: w * 1.001), "embedding"),
    ],
    ids=["eps x 10", "theta", "linear 1.01", "two heads", "1 %", "final norm", "embedding"],
)
def test_damage_is_found_and_located(toys, copy, damage, place):
    damage(copy)
    report = verify(toys["llama"], copy)
    assert not report.passed and report.exit_code == 1
    assert report.first_divergence.place == place, report.table()
    assert str(report).startswith("FAIL") and f"first diverging: {place}" in str(report)


def test_a_damaged_output_layer_shows_in_the_logits_alone(toys, copy):
    change_tensor(copy, "lm_head.weight", lambda w: w + 0.01)
    report = verify(toys["llama"], copy)
    assert not report.passed and report.first_divergence is None


def test_not_a_number_fails(toys, copy):
    change_tensor(copy, "model.layers.3.mlp.up_proj.weight", lambda w: w * float("nan"))
    report = verify(toys["llama"], copy)
    assert not report.passed and report.first_divergence.place == "final norm"


def test_another_model_is_refused(toys, tmp_path):
    other = make_toy("llama", tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(UserError, match="another model"):
        verify(toys["llama"], other)
