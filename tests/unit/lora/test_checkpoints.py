"""Adapter checkpoints: merged types, resuming, tensors trained beside them, other bases and settings, PEFT files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.detect import open_source
from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError

TUNE = (
    "--stage sft --prompt-type chatml --seq-length 128 --lr 2e-2 --lr-decay-style constant --global-batch-size 4 "
    "--split 1 --progress lines --num-threads 1"
)


def test_a_merged_model_keeps_the_types_of_its_base(tuned, post_train, convert_door, rows, tmp_path):
    base = make_toy("llama", tmp_path / "base", dtype="bfloat16")
    out, merged = tmp_path / "out", tmp_path / "merged"
    post_train(TUNE, f"--load {base} --data-path {rows} --train-iters 1 --lora-r 4 --bf16 --save {out}")
    convert_door(f"--load-dir {base} --lora-load {out} --save-model-type hf --save-dir {merged}")
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}


def test_resuming_gives_the_run_that_was_not_stopped(tuned, post_train, rows, tmp_path, capsys):
    base, _ = tuned("toy_llama", "parts")
    run = f"{TUNE} --load {base} --data-path {rows} --train-iters 4 --lora-dropout 0.1"
    post_train(run, f"--save {tmp_path / 'whole'} --lora-r 4 --lora-target-modules q_proj down_proj")
    out = tmp_path / "out"
    post_train(run, f"--save {out} --exit-interval 2 --lora-r 4 --lora-target-modules q_proj down_proj")
    post_train(run, f"--save {out} --lora-load {out}")
    whole, resumed = (load_adapters_of(directory, base) for directory in (tmp_path / "whole", out))
    assert whole.keys() == resumed.keys()
    for place in whole:
        assert torch.equal(whole[place].a, resumed[place].a) and torch.equal(whole[place].b, resumed[place].b)


def load_adapters_of(directory, base):
    from mindspeed_llm.lora.tensors import read_adapters
    from mindspeed_llm.plan.adapters import AdapterSettings
    from mindspeed_llm.plan.source import find_source

    found = find_source(directory)
    return read_adapters(found.directory, open_source(base).shape, AdapterSettings.from_json(found.record["adapters"]))


def test_what_is_trained_beside_adapters_is_merged_and_never_lost(
    tuned, post_train, convert_door, our_logits, hf_logits, rows, tmp_path
):
    base, _ = tuned("toy_llama", "fused")
    out = tmp_path / "out"
    flags = f"--load {base} --data-path {rows} --train-iters 2 --lora-r 4 --save {out} --save-hf"
    post_train(TUNE, flags, r"--trainable embedding layers\.2\.input_layernorm final_layernorm")
    convert_door(f"--load-dir {base} --lora-load {out} --save-model-type hf --save-dir {tmp_path / 'merged'}")
    before, after, directly = (load_file(d / "model.safetensors") for d in (base, tmp_path / "merged", out / "hf"))
    assert all(torch.equal(after[name], directly[name]) for name in after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.embed_tokens.weight", "model.layers.2.input_layernorm.weight", "model.norm.weight"} <= changed
    assert "model.layers.1.input_layernorm.weight" not in changed
    with pytest.raises(UserError, match="PEFT's format holds adapters alone"):
        convert_door(f"--load-dir {base} --lora-load {out} --save-lora-to-hf --save-dir {tmp_path / 'peft'}")
    with pytest.raises(UserError, match="--trainable trained them beside the adapters"):
        our_logits(base, out)


@pytest.fixture(scope="module")
def other_base(tuned, tmp_path_factory):
    """The base with another value in a single layer."""
    base, _ = tuned("toy_llama", "fused")
    copy = tmp_path_factory.mktemp("other") / "base"
    shutil.copytree(base, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] += 1e-3
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_another_base_is_refused_everywhere(tuned, other_base, post_train, convert_door, our_logits, rows, tmp_path):
    base, adapters = tuned("toy_llama", "fused")
    for use in (
        lambda: convert_door(f"--load-dir {other_base} --lora-load {adapters} --save-dir {tmp_path / 'merged'}"),
        lambda: convert_door(f"--load-dir {other_base} --lora-load {adapters} --save-lora-to-hf --save-dir {tmp_path}"),
        lambda: our_logits(other_base, adapters),
        lambda: post_train(TUNE, f"--load {other_base} --lora-load {adapters} --data-path {rows} --train-iters 9"),
    ):
        with pytest.raises(UserError, match="is not the base that .* was trained on") as refused:
            use()
        assert str(base) in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "merged").exists()


def test_the_base_may_come_in_another_format_layout_and_type(tuned, convert_door, tmp_path):
    base, adapters = tuned("toy_llama", "fused")
    convert_door(
        f"--load-dir {base} --save-dir {tmp_path / 'mg'} --target-tensor-parallel-size 2 "
        "--target-pipeline-parallel-size 2"
    )
    convert_door(f"--load-dir {base} --save-dir {tmp_path / 'bf16'} --save-model-type hf --params-dtype bf16")
    for number, variant in enumerate((tmp_path / "mg", tmp_path / "bf16")):
        convert_door(
            f"--load-dir {variant} --lora-load {adapters} --save-model-type hf --save-dir {tmp_path / f'm{number}'}"
        )
    convert_door(f"--load-dir {base} --lora-load {adapters} --save-model-type hf --save-dir {tmp_path / 'm'}")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "m0"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lora-r 8", "--lora-r: 8 contradicts the adapters in .* \\(4\\)"),
        ("--lora-alpha 16", "--lora-alpha: 16.0 contradicts"),
        ("--lora-target-modules q_proj", "--lora-target-modules: .* contradicts"),
    ],
)
def test_settings_that_contradict_the_checkpoint_are_refused(flags, message, tuned, convert_door, post_train, tmp_path):
    base, adapters = tuned("toy_llama", "fused")
    with pytest.raises(UserError, match=message):
        convert_door(f"--load-dir {base} --lora-load {adapters} --save-dir {tmp_path / 'x'} {flags}")
    with pytest.raises(UserError, match=message):
        post_train(TUNE, f"--load {base} --lora-load {adapters} --data-path x --train-iters 9 {flags}")


def test_repeating_the_settings_is_fine(tuned, convert_door, tmp_path):
    base, adapters = tuned("toy_llama", "fused")
    convert_door(
        f"--load-dir {base} --lora-load {adapters} --save-dir {tmp_path / 'x'} --lora-r 4 --lora-alpha 12 "
        "--lora-target-modules linear_fc2 linear_fc1 linear_proj linear_qkv"
    )
    assert (tmp_path / "x" / "latest_checkpointed_iteration.txt").is_file()


@pytest.fixture
def peft_directory(tuned, convert_door, tmp_path):
    base, adapters = tuned("toy_llama", "parts")
    convert_door(f"--load-dir {base} --lora-load {adapters} --save-lora-to-hf --save-dir {tmp_path / 'peft'}")
    return base, tmp_path / "peft"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.pop(next(n for n in t if ".layers.0." in n)), "only one factor of decoder.layers.0"),
        (lambda t: [t.pop(n) for n in list(t) if ".layers.3." in n], "settings disagree on decoder.layers.3"),
        (lambda t: t.update({n: x[:2] for n, x in t.items() if "lora_A" in n}), "rank 4 need \\(4, 112\\)"),
        (lambda t: t.update({"base_model.model.norm.lora_A.weight": torch.zeros(4, 64)}), "no adapter of a linear"),
    ],
)  # fmt: skip
def test_damaged_peft_directories_are_refused(damage, message, peft_directory, convert_door, tmp_path):
    base, directory = peft_directory
    tensors = load_file(directory / "adapter_model.safetensors")
    damage(tensors)
    save_file({n: t.clone() for n, t in tensors.items()}, directory / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        convert_door(f"--load-dir {base} --lora-load {directory} --save-dir {tmp_path / 'x'}")


def test_peft_features_are_refused_through_the_door(peft_directory, convert_door, tmp_path):
    base, directory = peft_directory
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    with pytest.raises(UserError, match="bias='all' .* is not supported; legal: 'none'"):
        convert_door(f"--load-dir {base} --lora-load {directory} --save-dir {tmp_path / 'x'}")


def test_adapters_of_another_model_are_refused(tuned, convert_door, tmp_path):
    _, adapters = tuned("toy_llama", "fused")
    wider = make_toy("llama", tmp_path / "wider", hidden_size=96)
    with pytest.raises(UserError, match="is not the base"):
        convert_door(f"--load-dir {wider} --lora-load {adapters} --save-dir {tmp_path / 'x'}")


def test_adapters_that_lack_a_tensor_are_refused(tuned):
    """As a checkpoint that lost one would be: its settings say that there is more."""
    from dataclasses import replace

    from mindspeed_llm.checkpoint.detect import open_source
    from mindspeed_llm.lora.tensors import read_adapters
    from mindspeed_llm.plan.recorded_adapters import settings_in
    from mindspeed_llm.plan.source import find_adapters

    base, adapters = tuned("toy_llama", "parts")
    shape, source = open_source(base).shape, find_adapters(adapters)
    settings = settings_in(source, shape)
    assert len(read_adapters(source.directory, shape, settings)) == 4 * 5
    more = replace(settings, targets={**settings.targets, "linear_fc1": ("gate_proj", "up_proj")})
    with pytest.raises(UserError, match="has no tensor 'decoder.layers.0.mlp.linear_fc1.lora_B.gate_proj'"):
        read_adapters(source.directory, shape, more)
