"""Cases of norms, activations, rotary embedding, softmax, losses, AdamW and NF4."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mindspeed_llm.ops.activation import Gate
from mindspeed_llm.ops.adamw import Rates
from mindspeed_llm.ops.rotary import rotary_table
from mindspeed_llm.testing.operators import Case, Draw

# Operator -> every implementation that may be registered for it.
IMPLEMENTATIONS = {
    "rms_norm": ("reference", "compiled", "two-pass", "torch", "liger", "npu_rms_norm"),
    "add_rms_norm": ("reference", "compiled", "two-pass", "composed", "liger", "npu_add_rms_norm"),
    "layer_norm": ("reference", "torch"),
    "swiglu": ("reference", "compiled", "torch", "liger", "npu_swiglu"),
    "gated_activation": ("reference", "compiled", "torch", "liger"),
    "rotary": ("reference", "compiled", "fused", "npu_rotary_mul"),
    "neighbour_rotary": ("reference", "fused", "complex"),
    "split_qkv_rotary": ("reference", "compiled", "fused", "liger", "npu_rotary_mul"),
    "scaled_masked_softmax": ("reference", "torch"),
    "linear_cross_entropy_sum": ("reference", "chunked", "liger"),
    "vocab_parallel_cross_entropy": ("reference", "torch"),
    "adamw": ("reference", "torch-fused"),
    "quantize_nf4": ("reference", "compiled", "torch"),
    "dequantize_nf4": ("reference", "compiled", "torch"),
}

SHAPES = {
    "rows and batch": (5, 3, 16),
    "heads": (2, 3, 4, 16),
    "one row": (1, 1, 16),
    "no rows": (0, 2, 16),
    "one channel": (4, 2, 1),
    "odd width": (7, 1, 13),
}


def swapped(draw: Draw, a: int, b: int, *rest: int) -> Tensor:
    """[a, b, ...] as a view with the strides of [b, a, ...]."""
    return draw.made(torch.randn(b, a, *rest, generator=draw.generator, dtype=torch.float64).transpose(0, 1))


def strided(draw: Draw, *shape: int) -> Tensor:
    """Every other number of twice as many along the last dimension."""
    both = torch.randn(*shape[:-1], 2 * shape[-1], generator=draw.generator, dtype=torch.float64)
    return draw.made(both[..., ::2])


EPS = 1e-5


def norm_cases() -> list[Case]:
    """rms_norm, add_rms_norm and layer_norm over the same shapes."""
    cases = []
    for name, shape in SHAPES.items():
        h = shape[-1]
        cases += [
            Case("rms_norm", name, lambda draw, s=shape, h=h: (draw(*s), draw(h), EPS)),
            Case("add_rms_norm", name, lambda draw, s=shape, h=h: (draw(*s), draw(*s), draw(h), EPS)),
            Case(
                "layer_norm",
                name,
                lambda draw, s=shape, h=h: (draw(*s), draw(h), draw(h), EPS),
                half=2**-5 if h > 1 else None,  # of one channel the gradient is 0
            ),
        ]
    wide = torch.float32
    for offset in (0.0, 1.0):
        cases += [
            Case("rms_norm", f"offset {offset}", lambda draw, o=offset: (draw(4, 2, 8), draw(8), EPS, o)),
            Case("add_rms_norm", f"offset {offset}", lambda d, o=offset: (d(4, 8), d(4, 8), d(8), EPS, o)),
            Case("layer_norm", f"offset {offset}", lambda d, o=offset: (d(4, 8), d(8), d(8), EPS, o), half=2**-5),
            Case(
                "rms_norm",
                f"fp32 weight, offset {offset}",
                lambda draw, o=offset: (draw(4, 2, 8), draw(8, dtype=wide), EPS, o),
                tolerance=1e-6,  # the gradient of the weight is fp32
            ),
            Case(
                "add_rms_norm",
                f"fp32 weight, offset {offset}",
                lambda d, o=offset: (d(4, 8), d(4, 8), d(8, dtype=wide), EPS, o),
                tolerance=1e-6,
            ),
        ]
    cases += [
        Case("rms_norm", "swapped strides", lambda draw: (swapped(draw, 5, 3, 16), draw(16), EPS)),
        Case("rms_norm", "every other channel", lambda draw: (strided(draw, 5, 3, 16), draw(16), EPS)),
        Case("add_rms_norm", "swapped strides", lambda d: (swapped(d, 5, 3, 16), d(5, 3, 16), d(16), EPS)),
        Case("layer_norm", "every other channel", lambda d: (strided(d, 5, 16), d(16), d(16), EPS), half=2**-5),
        Case(
            "layer_norm",
            "fp32 weight",
            lambda d: (d(5, 16), d(16, dtype=wide), d(16, dtype=wide), EPS),
            tolerance=1e-6,
        ),
        Case("rms_norm", "large epsilon", lambda draw: (draw(5, 16), draw(16), 0.5)),
    ]
    return cases


GATES = (
    Gate("gelu"),
    Gate("gelu_tanh"),
    Gate("relu"),
    Gate("quick_gelu"),
    Gate("silu", interleaved=True),
    Gate("silu", limit=0.5),
    Gate("gelu", interleaved=True, linear_offset=1.0),
    Gate("quick_gelu", interleaved=True, limit=0.7, linear_offset=1.0),  # gpt-oss, with a limit that cuts much
)


def activation_cases() -> list[Case]:
    """swiglu and gated_activation."""
    cases = []
    for name, shape in SHAPES.items():
        shape = (*shape[:-1], 2 * shape[-1])
        cases.append(Case("swiglu", name, lambda draw, s=shape: (draw(*s),)))
        cases.append(Case("gated_activation", name, lambda draw, s=shape: (draw(*s), GATES[0])))
    for gate in GATES:
        cases.append(Case("gated_activation", str(gate), lambda draw, g=gate: (draw(5, 2, 12), g), half=2**-5))
    cases.append(Case("swiglu", "swapped strides", lambda draw: (swapped(draw, 5, 3, 12),)))
    cases.append(Case("swiglu", "every other channel", lambda draw: (strided(draw, 5, 12),)))
    cases.append(Case("gated_activation", "swapped strides", lambda draw: (swapped(draw, 5, 3, 12), GATES[1])))
    return cases


def table(draw: Draw, positions: Tensor, half: int, dtype: torch.dtype | None = None) -> Tensor:
    """Angles of positions [b, s] for 2 * half channels."""
    inv_freq = 100.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return rotary_table(positions, inv_freq, 1.0, dtype or draw.dtype)


def consecutive(length: int) -> Tensor:
    """0, 1, 2, ... for all rows alike."""
    return torch.arange(length)[None]


# Documents of 5, 1 and 3 tokens in one row, and two rows of different positions.
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2]])
PER_ROW = torch.tensor([[0, 1, 2, 3], [5, 6, 9, 7]])


def rotary_cases() -> list[Case]:
    """rotary and neighbour_rotary over x [s, b, n, d], split_qkv_rotary over qkv."""
    cases = []
    for operator in ("rotary", "neighbour_rotary"):
        cases += [
            Case(operator, "whole head", lambda d: (d(7, 2, 3, 8), table(d, consecutive(7), 4))),
            Case(operator, "part of a head", lambda d: (d(7, 2, 3, 8), table(d, consecutive(7), 2))),
            Case(operator, "packed", lambda d: (d(9, 1, 3, 8), table(d, PACKED, 4))),
            Case(operator, "positions of each row", lambda d: (d(4, 2, 3, 8), table(d, PER_ROW, 4))),
            Case(operator, "one position", lambda d: (d(1, 2, 1, 8), table(d, consecutive(1), 4))),
            Case(operator, "no positions", lambda d: (d(0, 2, 3, 8), table(d, consecutive(0), 4))),
            Case(operator, "swapped strides", lambda d: (swapped(d, 7, 2, 3, 8), table(d, consecutive(7), 4))),
            Case(
                operator,
                "fp32 angles",
                lambda d: (d(7, 2, 3, 8), table(d, consecutive(7), 4, torch.promote_types(d.dtype, torch.float32))),
            ),
        ]
    # Output of linear_qkv: 2 groups of 3 queries, a key and a value of 8 channels.
    for name, width in (("whole head", 4), ("part of a head", 2), ("none", 0)):
        cases.append(
            Case(
                "split_qkv_rotary",
                name,
                lambda d, w=width: (d(5, 2, 2 * 5 * 8), 2, 8, table(d, consecutive(5), w) if w else None),
            )
        )
    cases += [
        Case("split_qkv_rotary", "packed", lambda d: (d(9, 1, 3 * 8), 1, 8, table(d, PACKED, 4))),
        Case("split_qkv_rotary", "positions of each row", lambda d: (d(4, 2, 4 * 8), 1, 8, table(d, PER_ROW, 4))),
        Case("split_qkv_rotary", "no positions", lambda d: (d(0, 2, 3 * 8), 1, 8, table(d, consecutive(0), 4))),
    ]
    return cases


def softmax_cases() -> list[Case]:
    """scaled_masked_softmax over scores [b, n, s, s_k]."""
    operator = "scaled_masked_softmax"
    some = torch.tensor([[[[False, True, False], [False, False, True], [True, True, False], [True, True, True]]]])
    return [
        Case(operator, "everything visible", lambda d: (d(2, 3, 4, 5), None, 0.5)),
        Case(operator, "causal", lambda d: (d(2, 3, 5, 5), None, 2.0, True)),
        Case(operator, "causal over a longer cache", lambda d: (d(2, 3, 2, 5), None, 1.0, True)),
        Case(operator, "mask, a row that sees nothing", lambda d: (d(2, 2, 4, 3), some, 0.3)),
        Case(operator, "mask and causal", lambda d: (d(2, 2, 3, 3), some[:, :, :3], 0.3, True)),
        Case(operator, "one key", lambda d: (d(2, 1, 3, 1), None, 1.0)),
        Case(operator, "no queries", lambda d: (d(2, 1, 0, 3), None, 1.0)),
        Case(operator, "three dimensions", lambda d: (d(6, 4, 4), None, 1.0, True)),
        Case(operator, "swapped strides", lambda d: (swapped(d, 3, 2, 4, 4), None, 1.0, True)),
        Case(
            operator,
            "large scores",
            lambda d: (d.made(300 * d(2, 2, 4, 4).detach().double()), None, 1.0),
            half=None,  # gradients vanish
        ),
    ]


def labels_of(draw: Draw, count: int, vocab: int, ignored: bool) -> Tensor:
    """Random labels, every third left out where `ignored`."""
    labels = draw.integers(0, vocab, count)
    if ignored:
        labels[::3] = -100
    return labels


def loss_cases() -> list[Case]:
    """linear_cross_entropy_sum and vocab_parallel_cross_entropy."""
    linear, logits = "linear_cross_entropy_sum", "vocab_parallel_cross_entropy"
    cases = [
        Case(
            linear,
            f"chunks of {chunk}, {'some' if ignored else 'all'} labelled",
            # 24 rows: five of padding.
            lambda d, c=chunk, i=ignored: (d(11, 8), d(24, 8), labels_of(d, 11, 19, i), 19, None, c),
            half=2**-5,
        )
        for chunk in (1, 4, None)
        for ignored in (False, True)
    ]
    nothing = torch.full((5,), -100)
    cases += [
        Case(linear, "nothing labelled", lambda d: (d(5, 8), d(19, 8), nothing, 19), half=None),
        Case(linear, "no rows", lambda d: (d(0, 8), d(19, 8), nothing[:0], 19)),
        Case(linear, "one row", lambda d: (d(1, 8), d(19, 8), labels_of(d, 1, 19, False), 19), half=2**-5),
        Case(logits, "all labelled", lambda d: (d(7, 19), labels_of(d, 7, 19, False), None)),
        Case(logits, "some labelled", lambda d: (d(7, 19), labels_of(d, 7, 19, True), None)),
        Case(logits, "nothing labelled", lambda d: (d(5, 19), nothing, None), half=None),
        Case(logits, "no rows", lambda d: (d(0, 19), nothing[:0], None)),
        Case(
            logits,
            "large logits",
            lambda d: (d.made(300 * d(5, 9).detach().double()), labels_of(d, 5, 9, False), None),
        ),
        Case(logits, "swapped strides", lambda d: (swapped(d, 7, 19), labels_of(d, 7, 19, False), None)),
    ]
    return cases


def three_steps(function, rates: Rates, shapes: list[tuple[int, ...]], draw: Draw) -> list[Tensor]:
    """Parameters, moments and counts after three steps from zero moments."""
    parameters = [draw(*shape).detach() for shape in shapes]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    steps = [torch.zeros((), dtype=torch.float32) for _ in parameters]
    for _ in range(3):
        gradients = [draw(*shape).detach() for shape in shapes]
        function(parameters, gradients, first, second, steps, rates)
    return [*parameters, *first, *second, *steps]


def adamw_cases() -> list[Case]:
    """Three steps of AdamW; bf16 tensors are not optimised, their fp32 copies are."""
    made = functools.partial(Case, "adamw", call=three_steps, differentiable=False, half=None)
    shapes = [(3, 4), (5,), (1,), (0,)]
    return [
        made("decay", lambda draw: (Rates(1e-2, 0.9, 0.95, 1e-8, 0.1), shapes, draw)),
        made("no decay", lambda draw: (Rates(1e-2, 0.9, 0.999, 1e-8, 0.0), shapes, draw)),
        made("no first moment", lambda draw: (Rates(1e-2, 0.0, 0.999, 1e-3, 0.1), shapes, draw)),
    ]


def nf4_cases() -> list[Case]:
    """Quantisation, whose codes must be equal, and back."""
    quantize = functools.partial(Case, "quantize_nf4", differentiable=False, tolerance=0.0, half=None)
    dequantize = functools.partial(Case, "dequantize_nf4", differentiable=False, tolerance=0.0, half=None)
    cases = []
    for name, shape in (
        ("whole blocks", (4, 64)),
        ("a part of a block", (7, 33)),
        ("one number", (1,)),
        ("none", (0,)),
    ):
        cases.append(quantize(name, lambda d, s=shape: (d(*s).detach(), 64)))
    cases.append(quantize("zeros", lambda d: (torch.zeros(128), 64)))
    cases.append(quantize("swapped strides", lambda d: (swapped(d, 8, 32).detach(), 64)))
    for name, count in (("whole blocks", 256), ("a part of a block", 230), ("odd", 229), ("none", 0)):
        cases.append(
            dequantize(
                name,
                lambda d, c=count: (
                    d.integers(0, 256, (c + 1) // 2).to(torch.uint8),
                    d(-(-c // 64)).detach().float(),
                    c,
                    64,
                    torch.bfloat16 if c == 230 else torch.float32,
                ),
            )
        )
    return cases


CASES = (
    *norm_cases(),
    *activation_cases(),
    *rotary_cases(),
    *softmax_cases(),
    *loss_cases(),
    *adamw_cases(),
    *nf4_cases(),
)
