"""`--save-hf`: the final model of a run as a Hugging Face directory (merged, for a LoRA run)."""

from __future__ import annotations

from pathlib import Path

from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.plan.quantization import merge_base
from mindspeed_llm.plan.source import find_source


def save_final_as_hf(plan: Plan) -> Path | None:
    """Write `<save>/hf` from the last checkpoint of the run, on the first process, in place of an earlier one.

    Raises:
        UserError: no config.json is known, or the base of the adapters is random and so nowhere on disk.
    """
    import torch.distributed as dist

    from mindspeed_llm.checkpoint.convert import convert
    from mindspeed_llm.lora.merge import merging_transform
    from mindspeed_llm.lora.tensors import read_adapters, read_trained_base

    target = Path(plan.config.checkpoint.save) / "hf"
    if dist.is_initialized() and dist.get_rank() != 0:
        return None
    final = find_source(plan.config.checkpoint.save)
    transform, source, merged_into = None, final.path, None
    if final.format == "adapter":
        if plan.weights is None:
            raise UserError("--save-hf: the base of the adapters is random and nowhere on disk; give --load")
        adapters = read_adapters(final.directory, plan.shape, plan.adapters)
        merged_into = merge_base(plan.config, final, plan.weights)
        transform, source = (
            merging_transform(adapters, plan.adapters, plan.shape, read_trained_base(final.directory, plan.shape)),
            plan.weights.path,
        )
    # the plan's may lie in a checkpoint that --keep-last has removed
    files = final.hf_files or plan.hf_files
    return convert(
        source,
        target,
        save_type="hf",
        hf_cfg_dir=files,
        transform=transform,
        dequantized=merged_into == "dequantized",
        notes=None if merged_into is None else {"merge_base": merged_into},
        replace=True,
    )
