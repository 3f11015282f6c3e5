"""`preprocess_data.py`."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_llm.cli.door import open_door, say_notes
from mindspeed_llm.config.parser import Parsed

WHAT = "Turn raw data into the .bin/.idx token streams that training reads."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; returns the exit status."""
    return open_door("preprocess", WHAT, argv, run)


def run(parsed: Parsed) -> None:
    """Preprocess (or merge) and print the counts."""
    from mindspeed_llm.data.preprocess import preprocess

    config = parsed.config
    missing = [f for f, v in (("--input", config.data.input), ("--output-prefix", config.data.output_prefix)) if not v]
    named = config.tokenizer.tokenizer_name_or_path or config.tokenizer.tokenizer_model
    if not named and not config.data.merge_group_keys:
        missing.append("--tokenizer-name-or-path")
    parsed.raise_problems([f"{flag} is missing" for flag in missing])
    say_notes(parsed.notes)
    report = preprocess(config.data, config.tokenizer)
    if report is not None:
        report.print()
