"""Merge mode: several preprocessed data sets become one, streams and record."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from mindspeed_llm.data.indexed import idx_path, merge, natural_key
from mindspeed_llm.data.record import DataRecord, find_dataset, read_record, record_path
from mindspeed_llm.errors import UserError

# What may differ between the parts of a merged data set.
FREE = ("counts", "version")


def merge_groups(directory: str, keys: list[str], output_prefix: str, overwrite: bool = False) -> dict[str, int]:
    """For every key, concatenate the indexed files whose name contains it into `<prefix>_<key>`.

    Args:
        directory: holds the .bin/.idx files; they are taken in numeric-aware order of their names.
        keys: stream names such as `text_document` or `packed_labels_document`. Parts without a record (from another
            program) allow any key, and the result then has no record either.

    Returns:
        Sequences written per key.

    Raises:
        UserError: no directory, no file for a key, a file fits two keys, the parts differ in tokenizer or template, a
            stream is left out, or output exists.
    """
    if not Path(directory).is_dir():
        raise UserError(f"input: '{directory}' is no directory; legal in merge mode: one holding .bin/.idx files")
    groups = _groups(Path(directory), keys)
    for key, paths in groups.items():
        output = Path(f"{output_prefix}_{key}")
        if output.resolve() in [path.resolve() for path in paths] or (idx_path(output).exists() and not overwrite):
            raise UserError(f"output-prefix: '{output}' exists; try: another prefix, or --overwrite-cache")
    record = _merged_record(groups)
    record_path(output_prefix).unlink(missing_ok=True)
    counts = {key: merge(paths, f"{output_prefix}_{key}") for key, paths in groups.items()}
    if record is not None:
        record.write(output_prefix)
    return counts


def _groups(directory: Path, keys: list[str]) -> dict[str, list[Path]]:
    found = [path.with_suffix("") for path in directory.glob("*.idx") if not path.name.startswith(".")]
    found.sort(key=lambda path: natural_key(path.name))
    groups = {key: [path for path in found if key in path.name] for key in keys}
    for path in found:
        if sum(key in path.name for key in keys) > 1:
            raise UserError(f"merge-group-keys: '{path.name}' contains several of {keys}; try: longer keys")
    for key, paths in groups.items():
        if not paths:
            raise UserError(f"merge-group-keys: no .idx file in '{directory}' has {key!r} in its name")
    return groups


def _merged_record(groups: dict[str, list[Path]]) -> DataRecord | None:
    prefixes = {key: [_prefix_of(path) for path in paths] for key, paths in groups.items()}
    parts = next(iter(prefixes.values()))
    if all(part is None for part in parts):
        return None
    if any(other != parts for other in prefixes.values()) or None in parts:
        raise UserError(
            f"merge-group-keys: the keys {list(groups)} do not find the same parts; try: whole stream names"
        )
    records = [read_record(part) for part in parts]
    if set(groups) != set(records[0].streams):
        raise UserError(
            f"merge-group-keys: {list(groups)} are not the streams of '{parts[0]}'; legal: {records[0].streams}"
        )
    for part, record in zip(parts, records):
        for field in dataclasses.fields(DataRecord):
            ours, first = getattr(record, field.name), getattr(records[0], field.name)
            if field.name not in FREE and ours != first:
                raise UserError(
                    f"merge: '{part}' has {field.name} {ours!r}, but '{parts[0]}' has {first!r}; try: preprocess alike"
                )
    return dataclasses.replace(records[0], counts=_summed([record.counts for record in records]))


def _prefix_of(path: Path) -> str | None:
    found = find_dataset(path)
    return None if found is None else found[0]


def _summed(counts: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for name in counts[0]:
        values = [count[name] for count in counts]
        if isinstance(values[0], dict):
            total[name] = dict(sorted(sum(map(Counter, values), Counter()).items()))
        else:
            total[name] = None if values[0] is None else sum(values)
    return total
