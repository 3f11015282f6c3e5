#!/usr/bin/env python3
"""The length histogram of the training benchmark, and rows drawn from it.

    python benchmarks/lengths.py > benchmarks/lengths.csv

makes lengths.csv anew: `What does NAME do?` in chatml form answered by the whole docstring of NAME, for every
documented name of Python's standard library, counted in tokens of a BPE vocabulary of 8000 trained on the same texts.
Samples over 1024 tokens are left out. Lengths are rounded up to a multiple of 8.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

LENGTHS_CSV = Path(__file__).with_name("lengths.csv")
VOCABULARY = 8000
LONGEST = 1024
BIN = 8


def read_histogram(path: str | Path = LENGTHS_CSV) -> tuple[np.ndarray, np.ndarray]:
    """([bins, 2] prompt and answer tokens, [bins] number of samples)."""
    with open(path, newline="") as stream:
        rows = [
            [int(row[name]) for name in ("prompt_tokens", "answer_tokens", "samples")] for row in csv.DictReader(stream)
        ]
    table = np.array(rows)
    return table[:, :2], table[:, 2]


def draw_samples(count: int, vocab_size: int, seed: int, longest: int = LONGEST) -> list[dict[str, np.ndarray]]:
    """Samples of random tokens with lengths from the histogram.

    Returns:
        `input_ids` [n] and already shifted `labels` [n] (-100 at the prompt and at the last position), int64.
    """
    generator = np.random.default_rng(seed)
    lengths, weights = read_histogram()
    fitting = lengths.sum(1) <= longest
    lengths, weights = lengths[fitting], weights[fitting]
    samples = []
    for prompt, answer in lengths[generator.choice(len(lengths), count, p=weights / weights.sum())]:
        input_ids = generator.integers(0, vocab_size, prompt + answer)
        labels = np.full(len(input_ids), -100, np.int64)
        labels[prompt - 1 : -1] = input_ids[prompt:]
        samples.append({"input_ids": input_ids, "labels": labels})
    return samples


def stdlib_lengths() -> Counter[tuple[int, int]]:
    """(prompt tokens, answer tokens) -> samples, of the standard library's documentation."""
    from mindspeed_llm.data import corpus
    from mindspeed_llm.data.tokenizer import load_tokenizer

    documents = [d for d in corpus.stdlib_documents() if "." in d.name and not d.module.startswith("topic ")]
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = load_tokenizer(corpus.train_tokenizer(directory, VOCABULARY, [d.text for d in documents]))
    prompts = [f"<|im_start|>user\nWhat does {d.name} do?<|im_end|>\n<|im_start|>assistant\n" for d in documents]
    answers = [f"{d.text}<|im_end|>\n" for d in documents]
    sizes = zip(*([len(ids) for ids in tokenizer.encode_batch(texts)] for texts in (prompts, answers)))
    rounded = ((-(-prompt // BIN) * BIN, -(-answer // BIN) * BIN) for prompt, answer in sizes)
    return Counter(pair for pair in rounded if sum(pair) <= LONGEST)


def main() -> None:
    """Write the histogram."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["prompt_tokens", "answer_tokens", "samples"])
    writer.writerows([*lengths, count] for lengths, count in sorted(stdlib_lengths().items()))


if __name__ == "__main__":
    main()
