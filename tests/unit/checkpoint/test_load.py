"""Every rank gets exactly its slices, from any format, and nothing is left untouched."""

import pytest
import torch

from mindspeed_llm.checkpoint.convert import convert
from mindspeed_llm.checkpoint.detect import open_source
from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.load import Placement, load_hf_into, load_into, truncated, truncated_shape
from mindspeed_llm.checkpoint.megatron_writer import MegatronLayout, MegatronWriter
from mindspeed_llm.errors import UserError
from mindspeed_llm.models import layouts
from mindspeed_llm.parallel.layer_map import layer_map


def empty_parts(source, layers, tp, padded, impl="local"):
    """(pp, vpp, tp_rank) -> name -> NaN tensor of a built model's shape, fp32."""
    dtypes = dict.fromkeys(source.names(), torch.float32)
    writer = MegatronWriter(None, source.shape, MegatronLayout(layers, tp, padded, impl), dtypes, 1)
    parts = {}
    for p in range(layers.pp):
        for name, places in writer.stage_names(p):
            dims = layouts.local_shape(name, source.shape, tp, padded)
            for key, local in places:
                v = int(key.removeprefix("model") or 0)
                for rank in range(tp):
                    parts.setdefault((p, v, rank), {})[local] = torch.full(dims, float("nan"))
    return parts


@pytest.fixture(scope="module")
def sources(toys, tmp_path_factory):
    """The tied toy as HF directory and as a Megatron checkpoint of another layout."""
    root = tmp_path_factory.mktemp("sources")
    convert(toys["qwen3-tied"], root / "mg", tp=4, pp=3, noop_layers=[0, 5], quiet=True)
    return {"hf": HfSource(toys["qwen3-tied"]), "megatron": open_source(root / "mg")}


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("kind", ["hf", "megatron"])
@pytest.mark.parametrize("split", [{}, dict(pp=2), dict(pp=2, vpp=2), dict(pp=2, layer_list=[3, 1])])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_parts_add_up_to_the_model(sources, kind, tp, split, impl):
    source, reference = sources[kind], sources["hf"]
    layers, padded = layer_map(4, **split), layouts.padded_vocab_size(997, tp)
    parts = empty_parts(reference, layers, tp, padded, impl)
    for (p, v, rank), tensors in parts.items():
        report = load_into(tensors, source, Placement(layers, rank, tp, p, v), quiet=True)
        assert report.num_loaded == report.num_expected == len(tensors)
        assert not any(t.isnan().any() for t in tensors.values())
    first = parts[0, 0, 0]["decoder.layers.0.self_attention.linear_proj.weight"]
    assert torch.equal(first, reference.read("decoder.layers.0.self_attention.linear_proj.weight")[:, : 128 // tp])
    last = (layers.pp - 1, layers.vpp - 1)
    heads = [parts[*last, r].get("output_layer.weight") for r in range(tp)]
    assert (heads[0] is None) == (layers.pp == 1)
    if layers.pp > 1:
        embedding = reference.read("embedding.word_embeddings.weight")
        assert torch.equal(layouts.unshard(heads, "output_layer.weight", reference.shape), embedding)


def test_shards_read_by_slice_equal_shards_cut_from_the_whole(sources):
    for source in sources.values():
        for name in source.names():
            whole = source.read(name)
            for rank in range(2):
                assert torch.equal(
                    source.read_shard(name, rank, 2), layouts.shard(whole, name, source.shape, rank, 2)
                ), name


def test_values_are_cast_to_the_models_type(toys):
    source = HfSource(toys["llama"])
    parts = empty_parts(source, layer_map(4), 1, 1024)[0, 0, 0]
    half = {name: t.bfloat16() for name, t in parts.items()}
    load_into(half, source, quiet=True)
    name = "decoder.layers.3.mlp.linear_fc2.weight"
    assert torch.equal(half[name], source.read(name).bfloat16())


def test_it_prints_how_much_was_loaded(toys, capsys):
    source = HfSource(toys["llama"])
    load_into(empty_parts(source, layer_map(4), 1, 997)[0, 0, 0], source)
    assert "loaded 27/27 tensors, 312512 parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t: t.pop("decoder.layers.1.mlp.linear_fc1.weight"), "1 missing .decoder.layers.1.mlp.linear_fc1"),
        (lambda t: t.update({"decoder.layers.1.mlp.linear_fc1.bias": torch.ones(4)}), "1 unexpected"),
        (lambda t: t.update({"decoder.layers.9.mlp.linear_fc1.weight": torch.ones(4)}), "not in the layer map"),
        (lambda t: t.update({"decoder.final_layernorm.weight": torch.ones(4)}), r"has shape \[4\]"),
        (lambda t: t.update({"output_layer.weight": torch.ones(900, 64)}), "padded vocabulary 900"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_untouched(toys, change, words):
    source = HfSource(toys["llama"])
    tensors = empty_parts(source, layer_map(4), 1, 1024)[0, 0, 0]
    change(tensors)
    with pytest.raises(UserError, match=words):
        load_into(tensors, source, quiet=True)
    assert tensors["decoder.layers.0.mlp.linear_fc2.weight"].isnan().all()


def test_extra_state_is_no_tensor(toys):
    source = HfSource(toys["llama"])
    tensors = empty_parts(source, layer_map(4), 1, 1024)[0, 0, 0]
    load_into({**tensors, "decoder.layers.0.mlp.linear_fc1._extra_state": torch.ones(1)}, source, quiet=True)


def test_the_first_layers_can_be_taken_on_purpose(toys):
    whole = HfSource(toys["llama"])
    source = truncated(whole, 2)
    tensors = empty_parts(source, layer_map(2), 1, 1024)[0, 0, 0]
    report = load_hf_into(tensors, toys["llama"], truncate_layers=2, quiet=True)
    assert report.num_loaded == 15
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert torch.equal(tensors[name], whole.read(name))
    with pytest.raises(UserError, match=r"1\.\.4"):
        truncated_shape(whole.shape, 5)


def test_a_model_with_fewer_layers_is_refused_otherwise(toys):
    whole = HfSource(toys["llama"])
    tensors = empty_parts(truncated(whole, 2), layer_map(2), 1, 1024)[0, 0, 0]
    with pytest.raises(UserError, match="missing"):
        load_into(tensors, whole, quiet=True)
