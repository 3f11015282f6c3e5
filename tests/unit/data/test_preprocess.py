"""From raw rows to indexed files: what is written, what is refused, and the same bytes for any number of workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest

from mindspeed_llm.config.data import DataConfig, TokenizerConfig
from mindspeed_llm.data.indexed import IndexedReader
from mindspeed_llm.data.preprocess import preprocess, preprocess_input
from mindspeed_llm.data.record import find_dataset, read_record
from mindspeed_llm.errors import UserError

ALPACA = "AlpacaStyleInstructionHandler"
SHAREGPT = "SharegptStyleInstructionHandler"
PRETRAIN = "GeneralPretrainHandler"


def sft_rows(prefix):
    ids, mask, labels = (
        IndexedReader(f"{prefix}_packed_{s}_document") for s in ("input_ids", "attention_mask", "labels")
    )
    return [(ids[i], mask[i], labels[i]) for i in range(len(ids))]


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def outputs(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.suffix in (".bin", ".idx", ".json")}


def test_pretrain_documents_are_the_texts_and_eos(tmp_path, text_file, texts, tokenizer):
    report = preprocess_input(str(text_file), str(tmp_path / "d"), tokenizer, handler_name=PRETRAIN, append_eod=True)
    reader = IndexedReader(tmp_path / "d_text_document")
    assert reader.dtype == np.uint16
    assert [tokenizer.decode(reader[i]) for i in range(len(reader))] == [text + "</s>" for text in texts]
    assert (report.rows, report.documents, report.tokens) == (len(texts), len(texts), reader.num_tokens)
    record = read_record(tmp_path / "d")
    assert (record.stage, record.streams, record.append_eod) == ("pretrain", ["text_document"], True)
    assert record.tokenizer == tokenizer.fingerprint()


def test_megatron_reads_the_labels(tmp_path, alpaca_file, tokenizer):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    preprocess_input(str(alpaca_file), str(tmp_path / "d"), tokenizer, handler_name=ALPACA, prompt_type="llama2")
    labels = IndexedDataset(str(tmp_path / "d_packed_labels_document"))
    ours = IndexedReader(tmp_path / "d_packed_labels_document")
    assert labels[0].dtype == np.int32 and -100 in labels[0]
    assert all(np.array_equal(labels[i], ours[i]) for i in range(len(ours)))


def test_alpaca_rows_become_conversations(tmp_path, alpaca_file, alpaca_rows, tokenizer):
    preprocess_input(str(alpaca_file), str(tmp_path / "d"), tokenizer, handler_name=ALPACA, prompt_type="llama2")
    rows = sft_rows(tmp_path / "d")
    assert [tokenizer.decode(ids) for ids, _, _ in rows[:3]] == [
        "<s>[INST] Say hello. [/INST]Hello there!</s>",
        "<s>[INST] Add.\n2 + 2 [/INST]4</s>",
        "<s>[INST] <<SYS>>\nYou count.\n<</SYS>>\n\nOne? [/INST]One.</s>"
        "<s>[INST] Two? [/INST]Two.</s><s>[INST] Go on. [/INST]Three.</s>",
    ]
    for (ids, mask, labels), row in zip(rows, alpaca_rows):
        answers = [answer for _, answer in row.get("history", [])] + [row["output"]]
        assert tokenizer.decode(ids[labels != -100]) == "".join(answer + "</s>" for answer in answers)
        assert np.array_equal(labels[labels != -100], ids[labels != -100])
        assert set(mask.tolist()) == {1}


SHAREGPT_ROW = {
    "conversations": [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
        {"from": "user", "value": "c"},
        {"from": "assistant", "value": "d"},
    ]
}
OPENAI_ROW = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
}
OPENAI_MAP = {
    "messages": "messages",
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}
SWAPPED_ROW = {"chat": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}


@pytest.mark.parametrize(
    ("handler", "row", "map_keys"),
    [
        (SHAREGPT, SHAREGPT_ROW, None),
        (SHAREGPT, OPENAI_ROW, OPENAI_MAP),
        ("OpenAIInstructionHandler", OPENAI_ROW, None),
        (None, OPENAI_ROW, None),
        (SHAREGPT, {"system": "S", "conversations": SHAREGPT_ROW["conversations"][1:]}, None),
    ],
)
def test_message_handlers_agree(tmp_path, tokenizer, handler, row, map_keys):
    source = write_jsonl(tmp_path / "x.jsonl", [row])
    preprocess_input(
        source, str(tmp_path / "d"), tokenizer, handler_name=handler, prompt_type="chatml", map_keys=map_keys
    )
    ((ids, _, labels),) = sft_rows(tmp_path / "d")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
    )
    assert tokenizer.decode(ids[labels != -100]) == "b<|im_end|>d<|im_end|>"


def test_a_users_tag_wins_over_the_synonyms(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "x.jsonl", [SWAPPED_ROW])
    tags = {"messages": "chat", "user_tag": "gpt", "assistant_tag": "human"}
    preprocess_input(
        source, str(tmp_path / "d"), tokenizer, handler_name=SHAREGPT, prompt_type="default", map_keys=tags
    )
    assert tokenizer.decode(sft_rows(tmp_path / "d")[0][0]) == "Human: a\nAssistant:b</s>"


def turns(*pairs):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


@pytest.mark.parametrize(
    ("handler", "row", "reason"),
    [
        (SHAREGPT, turns(("human", "a"), ("human", "b"), ("gpt", "c")), "turn 2 is the user's"),
        (SHAREGPT, turns(("gpt", "a"), ("human", "b")), "turn 1 is the assistant's"),
        (SHAREGPT, turns(("human", "a")), "does not end with an answer"),
        (SHAREGPT, turns(("human", "a"), ("robot", "b")), "unknown role 'robot'"),
        (SHAREGPT, turns(("human", "a"), ("gpt", "")), r"message 2 \(gpt\) has no text"),
        (SHAREGPT, turns(("human", "a"), ("function_call", "{}")), "tool calls are not supported"),
        (SHAREGPT, {**SHAREGPT_ROW, "tools": '[{"name": "f"}]'}, "tools are not supported"),
        (SHAREGPT, {**SHAREGPT_ROW, "system": "T"}, "a system text in its column and another one"),
        (SHAREGPT, OPENAI_ROW, "'conversations' is not a list of messages.*it has 'messages'"),
        (SHAREGPT, {"conversations": OPENAI_ROW["messages"]}, "message 1 lacks 'from' or 'value'"),
        (
            SHAREGPT,
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]},
            "'weight', which is not supported",
        ),
        (ALPACA, {"instruction": "a"}, "no column 'output'"),
        (ALPACA, {"instruction": "", "output": "b"}, "empty instruction"),
        (ALPACA, {"instruction": "a", "output": ""}, "empty output"),
        (ALPACA, {"instruction": "a", "output": 3}, "'output' is int, not text"),
        (ALPACA, {"instruction": "a", "output": "b", "history": [["x"]]}, r"list of \[question, answer\]"),
        (PRETRAIN, {"content": "a"}, "no column 'text'"),
        (PRETRAIN, {"text": None}, "'text' is NoneType, not text"),
        (PRETRAIN, "not json", "not JSON"),
    ],
)
def test_a_bad_row_is_named_and_counted(tmp_path, tokenizer, handler, row, reason):
    good = {PRETRAIN: {"text": "ok"}, ALPACA: {"instruction": "a", "output": "b"}, SHAREGPT: SHAREGPT_ROW}[handler]
    source = write_jsonl(tmp_path / "x.jsonl", [good, good, row, good])
    options = dict(handler_name=handler, prompt_type=None if handler == PRETRAIN else "default")
    with pytest.raises(UserError, match=f"x.jsonl:3: .*{reason}.*legal: at most 0"):
        preprocess_input(source, str(tmp_path / "d"), tokenizer, **options)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob(".*"))
    report = preprocess_input(source, str(tmp_path / "d"), tokenizer, **options, max_bad_rows=1)
    assert (report.rows, report.documents, report.num_bad) == (4, 3, 1)


def test_one_bad_line_of_a_thousand(tmp_path, tokenizer):
    rows = [{"text": f"row {i}"} for i in range(2500)]
    rows[1776] = '{"text": "cut off'
    source = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(UserError, match="x.jsonl:1777: not JSON"):
        preprocess_input(source, str(tmp_path / "d"), tokenizer, handler_name=PRETRAIN)


@pytest.mark.parametrize(("pack_mode", "counts"), [("none", (1, 2)), ("neat_pack", (1, 2, 4))])
def test_same_bytes_for_any_number_of_workers(tmp_path, tokenizer, alpaca_rows, pack_mode, counts):
    many = [{**row, "output": f"{row['output']} {copy}"} for copy in range(12) for row in alpaca_rows]
    many[7] = {"instruction": "no output"}
    source = write_jsonl(tmp_path / "x.jsonl", many)
    results = []
    for workers in counts:
        target = tmp_path / str(workers)
        preprocess_input(
            source, str(target / "d"), tokenizer, handler_name=ALPACA, prompt_type="alpaca", workers=workers,
            seq_length=200, pack_mode=pack_mode, max_bad_rows=1,
        )  # fmt: skip
        results.append(outputs(target))
    assert len(results[0]) == 7
    assert all(result == results[0] for result in results)
    # The comparison is not vacuous: another order of rows gives other bytes.
    reverse = write_jsonl(tmp_path / "y.jsonl", many[::-1])
    preprocess_input(
        reverse, str(tmp_path / "r" / "d"), tokenizer, handler_name=ALPACA, prompt_type="alpaca", seq_length=200,
        pack_mode=pack_mode, max_bad_rows=1,
    )  # fmt: skip
    assert outputs(tmp_path / "r") != results[0]


def test_a_killed_worker_is_an_error_within_seconds(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "x.jsonl", [{"text": f"row {i} " * 20} for i in range(20_000)])

    # Other tests of the session have processes of their own: pools, the checkpoint writer's manager.
    others = set(multiprocessing.active_children())

    def kill():
        while not (workers := set(multiprocessing.active_children()) - others):
            time.sleep(0.01)
        os.kill(workers.pop().pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(UserError, match="ended abruptly"):
        preprocess_input(source, str(tmp_path / "d"), tokenizer, handler_name=PRETRAIN, workers=2)
    assert time.monotonic() - start < 20
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_an_exception_in_a_worker_reaches_the_caller(tokenizer):
    from mindspeed_llm.data.handlers import GeneralPretrainHandler
    from mindspeed_llm.data.sources import Chunk
    from mindspeed_llm.data.workers import map_chunks

    others = set(multiprocessing.active_children())
    handler = GeneralPretrainHandler(tokenizer, ["text"])
    chunks = [Chunk("f", "row", [{"text": "a"}], [1], 1), Chunk("f", "row", None, [1], 1)]
    for workers in (1, 2):
        with pytest.raises(TypeError):
            list(map_chunks(handler, chunks, workers))
    assert set(multiprocessing.active_children()) <= others


def packed(tmp_path, tokenizer, alpaca_rows, mode, seq_length=128):
    source = write_jsonl(tmp_path / "x.jsonl", alpaca_rows)
    report = preprocess_input(
        source, str(tmp_path / mode), tokenizer, handler_name=ALPACA, prompt_type="default", seq_length=seq_length,
        pack_mode=mode,
    )  # fmt: skip
    return report, sft_rows(tmp_path / mode)


def segments(rows):
    for ids, mask, labels in rows:
        for number in range(1, mask.max() + 1):
            yield ids[mask == number], labels[mask == number]


@pytest.mark.parametrize("fixture", ["tokenizer", "padded_tokenizer"])
def test_packed_rows_hold_the_same_samples(tmp_path, fixture, alpaca_rows, request):
    tokenizer = request.getfixturevalue(fixture)
    report, rows = packed(tmp_path, tokenizer, alpaca_rows, "pack")
    dropped = report.dropped["longer than seq-length 128"]
    assert dropped and report.documents == len(alpaca_rows) - dropped
    plain = write_jsonl(tmp_path / "y.jsonl", alpaca_rows)
    preprocess_input(plain, str(tmp_path / "p"), tokenizer, handler_name=ALPACA, prompt_type="default", seq_length=128)
    expected = sorted((ids.tolist(), labels.tolist()) for ids, _, labels in sft_rows(tmp_path / "p"))
    assert sorted((ids.tolist(), labels.tolist()) for ids, labels in segments(rows)) == expected
    for ids, mask, labels in rows:
        assert len(ids) == 128
        assert np.all(np.diff(mask[mask > 0]) >= 0)
        padding = mask == 0
        assert np.all(ids[padding] == tokenizer.pad_token_id) and np.all(labels[padding] == -100)
        assert not padding[: np.count_nonzero(~padding)].any()
    assert report.packed_rows == len(rows) < report.documents


def test_neat_pack_cuts_where_pack_drops(tmp_path, tokenizer, alpaca_rows):
    report, rows = packed(tmp_path, tokenizer, alpaca_rows, "neat_pack")
    assert report.documents == len(alpaca_rows) and report.dropped["cut to seq-length 128 (kept)"]
    assert max(len(ids) for ids, _ in segments(rows)) == 128


def test_a_sample_whose_answer_is_cut_away_is_dropped(tmp_path, tokenizer):
    rows = [{"instruction": "word " * 200, "output": "answer"}, {"instruction": "a", "output": "b"}]
    source = write_jsonl(tmp_path / "x.jsonl", rows)
    report = preprocess_input(
        source, str(tmp_path / "d"), tokenizer, handler_name=ALPACA, prompt_type="default", seq_length=64,
        pack_mode="neat_pack",
    )  # fmt: skip
    assert report.dropped["no trained token"] == 1 and report.documents == 1


def test_append_eod_trains_one_end(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "x.jsonl", [{"instruction": "a", "output": "b"}])
    for template, expected in (("empty", "ab</s>"), ("default", "Human: a\nAssistant:b</s>")):
        prefix = str(tmp_path / template)
        preprocess_input(source, prefix, tokenizer, handler_name=ALPACA, prompt_type=template, append_eod=True)
        ids, _, labels = sft_rows(prefix)[0]
        assert tokenizer.decode(ids) == expected
        assert tokenizer.decode(labels[labels != -100]) == "b</s>"


def test_finished_output_is_not_overwritten_unasked(tmp_path, text_file, tokenizer):
    prefix = str(tmp_path / "d")
    preprocess_input(str(text_file), prefix, tokenizer, handler_name=PRETRAIN)
    before = outputs(tmp_path)
    with pytest.raises(UserError, match="would be lost"):
        preprocess_input(str(text_file), prefix, tokenizer, handler_name=PRETRAIN, append_eod=True)
    assert outputs(tmp_path) == before
    preprocess_input(str(text_file), prefix, tokenizer, handler_name=PRETRAIN, append_eod=True, overwrite=True)
    assert outputs(tmp_path) != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(handler_name="AlpacaInstructionHandler"), "try: AlpacaStyleInstructionHandler"),
        (dict(handler_name=ALPACA), "prompt-type: is needed"),
        (dict(handler_name=PRETRAIN, prompt_type="llama2"), "prompt-type: has no use with GeneralPretrainHandler"),
        (dict(handler_name=PRETRAIN, pack_mode="pack"), "pack: has no use"),
        (dict(handler_name=ALPACA, prompt_type="alpaca", pack_mode="pack"), "seq-length: is needed to pack"),
        (dict(handler_name=ALPACA, prompt_type="alpaca", json_keys=["a"]), "json-keys: has no use"),
        (dict(handler_name=ALPACA, prompt_type="alpaca", map_keys={"promt": "x"}), "map-keys: 'promt'"),
        (
            dict(handler_name=ALPACA, prompt_type="alpaca", map_keys={"query": "inptu"}),
            "column 'inptu' occurs in no row",
        ),
        (dict(handler_name=ALPACA, prompt_type="alpaca", seq_length=2), "nothing is left.*longer than seq-length 2"),
        (dict(handler_name=PRETRAIN, json_keys=["text", "text"]), "different column names"),
    ],
)
def test_contradictions_are_refused(tmp_path, alpaca_file, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        preprocess_input(str(alpaca_file), str(tmp_path / "d"), tokenizer, **options)
    assert list(tmp_path.iterdir()) == []


def test_append_eod_needs_an_eos(tmp_path, text_file, tokenizer):
    from mindspeed_llm.data.tokenizer import FastTokenizer

    without = FastTokenizer(tokenizer.backend, "no-eos", {})
    with pytest.raises(UserError, match="append-eod: set, but 'no-eos' has no eos"):
        preprocess_input(str(text_file), str(tmp_path / "d"), without, handler_name=PRETRAIN, append_eod=True)


def test_the_options_reach_the_output(tmp_path, alpaca_file, tokenizer_dir):
    data = DataConfig(
        input=str(alpaca_file), output_prefix=str(tmp_path / "d"), handler_name=ALPACA, prompt_type="llama2",
        neat_pack=True, seq_length=256, max_samples=40,
    )  # fmt: skip
    report = preprocess(data, TokenizerConfig(tokenizer_name_or_path=str(tokenizer_dir)))
    assert report.rows == 40
    record = read_record(tmp_path / "d")
    assert (record.pack, record.seq_length, record.template) == ("neat_pack", 256, "llama2")
    report.print()


def test_merge_mode_equals_preprocessing_the_whole(tmp_path, alpaca_rows, tokenizer):
    parts, streams = tmp_path / "parts", ("input_ids", "attention_mask", "labels")
    options = dict(handler_name=ALPACA, prompt_type="llama2")
    for number, start in ((2, 0), (10, 100)):  # part 10 comes after part 2
        source = write_jsonl(tmp_path / f"{number}.jsonl", alpaca_rows[start : start + 100])
        preprocess_input(source, str(parts / f"part{number}"), tokenizer, **options)
    keys = [f"packed_{stream}_document" for stream in streams]
    data = DataConfig(input=str(parts), output_prefix=str(tmp_path / "m" / "d"), merge_group_keys=keys)
    assert preprocess(data, TokenizerConfig()) is None
    whole = write_jsonl(tmp_path / "whole.jsonl", alpaca_rows[:200])
    preprocess_input(whole, str(tmp_path / "w" / "d"), tokenizer, **options)
    assert outputs(tmp_path / "m") == outputs(tmp_path / "w")
    with pytest.raises(UserError, match="exists"):
        preprocess(data, TokenizerConfig())


def test_merge_mode_refuses_unlike_parts(tmp_path, alpaca_file, tokenizer):
    for name, template in (("a", "llama2"), ("b", "default")):
        preprocess_input(
            str(alpaca_file), str(tmp_path / "p" / name), tokenizer, handler_name=ALPACA, prompt_type=template
        )
    keys = [f"packed_{stream}_document" for stream in ("input_ids", "attention_mask", "labels")]
    data = DataConfig(input=str(tmp_path / "p"), output_prefix=str(tmp_path / "m"), merge_group_keys=keys)
    with pytest.raises(UserError, match="has template 'default', but .* has 'llama2'"):
        preprocess(data, TokenizerConfig())
    data.merge_group_keys = keys[:1]
    with pytest.raises(UserError, match="are not the streams"):
        preprocess(data, TokenizerConfig())


def test_find_dataset_accepts_every_spelling(tmp_path, alpaca_file, tokenizer):
    prefix = str(tmp_path / "my_data")
    preprocess_input(str(alpaca_file), prefix, tokenizer, handler_name=ALPACA, prompt_type="llama2")
    for suffix in ("", "_packed", "_packed_input_ids_document", "_packed_labels_document.bin", ".record.json"):
        assert find_dataset(prefix + suffix)[0] == prefix, suffix
    assert find_dataset(str(tmp_path / "my")) is None
