"""What the whole suite shares: one thread per process, toy models built once, and no leftovers between tests."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


def pytest_collection_modifyitems(items):
    """Distributed tests are found by their folder, so that no file has to mark itself; a few of them are fast."""
    for item in items:
        if "/tests/distributed/" in str(item.path):
            item.add_marker(pytest.mark.distributed)
            if item.get_closest_marker("fast") is None:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session):
    """What is patched while tests are collected is patched in all of them."""
    if "mindspeed_llm.megatron_adaptor" in sys.modules:
        raise pytest.UsageError("mindspeed_llm.megatron_adaptor is imported at the top of a test module: not there")


@pytest.fixture(scope="session")
def toy_llama(tmp_path_factory):
    """A random Llama (4 layers, groups < heads, 997 tokens) as a Hugging Face directory."""
    from mindspeed_llm.checkpoint.toy import make_toy

    return make_toy("llama", tmp_path_factory.mktemp("toy") / "llama")


@pytest.fixture(scope="session")
def toy_qwen(tmp_path_factory):
    """A random Qwen2 with tied embeddings as a Hugging Face directory."""
    from mindspeed_llm.checkpoint.toy import make_toy

    return make_toy("qwen2", tmp_path_factory.mktemp("toy") / "qwen", tie_word_embeddings=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Raw data are preprocessed into the test's own folder, never into the user's cache."""
    monkeypatch.setenv("MINDSPEED_LLM_CACHE", str(tmp_path / "cache"))
