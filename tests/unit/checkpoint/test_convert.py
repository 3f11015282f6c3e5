"""Conversion is bitwise there and back for every layout, complete, and strict about its surroundings."""

import argparse
import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.convert import convert
from mindspeed_llm.checkpoint.detect import open_source
from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.toy import edit_config
from mindspeed_llm.errors import UserError

SPLITS = {
    "pp1": {},
    "pp2": dict(pp=2),
    "pp4": dict(pp=4),
    "uneven": dict(pp=3, layer_list=[2, 1, 1]),
    "vpp2": dict(pp=2, vpp=2),
    "noop": dict(pp=3, noop_layers=[0, 5]),
}


# Every pair of split and tp is fast with one of the toys.
CUTS = [
    pytest.param(toy, tp, split, marks=() if (a + b + c) % 4 == 0 else pytest.mark.slow)
    for a, toy in enumerate(["llama", "llama-biased", "qwen2", "qwen3-tied"])
    for b, tp in enumerate([1, 2, 4])
    for c, split in enumerate(SPLITS)
]


@pytest.mark.parametrize("toy, tp, split", CUTS)
def test_there_and_back_is_bitwise(toys, toy, tp, split, tmp_path, same_tensors):
    convert(toys[toy], tmp_path / "mg", tp=tp, quiet=True, **SPLITS[split])
    convert(tmp_path / "mg", tmp_path / "hf", save_type="hf", quiet=True)
    same_tensors(toys[toy], tmp_path / "hf")


@pytest.mark.parametrize("toy", ["llama-biased", "qwen3-tied"])
def test_resharding_is_bitwise(toys, toy, tmp_path, same_tensors):
    convert(toys[toy], tmp_path / "a", tp=4, pp=2, vpp=2, quiet=True)
    convert(tmp_path / "a", tmp_path / "b", tp=2, pp=3, layer_list=[1, 1, 2], quiet=True)
    convert(tmp_path / "b", tmp_path / "c", tp=1, pp=1, vocab_multiple=1, quiet=True)
    convert(tmp_path / "c", tmp_path / "hf", save_type="hf", quiet=True)
    same_tensors(toys[toy], tmp_path / "hf")


def test_two_swapped_heads_are_noticed(toys, tmp_path, same_tensors):
    """Negative control: the bitwise comparison sees a permutation of heads."""
    swap = {"first": True}

    def swap_heads(name, tensor):
        if name.endswith("layers.1.self_attention.linear_qkv.weight") and swap["first"]:
            tensor = tensor.clone()
            tensor[:16], tensor[16:32] = tensor[16:32].clone(), tensor[:16].clone()
        return tensor

    convert(toys["llama"], tmp_path / "mg", tp=2, transform=swap_heads, quiet=True)
    convert(tmp_path / "mg", tmp_path / "hf", save_type="hf", quiet=True)
    with pytest.raises(AssertionError, match="layers.1.self_attn.q_proj.weight"):
        same_tensors(toys["llama"], tmp_path / "hf")


def test_files_are_what_megatron_expects(toys, tmp_path):
    convert(toys["llama"], tmp_path / "mg", tp=2, pp=2, quiet=True)
    assert (tmp_path / "mg" / "latest_checkpointed_iteration.txt").read_text() == "1"
    directory = tmp_path / "mg" / "iter_0000001"
    ranks = sorted(path.name for path in directory.glob("mp_rank_*"))
    assert ranks == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(directory / "mp_rank_01_001" / "model_optim_rng.pt", weights_only=True)
    assert content["checkpoint_version"] == 3.0 and content["iteration"] == 1
    assert content["args"].num_layers == 4 and content["args"].padded_vocab_size == 1024
    assert content["args"].untie_embeddings_and_output_weights and content["args"].swiglu
    model = content["model"]
    assert model["decoder.layers.1.mlp.linear_fc1.weight"].shape == (112, 64)
    assert model["output_layer.weight"].shape == (512, 64)
    assert "embedding.word_embeddings.weight" not in model and "decoder.final_layernorm.weight" in model
    source = load_file(toys["llama"] / "model.safetensors")
    gate, up = (source[f"model.layers.3.mlp.{p}_proj.weight"][56:] for p in ("gate", "up"))
    assert torch.equal(model["decoder.layers.1.mlp.linear_fc1.weight"], torch.cat([gate, up]))
    assert model["output_layer.weight"][997 - 512 :].eq(0).all()


def test_files_are_sound_archives(toys, tmp_path):
    """They are filled in place after having been laid out empty, so their checksums must be made afterwards."""
    out = convert(toys["llama"], tmp_path / "mg", tp=2, quiet=True)
    path = out / "mp_rank_01" / "model_optim_rng.pt"
    assert zipfile.ZipFile(path).testzip() is None
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert zipfile.ZipFile(path).testzip() is not None


def test_transformer_engine_names_are_written_and_read(toys, tmp_path, same_tensors):
    convert(toys["llama"], tmp_path / "mg", transformer_impl="transformer_engine", quiet=True)
    file = tmp_path / "mg" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    names = set(torch.load(file, weights_only=False)["model"])
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    assert not any("input_layernorm" in name for name in names)
    convert(tmp_path / "mg", tmp_path / "hf", save_type="hf", quiet=True)
    same_tensors(toys["llama"], tmp_path / "hf")


def test_an_export_is_complete_for_transformers(toys, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    for toy in ("llama", "qwen3-tied"):
        out = tmp_path / toy
        convert(toys[toy], tmp_path / f"{toy}-mg", tp=2, quiet=True)
        convert(tmp_path / f"{toy}-mg", out, save_type="hf", shard_bytes=200_000, quiet=True)
        _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, local_files_only=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert "<|im_start|>" in AutoTokenizer.from_pretrained(out, local_files_only=True).chat_template
        assert GenerationConfig.from_pretrained(out, local_files_only=True).eos_token_id == [2, 0]
        index = json.loads((out / "model.safetensors.index.json").read_text())
        on_disk = {k: f.name for f in out.glob("*.safetensors") for k in load_file(f)}
        assert index["weight_map"] == on_disk and len(set(on_disk.values())) > 2
        assert json.loads((out / "config.json").read_text()) == json.loads((toys[toy] / "config.json").read_text())


def test_writing_into_the_original_goes_to_a_subdirectory(toys, tmp_path, same_tensors):
    original = tmp_path / "original"
    shutil.copytree(toys["llama"], original)
    before = {p.name: p.read_bytes() for p in original.iterdir()}
    convert(original, tmp_path / "mg", quiet=True)
    out = convert(tmp_path / "mg", original, save_type="hf", quiet=True)
    assert out == original / "mg2hf"
    same_tensors(original, out)
    assert {p.name: p.read_bytes() for p in original.iterdir() if p.is_file()} == before
    with pytest.raises(UserError, match="holds weights already"):
        convert(tmp_path / "mg", original, save_type="hf", quiet=True)


def test_a_type_can_be_asked_for_and_is_recorded(toys, tmp_path):
    convert(toys["llama"], tmp_path / "mg", dtype="bf16", quiet=True)
    assert open_source(tmp_path / "mg").dtype("decoder.final_layernorm.weight") == torch.bfloat16
    convert(tmp_path / "mg", tmp_path / "hf", save_type="hf", dtype="fp16", quiet=True)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float16"
    expected = load_file(toys["llama"] / "model.safetensors")["model.norm.weight"].bfloat16().half()
    assert torch.equal(load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"], expected)


def test_a_transform_sees_every_whole_tensor_once(toys, tmp_path):
    seen = {}

    def double(name, tensor):
        assert name not in seen
        seen[name] = tuple(tensor.shape)
        return tensor * 2

    convert(toys["llama"], tmp_path / "mg", tp=2, pp=2, transform=double, quiet=True)
    source = HfSource(toys["llama"])
    assert seen == {name: source.dims(name) for name in source.names()}
    doubled = open_source(tmp_path / "mg")
    assert all(torch.equal(doubled.read(name), 2 * source.read(name)) for name in source.names())


def test_it_says_what_it_loads_and_needs(toys, tmp_path, capsys):
    convert(toys["llama"], tmp_path / "mg")
    out = capsys.readouterr().out
    assert "loaded 27/27 tensors, 312512 parameters" in out and "peak memory about" in out and "disk" in out


def test_a_failure_leaves_nothing_that_looks_like_a_checkpoint(toys, tmp_path):
    def fail(name, tensor):
        if "layers.2" in name:
            raise RuntimeError("power cut")
        return tensor

    for save_type in ("mg", "hf"):
        with pytest.raises(RuntimeError, match="power cut"):
            convert(toys["llama"], tmp_path / save_type, save_type=save_type, transform=fail, quiet=True)
        with pytest.raises(UserError, match="nothing loadable|is not a directory"):
            open_source(tmp_path / save_type)
        assert not list(tmp_path.rglob("*.tmp"))
    convert(toys["llama"], tmp_path / "mg", quiet=True)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (dict(tp=3), "legal for this model: 1, 2, 4"),
        (dict(tp=8), "legal for this model: 1, 2, 4"),
        (dict(pp=3), "--num-layer-list 2,1,1"),
        (dict(save_type="hf", tp=2), "has no meaning"),
        (dict(load_type="mg"), "is a hf checkpoint"),
        (dict(dtype="int8"), "legal: fp32, bf16, fp16"),
        (dict(transformer_impl="te"), "legal: local, transformer_engine"),
        (dict(save_type="onnx"), "legal: hf, mg"),
        (dict(hf_cfg_dir="/nowhere"), "no config.json"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(toys, arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        convert(toys["llama"], tmp_path / "out", quiet=True, **arguments)
    assert not (tmp_path / "out").exists()


def test_an_existing_checkpoint_is_not_overwritten(toys, tmp_path):
    convert(toys["llama"], tmp_path / "mg", quiet=True)
    with pytest.raises(UserError, match="already"):
        convert(toys["llama"], tmp_path / "mg", quiet=True)
    with pytest.raises(UserError, match="never written into"):
        convert(toys["llama"], toys["llama"], quiet=True)


def test_a_config_of_another_model_is_refused_on_export(toys, tmp_path):
    convert(toys["llama"], tmp_path / "mg", quiet=True)
    shutil.copytree(toys["llama"], tmp_path / "other")
    edit_config(tmp_path / "other", rms_norm_eps=1e-4)
    with pytest.raises(UserError, match="norm_epsilon=1e-05.*says 0.0001"):
        convert(tmp_path / "mg", tmp_path / "hf", save_type="hf", hf_cfg_dir=tmp_path / "other", quiet=True)


def test_naming_the_layout_that_is_read_is_harmless_on_export(toys, tmp_path, same_tensors):
    """As recipes for other converters do; any other layout is a misunderstanding."""
    convert(toys["llama"], tmp_path / "mg", tp=2, pp=2, quiet=True)
    with pytest.raises(UserError, match="4 x 1.*legal: 1 x 1 or 2 x 2"):
        convert(tmp_path / "mg", tmp_path / "hf", save_type="hf", tp=4, quiet=True)
    convert(tmp_path / "mg", tmp_path / "hf", save_type="hf", tp=2, pp=2, quiet=True)
    same_tensors(toys["llama"], tmp_path / "hf")


def test_a_full_disk_is_found_out_first(toys, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="are free"):
        convert(toys["llama"], tmp_path / "mg", quiet=True)


@pytest.mark.slow
def test_converting_does_not_import_megatron(toys, tmp_path):
    program = (
        "import sys; from mindspeed_llm.checkpoint.convert import convert; convert(*sys.argv[1:3], tp=2, quiet=True); "
        "sys.exit('megatron' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, toys["llama"], tmp_path / "mg"], check=True)


# In a process of its own: the heap of the suite's has room from before. Prints by how many MiB its memory grew.
MEASURED = """
import sys
from mindspeed_llm.checkpoint.convert import convert

def anonymous_kib():  # memory that no file backs
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

source, target, save_type, keep = sys.argv[1:]
peaks, kept = [], []  # from the first tensor on: what is imported for it is there then

def sample(name, tensor):
    if keep == "True":
        kept.append(tensor.clone())
    peaks.append(anonymous_kib())
    return tensor

convert(source, target, save_type=save_type, tp=2 if save_type == "mg" else 1, transform=sample, quiet=True)
print((max(peaks) - peaks[0]) / 1024)
"""


@pytest.fixture(scope="module")
def wide_toy(tmp_path_factory):
    """About 190 MiB in tensors of at most 4 MiB."""
    from mindspeed_llm.checkpoint.hf_writer import HfWriter, PlannedTensor
    from mindspeed_llm.models.hf_config import shape_from_hf
    from mindspeed_llm.models.mapping import tensor_pairs

    config = dict(
        model_type="llama", hidden_size=512, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=48,
        intermediate_size=1024, vocab_size=1999,
    )  # fmt: skip
    root = tmp_path_factory.mktemp("wide")
    (root / "config.json").write_text(json.dumps(config))
    pairs = tensor_pairs(shape_from_hf(config))
    plan = [PlannedTensor(n, d, torch.bfloat16) for p in pairs for n, d in zip(p.hf, p.hf_dims)]
    writer = HfWriter(root / "model", plan)
    for tensor in plan:
        writer.write(tensor.name, torch.full(tensor.dims, 0.5, dtype=torch.bfloat16))
    writer.finish(root)
    return root / "model"


@pytest.mark.slow
@pytest.mark.parametrize("save_type", ["mg", "hf"])
def test_memory_does_not_grow_with_the_model(wide_toy, tmp_path, save_type):
    def peak_growth(keep):
        words = [sys.executable, "-c", MEASURED, wide_toy, tmp_path / str(keep), save_type, str(keep)]
        return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    total = sum(f.stat().st_size for f in wide_toy.glob("*.safetensors")) / 2**20
    assert total > 150
    assert peak_growth(keep=False) < 40
    # negative control: holding the tensors would be seen
    assert peak_growth(keep=True) > 0.8 * total


def test_a_tensor_that_was_swapped_in_the_file_changes_the_result(toys, tmp_path, same_tensors):
    """Negative control: equality is of values, not of names."""
    shutil.copytree(toys["llama"], tmp_path / "swapped")
    tensors = load_file(tmp_path / "swapped" / "model.safetensors")
    a, b = (f"model.layers.{i}.self_attn.k_proj.weight" for i in (1, 2))
    tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()
    save_file(tensors, tmp_path / "swapped" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "swapped", tmp_path / "mg", quiet=True)
    convert(tmp_path / "mg", tmp_path / "hf", save_type="hf", quiet=True)
    with pytest.raises(AssertionError):
        same_tensors(toys["llama"], tmp_path / "hf")
