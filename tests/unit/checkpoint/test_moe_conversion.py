"""Experts survive every layout of mp_rank files bit by bit, one by one or stacked, and wrong files are refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_llm.checkpoint.convert import convert
from mindspeed_llm.checkpoint.detect import open_source
from mindspeed_llm.checkpoint.expert_files import ExpertLayout
from mindspeed_llm.checkpoint.load import Placement, load_into
from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.models import layouts, tensor_names
from mindspeed_llm.parallel.layer_map import layer_map
from mindspeed_llm.parallel.layout import ParallelLayout

LAYOUTS = {
    "one rank": (1, 1, ExpertLayout(), "local"),
    "stacked": (1, 1, ExpertLayout(grouped=True), "local"),
    "two": (1, 1, ExpertLayout(2), "local"),
    "four, stacked": (1, 1, ExpertLayout(4, grouped=True), "local"),
    "tensor, cut experts": (2, 1, ExpertLayout(2), "local"),
    "tensor, whole experts": (2, 1, ExpertLayout(2, 1, grouped=True), "local"),
    "more experts than tensor": (2, 1, ExpertLayout(4, 1), "local"),
    "pipeline": (2, 2, ExpertLayout(2, grouped=True), "local"),
    "pipeline alone": (1, 2, ExpertLayout(), "local"),
    "transformer engine": (1, 2, ExpertLayout(2, grouped=True), "transformer_engine"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    fields = dict(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    directory = tmp_path_factory.mktemp("moe") / "toy"
    return make_toy("qwen2_moe", directory, shared_expert_intermediate_size=80, mlp_only_layers=[1], **fields)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_bitwise(toy, tmp_path, layout):
    tp, pp, experts, impl = LAYOUTS[layout]
    convert(toy, tmp_path / "mg", tp=tp, pp=pp, experts=experts, transformer_impl=impl, quiet=True)
    other = ExpertLayout(2, 1, grouped=not experts.grouped)
    convert(tmp_path / "mg", tmp_path / "again", tp=2, experts=other, quiet=True)
    convert(tmp_path / "again", tmp_path / "hf", save_type="hf", quiet=True)
    expected, found = load_file(toy / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    experts = [name for name in found if "layers.0.mlp.experts." in name and "gate_proj" in name]
    assert len({found[name].sum().item() for name in experts}) == len(experts) == 4


def test_files_are_named_by_tensor_and_expert_rank(toy, tmp_path):
    convert(toy, tmp_path / "mg", tp=2, experts=ExpertLayout(4, 1), quiet=True)
    names = sorted(path.name for path in (tmp_path / "mg" / "iter_0000001").glob("mp_rank_*"))
    # rank r of a stage is tensor rank r % 2 and, with whole experts, expert rank r % 4
    assert names == ["mp_rank_00_000", "mp_rank_00_002", "mp_rank_01_001", "mp_rank_01_003"]
    ranks = {(c.tp, c.ep) for c in map(ParallelLayout(layer_map(2), 4, tp=2, ep=4, etp=1).coordinates, range(4))}
    assert ranks == set(ExpertLayout(4, 1).files(2))


def empty_part(source, here):
    """Local name -> NaN of the shape that a rank's model with stacked experts has."""
    part = {}
    for name in source.names():
        rank, size = here.cut(name)
        dims = layouts.local_shape(name, source.shape, size)
        if tensor_names.expert_index(name) is None:
            part[name] = torch.full(dims, float("nan"))
        else:
            part[tensor_names.stacked_expert_name(name)] = torch.full((4 // here.ep, *dims), float("nan"))
    return part


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_rank_reads_its_own_experts(toy, tmp_path, kind):
    whole = open_source(toy)
    source = whole
    if kind == "megatron":
        convert(toy, tmp_path / "mg", tp=2, experts=ExpertLayout(2, grouped=True), quiet=True)
        source = open_source(tmp_path / "mg")
    for ep_rank in range(2):
        here = Placement(layer_map(2), ep_rank=ep_rank, ep=2, tp=2, tp_rank=1, etp=2, etp_rank=1)
        part = empty_part(source, here)
        load_into(part, source, here, quiet=True)
        assert not any(tensor.isnan().any() for tensor in part.values())
        name = "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc2.weight"
        for local in range(2):
            expected = whole.read(name.format(2 * ep_rank + local))[:, 24:]
            assert torch.equal(part["decoder.layers.0.mlp.experts.weight2"][local], expected)


def test_a_missing_expert_rank_is_refused(toy, tmp_path, without_manifest):
    convert(toy, tmp_path / "mg", tp=2, pp=2, experts=ExpertLayout(2), quiet=True)
    without_manifest(tmp_path / "mg")
    shutil.rmtree(tmp_path / "mg" / "iter_0000001" / "mp_rank_01_000_001")
    with pytest.raises(UserError, match="incomplete: mp_rank_01_000_001 is not there"):
        open_source(tmp_path / "mg")


@pytest.mark.parametrize(
    "experts, message",
    [
        (ExpertLayout(3), "num_moe_experts=4 is not divisible by expert-model-parallel-size=3; legal.*1, 2, 4"),
        (ExpertLayout(2, 3), "expert-tensor-parallel-size=3 is wrong for mp_rank files"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(toy, tmp_path, experts, message):
    with pytest.raises(UserError, match=message):
        convert(toy, tmp_path / "mg", tp=2, experts=experts, quiet=True)


def test_the_door_takes_upstreams_options(toy, tmp_path, capsys):
    from mindspeed_llm.cli.convert import main

    words = f"--load-dir {toy} --save-dir {tmp_path / 'mg'} --target-tensor-parallel-size 2 --moe-grouped-gemm "
    assert main((words + "--target-expert-parallel-size 2 --expert-tensor-parallel-size 1").split()) == 0
    record = open_source(tmp_path / "mg").files.args()
    assert (record["expert_model_parallel_size"], record["num_experts"]) == (2, 4)
    back = f"--load-dir {tmp_path / 'mg'} --save-dir {tmp_path / 'hf'} --save-model-type hf "
    assert main((back + "--target-expert-parallel-size 4").split()) != 0
    assert "target-expert-parallel-size 4 is wrong" in capsys.readouterr().err
    assert main((back + "--target-expert-parallel-size 2").split()) == 0
