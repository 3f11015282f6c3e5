"""The memory estimate against what a toy model really allocates."""

import dataclasses

import pytest
import torch

from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layer_map import layer_map
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.plan.activations import OUTSIDE, RECOMPUTED
from mindspeed_llm.plan.memory import estimate, micro_batches_in_flight, parameters_by_stage
from mindspeed_llm.plan.trained import EVERYTHING, TrainedParts

SHAPE = ModelShape("llama", 4, 128, 320, 8, 4, 16, 1009, 256)
TOKENS = 256
FACTOR = 1.1
"""The activation estimate is right within this factor either way; the other parts are exact."""


def layout(shape=SHAPE, world=1, pp=1, vpp=None, **sizes):
    return ParallelLayout(layer_map(shape.num_layers, pp, vpp), world, **sizes)


def estimated(shape=SHAPE, where=None, **changes):
    arguments = dict(
        padded_vocab=1009, dtype_bytes=4, adapter_parameters=0, tokens_per_microbatch=TOKENS, micro_batches=1,
        sequence_parallel=False, distributed_optimizer=False, recompute=None, loss_chunk=TOKENS,
    )  # fmt: skip
    return estimate(shape, where or layout(shape), **arguments | changes)


def bytes_saved(model, ids):
    """Of floating-point tensors that wait for a backward pass, weights not counted; and the loss."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(ids, labels=ids)
    return sum(size for pointer, size in kept.items() if pointer not in weights), loss


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_exactly(tied):
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.parallel.setup import initialize_distributed

    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied, add_qkv_bias=True)
    initialize_distributed()
    model = build_model(shape, BuildOptions(initialize=False, padded_vocab_size=1009))
    parameters = sum(p.numel() for p in model.parameters())
    (whole,) = parameters_by_stage(shape, layout(shape), 1009)
    assert whole.dense == whole.total == parameters == shape.num_parameters()
    found = estimated(shape)
    assert (found.weights, found.gradients, found.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    half = estimated(shape, dtype_bytes=2, adapter_parameters=1000, trained=TrainedParts(frozen_base=True))
    assert (half.weights, half.gradients, half.optimizer) == (2 * (parameters + 1000), 4000, 12000)


@pytest.mark.parametrize(
    "recompute, trained",
    [
        (None, EVERYTHING),
        ("full", EVERYTHING),
        (None, TrainedParts(layers=frozenset({2, 3}))),
        ("full", TrainedParts(layers=frozenset({2, 3}))),
        (None, TrainedParts(frozen_layers=frozenset({0}))),
        (None, TrainedParts(freeze=("embedding", "layers.0", r"layers.1.*(qkv|layer_?norm)"))),
        (None, TrainedParts(trainable=("output_layer", "final_layernorm"))),
        (None, TrainedParts(freeze=("linear_fc",))),
    ],
)
def test_activations_are_right_within_a_factor(recompute, trained, request):
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.ops import registry
    from mindspeed_llm.parallel.setup import initialize_distributed

    initialize_distributed()
    # The estimate is for attention without stored scores; "blocks" keeps them, on CPUs alone.
    registry.select("attention", "sdpa")
    request.addfinalizer(registry.reset)
    more = dict(recompute_method="uniform", recompute_num_layers=1) if recompute else {}
    options = BuildOptions(padded_vocab_size=1009, recompute_granularity=recompute, loss_chunk_size=TOKENS, **more)
    model = build_model(SHAPE, options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.has(name))
    ids = torch.randint(0, 1009, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    held, loss = bytes_saved(model, ids)
    assert loss.isfinite()
    found = estimated(recompute=recompute, trained=trained)
    # at the end of the forward pass; while one layer is computed again, its tensors take the place of the loss's
    said = found.activations - found.parts.get(RECOMPUTED, 0)
    said += 0 if OUTSIDE in found.parts else estimated(trained=trained).parts[OUTSIDE]
    assert held / FACTOR < said < held * FACTOR, (held, said)


@pytest.mark.parametrize(
    "dropping", [dict(norm=4), dict(activation=4), dict(norm=2, activation=3)], ids=["norms", "activations", "both"]
)
def test_what_is_dropped_is_right_within_a_factor(dropping, request):
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.models.recompute_options import RecomputeOptions
    from mindspeed_llm.ops import registry
    from mindspeed_llm.parallel.setup import initialize_distributed
    from mindspeed_llm.testing.held import held_bytes

    initialize_distributed()
    registry.select("attention", "sdpa")
    request.addfinalizer(registry.reset)
    ids = torch.randint(0, 1009, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def held(options):
        model = build_model(SHAPE, BuildOptions(padded_vocab_size=1009, loss_chunk_size=TOKENS, recompute=options))
        return held_bytes(lambda: model(ids, labels=ids), model.parameters())[1]

    options = RecomputeOptions(**dropping)
    freed = held(RecomputeOptions()) - held(options)
    # When a layer's share comes back for its backward pass, what the loss saved is gone, which is more.
    said = estimated().activations - estimated(dropping=options).activations
    assert freed / FACTOR < said < freed * FACTOR, (freed, said)


def test_layouts_share():
    whole = estimated()
    tensor = layout(world=2, tp=2)
    assert estimated(where=tensor, padded_vocab=1010).weights < 0.51 * whole.weights
    data = layout(world=4)
    assert estimated(where=data, distributed_optimizer=True).optimizer == pytest.approx(whole.optimizer / 4, rel=1e-6)
    assert estimated(where=data).optimizer == whole.optimizer
    context = layout(world=4, cp=4)
    assert estimated(where=context, distributed_optimizer=True).optimizer == pytest.approx(whole.optimizer / 4, 1e-6)
    assert estimated(where=context).activations < 0.5 * whole.activations
    assert estimated(recompute="full").activations < 0.6 * whole.activations
    cut = estimated(where=tensor, padded_vocab=1010)
    shared = estimated(where=tensor, padded_vocab=1010, sequence_parallel=True)
    assert shared.activations < cut.activations < whole.activations


MOE = dataclasses.replace(
    SHAPE, family="qwen_moe", num_moe_experts=8, moe_ffn_hidden_size=64, moe_layers=(1, 2, 3), qk_layernorm=True
)
LATENT = dataclasses.replace(
    SHAPE, family="deepseek", kv_channels=24, num_query_groups=8, multi_latent_attention=True, q_lora_rank=32,
    kv_lora_rank=16, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=12, mtp_num_layers=1, num_moe_experts=8,
    moe_ffn_hidden_size=64, moe_layers=(2, 3), moe_shared_expert_intermediate_size=64,
)  # fmt: skip


@pytest.mark.parametrize("shape", [SHAPE, MOE, LATENT], ids=["dense", "experts", "latent"])
def test_the_parts_of_all_devices_are_the_model(shape):
    (whole,) = parameters_by_stage(shape, layout(shape), 1009)
    assert whole.total == shape.num_parameters()
    if shape.num_moe_experts is None:
        return
    shared = layout(shape, 16, pp=2, tp=2, ep=4, etp=1)
    stages = parameters_by_stage(shape, shared, 1010)
    assert sum(stage.expert for stage in stages) * 4 == whole.expert
    assert stages[1].expert > stages[0].expert  # the first layers have none
    found = estimated(shape, where=shared, padded_vocab=1010, distributed_optimizer=True)
    # Dense state is shared by 4 data-parallel ranks, that of the experts by its 2 replicas.
    here = stages[found.stage]
    assert found.optimizer == int(8 * (here.dense / 4 + here.expert / 2))


def test_the_first_stage_holds_the_most_micro_batches():
    four = layout(pp=4, world=4)
    assert [micro_batches_in_flight(four, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert micro_batches_in_flight(four, 0, 2) == 2
    # Rank 0 of 2 stages x 2 chunks runs 2 + 2 + 1 forward passes of a chunk before its first backward pass.
    assert micro_batches_in_flight(layout(pp=2, vpp=2, world=2), 0, 8) == 2.5


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_what_dropout_of_adapters_saves_is_counted(family, tmp_path, request):
    from mindspeed_llm.checkpoint.toy import make_toy
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.ops import registry
    from mindspeed_llm.plan.plan import resolve
    from mindspeed_llm.plan.show import plan_memory
    from mindspeed_llm.training.setup import build, start_processes

    request.addfinalizer(registry.reset)
    directory = make_toy(family, tmp_path / family)

    def saved(*words):
        words = ["--load", str(directory), "--data-path", "none", "--seq-length", "64", "--lora-r", "4", *words]
        parsed = parse("posttrain", words)
        plan = resolve(parsed.config, parsed.problems)
        start_processes(plan)
        registry.select("attention", "sdpa")
        (model,) = build(plan).chunks
        ids = torch.randint(0, plan.shape.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
        held, _ = bytes_saved(model, ids)
        return held, plan_memory(plan).activations

    plain, dropping = saved(), saved("--lora-dropout", "0.1")
    rise, said = dropping[0] - plain[0], dropping[1] - plain[1]
    assert rise > plain[0] / 10
    assert rise / FACTOR < said < rise * FACTOR, (rise, said)
