"""Options of what a run says and measures, and where it goes."""

from __future__ import annotations

from mindspeed_llm.config.schema import TRAINING_DOORS, above, at_least, option, section


@section
class LoggingConfig:
    """What a run says and where."""

    log_interval: int = option(1, help="write the log line every N iterations", check=at_least(1))
    log_throughput: bool = option(help="add throughput (TFLOP/s and share of the device's peak) to the log line")
    log_memory: bool = option(
        help="add the device's peak and the process's resident memory to the log line", level="advanced"
    )
    memory_report: bool = option(
        True,
        help="after the second iteration, print where each device's memory goes, predicted beside measured; "
        "no other iteration is touched",
        level="advanced",
    )
    metrics_jsonl: str | None = option(
        help="file for the figures of every log line, one JSON object a line; default: metrics.jsonl in --save",
        writes="file",
    )
    tensorboard_dir: str | None = option(help="directory for TensorBoard", writes="directory")
    wandb_project: str | None = option(help="send figures to this Weights & Biases project")
    wandb_exp_name: str | None = option(help="name of the run in --wandb-project")
    wandb_entity: str | None = option(help="user or team that --wandb-project belongs to", level="advanced")
    wandb_save_dir: str | None = option(
        help="directory for W&B's own files; default: wandb in --save, or the working directory",
        level="advanced",
        writes="directory",
    )
    swanlab_project: str | None = option(help="send figures to this SwanLab project")
    swanlab_exp_name: str | None = option(help="name of the run in --swanlab-project")
    swanlab_workspace: str | None = option(help="user or team that --swanlab-project belongs to", level="advanced")
    swanlab_save_dir: str | None = option(
        help="directory for SwanLab's own files; default: swanlab in --save, or the working directory",
        level="advanced",
        writes="directory",
    )
    log_params_norm: bool = option(help="log the norm of all parameters", level="advanced")
    log_num_zeros_in_grad: bool = option(help="log how many elements of the gradient are zero", level="advanced")
    log_layer_norms: bool = option(
        help="log norms of gradients and weights of every layer, the embedding and the output layer", level="advanced"
    )
    log_local_norms: bool = option(
        help="log every rank's own loss and the norm of its own gradient, before they are reduced", level="advanced"
    )
    log_expert_load: bool = option(help="log how many tokens every expert of every layer gets", level="advanced")
    log_max_attention_logit: bool = option(
        help="log the largest attention score of every layer (computed once more for it)", level="advanced"
    )
    log_timing: bool = option(
        help="log minimum, median and maximum over all ranks of step, compute, communication and data time",
        level="advanced",
    )
    straggler_threshold: float | None = option(
        help="name a rank whose own compute time is more than X times the median of all ranks",
        level="advanced",
        check=above(1),
    )
    straggler_window: int = option(
        10, help="iterations over which --straggler-threshold compares", level="advanced", check=at_least(1)
    )
    show_samples: int = option(0, help="print N training samples with the trained tokens coloured", check=at_least(0))
    progress: str = option(
        "auto",
        help="progress bar instead of log lines on a terminal",
        choices=("auto", "bar", "lines"),
        level="advanced",
    )
    loss_curve: str | None = option(help="write the loss curve to this PNG file", level="advanced", writes="file")
    dry_run: bool = option(
        help="print the plan and exit: sizes, layout, batches, memory, legal values",
        doors=("preprocess", "convert", *TRAINING_DOORS, "inference"),
    )
    world_size: int | None = option(
        help="with --dry-run: plan for this many processes; default: as many as were started",
        check=at_least(1),
        level="advanced",
    )
    check_rank: int | None = option(
        help="with --dry-run: also build this rank's part of the model without memory, and step a small model of the "
        "same layout with pretended communication",
        check=at_least(0),
        level="advanced",
    )
