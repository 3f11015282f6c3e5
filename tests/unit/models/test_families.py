"""A family is a file: found by being there, and a new one needs nothing else."""

import re
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_llm.checkpoint.convert import convert
from mindspeed_llm.checkpoint.detect import open_source
from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.checkpoint.verify import verify
from mindspeed_llm.errors import UserError
from mindspeed_llm.models import families
from mindspeed_llm.models.family import TRANSFORMS, all_families, family_of_model_type
from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf
from mindspeed_llm.models.mapping import from_hf, tensor_pairs, to_hf
from mindspeed_llm.ops.nf4_matrix import quantize_matrix

# Unlike both shipped families: fused qkv_proj and gate_up_proj in HF, partial rotary embedding, a window everywhere.
PHI3 = """
    from mindspeed_llm.models.families.llama import ATTENTION, COMMON_FIELDS, HF_LAYER, MLP, TENSORS
    from mindspeed_llm.models.family import ConfigField, Family, TensorRule, Variant

    REPLACED = (ATTENTION + "linear_qkv.weight", MLP + "linear_fc1.weight")
    FAMILY = Family(
        name="phi3",
        variants=(
            Variant(
                model_type="phi3",
                architectures=("Phi3ForCausalLM",),
                fields={**COMMON_FIELDS, "resid_pdrop": ConfigField(("extra.resid_pdrop",), default=0.0)},
                partial_rotary_factor=1.0,
                sliding_window="every_layer",
            ),
        ),
        tensors=(
            *(rule for rule in TENSORS if rule.mcore not in REPLACED),
            TensorRule(REPLACED[0], (HF_LAYER + "self_attn.qkv_proj.weight",), "concatenated"),
            TensorRule(REPLACED[1], (HF_LAYER + "mlp.gate_up_proj.weight",), "concatenated"),
        ),
        ignored_fields=frozenset({"embd_pdrop"}),
    )
"""


@pytest.fixture
def phi3(tmp_path, monkeypatch):
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "phi3.py").write_text(textwrap.dedent(PHI3))
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "third")])
    scaling = dict(
        rope_type="longrope",
        rope_theta=10000.0,
        partial_rotary_factor=0.5,
        short_factor=[1.0, 1.1, 1.2, 1.3],
        long_factor=[2.0, 3.0, 4.0, 5.0],
        original_max_position_embeddings=64,
    )
    return make_toy(
        "phi3", tmp_path / "model", rope_parameters=scaling, hidden_size=128, intermediate_size=256, sliding_window=7
    )


def test_a_third_family_is_one_file(phi3, tmp_path):
    assert verify(phi3).passed
    assert shape_from_hf(read_hf_config(phi3)).extra == {"resid_pdrop": 0.0}
    convert(phi3, tmp_path / "mg", tp=2, pp=2, quiet=True)
    convert(tmp_path / "mg", tmp_path / "back", save_type="hf", quiet=True)
    before, after = load_file(phi3 / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_parts_of_one_tensor_share_their_scales_whoever_quantises(phi3, tmp_path):
    """Hugging Face's tensor is quantised as one, as bitsandbytes does, also where megatron-core's is what is read."""
    convert(phi3, tmp_path / "mg", tp=2, quiet=True)
    convert(phi3, tmp_path / "mg-nf4", tp=2, quantize=True, quiet=True)
    convert(phi3, tmp_path / "hf-nf4", save_type="hf", quantize=True, quiet=True)
    expected = HfSource(phi3)
    qkv, fc1 = "decoder.layers.1.self_attention.linear_qkv.weight", "decoder.layers.1.mlp.linear_fc1.weight"
    for other in ("mg", "mg-nf4", "hf-nf4"):
        found = open_source(tmp_path / other)
        for name, part, stop in ((qkv, 0, 64), (qkv, 1, 64), (qkv, 2, 32), (fc1, 0, 128), (fc1, 1, 256)):
            one, same = found.read_nf4(name, part, 0, stop), expected.read_nf4(name, part, 0, stop)
            assert torch.equal(one.codes, same.codes) and torch.equal(one.scales, same.scales), (other, name, part)
            assert torch.equal(one.dense(torch.float32), same.dense(torch.float32)), (other, name, part)
    alone = quantize_matrix(expected.read_part(fc1, 1, 0, 256))
    assert not torch.equal(alone.scales, expected.read_nf4(fc1, 1, 0, 256).scales), "each part by itself differs"


def test_without_its_file_the_family_is_unknown():
    with pytest.raises(UserError, match="model_type='phi3'.*legal: deepseek_v2, .*llama, mistral, .*qwen3"):
        family_of_model_type("phi3")


CONFIG = dict(
    hidden_size=64, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3, intermediate_size=112,
    vocab_size=97, head_dim=16,
)  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_table_is_a_bijection_of_names_and_values(model_type, tied):
    shape = shape_from_hf(dict(model_type=model_type, tie_word_embeddings=tied, **CONFIG))
    pairs = tensor_pairs(shape)
    assert len({p.mcore for p in pairs}) == len(pairs)
    names = [name for p in pairs for name in p.hf]
    assert len(set(names)) == len(names)
    assert ("lm_head.weight" in names) != tied
    for pair in pairs:
        tensors = [torch.randn(dims) for dims in pair.hf_dims]
        whole = from_hf(pair, tensors, shape)
        assert whole.shape == pair.dims
        assert all(torch.equal(t, back) for t, (_, back) in zip(tensors, to_hf(pair, whole, shape)))


def test_tables_name_only_what_exists():
    from mindspeed_llm.models.layouts import layout_of
    from mindspeed_llm.models.shape import ModelShape

    fields = set(ModelShape.__dataclass_fields__)
    for family in all_families().values():
        for rule in family.tensors:
            assert rule.transform in TRANSFORMS
            assert rule.when is None or rule.when.removeprefix("not ") in fields
            layout_of(re.sub(r"\{[iem]\}", "0", rule.mcore))
        for variant in family.variants:
            assert all(target in fields for rule in variant.fields.values() for target in rule.to)
            assert set(variant.constants) <= fields


def test_parameters_are_counted_as_in_the_tensors():
    shape = shape_from_hf(dict(model_type="qwen3", **CONFIG))
    assert shape.num_parameters() == sum(torch.Size(p.dims).numel() for p in tensor_pairs(shape))
