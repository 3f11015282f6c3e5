"""Every operator of ops/npu equals its reference, forward and backward, and the kernel is what computes it."""

import pytest
import torch
from simulator.kernels.registry import CALLS

from mindspeed_llm.ops import registry
from mindspeed_llm.ops.adamw import Rates, adamw_
from mindspeed_llm.ops.adamw import reference as adamw_reference
from mindspeed_llm.ops.attention import attention
from mindspeed_llm.ops.attention import reference as attention_reference
from mindspeed_llm.ops.attention_masked import masked_attention, masked_scores
from mindspeed_llm.ops.attention_part import (
    attention_part,
    attention_part_backward,
    merge_by_weights,
    merge_part,
    part_backward_by_rows,
    part_by_rows,
)
from mindspeed_llm.ops.grouped_matmul import grouped_matmul
from mindspeed_llm.ops.grouped_matmul import reference as grouped_reference
from mindspeed_llm.ops.moe_gating import Gating, moe_gating
from mindspeed_llm.ops.moe_gating import reference as gating_reference
from mindspeed_llm.ops.moe_permute import moe_permute, moe_unpermute, unpermute_reference
from mindspeed_llm.ops.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from mindspeed_llm.ops.rotary import (
    apply_rotary,
    apply_rotary_reference,
    rotary_table,
    split_qkv_rotary,
    split_qkv_rotary_reference,
)
from mindspeed_llm.ops.swiglu import reference as swiglu_reference
from mindspeed_llm.ops.swiglu import swiglu

# Largest difference over largest value: fp32 sums in another order; bf16 rounds every result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def tensors(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def compare(ours, reference, inputs, dtype=torch.float32, others=()):
    """Forward and backward of `ours` on the device against `reference` on the CPU in float64, of the same numbers."""
    CALLS.clear()
    on_device = [x.npu().requires_grad_() for x in inputs]
    on_host = [x.double().requires_grad_() for x in inputs]
    results, expected = ours(*on_device), reference(*on_host)
    results, expected = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (results, expected))
    grads = tensors(*(x.shape for x in expected), seed=1)
    found = torch.autograd.grad(results, on_device, [g.to(x.dtype).npu() for g, x in zip(grads, results)])
    exact = torch.autograd.grad(expected, on_host, [g.to(x.dtype) for g, x in zip(grads, expected)])
    assert all(x.device.type == "npu" for x in (*results, *found))
    for one, other in zip((*results, *found), (*expected, *exact)):
        close(one, other, TOLERANCE[dtype])
    # Where torch_npu has a kernel it is what ran, in both directions; there is none of float64.
    if inputs[0].numel():
        assert bool(CALLS.total() > 1) == (dtype != torch.float64)


def close(found, exact, tolerance=1e-5):
    assert found.shape == exact.shape
    difference = (found.cpu().double() - exact.double()).abs().max() if exact.numel() else 0.0
    assert float(difference) <= tolerance * max(1.0, float(exact.abs().max()) if exact.numel() else 0.0)


def test_the_best_implementations_are_torch_npus():
    chosen = registry.chosen()
    own = {name: value for name, value in chosen.items() if value.startswith("npu_")}
    assert own == {
        "add_rms_norm": "npu_add_rms_norm",
        "attention": "npu_fusion_attention",
        "attention_merge": "npu_ring_attention_update",
        "attention_part": "npu_fusion_attention",
        "attention_part_backward": "npu_fusion_attention_grad",
        "grouped_matmul": "npu_grouped_matmul",
        "masked_attention": "npu_fusion_attention",
        "moe_gating": "npu_moe_gating_top_k",
        "moe_permute": "npu_moe_token_unpermute",
        "moe_unpermute": "npu_moe_token_unpermute",
        "packed_attention": "npu_fusion_attention",
        "rms_norm": "npu_rms_norm",
        "rotary": "npu_rotary_mul",
        "split_qkv_rotary": "npu_rotary_mul",
        "swiglu": "npu_swiglu",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 24), (1, 8), (0, 8)])
def test_rms_norm(shape, dtype):
    inputs = tensors(shape, shape[-1:], dtype=dtype)
    compare(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 24), (1, 8), (0, 8)])
def test_norm_of_a_sum(shape, dtype):
    inputs = tensors(shape, shape, shape[-1:], dtype=dtype)
    compare(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-5),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 24), (1, 2), (0, 8)])
def test_swiglu(shape, dtype):
    compare(swiglu, swiglu_reference, tensors(shape, dtype=dtype), dtype)


def table_of(positions, width):
    return rotary_table(positions, 1.0 / 100 ** (torch.arange(width // 2) / width), 1.0, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [8, 4], ids=["whole", "partial"])
@pytest.mark.parametrize("rows", [1, 2], ids=["one table", "packed positions"])
def test_rotary(rows, width, dtype):
    positions = torch.stack([torch.arange(6) * (row + 1) for row in range(rows)])
    table = table_of(positions, width)
    (x,) = tensors((6, 2, 3, 8), dtype=dtype)
    compare(
        lambda x: apply_rotary(x, table.to(dtype).npu()),
        lambda x: apply_rotary_reference(x, table.to(dtype).double()),
        [x],
        dtype,
    )


def test_split_qkv_rotary():
    table = table_of(torch.arange(5)[None], 8)
    (qkv,) = tensors((5, 2, 2 * (3 + 2) * 8))
    compare(
        lambda qkv: split_qkv_rotary(qkv, 2, 8, table.float().npu()),
        lambda qkv: split_qkv_rotary_reference(qkv, 2, 8, table.float().double()),
        [qkv],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "s, s_k, window, value_channels",
    [(7, 7, None, 8), (7, 7, 3, 8), (1, 9, None, 8), (3, 9, None, 8), (3, 9, 4, 8), (1, 1, None, 8), (6, 6, None, 6)],
)
def test_attention(s, s_k, window, value_channels, dtype):
    inputs = tensors((s, 2, 4, 8), (s_k, 2, 2, 8), (s_k, 2, 2, value_channels), dtype=dtype)
    compare(
        lambda q, k, v: attention(q, k, v, window_size=window, scale=0.3),
        lambda q, k, v: attention_reference(q, k, v, window_size=window, scale=0.3),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("starts", [[0, 4, 5, 12], [0, 0, 12], [0, 12]])
def test_packed_attention_keeps_documents_apart(starts, window):
    inputs = tensors((12, 1, 4, 8), (12, 1, 2, 8), (12, 1, 2, 8))
    bounds = torch.tensor(starts)
    compare(
        lambda q, k, v: attention(q, k, v, cu_seqlens=bounds, window_size=window),
        lambda q, k, v: attention_reference(q, k, v, cu_seqlens=bounds, window_size=window),
        inputs,
    )


def test_more_documents_than_a_call_takes(monkeypatch):
    from mindspeed_llm.ops.npu import attention as npu

    inputs, bounds = tensors((12, 1, 4, 8), (12, 1, 2, 8), (12, 1, 2, 8)), torch.tensor([0, 2, 3, 7, 12])
    monkeypatch.setattr(npu, "MOST_DOCUMENTS", 3)
    compare(
        lambda q, k, v: attention(q, k, v, cu_seqlens=bounds),
        lambda q, k, v: attention_reference(q, k, v, cu_seqlens=bounds),
        inputs,
    )


def test_a_mask_that_is_off_by_one_is_noticed(monkeypatch):
    from mindspeed_llm.ops.npu import visibility

    wrong = torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()
    monkeypatch.setattr(visibility, "CAUSAL", visibility.BAND)  # a band of no width: each sees itself
    monkeypatch.setattr(visibility, "triangle", lambda device: wrong)
    inputs = tensors((7, 1, 2, 8), (7, 1, 2, 8), (7, 1, 2, 8))
    with pytest.raises(AssertionError):
        compare(lambda q, k, v: attention(q, k, v), attention_reference, inputs)


@pytest.mark.parametrize("rows", [1, 2])
def test_masked_attention(rows):
    inputs = tensors((7, 2, 4, 8), (9, 2, 2, 8), (9, 2, 2, 6))
    hidden = torch.rand(rows, 1, 7, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    hidden[:, :, 3] = True  # a query that sees nothing
    compare(
        lambda q, k, v: masked_attention(q, k, v, hidden.npu(), scale=0.4),
        lambda q, k, v: masked_scores(q, k, v, hidden, 0.0, 0.4),
        inputs,
    )


PARTS = [(6, 6, 0, None), (6, 6, 6, None), (6, 9, 2, None), (6, 6, 2, 3), (6, 6, 5, 7), (6, 6, 3, 4)]


@pytest.mark.parametrize("s, s_k, shift, window", PARTS)
def test_attention_part(s, s_k, shift, window):
    query, key, value, grad = tensors((s, 2, 4, 8), (s_k, 2, 2, 8), (s_k, 2, 2, 8), (s, 2, 4, 8))
    expected = part_by_rows(query.double(), key.double(), value.double(), shift, window, 0.3)
    found = attention_part(query.npu(), key.npu(), value.npu(), shift=shift, window_size=window, scale=0.3)
    for ours, exact in zip(found, expected):
        close(ours, exact)
    # Of a larger whole: out and lse are of other keys too.
    out, lse = expected[0] * 0.7, expected[1] + 0.5
    inputs = (grad, query, key, value, out.float(), lse.float())
    exact = part_backward_by_rows(*(x.double() for x in inputs), shift, window, 0.3)
    ours = attention_part_backward(*(x.npu() for x in inputs), shift=shift, window_size=window, scale=0.3)
    for one, other in zip(ours, exact):
        close(one, other)


def test_parts_merge():
    """Also before the first part, and where neither sees anything."""
    out, part = tensors((4, 2, 3, 8), (4, 2, 3, 8))
    lse, part_lse = tensors((4, 2, 3), (4, 2, 3), seed=2)
    lse[0], lse[1], part_lse[1], part_lse[2] = (float("-inf"),) * 4
    out[0], out[1], part[1], part[2] = (torch.zeros(2, 3, 8),) * 4
    exact = [x.double() for x in (out, lse)]
    merge_by_weights(*exact, part.double(), part_lse.double())
    found = [x.npu() for x in (out, lse)]
    CALLS.clear()
    merge_part(*found, part.npu(), part_lse.npu())
    assert set(CALLS) == {"npu_ring_attention_update"}
    close(found[0], exact[0])
    assert torch.equal(found[1].cpu().isinf(), exact[1].isinf())
    close(found[1].cpu().nan_to_num(neginf=0.0), exact[1].nan_to_num(neginf=0.0))


def test_attention_part_under_a_mask():
    query, key, value, grad = tensors((5, 1, 4, 8), (6, 1, 2, 8), (6, 1, 2, 8), (5, 1, 4, 8))
    hidden = torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    hidden[:, :, 2] = True
    out, lse = part_by_rows(query.double(), key.double(), value.double(), 0, None, 0.3, hidden)
    on_device = [x.npu() for x in (query, key, value)]
    found = attention_part(*on_device, shift=0, window_size=None, scale=0.3, hidden=hidden.npu())
    close(found[0], out)
    assert torch.equal(found[1].cpu()[2], lse[2].float())  # -inf
    close(found[1].cpu().nan_to_num(neginf=0.0), lse.nan_to_num(neginf=0.0))
    inputs = (grad, query, key, value, out.float(), lse.float())
    exact = part_backward_by_rows(*(x.double() for x in inputs), 0, None, 0.3, hidden)
    ours = attention_part_backward(
        *(x.npu() for x in inputs), shift=0, window_size=None, scale=0.3, hidden=hidden.npu()
    )
    for one, other in zip(ours, exact):
        close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [[3, 0, 4], [0, 0, 7], [7, 0, 0], [0, 0, 0]])
def test_grouped_matmul(sizes, dtype):
    inputs = tensors((sum(sizes), 6), (3, 5, 6), dtype=dtype)
    sizes = torch.tensor(sizes)
    compare(
        lambda x, w: grouped_matmul(x, w, sizes),
        lambda x, w: grouped_reference(x, w, sizes),
        inputs,
        dtype,
    )


GATINGS = {
    "softmax of the chosen": (Gating(2), False, "npu_moe_gating_top_k_softmax_v2"),
    "softmax before": (Gating(3, pre_softmax=True, scaling_factor=1.5), False, "npu_moe_gating_top_k"),
    "softmax before, normalised": (Gating(2, pre_softmax=True, normalized=True), False, "npu_moe_gating_top_k"),
    "groups by their best": (
        Gating(2, pre_softmax=True, num_groups=3, chosen_groups=1, summed=1), False, "npu_moe_gating_top_k"
    ),
    "groups by their two best, with a bias": (
        Gating(4, "sigmoid", normalized=True, scaling_factor=2.5, num_groups=3, chosen_groups=2, summed=2), True,
        "npu_moe_gating_top_k",
    ),
    "sigmoid as it is": (Gating(2, "sigmoid"), True, "npu_moe_gating_top_k"),
    # What the kernels do not take:
    "softmax of the chosen, with a bias": (Gating(2), True, None),
    "groups of two": (Gating(2, "sigmoid", num_groups=6, chosen_groups=2, summed=2), False, None),
    "groups by their three best": (Gating(2, "sigmoid", num_groups=3, chosen_groups=2, summed=3), False, None),
}  # fmt: skip


@pytest.mark.parametrize("name", GATINGS)
def test_choice_of_experts(name):
    gating, with_bias, kernel = GATINGS[name]
    bias = torch.linspace(-0.5, 0.5, 12) if with_bias else None
    (logits,) = tensors((9, 12))

    def table(chosen):
        weights, experts = chosen
        return torch.zeros(9, 12, dtype=weights.dtype, device=weights.device).scatter(1, experts, weights)

    on_device, on_host = logits.npu().requires_grad_(), logits.double().requires_grad_()
    CALLS.clear()
    ours = table(moe_gating(on_device, gating, None if bias is None else bias.npu()))
    assert set(CALLS) == ({kernel} if kernel else set())
    exact = table(gating_reference(on_host, gating, bias))
    close(ours.detach(), exact.detach())
    (grad,) = tensors((9, 12), seed=1)
    ours.backward(grad.npu())
    exact.backward(grad.double())
    close(on_device.grad, on_host.grad)


def test_choice_of_experts_among_no_tokens():
    weights, experts = moe_gating(torch.zeros(0, 8).npu(), Gating(2))
    assert weights.shape == experts.shape == (0, 2)


ROUTES = {
    "equally many": [[0, 3], [1, 2], [0, 1], [2, 3]],
    "none for one, three for another": [[], [1], [0, 2, 3], [2]],
    "one expert": [[1], [1], [1], [1]],
    "nothing": [[], [], [], []],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ROUTES)
def test_tokens_to_experts_and_back(name, dtype):
    routing = torch.zeros(4, 4, dtype=torch.bool)
    for token, experts in enumerate(ROUTES[name]):
        routing[token, experts] = True
    rows, _, sources = moe_permute(torch.zeros(4, 6).npu(), routing.npu())
    kernel = {"_npu_moe_token_unpermute_with_routing_map"} if name != "nothing" and dtype != torch.float64 else set()
    tokens, experts_gave, grad = tensors((4, 6), rows.shape, (4, 6), dtype=dtype)
    cases = (
        (lambda x, at: moe_permute(x, at)[0], lambda x, at: x[sources.cpu()], tokens, routing),
        (
            lambda x, at: moe_unpermute(x, at, 4),
            lambda x, at: unpermute_reference(x, at, 4, None),
            experts_gave,
            sources,
        ),
    )
    for ours, reference, given, where in cases:
        CALLS.clear()
        on_device, on_host = given.npu().requires_grad_(), given.double().requires_grad_()
        found, exact = ours(on_device, where.npu()), reference(on_host, where.cpu())
        grad = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64).view(exact.shape).to(dtype)
        found.backward(grad.npu())
        exact.backward(grad.double())
        close(found.detach(), exact.detach(), TOLERANCE[dtype])
        close(on_device.grad, on_host.grad, TOLERANCE[dtype])
        assert set(CALLS) == kernel


def test_weighted_rows_are_summed_by_torch():
    rows, weights = tensors((5, 6), (5,))
    sources = torch.tensor([0, 2, 2, 3, 0])
    compare(
        lambda x, w: moe_unpermute(x, sources.npu(), 4, w),
        lambda x, w: unpermute_reference(x, sources, 4, w),
        [rows.double(), weights.double()],
        torch.float64,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_steps_as_its_reference(dtype):
    rates = Rates(1e-2, 0.9, 0.95, 1e-8, 0.1)
    weights, *gradients = tensors((7, 5), (7, 5), (7, 5), (7, 5), dtype=dtype)
    ours, exact = [], []
    for state, convert in ((ours, lambda x: x.npu()), (exact, lambda x: x.double())):
        zeros = [convert(torch.zeros(7, 5, dtype=dtype)) for _ in range(2)]
        state += [convert(weights.clone()), *zeros, convert(torch.zeros(()))]
        for gradient in gradients:
            step = adamw_ if state is ours else adamw_reference
            step([state[0]], [convert(gradient)], [state[1]], [state[2]], [state[3]], rates)
    assert registry.chosen()["adamw"] == "torch-fused" and ours[0].device.type == "npu"
    for one, other in zip(ours, exact):
        close(one, other, TOLERANCE[dtype])


def test_dropout_repeats_its_mask_in_the_backward_pass():
    q, k, v = (x.npu().requires_grad_() for x in tensors((16, 1, 2, 8), (16, 1, 2, 8), (16, 1, 2, 8)))
    torch.npu.manual_seed(1)
    first = attention(q, k, v, dropout=0.5)
    second = attention(q, k, v, dropout=0.5)
    torch.npu.manual_seed(1)
    assert torch.equal(first, attention(q, k, v, dropout=0.5)) and not torch.equal(first, second)
    # Along v the result is linear, so its derivative in the direction v is the result itself.
    (grad,) = torch.autograd.grad(first.sum(), v)
    close((grad * v).sum(), first.sum().detach().cpu(), 1e-4)


REFUSED = {
    "attention in float64": lambda n: n.npu_fusion_attention(*[torch.randn(4, 1, 8).double().npu()] * 3, 2, "SBH"),
    "a causal mask that is no 2048 triangle": lambda n: n.npu_fusion_attention(
        *[torch.randn(4, 1, 8).npu()] * 3, 2, "SBH", atten_mask=torch.ones(4, 4).bool().npu(), sparse_mode=3
    ),
    "more than 256 heads": lambda n: n.npu_fusion_attention(*[torch.randn(4, 1, 2 * 257).npu()] * 3, 257, "SBH"),
    "packed attention without lengths": lambda n: n.npu_fusion_attention(*[torch.randn(4, 2, 8).npu()] * 3, 2, "TND"),
    "rotation of odd width": lambda n: n.npu_rotary_mul(
        torch.randn(4, 1, 2, 7).npu(), *[torch.randn(4, 1, 1, 7).npu()] * 2
    ),
    "float64 norm": lambda n: n.npu_rms_norm(torch.randn(2, 8).double().npu(), torch.randn(8).double().npu()),
    "odd swiglu": lambda n: n.npu_swiglu(torch.randn(2, 7).npu()),
    "more experts per token than there are": lambda n: n.npu_moe_gating_top_k(torch.randn(3, 8).npu(), 9),
    "groups of two experts": lambda n: n.npu_moe_gating_top_k(torch.randn(3, 8).npu(), 2, group_count=4, k_group=2),
    "a bias of another type": lambda n: n.npu_moe_gating_top_k(
        torch.randn(3, 8).npu(), 2, bias=torch.zeros(8).bfloat16().npu()
    ),
    "norm after the choice": lambda n: n.npu_moe_gating_top_k(torch.randn(3, 8).npu(), 2, renorm=1),
    "4096 experts": lambda n: n.npu_moe_gating_top_k(torch.randn(3, 4096).npu(), 2),
    "float64 logits": lambda n: n.npu_moe_gating_top_k_softmax_v2(torch.randn(3, 8).double().npu(), k=2, renorm=1),
    "tokens with different numbers of experts": lambda n: n.npu_moe_token_permute_with_routing_map(
        torch.randn(2, 8).npu(), torch.tensor([[True, False], [True, True]]).npu(), num_out_tokens=3
    ),
    "slots as int64": lambda n: n.npu_moe_token_unpermute_with_routing_map(
        torch.randn(4, 8).npu(), torch.arange(4).npu(), [2, 8]
    ),
    "moments of another type": lambda n: n.npu_apply_adam_w(
        1.0,
        1.0,
        1e-3,
        0.1,
        0.9,
        0.999,
        1e-8,
        torch.randn(4).npu(),
        None,
        False,
        False,
        out=(torch.randn(4).npu(), torch.zeros(4).bfloat16().npu(), torch.zeros(4).npu()),
    ),
    "groups as int32": lambda n: n.npu_grouped_matmul(
        [torch.randn(4, 8).npu()],
        [torch.randn(2, 8, 8).npu()],
        group_list=torch.tensor([2, 4], dtype=torch.int32).npu(),
        split_item=3,
        group_type=0,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_device_refuses_is_refused(what):
    with pytest.raises(RuntimeError):
        REFUSED[what](torch.ops.npu)
