"""The stand-ins compute what their packages do, against formulas and megatron's own layers."""

import pytest
import torch
import torch.nn.functional as F

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.stand_ins import scaled_causal_softmax, scaled_masked_softmax, weight_gradient
from mindspeed_llm.models.stand_ins import transformer_engine as te
from mindspeed_llm.models.stand_ins.grouped_gemm import ops as grouped_gemm
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch import permutation, router
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.attention.dot_product import MASK_TYPES
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.cpp_extensions import general_gemm

WIDE = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def scores_formula(q, k, v, hidden, bias, scale):
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, 2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * scale + (0 if bias is None else bias)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bnst,tbne->sbne", weights, v).flatten(2)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("window", [None, (2, 0)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_under_every_kind_of_mask(mask_type, window, with_bias):
    s, b, n, g, d = 6, 2, 4, 2, 8
    q, k, v = (torch.randn(s, b, heads, d, dtype=WIDE) for heads in (n, g, g))
    padding = torch.zeros(b, 1, 1, s, dtype=torch.bool)
    padding[1, ..., 4:] = True
    arbitrary = torch.rand(b, 1, s, s) < 0.3
    mask = {"arbitrary": arbitrary}.get(mask_type, padding if "padding" in mask_type else None)
    bias = torch.randn(1, n, s, s, dtype=WIDE) if with_bias else None
    attention = te.pytorch.DotProductAttention(n, d, num_gqa_groups=g, attn_mask_type=mask_type, window_size=window)
    kind = "post_scale_bias" if with_bias else "no_bias"
    out = attention(q, k, v, mask, core_attention_bias_type=kind, core_attention_bias=bias)
    distance = torch.arange(s)[:, None] - torch.arange(s)[None]
    hidden = torch.zeros(1, 1, s, s, dtype=torch.bool)
    if "causal" in mask_type or window:
        hidden = hidden | (distance < 0)
    if window:
        hidden = hidden | (distance > window[0])
    hidden = hidden if mask is None else hidden | mask
    if not (with_bias and hidden.all(-1).any()):
        torch.testing.assert_close(out, scores_formula(q, k, v, hidden, bias, d**-0.5))


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_apart_and_padding_between_them_is_zero(causal):
    n, d, lengths, padded = 2, 4, (3, 2), (0, 4, 6)
    q, k, v = (torch.randn(6, n, d, dtype=WIDE) for _ in range(3))
    mask_type = "padding_causal" if causal else "padding"
    attention = te.pytorch.DotProductAttention(n, d, attn_mask_type=mask_type, qkv_format="thd")
    bounds = {"cu_seqlens_q": torch.tensor([0, 3, 5]), "cu_seqlens_q_padded": torch.tensor(padded)}
    bounds |= {name.replace("_q", "_kv"): value for name, value in bounds.items()}
    out = attention(q, k, v, **bounds)
    assert not out[3].any()
    for start, length in zip(padded, lengths):
        rows = slice(start, start + length)
        hidden = torch.ones(length, length).triu(1).bool() if causal else torch.zeros(length, length).bool()
        alone = scores_formula(*(x[rows, None] for x in (q, k, v)), hidden, None, d**-0.5)
        torch.testing.assert_close(out[rows], alone[:, 0])


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("centred", [False, True])
def test_norms(kind, centred):
    norm = getattr(te.pytorch, kind)(8, eps=1e-5, zero_centered_gamma=centred, params_dtype=WIDE)
    x = torch.randn(3, 8, dtype=WIDE)
    plain = F.layer_norm(x, (8,), eps=1e-5) if kind == "LayerNorm" else F.rms_norm(x, (8,), eps=1e-5)
    torch.testing.assert_close(norm(x), plain)
    with torch.no_grad():
        norm.weight.add_(1)
    torch.testing.assert_close(norm(x), 2 * plain)


def test_products_of_groups_permutations_and_matrices():
    sizes = torch.tensor([2, 0, 3])
    a, b = torch.randn(5, 4), torch.randn(3, 4, 6)
    expected = torch.cat([rows @ matrix for rows, matrix in zip(a.split(sizes.tolist()), b)])
    torch.testing.assert_close(grouped_gemm.gmm(a, b, sizes), expected)
    torch.testing.assert_close(grouped_gemm.gmm(a, b.transpose(1, 2), sizes, trans_b=True), expected)
    routing = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 0]]).bool()
    probs, tokens = torch.rand(3, 3) * routing, torch.randn(3, 4)
    rows, of_rows, row_map = permutation.moe_permute_with_probs(tokens, probs, routing)
    torch.testing.assert_close(rows, tokens[[0, 2, 1, 0, 1]])
    torch.testing.assert_close(of_rows, torch.stack([probs[0, 0], probs[2, 0], probs[1, 1], probs[0, 2], probs[1, 2]]))
    merged = permutation.moe_unpermute(rows, row_map, merging_probs=probs, restore_shape=tokens.shape)
    torch.testing.assert_close(merged, tokens * probs.sum(1, keepdim=True))
    x, weight, grad = torch.randn(5, 4), torch.randn(3, 4), torch.randn(5, 3)
    torch.testing.assert_close(general_gemm(weight, x)[0], x @ weight.t())
    torch.testing.assert_close(general_gemm(weight, grad, layout="NN")[0], grad @ weight)
    torch.testing.assert_close(general_gemm(x, grad, layout="NT")[0], grad.t() @ x)


def test_extensions_of_megatron_and_apex():
    x, grad = torch.randn(2, 3, 3, requires_grad=True), torch.randn(2, 3, 3)
    later = torch.ones(3, 3).triu(1).bool()
    expected = (2.0 * x).masked_fill(later, float("-inf")).softmax(-1)
    expected.backward(grad)
    result = scaled_causal_softmax.forward(x.detach(), torch.tensor(2.0))
    torch.testing.assert_close(result, expected.detach())
    torch.testing.assert_close(scaled_causal_softmax.backward(grad, result, torch.tensor(2.0)), x.grad)
    mask = torch.tensor([[[True, True, True], [False, True, False], [False, False, False]]])
    masked = scaled_masked_softmax.forward(x.detach(), mask, torch.tensor(1.0))
    assert not masked[:, 0].any() and not masked[:, 1, 1].any()
    torch.testing.assert_close(masked.sum(-1)[:, 1:], torch.ones(2, 2))
    rows, main_grad = torch.randn(5, 2, dtype=torch.bfloat16), torch.ones(3, 2)
    grads = torch.randn(5, 3, dtype=torch.bfloat16)
    weight_gradient.wgrad_gemm_accum_fp32(rows, grads, main_grad)
    torch.testing.assert_close(main_grad, 1 + grads.float().t() @ rows.float(), rtol=1e-2, atol=1e-2)


def test_low_precision_and_user_buffers_are_refused_in_one_line():
    cases = (
        lambda: te.common.recipe.DelayedScaling(),
        lambda: te.pytorch.fp8_autocast(enabled=True),
        lambda: te.pytorch.Linear(4, 4, ub_overlap_ag=True),
        lambda: te.pytorch.Fp8Padding(4),
        lambda: te.pytorch.Fp8Unpadding(4),
    )
    for case in cases:
        with pytest.raises(UserError, match="is wrong, because .*; legal: .*; try: ") as refusal:
            case()
        assert "\n" not in str(refusal.value)
    with pytest.raises(TypeError, match="no argument"):
        te.pytorch.Linear(4, 4, unknown=1)


def both_linears(fused, **options):
    made = [te.pytorch.Linear(4, 3, fuse_wgrad_accumulation=fused, params_dtype=torch.float32, **options)]
    made.append(te.pytorch.Linear(4, 3, delay_wgrad_compute=True, fuse_wgrad_accumulation=fused, **options))
    made[1].load_state_dict(made[0].state_dict())
    for module in made:
        module.weight.main_grad = torch.zeros(3, 4)
    return made


@pytest.mark.parametrize("frozen_input", [False, True])
def test_deferred_gradients_of_weights_come_later_and_are_the_same(frozen_input):
    plain, later = both_linears(False)
    calls = []
    later.register_wgrad_accumulation_and_reduce_hooks(lambda: calls.append(later.weight.grad is not None))
    assert later.weight.skip_backward_post_hook and not hasattr(plain.weight, "skip_backward_post_hook")
    inputs = [torch.randn(5, 4) for _ in range(2)]
    for module in (plain, later):
        for x in inputs:
            (module(x.clone().requires_grad_(not frozen_input)) ** 2).sum().backward()
    assert later.weight.grad is None and calls == []
    torch.testing.assert_close(later.bias.grad, plain.bias.grad)
    later.backward_dw()
    assert calls == [True] and not torch.allclose(later.weight.grad, plain.weight.grad)  # of the first pass alone
    later.backward_dw()
    torch.testing.assert_close(later.weight.grad, plain.weight.grad)
    before = later.weight.grad.clone()
    later.backward_dw()
    assert torch.equal(later.weight.grad, before)


def test_deferred_gradients_of_inputs_and_groups():
    plain, later = (
        te.pytorch.GroupedLinear(2, 4, 3, delay_wgrad_compute=delay, params_dtype=torch.float32)
        for delay in (False, True)
    )
    later.load_state_dict(plain.state_dict())
    x = torch.randn(5, 4)
    of_x = []
    for module in (plain, later):
        given = x.clone().requires_grad_()
        (module(given, [2, 3]) ** 2).sum().backward()
        of_x.append(given.grad)
    torch.testing.assert_close(*of_x)
    later.backward_dw()
    for name in ("weight0", "weight1", "bias0", "bias1"):
        torch.testing.assert_close(getattr(later, name).grad, getattr(plain, name).grad)


def test_deferred_gradients_are_added_to_main_grad():
    _, later = both_linears(True)
    x = torch.randn(5, 4)
    later.weight.grad_added_to_main_grad = False
    later.weight.main_grad += 1
    later(x).sum().backward()
    later.backward_dw()
    torch.testing.assert_close(later.weight.main_grad, torch.ones(3, 5) @ x + 1)
    assert later.weight.grad_added_to_main_grad and later.weight.grad is not None


ROUTES = [
    {},
    {"use_pre_softmax": True, "scaling_factor": 2.5},
    {"use_pre_softmax": True, "num_groups": 4, "group_topk": 2},
    {"score_function": "sigmoid"},
    {"score_function": "sigmoid", "expert_bias": torch.linspace(-1, 1, 8), "num_groups": 4, "group_topk": 2},
]


@pytest.mark.parametrize("route", ROUTES)
def test_fused_routing_is_megatrons_own(route):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    logits = torch.randn(16, 8, requires_grad=True)
    weights, chosen = router.fused_topk_with_score_function(logits, 4, **route)
    expected, expected_map = topk_routing_with_score_function(logits, 4, **route)
    assert torch.equal(chosen, expected_map) and chosen.dtype == torch.bool
    torch.testing.assert_close(weights, expected)
    of_ours, of_theirs = (torch.autograd.grad((w**2).sum(), logits)[0] for w in (weights, expected))
    torch.testing.assert_close(of_ours, of_theirs)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_fused_balancing_loss_is_megatrons_own(score_function):
    from megatron.core.transformer.moe import moe_utils

    logits = torch.randn(16, 8)
    chosen, scores = router.fused_compute_score_for_moe_aux_loss(logits, 2, score_function)
    expected_map, expected = moe_utils.compute_routing_scores_for_aux_loss(logits, 2, score_function)
    assert torch.equal(chosen, expected_map)
    torch.testing.assert_close(scores, expected)
    counts = chosen.sum(0)
    loss = router.fused_moe_aux_loss(scores, counts, total_num_tokens=16, num_experts=8, topk=2, coeff=0.1)
    torch.testing.assert_close(loss, moe_utils.switch_load_balancing_loss_func(expected, counts, 16, 2, 8, 0.1))


def test_the_buffers_that_megatrons_start_makes_for_overlap_are_refused_in_one_line():
    from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.module import base

    modes = [base.UserBufferQuantizationMode.NONE]  # as megatron.training.initialize says, before it asks for buffers
    with pytest.raises(UserError, match="--tp-comm-overlap.* is wrong, because .*; legal: .*; try: "):
        base.initialize_ub(shape=[8, 4], tp_size=2, quantization_modes=modes, ub_cfgs={}, bootstrap_backend="nccl")


def test_routing_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="score_function 'tanh' is wrong; legal"):
        router.fused_topk_with_score_function(torch.randn(2, 4), 1, score_function="tanh")
    with pytest.raises(ValueError, match="legal: softmax without expert_bias"):
        router.fused_topk_with_score_function(torch.randn(2, 4), 1, expert_bias=torch.zeros(4))


def adam_problem(dtype=torch.float32):
    return [torch.nn.Parameter(torch.linspace(-1, 1, n).to(dtype)) for n in (5, 3)]


def steps_of_adam(optimizer, parameters, of_gradient="grad", count=3):
    for step in range(count):
        for index, parameter in enumerate(parameters):
            gradient = torch.sin(torch.arange(parameter.numel()) + step + index)
            setattr(parameter, of_gradient, gradient.to(torch.float32 if of_gradient != "grad" else parameter.dtype))
        optimizer.step()


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torchs(decoupled):
    ours, theirs = adam_problem(), adam_problem()
    settings = {"lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.9)}
    optimizer = te.pytorch.optimizers.FusedAdam(ours, adam_w_mode=decoupled, **{**settings, "lr": None})
    optimizer.param_groups[0]["lr"] = 0.1
    steps_of_adam(optimizer, ours)
    steps_of_adam((torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **settings), theirs)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)
    assert optimizer.param_groups[0]["step"] == 3


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16, torch.float16])
def test_adam_with_copies_of_parameters_goes_on_from_its_state(moments):
    settings = {"lr": 0.01, "master_weights": True, "use_decoupled_grad": True, "exp_avg_dtype": moments}
    exact = adam_problem(torch.bfloat16)
    exact = [torch.nn.Parameter(parameter.detach().float()) for parameter in exact]
    steps_of_adam(torch.optim.AdamW(exact, lr=0.01, weight_decay=0.0), exact, count=4)
    ours = adam_problem(torch.bfloat16)
    optimizer = te.pytorch.optimizers.FusedAdam(ours, **settings)
    steps_of_adam(optimizer, ours, "decoupled_grad", 3)
    kept = optimizer.state_dict()
    assert all(state["exp_avg"].dtype == torch.float32 for state in kept["state"].values())
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    resumed = te.pytorch.optimizers.FusedAdam(again, **settings)
    resumed.load_state_dict(kept)
    for which, parameters in ((optimizer, ours), (resumed, again)):
        for index, parameter in enumerate(parameters):
            parameter.decoupled_grad = torch.sin(torch.arange(parameter.numel()) + 3.0 + index)
        which.step()
    for one, other, formula in zip(ours, again, exact):
        assert torch.equal(one, other)
        master = optimizer.get_unscaled_state(one, "master_param")
        assert torch.equal(one, master.bfloat16()) and optimizer.state[one]["exp_avg"].dtype == moments
        torch.testing.assert_close(master, formula, rtol=0, atol=1e-6 if moments == torch.float32 else 2e-3)


def test_adam_refuses_what_it_does_not_do():
    for wrong in ({"amsgrad": True}, {"capturable": True}, {"exp_avg_dtype": torch.uint8}):
        with pytest.raises(UserError, match="is wrong, because .*; legal: "):
            te.pytorch.optimizers.FusedAdam(adam_problem(), **wrong)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_a_norm_gives_the_dtype_of_its_weight(kind):
    norm = getattr(te.pytorch, kind)(8, params_dtype=torch.bfloat16)
    x = torch.randn(3, 8, requires_grad=True)
    out = norm(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, norm(x.bfloat16()))
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32


MADE = {
    "Linear": lambda **o: te.pytorch.Linear(4, 6, parallel_mode="row", **o),
    "LayerNormLinear": lambda **o: te.pytorch.LayerNormLinear(4, 6, parallel_mode="column", **o),
    "GroupedLinear": lambda **o: te.pytorch.GroupedLinear(2, 4, 6, parallel_mode="column", **o),
    "RMSNorm": lambda **o: te.pytorch.RMSNorm(4, sequence_parallel=True, **o),
}


def _of_parameters(module):
    return {name: (parameter, vars(parameter)) for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("emptied", [False, True])
def test_a_module_of_the_meta_device_becomes_what_it_would_have_been(kind, emptied):
    torch.manual_seed(3)
    expected = _of_parameters(MADE[kind]())
    module = MADE[kind](device="meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    if emptied:  # as Megatron's FSDP does before it asks for the values
        module.to_empty(device="cpu", recurse=False)
        assert not any(vars(parameter) for parameter in module.parameters()), "the marks are gone with the tensors"
    torch.manual_seed(3)
    module.reset_parameters()
    found = _of_parameters(module)
    assert found.keys() == expected.keys()
    for name, (parameter, marks) in expected.items():
        assert torch.equal(found[name][0], parameter) and found[name][1] == marks and marks is not found[name][1], name
    torch.manual_seed(4)
    module.reset_parameters()
    drawn = [name for name, (parameter, _) in expected.items() if not torch.equal(getattr(module, name), parameter)]
    assert drawn == [name for name in expected if name.startswith("weight") and kind != "RMSNorm"]


def test_megatron_fsdp_finds_how_each_parameter_is_drawn():
    module = MADE["LayerNormLinear"](device="meta")
    assert module.param_init_meta.keys() == dict(module.named_parameters()).keys()
    assert not module.primary_weights_in_fp8
    assert all(init.fp8_meta_index is None for init in module.param_init_meta.values())
