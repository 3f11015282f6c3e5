"""config.json becomes a shape exactly, or an error: nothing with numeric meaning is overlooked."""

import json

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf
from mindspeed_llm.models.shape import ModelShape

BASE = dict(
    hidden_size=256,
    num_attention_heads=32,
    num_hidden_layers=4,
    intermediate_size=112,
    vocab_size=997,
    hidden_act="silu",
)


def config(model_type="llama", **fields):
    return {"model_type": model_type, **BASE, **fields}


@pytest.mark.parametrize("cls", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_defaults_are_those_of_transformers(cls):
    theirs = cls(**BASE)
    shape = shape_from_hf(config(cls.model_type))
    assert shape.num_query_groups == theirs.num_key_value_heads
    assert shape.kv_channels == getattr(theirs, "head_dim", BASE["hidden_size"] // BASE["num_attention_heads"])
    assert shape.max_position_embeddings == theirs.max_position_embeddings
    assert shape.norm_epsilon == theirs.rms_norm_eps
    assert shape.rotary_base == theirs.rope_parameters["rope_theta"]
    assert shape.tie_word_embeddings == theirs.tie_word_embeddings
    assert shape.window_size == getattr(theirs, "sliding_window", None)
    assert shape.attention_dropout == theirs.attention_dropout
    assert shape.init_method_std == theirs.initializer_range


@pytest.mark.parametrize("cls", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_a_config_written_by_transformers_reads_as_the_minimal_one(cls, tmp_path):
    cls(**BASE).save_pretrained(tmp_path)
    assert shape_from_hf(read_hf_config(tmp_path)) == shape_from_hf(config(cls.model_type))


def test_bias_fields_by_architecture():
    plain, biased = shape_from_hf(config()), shape_from_hf(config(attention_bias=True, mlp_bias=True))
    assert not (plain.add_qkv_bias or plain.add_attention_output_bias or plain.add_mlp_bias)
    assert biased.add_qkv_bias and biased.add_attention_output_bias and biased.add_mlp_bias
    qwen2 = shape_from_hf(config("qwen2"))
    assert qwen2.add_qkv_bias and not qwen2.add_attention_output_bias and not qwen2.qk_layernorm
    qwen3 = shape_from_hf(config("qwen3"))
    assert qwen3.qk_layernorm and not qwen3.add_qkv_bias
    assert shape_from_hf(config("qwen3", attention_bias=True)).add_attention_output_bias


def test_null_means_what_transformers_takes_it_for():
    assert shape_from_hf(config("mistral", num_key_value_heads=None)).num_query_groups == 32
    assert shape_from_hf(config("mistral", sliding_window=None)).window_size is None
    assert shape_from_hf(config(head_dim=None)).kv_channels == 8


def test_both_spellings_of_rope_give_the_same_shape():
    old = config(rope_theta=5e5, rope_scaling=dict(type="linear", factor=2.0))
    new = config(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=5e5))
    assert shape_from_hf(old) == shape_from_hf(new)
    assert shape_from_hf(old).rope_scaling == dict(rope_type="linear", factor=2.0)


def test_original_length_is_completed_from_where_transformers_takes_it():
    yarn = config(max_position_embeddings=512, rope_scaling=dict(rope_type="yarn", factor=4.0))
    assert shape_from_hf(yarn).rope_scaling["original_max_position_embeddings"] == 512
    beside = shape_from_hf({**yarn, "original_max_position_embeddings": 128})
    assert beside.rope_scaling["original_max_position_embeddings"] == 128


@pytest.mark.parametrize(
    "fields,layers",
    [
        (dict(use_sliding_window=False, sliding_window=8), None),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=2), (2, 3)),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=0), "all"),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=9), None),
        (
            dict(
                use_sliding_window=True,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
            ),
            (0, 3),
        ),
    ],
)
def test_qwen_windows_by_layer(fields, layers):
    shape = shape_from_hf(config("qwen2", **fields))
    assert shape.window_size == (None if layers is None else 8)
    assert shape.window_layers == (None if layers in (None, "all") else layers)


@pytest.mark.parametrize(
    "fields,words",
    [
        (dict(clip_qkv=8.0), r"'clip_qkv=8.0' .* --ignore-config-field clip_qkv"),
        (dict(logit_scale=2), "logit_scale"),
        (dict(quantization_config={"bits": 4}), "quantised"),
        (dict(hidden_act="gelu"), "hidden_act=gelu"),
        (dict(rope_scaling=dict(rope_type="ntk-by-parts", factor=2)), "ntk-by-parts.* is not implemented"),
        (dict(rope_scaling=dict(rope_type="linear")), "needs factor"),
        (dict(rope_scaling=dict(rope_type="linear", factor=2, beta_fast=1)), "beta_fast"),
        (dict(rope_theta=1e4, rope_parameters=dict(rope_theta=1e5, rope_type="default")), "rope_theta twice"),
        (dict(rope_parameters=dict(full_attention=dict(rope_theta=1e5))), "differs by layer"),
        (dict(rope_scaling=dict(rope_type="longrope", short_factor=[1], long_factor=[1])), "legal: 4"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (dict(num_key_value_heads=3), "not divisible"),
        (dict(num_attention_heads=7), "not divisible"),
        (dict(hidden_size="64"), "hidden_size='64'"),
        (dict(num_hidden_layers=True), "num_hidden_layers=True"),
        (dict(tie_word_embeddings=1), "tie_word_embeddings=1"),
        (dict(vocab_size=None), "vocab_size=null"),
        (dict(model_type="gpt2"), "gpt2.*legal: .*llama"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(fields, words):
    with pytest.raises(UserError, match=words) as caught:
        shape_from_hf({**config(), **fields})
    assert "\n" not in str(caught.value)


def test_a_missing_size_is_refused_rather_than_defaulted():
    given = config()
    del given["intermediate_size"]
    with pytest.raises(UserError, match="intermediate_size"):
        shape_from_hf(given)


def test_a_layer_with_a_window_but_no_window_is_refused():
    with pytest.raises(UserError, match="there is no window"):
        shape_from_hf(config("qwen2", layer_types=["sliding_attention"] * 4, sliding_window=8))


def test_an_unknown_field_passes_when_named():
    assert shape_from_hf(config(clip_qkv=8.0), ignore_fields=["clip_qkv"]) == shape_from_hf(config())


def test_a_field_that_is_read_cannot_be_ignored():
    with pytest.raises(UserError, match="names a field that is read"):
        shape_from_hf(config(), ignore_fields=["hidden_size"])


@pytest.mark.parametrize(
    "field,value", [("rms_norm_eps", 1e-4), ("rope_theta", 2e4), ("hidden_size", 128), ("attention_bias", True)]
)
def test_every_numeric_field_moves_the_shape(field, value):
    assert shape_from_hf(config(**{field: value})) != shape_from_hf(config())


def test_a_shape_survives_json():
    shape = shape_from_hf(
        config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2, rope_scaling=None)
    )
    assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape


def test_unreadable_configs_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not json"):
        read_hf_config(tmp_path)
