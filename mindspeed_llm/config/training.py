"""Options of the training run: batches, precision, length, evaluation, what is trained."""

from __future__ import annotations

from mindspeed_llm.config.schema import TRAINING_DOORS, above, at_least, option, section, share


@section
class TrainingConfig:
    """How much is trained, on which batches, in which precision."""

    stage: str = option(
        "sft", help="what kind of post-training", doors=("posttrain",), choices=("sft",), kind="continuity"
    )
    micro_batch_size: int = option(
        1, help="samples (prompts) per forward pass", check=at_least(1), doors=(*TRAINING_DOORS, "inference")
    )
    global_batch_size: int | None = option(
        help="samples per optimizer step over all processes; default: micro-batch size x data-parallel size",
        kind="continuity",
        check=at_least(1),
    )
    train_iters: int | None = option(help="optimizer steps", check=at_least(1))
    train_epochs: float | None = option(help="passes over the training data instead of --train-iters", check=above(0))
    train_samples: int | None = option(
        help="samples to train on instead of --train-iters", level="advanced", check=at_least(1)
    )
    exit_interval: int | None = option(
        help="stop after iterations divisible by N, with a checkpoint", level="advanced", check=at_least(1)
    )
    exit_duration_in_mins: float | None = option(
        help="stop after so many minutes of training, with a checkpoint", level="advanced", check=above(0)
    )
    eval_interval: int | None = option(help="evaluate every N iterations; default: at the end", check=at_least(1))
    eval_iters: int = option(10, help="global batches per evaluation; 0 for none", check=at_least(0))
    eval_only: bool = option(help="evaluate the loaded model on the validation split and exit")
    trainable: list[str] | None = option(
        help="regular expressions: only matching parameters are trained", level="advanced"
    )
    freeze: list[str] | None = option(help="regular expressions: matching parameters are frozen", level="advanced")
    trainable_layers: str | None = option(
        help="train only these layers, e.g. last:4, first:2 or 3,5,7", level="advanced"
    )
    frozen_layers: str | None = option(help="freeze these layers, e.g. first:20", level="advanced")
    padding_free: bool = option(
        True,
        help="SFT: join the samples of a micro-batch in one row with isolated documents instead of padding each",
        level="advanced",
        doors=("posttrain",),
    )
    pad_to_seq_length: bool = option(
        help="SFT without joining: pad to --seq-length instead of the longest sample of the micro-batch",
        level="advanced",
        doors=("posttrain",),
    )
    pad_to_multiple_of: int | None = option(
        help="round lengths up to a multiple of this; default: what the layout needs",
        level="advanced",
        check=at_least(1),
    )
    reset_attention_mask: bool = option(
        help="pre-training: documents of one sample do not see each other (packed SFT data always isolates)",
        level="advanced",
        also=("--reset-position-ids",),
        kind="continuity",
    )
    mtp_loss_scaling_factor: float = option(
        0.1,
        help="weight of the mean loss of the multi-token prediction layers beside the model's own",
        level="advanced",
        kind="continuity",
        check=at_least(0),
    )
    no_shuffle: bool = option(help="keep the order of the data", level="advanced", kind="continuity")


@section
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float | None = option(help="peak learning rate; default 1e-4 (1e-5 for full fine-tuning)", check=above(0))
    min_lr: float = option(0.0, help="learning rate at the end of the decay", check=at_least(0))
    lr_decay_style: str = option(
        "cosine", help="shape of the decay", choices=("cosine", "linear", "constant", "inverse-square-root", "WSD")
    )
    lr_decay_iters: int | None = option(
        help="iterations until --min-lr; default: --train-iters", level="advanced", check=at_least(1)
    )
    lr_warmup_fraction: float | None = option(help="share of the decay iterations that warms up", check=share)
    lr_warmup_iters: int = option(0, help="iterations of warm-up", check=at_least(0))
    lr_warmup_init: float = option(0.0, help="learning rate at the first step", level="expert", check=at_least(0))
    lr_wsd_decay_style: str = option(
        "exponential",
        help="decay of the WSD schedule",
        level="advanced",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = option(
        help="iterations of the WSD schedule's decay; default: a tenth", level="advanced", check=at_least(1)
    )
    weight_decay: float = option(0.01, help="decay of matrices; norms and biases have none", check=at_least(0))
    optimizer_selection: str = option(
        "fused_adamw",
        help="step of AdamW: the best kernel of the device, torch's fused kernel, or the plain formula",
        level="advanced",
        choices=("fused_adamw", "fused_torch_adamw", "adamw"),
    )
    o2_optimizer: bool = option(
        help="keep both moments in bf16, computed in fp32 and rounded; changes results, best with --adam-beta2 0.95",
        level="advanced",
        kind="continuity",
    )
    adam_beta1: float = option(0.9, help="decay of the first moment", level="advanced", check=at_least(0))
    adam_beta2: float = option(0.999, help="decay of the second moment", level="advanced", check=at_least(0))
    adam_eps: float = option(1e-8, help="epsilon of AdamW", level="advanced", check=above(0))
    clip_grad: float = option(1.0, help="gradient norm is clipped to this; 0 for no clipping", check=at_least(0))
    loss_scale: float | None = option(help="static loss scale (fp16)", level="expert", check=above(0))
    initial_loss_scale: float = option(2.0**32, help="first dynamic loss scale (fp16)", level="expert", check=above(0))
    min_loss_scale: float = option(1.0, help="smallest dynamic loss scale (fp16)", level="expert", check=above(0))
    loss_scale_window: int = option(1000, help="steps before the loss scale grows", level="expert", check=at_least(1))
    hysteresis: int = option(2, help="overflows before the loss scale shrinks", level="expert", check=at_least(1))
