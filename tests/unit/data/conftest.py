"""Real tokenizers and real raw files, made once per session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindspeed_llm.data import corpus
from mindspeed_llm.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [document.text for document in corpus.stdlib_documents()[:400]]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, texts) -> Path:
    return corpus.train_tokenizer(tmp_path_factory.mktemp("tokenizer"), 600, texts)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> Tokenizer:
    """pad == eos."""
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def padded_tokenizer(tmp_path_factory, texts) -> Tokenizer:
    """pad is a token of its own."""
    return load_tokenizer(corpus.train_tokenizer(tmp_path_factory.mktemp("padded"), 600, texts, pad_token="<pad>"))


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory, texts) -> Path:
    import sentencepiece

    directory = tmp_path_factory.mktemp("sentencepiece")
    lines = directory / "lines.txt"
    lines.write_text("\n".join(line for text in texts for line in text.splitlines() if line.strip()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return directory / "tokenizer.model"


@pytest.fixture(scope="session")
def alpaca_rows() -> list[dict]:
    rows = [
        {"instruction": "Say hello.", "input": "", "output": "Hello there!"},
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
        {
            "instruction": "Go on.",
            "output": "Three.",
            "system": "You count.",
            "history": [["One?", "One."], ["Two?", "Two."]],
        },
    ]
    rows += [
        {"instruction": f"What does {d.name} do?", "input": "", "output": d.text.split("\n\n")[0]}
        for d in corpus.stdlib_documents()[:300]
    ]
    return rows


@pytest.fixture(scope="session")
def alpaca_file(tmp_path_factory, alpaca_rows) -> Path:
    path = tmp_path_factory.mktemp("alpaca") / "alpaca.json"
    path.write_text(json.dumps(alpaca_rows, indent=1))
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory, texts) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path
