"""Whether the frozen base is held in NF4: asked for by --qlora, or recorded by the adapters of a run that did."""

from __future__ import annotations

from collections.abc import Iterator

from mindspeed_llm.checkpoint.detect import Found
from mindspeed_llm.config.run import RunConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import is_nf4, read_hf_config
from mindspeed_llm.models.layouts import TensorLayout
from mindspeed_llm.models.mapping import TensorPair, tensor_pairs
from mindspeed_llm.models.nf4_weight import is_quantized
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.ops.nf4 import BLOCK_SIZE
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.plan.rules import Rule, divisors


def quantized_base(
    config: RunConfig, weights: Found | None, adapter_source: Found | None, adapted: bool, problems: list[str]
) -> bool:
    """Whether the base of adapters is in NF4.

    Args:
        adapted: the run has adapters.
        problems: gets a line for what contradicts that, or is missing.
    """
    asked, recorded = config.lora.qlora, recorded_quantization(adapter_source)
    if recorded is not None and "qlora" in config.given and asked != recorded:
        problems.append(
            f"--qlora: {asked} contradicts the adapters in {adapter_source.path}, whose base was "
            f"{'in NF4' if recorded else 'not quantised'}; legal: {recorded}, or leave the flag out"
        )
    quantized = asked if recorded is None else recorded
    training = config.door != "inference"
    if quantized and weights is None:
        problems.append("--qlora needs --load: random weights are not worth keeping; legal: a trained model")
    if quantized and training and not adapted:
        problems.append("--qlora needs adapters, because weights in 4 bits are not trained; try: --lora-r 16")
    if training and not quantized and weights is not None and stored_in_nf4(weights):
        problems.append(
            f"checkpoint: {weights.path} holds weights in NF4 and would be trained without --qlora; try: --qlora with "
            "--lora-r 16, or convert_ckpt.py --save-model-type hf to write them unquantised first"
        )
    return quantized


def recorded_quantization(adapter_source: Found | None) -> bool | None:
    """What adapters of ours record about their base; None for others."""
    if adapter_source is None or adapter_source.format != "adapter":
        return None
    return bool((adapter_source.record.get("base") or {}).get("quantized"))


def merge_base(config: RunConfig, adapter_source: Found, weights: Found) -> str | None:
    """What adapters are merged into, "dequantized" or "original"; None where their base was never quantised.

    Raises:
        UserError: there is no original, or no such choice.
    """
    if not recorded_quantization(adapter_source):
        if "qlora_merge_base" in config.given:
            raise UserError(
                f"--qlora-merge-base: {config.lora.qlora_merge_base} has no meaning, because {adapter_source.path} "
                "records no base in NF4; try: leave it out"
            )
        return None
    if config.lora.qlora_merge_base == "original" and stored_in_nf4(weights):
        raise UserError(
            f"--qlora-merge-base: original is wrong, because {weights.path} is in NF4 itself; legal: dequantized; try: "
            "the directory that it was quantised from"
        )
    return config.lora.qlora_merge_base


def stored_in_nf4(weights: Found) -> bool:
    """Whether a checkpoint's linears are in NF4."""
    if weights.format == "hf":
        return is_nf4(read_hf_config(weights.directory))
    return weights.format == "megatron" and weights.record.get("quantized") is not None


def quantization_rules(shape: ModelShape, layout: ParallelLayout) -> list[Rule]:
    """A matrix in NF4 is cut between blocks."""
    rules, seen = [], set()
    for pair in quantized_pairs(shape):
        columns = pair.dims[1]
        size = _cuts_of_columns(pair.layout, layout)
        what = pair.mcore.rsplit(".", 2)[-2]
        if (columns, size) in seen:
            continue
        seen.add((columns, size))
        legal = [d for d in divisors(columns) if columns // d % BLOCK_SIZE == 0]
        says = f"columns of {what} {columns} / {size} % {BLOCK_SIZE} = 0 (--qlora: blocks of NF4)"
        sizes = ", ".join(map(str, legal)) + " parts" if legal else "LoRA without --qlora"
        rules.append(Rule("qlora", says, size in legal, sizes))
    return rules


def quantized_pairs(shape: ModelShape) -> Iterator[TensorPair]:
    """The tensors that --qlora quantises."""
    return (pair for pair in tensor_pairs(shape) if is_quantized(pair.mcore))


def _cuts_of_columns(tensor: TensorLayout, layout: ParallelLayout) -> int:
    if tensor.tp_dim != 1:
        return 1
    return layout.expert_tp if tensor.expert else layout.tp
