"""Tensor parallelism (and sequence parallelism) computes the same function as one rank."""

import dataclasses

import pytest
import torch

from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.testing.pool import pool

# Groups < heads, head_dim != hidden / heads, 4 layers, a vocabulary that 2 does not divide.
LLAMA = ModelShape("llama", 4, 48, 80, 6, 2, 12, 131, 256, init_method_std=0.1)
QWEN3 = dataclasses.replace(LLAMA, qk_layernorm=True, tie_word_embeddings=True)
BIASED = dataclasses.replace(
    LLAMA,
    normalization="LayerNorm",
    activation="gelu_pytorch_tanh",
    gated_linear_unit=False,
    add_qkv_bias=True,
    add_attention_output_bias=True,
    add_mlp_bias=True,
    window_size=5,
    window_layers=(1, 3),
)
LATENT = dataclasses.replace(
    LLAMA,
    family="deepseek",
    num_query_groups=6,
    kv_channels=20,
    multi_latent_attention=True,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_head_dim=12,
    qk_pos_emb_head_dim=8,
    v_head_dim=10,
    rotary_interleaved=True,
)
SHAPES = {"llama": LLAMA, "qwen3": QWEN3, "biased": BIASED, "latent": LATENT}


def batch():
    """Two rows of 12 tokens with 10 and 3 labels."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 131, (2, 12), generator=generator)
    labels = torch.randint(0, 131, (2, 12), generator=generator)
    labels[0, :2] = -100
    labels[1, 3:] = -100
    return ids, labels


def _build(shape, tp, sequence_parallel):
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.parallel.setup import initialize_distributed

    initialize_distributed(tensor_parallel_size=tp)
    options = BuildOptions(tensor_parallel_size=tp, sequence_parallel=sequence_parallel, vocab_divisible_by=2)
    return build_model(shape, options)


def _gathered(tensors, shape):
    """Name -> unsharded tensor, from this rank's tensors."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from mindspeed_llm.models import layouts

    group = parallel_state.get_tensor_model_parallel_group()
    whole = {}
    for name, tensor in tensors.items():
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        if layouts.layout_of(name).tp_dim is None:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
        whole[name] = layouts.unshard(parts, name, shape).clone()
    return whole


def train(shape, tp, sequence_parallel, mutation=None):
    """Three SGD steps; initial weights, losses per step, gradients of the last step, all gathered."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    model = _build(shape, tp, sequence_parallel)
    if mutation == "norm gradients are not summed over sequence shards":
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.sequence_parallel = False
    initial = _gathered({name: p.detach() for name, p in model.named_parameters()}, shape)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    ids, labels = batch()
    rank, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    ids, labels = ids.chunk(replicas)[rank], labels.chunk(replicas)[rank]
    losses = []
    for _ in range(3):
        wrapped.zero_grad_buffer()
        loss = wrapped(ids, labels=labels)
        loss.backward()
        tokens = (labels != -100).sum().int()
        totals = torch.stack((loss.detach().double(), tokens.double()))
        torch.distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        losses.append(float(totals[0] / totals[1]))
        finalize_model_grads([wrapped], tokens)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.main_grad
    gradients = _gathered({name: p.main_grad for name, p in model.named_parameters()}, shape)
    return initial, losses, gradients


def worst(gradients, expected):
    """Largest max|d| / max|g| over the tensors."""
    assert gradients.keys() == expected.keys()
    return max(
        float((gradients[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12))
        for name in expected
        if expected[name].abs().max() > 1e-7
    )


@pytest.fixture(scope="module")
def one_rank():
    return {name: pool(1).run(train, shape, 1, False)[0] for name, shape in SHAPES.items()}


@pytest.mark.parametrize("tp, sequence_parallel", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("family", SHAPES)
def test_two_ranks_train_as_one(one_rank, family, tp, sequence_parallel):
    initial, losses, gradients = one_rank[family]
    for found_initial, found_losses, found_gradients in pool(2).run(train, SHAPES[family], tp, sequence_parallel):
        assert all(torch.equal(found_initial[name], initial[name]) for name in initial)
        assert found_losses == pytest.approx(losses, rel=1e-5)
        # Of the third step: the weights differ by rounding by then, see testing.layouts.Difference.
        assert worst(found_gradients, gradients) < 3e-5
    assert losses[2] < losses[0]


def test_the_comparison_notices_a_dropped_reduction(one_rank):
    with pytest.raises(AssertionError, match="differs between ranks"):
        pool(2).run(train, LLAMA, 2, True, "norm gradients are not summed over sequence shards")


def loss_and_gradient(shape, tp):
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.parallel.setup import initialize_distributed

    initialize_distributed(tensor_parallel_size=tp)
    model = build_model(shape, BuildOptions(tensor_parallel_size=tp, vocab_divisible_by=128))
    ids, labels = batch()
    loss = model(ids % 100, labels=torch.where(labels < 0, labels, labels % 100))
    loss.backward()
    rows = model.output_layer.weight.shape[0]
    return float(loss), model.decoder.layers[0].mlp.linear_fc2.weight.grad.norm() ** 2, rows


def test_a_rank_whose_whole_slice_is_padding_takes_part():
    shape = dataclasses.replace(LLAMA, vocab_size=100)
    ((loss, norm, _),) = pool(1).run(loss_and_gradient, shape, 1)
    first, second = pool(2).run(loss_and_gradient, shape, 2)
    assert first[2] == second[2] == 128  # the second rank's rows start behind the vocabulary
    assert first[0] == second[0] == pytest.approx(loss, rel=1e-5)
    assert float(first[1] + second[1]) == pytest.approx(float(norm), rel=1e-4)


def logits(shape, tp, sequence_parallel, gather):
    model = _build(shape, tp, sequence_parallel)
    with torch.no_grad():
        return model(batch()[0], gather_logits=gather)


def test_gathered_logits_have_the_true_vocabulary_and_local_ones_mask_the_padding():
    (expected,) = pool(1).run(logits, LLAMA, 1, False, True)
    assert expected.shape == (2, 12, 131)
    for gathered in pool(2).run(logits, LLAMA, 2, False, True):
        torch.testing.assert_close(gathered, expected, rtol=1e-5, atol=1e-5)
    first, second = pool(2).run(logits, LLAMA, 2, True, False)
    local = torch.cat((first, second), -1)
    torch.testing.assert_close(local[..., :131], expected, rtol=1e-5, atol=1e-5)
    assert (local[..., 131:] == float("-inf")).all() and local.shape[-1] == 132


def save(shape, directory):
    from megatron.core import dist_checkpointing

    model = _build(shape, 2, True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
        loss = model(batch()[0], labels=batch()[1])
    dist_checkpointing.save(model.sharded_state_dict(), directory)
    return float(loss)


def load(shape, directory):
    from megatron.core import dist_checkpointing

    model = _build(shape, 1, False)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), directory))
    with torch.no_grad():
        return float(model(batch()[0], labels=batch()[1]))


@pytest.mark.parametrize("family", ["qwen3", "biased"])
def test_a_checkpoint_of_two_ranks_loads_on_one(family, tmp_path):
    saved = pool(2).run(save, SHAPES[family], str(tmp_path))[0]
    (loaded,) = pool(1).run(load, SHAPES[family], str(tmp_path))
    assert loaded == pytest.approx(saved, rel=1e-6)


def reject(shape):
    return _build(shape, 2, False)


def test_a_shape_that_cannot_be_cut_is_refused():
    from mindspeed_llm.errors import UserError

    with pytest.raises(UserError, match="num_query_groups=3"):
        pool(2).run(reject, dataclasses.replace(LLAMA, num_query_groups=3))
