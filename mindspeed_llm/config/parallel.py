"""Options of the parallel layout."""

from __future__ import annotations

from mindspeed_llm.config.hccl_groups import buffers_problem
from mindspeed_llm.config.schema import TRAINING_DOORS, above, at_least, option, section

CUTTING_DOORS = (*TRAINING_DOORS, "convert")
CP_ALGORITHMS = ("megatron_cp_algo", "ulysses_cp_algo", "hybrid_cp_algo")


def numbers(text: str | None) -> list[int] | None:
    """The whole numbers in text like "8,8,7,7"; None for None.

    Raises:
        ValueError: it is something else.
    """
    return None if text is None else [int(item) for item in text.split(",")]


def _are_numbers(text: str) -> str | None:
    try:
        numbers(text)
    except ValueError:
        return "legal: numbers like 8,8,7,7"
    return None


@section
class ParallelConfig:
    """How the model and the batch are spread over processes."""

    tensor_model_parallel_size: int = option(
        1, help="processes that share each matrix", check=at_least(1), also=("--tensor-parallel-size",)
    )
    pipeline_model_parallel_size: int = option(
        1, help="stages that share the layers", check=at_least(1), also=("--pipeline-parallel-size",)
    )
    sequence_parallel: bool = option(
        help="split activations between the matrices along the sequence too (needs tensor parallelism)",
        doors=TRAINING_DOORS,
    )
    use_distributed_optimizer: bool = option(
        help="split optimizer state over the data-parallel processes", doors=TRAINING_DOORS
    )
    use_torch_fsdp2: bool = option(
        help="split parameters, gradients and optimizer state over the data-parallel processes (torch's FSDP2); layers "
        "are gathered one at a time",
        doors=TRAINING_DOORS,
    )
    torch_fsdp2_reshard_after_forward: bool = option(
        True,
        help="with --use-torch-fsdp2: let a layer's parameters go after its forward pass and gather them again for the "
        "backward pass",
        off="--torch-fsdp2-no-reshard-after-forward",
        doors=TRAINING_DOORS,
        level="advanced",
    )
    overlap_grad_reduce: bool = option(
        help="reduce gradients while the backward pass runs", doors=TRAINING_DOORS, level="advanced"
    )
    overlap_param_gather: bool = option(
        help="gather updated parameters while the next forward pass runs (needs the distributed optimizer)",
        doors=TRAINING_DOORS,
        level="advanced",
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        help="layers of each model chunk; a stage then holds several chunks and idles less",
        check=at_least(1),
        level="advanced",
        doors=CUTTING_DOORS,
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        help="model chunks of each stage, another way to say the former",
        check=at_least(1),
        level="advanced",
        doors=CUTTING_DOORS,
    )
    account_for_embedding_in_pipeline_split: bool = option(
        help="count the embedding as a layer when the layers are split: the first stage gets one less",
        level="advanced",
        doors=CUTTING_DOORS,
    )
    account_for_loss_in_pipeline_split: bool = option(
        help="count the output layer as a layer when the layers are split: the last stage gets one less",
        level="advanced",
        doors=CUTTING_DOORS,
    )
    num_layer_list: str | None = option(
        help="layers per stage, e.g. 8,8,7,7", check=_are_numbers, level="advanced", doors=CUTTING_DOORS
    )
    noop_layers: str | None = option(
        help="positions of identity layers, e.g. 30,31, so that an awkward number of layers divides",
        check=_are_numbers,
        level="advanced",
        doors=CUTTING_DOORS,
    )
    context_parallel_size: int = option(
        1, help="processes that share each sequence", check=at_least(1), doors=TRAINING_DOORS
    )
    context_parallel_algo: str = option(
        "megatron_cp_algo",
        help="how they do: ring of keys and values, all-to-all over heads, or both",
        choices=CP_ALGORITHMS,
        doors=TRAINING_DOORS,
        level="advanced",
    )
    cp_window_size: int = option(
        1, help="ranks of an inner ring (double ring)", check=at_least(1), doors=TRAINING_DOORS, level="expert"
    )
    ulysses_degree_in_cp: int | None = option(
        help="hybrid_cp_algo: ranks that exchange heads; the rest of the context-parallel size is a ring",
        check=at_least(1),
        doors=TRAINING_DOORS,
        level="advanced",
    )
    expert_model_parallel_size: int = option(
        1, help="processes that share the experts of a layer", check=at_least(1), doors=TRAINING_DOORS
    )
    expert_tensor_parallel_size: int | None = option(
        help="processes that share each matrix of an expert; default: as the other matrices",
        check=at_least(1),
        doors=CUTTING_DOORS,
        level="advanced",
    )


@section
class RuntimeConfig:
    """The device and how numbers are stored on it."""

    bf16: bool = option(help="bf16 weights and activations; training keeps fp32 masters")
    fp16: bool = option(help="fp16 weights and activations; training keeps fp32 masters and scales the loss")
    fp32: bool = option(help="compute in fp32; default for inference: as the checkpoint", doors=("inference",))
    device: str = option("auto", help="where to compute", choices=("auto", "cpu", "cuda", "npu"), level="advanced")
    npu_deterministic: bool = option(
        help="Ascend: kernels and collectives sum in a fixed order, at some cost in speed", level="advanced"
    )
    hccl_group_buffer: str | None = option(
        help='Ascend: MB of HCCL\'s buffers by process group, e.g. "dp:200;tp:300;default:100"',
        check=buffers_problem,
        level="expert",
    )
    num_threads: int | None = option(
        help="CPU threads per process; default: OMP_NUM_THREADS, else cores / processes on this host (torchrun's own "
        "OMP_NUM_THREADS=1 does not count)",
        level="expert",
        check=at_least(1),
    )
    cpu_allocator: str = option(
        "system",
        help="on a CPU, leave freed memory to the C library, or keep it for the next tensors: faster for full "
        "tuning, at more memory (docs/benchmarks.md)",
        choices=("system", "keep"),
        level="expert",
        doors=TRAINING_DOORS,
    )
    distributed_timeout_minutes: float = option(
        10.0, help="how long a collective may take before the run ends", check=above(0), level="advanced"
    )
    hang_timeout: float | None = option(
        help="seconds after which a step that does not end is an error: it names the late ranks, shows their stacks "
        "and saves the last finished step; default: --distributed-timeout-minutes ends it, naming nobody",
        check=above(0),
        doors=TRAINING_DOORS,
    )
    exit_signal_handler: bool = option(
        True,
        help="with --save: on SIGTERM, SIGINT or SIGUSR1 finish the step, save and leave with status 0",
        level="advanced",
        doors=TRAINING_DOORS,
    )
