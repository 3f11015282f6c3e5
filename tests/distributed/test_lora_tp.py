"""LoRA under tensor and sequence parallelism trains the adapters that one process trains."""

import pytest
import torch

from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adapters import AdapterSettings
from mindspeed_llm.plan.targets import resolve_targets
from mindspeed_llm.testing.pool import pool

# Groups < heads, head_dim != hidden / heads, a vocabulary that 2 does not divide, biases in front of the adapters.
SHAPE = ModelShape("qwen", 4, 48, 80, 6, 2, 12, 131, 256, init_method_std=0.1, add_qkv_bias=True)
TARGETS = {
    "fused": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
    "parts": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
}
LAYOUTS = [(2, False), (2, True)]


def settings(targets):
    return AdapterSettings(rank=4, alpha=8.0, dropout=0.0, targets=resolve_targets(TARGETS[targets], SHAPE).targets)


def batch():
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 131, (2, 12), generator=generator)
    labels = torch.randint(0, 131, (2, 12), generator=generator)
    labels[0, :2] = -100
    labels[1, 3:] = -100
    return ids, labels


def gathered(model, values):
    """(layer, part, "A" or "B") -> whole tensor, from this rank's values of the adapter parameters."""
    import torch.distributed as dist

    from mindspeed_llm.lora.inject import adapted_modules

    whole = {}
    for path, module in adapted_modules(model).items():
        tensors = {"A": (module.lora_A, None if module.kind.column else 1)}
        tensors |= {part: (b, 0 if module.kind.column else None) for part, b in module.lora_B.items()}
        for name, (parameter, dim) in tensors.items():
            value = values(parameter).contiguous()
            parts = [torch.empty_like(value) for _ in range(module.kind.world)]
            dist.all_gather(parts, value, group=module.kind.group)
            if dim is None:
                assert all(torch.equal(part, parts[0]) for part in parts), f"{path} {name} differs between ranks"
                whole[path, name] = parts[0].clone()
            else:
                whole[path, name] = torch.cat(parts, dim)
    return whole


MUTATIONS = {
    "A of column linears is not summed over sequence shards": lambda m: setattr(m.lora_A, "sequence_parallel", False),
    "B of row linears is not summed over sequence shards": lambda m: [
        setattr(b, "sequence_parallel", False) for b in m.lora_B.values()
    ],
    "scaling is alpha": lambda m: setattr(
        m, "kind", type(m.kind)(m.kind.column, m.kind.sequence_parallel, m.kind.group, m.kind.world, 8.0)
    ),
}


def train(targets, tp, sequence_parallel, recompute=None, mutation=None, trained_base=False):
    """Three SGD steps: losses, and the adapters' gathered initial values, final values and last gradients."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from mindspeed_llm.lora.inject import adapted_modules, inject_adapters
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.parallel.setup import initialize_distributed

    initialize_distributed(tensor_parallel_size=tp)
    options = BuildOptions(
        tensor_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        vocab_divisible_by=2,
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
    )
    model = build_model(SHAPE, options)
    model.requires_grad_(trained_base)
    inject_adapters(model, settings(targets))
    if mutation is not None:
        for module in adapted_modules(model).values():
            MUTATIONS[mutation](module)
    initial = gathered(model, lambda p: p.detach())
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    ids, labels = batch()
    losses = []
    for _ in range(3):
        wrapped.zero_grad_buffer()
        loss = wrapped(ids, labels=labels)
        loss.backward()
        tokens = (labels != -100).sum().int()
        losses.append(float(loss.detach()) / float(tokens))
        finalize_model_grads([wrapped], tokens.clone())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter -= 0.05 * parameter.main_grad
    return losses, initial, gathered(model, lambda p: p.detach()), gathered(model, lambda p: p.main_grad)


def worst(found, expected):
    """Largest max|d| / max|x| over the tensors."""
    assert found.keys() == expected.keys()
    return max(float((found[k] - expected[k]).abs().max() / expected[k].abs().max().clamp_min(1e-12)) for k in expected)


@pytest.fixture(scope="module")
def one_process():
    return {targets: pool(1).run(train, targets, 1, False)[0] for targets in TARGETS}


@pytest.mark.parametrize("tp, sequence_parallel", LAYOUTS)
@pytest.mark.parametrize("targets", TARGETS)
def test_two_ranks_train_the_adapters_of_one(one_process, targets, tp, sequence_parallel):
    losses, initial, final, gradients = one_process[targets]
    for found in pool(2).run(train, targets, tp, sequence_parallel):
        assert all(torch.equal(found[1][k], initial[k]) for k in initial)
        assert found[0] == pytest.approx(losses, rel=1e-5)
        assert worst(found[2], final) < 1e-5
        assert worst(found[3], gradients) < 1e-5
    assert losses[2] < losses[0]
    assert all(float(g.abs().max()) > 0 for g in gradients.values())


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_notices(one_process, mutation):
    losses, _, _, gradients = one_process["fused"]
    try:
        found = pool(2).run(train, "fused", 2, True, None, mutation)[0]
    except AssertionError as differs:
        assert "differs between ranks" in str(differs)
    else:
        assert worst(found[3], gradients) > 1e-3


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_with_a_frozen_base_trains_every_adapter(one_process, recompute):
    losses, _, _, gradients = one_process["fused"]
    found = pool(1).run(train, "fused", 1, False, recompute)[0]
    assert found[0] == pytest.approx(losses, rel=1e-6)
    assert worst(found[3], gradients) < 1e-6


@pytest.mark.parametrize("tp, sequence_parallel", LAYOUTS)
def test_adapters_beside_a_trained_base_equal_one_rank(tp, sequence_parallel):
    expected = pool(1).run(train, "parts", 1, False, None, None, True)[0]
    for found in pool(2).run(train, "parts", tp, sequence_parallel, None, None, True):
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert worst(found[3], expected[3]) < 1e-5
