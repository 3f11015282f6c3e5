"""Options of raw data, tokenizer and preprocessing, shared by `preprocess_data.py` and the training doors."""

from __future__ import annotations

import math

from mindspeed_llm.config.schema import TRAINING_DOORS, at_least, option, section

EVERY_DATA_DOOR = ("preprocess", *TRAINING_DOORS)
PARTS = 3


def proportions(text: str) -> list[float] | None:
    """Shares of training, validation and test data, one to three of them; None for what is no list of such."""
    try:
        shares = [float(piece) for piece in text.split(",")]
    except ValueError:
        return None
    return shares if len(shares) <= PARTS and min(shares) >= 0 and 0 < sum(shares) < math.inf else None


def _check_split(text: str) -> str | None:
    return None if proportions(text) else "legal: up to three numbers >= 0, such as 949,50,1"


@section
class DataConfig:
    """Where rows come from and how they become token streams."""

    input: str | None = option(
        help="raw data: a file (json, jsonl, parquet, csv, arrow, txt), a directory, several joined by commas, or a "
        "data set name; with --merge-group-keys a directory of .bin/.idx files",
        doors=("preprocess",),
    )
    output_prefix: str | None = option(
        help="path prefix of the written .bin/.idx files", doors=("preprocess",), writes="prefix"
    )
    data_path: list[str] | None = option(
        help="prefix of preprocessed files (with or without its suffix), or raw data, which is preprocessed once into "
        "--cache-dir; several are blended: A B by size, 0.3 A 0.7 B by weight",
        kind="continuity",
        doors=TRAINING_DOORS,
    )
    handler_name: str | None = option(
        help="how rows are read: GeneralPretrainHandler, AlpacaStyleInstructionHandler, "
        "SharegptStyleInstructionHandler; default for raw --data-path: found from the columns",
        kind="continuity",
    )
    prompt_type: str | None = option(
        help="chat template: empty, default, alpaca, llama2, llama3, chatml, qwen, ..., or hf for the tokenizer's own; "
        "fine-tuning on raw data takes hf where there is one, else default",
        kind="continuity",
        doors=(*EVERY_DATA_DOOR, "inference"),
    )
    prompt_type_path: str | None = option(
        help="another template file instead of the shipped one",
        level="advanced",
        doors=(*EVERY_DATA_DOOR, "inference"),
    )
    json_keys: list[str] = option(["text"], help="columns to tokenize for pre-training", level="advanced")
    map_keys: dict | None = option(
        help='column mapping as a JSON object, e.g. \'{"prompt":"instruction","query":"input","response":"output"}\'',
        level="advanced",
        metavar="JSON",
    )
    seq_length: int | None = option(
        help="tokens per training sample; default: the model's max_position_embeddings, at most 4096",
        kind="continuity",
        check=at_least(1),
        doors=(*EVERY_DATA_DOOR, "inference"),
    )
    pack: bool = option(
        help="pack several samples into rows of --seq-length (documents stay isolated); over-long samples are dropped"
    )
    neat_pack: bool = option(help="as --pack, but over-long samples are cut to --seq-length instead of dropped")
    append_eod: bool = option(help="append the end-of-sequence token to each pre-training document")
    workers: int = option(1, help="tokenizing processes; the output does not depend on it", check=at_least(1))
    max_samples: int | None = option(help="use the first N rows of each data set", level="advanced", check=at_least(1))
    max_bad_rows: int = option(
        0, help="how many unreadable rows are skipped and counted before the run stops", check=at_least(0)
    )
    enable_thinking: str = option(
        "none",
        help="reasoning templates: true trains an empty thought where a row has none, false strips thoughts, none "
        "keeps rows as they are",
        level="advanced",
        choices=("true", "false", "none"),
    )
    merge_group_keys: list[str] | None = option(
        help="merge mode: for each key, concatenate the .bin/.idx files in --input whose name contains it",
        level="advanced",
        doors=("preprocess",),
    )
    hf_datasets_params: str | None = option(
        help="JSON file with keyword arguments for datasets.load_dataset", level="expert"
    )
    cache_dir: str | None = option(
        help="where raw --data-path is preprocessed to; default: $MINDSPEED_LLM_CACHE or ~/.cache/mindspeed_llm",
        level="advanced",
        writes="directory",
    )
    overwrite_cache: bool = option(
        help="preprocess again although the cache has these data, or replace finished output", level="advanced"
    )
    split: str = option(
        "949,50,1",
        help="proportions of training, validation and test data",
        kind="continuity",
        check=_check_split,
        doors=TRAINING_DOORS,
    )
    seed: int = option(
        1234,
        help="seed of data order, initial weights and dropout",
        kind="continuity",
        check=at_least(0),
        doors=(*EVERY_DATA_DOOR, "inference"),
    )


@section
class TokenizerConfig:
    """Which tokenizer, and how it is loaded."""

    tokenizer_name_or_path: str | None = option(
        help="HF directory, tokenizer.json or tokenizer.model; default: the directory given with --load",
        kind="identity",
    )
    tokenizer_model: str | None = option(
        help="tokenizer.model file or a directory with one (Llama2Tokenizer)", kind="identity"
    )
    tokenizer_type: str = option(
        "PretrainedFromHF",
        help="PretrainedFromHF or Llama2Tokenizer (a sentencepiece file)",
        choices=("PretrainedFromHF", "Llama2Tokenizer", "GPTSentencePieceTokenizer"),
        level="advanced",
    )
    tokenizer_not_use_fast: bool = option(help="use the slow (Python) tokenizer implementation", level="advanced")
    trust_remote_code: bool = option(help="run tokenizer code that comes with the model directory", level="expert")
