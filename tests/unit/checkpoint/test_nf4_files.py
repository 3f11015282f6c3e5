"""mp_rank files in NF4: cut and put together again they are the codes and scales of the whole, whatever the layout."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_llm.checkpoint.convert import convert
from mindspeed_llm.checkpoint.detect import open_source
from mindspeed_llm.checkpoint.expert_files import ExpertLayout
from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.nf4_shards import FIELDS, shard
from mindspeed_llm.checkpoint.source import holds_parts, rows_of_part
from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.mapping import to_hf
from mindspeed_llm.models.nf4_weight import is_quantized
from mindspeed_llm.models.packing import unpack

SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
FAMILIES = {
    "llama": dict(num_hidden_layers=2, dtype="bfloat16"),
    "mistral": dict(num_hidden_layers=1),
    "qwen2": dict(num_hidden_layers=1),
    "qwen3": dict(num_hidden_layers=1, tie_word_embeddings=True),
    "mixtral": dict(num_hidden_layers=1, num_local_experts=2),
    "qwen2_moe": dict(
        num_hidden_layers=2, moe_intermediate_size=128, num_experts=2, num_experts_per_tok=2, mlp_only_layers=[1],
        shared_expert_intermediate_size=256,
    ),
    "qwen3_moe": dict(
        num_hidden_layers=1, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
        mlp_only_layers=[], norm_topk_prob=True,
    ),
    "deepseek_v2": dict(
        num_hidden_layers=2, q_lora_rank=64, kv_lora_rank=128, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        moe_intermediate_size=128, num_key_value_heads=8,
    ),
    "deepseek_v3": dict(
        num_hidden_layers=1, first_k_dense_replace=0, q_lora_rank=64, kv_lora_rank=128, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, moe_intermediate_size=128, num_key_value_heads=8, n_routed_experts=2,
        n_group=1, topk_group=1, num_experts_per_tok=2, num_nextn_predict_layers=1, head_dim=8,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {name: make_toy(name, root / name, **SIZES | extra) for name, extra in FAMILIES.items()}


def shards(source, sizes):
    """(name, rank, size) -> a rank's matrix, of every linear of the layers."""
    found = {}
    for name, pair in source.pairs.items():
        for size in sizes if is_quantized(name) else ():
            for rank in range(size):

                def read(part, start, stop, name=name):
                    return source.read_nf4(name, part, start, stop)

                found[name, rank, size] = shard(read, pair, source.shape, rank, size)
    return found


@pytest.mark.parametrize(
    "family, layout",
    [
        ("llama", dict(tp=1)),
        ("llama", dict(tp=2, pp=2)),
        ("llama", dict(tp=2, transformer_impl="transformer_engine")),
        ("qwen3_moe", dict(tp=2, experts=ExpertLayout(2, 1))),
        ("qwen3_moe", dict(tp=2, experts=ExpertLayout(1, 2))),
        ("deepseek_v2", dict(tp=2)),
    ],
)
def test_every_ranks_matrix_is_that_of_quantising_on_loading(bases, family, layout, tmp_path):
    convert(bases[family], tmp_path / "mg", quantize=True, quiet=True, **layout)
    written, original = open_source(tmp_path / "mg"), HfSource(bases[family])
    assert written.any_nf4 and not original.any_nf4
    found, expected = shards(written, (1, 2)), shards(original, (1, 2))
    assert found.keys() == expected.keys() and len(found) >= 12
    for key, matrix in found.items():
        assert all(torch.equal(getattr(matrix, f), getattr(expected[key], f)) for f in FIELDS), key
    others = [name for name in original.names() if not is_quantized(name)]
    assert others and all(torch.equal(written.read(name), original.read(name)) for name in others)
    assert {written.dtype(name) for name in original.names()} == {original.dtype(others[0])}


def test_the_zoo_is_whole():
    from mindspeed_llm.models.family import all_families

    assert set(FAMILIES) == {variant.model_type for family in all_families().values() for variant in family.variants}


@pytest.mark.parametrize("family", FAMILIES)
def test_whoever_quantises_a_family_the_blocks_share_their_scales_alike(bases, family, tmp_path):
    """On loading from either format, while converting to either format: the same codes, scales and groups."""
    convert(bases[family], tmp_path / "mg", quiet=True, tp=2)
    convert(bases[family], tmp_path / "mg-nf4", quiet=True, tp=2, quantize=True)
    convert(tmp_path / "mg", tmp_path / "hf-nf4", quiet=True, save_type="hf", quantize=True, hf_cfg_dir=bases[family])
    expected = shards(HfSource(bases[family]), (1, 2))
    for other in ("mg", "mg-nf4", "hf-nf4"):
        found = shards(open_source(tmp_path / other), (1, 2))
        assert found.keys() == expected.keys() and len(found) >= 12
        for key, matrix in found.items():
            assert all(torch.equal(getattr(matrix, f), getattr(expected[key], f)) for f in FIELDS), (other, key)


@pytest.mark.parametrize("transform", ["concatenated", "copy"])
def test_rows_of_a_part_in_a_tensor_that_holds_several(bases, transform):
    shape, pairs = (source := HfSource(bases["llama"])).shape, source.pairs
    for name in ("decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.0.mlp.linear_fc1.weight"):
        assert not holds_parts(pairs[name], shape)
        pair, whole = replace(pairs[name], transform=transform, hf=("one.weight",)), source.read(name)
        ((_, stored),) = to_hf(pair, whole, shape)
        assert holds_parts(pair, shape)
        for number, part in enumerate(unpack(whole, pair.layout.packing, shape)):
            assert torch.equal(stored[rows_of_part(pair, shape, number)], part)


def test_files_whose_record_says_otherwise_are_refused(bases, tmp_path, without_manifest):
    convert(bases["llama"], tmp_path, quantize=True, quiet=True)
    without_manifest(tmp_path)
    [path] = tmp_path.glob("iter_*/mp_rank_00/model_optim_rng.pt")
    content = torch.load(path, weights_only=False)
    kept, name = content.pop("nf4"), "decoder.layers.0.self_attention.linear_qkv.weight"
    torch.save(content, path)
    with pytest.raises(UserError, match=f"{name} in .* is in NF4, and the files' record of what was quantised"):
        open_source(tmp_path)
    name = "embedding.word_embeddings.weight"
    torch.save(content | {"nf4": kept | {"dtypes": kept["dtypes"] | {name: torch.bfloat16}}}, path)
    with pytest.raises(UserError, match=f"{name} in .* is not in NF4, and the files' record"):
        open_source(tmp_path)


def test_a_quarter_of_the_bytes_is_written(bases, tmp_path):
    def written(name, **how):
        convert(bases["llama"], tmp_path / name, quiet=True, tp=2, **how)
        linears = 0
        for path in (tmp_path / name).glob("iter_*/mp_rank_*/model_optim_rng.pt"):
            content = torch.load(path, weights_only=False)["model"]
            linears += sum(
                t.numel() * t.element_size() for n, t in content.items() if is_quantized(n.split(".nf4_")[0])
            )
        return linears

    assert written("nf4", quantize=True) <= 0.28 * written("dense")


def test_they_become_dense_files_again(bases, tmp_path):
    convert(bases["llama"], tmp_path / "mg", quantize=True, quiet=True, tp=2)
    convert(tmp_path / "mg", tmp_path / "hf", save_type="hf", quiet=True)
    convert(bases["llama"], tmp_path / "bnb", save_type="hf", quantize=True, quiet=True)
    convert(tmp_path / "bnb", tmp_path / "dense", save_type="hf", quiet=True)
    found, expected = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "dense"))
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def test_what_cannot_be_is_refused(bases, tmp_path):
    with pytest.raises(UserError, match="part of decoder.layers.0.* at 32 columns is wrong"):
        small = make_toy("llama", tmp_path / "small", **SIZES | dict(intermediate_size=64, num_hidden_layers=1))
        convert(small, tmp_path / "mg", quantize=True, quiet=True, tp=2)
    assert not list((tmp_path / "mg").glob("iter_*"))
    with pytest.raises(UserError, match="experts in NF4 are stored one by one"):
        convert(bases["qwen3_moe"], tmp_path / "mg", quantize=True, quiet=True, experts=ExpertLayout(grouped=True))
    convert(bases["llama"], tmp_path / "nf4", quantize=True, quiet=True)
    for to in ("mg", "hf"):
        with pytest.raises(UserError, match="is in NF4 already; legal: unquantised weights"):
            convert(tmp_path / "nf4", tmp_path / f"again-{to}", save_type=to, quantize=True, quiet=True)


def test_copies_that_differ_and_other_blocks_are_refused(bases, tmp_path, without_manifest):
    convert(bases["deepseek_v2"], tmp_path, quantize=True, quiet=True, tp=2)
    without_manifest(tmp_path)
    [path] = tmp_path.glob("iter_*/mp_rank_01/model_optim_rng.pt")
    content = torch.load(path, weights_only=False)
    name = "decoder.layers.0.self_attention.linear_kv_down_proj.weight"
    content["model"][f"{name}.nf4_codes"][0, 0] ^= 1
    torch.save(content, path)
    with pytest.raises(UserError, match=f"{name} in .* differs between tensor-parallel ranks 0 and 1"):
        open_source(tmp_path).read_part(name, 0, 0, 4)
    content["nf4"]["block_size"] = 128
    torch.save(content, path)
    with pytest.raises(UserError, match="holds weights quantised as .* which is not implemented"):
        open_source(tmp_path)
