"""LoRA settings: their record, their parameters, and what of PEFT's settings is read and written."""

import json
import math
import pickle
from unittest import mock

import pytest
import torch

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adapters import AdapterSettings, adapted_linears, adapter_parameters, read_pattern
from mindspeed_llm.plan.peft_settings import PICKLED_WEIGHTS, WEIGHTS, adapter_file, peft_record, read_peft_settings
from mindspeed_llm.plan.targets import resolve_targets

SHAPE = ModelShape("llama", 3, 48, 80, 6, 2, 12, 131, 256)


def settings(*names, rank=4, **others):
    resolved = resolve_targets(names, SHAPE)
    return AdapterSettings(rank, 8.0, 0.0, resolved.targets, resolved.layers, **others)


def test_settings_survive_their_record():
    made = settings(
        "linear_fc1", r".*layers\.[12]\..*(q|v)_proj", ranks={"linear_qkv/v_proj": 2}, alphas={"linear_fc1": 3.0},
        use_rslora=True, use_dora=True, loraplus_lr_ratio=4.0,
    )  # fmt: skip
    assert made.layers == {"linear_qkv": (1, 2)}
    assert AdapterSettings.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_records_of_versions_that_knew_less_are_read_and_of_those_that_knew_more_refused():
    record = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": {"linear_qkv": ["q_proj"]}}
    assert AdapterSettings.from_json(record) == AdapterSettings(4, 8.0, 0.0, {"linear_qkv": ("q_proj",)})
    with pytest.raises(UserError, match="setting 'shape' in the checkpoint's record is not known"):
        AdapterSettings.from_json({**record, "shape": "round"})


def test_ranks_and_scalings_of_parts():
    made = settings("q_proj", "v_proj", "linear_fc1", ranks={"linear_qkv/v_proj": 16}, alphas={"linear_fc1": 2.0})
    assert [made.rank_of("linear_qkv", part) for part in ("q_proj", "v_proj")] == [4, 16]
    assert [made.scaling_of("linear_qkv", part) for part in ("q_proj", "v_proj")] == [2.0, 0.5]
    assert made.scaling_of("linear_fc1", "up_proj") == 0.5
    stabilised = settings("q_proj", ranks={"linear_qkv": 16}, use_rslora=True)
    assert stabilised.scaling_of("linear_qkv", "q_proj") == 8.0 / math.sqrt(16)


def test_parameters_against_the_count_by_hand():
    # q [72, 48], v [24, 48], each with an A of its own; fc1 [160, 48] with one A for both parts
    assert adapter_parameters(SHAPE, settings("q_proj", "v_proj")) == 3 * 4 * (48 + 72 + 48 + 24)
    assert adapter_parameters(SHAPE, settings("linear_fc1")) == 3 * 4 * (48 + 160)
    assert adapter_parameters(SHAPE, settings("gate_proj", "up_proj")) == 3 * 4 * (2 * 48 + 160)
    assert adapter_parameters(SHAPE, settings("linear_fc1", use_dora=True)) == 3 * (4 * (48 + 160) + 160)
    of_two = settings(r".*layers\.[12]\..*(q|v)_proj", ranks={"linear_qkv/v_proj": 2})
    assert adapter_parameters(SHAPE, of_two) == 2 * (4 * (48 + 72) + 2 * (48 + 24))


def test_rows_say_what_is_adapted():
    made = settings("q_proj", "v_proj", "linear_fc2", ranks={"linear_qkv/v_proj": 2})
    qkv, fc2 = adapted_linears(SHAPE, made)
    assert (qkv.module, qkv.parts, qkv.count, qkv.ranks, qkv.scalings) == (
        "linear_qkv", ("q_proj", "v_proj"), 3, (4, 2), (2.0, 4.0)
    )  # fmt: skip
    assert (fc2.module, fc2.parts, fc2.count, fc2.ranks, fc2.scalings) == ("linear_fc2", (), 3, (4,), (2.0,))


def test_patterns_on_the_command_line():
    assert read_pattern(["q_proj=8", r".*layers\.0\..*=2"], "--lora-rank-pattern", int) == {
        "q_proj": 8, r".*layers\.0\..*": 2
    }  # fmt: skip
    for wrong in ("q_proj", "q_proj=", "=8", "q_proj=0", "q_proj=1.5", "q_proj=-1"):
        with pytest.raises(UserError, match="--lora-rank-pattern: .* legal: NAME=VALUE such as q_proj=8"):
            read_pattern([wrong], "--lora-rank-pattern", int)
    with pytest.raises(UserError, match="the name stands twice"):
        read_pattern(["q_proj=8", "q_proj=4"], "--lora-rank-pattern", int)
    with pytest.raises(UserError, match="no positive float"):
        read_pattern(["q_proj=inf"], "--lora-alpha-pattern", float)


def peft_directory(path, **changes):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return path


def read(path, **changes):
    return read_peft_settings(peft_directory(path, **changes), SHAPE)


def test_peft_settings_are_read(tmp_path):
    found = read(tmp_path, target_modules=["self_attn.q_proj", "down_proj"])
    assert found == AdapterSettings(4, 8.0, 0.1, {"linear_qkv": ("q_proj",), "linear_fc2": ()})


def test_peft_names_of_single_layers_are_adapters_of_these_layers(tmp_path):
    found = read(tmp_path, target_modules=["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"])
    assert (found.targets, found.layers) == ({"linear_qkv": ("q_proj",)}, {"linear_qkv": (0, 2)})
    assert read(tmp_path, target_modules=["q_proj"], layers_to_transform=[0, 2]) == found
    assert read(tmp_path, target_modules=r".*layers\.(0|2)\..*q_proj") == found


def test_peft_variants_are_read(tmp_path):
    found = read(
        tmp_path, target_modules=["q_proj", "v_proj", "o_proj"], rank_pattern={"v_proj": 2, "lm_head": 3},
        alpha_pattern={r".*self_attn\.o_proj": 3}, use_rslora=True, use_dora=True, exclude_modules=["o_proj"],
    )  # fmt: skip
    assert found.targets == {"linear_qkv": ("q_proj", "v_proj")}
    assert (found.ranks, found.alphas) == ({"linear_qkv/v_proj": 2}, {})
    assert found.use_rslora and found.use_dora


def test_all_linear_of_peft_has_an_a_for_each_part(tmp_path):
    found = read(tmp_path, target_modules="all-linear")
    assert found.targets["linear_qkv"] == ("q_proj", "k_proj", "v_proj")
    assert sorted(found.targets) == ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"]


@pytest.mark.parametrize(
    "made",
    [
        settings("q_proj", "v_proj", "linear_fc2"),
        settings("q_proj", "v_proj", use_rslora=True, use_dora=True, ranks={"linear_qkv/v_proj": 2}),
        settings(r".*layers\.[12]\..*(q|v)_proj", "o_proj", alphas={"linear_proj": 5.0}),
        settings("gate_proj", "up_proj", ranks={"linear_fc1": 3}),
    ],
)
def test_what_is_written_for_peft_is_read_again(made, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_record(made, SHAPE, "base")))
    assert read_peft_settings(tmp_path, SHAPE) == made


@pytest.mark.parametrize(
    "name, value",
    [
        ("bias", "all"), ("bias", "lora_only"), ("fan_in_fan_out", True), ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 2]]), ("lora_bias", True), ("trainable_token_indices", [5]),
        ("use_qalora", True), ("alora_invocation_tokens", [1, 2]), ("corda_config", {"a": 1}),
        ("megatron_config", {"a": 1}), ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"),
    ],
)  # fmt: skip
def test_peft_features_that_are_not_implemented_are_refused(name, value, tmp_path):
    with pytest.raises(UserError, match=f"lora: {name}=.* is not supported") as refused:
        read(tmp_path, **{name: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "holds IA3 adapters; legal: LORA"),
        ({"target_modules": ["c_attn"]}, "target 'c_attn' matches no linear"),
        ({"target_modules": ".*c_attn"}, "target '.*c_attn' matches no linear"),
        ({"target_modules": None}, "target_modules"),
        ({"r": 0}, "r=0"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"some_new_feature": True}, "some_new_feature"),
        ({"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}}, "of some layers or experts alone"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "layers_pattern='blocks'"),
    ],
)
def test_peft_settings_that_make_no_sense_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize("name", [WEIGHTS, PICKLED_WEIGHTS])
@pytest.mark.parametrize("content", [b"", b"no tensors", pickle.dumps([1, 2])], ids=["empty", "text", "list"])
def test_files_of_tensors_that_cannot_be_read_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged .*; try: copy it again"), adapter_file(tmp_path):
        pass


def test_tensors_that_were_pickled_on_a_gpu_are_read_without_one(tmp_path):
    with mock.patch("torch.serialization.location_tag", lambda storage: "cuda:0"):
        torch.save({"a": torch.ones(2)}, tmp_path / PICKLED_WEIGHTS)
    with adapter_file(tmp_path) as (names, read_tensor):
        assert list(names) == ["a"] and read_tensor("a").device.type == "cpu"


def test_every_setting_of_the_installed_peft_is_known(tmp_path):
    """What peft writes by default is accepted, so that a new field of a newer version is noticed here."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    assert read_peft_settings(tmp_path, SHAPE).rank == 4
