"""`posttrain_gpt.py`."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_llm.cli.door import open_door

WHAT = "Fine-tune a language model on instructions: in full, in part, or with LoRA."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; returns the exit status."""

    def action(parsed):
        from mindspeed_llm.cli.training import run_door

        run_door(parsed)

    return open_door("posttrain", WHAT, argv, action)
