"""The model that a QLoRA run trains adapters on: its linears as NF4 rounds them, everything else as stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.source import TensorSource, part_sizes
from mindspeed_llm.models.nf4_weight import is_quantized
from mindspeed_llm.ops.nf4 import BLOCK_SIZE, SCALE_BLOCK_SIZE

NF4_RECORD: dict[str, Any] = {"type": "nf4", "block_size": BLOCK_SIZE, "scale_block_size": SCALE_BLOCK_SIZE}
"""What a checkpoint says about a base in NF4."""


class DequantizedSource(TensorSource):
    """A source whose linears have been through NF4 and back, in the types they are stored in."""

    def __init__(self, inner: TensorSource) -> None:
        super().__init__(inner.shape, f"{inner.origin} in NF4")
        self._inner = inner

    def dtype(self, name: str) -> torch.dtype:
        return self._inner.dtype(name)

    def read_part(self, name: str, part: int, start: int, stop: int) -> Tensor:
        if not is_quantized(name):
            return self._inner.read_part(name, part, start, stop)
        dim = self.pairs[name].layout.tp_dim or 0
        if dim == 0:
            return self._inner.read_nf4(name, part, start, stop).dense(self.dtype(name))
        whole = self._inner.read_nf4(name, part, 0, part_sizes(self.pairs[name], self.shape)[part])
        return whole.dense(self.dtype(name))[:, start:stop]
