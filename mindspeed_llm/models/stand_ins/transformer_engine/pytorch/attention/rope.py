"""Transformer Engine's rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.rotary import apply_neighbour_rotary, apply_rotary


def _rotate(t: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first channels of t [a, b, n, d] by angles [a or 1, b or 1, 1, r], or of [t, n, d] by [t, 1, r]."""
    # Megatron's angles of a pair stand next to each other, or a half apart; the operator takes each once.
    each = angles[..., ::2] if interleaved else angles[..., : angles.shape[-1] // 2]
    table = torch.stack((each.cos(), each.sin()))
    if packed := t.dim() == 3:
        t, table = t.unsqueeze(1), table.unsqueeze(2)
    out = (apply_neighbour_rotary if interleaved else apply_rotary)(t, table)
    return out.squeeze(1) if packed else out


def packed_positions(cu_seqlens: Tensor, cp_size: int = 1, cp_rank: int = 0) -> Tensor:
    """Position within its document of each token of a packed row [t / cp_size].

    Each document is cut in 2 * cp_size chunks; a rank has the one of its number from the front and from the back.
    """
    positions = []
    for whole in cu_seqlens.diff().tolist():
        if cp_size == 1:
            positions.append(torch.arange(whole))
            continue
        chunk = whole // (2 * cp_size)
        positions.append(torch.arange(cp_rank * chunk, (cp_rank + 1) * chunk))
        positions.append(torch.arange(whole - (cp_rank + 1) * chunk, whole - cp_rank * chunk))
    return torch.cat(positions).to(cu_seqlens.device)


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Rotary embedding of t in the layout sbhd, bshd or thd by angles freqs [s, 1, 1, r] (or [s, b, 1, r]).

    Args:
        fused: has no effect on values.
        cu_seqlens: documents of thd; positions start anew in each.
        cp_size, cp_rank: with several ranks, a document's first and last chunk of 2 * cp_size live on this rank.

    Raises:
        ValueError: an unknown layout.
    """
    freqs = freqs.float()
    if tensor_format == "sbhd":
        return _rotate(t, freqs[: t.shape[0]], interleaved)
    if tensor_format == "bshd":
        return _rotate(t.transpose(0, 1), freqs[: t.shape[1]], interleaved).transpose(0, 1)
    if tensor_format != "thd":
        raise ValueError(f"tensor_format {tensor_format!r} is wrong; legal: sbhd, bshd, thd")
    return _rotate(t, freqs[packed_positions(cu_seqlens, cp_size, cp_rank), 0], interleaved)
