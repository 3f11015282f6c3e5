"""Options of low-rank adapters."""

from __future__ import annotations

from mindspeed_llm.config.schema import above, at_least, between, option, section

CHUNK_NUMBERS = (1, 2, 4, 8)


def _is_chunk_number(value: int) -> str | None:
    return None if value in CHUNK_NUMBERS else f"legal: {', '.join(map(str, CHUNK_NUMBERS))}"


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
        help="linear_qkv linear_proj linear_fc1 linear_fc2, HF names like q_proj v_proj, MindFormers' wq wv, regular "
        "expressions for whole paths, all-linear (default), all-router",
        kind="identity",
    )
    lora_exclude_modules: list[str] | None = option(
        help="names or expressions of what gets no adapter, whatever the targets say", kind="identity", level="advanced"
    )
    lora_layers_to_transform: list[int] | None = option(
        help="layers that get adapters, from 0; all when not given", kind="identity", level="advanced"
    )
    lora_rank_pattern: list[str] | None = option(
        help="NAME=RANK: other ranks than --lora-r, by target (PEFT's rank_pattern)",
        kind="identity",
        level="advanced",
        metavar="NAME=RANK",
    )
    lora_alpha_pattern: list[str] | None = option(
        help="NAME=ALPHA: other values than --lora-alpha, by target (PEFT's alpha_pattern)",
        kind="identity",
        level="advanced",
        metavar="NAME=ALPHA",
    )
    use_rslora: bool = option(
        help="scale adapters by alpha / sqrt(rank) (rank-stabilised LoRA)", kind="identity", level="advanced"
    )
    use_dora: bool = option(
        help="train a magnitude for each output beside the adapter (DoRA)", kind="identity", level="advanced"
    )
    loraplus_lr_ratio: float = option(
        1.0,
        help="learning rate of B over that of A (LoRA+)",
        check=above(0),
        doors=("pretrain", "posttrain"),
        level="advanced",
    )
    lora_fusion: bool = option(
        True,
        help="compute base and adapter as one, their communication beside their products; without, one after the other",
        doors=("pretrain", "posttrain", "inference"),
        level="advanced",
    )
    lora_fusion_chunks: int | None = option(
        help="into how many parts the fused linears cut a sequence to overlap sending and multiplying; default: as "
        "many as times measured at start make fastest (--coc-parallel-num with --use-ascend-coc)",
        check=_is_chunk_number,
        doors=("pretrain", "posttrain"),
        level="expert",
    )
    lora_fusion_combine: bool = option(
        help="dense linears: multiply by weight + adapter, formed in the weight's type, which rounds small adapters "
        "away in bf16",
        doors=("pretrain", "posttrain", "inference"),
        level="expert",
    )
    lora_prepack: bool = option(
        help="hold the frozen weights of dense linears with adapters twice more, in the orders in which a CPU "
        "multiplies bf16 fastest: products are some per cent faster, of few rows up to twice, for 4 bytes a parameter",
        doors=("pretrain", "posttrain"),
        level="advanced",
    )
    lora_kernels: str = option(
        "torch",
        help="what computes dense linears with adapters on CUDA: torch; kernels of our own for the adapter, dropout "
        "inside them (triton); those, and base and adapter in one kernel where nothing is sent (triton-base)",
        choices=("torch", "triton", "triton-base"),
        doors=("pretrain", "posttrain"),
        level="expert",
    )
    lora_load: list[str] | None = option(
        help="adapter checkpoint (ours or PEFT's) to go on with or to answer with; several are combined (inference, "
        "conversion)"
    )
    lora_weights: list[float] | None = option(
        help="a weight for each of --lora-load; 1 when not given", doors=("inference", "convert"), level="advanced"
    )
    lora_merge: bool = option(
        help="merge the adapters into the weights on loading", doors=("inference",), level="advanced"
    )
    qlora: bool = option(
        help="hold the frozen linears of the layers in 4 bits (NF4 with scales in 8 bits)",
        kind="identity",
        doors=("pretrain", "posttrain", "inference"),
    )
    qlora_merge_base: str = option(
        "dequantized",
        help="what adapters on 4 bits are merged into: that base, which they were trained on, or its original",
        choices=("dequantized", "original"),
        doors=("pretrain", "posttrain", "convert", "inference"),
        level="advanced",
    )


def weight_problems(lora: LoraConfig) -> list[str]:
    """What is wrong with --lora-weights."""
    sets, weights = len(lora.lora_load or ()), lora.lora_weights
    if weights is None or (sets and len(weights) == sets):
        return []
    return [f"--lora-weights: {len(weights)} weights for {sets} sets of adapters; legal: one for each of --lora-load"]
