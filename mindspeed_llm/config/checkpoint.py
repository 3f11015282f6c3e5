"""Options of loading, saving and what a resume may change."""

from __future__ import annotations

from mindspeed_llm.config.schema import TRAINING_DOORS, at_least, option, section


@section
class CheckpointConfig:
    """Where weights come from and go to."""

    load: str | None = option(help="HF directory, Megatron checkpoint, a directory written by --save, or a hub name")
    save: str | None = option(help="directory for checkpoints", doors=TRAINING_DOORS)
    save_interval: int | None = option(
        help="save every N iterations; default: at the end", check=at_least(1), doors=TRAINING_DOORS
    )
    ckpt_step: int | None = option(
        help="load this iteration instead of the latest", level="advanced", check=at_least(0)
    )
    finetune: bool = option(
        help="take only the weights of --load: iteration, optimizer and data position start at 0", doors=TRAINING_DOORS
    )
    no_load_optim: bool = option(help="do not load optimizer state", level="advanced", doors=TRAINING_DOORS)
    no_load_rng: bool = option(help="do not load random states", level="advanced", doors=TRAINING_DOORS)
    no_save_optim: bool = option(
        help="save no optimizer state: the checkpoint cannot be resumed, only tuned from",
        level="advanced",
        doors=TRAINING_DOORS,
    )
    allow_random_init: bool = option(
        help="start from random weights when --load holds nothing", level="advanced", doors=TRAINING_DOORS
    )
    allow_change: list[str] | None = option(
        help="options whose change on resume is intended, e.g. global-batch-size",
        level="advanced",
        doors=TRAINING_DOORS,
    )
    save_hf: bool = option(help="write the final model as a Hugging Face directory too", doors=TRAINING_DOORS)
    hub: str = option(
        "hf",
        help="where a hub name is looked up",
        choices=("hf", "modelscope"),
        level="advanced",
        doors=(*TRAINING_DOORS, "inference", "convert"),
    )


@section
class LoggingConfig:
    """What a run says and where."""

    log_interval: int = option(1, help="write the log line every N iterations", check=at_least(1))
    log_throughput: bool = option(help="add throughput (TFLOP/s and share of the device's peak) to the log line")
    tensorboard_dir: str | None = option(help="directory for TensorBoard")
    show_samples: int = option(0, help="print N training samples with the trained tokens coloured", check=at_least(0))
    progress: str = option(
        "auto",
        help="progress bar instead of log lines on a terminal",
        choices=("auto", "bar", "lines"),
        level="advanced",
    )
    loss_curve: str | None = option(help="write the loss curve to this PNG file", level="advanced")
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
