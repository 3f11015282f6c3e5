"""Raw data are preprocessed once, by one of many processes, and again whenever anything changed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest

from mindspeed_llm.config.data import DataConfig
from mindspeed_llm.data.cache import is_preprocessed, preprocess_cached
from mindspeed_llm.data.indexed import idx_path
from mindspeed_llm.data.preprocess import guess_handler
from mindspeed_llm.data.record import check_settings, record_path
from mindspeed_llm.data.sft_dataset import SFTDataset
from mindspeed_llm.errors import UserError

ROWS = [{"instruction": f"question {i}", "input": "", "output": f"answer {i}"} for i in range(20)]


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "raw.json"
    path.write_text(json.dumps(ROWS))
    return path


def config(raw, **options):
    return DataConfig(data_path=[str(raw)], prompt_type="llama2", **options)


def test_the_second_call_reuses_the_first(tmp_path, raw, tokenizer):
    prefix = preprocess_cached(config(raw), tokenizer, tmp_path / "cache")
    before = record_path(prefix).stat().st_mtime_ns
    assert preprocess_cached(config(raw), tokenizer, tmp_path / "cache") == prefix
    assert record_path(prefix).stat().st_mtime_ns == before
    dataset = SFTDataset(prefix, "1")
    assert dataset.record.handler == "AlpacaStyleInstructionHandler" and len(dataset) == 20


def test_any_change_gives_other_data(tmp_path, raw, tokenizer, padded_tokenizer):
    cache = tmp_path / "cache"
    prefixes = [
        preprocess_cached(config(raw), tokenizer, cache),
        preprocess_cached(config(raw), padded_tokenizer, cache),
        preprocess_cached(config(raw, max_samples=3), tokenizer, cache),
        preprocess_cached(config(raw, pack=True, seq_length=64), tokenizer, cache),
    ]
    raw.write_text(json.dumps([*ROWS, ROWS[0]]))
    prefixes.append(preprocess_cached(config(raw), tokenizer, cache))
    # Same size and same time, another byte.
    stat = raw.stat()
    raw.write_text(json.dumps([*ROWS, ROWS[0]]).replace("answer 7", "answer 8"))
    os.utime(raw, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    prefixes.append(preprocess_cached(config(raw), tokenizer, cache))
    assert len(set(prefixes)) == len(prefixes)


def test_the_number_of_workers_is_no_change(tmp_path, raw, tokenizer):
    one = preprocess_cached(config(raw), tokenizer, tmp_path / "cache")
    assert preprocess_cached(config(raw, workers=4), tokenizer, tmp_path / "cache") == one


def test_overwrite_builds_again(tmp_path, raw, tokenizer):
    prefix = preprocess_cached(config(raw), tokenizer, tmp_path / "cache")
    before = record_path(prefix).stat().st_mtime_ns
    assert preprocess_cached(config(raw, overwrite_cache=True), tokenizer, tmp_path / "cache") == prefix
    assert record_path(prefix).stat().st_mtime_ns > before


def test_an_interrupted_build_is_done_again(tmp_path, raw, tokenizer):
    prefix = preprocess_cached(config(raw), tokenizer, tmp_path / "cache")
    record_path(prefix).unlink()  # the record is written last
    with pytest.raises(UserError, match="no record"):
        SFTDataset(prefix)
    assert len(SFTDataset(preprocess_cached(config(raw), tokenizer, tmp_path / "cache"), "1")) == 20


def test_several_processes_build_once(tmp_path, raw, tokenizer_dir):
    program = (
        "import sys\n"
        "from mindspeed_llm.config.data import DataConfig\n"
        "from mindspeed_llm.data.cache import preprocess_cached\n"
        "from mindspeed_llm.data.tokenizer import load_tokenizer\n"
        "raw, tokenizer, cache = sys.argv[1:]\n"
        "print('prefix', preprocess_cached(DataConfig(data_path=[raw], prompt_type='llama2'),"
        " load_tokenizer(tokenizer), cache))\n"
    )
    arguments = [sys.executable, "-c", program, str(raw), str(tokenizer_dir), str(tmp_path / "cache")]
    running = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len({output.strip().splitlines()[-1] for output in outputs}) == 1
    assert sum("rows read" in output for output in outputs) == 1  # one report: one of them did the work
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("while_waiting", [False, True])
def test_a_file_system_without_locks_is_refused(tmp_path, raw, tokenizer, monkeypatch, number, while_waiting):
    """Nothing is built there, where nothing keeps another process from building it too."""

    def flock(stream, operation):
        if while_waiting and operation & fcntl.LOCK_NB:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=rf"--cache-dir: {tmp_path}/cache .*locks no files \({os.strerror(number)}\)"):
        preprocess_cached(config(raw), tokenizer, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    monkeypatch.undo()
    assert is_preprocessed(preprocess_cached(config(raw), tokenizer, tmp_path / "cache"))


def test_raw_and_preprocessed_paths_are_told_apart(tmp_path, raw, tokenizer):
    prefix = preprocess_cached(config(raw), tokenizer, tmp_path / "cache")
    assert is_preprocessed(prefix) and is_preprocessed(f"{prefix}_packed_labels_document.bin")
    assert not is_preprocessed(raw) and not is_preprocessed(tmp_path)


QUESTIONS = {"question": "a", "answer": "b"}
ALPACA_WITH_TEXT = {"instruction": "a", "input": "", "output": "b", "text": "a b"}  # the columns of Stanford's file


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ({"prompt_type": "llama2", "pack": "none", "handler_name": "AlpacaStyleInstructionHandler"}, None),
        ({"prompt_type": "chatml"}, "data: --prompt-type chatml contradicts .* made with llama2"),
        ({"pack": "neat_pack"}, "data: --neat-pack neat_pack contradicts .* made with none"),
        ({"append_eod": True}, "data: --append-eod True contradicts"),
        ({"enable_thinking": "true"}, "data: --enable-thinking true contradicts"),
        ({"map_keys": {"prompt": "q"}}, "data: --map-keys .* contradicts"),
        ({"max_samples": 3}, "data: --max-samples has no use with .* preprocessed"),
    ],
)
def test_preprocessed_data_are_not_made_again_as_asked(tmp_path, raw, tokenizer, asked, refusal):
    prefix = preprocess_cached(config(raw), tokenizer, tmp_path / "cache")
    with pytest.raises(UserError, match=refusal) if refusal else nullcontext():
        check_settings(prefix, asked)


def test_an_unclear_source_is_refused(tmp_path, tokenizer):
    path = tmp_path / "raw.json"
    path.write_text(json.dumps([QUESTIONS]))
    with pytest.raises(UserError, match="handler-name: not given, and no single .*'question', 'answer'.*--map-keys"):
        preprocess_cached(config(path), tokenizer, tmp_path / "cache")
    with pytest.raises(UserError, match="no single pre-training handler .*--json-keys"):
        guess_handler(str(path), None, None, "pretrain")
    path.write_text(json.dumps([{"conversations": [{"role": "user", "content": "a"}]}]))
    with pytest.raises(UserError, match="""--map-keys '{"messages": "conversations"}'"""):
        guess_handler(str(path), None, None, "sft")
    path.write_text(json.dumps([ALPACA_WITH_TEXT]))
    with pytest.raises(UserError, match="no single handler reads"):
        guess_handler(str(path), None, None)


@pytest.mark.parametrize(("text", "reason"), [("", "no rows"), ("{broken\n7", "raw.jsonl:1: not JSON")])
def test_a_source_without_a_readable_row_is_refused(tmp_path, text, reason):
    path = tmp_path / "raw.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=f"input: .* has no readable row .*{reason}"):
        guess_handler(str(path), None, None)


@pytest.mark.parametrize(
    ("row", "stage", "named", "handler"),
    [
        (ALPACA_WITH_TEXT, "sft", {}, "AlpacaStyleInstructionHandler"),
        (ALPACA_WITH_TEXT, "pretrain", {}, "GeneralPretrainHandler"),
        ({"body": "a b"}, "pretrain", {"json_keys": ["body"]}, "GeneralPretrainHandler"),
        (QUESTIONS, "sft", {"map_keys": {"prompt": "question", "response": "answer"}}, "AlpacaStyleInstructionHandler"),
        (
            {"chat": [{"from": "user", "what": "a"}]},
            "sft",
            {"map_keys": {"messages": "chat", "tags": {"content_tag": "what"}}},
            "SharegptStyleInstructionHandler",
        ),
        (
            {"chat": [{"role": "user", "content": "a"}]},
            "sft",
            {"map_keys": {"messages": "chat"}},
            "OpenAIInstructionHandler",
        ),
    ],
)
def test_stage_and_named_columns_decide_the_handler(tmp_path, row, stage, named, handler):
    path = tmp_path / "raw.json"
    path.write_text(json.dumps([row]))
    assert guess_handler(str(path), None, None, stage, **named) == handler


def test_a_training_reads_the_columns_of_its_own_stage(tmp_path, tokenizer):
    path = tmp_path / "raw.json"
    path.write_text(json.dumps([ALPACA_WITH_TEXT] * 3))
    data = DataConfig(data_path=[str(path)], prompt_type="default")
    assert len(SFTDataset(preprocess_cached(data, tokenizer, tmp_path / "cache", stage="sft"), "1")) == 3
    prefix = preprocess_cached(DataConfig(data_path=[str(path)]), tokenizer, tmp_path / "cache", stage="pretrain")
    assert idx_path(f"{prefix}_text_document").is_file()
