"""Small raw and preprocessed data for plans that are looked at without training."""

import json

import pytest


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Instructions of uneven length, as raw data."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    rows = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(1, n + 1)))}
        for n in range(2, 26)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Documents, as raw data."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} " * (20 + n)}) + "\n" for n in range(60)))
    return path


@pytest.fixture(scope="session")
def prepared(toy_llama, rows, texts, tmp_path_factory):
    """door -> prefix of preprocessed data."""
    from mindspeed_llm.config.data import DataConfig
    from mindspeed_llm.data.cache import preprocess_cached
    from mindspeed_llm.data.tokenizer import load_tokenizer

    cache, tokenizer = tmp_path_factory.mktemp("cache"), load_tokenizer(str(toy_llama))
    chat = DataConfig(data_path=[str(rows)], prompt_type="chatml", seq_length=128)
    return {
        "posttrain": preprocess_cached(chat, tokenizer, cache),
        "pretrain": preprocess_cached(DataConfig(data_path=[str(texts)], append_eod=True), tokenizer, cache),
    }
