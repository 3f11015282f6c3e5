"""RoPE frequencies equal transformers' bit for bit, within and beyond the original context."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mindspeed_llm.models.hf_config import shape_from_hf
from mindspeed_llm.models.rope import rope_frequencies

SIZES = dict(
    hidden_size=512,
    num_attention_heads=8,
    head_dim=64,
    num_hidden_layers=2,
    intermediate_size=64,
    vocab_size=100,
    max_position_embeddings=4096,
)
LONG = [1.0 + 0.37 * i for i in range(32)]
SHORT = [1.0 + 0.01 * i for i in range(32)]

SCALINGS = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=1024),
    "yarn": dict(factor=4.0, original_max_position_embeddings=1024),
    "yarn-all": dict(
        factor=40.0,
        original_max_position_embeddings=1024,
        beta_fast=24.0,
        beta_slow=2.0,
        mscale=0.707,
        mscale_all_dim=1.0,
        truncate=False,
    ),
    "yarn-given": dict(factor=4.0, original_max_position_embeddings=1024, attention_factor=1.25),
    "longrope": dict(short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=1024),
    "longrope-factor": dict(short_factor=SHORT, long_factor=LONG, factor=7.0, original_max_position_embeddings=1024),
}


def ours_and_theirs(name, seq_len, theta=500000.0):
    rope_type = name.split("-")[0]
    rope = dict(rope_type=rope_type, rope_theta=theta, **SCALINGS[name])
    shape = shape_from_hf(dict(model_type="llama", rope_parameters=dict(rope), **SIZES))
    config = LlamaConfig(**SIZES, rope_parameters=dict(rope))
    expected, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len)
    return rope_frequencies(shape, seq_len), (expected, factor)


@pytest.mark.parametrize("seq_len", [None, 100, 1024, 1025, 5000, 40000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_attention_factor_equal_transformers(name, seq_len):
    (inv_freq, factor), (expected, expected_factor) = ours_and_theirs(name, seq_len)
    assert inv_freq.dtype == torch.float32 and inv_freq.shape == (32,)
    assert torch.equal(inv_freq, expected), (inv_freq - expected).abs().max()
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_plain_rope():
    shape = shape_from_hf(dict(model_type="llama", rope_theta=10000.0, **SIZES))
    expected = 1.0 / (10000.0 ** (torch.arange(0, 64, 2, dtype=torch.float) / 64))
    inv_freq, factor = rope_frequencies(shape)
    assert torch.equal(inv_freq, expected) and factor == 1.0


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_length_dependent_types_change_beyond_the_original_context(name):
    (short, _), _ = ours_and_theirs(name, 100)
    (long, _), _ = ours_and_theirs(name, 40000)
    assert not torch.equal(short, long)


def test_another_theta_is_noticed():
    """Negative control: the comparison is sensitive to the base."""
    (inv_freq, _), _ = ours_and_theirs("llama3", None, theta=500000.0)
    _, (expected, _) = ours_and_theirs("llama3", None, theta=500001.0)
    assert not torch.equal(inv_freq, expected)
