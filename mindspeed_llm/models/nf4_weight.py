"""What a frozen linear holds in the place of its weight: NF4, made dense for each product and let go again."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from mindspeed_llm.ops.nf4_matrix import Nf4Matrix

# megatron-core calls the linears of its layers linear_*; not so a router, the embeddings and the output layer.
_LINEAR = re.compile(r"\.(linear_\w+|eh_proj)\.weight$")


def is_quantized(name: str) -> bool:
    """Whether --qlora holds the tensor of this mcore name (one expert's by itself) in NF4."""
    return _LINEAR.search(name) is not None


class Nf4Weight:
    """A weight [out, in], or [experts, out, in], that is never trained; no tensor, but with what linears ask of one.

    Args:
        shape: of the dense weight on this rank.
        dtype: of the products, and of what `materialize` gives.
        device: where it lies.
    """

    requires_grad = False

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device
        self.matrices: list[Nf4Matrix | None] = [None] * (shape[0] if len(shape) == 3 else 1)

    @classmethod
    def like(cls, weight: Tensor) -> Nf4Weight:
        """An empty one for the place of a dense weight."""
        return cls(tuple(weight.shape), weight.dtype, weight.device)

    def fill(self, matrix: Nf4Matrix, index: int = 0) -> None:
        """Hold these numbers, as those of expert `index` where there are several."""
        assert matrix.shape == tuple(self.shape[-2:]), f"{matrix.shape} for {tuple(self.shape)}"
        self.matrices[index] = matrix.to(self.device)

    def materialize(self) -> Tensor:
        """The dense weight; a tensor of its own each time."""
        if len(self.shape) == 2:
            return self.expert(0)
        return torch.stack([self.expert(index) for index in range(len(self.matrices))])

    def expert(self, index: int) -> Tensor:
        """The dense weight of one expert, [out, in]."""
        matrix = self.matrices[index]
        assert matrix is not None, "a weight in NF4 is used before it was loaded"
        return matrix.dense(self.dtype)

    def __getitem__(self, experts: slice) -> Nf4Weight:
        """Some of the experts' weights, which share what they hold with this one."""
        found = self.matrices[experts]
        part = Nf4Weight((len(found), *self.shape[1:]), self.dtype, self.device)
        part.matrices = found
        return part

    def numel(self) -> int:
        """Numbers of the dense weight."""
        return self.shape.numel()

    @property
    def num_bytes(self) -> int:
        """Bytes that are held."""
        return sum(matrix.num_bytes for matrix in self.matrices if matrix is not None)


def nf4_weights(model: nn.Module) -> dict[str, Nf4Weight]:
    """Local names, as parameters have them, of a model's weights in NF4."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Nf4Weight)
    }
