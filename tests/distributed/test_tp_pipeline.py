"""Pipeline stages, evenly or unevenly filled, compute the same function as one rank, with tied embeddings too."""

import dataclasses

import pytest
import torch

from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.testing.pool import pool

pytestmark = pytest.mark.distributed

QWEN3 = ModelShape(
    "qwen3", 4, 48, 80, 6, 2, 12, 131, 256, init_method_std=0.1, qk_layernorm=True, tie_word_embeddings=True
)
UNTIED = dataclasses.replace(QWEN3, tie_word_embeddings=False)


def train(shape, stages, packed, virtual=None):
    """Two SGD steps of two micro-batches: the losses the last stage sees, and all gradients by their global names."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.models.initialize import global_name
    from mindspeed_llm.parallel.layer_map import layer_map
    from mindspeed_llm.parallel.setup import initialize_distributed

    size = len(stages) // (virtual or 1)
    initialize_distributed(pipeline_parallel_size=size, virtual_pipeline_parallel_size=virtual)
    options = BuildOptions(
        pipeline_parallel_size=size,
        virtual_pipeline_parallel_size=virtual,
        layers=layer_map(4, size, virtual, None if virtual or size == 1 else stages),
        vocab_divisible_by=2,
    )
    chunks = [build_model(shape, options, vp_stage=stage) for stage in (range(virtual) if virtual else [None])]
    wrapped = [DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    documents = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens) if packed else None

    def forward_step(data, chunk):
        ids, labels = next(data)
        loss = chunk(ids, labels=labels, packed_seq_params=documents)
        return loss, lambda loss_sum: (loss_sum, (labels != -100).sum().int(), {"loss": loss_sum.detach()})

    losses = []
    for _ in range(2):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        generator = torch.Generator().manual_seed(3)
        data = [(torch.randint(0, 131, (1, 12), generator=generator),) * 2 for _ in range(2)]
        data[1][1][:, 4:] = -100  # labels are the same tensor as the ids
        data = [(ids.clamp_min(0), labels) for ids, labels in data]
        reduced = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(data) for _ in chunks] if virtual else iter(data),
            model=wrapped,
            num_microbatches=2,
            seq_length=12,
            micro_batch_size=1,
        )
        losses.append(sum(float(part["loss"]) for part in reduced))
        with torch.no_grad():
            for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
                parameter -= 0.5 * parameter.main_grad
    rank = parallel_state.get_pipeline_model_parallel_rank()
    gradients = {
        global_name(name, chunk.config, chunk.vp_stage, rank): parameter.main_grad.clone()
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }
    return losses, gradients


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [QWEN3, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("stages, virtual", [((2, 2), None), ((1, 3), None), ((1, 1, 1, 1), 2)])
def test_two_stages_train_as_one(stages, virtual, shape, packed):
    ((losses, expected),) = pool(1).run(train, shape, (4,), packed)
    (none, first), (found, second) = pool(2).run(train, shape, stages, packed, virtual)
    assert none == [0, 0]
    assert found == pytest.approx(losses, rel=1e-5) and losses[1] < losses[0]
    if shape.tie_word_embeddings:
        assert torch.equal(first["embedding.word_embeddings.weight"], second.pop("output_layer.weight"))
    assert not first.keys() & second.keys() and (first | second).keys() == expected.keys()
    for name, gradient in (first | second).items():
        assert float((gradient - expected[name]).abs().max() / expected[name].abs().max()) < 1e-5, name
