"""Layers with experts: parity with transformers, the router's rules, balance, capacity, stacked experts."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from mindspeed_llm.checkpoint.detect import open_source
from mindspeed_llm.checkpoint.load import load_into
from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.models.build import BuildOptions, build_model
from mindspeed_llm.models.initialize import initial_tensor
from mindspeed_llm.models.moe.auxiliary_loss import load_balancing_loss, routers, set_weights, take, z_loss
from mindspeed_llm.models.moe.experts import cut_by_expert
from mindspeed_llm.models.moe.options import ExpertOptions
from mindspeed_llm.models.moe.routing import choose_experts, drop_tokens, routing_tables
from mindspeed_llm.models.nf4_weight import Nf4Weight
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.ops.grouped_matmul import by_group, grouped_matmul, grouped_mm, reference
from mindspeed_llm.ops.nf4_matrix import quantize_matrix
from mindspeed_llm.parallel.setup import initialize_distributed

torch.set_num_threads(1)
SMALL = dict(num_hidden_layers=2, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2)
TOYS = {
    "mixtral": ("mixtral", dict(num_hidden_layers=2, num_local_experts=4)),
    "qwen3_moe": ("qwen3_moe", dict(**SMALL, norm_topk_prob=True, mlp_only_layers=[1])),
    "qwen3_moe, scores as they are": ("qwen3_moe", SMALL),
    "qwen2_moe": ("qwen2_moe", dict(**SMALL, shared_expert_intermediate_size=80, num_key_value_heads=4)),
}


@pytest.fixture(scope="module", autouse=True)
def parallel_state():
    initialize_distributed()


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    root = tmp_path_factory.mktemp("moe")
    return {name: make_toy(kind, root / name, **fields) for name, (kind, fields) in TOYS.items()}


def shape_with(**fields):
    sizes = dict(num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, num_query_groups=2)
    values = sizes | dict(num_moe_experts=8, moe_ffn_hidden_size=24, moe_router_topk=3) | fields
    return ModelShape("qwen_moe", kv_channels=8, vocab_size=64, max_position_embeddings=32, **values)


def loaded(directory, **options):
    source = open_source(directory)
    model = build_model(source.shape, BuildOptions(initialize=False, experts=ExpertOptions(**options)))
    load_into(model, source, quiet=True)
    return model


@pytest.mark.parametrize("options", [{}, dict(grouped_gemm=True), dict(token_dispatcher_type="allgather")])
@pytest.mark.parametrize("toy", TOYS)
def test_logits_are_those_of_transformers(toys, toy, options):
    ids = torch.randint(0, 997, (2, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(toys[toy]).eval()(ids).logits
        found = loaded(toys[toy], **options).eval()(ids, gather_logits=True)
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


HF_ROUTERS = {
    "mixtral": (MixtralTopKRouter, {}, dict(moe_router_pre_softmax=True, norm_topk_prob=True)),
    "mixtral as softmax over the chosen": (MixtralTopKRouter, {}, {}),
    "qwen, divided": (
        Qwen3MoeTopKRouter, dict(norm_topk_prob=True), dict(moe_router_pre_softmax=True, norm_topk_prob=True)
    ),
    "qwen, as they are": (Qwen3MoeTopKRouter, dict(norm_topk_prob=False), dict(moe_router_pre_softmax=True)),
}  # fmt: skip


def hf_router(kind, **fields):
    config = dict(hidden_size=16, num_experts_per_tok=3, num_local_experts=8, num_experts=8) | fields
    router = kind(type("Config", (), config))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    return router


@pytest.mark.parametrize("case", HF_ROUTERS)
def test_softmax_routing_is_that_of_transformers(case):
    kind, fields, ours = HF_ROUTERS[case]
    hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    logits, scores, indices = hf_router(kind, **fields)(hidden)
    weights, experts = choose_experts(logits, shape_with(**ours))
    assert torch.equal(experts, indices)
    torch.testing.assert_close(weights, scores, atol=1e-6, rtol=1e-6)


def test_a_softmax_at_the_wrong_place_would_be_noticed():
    hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    logits, scores, _ = hf_router(Qwen3MoeTopKRouter, norm_topk_prob=False)(hidden)
    weights, _ = choose_experts(logits, shape_with(moe_router_pre_softmax=False))
    assert (weights - scores).abs().max() > 1e-2


def test_sigmoid_routing_in_groups_with_a_bias_is_deepseeks():
    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, routed_scaling_factor=2.5
    )
    router = DeepseekV3TopkRouter(config)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(router.weight, generator=generator)
    router.e_score_correction_bias.copy_(torch.randn(8, generator=generator))
    hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(5))
    logits, scores, indices = router(hidden)
    shape = shape_with(
        moe_router_score_function="sigmoid", norm_topk_prob=True, moe_router_num_groups=4, moe_router_group_topk=2,
        moe_router_group_score_topk=2, moe_router_topk_scaling_factor=2.5, moe_router_enable_expert_bias=True,
    )  # fmt: skip
    weights, experts = choose_experts(logits, shape, router.e_score_correction_bias)
    ours, theirs = routing_tables(weights, experts, 8)[0], routing_tables(scores, indices, 8)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    unbiased, _ = choose_experts(logits, shape, None)
    assert not torch.allclose(routing_tables(unbiased, _, 8)[0], theirs, atol=1e-3)


def test_dropping_keeps_the_largest_weights_or_the_first_tokens():
    weights = torch.tensor([[0.6, 0.0], [0.9, 0.0], [0.7, 0.0], [0.0, 1.0]])
    chosen = weights > 0
    by_weight, kept = drop_tokens(weights, chosen, 2, "probs", pad=False)
    assert kept.tolist() == [[False, False], [True, False], [True, False], [False, True]]
    assert torch.equal(by_weight, weights * kept)
    assert drop_tokens(weights, chosen, 2, "position", pad=False)[1][:, 0].tolist() == [True, True, False, False]
    padded, full = drop_tokens(weights, chosen, 2, "probs", pad=True)
    assert full.sum(0).tolist() == [2, 2] and torch.equal(padded, weights * kept)
    assert torch.equal(drop_tokens(weights, chosen, 9, "position", pad=False)[1], chosen)


def test_balanced_load_costs_one_and_one_expert_for_all_costs_their_number():
    even = torch.full((8, 4), 0.25)
    assert load_balancing_loss(even, torch.full((4,), 4.0), 2, 8) == pytest.approx(1.0)
    single = torch.eye(4)[0].expand(8, 4)
    assert load_balancing_loss(single, torch.tensor([8.0, 0, 0, 0]), 1, 8) == pytest.approx(4.0)
    assert z_loss(torch.zeros(3, 4), 3) == pytest.approx(1.3862944**2, rel=1e-6)


def test_auxiliary_losses_are_logged_and_weighted_by_micro_batch(toys):
    kinds = dict(router_load_balancing_type=("aux_loss", "seq_aux_loss", "global_aux_loss"))
    gradients = {}
    for weight in (0.0, 1.0, 3.0):
        model = loaded(toys["qwen2_moe"], aux_loss_coeff=(0.1, 0.2, 0.3), z_loss_coeff=0.01, **kinds).train()
        set_weights([model], trained_tokens=weight * 2, num_micro_batches=2)
        ids = torch.randint(0, 997, (2, 9), generator=torch.Generator().manual_seed(3))
        (0.0 * model(ids, labels=ids)).backward()
        gradients[weight] = routers([model])[0].weight.grad.clone()
    names = {"load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss", "z_loss"}
    logged = take([model], num_micro_batches=1)
    assert set(logged) == names and all(value > 0.5 for value in logged.values())
    assert logged["global_load_balancing_loss"] == pytest.approx(logged["load_balancing_loss"], rel=1e-6)
    assert not gradients[0.0].any() and gradients[1.0].any()
    torch.testing.assert_close(gradients[3.0], 3 * gradients[1.0], rtol=1e-4, atol=1e-8)
    with torch.no_grad():
        model(ids, labels=ids)
    assert take([model], 1) == dict.fromkeys(names, 0.0)


def test_stacked_and_single_experts_start_from_the_same_weights():
    shape = shape_with(num_layers=2, moe_layers=(1,))
    one, stacked = (
        build_model(shape, BuildOptions(seed=3, experts=ExpertOptions(grouped_gemm=g))).state_dict() for g in (0, 1)
    )
    names = [f"decoder.layers.1.mlp.experts.local_experts.{e}.linear_fc1.weight" for e in range(8)]
    assert torch.equal(torch.stack([one[name] for name in names]), stacked["decoder.layers.1.mlp.experts.weight1"])
    assert not torch.equal(one[names[0]], one[names[1]])
    assert not any("local_experts" in name for name in one if name.startswith("decoder.layers.0."))
    config = build_model(shape, BuildOptions(initialize=False)).config
    assert torch.equal(initial_tensor(names[5], config, 3), one[names[5]])


def test_the_score_bias_moves_towards_experts_with_few_tokens():
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    shape = shape_with(
        moe_router_score_function="sigmoid", norm_topk_prob=True, moe_router_enable_expert_bias=True
    )  # fmt: skip
    model = build_model(shape, BuildOptions(experts=ExpertOptions(router_bias_update_rate=0.25))).train()
    router = routers([model])[0]
    ids = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(3))
    model(ids, labels=ids)
    counts = router.local_tokens_per_expert.clone()
    assert counts.sum() == 9 * 3
    _update_router_expert_bias([model], model.config)
    assert torch.equal(router.expert_bias, 0.25 * torch.sign(27 / 8 - counts))


@pytest.mark.parametrize("options", [dict(expert_capacity_factor=0.5, token_drop_policy="position"),
                                     dict(expert_capacity_factor=1.0, pad_expert_input_to_capacity=True)])  # fmt: skip
@pytest.mark.parametrize("grouped", [False, True])
def test_capacity_limits_change_the_outcome_and_can_be_trained(toys, options, grouped):
    ids = torch.randint(0, 997, (1, 12), generator=torch.Generator().manual_seed(3))
    free = loaded(toys["mixtral"])(ids, labels=ids)
    limited = loaded(toys["mixtral"], grouped_gemm=grouped, **options).train()
    loss = limited(ids, labels=ids)
    loss.backward()
    assert loss.isfinite() and abs(float(loss - free)) > 1e-3
    assert all(p.grad is not None for p in limited.parameters())


@pytest.mark.parametrize("sizes", [[3, 0, 4], [0, 0, 5], [7, 0, 0]])
def test_grouped_products_are_the_formula(sizes):
    generator = torch.Generator().manual_seed(1)
    counts, results = torch.tensor(sizes), []
    x = torch.randn(sum(sizes), 6, generator=generator)
    weight = torch.randn(3, 5, 6, generator=generator)
    grad = torch.randn(sum(sizes), 5, generator=generator)
    for function in (by_group, reference):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(a, w, counts)
        out.backward(grad)
        results.append((out, a.grad, w.grad))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_bf16_model_can_route_in_fp32(toys):
    source = open_source(toys["mixtral"])
    options = BuildOptions(
        initialize=False, params_dtype=torch.bfloat16, experts=ExpertOptions(router_dtype="fp32", grouped_gemm=True)
    )
    model = build_model(source.shape, options)
    load_into(model, source, quiet=True)
    router = routers([model])[0]
    assert router.gating(torch.zeros(1, 1, 64, dtype=torch.bfloat16)).dtype == torch.float32
    ids = torch.randint(0, 997, (1, 9), generator=torch.Generator().manual_seed(3))
    model.train()(ids, labels=ids).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_torchs_grouped_kernel_computes_the_same_and_anything_else_goes_by_group():
    generator, counts = torch.Generator().manual_seed(1), torch.tensor([7, 0, 13])
    x, weight = torch.randn(20, 16, generator=generator), torch.randn(3, 8, 16, generator=generator)
    for dtype, columns in ((torch.bfloat16, 8), (torch.bfloat16, 5), (torch.float32, 8)):
        results = []
        for function in (grouped_mm, by_group):
            a, w = x.to(dtype).requires_grad_(), weight[:, :columns].to(dtype).contiguous().requires_grad_()
            out = function(a, w, counts)
            out.sum().backward()  # a gradient that is one number everywhere, expanded
            results.append((out, a.grad, w.grad))
        for ours, expected in zip(*results):
            torch.testing.assert_close(ours, expected, atol=1e-1 if dtype == torch.bfloat16 else 1e-5, rtol=2e-2)


@pytest.mark.parametrize("quantized", [False, True])
def test_parts_of_stacked_weights_are_the_weights_of_their_experts(quantized):
    generator, sizes = torch.Generator().manual_seed(1), [2, 1, 2]
    dense, x = torch.randn(5, 8, 64, generator=generator), torch.randn(20, 64, generator=generator)
    weight, counts = dense.clone().requires_grad_(), torch.tensor([7, 0, 5, 2, 6])
    if quantized:
        weight = Nf4Weight((5, 8, 64), torch.float32, torch.device("cpu"))
        for index, matrix in enumerate(dense):
            weight.fill(quantize_matrix(matrix), index)
    whole = grouped_matmul(x, weight, counts)
    rows, numbers = x.split([7, 5, 8]), counts.split(sizes)
    parts = [grouped_matmul(*operands) for operands in zip(rows, cut_by_expert(weight, sizes), numbers)]
    assert torch.equal(torch.cat(parts), whole)
    if not quantized:
        expected, found = (torch.autograd.grad(y.sum(), weight)[0] for y in (whole, torch.cat(parts)))
        assert torch.equal(found, expected) and expected.any()
