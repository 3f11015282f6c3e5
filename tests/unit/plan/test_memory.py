"""The memory estimate against what a toy model really allocates."""

import dataclasses

import pytest
import torch

from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.memory import estimate, parameters_per_device

SHAPE = ModelShape("llama", 4, 128, 320, 8, 4, 16, 1009, 256)
TOKENS = 256
FACTOR = 1.1
"""The activation estimate is right within this factor either way; the other parts are exact."""


def estimated(shape=SHAPE, **changes):
    arguments = dict(
        tp=1, pp=1, dp=1, padded_vocab=1009, dtype_bytes=4, trainable_share=1.0, tokens_per_microbatch=TOKENS,
        micro_batches=1, sequence_parallel=False, distributed_optimizer=False, recompute=None, loss_chunk=TOKENS,
    )  # fmt: skip
    return estimate(shape, **arguments | changes)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_exactly(tied):
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.parallel.setup import initialize_distributed

    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied, add_qkv_bias=True)
    initialize_distributed()
    model = build_model(shape, BuildOptions(initialize=False, padded_vocab_size=1009))
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters_per_device(shape, tp=1, pp=1, padded_vocab=1009) == parameters == shape.num_parameters()
    found = estimated(shape)
    assert (found.weights, found.gradients, found.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    half = estimated(shape, dtype_bytes=2, trainable_share=0.5)
    assert half.weights == 2 * parameters
    assert half.optimizer == pytest.approx(12 * parameters / 2, rel=1e-5)


@pytest.mark.parametrize("recompute", [None, "full"])
def test_activations_are_right_within_a_factor(recompute, request):
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
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 1009, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(ids, labels=ids)
    held = sum(size for pointer, size in kept.items() if pointer not in weights)
    assert loss.isfinite()
    # logits live in the loss alone, and while one layer is computed again its tensors come on top
    logits = TOKENS * 1009 * 4 * 2
    said = estimated(recompute=recompute).activations - logits
    if recompute:
        said -= (estimated().activations - logits) / SHAPE.num_layers
    assert held / FACTOR < said < held * FACTOR, (held, said)


def test_layouts_share():
    whole = estimated()
    assert estimated(tp=2, padded_vocab=1010).weights < 0.51 * whole.weights
    assert estimated(dp=4, distributed_optimizer=True).optimizer == pytest.approx(whole.optimizer / 4, rel=1e-6)
    assert estimated(dp=4).optimizer == whole.optimizer
    assert estimated(recompute="full").activations < 0.6 * whole.activations
    assert estimated(tp=2, sequence_parallel=True).activations < estimated(tp=2).activations < whole.activations
