"""Rows can be looked at; the shipped corpus is real text whose held-out part shares nothing with the rest."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from mindspeed_llm.data import corpus
from mindspeed_llm.data.preprocess import preprocess_input
from mindspeed_llm.data.show import show
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import UserError


def shown(prefix, tokenizer, **options):
    stream = io.StringIO()
    show(
        prefix,
        tokenizer,
        console=Console(file=stream, force_terminal=True, width=200, color_system="standard"),
        **options,
    )
    return stream.getvalue()


def test_trained_text_is_coloured_and_segments_are_marked(tmp_path, alpaca_file, tokenizer):
    prefix = str(tmp_path / "d")
    preprocess_input(
        str(alpaca_file), prefix, tokenizer, handler_name="AlpacaStyleInstructionHandler", prompt_type="llama2",
        seq_length=64, pack_mode="pack",
    )  # fmt: skip
    out = shown(prefix, tokenizer, count=200)
    green, dim = "\x1b[1;32m", "\x1b[2m"
    assert f"{green}Hello there!</s>" in out and f"{dim}<s>[INST] Say hello. [/INST]" in out
    assert " ┃ " in out and "x padding" in out
    assert shown(prefix, tokenizer, count=3).count("tokens,") == 3
    assert "Hello" not in shown(prefix, None)


def test_another_tokenizer_is_refused(tmp_path, text_file, tokenizer, padded_tokenizer):
    preprocess_input(str(text_file), str(tmp_path / "d"), tokenizer, handler_name="GeneralPretrainHandler")
    assert "pretrain" in shown(tmp_path / "d", tokenizer, count=2)
    with pytest.raises(UserError, match="is not the one"):
        show(tmp_path / "d", padded_tokenizer)


def test_the_corpus_is_large_unique_and_ordered():
    # What was read earlier in this process may lack what modules imported since have added.
    corpus.stdlib_documents.cache_clear()
    documents = corpus.stdlib_documents()
    assert sum(len(document.text) for document in documents) > 1_000_000
    assert len({document.text for document in documents}) == len(documents)
    corpus.stdlib_documents.cache_clear()
    assert corpus.stdlib_documents() == documents


def test_held_out_packages_are_apart():
    packages = {held: set() for held in (True, False)}
    sizes = {True: 0, False: 0}
    for document in corpus.stdlib_documents():
        held = corpus.is_held_out(document.module)
        packages[held].add(document.module.split(".")[0])
        sizes[held] += len(document.text)
    assert not packages[True] & packages[False]
    assert 0.03 < sizes[True] / sum(sizes.values()) < 0.3


def test_written_files_are_real_inputs(tmp_path):
    train, held = corpus.write_stdlib_corpus(tmp_path, max_bytes=50_000)
    rows, held_rows = corpus.write_stdlib_instructions(tmp_path, max_rows=50)
    tokenizer = load_tokenizer(corpus.train_tokenizer(tmp_path / "tokenizer", 512))
    assert tokenizer.vocab_size == 512 and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    report = preprocess_input(str(train), str(tmp_path / "pt"), tokenizer, handler_name=None, append_eod=True)
    assert report.num_bad == 0 and report.documents > 20
    report = preprocess_input(str(rows), str(tmp_path / "sft"), tokenizer, handler_name=None, prompt_type="llama2")
    assert (report.documents, report.num_bad) == (50, 0)
    questions = [{row["instruction"] for row in json.loads(path.read_text())} for path in (rows, held_rows)]
    assert not questions[0] & questions[1]
    assert held.stat().st_size
