"""The record beside preprocessed data: `<prefix>.record.json` says what the streams are, so that training can check.

It is not `<prefix>.json`: raw data often lie under exactly that name.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_llm.errors import UserError

if TYPE_CHECKING:
    from mindspeed_llm.data.tokenizer import Tokenizer

FORMAT = 1
SFT_STREAMS = ("input_ids", "attention_mask", "labels")
# Value of a label at which there is no loss, in files and batches (torch's cross entropy default).
IGNORE_INDEX = -100


def sft_stream(name: str) -> str:
    """Suffix of a fine-tuning stream's files; MindSpeed-LLM's infix is there whether rows are packed or not."""
    return f"packed_{name}_document"


@dataclass(frozen=True)
class DataRecord:
    """What was preprocessed and how.

    Args:
        stage: "pretrain" or "sft".
        handler: class name of the handler.
        streams: suffixes of the indexed files; the file of stream s is `<prefix>_<s>`.
        template: name of the chat template, None for pre-training.
        tokenizer: fingerprint of the tokenizer; `vocab_size`, `eos_token_id` and `pad_token_id` as it had them.
        pack: "none", "pack" or "neat_pack".
        seq_length: longest row in tokens, None when there is no limit.
        append_eod: every document ends with eos.
        counts: rows, documents, tokens, trained_tokens, dropped by reason.
        version: version of this library.
    """

    stage: str
    handler: str
    streams: list[str]
    template: str | None
    tokenizer: str
    vocab_size: int
    eos_token_id: int | None
    pad_token_id: int | None
    pack: str
    seq_length: int | None
    append_eod: bool
    counts: dict[str, Any]
    version: str
    settings: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, prefix: str | Path) -> None:
        """Write `<prefix>.record.json` through a temporary file."""
        path = record_path(prefix)
        tmp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        tmp.write_text(json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(tmp, path)


def record_path(prefix: str | Path) -> Path:
    """`<prefix>.record.json`."""
    return Path(f"{prefix}.record.json")


def read_record(prefix: str | Path) -> DataRecord:
    """The record of a data set.

    Raises:
        UserError: it is missing (the data are incomplete or foreign) or of another version.
    """
    path = record_path(prefix)
    if not path.is_file():
        raise UserError(
            f"data: '{path}' does not exist, so the data at this prefix are incomplete or not from preprocess_data.py; "
            "try: preprocess again"
        )
    values = json.loads(path.read_text(encoding="utf-8"))
    known = {f.name for f in dataclasses.fields(DataRecord)}
    if values.get("format") != FORMAT or set(values) - known:
        raise UserError(f"data: '{path}' has format {values.get('format')}; legal: {FORMAT}; try: preprocess again")
    return DataRecord(**values)


def check_tokenizer(path: str | Path, tokenizer: Tokenizer) -> None:
    """Raise if data were made with another tokenizer; data without a record cannot be checked.

    Raises:
        UserError: naming both.
    """
    found = find_dataset(path)
    if found is None:
        return
    record = read_record(found[0])
    if tokenizer.fingerprint() != record.tokenizer:
        raise UserError(
            f"tokenizer: '{tokenizer.source}' ({tokenizer.vocab_size} tokens) is not the one '{found[0]}' was made "
            f"with ({record.vocab_size} tokens); try: that tokenizer, or preprocess again"
        )


def check_settings(path: str | Path, asked: Mapping[str, Any]) -> None:
    """Raise if the user asks for data that were made otherwise; data without a record cannot be checked.

    Args:
        asked: preprocessing options that the user has given, by name, with `pack` as `DataRecord.pack` has it.

    Raises:
        UserError: the first option that contradicts the record, or that preprocessed data leave nothing to do.
    """
    if (found := find_dataset(path)) is None:
        return
    record = read_record(found[0])
    made = {"handler_name": record.handler, "prompt_type": record.template, "append_eod": record.append_eod}
    made |= {"pack": record.pack, "map_keys": None, "enable_thinking": "none"} | record.settings
    for name, value in asked.items():
        flag = "--neat-pack" if value == "neat_pack" else "--" + name.replace("_", "-")
        if name not in made:
            raise UserError(f"data: {flag} has no use with '{found[0]}', which is preprocessed; try: leave it out")
        if value != made[name]:
            raise UserError(
                f"data: {flag} {value} contradicts '{found[0]}', which was made with {made[name]}; try: leave it out, "
                "or preprocess again"
            )


def find_dataset(path: str | Path) -> tuple[str, list[str]] | None:
    """The data set that a path names.

    Args:
        path: a prefix as given to preprocessing, or with the suffix of one stream (`_text_document`,
            `_packed_input_ids_document`, ...), or one of its files (.bin, .idx, .record.json).

    Returns:
        (prefix, stream suffixes): the named stream alone for a pre-training stream, otherwise all of them. None if no
        record is found.
    """
    text = str(path)
    for extension in (".bin", ".idx", ".record.json"):
        text = text.removesuffix(extension)
    directory, name = os.path.split(text)
    for cut in range(len(name), 0, -1):
        if cut < len(name) and name[cut] != "_":
            continue
        prefix = os.path.join(directory, name[:cut])
        if not record_path(prefix).is_file():
            continue
        record = read_record(prefix)
        suffix = name[cut + 1 :]
        if not suffix or (record.stage == "sft" and suffix in ("packed", *record.streams)):
            return prefix, list(record.streams)
        if suffix in record.streams:
            return prefix, [suffix]
    return None
