#!/usr/bin/env python3
"""Preprocessing: MB/s of text through the pre-training and the Alpaca handler and through the tokenizer alone.

    python benchmarks/preprocess.py [--megabytes 16] [--rounds 5] [--threads 2] [--quick]

The text is the documentation of Python's standard library, repeated up to --megabytes with a number in front of each
repetition, as jsonl. The tokenizer alone is `tokenizers.Tokenizer.encode_batch` (and encode_batch_fast, which leaves
out character offsets) on the same strings already in memory, in batches of 1000: no file is read or written and no
token is kept. Sides take turns; medians of the rounds. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import interleaved, median_ratio

VOCABULARY = 32000
BATCH = 1000
AIMS = {"pretrain_over_tokenizer": 1.3, "sft_over_tokenizer": 1.6}


def repeated(texts: list[str], num_bytes: int) -> list[str]:
    """Texts over and over with the number of the repetition in front, up to about `num_bytes`."""
    out, size, number = [], 0, 0
    while size < num_bytes:
        for text in texts:
            out.append(f"{number} {text}")
            size += len(out[-1].encode())
            if size >= num_bytes:
                break
        number += 1
    return out


def write_inputs(directory: Path, num_bytes: int) -> tuple[list[str], list[dict[str, str]]]:
    """Write text.jsonl and alpaca.jsonl; returns the texts and the rows."""
    from mindspeed_llm.data import corpus

    documents = corpus.stdlib_documents()
    texts = repeated([document.text for document in documents], num_bytes)
    questions = [f"What does {document.name} do?" for document in documents]
    rows = [{"instruction": questions[i % len(questions)], "input": "", "output": text} for i, text in enumerate(texts)]
    for name, records in (("text", [{"text": text} for text in texts]), ("alpaca", rows)):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return texts, rows


def tokenizer_alone(encode: Callable, texts: list[str]) -> Callable[[], None]:
    """`encode` of all texts, batch by batch."""

    def run() -> None:
        for start in range(0, len(texts), BATCH):
            encode(texts[start : start + BATCH], add_special_tokens=False)

    return run


def handler(directory: Path, source: str, tokenizer: Any, **options: Any) -> Callable[[], None]:
    """A whole preprocessing run of `source`.jsonl, files included."""
    from mindspeed_llm.data.preprocess import preprocess_input

    def run() -> None:
        preprocess_input(
            str(directory / f"{source}.jsonl"), str(directory / f"out_{source}"), tokenizer, overwrite=True, **options
        )

    return run


def measure(directory: Path, num_bytes: int, rounds: int) -> dict[str, Any]:
    """All sides."""
    from mindspeed_llm.data import corpus
    from mindspeed_llm.data.tokenizer import load_tokenizer

    texts, rows = write_inputs(directory, num_bytes)
    tokenizer = load_tokenizer(corpus.train_tokenizer(directory / "tokenizer", VOCABULARY))
    alpaca = [text for row in rows for text in (row["instruction"], row["output"])]
    backend = tokenizer.backend
    sides = {
        "pretrain": handler(directory, "text", tokenizer, handler_name="GeneralPretrainHandler", append_eod=True),
        "sft": handler(
            directory, "alpaca", tokenizer, handler_name="AlpacaStyleInstructionHandler", prompt_type="chatml"
        ),
        "encode_batch": tokenizer_alone(backend.encode_batch, texts),
        "encode_batch_fast": tokenizer_alone(backend.encode_batch_fast, texts),
        "encode_batch_of_sft_texts": tokenizer_alone(backend.encode_batch, alpaca),
        "encode_batch_fast_of_sft_texts": tokenizer_alone(backend.encode_batch_fast, alpaca),
    }
    seconds = interleaved(sides, rounds)
    megabytes = {name: sum(len(t.encode()) for t in (alpaca if "sft" in name else texts)) / 1e6 for name in sides}
    return {
        "megabytes": {name: round(megabytes[name], 1) for name in ("pretrain", "sft")},
        "megabytes_per_second": {n: round(megabytes[n] / statistics.median(s), 2) for n, s in seconds.items()},
        "pretrain_over_tokenizer": round(median_ratio(seconds["pretrain"], seconds["encode_batch"]), 2),
        "sft_over_tokenizer": round(median_ratio(seconds["sft"], seconds["encode_batch_of_sft_texts"]), 2),
        "pretrain_over_fast_tokenizer": round(median_ratio(seconds["pretrain"], seconds["encode_batch_fast"]), 2),
        "sft_over_fast_tokenizer": round(median_ratio(seconds["sft"], seconds["encode_batch_fast_of_sft_texts"]), 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="one round on a tenth of a megabyte")
    args = parser.parse_args()
    if args.quick:
        args.megabytes, args.rounds = 0.1, 1
    # Read by the tokenizers library when its thread pool starts.
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    standard_output, sys.stdout = sys.stdout, sys.stderr
    result: dict[str, Any] = {"benchmark": "preprocess", "threads": args.threads, "rounds": args.rounds, "aims": AIMS}
    with tempfile.TemporaryDirectory() as scratch:
        result |= measure(Path(scratch), int(args.megabytes * 1e6), args.rounds)
    result["load_average"] = round(os.getloadavg()[0], 2)
    print(json.dumps(result), file=standard_output)


if __name__ == "__main__":
    main()
