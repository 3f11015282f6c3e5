"""Products of a frozen linear with a low-rank adapter; none is differentiated, lora/function.py composes them.

With m rows, widths k and n, rank R, and D the rows' dropout mask (0 or 1 / kept share, see `CounterMask`):

    adapter_down            (D o x) A^T                        [m, k], [R, k] -> [m, R]
    adapter_down_gradient   g^T (D o x)                        [m, R], [m, k] -> [R, k]
    adapter_up              total += scale D o (narrow B^T)    [m, n], [m, R], [n, R]
    adapted_product         x W^T + bias + scale D o (narrow B^T)

The last two serve the forward pass without D, and the backward pass with W^T for W, A^T for B and the D of the input.
Source: Hu et al., arXiv 2106.09685; one kernel for base and adapter: Han et al., arXiv 2510.00206.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_llm.accelerator.ranges import named
from mindspeed_llm.ops.registry import REFERENCE, implementation, register

# A number is kept or not by 16 random bits, so that one call of the generator decides about eight numbers of a row.
LEVELS = 1 << 16
NUMBERS_PER_CALL = 8

WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class CounterMask:
    """Dropout whose mask is a function of seed, row and column, made anew wherever it is needed and stored nowhere.

    Philox-4x32-10 (Salmon et al., SC 2011) with the seed as key and the counter (row, column / 8, 0, 0) gives 128 bits:
    16 for each of eight columns, the low half of a word before the high one. A number is dropped where its bits are
    below `threshold`. Rows and columns are those of this rank's tensor, so the mask belongs to a layout, like every
    mask that ranks draw from their generators.

    Args:
        probability: of dropping a number, above 0 and below 1.
        seed: int64 [1], on the device of what is masked.
    """

    probability: float
    seed: Tensor

    @classmethod
    def draw(cls, x: Tensor, probability: float) -> CounterMask:
        """With a seed from the generator that dropout of x would draw from; recomputation and resume restore that."""
        return cls(probability, torch.randint(torch.iinfo(torch.int64).max, (1,), device=x.device))

    @property
    def threshold(self) -> int:
        """How many of the 65536 values of the bits drop a number: the probability, rounded to neither 0 nor 1."""
        return min(max(round(self.probability * LEVELS), 1), LEVELS - 1)

    @property
    def gain(self) -> float:
        """What kept numbers are multiplied by, so that the expectation is the number: of the rounded probability."""
        return LEVELS / (LEVELS - self.threshold)

    def kept(self, rows: int, columns: int) -> Tensor:
        """Bool [rows, columns]."""
        groups = -(-columns // NUMBERS_PER_CALL)
        device = self.seed.device
        row = torch.arange(rows, device=device)[:, None].expand(rows, groups)
        group = torch.arange(groups, device=device).expand(rows, groups)
        zero = torch.zeros_like(row)
        words = torch.stack(philox((self.seed & WORD, self.seed >> 32 & WORD), (row, group, zero, zero)), dim=-1)
        halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
        return (halves.view(rows, -1) >= self.threshold)[:, :columns]

    def apply(self, x: Tensor) -> Tensor:
        """x [..., k] after dropout."""
        kept = self.kept(x.shape[:-1].numel(), x.shape[-1]).view(x.shape)
        return torch.where(kept, x, 0) * self.gain


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four words for a counter of four under a key of two, all 32 bits in int64."""
    for _ in range(10):
        even, odd = _times(counter[0], 0xD2511F53), _times(counter[2], 0xCD9E8D57)
        counter = odd[0] ^ counter[1] ^ key[0], odd[1], even[0] ^ counter[3] ^ key[1], even[1]
        key = (key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD
    return counter


def _times(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a product of 32-bit numbers; int64 has no room for its 64 unsigned ones."""
    by_low, by_high = a * (factor & 0xFFFF), a * (factor >> 16)
    return (by_high + (by_low >> 16)) >> 16, ((by_high << 16) + by_low) & WORD


def adapter_down(x: Tensor, lora_a: Tensor, mask: CounterMask | None = None) -> Tensor:
    """(D o x) A^T: [..., k] and [R, k] -> [..., R]."""
    return implementation("adapter_down")(x, lora_a, mask)


def adapter_down_gradient(grad: Tensor, x: Tensor, mask: CounterMask | None = None) -> Tensor:
    """Gradient of A in `adapter_down`, summed over all rows: [..., R] and [..., k] -> [R, k]."""
    return implementation("adapter_down_gradient")(grad, x, mask)


def adapter_up(total: Tensor, narrow: Tensor, lora_b: Tensor, scale: float, mask: CounterMask | None = None) -> Tensor:
    """total [..., n] += scale D o (narrow [..., R] B^T [R, n]), in place; returns it."""
    return implementation("adapter_up")(total, narrow, lora_b, scale, mask)


def adapted_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    narrow: Tensor,
    lora_b: Tensor,
    scale: float,
    mask: CounterMask | None = None,
) -> Tensor:
    """x W^T + bias + scale D o (narrow B^T): [..., k], [n, k], [n], [..., R], [n, R] -> [..., n]."""
    return implementation("adapted_product")(x, weight, bias, narrow, lora_b, scale, mask)


def masks_by_counter() -> bool:
    """Whether dropout in front of adapters is left to the kernels that read its input."""
    return implementation("adapter_down") is not torch_adapter_down


def plain_adapters() -> bool:
    """Whether torch computes base and adapter, so that its own derivatives serve as well."""
    return not masks_by_counter() and implementation("adapted_product") is torch_adapted_product


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: [..., k] and [n, k] -> [..., n].

    As one product of matrices: torch.matmul makes a batch of one product per row, each with a copy of W, where x needs
    no gradient and has unusual strides.
    """
    return torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def outer_sum(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * a^T b summed over all rows: [..., m], [..., n] -> [m, n]."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return torch.addmm(a.new_empty(()).expand(a.shape[1], b.shape[1]), a.t(), b, beta=0, alpha=scale)


@register("adapter_down", "torch")
def torch_adapter_down(x: Tensor, lora_a: Tensor, mask: CounterMask | None) -> Tensor:
    """One product, of what dropout leaves."""
    return product(x if mask is None else mask.apply(x), lora_a)


@register("adapter_down_gradient", "torch")
def torch_adapter_down_gradient(grad: Tensor, x: Tensor, mask: CounterMask | None) -> Tensor:
    """One product, of what dropout leaves."""
    return outer_sum(grad, x if mask is None else mask.apply(x))


@register("adapter_up", "torch")
def torch_adapter_up(total: Tensor, narrow: Tensor, lora_b: Tensor, scale: float, mask: CounterMask | None) -> Tensor:
    """One product that adds."""
    rows = narrow.reshape(-1, narrow.shape[-1])
    if mask is None:
        total.view(-1, total.shape[-1]).addmm_(rows, lora_b.t(), alpha=scale)
        return total
    return total.add_(mask.apply(product(narrow, lora_b)), alpha=scale)


@register("adapted_product", "torch")
def torch_adapted_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    narrow: Tensor,
    lora_b: Tensor,
    scale: float,
    mask: CounterMask | None,
) -> Tensor:
    """One after the other."""
    with named("lora: base product"):
        total = product(x, weight, bias)
    with named("lora: adapter up"):
        return adapter_up(total, narrow, lora_b, scale, mask)


@register("adapter_down", REFERENCE, priority=-1)
def adapter_down_reference(x: Tensor, lora_a: Tensor, mask: CounterMask | None) -> Tensor:
    """The formula."""
    return torch.einsum("...k,rk->...r", x if mask is None else mask.apply(x), lora_a)


@register("adapter_down_gradient", REFERENCE, priority=-1)
def adapter_down_gradient_reference(grad: Tensor, x: Tensor, mask: CounterMask | None) -> Tensor:
    """The formula."""
    rows = (x if mask is None else mask.apply(x)).flatten(0, -2)
    return torch.einsum("mr,mk->rk", grad.flatten(0, -2), rows)


@register("adapter_up", REFERENCE, priority=-1)
def adapter_up_reference(
    total: Tensor, narrow: Tensor, lora_b: Tensor, scale: float, mask: CounterMask | None
) -> Tensor:
    """The formula."""
    up = torch.einsum("...r,nr->...n", narrow, lora_b)
    total += scale * (up if mask is None else mask.apply(up))
    return total


@register("adapted_product", REFERENCE, priority=-1)
def adapted_product_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    narrow: Tensor,
    lora_b: Tensor,
    scale: float,
    mask: CounterMask | None,
) -> Tensor:
    """The formula."""
    total = torch.einsum("...k,nk->...n", x, weight)
    total = total if bias is None else total + bias
    return adapter_up_reference(total, narrow, lora_b, scale, mask)
