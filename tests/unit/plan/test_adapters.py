"""LoRA targets and settings: names, fused linears and their parts, PEFT's features."""

import json

import pytest

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adapters import AdapterSettings, adapter_parameters, resolve_targets
from mindspeed_llm.plan.peft_settings import read_peft_settings

SHAPE = ModelShape("llama", 3, 48, 80, 6, 2, 12, 131, 256)


@pytest.mark.parametrize(
    "names, targets",
    [
        (["linear_qkv"], {"linear_qkv": ()}),
        (["q_proj", "k_proj", "v_proj"], {"linear_qkv": ("q_proj", "k_proj", "v_proj")}),
        (["v_proj", "q_proj"], {"linear_qkv": ("q_proj", "v_proj")}),
        (["o_proj", "down_proj"], {"linear_proj": (), "linear_fc2": ()}),
        (["linear_fc1", "q_proj"], {"linear_qkv": ("q_proj",), "linear_fc1": ()}),
        (["all-linear"], {"linear_qkv": (), "linear_proj": (), "linear_fc1": (), "linear_fc2": ()}),
    ],
)
def test_targets(names, targets):
    assert resolve_targets(names) == targets


@pytest.mark.parametrize(
    "names, message",
    [
        (["w_proj"], "target 'w_proj' matches no linear of this model; legal: linear_qkv, .*q_proj"),
        (["linear_qkv", "q_proj"], "target 'q_proj' is already inside 'linear_qkv'"),
        (["all-linear", "up_proj"], "target 'up_proj' is already inside 'linear_fc1'"),
        (["query_key_value"], "matches no linear"),
    ],
)
def test_wrong_targets_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        resolve_targets(names)


def settings(*names, rank=4):
    return AdapterSettings(rank, 8.0, 0.0, resolve_targets(names))


def test_settings_survive_their_record():
    made = settings("linear_fc1", "q_proj", "v_proj")
    assert AdapterSettings.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert made.scaling == 2.0


def test_parameters_against_the_count_by_hand():
    # q [72, 48], v [24, 48], each with an A of its own; fc1 [160, 48] with one A for both parts
    assert adapter_parameters(SHAPE, settings("q_proj", "v_proj")) == 3 * 4 * (48 + 72 + 48 + 24)
    assert adapter_parameters(SHAPE, settings("linear_fc1")) == 3 * 4 * (48 + 160)
    assert adapter_parameters(SHAPE, settings("gate_proj", "up_proj")) == 3 * 4 * (2 * 48 + 160)


def peft_directory(path, **changes):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return path


def test_peft_settings_are_read(tmp_path):
    names = ["model.layers.0.self_attn.q_proj", "down_proj"]
    found = read_peft_settings(peft_directory(tmp_path, target_modules=names))
    assert found == AdapterSettings(4, 8.0, 0.1, {"linear_qkv": ("q_proj",), "linear_fc2": ()})


@pytest.mark.parametrize(
    "name, value",
    [
        ("use_rslora", True), ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 8}), ("alpha_pattern", {"q_proj": 8}),
        ("layers_to_transform", [0, 1]), ("layer_replication", [[0, 2]]), ("lora_bias", True),
        ("target_parameters", ["w"]), ("exclude_modules", ["v_proj"]), ("trainable_token_indices", [5]),
        ("use_qalora", True), ("alora_invocation_tokens", [1, 2]), ("corda_config", {"a": 1}),
        ("megatron_config", {"a": 1}), ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"),
    ],
)  # fmt: skip
def test_peft_features_that_are_not_implemented_are_refused(name, value, tmp_path):
    with pytest.raises(UserError, match=f"lora: {name}=.* is not supported") as refused:
        read_peft_settings(peft_directory(tmp_path, **{name: value}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "holds IA3 adapters; legal: LORA"),
        ({"target_modules": ".*q_proj"}, "is a pattern; legal: a list of names"),
        ({"target_modules": ["c_attn"]}, "target 'c_attn' matches no linear"),
        ({"target_modules": None}, "target_modules"),
        ({"r": 0}, "r=0"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"some_new_feature": True}, "some_new_feature"),
    ],
)
def test_peft_settings_that_make_no_sense_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_peft_settings(peft_directory(tmp_path, **changes))


def test_every_setting_of_the_installed_peft_is_known(tmp_path):
    """What peft writes by default is accepted, so that a new field of a newer version is noticed here."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    assert read_peft_settings(tmp_path).rank == 4
