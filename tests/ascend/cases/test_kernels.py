"""The simulator's kernels compute what torch_npu documents, through torch_npu's own derivatives.

These are the kernels that no operator of ops/npu calls yet, or calls in one form of several.
"""

import pytest
import torch
import torch.nn.functional as F

npu = torch.ops.npu


def close(found, exact, tolerance=1e-5):
    torch.testing.assert_close(found.detach().cpu(), exact.detach(), rtol=tolerance, atol=tolerance)


def compare(ours, reference, *inputs):
    """Forward and backward on the device against the CPU."""
    on_device = [x.npu().requires_grad_(x.is_floating_point()) for x in inputs]
    on_host = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    found, exact = ours(*on_device), reference(*on_host)
    close(found, exact)
    grad = torch.randn_like(exact)
    found.backward(grad.npu())
    exact.backward(grad)
    for one, other in zip(on_device, on_host):
        if other.grad is not None:
            close(one.grad, other.grad)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


TO_BNSD = {
    "BNSD": lambda x, n: x,
    "BSND": lambda x, n: x.transpose(1, 2),
    "BSH": lambda x, n: x.unflatten(-1, (n, -1)).transpose(1, 2),
    "SBH": lambda x, n: x.unflatten(-1, (n, -1)).permute(1, 2, 0, 3),
}
SHAPES = {"BNSD": (2, 4, 8, 6), "BSND": (2, 8, 4, 6), "BSH": (2, 8, 24), "SBH": (8, 2, 24)}


@pytest.mark.parametrize("mode", [0, 2, 3, 4])
@pytest.mark.parametrize("layout", TO_BNSD)
def test_attention_of_every_layout(layout, mode):
    i, j = torch.arange(8)[:, None], torch.arange(8)
    hidden = {0: (i + j) % 3 == 1, 2: j > i, 3: j > i, 4: (j > i + 1) | (j < i - 2)}[mode]
    mask = hidden if mode == 0 else torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    band = {"pre_tockens": 2, "next_tockens": 1} if mode == 4 else {}

    def ours(q, k, v):
        out = npu.npu_fusion_attention(q, k, v, 4, layout, atten_mask=mask.npu(), scale=0.4, sparse_mode=mode, **band)[
            0
        ]
        return TO_BNSD[layout](out, 4)

    def reference(*qkv):
        return F.scaled_dot_product_attention(*(TO_BNSD[layout](x, 4) for x in qkv), attn_mask=~hidden, scale=0.4)

    compare(ours, reference, *(torch.randn(SHAPES[layout]) for _ in range(3)))


@pytest.mark.parametrize("layout", ["", "TND"], ids=["statistics by sequence", "statistics by token"])
def test_parts_merge_by_the_ring_update(layout):
    query, keys, values = (torch.randn(9, 4, 8).npu() for _ in range(3))
    ends = [3, 9]
    given = {"scale": 0.3, "actual_seq_qlen": ends, "softmax_layout": layout}
    both = torch.cat([torch.cat((keys[a:b], keys[a:b].flip(2))) for a, b in ((0, 3), (3, 9))])
    values_of_both = torch.cat([torch.cat((values[a:b], values[a:b] * 2)) for a, b in ((0, 3), (3, 9))])
    whole = npu.npu_fusion_attention(query, both, values_of_both, 4, "TND", actual_seq_kvlen=[6, 18], **given)
    first = npu.npu_fusion_attention(query, keys, values, 4, "TND", actual_seq_kvlen=ends, **given)
    second = npu.npu_fusion_attention(query, keys.flip(2), values * 2, 4, "TND", actual_seq_kvlen=ends, **given)
    merged = npu.npu_ring_attention_update(
        first[0], first[1], first[2], second[0], second[1], second[2],
        actual_seq_qlen=torch.tensor([0, *ends]).npu(), input_layout="TND", input_softmax_layout=layout,
    )  # fmt: skip
    for one, other in zip(merged, whole):
        close(one, other.cpu())


def test_scaled_masked_softmax():
    mask = torch.rand(2, 1, 32, 64) > 0.7
    compare(
        lambda x: npu.npu_scaled_masked_softmax(x, mask.npu(), 0.5, False),
        lambda x: (x * 0.5).masked_fill(mask, -10000.0).softmax(-1),
        torch.randn(2, 4, 32, 64),
    )


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotation_with_torch_npus_derivative(mode):
    def reference(x, cos, sin):
        if mode == "half":
            first, second = x.chunk(2, -1)
            return cos * x + sin * torch.cat((-second, first), -1)
        return cos * x + sin * torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    inputs = torch.randn(6, 2, 4, 16), torch.randn(6, 1, 1, 16), torch.randn(6, 1, 1, 16)
    compare(lambda x, cos, sin: npu.npu_rotary_mul(x, cos, sin, mode), reference, *inputs)


EXPERTS = torch.tensor([[0, 3], [2, 1], [3, 2], [1, 0], [3, 0]])


def test_permute_and_unpermute_of_experts():
    tokens, weights = torch.randn(5, 8), torch.rand(5, 2)
    order = torch.argsort(EXPERTS.flatten(), stable=True)
    compare(lambda x: npu.npu_moe_token_permute(x, EXPERTS.npu())[0], lambda x: x[order // 2], tokens)
    row_of_slot = npu.npu_moe_token_permute(tokens.npu(), EXPERTS.npu())[1]
    compare(
        lambda rows, p: npu.npu_moe_token_unpermute(rows, row_of_slot, p),
        lambda rows, p: (rows[row_of_slot.cpu().long()].view(5, 2, 8) * p[..., None]).sum(1),
        torch.randn(10, 8),
        weights,
    )


def test_permute_by_routing_map():
    chosen = torch.zeros(5, 4, dtype=torch.bool).scatter_(1, EXPERTS, True)
    rows = chosen.t().nonzero(as_tuple=True)[1]
    compare(
        lambda x: npu.npu_moe_token_permute_with_routing_map(x, chosen.npu(), num_out_tokens=10)[0],
        lambda x: x[rows],
        torch.randn(5, 8),
    )


def test_gating_by_groups():
    scores = torch.randn(6, 8)
    weights, experts, normalised = npu.npu_moe_gating_top_k(
        scores.npu(),
        2,
        k_group=1,
        group_count=2,
        group_select_mode=1,
        norm_type=1,
        routed_scaling_factor=2.5,
        out_flag=True,
    )
    exact = scores.sigmoid()
    best = exact.view(6, 2, 4).topk(2, -1)[0].sum(-1).argmax(-1)
    outside = torch.arange(8)[None] // 4 != best[:, None]
    values, index = exact.masked_fill(outside, -1).topk(2, -1)
    close(normalised, exact)
    assert torch.equal(experts.cpu().long(), index)
    close(weights, values / values.sum(-1, keepdim=True) * 2.5)


@pytest.mark.parametrize("kind", [0, 1], ids=["ends", "sizes"])
def test_grouped_products_and_their_sums(kind):
    rows, weights = torch.randn(12, 16), torch.randn(3, 16, 8)
    groups = torch.tensor([[4, 4, 12], [4, 0, 8]][kind]).npu()
    given = {"group_list": groups, "split_item": 3, "group_list_type": kind}
    out = npu.npu_grouped_matmul([rows.npu()], [weights.npu()], group_type=0, **given)[0]
    close(out, torch.cat((rows[:4] @ weights[0], rows[4:] @ weights[2])))
    (gradient,) = npu.npu_grouped_matmul([rows.npu().t()], [out], group_type=2, **given)
    exact = torch.stack((rows[:4].t() @ out[:4].cpu(), torch.zeros(16, 8), rows[4:].t() @ out[4:].cpu()))
    close(gradient, exact, 1e-4)
    total = torch.ones(3, 16, 8).npu()
    half, half_out = rows.bfloat16(), out.cpu().bfloat16()
    npu.npu_grouped_matmul_add_(total, half.npu(), half_out.npu(), groups, group_list_type=kind)
    exact = torch.stack(
        (half[:4].float().t() @ half_out[:4].float(), torch.zeros(16, 8), half[4:].float().t() @ half_out[4:].float())
    )
    close(total, exact + 1, 1e-4)


def test_adamw_in_one_call():
    weight = torch.randn(10)
    ours, first, second = weight.npu(), torch.zeros(10).npu(), torch.zeros(10).npu()
    theirs = weight.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for step in range(3):
        theirs.grad = torch.randn(10)
        optimizer.step()
        npu.npu_apply_adam_w(
            0.9**step, 0.999**step, 1e-2, 0.1, 0.9, 0.999, 1e-8, theirs.grad.npu(), None, False, False,
            out=(ours, first, second),
        )  # fmt: skip
    close(ours, theirs, 1e-6)


def test_what_has_no_kernel_fails_loudly():
    with pytest.raises(RuntimeError):
        npu.npu_gelu(torch.randn(4).npu())
