"""Options of loading, saving and what a resume may change."""

from __future__ import annotations

from mindspeed_llm.config.schema import TRAINING_DOORS, StepsOrMinutes, at_least, option, section


@section
class CheckpointConfig:
    """Where weights come from and go to."""

    load: str | None = option(help="HF directory, Megatron checkpoint, a directory written by --save, or a hub name")
    save: str | None = option(help="directory for checkpoints", doors=TRAINING_DOORS, writes="directory")
    save_interval: StepsOrMinutes | None = option(
        help="save every N iterations, or as 30m every so many minutes; default: at the end",
        check=StepsOrMinutes.problem,
        metavar="N|Nm",
        doors=TRAINING_DOORS,
    )
    keep_last: int | None = option(
        help="keep the newest N checkpoints of --save (and always the tracker's and the newest healthy one)",
        check=at_least(1),
        doors=TRAINING_DOORS,
    )
    auto_resume: bool = option(
        help="when --save holds a checkpoint of this run, go on from it; --load, --finetune, --no-load-optim and "
        "--no-load-rng are for the first start. Implied when torchrun starts the run again",
        doors=TRAINING_DOORS,
    )
    load_healthy: bool = option(
        help="resume from the newest checkpoint that the guards marked healthy", level="advanced", doors=TRAINING_DOORS
    )
    verify_checkpoint: str = option(
        "load",
        help="compare checksums with the manifest: of what a run loads, of what it saved by reading it back, of both. "
        "Names and sizes are always compared",
        choices=("off", "load", "save", "both"),
        level="advanced",
        doors=TRAINING_DOORS,
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
    async_save: bool = option(
        help="write checkpoints beside training, from a copy of each process's part in host memory",
        doors=TRAINING_DOORS,
    )
    trust_checkpoint: bool = option(
        help="resume from a checkpoint whose objects are more than tensors and plain values; loading them runs the "
        "code they name",
        level="expert",
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
    save_hf_each_checkpoint: bool = option(
        help="with --save-hf: renew that directory after every checkpoint, beside training",
        level="advanced",
        doors=TRAINING_DOORS,
    )
    hub: str = option(
        "hf",
        help="where a hub name is looked up",
        choices=("hf", "modelscope"),
        level="advanced",
        doors=(*TRAINING_DOORS, "inference", "convert"),
    )
