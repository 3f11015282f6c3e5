"""Every format gives the same rows, and every row knows its line."""

from __future__ import annotations

import csv
import json
import tracemalloc

import pytest

from mindspeed_llm.data import json_array, sources
from mindspeed_llm.data.sources import find_files, read_chunks
from mindspeed_llm.errors import UserError

ROWS = [{"text": f'row {i}, "quoted"\nsecond line ü', "n": str(i)} for i in range(7)]


def read(spec, **options):
    return [
        (chunk.origin(number), row) for chunk in read_chunks(str(spec), **options) for number, row in chunk.decode()
    ]


def rows_of(spec, **options):
    return [row for _, row in read(spec, **options)]


def write_all(directory):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(ROWS)
    (directory / "a.json").write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")
    (directory / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (directory / "lines.json").write_text("\n".join(json.dumps(r) for r in ROWS))
    (directory / "bom.json").write_text(json.dumps(ROWS), encoding="utf-8-sig")
    pq.write_table(table, directory / "a.parquet", row_group_size=3)
    with pa.OSFile(str(directory / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.OSFile(str(directory / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with open(directory / "a.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text", "n"])
        writer.writeheader()
        writer.writerows(ROWS)


def test_all_formats_agree(tmp_path):
    write_all(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for file in files:
        assert rows_of(file) == ROWS, file.name


def test_text_lines_are_rows(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\nthree\n")
    assert read(tmp_path / "a.txt") == [
        (f"{tmp_path / 'a.txt'}:1", {"text": "one"}),
        (f"{tmp_path / 'a.txt'}:3", {"text": "three"}),
    ]


def test_origins_are_the_lines_of_the_file(tmp_path):
    write_all(tmp_path)
    lines = (tmp_path / "a.json").read_text().splitlines()
    for origin, _ in read(tmp_path / "a.json"):
        assert lines[int(origin.rsplit(":", 1)[1]) - 1].strip() == "{"
    # Each csv row has a line feed inside its text, so row k starts on line 2 + 2k.
    assert [int(origin.rsplit(":", 1)[1]) for origin, _ in read(tmp_path / "a.csv")] == [2 + 2 * k for k in range(7)]


def test_elements_of_a_one_line_array_are_numbered(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2}, 3]\n')
    assert [origin.rsplit(":", 1)[1] for origin, _ in read(tmp_path / "a.json")] == ["1", "2", "3"]


def test_a_broken_line_is_an_error_of_that_line_only(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n[1]\n{"text": "d"}\n')
    kinds = [(origin.rsplit(":", 1)[1], type(row).__name__) for origin, row in read(tmp_path / "a.jsonl")]
    assert kinds == [("1", "dict"), ("2", "UserError"), ("3", "UserError"), ("4", "dict")]


def test_a_broken_array_stops_with_its_line(tmp_path):
    (tmp_path / "a.json").write_text('[\n {"a": 1},\n {"a" 2}\n]')
    with pytest.raises(UserError, match="a.json:3 is not JSON"):
        read(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('[\n {"a": 1},\n')
    with pytest.raises(UserError, match="does not end"):
        read(tmp_path / "b.json")


ELEMENTS = [
    {"text": 'quote " and \\ back\nslash', "deep": [[1, {"a": [None, True]}], -0.5e-300]},
    12345, -1.25e17, float("-inf"), "\u4e2d\U0001f600\u2028", "", [], {}, {"text": "\u00fc" * 50}, 7,
]  # fmt: skip


@pytest.mark.parametrize("block", [1, 2, 5, 16, 23, 64])
@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(
    "indent, encoding, newline", [(None, "utf-8-sig", "\n"), (1, "utf-8", "\r\n"), (0, "utf-8", "\r")]
)
def test_blocks_may_end_anywhere_in_an_array(tmp_path, monkeypatch, block, ascii_only, indent, encoding, newline):
    monkeypatch.setattr(json_array, "BLOCK_BYTES", block)
    file = tmp_path / "a.json"
    text = "\n \n" + json.dumps(ELEMENTS, indent=indent, ensure_ascii=ascii_only) + "\n\n"
    file.write_bytes(text.replace("\n", newline).encode(encoding))
    numbers, rows, sizes = zip(*json_array.array_rows(file))
    assert list(rows) == ELEMENTS
    if indent is None:
        assert numbers == tuple(range(3, 13))
        assert sizes == tuple(len(json.dumps(element, ensure_ascii=ascii_only)) for element in ELEMENTS)
    else:
        assert [text.split("\n")[number - 1].strip()[:1] for number in numbers] == list('{1--""[{{7')


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "text, message",
    [
        ('[\n1,\n2,\n{"a" 3}\n, 4]', "a.json:4 is not JSON .*':' delimiter"),
        ('[\n1,\n"two\n"]', "a.json:3 is not JSON .*control character"),
        ('[\n1,\n{"a": "b', "a.json:3 is not JSON .*Unterminated string"),
        ('[\n1,\n{"a": [1.', "a.json:3 is not JSON"),
        ("[\n1,\n1.", "a.json:3 is not JSON|a.json' is cut off"),
    ],
)
def test_blocks_do_not_change_where_an_array_is_broken(tmp_path, monkeypatch, block, text, message):
    monkeypatch.setattr(json_array, "BLOCK_BYTES", block)
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        list(json_array.array_rows(file))


def test_numbers_that_look_whole_at_the_end_of_a_block_are_read_on(tmp_path, monkeypatch):
    """Negative control of the blocks above: without the margin a part of a number is taken for all of it."""
    monkeypatch.setattr(json_array, "BLOCK_BYTES", 4)
    monkeypatch.setattr(json_array, "UNDECIDED", -1)
    (tmp_path / "a.json").write_text("[12345, 6]")
    assert [row for _, row, _ in json_array.array_rows(tmp_path / "a.json")][0] == 123


def peak_bytes(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "lines"])
def test_an_array_takes_the_memory_of_a_chunk_and_not_of_the_file(tmp_path, indent):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"text": "word " * 4000}] * 1600, indent=indent))

    def chunks():
        assert sum(len(chunk.rows) for chunk in read_chunks(str(file))) == 1600

    size = file.stat().st_size
    assert size > 30 << 20
    assert peak_bytes(chunks) < 3 * sources.CHUNK_BYTES
    # What holds the whole text is seen.
    assert peak_bytes(lambda: json.JSONDecoder().raw_decode(file.read_text(), 0)) > size


def test_directories_are_read_in_numeric_order(tmp_path):
    for number in (10, 2, 1):
        (tmp_path / f"part-{number}.txt").write_text(f"{number}\n")
    (tmp_path / "README.md").write_text("not data")
    assert [row["text"] for row in rows_of(tmp_path)] == ["1", "2", "10"]
    pair = f"{tmp_path / 'part-10.txt'},{tmp_path / 'part-2.txt'}"
    assert [row["text"] for row in rows_of(pair)] == ["10", "2"]


def test_a_directory_of_several_types_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.json").write_text("[{}]")
    assert len(rows_of(tmp_path)) == 2
    (tmp_path / "requirements.txt").write_text("torch\n")
    with pytest.raises(UserError, match="mixes .json, .txt files"):
        rows_of(tmp_path)


def test_a_saved_data_set_is_read_without_its_metadata(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == ROWS


def test_max_samples_counts_over_files(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.txt").write_text("a\nb\nc\n")
    assert len(rows_of(tmp_path, max_samples=4)) == 4


def test_a_csv_row_with_too_many_fields_is_bad(tmp_path):
    (tmp_path / "a.csv").write_text("text\nok\na,b\n")
    assert [type(row).__name__ for row in rows_of(tmp_path / "a.csv")] == ["dict", "UserError"]


def test_load_dataset_reads_a_directory_with_parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    params = {"split": "train[:3]", "cache_dir": str(tmp_path / "cache")}
    assert rows_of(tmp_path / "d", hf_params=params) == ROWS[:3]


def test_absent_data_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="/no/such.json does not exist"):
        find_files("/no/such.json")
    with pytest.raises(UserError, match="missing.json"):
        find_files(f"{tmp_path},missing.json")
    with pytest.raises(UserError, match="has no data files"):
        find_files(str(tmp_path))
    (tmp_path / "x.xml").write_text("")
    with pytest.raises(UserError, match="type of .*x.xml"):
        find_files(str(tmp_path / "x.xml"))


def test_a_data_set_that_cannot_be_reached_says_so(monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/nothing' is no path, and as a data set it could not be loaded"):
        read("nobody/nothing")


def test_a_hub_that_does_not_answer_is_asked_once_and_the_cache_looked_into(monkeypatch):
    """Not six times over 24 seconds, as `datasets` does by itself."""
    import datasets

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    modes = []
    plain = datasets.load_dataset

    def load_dataset(*args, **kwargs):
        modes.append(datasets.config.HF_HUB_OFFLINE)
        return plain(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="http://127.0.0.1:9 does not answer .* try: HF_ENDPOINT"):
        read("nobody/nothing")
    assert modes == [True] and datasets.config.HF_HUB_OFFLINE is False


def test_files_of_ones_own_need_no_hub(monkeypatch, tmp_path):
    """With `datasets` reading them. That it is not asked shows that the hub is not in the way."""
    monkeypatch.setattr("mindspeed_llm.data.sources.hub_answers", lambda: pytest.fail("asked"))
    file = tmp_path / "a.json"
    file.write_text('[{"text": "x"}]')
    options = {"data_files": str(file), "cache_dir": str(tmp_path / "cache")}
    assert rows_of("json", hf_params=options) == [{"text": "x"}]


@pytest.mark.parametrize(
    "name, text", [("a.csv", "text\n你好\n"), ("a.txt", "你好\n"), ("a.json", '[{"text": "你好"}]')]
)
def test_text_in_another_encoding_is_refused_in_one_line(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("gb18030"))
    with pytest.raises(UserError, match=f"{name}' is not UTF-8, because of byte 0xc4") as refusal:
        rows_of(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_a_csv_field_may_be_as_long_as_a_document(tmp_path):
    limit, text = csv.field_size_limit(), "word " * 40_000
    with open(tmp_path / "a.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["text"], [text], ["short"]])
    assert len(text) > limit
    assert rows_of(tmp_path / "a.csv") == [{"text": text}, {"text": "short"}]
    assert csv.field_size_limit() == limit
