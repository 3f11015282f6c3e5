"""Random models of the families with everything that a layout can get wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_llm.checkpoint.toy import make_toy

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """name -> HF directory: plain, biased, tied with q/k norms."""
    root = tmp_path_factory.mktemp("toys")
    return {
        "llama": make_toy("llama", root / "llama"),
        "llama-biased": make_toy("llama", root / "biased", attention_bias=True, mlp_bias=True, seed=1),
        "qwen2": make_toy("qwen2", root / "qwen2", dtype="bfloat16"),
        "qwen3-tied": make_toy("qwen3", root / "qwen3", tie_word_embeddings=True),
    }


def hf_tensors(directory):
    """All tensors of an HF directory by name."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same_tensors(first, second):
    """Bitwise equality of two HF directories' weights, types included."""
    a, b = hf_tensors(first), hf_tensors(second)
    assert a.keys() == b.keys()
    assert [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])] == []


@pytest.fixture(scope="session")
def same_tensors():
    """`assert_same_tensors`."""
    return assert_same_tensors


def strip_manifest(root):
    """Make of an iteration what earlier versions wrote, whose damage shows in the tensors alone."""
    for path in root.glob("iter_*/manifest.json"):
        path.unlink()
        record = path.with_name("mindspeed_llm.json")
        record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "manifest"}))


@pytest.fixture(scope="session")
def without_manifest():
    """`strip_manifest`."""
    return strip_manifest
