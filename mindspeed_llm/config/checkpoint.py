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
