"""Rotary position embedding frequencies for every scaling type of Hugging Face configs.

The same numbers as transformers' `modeling_rope_utils`, computed in the same order in fp32, so that converted models
agree beyond the original context length too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.models.shape import ModelShape

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types whose frequencies change with the length of the sequence at hand."""


def rope_frequencies(shape: ModelShape, seq_len: int | None = None) -> tuple[Tensor, float]:
    """Inverse frequencies and the factor that multiplies cos and sin.

    Args:
        shape: `rotary_base`, `rotary_percent`, `kv_channels`, `max_position_embeddings` and `rope_scaling` are read.
        seq_len: tokens in the sequence at hand (largest position + 1); matters for "dynamic" and "longrope" only.
            None means a sequence within the original context.

    Returns:
        inv_freq: fp32 [rotary_dim / 2], angle per token of each pair of channels.
        attention_factor: multiplies both cos and sin (1.0 except for "yarn" and "longrope").

    Source: transformers `ROPE_INIT_FUNCTIONS`; linear and dynamic NTK after kaiokendev, bloc97 and emozilla; YaRN
    arXiv 2309.00071; LongRoPE arXiv 2402.13753; llama3 from Llama 3.1's reference code.
    """
    rotary_dim = shape.rotary_dim
    scaling = shape.rope_scaling or {"rope_type": "default"}
    compute = _ROPE_TYPES[scaling["rope_type"]]
    return compute(shape, rotary_dim, scaling, seq_len)


def _exponents(rotary_dim: int) -> Tensor:
    return torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim


def _plain(shape: ModelShape, rotary_dim: int, scaling: Mapping[str, Any], seq_len: int | None) -> tuple[Tensor, float]:
    return 1.0 / shape.rotary_base ** _exponents(rotary_dim), 1.0


def _linear(
    shape: ModelShape, rotary_dim: int, scaling: Mapping[str, Any], seq_len: int | None
) -> tuple[Tensor, float]:
    inv_freq, attention_factor = _plain(shape, rotary_dim, scaling, seq_len)
    return inv_freq / scaling["factor"], attention_factor


def _dynamic(
    shape: ModelShape, rotary_dim: int, scaling: Mapping[str, Any], seq_len: int | None
) -> tuple[Tensor, float]:
    trained = shape.max_position_embeddings
    length = max(seq_len or trained, trained)
    stretch = scaling["factor"] * length / trained - (scaling["factor"] - 1)
    base = shape.rotary_base * stretch ** (rotary_dim / (rotary_dim - 2))
    return 1.0 / base ** _exponents(rotary_dim), 1.0


def _llama3(
    shape: ModelShape, rotary_dim: int, scaling: Mapping[str, Any], seq_len: int | None
) -> tuple[Tensor, float]:
    inv_freq, attention_factor = _plain(shape, rotary_dim, scaling, seq_len)
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    trained = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (trained / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    long, short = wavelength > trained / low, wavelength < trained / high
    return torch.where(long, inv_freq / factor, torch.where(short, inv_freq, blended)), attention_factor


def _yarn(shape: ModelShape, rotary_dim: int, scaling: Mapping[str, Any], seq_len: int | None) -> tuple[Tensor, float]:
    trained, base = scaling["original_max_position_embeddings"], shape.rotary_base
    factor = _extension(shape, scaling)

    def channel_of(rotations: float) -> float:
        """The channel pair that turns this often within the trained context."""
        return rotary_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first = channel_of(scaling.get("beta_fast") or 32)
    last = channel_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001  # the ramp below would divide by zero; transformers uses the same width
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    keep = 1 - ramp  # 1 where the frequency stays, 0 where it is divided by the factor
    wavelength = base ** _exponents(rotary_dim)
    inv_freq = 1.0 / (factor * wavelength) * (1 - keep) + 1.0 / wavelength * keep
    return inv_freq, _yarn_attention_factor(factor, scaling)


def _yarn_attention_factor(factor: float, scaling: Mapping[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return _temperature(factor, scaling["mscale"]) / _temperature(factor, scaling["mscale_all_dim"])
    return _temperature(factor, 1.0)


def _temperature(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(shape: ModelShape) -> float | None:
    """What multiplies the attention scores; None for the usual 1 / sqrt(kv_channels).

    DeepSeek's multi-head latent attention moves YaRN's temperature from the rotated channels, which are not all of a
    head there, to the scores: (0.1 mscale_all_dim ln factor + 1)^2. Source: transformers' `yarn_apply_mscale`.
    """
    scaling = shape.rope_scaling or {}
    if not (shape.multi_latent_attention and scaling.get("mscale_all_dim")):
        return None
    return _temperature(_extension(shape, scaling), scaling["mscale_all_dim"]) ** 2 / math.sqrt(shape.kv_channels)


def _longrope(
    shape: ModelShape, rotary_dim: int, scaling: Mapping[str, Any], seq_len: int | None
) -> tuple[Tensor, float]:
    trained = scaling["original_max_position_embeddings"]
    factors = scaling["long_factor"] if (seq_len or 0) > trained else scaling["short_factor"]
    inv_freq = 1.0 / (torch.tensor(factors, dtype=torch.float32) * shape.rotary_base ** _exponents(rotary_dim))
    if scaling.get("attention_factor") is not None:
        return inv_freq, float(scaling["attention_factor"])
    factor = _extension(shape, scaling)
    return inv_freq, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))


def _extension(shape: ModelShape, scaling: Mapping[str, Any]) -> float:
    if scaling.get("factor") is not None:
        return scaling["factor"]
    return shape.max_position_embeddings / scaling["original_max_position_embeddings"]


_ROPE_TYPES = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
