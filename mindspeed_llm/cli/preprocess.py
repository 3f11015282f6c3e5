"""`preprocess_data.py`."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_llm.cli.door import open_door, say_notes
from mindspeed_llm.cli.places import unwritable_places
from mindspeed_llm.config.parser import Parsed
from mindspeed_llm.config.run import RunConfig
from mindspeed_llm.errors import UserError

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
    parsed.raise_problems([*(f"{flag} is missing" for flag in missing), *unwritable_places(config)])
    say_notes(parsed.notes)
    if config.logging.dry_run:
        _show(config)
        return
    report = preprocess(config.data, config.tokenizer)
    if report is not None:
        report.print()


def _show(config: RunConfig) -> None:
    """What would be read and written."""
    from mindspeed_llm.data.sources import find_files

    data = config.data
    try:
        files = find_files(data.input)
        there = "not a file here: a data set name" if files is None else f"{len(files)} files"
    except UserError:
        there = "not there yet"
    handler = data.handler_name or "found from the columns"
    template = f", template {data.prompt_type}" if data.prompt_type else ""
    packing = ", cut and packed" if data.neat_pack else ", packed" if data.pack else ""
    print(f"read:      {data.input} ({there})")
    print(f"tokenizer: {config.tokenizer.tokenizer_name_or_path or config.tokenizer.tokenizer_model}")
    length = f"at most {data.seq_length} tokens a row" if data.seq_length else "rows of any length"
    print(f"handler:   {handler}{template}{packing}, {length}")
    print(f"write:     {data.output_prefix}_*.bin/.idx with {data.workers} processes")
    print("nothing was written")
