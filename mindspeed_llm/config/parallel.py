"""Options of the parallel layout."""

from __future__ import annotations

from mindspeed_llm.config.schema import TRAINING_DOORS, above, at_least, option, section


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
    overlap_grad_reduce: bool = option(
        help="reduce gradients while the backward pass runs", doors=TRAINING_DOORS, level="advanced"
    )
    overlap_param_gather: bool = option(
        help="gather updated parameters while the next forward pass runs (needs the distributed optimizer)",
        doors=TRAINING_DOORS,
        level="advanced",
    )


@section
class RuntimeConfig:
    """The device and how numbers are stored on it."""

    bf16: bool = option(help="bf16 weights and activations; training keeps fp32 masters")
    fp16: bool = option(help="fp16 weights and activations; training keeps fp32 masters and scales the loss")
    fp32: bool = option(help="compute in fp32; default for inference: as the checkpoint", doors=("inference",))
    device: str = option("auto", help="where to compute", choices=("auto", "cpu", "cuda"), level="advanced")
    num_threads: int | None = option(
        help="CPU threads per process; default: cores / processes on this host", level="expert", check=at_least(1)
    )
    distributed_timeout_minutes: float = option(
        10.0, help="how long a collective may take before the run ends", check=above(0), level="advanced"
    )
