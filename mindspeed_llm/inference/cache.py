"""Keys and values of the tokens so far, in tensors allocated once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cache_dtype(params_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What keys and values are kept in: fp32 on CPUs, whose 16-bit attention of one query takes 5 to 10 times longer
    (torch 2.13: 880 against 86 us for 12 heads of 64 after 512 tokens), else the weights' type."""
    return torch.float32 if device.type == "cpu" else params_dtype


class Cache:
    """Keys [b, g, s_max, d] and values [b, g, s_max, d_v] of b rows per layer; rows may have different lengths.

    Args:
        layer_numbers: of this rank's layers, as megatron counts them.
        num_rows: b.
        num_groups: key/value heads on this rank, g.
        max_length: s_max, prompt plus answer.
        head_dim: d.
        value_dim: d_v; None for d.
    """

    def __init__(
        self,
        layer_numbers: Sequence[int],
        num_rows: int,
        num_groups: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        value_dim: int | None = None,
    ):
        rows, widths = (num_rows, num_groups, max_length), (head_dim, value_dim or head_dim)
        # Zeros, not garbage: masked positions are multiplied by 0, which NaN would survive.
        self.layers = {
            number: tuple(torch.zeros(*rows, width, dtype=dtype, device=device) for width in widths)
            for number in layer_numbers
        }
        self.lengths = [0] * num_rows

    def rows(self, indices: Sequence[int]) -> CacheRows:
        """The rows as megatron's modules write them: rows of one length, all at once."""
        return CacheRows(self, list(indices))

    def select(self, indices: Sequence[int]) -> None:
        """Keep the rows `indices`, in this order; a row may be taken several times."""
        if list(indices) == list(range(len(self.lengths))):
            return
        self.lengths = [self.lengths[i] for i in indices]
        used = max(self.lengths)
        for number, pair in self.layers.items():
            kept = []
            for tensor in pair:
                chosen = torch.tensor(list(indices), device=tensor.device)
                new = tensor.new_zeros((len(indices), *tensor.shape[1:]))
                torch.index_select(tensor[:, :, :used], 0, chosen, out=new[:, :, :used])
                kept.append(new)
            self.layers[number] = tuple(kept)


class CacheRows:
    """Some rows of a cache as the `KeyValueCache` that models.attention writes to; they have one common length."""

    # No row holds padding.
    key_mask: Tensor | None = None

    def __init__(self, cache: Cache, indices: list[int]):
        self.cache, self.indices = cache, indices
        self.start = cache.lengths[indices[0]]
        assert all(cache.lengths[i] == self.start for i in indices), "rows of different length"

    def update(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key [s, b, g, d] and value [s, b, g, d_v]; return all so far, s_all of each."""
        stop = self.start + key.shape[0]
        both = []
        for tensor, new in zip(self.cache.layers[layer_number], (key, value)):
            tensor[self.indices, :, self.start : stop] = new.permute(1, 2, 0, 3).to(tensor.dtype)
            both.append(tensor[self.indices, :, :stop].permute(2, 0, 1, 3).to(new.dtype) if self.start else new)
        return both[0], both[1]

    def advance(self, count: int) -> None:
        """Count `count` more tokens in each row, after all layers have stored them."""
        for i in self.indices:
            self.cache.lengths[i] += count
