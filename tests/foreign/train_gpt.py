"""A Megatron program as others write them: CUDA everywhere, Transformer Engine's layers, its own training loop.

It prints the loss of every step; `--impl local` takes megatron's own layers. Written for these tests.
"""

import mindspeed_llm.megatron_adaptor  # noqa: F401  isort: skip

import argparse
import os

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY, LENGTH, MICRO_BATCHES, STEPS = 64, 16, 2, 4


@torch.jit.script
def mean_where(loss: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (loss * mask).sum() / mask.sum()


def start(tensor_parallel_size: int) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.distributed.init_process_group(
        backend="nccl", rank=rank, world_size=world, device_id=torch.device("cuda", rank % torch.cuda.device_count())
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel_size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    options = torch.distributed.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    group = torch.distributed.new_group(backend="nccl", pg_options=options)
    probe = torch.ones(1, device="cuda")
    torch.distributed.all_reduce(probe, group=group)
    assert probe.item() == world and probe.is_cuda and probe.type() == "torch.cuda.FloatTensor"


def build(impl: str, tensor_parallel_size: int) -> DistributedDataParallel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=True,
        masked_softmax_fusion=True,
        gradient_accumulation_fusion=True,
        tensor_model_parallel_size=tensor_parallel_size,
        sequence_parallel=tensor_parallel_size > 1,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
    )
    make = {"local": get_gpt_layer_local_spec, "transformer_engine": get_gpt_layer_with_transformer_engine_spec}[impl]
    spec = make() if impl == "transformer_engine" else make(normalization="RMSNorm")
    model = GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type="rope").cuda()
    assert all(parameter.is_cuda for parameter in model.parameters())
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=False)
    config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(config, settings, model)


def batches():
    generator = torch.Generator(device="cuda")
    generator.manual_seed(5 + parallel_state.get_data_parallel_rank())
    while True:
        first = torch.randint(0, VOCABULARY, (2, 1), generator=generator, device="cuda")
        tokens = (first + torch.arange(LENGTH + 1).pin_memory().cuda(non_blocking=True)) % VOCABULARY
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def forward(data, model):
    torch.cuda.nvtx.range_push("forward")
    tokens, labels = next(data)
    positions = torch.arange(LENGTH, device=torch.cuda.current_device())[None]
    mask = torch.ones(LENGTH, LENGTH, device="cuda").triu(1).bool()[None, None]
    loss = model(tokens, positions, mask, labels=labels)
    torch.cuda.nvtx.range_pop()

    def reduce(output):
        mean = mean_where(output.float(), torch.ones_like(output, dtype=torch.float))
        return mean, {"loss": mean.detach().clone()}

    return loss, reduce


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--impl", default="transformer_engine")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--precision-aware", action="store_true")
    parser.add_argument("--clip-grad", type=float, default=1.0)
    arguments = parser.parse_args()
    start(arguments.tp)
    model = build(arguments.impl, arguments.tp)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.01,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            clip_grad=arguments.clip_grad,
            use_precision_aware_optimizer=arguments.precision_aware,
        ),
        [model],
    )
    data, run = batches(), get_forward_backward_func()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for step in range(STEPS):
        begin.record()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run(
            forward_step_func=forward,
            data_iterator=data,
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=2,
            forward_only=False,
        )
        updated, norm, _ = optimizer.step()
        end.record()
        torch.cuda.synchronize()
        assert updated and begin.elapsed_time(end) > 0
        mean = sum(each["loss"] for each in losses) / MICRO_BATCHES
        if torch.distributed.get_rank() == 0:
            print(f"step {step} loss {mean.item():.9f} memory {torch.cuda.memory_allocated() >= 0}", flush=True)
    optimizer.load_state_dict(optimizer.state_dict())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
