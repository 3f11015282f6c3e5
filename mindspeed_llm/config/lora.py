"""Options of low-rank adapters."""

from __future__ import annotations

from mindspeed_llm.config.schema import above, at_least, between, option, section


@section
class LoraConfig:
    """Adapters are on when `--lora-r` or `--lora-target-modules` is given, or `--lora-load` holds some."""

    lora_r: int | None = option(help="rank; 16 when only targets are given", kind="identity", check=at_least(1))
    lora_alpha: float | None = option(
        help="adapters are scaled by alpha / rank; default 32", kind="identity", check=above(0)
    )
    lora_dropout: float = option(
        0.0, help="dropout in front of the adapters", check=between(0, 0.99), doors=("pretrain", "posttrain")
    )
    lora_target_modules: list[str] | None = option(
        help="linear_qkv linear_proj linear_fc1 linear_fc2, or HF names like q_proj v_proj, or all-linear (default)",
        kind="identity",
    )
    lora_load: str | None = option(help="adapter checkpoint (ours or PEFT's) to go on with or to answer with")
    lora_merge: bool = option(
        help="merge the adapters into the weights on loading", doors=("inference",), level="advanced"
    )
