"""mp_rank files in NF4: cut and put together again they are the codes and scales of the whole, whatever the layout."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_llm.checkpoint.convert import convert
from mindspeed_llm.checkpoint.detect import open_source
from mindspeed_llm.checkpoint.expert_files import ExpertLayout
from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.nf4_shards import FIELDS, shard
from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.nf4_weight import is_quantized

SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
FAMILIES = {
    "llama": dict(num_hidden_layers=2, dtype="bfloat16"),
    "qwen3_moe": dict(
        num_hidden_layers=1, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
        mlp_only_layers=[], norm_topk_prob=True,
    ),
    "deepseek_v2": dict(
        num_hidden_layers=2, q_lora_rank=64, kv_lora_rank=128, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        moe_intermediate_size=128, num_key_value_heads=8,
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
