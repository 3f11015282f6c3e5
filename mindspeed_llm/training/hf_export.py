"""`--save-hf`: the model of a run as a Hugging Face directory (merged, for a LoRA run), at its end or all along."""

from __future__ import annotations

import threading
from pathlib import Path

from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.plan.quantization import merge_base
from mindspeed_llm.plan.source import find_source


class HfExport:
    """Exports of the newest checkpoint in a thread of the first process, one at a time."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Export the checkpoint that is the newest now.

        Raises:
            UserError: the export before failed.
        """
        self.wait()
        self._thread = threading.Thread(target=self._export, name="export", daemon=True)
        self._thread.start()

    def is_busy(self) -> bool:
        """Whether an export is under way."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what an export failed with, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait for the export that is under way; it reads a checkpoint that must not go meanwhile.

        Raises:
            UserError: it failed.
        """
        if self._thread is not None:
            self._thread.join(timeout_seconds)
        self.check()

    def _export(self) -> None:
        try:
            target = export_as_hf(self.plan, quiet=True)
            print(f" the Hugging Face model in {target} is of the last checkpoint now", flush=True)
        except Exception as wrong:  # whatever it is, the training thread raises it
            self._failure = wrong


def export_as_hf(plan: Plan, quiet: bool = False) -> Path:
    """Write `<save>/hf` from the newest checkpoint of the run, in place of an earlier one; for one process.

    Raises:
        UserError: no config.json is known, or the disk is full.
    """
    from mindspeed_llm.checkpoint.convert import convert
    from mindspeed_llm.lora.merge import merging_transform
    from mindspeed_llm.lora.tensors import read_adapters, read_trained_base

    target = Path(plan.config.checkpoint.save) / "hf"
    final = find_source(plan.config.checkpoint.save)
    transform, source, merged_into = None, final.path, None
    if final.format == "adapter":
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
        quiet=quiet,
    )
