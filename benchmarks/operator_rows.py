"""What benchmarks/operators.py measures: every operator's inputs at a model's shapes, its limit and what torch offers.

Bytes are what a perfect kernel reads and writes, FLOP those of the matrix products; each for a forward pass and for
forward and backward together. Peers are torch's own functions for the same job, with the arguments of the operator's
implementations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_llm.ops import registry
from mindspeed_llm.ops.activation import Gate
from mindspeed_llm.ops.adamw import Rates
from mindspeed_llm.ops.adapter import CounterMask
from mindspeed_llm.ops.moe_gating import Gating
from mindspeed_llm.ops.rotary import rotary_table

EPSILON = 1e-5
RATES = Rates(1e-4, 0.9, 0.95, 1e-8, 0.1)
# Rank and dropout of adapters.
RANK, DROPOUT = 16, 0.1


class Shapes(NamedTuple):
    """Sizes of one model: hidden, MLP (of one expert), query heads, groups, head, vocabulary, experts, of which each
    token takes so many; no experts, no rows of theirs."""

    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    experts: int = 0
    topk: int = 0


SHAPES = {
    "llama3-8b": Shapes(4096, 14336, 32, 8, 128, 128256),
    "qwen3-30b-a3b": Shapes(2048, 768, 32, 4, 128, 151936, 128, 8),
    "toy": Shapes(64, 96, 4, 2, 16, 512, 16, 2),
}


class Row(NamedTuple):
    """One operator at one shape.

    Args:
        operator: its name in the registry.
        inputs: of its implementations, by position; tensors that need a gradient are differentiated.
        moved: bytes of a forward pass and of both, or None where products are the limit.
        flop: of the products of a forward pass and of both, or None.
        peers: name -> torch's way of computing it.
        reference: whether the formula's intermediates fit into memory.
    """

    operator: str
    inputs: tuple[Any, ...]
    moved: tuple[float, float] | None = None
    flop: tuple[float, float] | None = None
    peers: dict[str, Callable[..., Any]] = {}
    reference: bool = True


class Draws:
    """Rows of one model in one type on one device.

    Args:
        tokens: rows of the activations; products and scores take an eighth of them.
        ranks: among how many vocabulary and experts are divided.
    """

    def __init__(self, shapes: Shapes, tokens: int, ranks: int, dtype: torch.dtype, device: torch.device):
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self.tokens, self.few = tokens, max(1, tokens // 8)
        self.vocabulary, self.experts = shapes.vocabulary // ranks, shapes.experts // ranks
        self.size = dtype.itemsize

    def leaf(self, *size: int) -> Tensor:
        """Normally distributed, and differentiated."""
        return self.data(*size).requires_grad_()

    def data(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed, not differentiated."""
        return torch.randn(*size, device=self.device, dtype=dtype or self.dtype)

    def integers(self, high: int, count: int) -> Tensor:
        """Uniform in [0, high)."""
        return torch.randint(0, high, (count,), device=self.device)

    def moved(self, numbers: int, forward: float, both: float) -> tuple[float, float]:
        """Bytes, of so many passes over so many numbers."""
        return forward * numbers * self.size, both * numbers * self.size

    def rows(self) -> dict[str, Callable[[], Row]]:
        """Name -> how its row is made: together they would not fit into memory."""
        made = [self.rms_norm, self.add_rms_norm, self.layer_norm, self.swiglu, self.gated_activation]
        made += [self.rotary, self.neighbour_rotary, self.split_qkv_rotary, self.scaled_masked_softmax]
        made += [self.vocab_parallel_cross_entropy, self.linear_cross_entropy_sum, self.attention]
        made += [self.packed_attention, self.masked_attention, self.attention_part, self.attention_part_backward]
        made += [self.attention_merge, self.matmul_accumulate, self.quantize_nf4, self.dequantize_nf4]
        made += [self.adapter_down, self.adapter_down_gradient, self.adapter_up, self.adapted_product]
        if self.dtype == torch.float32:
            made.append(self.adamw)
        if self.experts:
            made += [self.grouped_matmul, self.moe_gating, self.moe_permute, self.moe_unpermute]
        return {make.__name__: make for make in made}

    # norms

    def rms_norm(self) -> Row:
        t, h = self.tokens, self.shapes.hidden
        inputs = self.leaf(t, 1, h), self.leaf(h), EPSILON
        return Row("rms_norm", inputs, self.moved(t * h, 2, 5), peers={"F.rms_norm": _rms_norm})

    def add_rms_norm(self) -> Row:
        t, h = self.tokens, self.shapes.hidden
        inputs = self.leaf(t, 1, h), self.leaf(t, 1, h), self.leaf(h), EPSILON
        return Row("add_rms_norm", inputs, self.moved(t * h, 4, 8), peers={"F.rms_norm": _add_rms_norm})

    def layer_norm(self) -> Row:
        t, h = self.tokens, self.shapes.hidden
        inputs = self.leaf(t, 1, h), self.leaf(h), self.leaf(h), EPSILON
        peers = {"F.layer_norm": lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps)}
        return Row("layer_norm", inputs, self.moved(t * h, 2, 5), peers=peers)

    # gates

    def swiglu(self) -> Row:
        t, f = max(1, self.tokens // 4), self.shapes.ffn
        peers = {"F.silu * up": lambda x: F.silu(x[..., :f]) * x[..., f:]}
        return Row("swiglu", (self.leaf(t, 1, 2 * f),), self.moved(t * f, 3, 8), peers=peers)

    def gated_activation(self) -> Row:
        t, f = max(1, self.tokens // 4), self.shapes.ffn
        peers = {"F.gelu * up": lambda x, _: F.gelu(x[..., :f], approximate="tanh") * x[..., f:]}
        inputs = self.leaf(t, 1, 2 * f), Gate("gelu_tanh")
        return Row("gated_activation", inputs, self.moved(t * f, 3, 8), peers=peers)

    # rotary

    def table(self) -> Tensor:
        half = self.shapes.head // 2
        frequencies = 1e4 ** (-torch.arange(half) / half)
        return rotary_table(torch.arange(self.tokens)[None], frequencies, 1.0, self.dtype).to(self.device)

    def rotary(self) -> Row:
        t, n, d = self.tokens, self.shapes.heads, self.shapes.head
        inputs = self.leaf(t, 1, n, d), self.table()
        return Row("rotary", inputs, self.moved(t * n * d, 2, 4), peers={"rotate_half": _rotate_half})

    def neighbour_rotary(self) -> Row:
        t, n, d = self.tokens, self.shapes.heads, self.shapes.head
        inputs = self.leaf(t, 1, n, d), self.table()
        return Row("neighbour_rotary", inputs, self.moved(t * n * d, 2, 4), peers={"view_as_complex": _complex})

    def split_qkv_rotary(self) -> Row:
        t, n, g, d = self.tokens, self.shapes.heads, self.shapes.groups, self.shapes.head
        numbers = t * (n + 2 * g) * d
        inputs = self.leaf(t, 1, (n + 2 * g) * d), g, d, self.table()
        peers = {"split, rotate_half": _split_rotate_half}
        return Row("split_qkv_rotary", inputs, self.moved(numbers, 2, 4), peers=peers)

    # softmax and losses

    def scaled_masked_softmax(self) -> Row:
        s, n = self.few, self.shapes.heads
        inputs = self.leaf(1, n, s, s), None, 0.1, True
        return Row("scaled_masked_softmax", inputs, self.moved(n * s * s, 2, 5), peers={"torch.softmax": _softmax})

    def vocab_parallel_cross_entropy(self) -> Row:
        t, v = max(1, self.tokens // 4), self.vocabulary
        inputs = self.leaf(t, v), self.integers(v, t), None
        peers = {"F.cross_entropy": lambda x, y, _: F.cross_entropy(x.float(), y, reduction="none")}
        return Row("vocab_parallel_cross_entropy", inputs, self.moved(t * v, 1, 3), peers=peers)

    def linear_cross_entropy_sum(self) -> Row:
        t, h, v = self.few, self.shapes.hidden, self.vocabulary
        inputs = self.leaf(t, h), self.leaf(v, h), self.integers(v, t), v
        peers = {"F.cross_entropy": lambda x, w, y, _: F.cross_entropy(F.linear(x, w).float(), y, reduction="sum")}
        return Row("linear_cross_entropy_sum", inputs, flop=(2.0 * t * h * v, 6.0 * t * h * v), peers=peers)

    # attention

    def heads(self, s: int) -> tuple[Tensor, Tensor, Tensor]:
        n, g, d = self.shapes.heads, self.shapes.groups, self.shapes.head
        return self.leaf(s, 1, n, d), self.leaf(s, 1, g, d), self.leaf(s, 1, g, d)

    def scores(self, pairs: float) -> tuple[float, float]:
        """FLOP of attention to so many visible pairs: two products forward, five backward with the scores again."""
        one = 2.0 * pairs * self.shapes.heads * self.shapes.head
        return 2 * one, 7 * one

    def attention(self) -> Row:
        s = 2 * self.few
        inputs = *self.heads(s), None, 0.0, None
        return Row("attention", inputs, flop=self.scores(s * s / 2), peers={"SDPA": _sdpa})

    def packed_attention(self) -> Row:
        lengths = [max(1, self.few // 4)] * 8
        inputs = *self.heads(sum(lengths)), lengths, None, 0.0, None
        pairs = sum(length * length / 2 for length in lengths)
        return Row("packed_attention", inputs, flop=self.scores(pairs), peers={"SDPA by document": _packed_sdpa})

    def masked_attention(self) -> Row:
        s = 2 * self.few
        hidden = torch.ones(1, 1, s, s, dtype=torch.bool, device=self.device).triu(1)
        inputs = *self.heads(s), hidden, 0.0, None
        return Row("masked_attention", inputs, flop=self.scores(s * s), peers={"SDPA": _masked_sdpa})

    def attention_part(self) -> Row:
        s, d = self.few, self.shapes.head
        inputs = *(x.detach() for x in self.heads(s)), s, None, d**-0.5
        forward, _ = self.scores(s * s)
        return Row("attention_part", inputs, flop=(forward, forward))

    def attention_part_backward(self) -> Row:
        s, n, d = self.few, self.shapes.heads, self.shapes.head
        query, key, value = (x.detach() for x in self.heads(s))
        out, lse = self.data(s, 1, n, d, dtype=torch.float32), torch.full((s, 1, n), 9.0, device=self.device)
        inputs = out.to(self.dtype), query, key, value, out, lse, s, None, d**-0.5
        forward, both = self.scores(s * s)
        return Row("attention_part_backward", inputs, flop=(both - forward, both - forward))

    def attention_merge(self) -> Row:
        s, n, d = self.tokens, self.shapes.heads, self.shapes.head
        outs = [self.data(s, 1, n, d, dtype=torch.float32) for _ in range(2)]
        sums = [self.data(s, 1, n, dtype=torch.float32) for _ in range(2)]
        return Row("attention_merge", (outs[0], sums[0], outs[1], sums[1]), (12.0 * s * n * d,) * 2)

    # products

    def matmul_accumulate(self) -> Row:
        t, h = self.few, self.shapes.hidden
        total, grad, x = self.data(h, h, dtype=torch.float32), self.data(t, h), self.data(t, h)
        return Row("matmul_accumulate", (total, grad, x), flop=(2.0 * t * h * h,) * 2, peers={"+=": _add_product})

    def grouped_matmul(self) -> Row:
        h, f, e = self.shapes.hidden, self.shapes.ffn, self.experts
        t = self.tokens * self.shapes.topk * e // self.shapes.experts
        sizes = torch.bincount(torch.randint(0, e, (t,)), minlength=e)
        inputs = self.leaf(t, h), self.leaf(e, 2 * f, h), sizes
        product = 4.0 * t * h * f
        peers = {"F.linear each": _linears, "torch._grouped_mm": _grouped_mm}
        # The formula gives every row a matrix of its own.
        small = 2 * t * h * f * self.size < 2**30
        return Row("grouped_matmul", inputs, flop=(product, 3 * product), peers=peers, reference=small)

    # adapters

    def mask(self) -> CounterMask | None:
        """On CUDA, whose kernels make it while they read; elsewhere dropout never reaches these operators."""
        if self.device.type != "cuda":
            return None
        return CounterMask(DROPOUT, torch.ones(1, dtype=torch.int64, device=self.device))

    def adapter_down(self) -> Row:
        h, mask = self.shapes.hidden, self.mask()
        inputs = self.data(self.tokens, h), self.data(RANK, h), mask
        peers = {"F.dropout, F.linear" if mask else "F.linear": _down}
        return Row("adapter_down", inputs, self.moved(self.tokens * h, 1.0, 1.0), peers=peers)

    def adapter_down_gradient(self) -> Row:
        h = self.shapes.hidden
        inputs = self.data(self.tokens, RANK), self.data(self.tokens, h), self.mask()
        return Row("adapter_down_gradient", inputs, self.moved(self.tokens * h, 1.0, 1.0))

    def adapter_up(self) -> Row:
        h = self.shapes.hidden
        inputs = self.data(self.tokens, h), self.data(self.tokens, RANK), self.data(h, RANK), 1e-3, self.mask()
        return Row("adapter_up", inputs, self.moved(self.tokens * h, 2.0, 2.0))

    def adapted_product(self) -> Row:
        t, h = self.few, self.shapes.hidden
        inputs = self.data(t, h), self.data(h, h), None, self.data(t, RANK), self.data(h, RANK), 1e-3
        return Row("adapted_product", (*inputs, None), flop=(2.0 * t * h * (h + RANK),) * 2)

    # experts

    def routing(self) -> tuple[Tensor, int]:
        """The token of each row, by expert, of those that this rank's experts see."""
        count = self.tokens * self.shapes.topk * self.experts // self.shapes.experts
        return torch.randperm(max(count, self.tokens), device=self.device)[:count] % self.tokens, count

    def moe_gating(self) -> Row:
        t, e, k = self.tokens, self.shapes.experts, self.shapes.topk
        logits = self.data(t, e, dtype=torch.float32).requires_grad_()
        inputs = logits, Gating(k, pre_softmax=True, normalized=True), None
        return Row("moe_gating", inputs, (4.0 * t * e, 12.0 * t * e), peers={"softmax, topk": _softmax_topk})

    def moe_permute(self) -> Row:
        h, (sources, r) = self.shapes.hidden, self.routing()
        numbers = (2.0 * r) * h * self.size, (3.0 * r + self.tokens) * h * self.size
        peers = {"index_select": lambda x, i: x.index_select(0, i)}
        return Row("moe_permute", (self.leaf(self.tokens, h), sources), numbers, peers=peers)

    def moe_unpermute(self) -> Row:
        h, t, (sources, r) = self.shapes.hidden, self.tokens, self.routing()
        numbers = (1.0 * r + t) * h * self.size, (3.0 * r + t) * h * self.size
        inputs = self.leaf(r, h), sources, t, None
        # The formula's matrix of zeros and weights has t x r numbers.
        return Row("moe_unpermute", inputs, numbers, peers={"index_add": _index_add}, reference=t * r < 2**25)

    # weights

    def adamw(self) -> Row:
        h = self.shapes.hidden
        lists = [[self.data(h, h) * scale] for scale in (1, 1, 0, 0)]
        inputs = *lists, [torch.zeros((), device=self.device)], RATES
        peers = {"torch.optim.AdamW": _Adam(foreach=True), "torch.optim.AdamW(fused)": _Adam(fused=True)}
        return Row("adamw", inputs, (28.0 * h * h,) * 2, peers=peers)

    def quantize_nf4(self) -> Row:
        h = self.shapes.hidden
        # The formula compares every number with all values.
        return Row("quantize_nf4", (self.data(h, h), 64), ((self.size + 0.5) * h * h,) * 2, reference=h < 1024)

    def dequantize_nf4(self) -> Row:
        h = self.shapes.hidden
        packed, scales = registry.implementation("quantize_nf4")(self.data(h, h), 64)
        inputs = packed, scales, h * h, 64, self.dtype
        return Row("dequantize_nf4", inputs, ((self.size + 0.5) * h * h,) * 2)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def _rotate_half(x: Tensor, table: Tensor) -> Tensor:
    """As transformers has it."""
    cos, sin = torch.cat((table, table), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _complex(x: Tensor, table: Tensor) -> Tensor:
    """As Llama's first code has it."""
    turn = torch.complex(*table.float())
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turn).flatten(3).type_as(x)


def _split_rotate_half(qkv: Tensor, groups: int, head: int, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grouped = qkv.view(*qkv.shape[:2], groups, -1, head)
    query, key, value = grouped.split((grouped.shape[3] - 2, 1, 1), dim=3)
    return _rotate_half(query.flatten(2, 3), table), _rotate_half(key.flatten(2, 3), table), value.flatten(2, 3)


def _softmax(scores: Tensor, _: None, scale: float, causal: bool) -> Tensor:
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return (scores * scale).masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(scores.dtype)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *_: Any, mask: Tensor | None = None) -> Tensor:
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def _packed_sdpa(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], *_: Any) -> Tensor:
    return torch.cat([_sdpa(*rows) for rows in zip(query.split(lengths), key.split(lengths), value.split(lengths))])


def _masked_sdpa(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, *_: Any) -> Tensor:
    return _sdpa(query, key, value, mask=~hidden)


def _add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    total += grad.t() @ x


def _down(x: Tensor, lora_a: Tensor, mask: CounterMask | None) -> Tensor:
    return F.linear(x if mask is None else F.dropout(x, mask.probability), lora_a)


def _linears(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(x.split(sizes.tolist()), weight)])


def _grouped_mm(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    ends = sizes.to(x.device).cumsum(0, dtype=torch.int32)
    return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)


def _softmax_topk(logits: Tensor, gating: Gating, _: None) -> tuple[Tensor, Tensor]:
    weights, experts = logits.softmax(-1).topk(gating.topk)
    return weights / weights.sum(-1, keepdim=True), experts


def _index_add(rows: Tensor, sources: Tensor, tokens: int, _: None) -> Tensor:
    return rows.new_zeros(tokens, rows.shape[1]).index_add(0, sources, rows)


class _Adam:
    """torch's optimizer over the operator's lists, made at the first call: its state is its own."""

    def __init__(self, **options: Any):
        self.options, self.optimizer = options, None

    def __call__(self, parameters, gradients, first, second, steps, rates: Rates) -> None:
        if self.optimizer is None:
            copies = [p.clone().requires_grad_() for p in parameters]
            options = dict(lr=rates.lr, betas=(rates.beta1, rates.beta2), eps=rates.eps)
            self.optimizer = torch.optim.AdamW(copies, weight_decay=rates.weight_decay, **options, **self.options)
            for copy, gradient in zip(copies, gradients):
                copy.grad = gradient
        self.optimizer.step()
