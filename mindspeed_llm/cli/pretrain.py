"""`pretrain_gpt.py`."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_llm.cli.door import open_door

WHAT = "Train a language model on text, from scratch or from a checkpoint."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; returns the exit status."""

    def action(parsed):
        from mindspeed_llm.cli.training import run_door

        run_door(parsed)

    return open_door("pretrain", WHAT, argv, action)
