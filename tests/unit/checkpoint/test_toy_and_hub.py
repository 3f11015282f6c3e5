"""Toy checkpoints are real and reproducible; names resolve to local directories or a clear error."""

import json
import subprocess
import sys

import pytest
import torch

from mindspeed_llm.checkpoint.hub import resolve_model
from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    a, b, c = (make_toy("qwen2", tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir())
    assert all((a / n).read_bytes() == (b / n).read_bytes() for n in names)
    assert (a / "model.safetensors").read_bytes() != (c / "model.safetensors").read_bytes()


def test_making_one_leaves_the_callers_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_toy("llama", tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_it_is_shaped_to_expose_layout_mistakes(toys):
    from mindspeed_llm.checkpoint.hf import HfSource

    for path in toys.values():
        shape = HfSource(path).shape
        assert shape.num_layers >= 4 and shape.num_query_groups < shape.num_attention_heads
        assert shape.kv_channels * shape.num_attention_heads != shape.hidden_size
        assert shape.vocab_size % 2 and shape.vocab_size % 3


def test_its_tokenizer_is_lossless_and_chats(toys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toys["llama"], local_files_only=True)
    text = "def f(x):\n    return x  # ünïcödé 漢字\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and max(ids) < 997 and len(ids) < len(text.encode())
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("published", [True, False])
def test_the_command_gives_the_tokens_that_the_familys_templates_need(tmp_path, published, capsys):
    """And the plain toy, which has no token that begins a text, is the control."""
    from transformers import AutoTokenizer

    from mindspeed_llm.__main__ import main
    from mindspeed_llm.data.templates import load_template
    from mindspeed_llm.data.tokenizer import load_tokenizer

    if published:
        main(["models", "toy", "llama", str(tmp_path)])
        assert capsys.readouterr().out == f"wrote {tmp_path}\n"
    else:
        make_toy("llama", tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    if not published:
        with pytest.raises(UserError, match="'llama2' needs bos_token"):
            load_template("llama2", load_tokenizer(tmp_path))
        return
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "</s>", None)
    assert theirs("a b")["input_ids"][0] == theirs.bos_token_id
    load_template("llama2", load_tokenizer(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert [config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == [1, 2, None]


def test_unknown_model_types_are_refused(tmp_path):
    with pytest.raises(UserError, match="'lama'"):
        make_toy("lama", tmp_path)
    with pytest.raises(UserError, match=">= 300"):
        make_toy("llama", tmp_path, vocab_size=100)


def test_a_local_directory_wins(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name").resolve() == tmp_path / "owner" / "name"


@pytest.mark.parametrize(
    "name,hub,words",
    [
        ("/no/such/dir", "hf", "no directory"),
        ("a/b", "gitee", "legal: hf, modelscope"),
        ("a/b", "modelscope", "pip install modelscope"),
    ],
)
def test_what_cannot_be_resolved(name, hub, words):
    with pytest.raises(UserError, match=words):
        resolve_model(name, hub)


def test_without_a_network_the_error_names_the_endpoint_and_the_ways_out():
    """In a process of its own: huggingface_hub reads the environment when it is imported."""
    program = "from mindspeed_llm.checkpoint.hub import resolve_model; resolve_model('owner/name')"
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "owner/name cannot be had from http://127.0.0.1:9" in last and "HF_ENDPOINT" in last


@pytest.mark.parametrize("weights", ["model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_weights_are_downloaded_in_one_form(tmp_path, monkeypatch, weights):
    from huggingface_hub.utils import filter_repo_objects

    there = ["config.json", "tokenizer.model", weights, "consolidated.00.pth", "original/model.safetensors"]
    there += ["consolidated.safetensors", "original/tokenizer.model"] if weights.endswith(".safetensors") else []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        for file in filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("owner/name") == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["config.json", "tokenizer.model", weights])
