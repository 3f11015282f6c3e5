"""Options of activation swap: what a plan makes of them, what it estimates, and what is refused."""

import pytest
import torch

from mindspeed_llm import ops
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layer_map import layer_map
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.plan import activations
from mindspeed_llm.plan.memory import Swapping, estimate
from mindspeed_llm.plan.show import plan_memory

SHAPE = ModelShape("llama", 8, 128, 320, 8, 4, 16, 1009, 256)
TOKENS = 256
ALL = ("input_norm", "self_attention", "post_attention_norm", "mlp")
FULL = "--recompute-granularity full --recompute-num-layers 1 --recompute-method"
FACTOR = 1.1
"""The estimate of what lies on the host is right within this factor either way."""


@pytest.mark.parametrize("words, said", [
    ("--swap-attention --swap-modules attention", "legal: one or more of input_norm, self_attention"),
    ("--swap-attention --swap-budget many", "legal: auto, or gigabytes"),
    ("--swap-attention --swap-budget 0", "legal: auto, or gigabytes"),
    ("--swap-modules mlp", "--swap-modules has no meaning without --swap-attention"),
    ("--swap-budget 4", "--swap-budget has no meaning without --swap-attention or --swap-layer-input"),
    ("--swap-layer-input", "--swap-layer-input has a meaning with --recompute-granularity full only"),
    ("--recompute-granularity full", "full needs --recompute-method and --recompute-num-layers; try"),
    ("--recompute-granularity full --recompute-method uniform", "full needs --recompute-method and"),
    (f"--swap-attention {FULL} uniform", "legal: --swap-layer-input, or --recompute-method block"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(plan, words, said):
    with pytest.raises(UserError) as refused:
        plan(words)
    (line,) = [line for line in str(refused.value).splitlines() if said in line]
    assert line


@pytest.mark.parametrize("words", [
    "--swap-attention", f"--swap-layer-input {FULL} uniform", f"--swap-attention --swap-layer-input {FULL} block",
    "--swap-attention --recompute-granularity selective", "--swap-attention --lora-r 4",
])  # fmt: skip
def test_what_goes_together_is_planned(plan, words):
    assert plan(f"{words} --swap-budget 40").config.memory.swap_budget == "40"


def test_the_dry_run_says_what_goes(plan, capsys, monkeypatch):
    from mindspeed_llm.plan.show import show_plan

    monkeypatch.setattr(activations, "SMALL_BYTES", 0)
    swapping = plan("--swap-attention --swap-modules mlp")
    show_plan(swapping)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    found = plan_memory(swapping)
    assert found.swapped > 0
    assert f"swapped to the host {found.swapped / 2**20:.1f} MiB of what mlp save" in shown
    assert "if that transfers while layers compute" in shown
    without = plan_memory(plan(""))
    assert without.swapped == 0 and without.activations == found.activations + found.swapped


def estimated(**changes):
    arguments = dict(
        padded_vocab=1009, dtype_bytes=4, adapter_parameters=0, tokens_per_microbatch=TOKENS, micro_batches=1,
        sequence_parallel=False, distributed_optimizer=False, recompute=None, loss_chunk=TOKENS,
    )  # fmt: skip
    return estimate(SHAPE, ParallelLayout(layer_map(SHAPE.num_layers, 1, None), 1), **arguments | changes)


@pytest.mark.parametrize("modules", [ALL, ALL[:3], ("mlp",)], ids=len)
def test_the_estimate_is_what_lies_on_the_host(monkeypatch, request, modules):
    from mindspeed_llm.memory.allowance import UpToHostBytes
    from mindspeed_llm.memory.mapped_store import MappedStore
    from mindspeed_llm.memory.regions import install
    from mindspeed_llm.memory.swap import ActivationSwap
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.ops import registry
    from mindspeed_llm.parallel.setup import initialize_distributed

    initialize_distributed()
    ops.load_all()
    # The estimate is for attention without stored scores; "blocks" keeps them, on CPUs alone.
    registry.select("attention", "sdpa")
    request.addfinalizer(registry.reset)
    monkeypatch.setattr(activations, "SMALL_BYTES", 0)
    model = build_model(SHAPE, BuildOptions(padded_vocab_size=1009, loss_chunk_size=TOKENS))
    store = MappedStore()
    swap = ActivationSwap(store, UpToHostBytes(store, 10**9), model.parameters, small=4096)
    install(swap, [model], modules, layer_inputs=False)
    ids = torch.randint(0, 1009, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    layers = model.decoder.layers
    held = []
    layers[-1].register_forward_pre_hook(lambda *_: held.append(store.held))
    model(ids, labels=ids).backward()
    # While the last layer runs the one before it is still on its way: that is what the estimate calls away.
    away = held[0] * (SHAPE.num_layers - 2) / (SHAPE.num_layers - 1)
    said = estimated(swapping=Swapping(modules)).swapped
    assert away / FACTOR < said < away * FACTOR, (away, said)


def test_the_budget_and_small_tensors_bound_the_estimate(monkeypatch):
    assert estimated(swapping=Swapping(ALL)).swapped == 0  # no tensor of this toy has a megabyte
    monkeypatch.setattr(activations, "SMALL_BYTES", 0)
    everything = estimated(swapping=Swapping(ALL)).swapped
    assert estimated(swapping=Swapping(ALL, limit=everything // 2)).swapped == everything // 2
    assert estimated(swapping=Swapping(ALL, limit=2 * everything)).swapped == everything
    inputs = estimated(swapping=Swapping(layer_inputs=True), recompute="full")
    assert inputs.swapped == 6 * TOKENS * SHAPE.hidden_size * 4
    assert inputs.activations == estimated(recompute="full").activations - inputs.swapped
