"""The convert door: layouts as upstream's scripts write them, config.json from elsewhere, the original HF directory."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.cli.convert import main, run
from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError


def convert(*words):
    run(parse("convert", [piece for word in words for piece in str(word).split()]))


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory):
    """A toy of 6 layers, which 8 slots with two no-op layers spread over 2 stages x 2 chunks."""
    return make_toy("llama", tmp_path_factory.mktemp("six") / "hf", num_hidden_layers=6, num_key_value_heads=2)


NOOP = "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --noop-layers 3,7"
CHUNKS = f"{NOOP} --num-layers-per-virtual-pipeline-stage 2"


@pytest.fixture(scope="module")
def chunked(six_layers, tmp_path_factory):
    """The same as Megatron files: TP 2, PP 2, two layers per virtual stage, no-op layers counted."""
    target = tmp_path_factory.mktemp("mg") / "mg"
    convert(f"--load-dir {six_layers} --save-dir {target} {CHUNKS}")
    return target


def same_tensors(one, other):
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_noop_layers_count_in_virtual_stages(chunked):
    record = json.loads(next(chunked.glob("iter_*/mindspeed_llm.json")).read_text())
    assert "mp_rank_01_001" in {p.name for p in chunked.glob("iter_*/mp_rank_*")}
    content = torch.load(next(chunked.glob("iter_*/mp_rank_00_000/*.pt")), weights_only=False)
    layers = [sorted({n.split(".")[2] for n in content[f"model{v}"] if ".layers." in n}) for v in (0, 1)]
    # slots 0 1 | 2 (3) | 4 5 | 6 (7): stage 0 holds the first and the third pair
    assert layers == [["0", "1"], ["0", "1"]]
    assert record["shape"]["num_layers"] == 6


@pytest.mark.parametrize(
    "layout",
    ["", "--target-tensor-parallel-size 1 --target-pipeline-parallel-size 1", CHUNKS, "--noop-layers 3,7"],
    ids=["none", "one by one", "the source's", "the source's no-op layers"],
)
def test_export_takes_the_layout_that_upstream_scripts_pass(layout, chunked, six_layers, tmp_path):
    convert(f"--load-dir {chunked} --save-dir {tmp_path / 'hf'} --save-model-type hf --load-model-type mg {layout}")
    assert same_tensors(six_layers, tmp_path / "hf")


@pytest.mark.parametrize(
    "layout, message",
    [
        ("--target-tensor-parallel-size 4", "has 2 x 2 and a Hugging Face .* legal: 1 x 1 or 2 x 2"),
        (NOOP.replace("3,7", "0,1"), "the layer split is wrong, because .* keeps layer"),
        (
            "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --num-layer-list 4,2",
            "the layer split is wrong",
        ),
    ],
)  # fmt: skip
def test_export_refuses_another_layout_than_the_one_it_reads(layout, message, chunked, tmp_path):
    with pytest.raises(UserError, match=message) as refused:
        convert(f"--load-dir {chunked} --save-dir {tmp_path / 'hf'} --save-model-type hf {layout}")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "hf").exists()


def test_a_layout_from_hf_to_hf_is_refused(six_layers, tmp_path):
    words = f"--load-dir {six_layers} --save-dir {tmp_path / 'x'} --save-model-type hf --target-tensor-parallel-size 2"
    with pytest.raises(UserError, match="has no meaning from hf to hf"):
        convert(words)


def test_uneven_virtual_stages_are_refused_with_the_noop_layers_counted(six_layers, tmp_path):
    words = CHUNKS.replace("stage 2", "stage 3")
    with pytest.raises(UserError, match=r"3 x 2 stages does not divide 8 layers \(2 of them no-op\); legal: 1, 2, 4"):
        convert(f"--load-dir {six_layers} --save-dir {tmp_path / 'x'} {words}")


def test_the_original_directory_gets_a_folder_and_keeps_its_files(chunked, six_layers, tmp_path):
    original = tmp_path / "original"
    shutil.copytree(six_layers, original)
    before = {p.name: p.read_bytes() for p in original.iterdir()}
    convert(f"--load-dir {chunked} --save-dir {original} --save-model-type hf")
    assert same_tensors(six_layers, original / "mg2hf")
    assert {p.name: p.read_bytes() for p in original.iterdir() if p.is_file()} == before


@pytest.fixture
def foreign(chunked, tmp_path):
    """Megatron files as another program leaves them: no record, no manifest, no config.json."""
    copy = tmp_path / "foreign"
    shutil.copytree(chunked, copy)
    for directory in copy.glob("iter_*"):
        (directory / "mindspeed_llm.json").unlink()
        (directory / "manifest.json").unlink()
        shutil.rmtree(directory / "hf")
    return copy


def test_a_foreign_checkpoint_takes_config_json_from_elsewhere(foreign, six_layers, tmp_path):
    convert(f"--load-dir {foreign} --save-dir {tmp_path / 'a'} --save-model-type hf --hf-cfg-dir {six_layers}")
    assert same_tensors(six_layers, tmp_path / "a")
    words = "--num-layers-per-virtual-pipeline-stage 3 --target-pipeline-parallel-size 1"
    with pytest.raises(UserError, match="virtual pipeline needs"):
        convert(f"--load-dir {foreign} --save-dir {tmp_path / 'b'} --hf-cfg-dir {six_layers} {words}")
    with pytest.raises(UserError, match="--hf-cfg-dir"):
        convert(f"--load-dir {foreign} --save-dir {tmp_path / 'c'} --save-model-type hf")


def adapters(path, shape_of):
    """Random adapters of all q projections in PEFT's format."""
    from safetensors.torch import save_file

    path.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    prefix, tensors = "base_model.model.model.layers", {}
    for layer in range(6):
        rows, columns = load_file(shape_of / "model.safetensors")[f"model.layers.{layer}.self_attn.q_proj.weight"].shape
        tensors[f"{prefix}.{layer}.self_attn.q_proj.lora_A.weight"] = torch.randn(2, columns)
        tensors[f"{prefix}.{layer}.self_attn.q_proj.lora_B.weight"] = torch.randn(rows, 2)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def test_adapters_merge_into_a_foreign_checkpoint(foreign, six_layers, tmp_path, capsys):
    lora = adapters(tmp_path / "lora", six_layers)
    convert(f"--load-dir {six_layers} --lora-load {lora} --save-dir {tmp_path / 'a'} --save-model-type hf")
    assert "merging adapters into 6 of 24 linears (rank 2, alpha 4)" in capsys.readouterr().out
    more = f"--lora-load {lora} --save-model-type hf"
    convert(f"--load-dir {foreign} --save-dir {tmp_path / 'b'} --hf-cfg-dir {six_layers} {more}")
    assert same_tensors(tmp_path / "a", tmp_path / "b")
    shutil.copytree(six_layers, tmp_path / "original")
    convert(f"--load-dir {foreign} --save-dir {tmp_path / 'original'} {more}")
    assert same_tensors(tmp_path / "a", tmp_path / "original" / "mg2hf")


def test_an_unknown_config_field_can_be_ignored_everywhere(foreign, six_layers, tmp_path):
    strange = tmp_path / "strange"
    shutil.copytree(six_layers, strange)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "strange_field": 1}))
    lora, ignore = adapters(tmp_path / "lora", six_layers), "--ignore-config-field strange_field"
    layout = "--target-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    with pytest.raises(UserError, match="strange_field"):
        convert(f"--load-dir {strange} --save-dir {tmp_path / 'x'}")
    convert(f"--load-dir {strange} --lora-load {lora} --save-dir {tmp_path / 'a'} {layout} {ignore}")
    convert(f"--load-dir {foreign} --hf-cfg-dir {strange} --save-dir {tmp_path / 'b'} --save-model-type hf {ignore}")
    assert same_tensors(six_layers, tmp_path / "b")


def test_all_problems_come_together(capsys):
    assert main(["--save-lora-to-hf", "--num-layer-list", "a,b", "--lora-r", "4", "--lorad"]) == 1
    said = capsys.readouterr().err
    for part in (
        "--load-dir is missing",
        "--save-dir is missing",
        "--lora-load",
        "'a,b' is wrong",
        "--lorad is unknown",
    ):
        assert part in said


@pytest.mark.parametrize(
    "layout, sizes",
    [
        ("--target-pipeline-parallel-size 3 --num-layer-list 1,3,2 --target-tensor-parallel-size 2", [1, 3, 2]),
        ("--target-pipeline-parallel-size 4 --account-for-embedding-in-pipeline-split "
         "--account-for-loss-in-pipeline-split", [1, 2, 2, 1]),
        ("--target-pipeline-parallel-size 3 --num-virtual-stages-per-pipeline-rank 2", [2, 2, 2]),
    ],
)  # fmt: skip
def test_megatron_files_are_cut_again_for_another_layout(chunked, six_layers, tmp_path, layout, sizes):
    formats = "--load-model-type mg --save-model-type mg"
    convert(f"--load-dir {chunked} --save-dir {tmp_path / 'mg'} {formats} {layout}")
    found = []
    for file in sorted(tmp_path.glob("mg/iter_*/mp_rank_00_*/*.pt")):
        content = torch.load(file, weights_only=False)
        chunks = [content[key] for key in sorted(content) if key.startswith("model")]
        found.append(sum(len({n.split(".")[2] for n in chunk if ".layers." in n}) for chunk in chunks))
    assert found == sizes
    convert(f"--load-dir {tmp_path / 'mg'} --save-dir {tmp_path / 'hf'} --save-model-type hf")
    assert same_tensors(six_layers, tmp_path / "hf")
