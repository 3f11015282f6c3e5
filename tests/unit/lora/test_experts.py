"""Adapters of experts: the formula expert by expert, what is trained and saved, and every way to apply them."""

from unittest import mock

import pytest
import torch

from mindspeed_llm.checkpoint.detect import open_source
from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.lora.tensors import read_adapters
from mindspeed_llm.plan.adapters import AdapterSettings
from mindspeed_llm.plan.source import find_source

TUNE = (
    "--stage sft --prompt-type chatml --seq-length 128 --lr 2e-2 --lr-decay-style constant --global-batch-size 4 "
    "--micro-batch-size 2 --split 1 --lora-r 4 --lora-alpha 12 --progress lines --num-threads 1"
)
TARGETS = "--lora-target-modules linear_qkv gate_proj up_proj experts.linear_fc2 all-router"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Qwen2-MoE with a dense layer and shared experts."""
    fields = dict(num_hidden_layers=3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    directory = tmp_path_factory.mktemp("experts") / "base"
    return make_toy("qwen2_moe", directory, shared_expert_intermediate_size=80, mlp_only_layers=[1], **fields)


@pytest.fixture(scope="module")
def tuned_experts(base, rows, post_train, tmp_path_factory):
    """Adapters that three steps moved, trained on experts one by one."""
    out = tmp_path_factory.mktemp("tuned_experts") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINDSPEED_LLM_CACHE", str(out.parent / "cache"))
        post_train(TUNE, TARGETS, f"--load {base} --data-path {rows} --train-iters 3 --save {out}")
    return out


def adapters_in(directory, base):
    found = find_source(directory)
    return read_adapters(found.directory, open_source(base).shape, AdapterSettings.from_json(found.record["adapters"]))


def distance(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))


def test_trained_adapters_of_experts_are_one_function(
    base, tuned_experts, our_logits, hf_logits, convert_door, tmp_path
):
    convert_door(f"--load-dir {base} --lora-load {tuned_experts} --save-lora-to-hf --save-dir {tmp_path / 'peft'}")
    convert_door(f"--load-dir {base} --lora-load {tuned_experts} --save-model-type hf --save-dir {tmp_path / 'merged'}")
    beside = our_logits(base, tuned_experts)
    others = {
        "merged in memory": our_logits(base, tuned_experts, merge=True),
        "exported to PEFT": hf_logits(base, tmp_path / "peft"),
        "merged on disk": hf_logits(tmp_path / "merged"),
        "read back from PEFT": our_logits(base, tmp_path / "peft"),
    }
    assert {name: d for name, logits in others.items() if (d := distance(logits, beside)) > TOLERANCE} == {}
    assert distance(our_logits(base), beside) > 1e-2


def test_every_expert_has_factors_of_its_own(base, tuned_experts):
    adapters = adapters_in(tuned_experts, base)
    layers, experts = (0, 2), range(4)
    for part in ("gate_proj", "up_proj"):
        path = "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc1"
        found = [adapters[path.format(layer, expert), part].a for layer in layers for expert in experts]
        assert all(not torch.equal(found[0], other) for other in found[1:])
    moved = [adapter.b.abs().max() for (path, _), adapter in adapters.items() if "local_experts" in path]
    assert sum(float(b) > 0 for b in moved) > len(moved) * 0.8  # an expert may have had no token
    assert ("decoder.layers.1.mlp.linear_fc1", "gate_proj") in adapters
    assert ("decoder.layers.0.mlp.shared_experts.linear_fc1", "up_proj") in adapters
    assert ("decoder.layers.2.mlp.router", "gate") in adapters


@pytest.mark.parametrize("tuned", ["tuned_experts", "tuned_magnitudes"])
def test_stacked_experts_go_on_with_adapters_of_experts_one_by_one(tuned, base, request, rows, post_train, tmp_path):
    import shutil

    tuned_experts = request.getfixturevalue(tuned)
    run = f"{TUNE} {TARGETS} --load {base} --data-path {rows} --train-iters 4"
    found = []
    for name, more in (("one by one", ""), ("stacked", "--moe-grouped-gemm")):
        out = tmp_path / name.replace(" ", "-")
        shutil.copytree(tuned_experts, out)
        post_train(run, f"--save {out} --lora-load {out} {more}")
        found.append(adapters_in(out, base))
    before, (one, other) = adapters_in(tuned_experts, base), found
    assert one.keys() == other.keys() == before.keys()
    for place in one:
        assert torch.allclose(one[place].b, other[place].b, rtol=0, atol=1e-6)
        if tuned == "tuned_magnitudes" and "router" not in place[0]:
            assert torch.allclose(one[place].magnitude, other[place].magnitude, rtol=0, atol=1e-6)
    assert any(not torch.equal(one[place].b, before[place].b) for place in one)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_experts_with_adapters_are_the_formula(grouped, dora):
    """Two local experts, gate and up with an A each, tokens of one and of both."""
    from mindspeed_llm.testing.pool import pool

    assert pool(1).run(largest_difference, grouped, dora)[0] < 1e-6


@pytest.mark.parametrize("mistake", ["gains", "row_norms"])
def test_the_formula_notices_wrong_magnitudes(mistake):
    """Gains of the other expert; norms of the weight without its adapter."""
    from mindspeed_llm.testing.pool import pool

    assert pool(1).run(largest_difference, True, True, mistake)[0] > 1e-2


def largest_difference(grouped, dora, mistake=None):
    """`difference_from_formula`, with a mistake in a method of ExpertFactors."""
    from mindspeed_llm.lora.experts import ExpertFactors

    gains = ExpertFactors.gains
    mistakes = {
        "gains": lambda factors, of: gains(factors, of).flip(0),
        "row_norms": lambda factors, weight: torch.stack([weight(0).norm(dim=1), weight(1).norm(dim=1)]),
    }
    if mistake is None:
        return difference_from_formula(grouped, dora)
    with mock.patch.object(ExpertFactors, mistake, mistakes[mistake]):
        return difference_from_formula(grouped, dora)


def difference_from_formula(grouped, dora):
    """Of outputs and gradients of a layer of experts, from autograd of the written-out formula in fp64."""
    from mindspeed_llm.lora.inject import inject_adapters
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.models.moe.experts import Experts
    from mindspeed_llm.models.moe.options import ExpertOptions
    from mindspeed_llm.models.shape import ModelShape
    from mindspeed_llm.parallel.setup import initialize_distributed

    initialize_distributed()
    shape = ModelShape(
        "qwen_moe", 1, 32, 48, 4, 2, 8, 131, 64, num_moe_experts=2, moe_ffn_hidden_size=24, moe_router_topk=2
    )
    model = build_model(shape, BuildOptions(experts=ExpertOptions(grouped_gemm=grouped), vocab_divisible_by=1))
    model.requires_grad_(False)
    targets = {"experts.linear_fc1": ("gate_proj", "up_proj"), "experts.linear_fc2": ()}
    ranks = {"experts.linear_fc1/up_proj": 2}
    inject_adapters(model, AdapterSettings(3, 6.0, 0.0, targets, ranks=ranks, use_dora=dora))
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    generator = torch.Generator().manual_seed(3)
    for parameter in experts.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3, generator=generator)
    x = torch.randn(7, 32, generator=generator, requires_grad=True)
    probs, sizes = torch.rand(7, generator=generator), torch.tensor([3, 4])
    trained = [p for p in experts.parameters() if p.requires_grad]
    out, _ = experts(x, sizes, probs)
    grads = torch.autograd.grad(out.square().sum(), [x, *trained])
    expected = torch.cat(
        [
            written_out(experts, e, rows, weights)
            for e, (rows, weights) in enumerate(zip(x.split([3, 4]), probs.split([3, 4])))
        ]
    )
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, *trained])
    assert expected.dtype == torch.float64
    pairs = [(out, expected), *zip(grads, expected_grads)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def written_out(experts, e, x, weights):
    """One expert with W + s B A in the place of W, its rows of the trained length with DoRA; in fp64."""
    one, two = experts.linear_fc1, experts.linear_fc2
    a_gate, a_up = one.lora_A[e].double().split([3, 2])
    gate = one.lora_B["gate_proj"][e].double() @ a_gate * (6.0 / 3)
    up = one.lora_B["up_proj"][e].double() @ a_up * (6.0 / 2)
    down = two.lora_B["down_proj"][e].double() @ two.lora_A[e].double() * 2.0
    first = experts.dense_weight("linear_fc1", e).double() + torch.cat([gate, up])
    second = experts.dense_weight("linear_fc2", e).double() + down
    if one.uses_dora:
        lengths = torch.cat([one.lora_magnitude[part][e] for part in ("gate_proj", "up_proj")]).double()
        first = first / first.detach().norm(dim=1, keepdim=True) * lengths[:, None]
        lengths = two.lora_magnitude["down_proj"][e].double()
        second = second / second.detach().norm(dim=1, keepdim=True) * lengths[:, None]
    hidden = x.double() @ first.t()
    gated = torch.nn.functional.silu(hidden[:, :24]) * hidden[:, 24:] * weights[:, None].double()
    return gated @ second.t()


@pytest.mark.parametrize("variant", ["", "--use-dora"])
def test_nothing_of_a_frozen_model_with_experts_has_a_gradient_buffer(variant, base):
    from mindspeed_llm.testing.pool import pool

    trained, buffered, adapters = pool(1).run(counts, str(base), variant)[0]
    assert trained == buffered == adapters > 0


def counts(base, variant):
    """Parameters that require gradients, that have a place in a gradient buffer, and of adapters."""
    from mindspeed_llm.testing.layouts import _plan
    from mindspeed_llm.training.setup import build, start_processes

    words = f"--micro-batch-size 1 --lora-r 4 --lora-target-modules all-linear all-router {variant}"
    plan = _plan(base, words, 4, 1, "posttrain")
    start_processes(plan)
    built = build(plan)
    parameters = [p for chunk in built.chunks for p in chunk.parameters()]
    buffers = [b for w in built.wrapped for b in (*w.buffers, *w.expert_parallel_buffers)]
    return (
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(p.numel() for b in buffers for p in b.params),
        plan.trainable_parameters(),
    )


def test_magnitudes_of_experts_do_not_decay(base):
    from mindspeed_llm.testing.pool import pool

    (found,) = pool(1).run(decays, str(base))
    assert found == {("lora_A", True), ("lora_B", True), ("lora_magnitude", False)}


def decays(base):
    """(kind of parameter, whether it decays) of all adapters of experts."""
    from mindspeed_llm.testing.layouts import _plan
    from mindspeed_llm.training.run import make_optimizer
    from mindspeed_llm.training.setup import build, start_processes

    words = "--micro-batch-size 1 --lora-r 4 --lora-target-modules gate_proj experts.linear_fc2 --use-dora"
    plan = _plan(base, f"{words} --weight-decay 0.1", 4, 1, "posttrain")
    start_processes(plan)
    built = build(plan)
    optimizer, _ = make_optimizer(plan, built, 1)
    names = {p: name for chunk in built.chunks for name, p in chunk.named_parameters()}
    return {
        ("lora_" + names[p].split(".lora_")[1].split(".")[0], group["wd_mult"] > 0)
        for group in optimizer.param_groups
        for p in group["params"]
        if ".experts." in names[p]
    }


@pytest.fixture(scope="module")
def tuned_magnitudes(base, rows, post_train, tmp_path_factory):
    """Adapters with magnitudes, which three steps moved, of experts in one grouped product."""
    out = tmp_path_factory.mktemp("tuned_magnitudes") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINDSPEED_LLM_CACHE", str(out.parent / "cache"))
        words = f"--load {base} --data-path {rows} --train-iters 3 --save {out} --use-dora --moe-grouped-gemm"
        post_train(TUNE, TARGETS, words)
    return out


def test_magnitudes_of_experts_are_one_function(base, tuned_magnitudes, our_logits, hf_logits, convert_door, tmp_path):
    words = f"--load-dir {base} --lora-load {tuned_magnitudes} --save-dir"
    convert_door(f"{words} {tmp_path / 'merged'} --save-model-type hf")
    beside = our_logits(base, tuned_magnitudes)
    assert distance(our_logits(base, tuned_magnitudes, merge=True), beside) < TOLERANCE
    assert distance(hf_logits(tmp_path / "merged"), beside) < TOLERANCE
    moved = [a.magnitude for (path, _), a in adapters_in(tuned_magnitudes, base).items() if "local_experts" in path]
    assert len(moved) == 2 * 4 * 3 and all(magnitude.dim() == 1 for magnitude in moved)
    with pytest.raises(
        UserError, match="--use-dora with mlp.experts.* cannot be exported, because PEFT has no magnitudes"
    ):
        convert_door(f"{words} {tmp_path / 'peft'} --save-lora-to-hf")


def test_a_magnitude_of_one_expert_that_is_lost_is_noticed(base, tuned_magnitudes, our_logits, monkeypatch):
    """The comparison above sees an expert whose magnitudes are another's."""
    from mindspeed_llm.lora.experts import ExpertFactors

    beside, gains = our_logits(base, tuned_magnitudes), ExpertFactors.gains
    monkeypatch.setattr(ExpertFactors, "gains", lambda factors, norms: gains(factors, norms).roll(1, 0))
    assert distance(our_logits(base, tuned_magnitudes), beside) > 10 * TOLERANCE


def test_magnitudes_beside_trained_experts_are_refused(base, rows, post_train):
    words = f"{TARGETS} --load {base} --data-path {rows} --train-iters 1 --use-dora --trainable local_experts"
    with pytest.raises(UserError, match="--use-dora: .*experts.* is trained itself"):
        post_train(TUNE, words)


def test_combining_with_weights_is_for_dense_linears(base, rows, post_train):
    words = f"--load {base} --data-path {rows} --train-iters 1 --lora-fusion-combine --dry-run"
    apart = "--lora-target-modules experts.linear_fc1 router"
    with pytest.raises(UserError, match="--lora-fusion-combine has no meaning for router, experts.linear_fc1, because"):
        post_train(TUNE, words, apart)
    post_train(TUNE, words, f"{apart} linear_proj")


def test_kernels_are_for_dense_linears(base, rows, post_train):
    words = f"--load {base} --data-path {rows} --train-iters 1 --lora-kernels triton --dry-run"
    apart = "--lora-target-modules experts.linear_fc1 router"
    said = "--lora-kernels triton has no meaning for router, experts.linear_fc1, because"
    with pytest.raises(UserError, match=said):
        post_train(TUNE, words, apart)
    with pytest.raises(UserError) as other:  # no CUDA device here, and that alone
        post_train(TUNE, words, f"{apart} linear_proj")
    assert "needs a CUDA device" in str(other.value) and "no meaning" not in str(other.value)
