"""Cases of attention, experts, accumulated weight gradients and products over ranks."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm.ops.moe_gating import Gating
from mindspeed_llm.testing.operators import Case, Draw

# Operator -> every implementation that may be registered for it.
IMPLEMENTATIONS = {
    "attention": ("reference", "sdpa", "blocks", "rows", "flash_attn", "npu_fusion_attention"),
    "packed_attention": ("reference", "by_document", "by_length", "varlen_attn", "flash_attn", "npu_fusion_attention"),
    "masked_attention": ("reference", "sdpa", "npu_fusion_attention"),
    "attention_part": ("reference", "rows", "npu_fusion_attention"),
    "attention_part_backward": ("reference", "rows", "npu_fusion_attention_grad"),
    "attention_merge": ("reference", "torch", "npu_ring_attention_update"),
    "grouped_matmul": ("reference", "torch", "grouped_mm", "npu_grouped_matmul"),
    "matmul_accumulate": ("reference", "torch", "addmm_out_dtype"),
    "moe_gating": ("reference", "torch", "npu_moe_gating_top_k"),
    "moe_permute": ("reference", "torch", "npu_moe_token_unpermute"),
    "moe_unpermute": ("reference", "torch", "npu_moe_token_unpermute"),
    "all_gather_matmul": ("reference", "chunked", "npu_all_gather_base_mm"),
    "matmul_reduce_scatter": ("reference", "chunked", "npu_mm_reduce_scatter_base"),
}


def _attention(
    s: int, s_k: int, n: int, g: int, d: int, e: int | None = None, *, window: int | None = None, apart: bool = False
):
    """Inputs of one call; `apart`: rows with gaps between them."""

    def inputs(draw: Draw) -> tuple[Any, ...]:
        step = 2 if apart else 1

        def rows(length: int, heads: int, channels: int) -> Tensor:
            whole = torch.randn(length, 2 * step, heads, channels, generator=draw.generator, dtype=torch.float64)
            return draw.made(whole.to(draw.dtype)[:, ::step])

        return rows(s, n, d), rows(s_k, g, d), rows(s_k, g, e or d), window, 0.0, None

    return inputs


def _masked(draw: Draw) -> tuple[Any, ...]:
    hidden = draw.integers(0, 2, 2, 1, 5, 7).bool()
    hidden[0, 0, 2] = True  # a query that sees nothing
    return draw(5, 2, 4, 8), draw(7, 2, 2, 8), draw(7, 2, 2, 8), hidden, 0.0, None


def _packed(draw: Draw) -> tuple[Any, ...]:
    return draw(12, 1, 4, 8), draw(12, 1, 2, 8), draw(12, 1, 2, 8), [5, 1, 6], 3, 0.0, None


def _packed_of_many_lengths(draw: Draw) -> tuple[Any, ...]:
    lengths = [17, 16, 1, 70, 15, 31, 18]
    t = sum(lengths)
    return draw(t, 1, 4, 8), draw(t, 1, 2, 8), draw(t, 1, 2, 8), lengths, None, 0.0, None


def _grouped(sizes: list[int]):
    def inputs(draw: Draw) -> tuple[Any, ...]:
        return draw(sum(sizes), 16), draw(len(sizes), 8, 16), torch.tensor(sizes)

    return inputs


def _accumulated(function: Any, total: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    total = total.detach().clone()
    function(total, grad.detach(), x.detach())
    return total


def _gating(**options: Any):
    def inputs(draw: Draw) -> tuple[Any, ...]:
        bias = torch.linspace(-1, 1, 8, dtype=torch.float64) if options["score_function"] == "sigmoid" else None
        return draw(9, 8), Gating(**options), bias

    return inputs


def _weights_of_experts(function: Any, logits: Tensor, gating: Gating, bias: Tensor | None) -> Tensor:
    """[t, e], 0 for experts that are not chosen."""
    weights, experts = function(logits if logits.dtype == torch.float64 else logits.float(), gating, bias)
    return torch.zeros(logits.shape, dtype=weights.dtype).scatter(1, experts, weights)


def _rows(draw: Draw, tokens: int) -> Tensor:
    """The token of each of 14 rows; some tokens have none."""
    return draw.integers(0, tokens, 14) if tokens else torch.zeros(0, dtype=torch.long)


class Twins:
    """A group of two ranks that hold the same."""

    def size(self) -> int:
        """Number of ranks."""
        return 2


class Done:
    """The handle of a collective that has happened."""

    def wait(self) -> None:
        """Nothing is left to wait for."""


def _among_twins(function: Any, x: Tensor, weight: Tensor, chunks: int) -> Any:
    def gather(out: Tensor, given: Tensor, group: Any, async_op: bool = False) -> Done:
        out.copy_(torch.cat((given, given)))
        return Done()

    def scatter(out: Tensor, given: Tensor, group: Any, async_op: bool = False) -> Done:
        out.copy_(2 * given.chunk(2)[0])
        return Done()

    with (
        mock.patch.object(dist, "all_gather_into_tensor", gather),
        mock.patch.object(dist, "reduce_scatter_tensor", scatter),
    ):
        return function(x.detach(), weight.detach(), Twins(), chunks)


def _part(backward: bool):
    def inputs(draw: Draw) -> tuple[Any, ...]:
        query, key, value = draw(5, 2, 4, 8), draw(7, 2, 2, 8), draw(7, 2, 2, 8)
        if not backward:
            return query, key, value, 3, 4, 0.3
        return draw(5, 2, 4, 8), query, key, value, draw(5, 2, 4, 8), draw(5, 2, 4) + 4, 3, 4, 0.3

    return inputs


def _merge(function: Any, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = out.detach().clone(), lse.detach().clone()
    function(out, lse, part_out.detach(), part_lse.detach())
    return out, lse


def _without_gradients(function: Any, *inputs: Any) -> Any:
    with torch.no_grad():
        return function(*inputs)


CASES = [
    Case("attention", "two rows of a document", _attention(9, 9, 6, 2, 8)),
    Case("attention", "one head for all", _attention(9, 9, 6, 1, 8)),
    Case("attention", "longer than a block", _attention(131, 131, 2, 2, 8)),
    Case("attention", "one token", _attention(1, 1, 4, 4, 8)),
    Case("attention", "a window", _attention(70, 70, 4, 2, 8, window=5)),
    Case("attention", "a window of one", _attention(6, 6, 4, 2, 8, window=1), half=None),  # no gradient but of values
    Case("attention", "behind a cache", _attention(3, 9, 4, 2, 8)),
    Case("attention", "behind a cache, a window", _attention(3, 9, 4, 2, 8, window=4)),
    Case("attention", "heads of latent attention", _attention(7, 7, 2, 2, 192, 128)),
    Case("attention", "rows with gaps", _attention(9, 9, 4, 2, 8, apart=True)),
    Case("packed_attention", "three documents, a window", _packed),
    Case("packed_attention", "documents of many lengths", _packed_of_many_lengths),
    Case("masked_attention", "any mask", _masked),
    Case("attention_part", "with a shift and a window", _part(False), _without_gradients, False, half=None),
    Case("attention_part_backward", "with a shift and a window", _part(True), _without_gradients, False, half=None),
    Case(
        "attention_merge",
        "of two parts",
        lambda draw: (draw(5, 2, 4, 8), draw(5, 2, 4), draw(5, 2, 4, 8), draw(5, 2, 4)),
        _merge,
        False,
        half=None,
    ),
    Case("grouped_matmul", "an empty group", _grouped([3, 0, 5])),
    Case("grouped_matmul", "no rows", _grouped([0, 0])),
    Case("grouped_matmul", "one group", _grouped([4])),
    Case(
        "matmul_accumulate",
        "rows of a batch",
        lambda draw: (draw(8, 6), draw(12, 8), draw(12, 6)),
        _accumulated,
        False,
        half=None,
    ),
    Case(
        "matmul_accumulate",
        "no rows",
        lambda draw: (draw(8, 6), draw(0, 8), draw(0, 6)),
        _accumulated,
        False,
        half=None,
    ),
    Case("moe_gating", "softmax over the chosen", _gating(topk=2, score_function="softmax"), _weights_of_experts),
    Case(
        "moe_gating",
        "softmax over all, normalised",
        _gating(topk=3, score_function="softmax", pre_softmax=True, normalized=True, scaling_factor=2.5),
        _weights_of_experts,
    ),
    Case(
        "moe_gating",
        "softmax over all, by groups",
        _gating(topk=2, score_function="softmax", pre_softmax=True, num_groups=4, chosen_groups=2),
        _weights_of_experts,
    ),
    Case(
        "moe_gating",
        "sigmoid, bias, two best of a group, normalised",
        _gating(topk=3, score_function="sigmoid", normalized=True, num_groups=4, chosen_groups=2, summed=2),
        _weights_of_experts,
        half=None,  # a bias in fp64 against scores in bf16 may choose another expert
    ),
    Case("moe_permute", "tokens without rows", lambda draw: (draw(6, 8), _rows(draw, 6))),
    Case("moe_permute", "no tokens", lambda draw: (draw(0, 8), _rows(draw, 0))),
    Case("moe_unpermute", "weighted", lambda draw: (draw(14, 8), _rows(draw, 6), 6, draw(14))),
    Case("moe_unpermute", "plain", lambda draw: (draw(14, 8), _rows(draw, 6), 6, None)),
    Case("moe_unpermute", "no tokens", lambda draw: (draw(0, 8), _rows(draw, 0), 0, draw(0))),
    *(
        Case("all_gather_matmul", f"{c} chunks", lambda draw, c=c: (draw(8, 2, 6), draw(5, 6), c), _among_twins, False)
        for c in (1, 4)
    ),
    *(
        Case(
            "matmul_reduce_scatter",
            f"{c} chunks",
            lambda draw, c=c: (draw(16, 2, 6), draw(5, 6), c),
            _among_twins,
            False,
        )
        for c in (1, 4)
    ),
]
