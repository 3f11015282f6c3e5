"""What --load points at, what contradicts it, and what may not change on resume."""

import dataclasses
import json

import pytest

from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import shape_from_hf
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.continuity import continue_run, is_allowed
from mindspeed_llm.plan.identity import FACTS, contradictions, shape_from_options
from mindspeed_llm.plan.plan import resolve
from mindspeed_llm.plan.show import show_plan
from mindspeed_llm.plan.source import find_source
from mindspeed_llm.plan.weights import find_sources

SHAPE = ModelShape(
    "llama", 4, 48, 80, 6, 2, 12, 131, 256, window_size=64, add_qkv_bias=True,
    rope_scaling={"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 64,
                  "low_freq_factor": 1.0, "high_freq_factor": 4.0},
)  # fmt: skip


def config(*words, door="pretrain"):
    parsed = parse(door, [piece for word in words for piece in word.split()])
    assert parsed.problems == []
    return parsed.config


RIGHT = (
    "--num-layers 4 --hidden-size 48 --ffn-hidden-size 80 --num-attention-heads 6 --group-query-attention "
    "--num-query-groups 2 --kv-channels 12 --vocab-size 131 --max-position-embeddings 256 --rotary-base 10000 "
    "--rope-scaling-type llama3 --rope-scaling-factor 2 --low-freq-factor 1 --normalization RMSNorm --swiglu "
    "--norm-epsilon 1e-5 --add-qkv-bias --disable-bias-linear --untie-embeddings-and-output-weights "
    "--sliding-window 64 --position-embedding-type rope"
)


def test_options_that_repeat_the_shape_are_fine():
    assert contradictions(config(RIGHT), SHAPE, "config.json") == []


@pytest.mark.parametrize(
    "flags",
    [
        "--num-layers 3", "--hidden-size 64", "--num-query-groups 3", "--kv-channels 8", "--vocab-size 128",
        "--rotary-base 500000", "--rope-scaling-type yarn", "--rope-scaling-factor 4", "--low-freq-factor 2",
        "--beta-fast 16", "--norm-epsilon 1e-6", "--no-add-qkv-bias", "--qk-layernorm", "--sliding-window 32",
        "--no-untie-embeddings-and-output-weights", "--no-swiglu", "--normalization LayerNorm", "--add-dense-bias",
    ],
)  # fmt: skip
def test_options_that_contradict_the_shape_are_named(flags):
    (problem,) = contradictions(config(flags), SHAPE, "config.json")
    assert problem.startswith("--" + flags.split()[0].removeprefix("--no-").removeprefix("--"))
    assert "contradicts config.json, which says" in problem


def test_every_fact_is_about_an_identity_option():
    from mindspeed_llm.config.run import all_options

    assert {all_options()[name].kind for name in FACTS} == {"identity"}
    plain = dataclasses.replace(SHAPE, rope_scaling=None)
    assert FACTS["rope_scaling_type"](plain) == "default"


def test_a_shape_from_options():
    words = RIGHT.replace("--low-freq-factor 1", "--low-freq-factor 1 --high-freq-factor 4")
    words += " --rope-scaling-original-max-position-embeddings 64"
    shape, problems = shape_from_options(config(words), "llama", 131)
    assert problems == []
    assert shape == SHAPE


@pytest.mark.parametrize(
    "without, message",
    [
        ("--hidden-size 48", "--hidden-size is missing"),
        ("--swiglu", "--swiglu is missing"),
        ("--normalization RMSNorm", "--normalization RMSNorm is missing"),
        ("--num-query-groups 2", "--num-query-groups is missing"),
        ("--group-query-attention", "--group-query-attention is missing"),
        ("--rope-scaling-type llama3", "--rope-scaling-type is missing: --rope-scaling-factor, --low-freq-factor"),
    ],
)
def test_what_a_shape_from_options_needs(without, message):
    shape, problems = shape_from_options(config(RIGHT.replace(without, "")), "llama", 131)
    assert shape is None
    assert any(message in problem for problem in problems)


RECORD = {"continuity": {"seed": 7, "global_batch_size": 8, "split": "90,10", "data_path": ["a"]}}


def test_a_resume_takes_over_what_was_not_given():
    resumed = config("--seed 7")
    assert continue_run(resumed, RECORD) == ([], [])
    assert (resumed.training.global_batch_size, resumed.data.split) == (8, "90,10")


def test_changes_on_resume_are_refused_one_by_one():
    problems, _ = continue_run(config("--seed 8 --global-batch-size 4 --data-path b"), RECORD)
    assert len(problems) == 2
    assert "--seed was 7 and is now 8; keep it, or --allow-change seed" in problems[0]
    assert "--allow-change global-batch-size" in problems[1]


@pytest.mark.parametrize("spelling", ["global-batch-size", "--global-batch-size=", "global_batch_size"])
def test_allowed_changes_have_several_spellings(spelling):
    word = spelling.rstrip("=")
    allowed = parse("pretrain", [f"--allow-change={word}", "--global-batch-size", "4"]).config
    assert is_allowed(allowed, "global_batch_size") and not is_allowed(allowed, "seed")
    assert continue_run(allowed, RECORD) == ([], [])


def checkpoint(root, *steps, adapters=None, latest=None):
    for step in steps:
        directory = root / f"iter_{step:07d}"
        directory.mkdir(parents=True)
        (directory / ".metadata").write_bytes(b"")
        record = {"iteration": step, "shape": SHAPE.to_json(), "adapters": adapters}
        (directory / "mindspeed_llm.json").write_text(json.dumps(record))
    (root / "latest_checkpointed_iteration.txt").write_text(str(latest if latest is not None else steps[-1]))
    return root


def test_formats_are_found(tmp_path, toy_llama):
    assert find_source(toy_llama).format == "hf"
    full = find_source(checkpoint(tmp_path / "full", 1, 2))
    assert (full.format, full.iteration) == ("torch_dist", 2)
    lora = find_source(checkpoint(tmp_path / "lora", 3, adapters={"rank": 4}))
    assert (lora.format, lora.iteration) == ("adapter", 3)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    assert find_source(tmp_path / "peft").format == "peft"


def test_an_earlier_iteration_can_be_asked_for(tmp_path):
    root = checkpoint(tmp_path / "full", 1, 2)
    assert find_source(root, 1).directory.name == "iter_0000001"
    assert find_source(root, 1).path == root
    with pytest.raises(UserError, match="--ckpt-step 5: .* is not there; legal: iter_0000001, iter_0000002"):
        find_source(root, 5)


def test_a_file_of_weights_is_not_said_to_be_absent(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors \(is a file\); legal: a Hugging Face directory"):
        find_sources(config(f"--load {tmp_path / 'model.safetensors'}"), [])


@pytest.mark.parametrize("door, adapters", [("pretrain", ""), ("inference", ""), ("inference", "--lora-load")])
def test_a_dry_run_plans_by_a_config_json_what_is_not_there_yet(tmp_path, toy_llama, capsys, door, adapters):
    """A run does not, nor does a dry run where something is there that cannot be loaded, or without the config.json."""
    nowhere = f"--load {tmp_path}/nowhere" + (f" {adapters} {tmp_path}/none" if adapters else "")
    described = f"--hf-config {toy_llama}/config.json" + (" --train-iters 1" if door == "pretrain" else "")
    plan = resolve(config(nowhere, described, "--dry-run", door=door), [])
    assert plan.shape.num_layers == 4
    said = [note.partition(" is not there yet")[0] for note in plan.notes]
    assert said == nowhere.replace(" --lora", "\n--lora").splitlines()
    show_plan(plan)
    assert "random, seed" not in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([nowhere, described], "holds no adapters" if adapters else "nothing loadable in .*does not exist"),
        ([nowhere, "--dry-run"], "holds no adapters" if adapters else "--hf-config FILE to plan by its shape"),
        ([f"--load {tmp_path}/empty", described, "--dry-run"], "nothing loadable in .*an empty directory"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(config(*words, door=door), [])


@pytest.mark.parametrize("recorded", [False, True], ids=["hugging face", "record"])
def test_a_config_json_beside_weights_must_describe_them(tmp_path, toy_llama, recorded):
    """The same model is fine, as in a command that is started again; of another one nothing would be taken."""
    told = json.loads((toy_llama / "config.json").read_text())
    root = toy_llama
    if recorded:
        root = checkpoint(tmp_path / "full", 1)
        record = {"iteration": 1, "shape": shape_from_hf(told).to_json()}
        (root / "iter_0000001" / "mindspeed_llm.json").write_text(json.dumps(record))
    described = tmp_path / "config.json"
    words = f"--load {root} --hf-config {described} --train-iters 1"
    described.write_text(json.dumps(told))
    assert resolve(config(words), []).shape == shape_from_hf(told)
    described.write_text(json.dumps(told | {"rms_norm_eps": 0.5, "num_hidden_layers": 3}))
    wrong = rf"--hf-config: {described} contradicts .*, because it says num_layers 3 \(there 4\), norm_epsilon 0.5 \("
    with pytest.raises(UserError, match=wrong):
        resolve(config(words), [])
    described.unlink()
    with pytest.raises(UserError, match="config.json"):
        resolve(config(words), [])


def test_a_config_json_of_a_truncated_run_is_that_of_the_whole_model(tmp_path, toy_llama):
    told = json.loads((toy_llama / "config.json").read_text())
    root = checkpoint(tmp_path / "full", 1)
    record = {"iteration": 1, "shape": shape_from_hf(told | {"num_hidden_layers": 2}).to_json()}
    (root / "iter_0000001" / "mindspeed_llm.json").write_text(json.dumps(record))
    words = f"--load {root} --hf-config {toy_llama} --train-iters 1"
    assert resolve(config(words, "--truncate-layers 2"), []).shape.num_layers == 2
    with pytest.raises(UserError, match=r"num_layers 4 \(there 2\)"):
        resolve(config(words), [])


def test_nothing_is_none_and_broken_is_an_error(tmp_path):
    assert find_source(tmp_path / "missing") is None
    (tmp_path / "empty").mkdir()
    assert find_source(tmp_path / "empty") is None
    with pytest.raises(UserError, match="nothing loadable"):
        find_source(checkpoint(tmp_path / "full", 1, latest=9))
