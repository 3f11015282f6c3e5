"""config.json written for a shape: what transformers and we read from it is the shape again."""

import dataclasses

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf
from mindspeed_llm.models.hf_config_writer import hf_config_of

TYPES = ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]


@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_written_is_read_again(model_type, tmp_path):
    shape = dataclasses.replace(shape_from_hf(read_hf_config(make_toy(model_type, tmp_path))), extra={})
    config = hf_config_of(shape)
    assert config["model_type"] == model_type
    assert dataclasses.replace(shape_from_hf(config), extra={}) == shape


def test_a_window_of_llama_makes_it_mistral_and_one_of_some_layers_qwen(toy_llama, toy_qwen):
    llama, qwen = (shape_from_hf(read_hf_config(toy)) for toy in (toy_llama, toy_qwen))
    assert hf_config_of(dataclasses.replace(llama, window_size=32))["model_type"] == "mistral"
    mixed = hf_config_of(dataclasses.replace(qwen, window_size=32, window_layers=(1, 3)))
    assert mixed["layer_types"] == ["full_attention", "sliding_attention"] * 2


def test_what_no_config_can_say_is_refused_by_name(toy_llama):
    llama = shape_from_hf(read_hf_config(toy_llama))
    with pytest.raises(UserError, match="of family llama describes this model; add_qkv_bias would be lost"):
        hf_config_of(dataclasses.replace(llama, window_size=32, add_qkv_bias=True))
