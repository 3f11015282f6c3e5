"""Raw data -> handler -> tokens -> packing -> indexed files, published together with their record."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mindspeed_llm
from mindspeed_llm.data.handlers import Handler, handler_class, suggest_handler
from mindspeed_llm.data.handlers.pretrain import GeneralPretrainHandler
from mindspeed_llm.data.merging import merge_groups
from mindspeed_llm.data.output import PretrainOutput, SFTOutput
from mindspeed_llm.data.record import DataRecord, record_path
from mindspeed_llm.data.report import Progress, Report
from mindspeed_llm.data.sources import read_chunks, source_bytes
from mindspeed_llm.data.templates import load_template
from mindspeed_llm.data.tokenizer import Tokenizer, load_tokenizer
from mindspeed_llm.data.workers import map_chunks
from mindspeed_llm.errors import UserError

if TYPE_CHECKING:
    from mindspeed_llm.config.data import DataConfig, TokenizerConfig

EXAMPLE_MAP = '\'{"prompt":"question","response":"answer"}\''


def preprocess(data: DataConfig, tokenizer: TokenizerConfig) -> Report | None:
    """Run preprocessing as configured.

    Args:
        data, tokenizer: the options of `preprocess_data.py`.

    Returns:
        The counts, or None in merge mode.

    Raises:
        UserError: options contradict each other, data cannot be read, or output exists already.
    """
    if not data.input or not data.output_prefix:
        raise UserError("preprocess: --input and --output-prefix are needed; try: both")
    if data.merge_group_keys:
        merge_groups(data.input, data.merge_group_keys, data.output_prefix, overwrite=data.overwrite_cache)
        return None
    return preprocess_input(
        data.input,
        data.output_prefix,
        tokenizer_from(tokenizer),
        **preprocess_settings(data),
        workers=data.workers,
        overwrite=data.overwrite_cache,
    )


def preprocess_settings(data: DataConfig) -> dict[str, Any]:
    """The options that decide the bytes of the output, as keyword arguments of `preprocess_input`."""
    return {
        "handler_name": data.handler_name,
        "json_keys": list(data.json_keys),
        "prompt_type": data.prompt_type,
        "prompt_type_path": data.prompt_type_path,
        "enable_thinking": data.enable_thinking,
        "map_keys": data.map_keys,
        "seq_length": data.seq_length,
        "pack_mode": "neat_pack" if data.neat_pack else "pack" if data.pack else "none",
        "append_eod": data.append_eod,
        "max_samples": data.max_samples,
        "max_bad_rows": data.max_bad_rows,
        "hf_params": read_hf_params(data.hf_datasets_params),
    }


def read_hf_params(path: str | None) -> dict[str, Any]:
    """Keyword arguments for `datasets.load_dataset` from a JSON file.

    Raises:
        UserError: no such file, or it does not hold an object.
    """
    if path is None:
        return {}
    try:
        params = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"hf-datasets-params: '{path}' cannot be read, because {error}; legal: a JSON file") from error
    if not isinstance(params, dict) or not params:
        raise UserError(f"hf-datasets-params: '{path}' holds no object; legal: arguments of datasets.load_dataset")
    return params


def tokenizer_from(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that the options name.

    Raises:
        UserError: none is named, two are named, or it cannot be loaded.
    """
    paths = [path for path in (config.tokenizer_name_or_path, config.tokenizer_model) if path]
    if len(paths) != 1:
        what = "both --tokenizer-name-or-path and --tokenizer-model are given" if paths else "no tokenizer is given"
        raise UserError(f"tokenizer: {what}; legal: one of them; try: --tokenizer-name-or-path DIR")
    return load_tokenizer(
        paths[0],
        tokenizer_type=config.tokenizer_type,
        use_fast=not config.tokenizer_not_use_fast,
        trust_remote_code=config.trust_remote_code,
    )


def preprocess_input(
    source: str,
    output_prefix: str,
    tokenizer: Tokenizer,
    *,
    handler_name: str | None,
    json_keys: list[str] = ("text",),
    prompt_type: str | None = None,
    prompt_type_path: str | None = None,
    enable_thinking: str = "none",
    map_keys: Mapping[str, Any] | None = None,
    seq_length: int | None = None,
    pack_mode: str = "none",
    append_eod: bool = False,
    max_samples: int | None = None,
    max_bad_rows: int = 0,
    hf_params: Mapping[str, Any] | None = None,
    workers: int = 1,
    overwrite: bool = False,
    stage: str | None = None,
) -> Report:
    """Preprocess one source. The bytes written do not depend on `workers`.

    Args:
        source: file, directory, several separated by commas, or a data set name.
        output_prefix: pre-training writes `<prefix>_<key>_document`, fine-tuning
            `<prefix>_packed_{input_ids,attention_mask,labels}_document`, both with `<prefix>.record.json`.
        handler_name: class name of the handler; None guesses from the first row's columns.
        pack_mode: "none", "pack", or "neat_pack", which cuts over-long samples instead of dropping them.
        overwrite: replace output that is already there.
        stage: "pretrain" or "sft", the training that will read the output: a guess keeps to its handlers. A
            `prompt_type` says "sft".

    Raises:
        UserError: see `preprocess`.
    """
    start = time.monotonic()
    report = Report(str(output_prefix))
    if record_path(output_prefix).exists() and not overwrite:
        raise UserError(
            f"output-prefix: '{output_prefix}' holds finished data, which would be lost; try: another prefix, or "
            "--overwrite-cache to replace them"
        )
    if handler_name is None:
        stage = stage or ("sft" if prompt_type else None)
        handler_name = guess_handler(source, max_samples, hf_params, stage, map_keys, json_keys)
    handler = make_handler(
        handler_name, tokenizer, json_keys=json_keys, prompt_type=prompt_type, prompt_type_path=prompt_type_path,
        enable_thinking=enable_thinking, map_keys=map_keys, seq_length=seq_length, pack_mode=pack_mode,
        append_eod=append_eod,
    )  # fmt: skip
    chunks = read_chunks(source, max_samples, dict(hf_params or {}), handler.needed_columns)
    total = None if hf_params else source_bytes(source)
    output = SFTOutput(output_prefix, tokenizer, seq_length, pack_mode) if handler.stage == "sft" else None
    output = output or PretrainOutput(output_prefix, handler)
    columns: set[str] = set()
    try:
        with Progress(total) as progress:
            for result in map_chunks(handler, chunks, workers):
                report.add(result, max_bad_rows)
                columns |= result.columns
                report.add_lengths(output.add(result.streams))
                progress.update(report)
        _check_result(report, handler, columns, source)
        report.packed_rows = output.finish()
        record_path(output_prefix).unlink(missing_ok=True)  # from here on the old data are no longer whole
        output.publish()
    except BaseException:
        output.discard()
        raise
    DataRecord(
        stage=handler.stage,
        handler=handler_name,
        streams=list(handler.stream_dtypes),
        template=prompt_type if handler.stage == "sft" else None,
        tokenizer=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        pack=pack_mode,
        seq_length=seq_length if handler.stage == "sft" else None,
        append_eod=append_eod,
        counts=report.counts(),
        version=mindspeed_llm.__version__,
        settings={"map_keys": dict(map_keys) if map_keys else None, "enable_thinking": enable_thinking},
    ).write(output_prefix)
    report.seconds = time.monotonic() - start
    return report


def guess_handler(
    source: str,
    max_samples: int | None,
    hf_params: Mapping[str, Any] | None,
    stage: str | None = None,
    map_keys: Mapping[str, Any] | None = None,
    json_keys: Sequence[str] = ("text",),
) -> str:
    """The handler whose columns the first readable row has.

    Args:
        stage, map_keys, json_keys: see `suggest_handler`.

    Raises:
        UserError: no handler, or more than one, fits, or there is no readable row.
    """
    first = next(read_chunks(source, max_samples, dict(hf_params or {})), None)
    rows = [] if first is None else list(first.decode())
    row = next((row for _, row in rows if isinstance(row, dict)), None)
    if row is None:
        reason = (
            f"the first {len(rows)} cannot be used, {first.origin(rows[0][0])}: {rows[0][1]}" if rows else "no rows"
        )
        raise UserError(f"input: '{source}' has no readable row ({reason}); try: another file")
    if (name := suggest_handler(row, stage, map_keys, json_keys)) is None:
        training = {"sft": "fine-tuning ", "pretrain": "pre-training "}.get(stage, "")
        columns = ", ".join(map(repr, row))
        messages = [{"messages": column} for column in row if suggest_handler(row, "sft", {"messages": column})]
        example = f"'{json.dumps(messages[0])}'" if len(messages) == 1 else EXAMPLE_MAP
        raise UserError(
            f"handler-name: not given, and no single {training}handler reads the columns of '{source}' ({columns}); "
            "try: --handler-name, or name the columns with "
            + ("--json-keys" if stage == "pretrain" else "--map-keys " + example)
        )
    return name


def make_handler(
    name: str | None,
    tokenizer: Tokenizer,
    *,
    json_keys: list[str],
    prompt_type: str | None,
    prompt_type_path: str | None,
    enable_thinking: str,
    map_keys: Mapping[str, Any] | None,
    seq_length: int | None,
    pack_mode: str,
    append_eod: bool,
) -> Handler:
    """The handler `name` with its options.

    Raises:
        UserError: an option is missing, or is given to a handler that would ignore it.
    """
    cls = handler_class(name)
    if cls is GeneralPretrainHandler:
        given = {"prompt-type": prompt_type, "map-keys": map_keys, "pack": pack_mode != "none"}
        given["prompt-type-path"] = prompt_type_path
        given["enable-thinking"] = enable_thinking != "none"
        if ignored := [option for option, value in given.items() if value]:
            raise UserError(f"{ignored[0]}: has no use with {name}, which writes plain documents; try: leave it out")
        return GeneralPretrainHandler(tokenizer, list(json_keys), append_eod)
    if list(json_keys) != ["text"]:
        raise UserError(f"json-keys: has no use with {name}; try: --map-keys")
    if prompt_type is None:
        raise UserError(f"prompt-type: is needed by {name}; legal: a template name, for instance llama2, chatml or hf")
    if pack_mode != "none" and seq_length is None:
        raise UserError("seq-length: is needed to pack, because rows are filled up to it; try: --seq-length 4096")
    template = load_template(prompt_type, tokenizer, prompt_type_path, enable_thinking)
    return cls(tokenizer, template, map_keys, seq_length, cut=pack_mode == "neat_pack", append_eod=append_eod)


def _check_result(report: Report, handler: Handler, columns: set[str], source: str) -> None:
    if absent := sorted(handler.mapped_columns - columns):
        raise UserError(
            f"map-keys: column {absent[0]!r} occurs in no row of '{source}'; legal: {', '.join(sorted(columns))}"
        )
    if not report.documents:
        dropped = "; ".join(f"{count} {reason}" for reason, count in sorted(report.dropped.items())) or "no rows"
        raise UserError(f"input: nothing is left of '{source}' ({report.rows} rows: {dropped}); try: check the options")
