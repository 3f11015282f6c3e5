"""What does not hold exactly the model is refused, naming the path or the tensor."""

import argparse
import fractions
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.convert import convert
from mindspeed_llm.checkpoint.detect import detect, open_source
from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.toy import edit_config
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf


@pytest.fixture
def broken(toys, tmp_path):
    """A function that copies a toy, changes its tensors by name, and gives the copy."""

    def make(toy, change):
        target = tmp_path / "broken"
        shutil.copytree(toys[toy], target)
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target

    return make


Q = "model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t: t.pop(Q), f"1 missing .{Q}"),
        (lambda t: t.update({"model.layers.4.mlp.up_proj.weight": t[Q] + 1}), "1 unexpected .model.layers.4"),
        (lambda t: t.update({Q: t[Q][:-16]}), r"q_proj.weight .* has shape \[112, 64\].*legal: \[128, 64\]"),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), "type I8"),
        (lambda t: t.update({Q: t[Q].to(torch.bfloat16)}), "have types bfloat16, float32, float32"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}), "says that there is none"),
    ],
)
def test_hf_files_that_do_not_hold_the_model(broken, change, words):
    with pytest.raises(UserError, match=words):
        HfSource(broken("llama", change))


def test_a_bias_that_config_promises_and_the_file_lacks(broken):
    path = broken("llama", lambda tensors: None)
    edit_config(path, attention_bias=True)
    with pytest.raises(UserError, match="16 missing"):
        HfSource(path)


def test_a_tied_head_in_the_file_must_be_the_embedding(broken, toys):
    embedding = "model.embed_tokens.weight"
    same = broken("qwen3-tied", lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    assert len(HfSource(same).names()) == len(HfSource(toys["qwen3-tied"]).names())
    shutil.rmtree(same)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        HfSource(broken("qwen3-tied", lambda t: t.update({"lm_head.weight": t[embedding] + 1})))


def test_old_rotary_buffers_are_no_weights(broken, toys):
    old = broken("llama", lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert HfSource(old).names() == HfSource(toys["llama"]).names()


def test_truncated_files_are_named(toys, tmp_path):
    shutil.copytree(toys["llama"], tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        HfSource(tmp_path / "cut")


@pytest.fixture
def sharded(toys, tmp_path):
    return convert(toys["llama"], tmp_path / "sharded", save_type="hf", shard_bytes=300_000, quiet=True)


def test_an_index_must_agree_with_the_files(sharded):
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    assert len(HfSource(sharded).files.names()) == 39
    ghost = {**good, "weight_map": {**good["weight_map"], "ghost": good["weight_map"]["lm_head.weight"]}}
    index.write_text(json.dumps(ghost))
    with pytest.raises(UserError, match="disagrees with the files about 1 tensors .ghost"):
        HfSource(sharded)
    index.write_text(json.dumps(good))
    (sharded / good["weight_map"]["lm_head.weight"]).unlink()
    with pytest.raises(UserError, match="which is not there"):
        HfSource(sharded)


def test_pytorch_bin_files_are_read_the_same(toys, tmp_path):
    shutil.copytree(toys["llama"], tmp_path / "bin")
    tensors = load_file(tmp_path / "bin" / "model.safetensors")
    (tmp_path / "bin" / "model.safetensors").unlink()
    for legacy in (False, True):
        torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        ours, reference = HfSource(tmp_path / "bin"), HfSource(toys["llama"])
        assert all(torch.equal(ours.read(n), reference.read(n)) for n in reference.names())


def test_a_pickle_that_would_run_code_is_refused(toys, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    shutil.copytree(toys["llama"], tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save({"x": Evil()}, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read"):
        HfSource(tmp_path / "bin")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def megatron(toys, tmp_path, without_manifest):
    convert(toys["qwen3-tied"], tmp_path / "mg", tp=2, pp=2, quiet=True)
    without_manifest(tmp_path / "mg")
    return tmp_path / "mg"


def rewrite(path, change):
    """Change one rank's file."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


LAYER = "decoder.layers.1.mlp.linear_fc1.weight"
NORM = "decoder.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda c: c["model"].pop(LAYER), "missing .model.decoder.layers.1.mlp.linear_fc1"),
        (lambda c: c["model"].update({LAYER: c["model"][LAYER][1:]}), r"has shape \[111, 64\]"),
        (lambda c: c["model"].update({NORM: c["model"][NORM] + 1}), "differs between tensor-parallel ranks 0 and 1"),
        (lambda c: c["model"].update({"decoder.layers.1.mlp.router.weight": torch.ones(1)}), "router"),
        (lambda c: c["model"].update({"output_layer.weight": c["model"]["output_layer.weight"] + 1}), "first and last"),
        (lambda c: c.pop("model"), "holds no 'model'"),
        (lambda c: c["model"].update({LAYER: c["model"][LAYER].half()}), "have types float32, float16"),
    ],
)
def test_rank_files_that_do_not_hold_the_model(megatron, change, words, tmp_path):
    rewrite(megatron / "iter_0000001" / "mp_rank_01_001" / "model_optim_rng.pt", change)
    with pytest.raises(UserError, match=words):
        convert(megatron, tmp_path / "hf", save_type="hf", quiet=True)
    assert not (tmp_path / "hf" / "config.json").exists()


def test_a_missing_layer_on_all_ranks_is_noticed(megatron, tmp_path):
    for rank in range(2):
        path = megatron / "iter_0000001" / f"mp_rank_{rank:02d}_001" / "model_optim_rng.pt"
        rewrite(path, lambda c: [c["model"].pop(n) for n in list(c["model"]) if n.startswith("decoder.layers.1.")])
    with pytest.raises(UserError, match="missing .decoder.layers.3"):
        open_source(megatron)


def test_recorded_arguments_that_contradict_the_config(megatron):
    path = megatron / "iter_0000001" / "mp_rank_00_000" / "model_optim_rng.pt"
    rewrite(path, lambda c: setattr(c["args"], "rotary_base", 500000))
    with pytest.raises(UserError, match="rotary_base=500000, but the model's config says 10000"):
        open_source(megatron)


def test_a_foreign_checkpoint_is_read_with_a_config_alone(megatron, toys, tmp_path, same_tensors):
    """No record, no hf/ folder, args with a class of another program, extra state: as Megatron-LM writes it."""

    directory = megatron / "iter_0000001"
    (directory / "mindspeed_llm.json").unlink()
    shutil.rmtree(directory / "hf")
    for path in directory.glob("*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        content["model"]["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
        content["args"].backend = fractions.Fraction(1, 3)
        content["rng_state"] = argparse.Namespace(x=1)
        torch.save(content, path)
    with pytest.raises(UserError, match="--hf-cfg-dir"):
        convert(megatron, tmp_path / "hf", save_type="hf", quiet=True)
    convert(megatron, tmp_path / "hf", save_type="hf", hf_cfg_dir=toys["qwen3-tied"], quiet=True)
    same_tensors(toys["qwen3-tied"], tmp_path / "hf")


def test_a_class_of_another_program_becomes_a_placeholder(tmp_path):
    from mindspeed_llm.checkpoint.rank_files import load_rank_file

    path = tmp_path / "x.pt"
    torch.save({"args": argparse.Namespace(a=fractions.Fraction(1, 3), b=2), "model": {"w": torch.ones(2)}}, path)
    content = load_rank_file(path)
    assert content["args"].b == 2 and not isinstance(content["args"].a, fractions.Fraction)
    assert torch.equal(content["model"]["w"], torch.ones(2))


TRACKER = "latest_checkpointed_iteration.txt"


@pytest.mark.parametrize(
    "directories,files,words",
    [
        ([], {}, "is not a directory"),
        (["."], {}, "found: nothing"),
        (["."], {"notes.txt": "x"}, "found: notes.txt"),
        (["."], {TRACKER: "100"}, "-> 100, but no iter_0000100/"),
        (["iter_0000100"], {TRACKER: "100"}, "iter_0000100/ with nothing"),
        (["."], {TRACKER: "soon"}, "holds 'soon'"),
    ],
)
def test_a_path_with_nothing_loadable_says_what_is_there(tmp_path, directories, files, words):
    for name in directories:
        (tmp_path / "x" / name).mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "x" / name).write_text(text)
    with pytest.raises(UserError, match=words):
        detect(tmp_path / "x")


def test_a_conversion_that_lost_files_is_refused_by_its_manifest(toys, tmp_path):
    written = convert(toys["llama"], tmp_path / "mg", tp=2, quiet=True)
    shutil.rmtree(written / "mp_rank_01")
    with pytest.raises(UserError, match="is damaged, because mp_rank_01/model_optim_rng.pt is missing"):
        open_source(tmp_path / "mg")


def test_a_missing_rank_directory_is_named(megatron):
    shutil.rmtree(megatron / "iter_0000001" / "mp_rank_01_000")
    with pytest.raises(UserError, match="mp_rank_01_000 is not there"):
        open_source(megatron)


def test_release_checkpoints_are_found(megatron, toys):
    (megatron / "iter_0000001").rename(megatron / "release")
    (megatron / "latest_checkpointed_iteration.txt").write_text("release")
    source = open_source(megatron)
    assert source.shape == shape_from_hf(read_hf_config(toys["qwen3-tied"]))
    assert detect(megatron / "release").format == "megatron"
