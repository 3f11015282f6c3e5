"""Traces whose overlaps are known to the microsecond, in every profiler's form; what is no trace; the page."""

import gzip
import json
import random
from html.parser import HTMLParser

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mindspeed_llm.__main__ import main
from mindspeed_llm.accelerator import ranges
from mindspeed_llm.errors import UserError
from mindspeed_llm.training.trace import names, summary
from mindspeed_llm.training.trace.intervals import difference, intersection, length, union
from mindspeed_llm.training.trace.marks import Marks
from mindspeed_llm.training.trace.page import page, page_beside, write_page
from mindspeed_llm.training.trace.reading import find_traces, nanoseconds, read_trace
from mindspeed_llm.training.trace.summary import summarize, summarize_all
from mindspeed_llm.training.trace.tables import comparisons, tables_of, text

torch.set_num_threads(1)
US = 1000
HOST, WORKER = 11, 12
REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def event(name, start, dur, category="cpu_op", pid=1, tid=HOST, **args):
    return {"ph": "X", "name": name, "ts": start, "dur": dur, "cat": category, "pid": pid, "tid": tid, "args": args}


def kernel(name, start, dur, stream=7, **args):
    return event(name, start, dur, "kernel", 0, stream, **args)


def arrow(category, number, start, end):
    """From (pid, tid, ts) to (pid, tid, ts)."""
    ends = zip("sf", (start, end))
    return [{"ph": ph, "cat": category, "id": number, "pid": p, "tid": t, "ts": ts} for ph, (p, t, ts) in ends]


def write(path, events, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, **more}))
    return path


@pytest.fixture
def written(tmp_path):
    """Write events as a trace of rank 0 and sum it up."""
    return lambda events, **more: summarize(write(tmp_path / "rank0.1.pt.trace.json", events, **more))


def moments(pieces):
    """Every microsecond of the pieces."""
    return {moment for start, end in pieces for moment in range(start, end)}


def drawn(generator, many):
    """Pieces of whole microseconds that overlap, touch, lie in each other or are empty."""
    starts = [generator.randrange(60) for _ in range(many)]
    return [(start, start + generator.randrange(12)) for start in starts]


@pytest.mark.parametrize("seed", range(30))
def test_intervals_are_sets_of_moments(seed):
    generator = random.Random(seed)
    a, b = drawn(generator, seed % 9), drawn(generator, 7)
    sets, merged = (moments(a), moments(b)), (union(a), union(b))
    assert all(moments(m) == s and length(m) == len(s) for m, s in zip(merged, sets))
    assert all(left[1] < right[0] for left, right in zip(merged[0], merged[0][1:]))
    assert moments(intersection(*merged)) == sets[0] & sets[1]
    assert moments(difference(*merged)) == sets[0] - sets[1]
    assert length(intersection(*merged)) + length(difference(*merged)) == length(merged[0])


OVERLAPS = {  # (computation, communication, hidden, exposed), each piece (start, duration)
    "apart": ([(0, 10)], [(20, 5)], 0, 5),
    "touching": ([(0, 10)], [(10, 5)], 0, 5),
    "inside": ([(0, 30)], [(10, 5)], 5, 0),
    "around": ([(10, 5)], [(0, 30)], 5, 25),
    "half": ([(0, 10)], [(5, 10)], 5, 5),
    "two products, one collective": ([(0, 4), (6, 4)], [(2, 6)], 4, 2),
    "two streams compute": ([(0, 10), (5, 10)], [(3, 14)], 12, 2),
    "two collectives at once": ([(0, 10)], [(5, 10), (8, 4)], 5, 5),
    "nested products": ([(0, 20), (5, 5)], [(4, 8)], 8, 0),
    "nothing computes": ([], [(3, 7)], 0, 7),
}


def overlapped(computes, sends):
    """Kernels, each on a stream of its own."""
    products = [kernel("gemm", start, dur, number) for number, (start, dur) in enumerate(computes)]
    return products + [kernel(REDUCE, start, dur, 50 + number) for number, (start, dur) in enumerate(sends)]


@pytest.mark.parametrize("case", OVERLAPS)
def test_what_is_hidden_is_known_to_the_microsecond(written, case):
    computes, sends, hidden, exposed = OVERLAPS[case]
    found = written(overlapped(computes, sends))
    (kind, collective), *others = found.collectives.items()
    assert kind == "all-reduce" and not others and collective.count == len(sends)
    assert (collective.hidden, collective.exposed) == (hidden * US, exposed * US)
    assert collective.total == collective.hidden + collective.exposed
    assert sum(map(length, found.times.named().values())) == found.duration


def test_sums_in_the_place_of_unions_are_noticed(written, monkeypatch):
    events = overlapped([(0, 10), (40, 1)], [(5, 10), (8, 4)])
    right = written(events).communication
    assert (right.hidden, right.exposed) == (5 * US, 5 * US)
    monkeypatch.setattr(summary, "union", sorted)
    wrong = written(events).communication
    assert (wrong.hidden, wrong.exposed) != (5 * US, 5 * US)


def test_kinds_of_nccl_and_copies(written):
    found = written(
        [
            kernel("gemm", 0, 10),
            kernel("ncclDevKernel_ReduceScatter_Sum_bf16", 2, 4, 20),
            kernel("ncclDevKernel_SendRecv", 4, 10, 21, **{"Collective name": "all_to_allv"}),
            kernel("ncclDevKernel_SendRecv", 20, 5, 21),
            event("Memcpy HtoD", 12, 10, "gpu_memcpy", 0, 30),
            kernel("gemm", 39, 1),
        ]
    )
    assert {kind: (c.hidden, c.exposed) for kind, c in found.collectives.items()} == {
        "all-to-all": (6 * US, 4 * US),
        "reduce-scatter": (4 * US, 0),
        "send and receive": (0, 5 * US),
    }
    assert found.communication.total == 17 * US  # two kinds at once count once
    lengths = {name: length(times) // US for name, times in found.times.named().items()}
    assert list(lengths.values()) == [3, 8, 9, 6, 14]
    assert found.operators == {"gemm": (2, 11 * US)}


def test_a_collective_that_began_before_the_window_is_cut_at_it(written, monkeypatch):
    """The optimizer of the iteration before is still gathering when the first traced iteration begins."""
    events = [
        event(names.ITERATION + "4", 100, 50),
        kernel("gemm", 90, 25),
        kernel(REDUCE, 60, 60, 20),
        kernel(REDUCE, 20, 80, 21),  # ends with the moment in which the window begins
        kernel(REDUCE, 140, 30, 22),
        kernel(REDUCE, 150, 9, 23),
    ]
    found = written(events).communication
    assert (found.count, found.total, found.hidden) == (2, 30 * US, 15 * US)
    monkeypatch.setattr(summary, "_touching", summary._within)
    assert written(events).communication.total == 10 * US


def marked():
    """Two iterations of the host of a GPU: launches in phases and modules, kernels later on streams."""
    mlp, attention = names.MODULE + "decoder.layers.0.mlp", names.MODULE + "decoder.layers.0.self_attention"
    host = [
        event(names.ITERATION + "4", 0, 100),
        event(names.ITERATION + "5", 100, 110),
        event(names.PHASE + names.DATA, 0, 5),
        event(names.PHASE + names.SCHEDULE, 5, 80),
        event(names.PHASE + names.FORWARD, 10, 20),
        event(attention, 11, 6),
        event(names.MODULE + "decoder.layers.0.self_attention.linear_qkv", 12, 4),
        event("lora: adapter up", 14, 1),
        event("FusedForward", 12.5, 1),
        event(mlp, 20, 5),
        event(names.PHASE + names.BACKWARD, 40, 30),
        event("FusedBackward", 42, 10, tid=77),
    ]
    launches = [(12.5, HOST), (14.2, HOST), (21, HOST), (43, 77), (50, 77), (60, 77), (99, HOST)]
    kernels = [kernel("gemm", 110 + 10 * number, number + 1) for number in range(7)]
    arrows = [
        piece
        for number, (moment, thread) in enumerate(launches)
        for piece in arrow("ac2g", number, (1, thread, moment), (0, 7, 110 + 10 * number))
    ]
    return host + kernels + arrows + arrow("fwdbwd", 1, (1, HOST, 12.5), (1, 77, 42))


def test_kernels_belong_where_they_were_launched(written):
    found = written(marked())
    assert found.window == (0, 210 * US) and found.iterations == [100 * US, 110 * US]
    assert found.parts == {
        "attention": {"forward": 1 * US, "backward": 9 * US, "other": 0},  # its backward by the arrow
        "adapters": {"forward": 2 * US, "backward": 0, "other": 0},
        "MLP": {"forward": 3 * US, "backward": 0, "other": 0},
        "outside the model": {"forward": 0, "backward": 6 * US, "other": 7 * US},
    }
    assert found.phase_wall == {"data": 5 * US, "schedule": 30 * US, "forward": 20 * US, "backward": 30 * US}
    assert found.phase_computation == {"forward": 6 * US, "backward": 15 * US, "outside phases": 7 * US}


def test_ranges_that_are_drawn_again_on_the_device_do_not_count(written):
    """As torch does: around the kernels that were launched in a range, with its name, at the device's time."""
    host = marked()
    again = [
        event(names.ITERATION + "4", 110, 60, "gpu_user_annotation", 0, 7),
        event(names.PHASE + names.FORWARD, 43, 33, "gpu_user_annotation", 0, 7),
    ]
    found, expected = written([*host, *again]), written(host)
    assert found.iterations == expected.iterations and found.phase_wall == expected.phase_wall
    assert found.phase_computation == expected.phase_computation


def test_without_the_arrows_of_the_backward_pass_it_is_outside(written):
    found = written([piece for piece in marked() if piece["cat"] != "fwdbwd"])
    assert found.parts["attention"]["backward"] == 0 and found.parts["outside the model"]["backward"] == 15 * US


def cpu():
    """A host whose collectives run on a thread of gloo's, with operators of its own; three levels of operators."""
    name = {"ph": "M", "name": "thread_name", "pid": 1, "tid": WORKER, "args": {"name": "thread 12 (pt_gloo_runloop)"}}
    return [
        name,
        event("c10d::_allgather_base_", 0, 4),
        event("aten::clone", 1, 2),
        event("gloo:all_gather", 3, 20, "user_annotation", tid=WORKER),
        event("aten::copy_", 10, 10, tid=WORKER),
        event("FrozenLinearWithAdapter", 5, 30),
        event("aten::linear", 6, 10),
        event("aten::addmm", 7, 8),
        event("aten::mul", 30, 5),
        event("autograd::engine::evaluate_function: X", 36, 5),
        event("gloo:all_reduce", 40, 10, "user_annotation", tid=WORKER),
    ]


def test_operators_of_a_cpu_count_without_those_they_call(written):
    found = written(cpu())
    assert found.device == "cpu"
    assert found.operators == {
        "aten::addmm": (1, 8 * US), "aten::mul": (1, 5 * US), "aten::linear": (1, 2 * US)
    }  # fmt: skip
    assert {kind: (c.total, c.hidden) for kind, c in found.collectives.items()} == {
        "all-gather": (20 * US, 10 * US),
        "all-reduce": (10 * US, 0),
    }
    lengths = [length(times) // US for times in found.times.named().values()]
    assert lengths == [5, 10, 20, 3, 12]


def ascend(hardware="Ascend Hardware", communication="Communication", overlap=()):
    """As torch_npu writes it: a list, times as strings since 1970, processes by their names, tasks by their type."""

    def at(microseconds):
        return f"1762945200{microseconds:010.3f}"

    def task(name, start, dur, process, kind=None, lane=2):
        args = {"Task Type": kind} if kind else {}
        return {"name": name, "pid": process, "tid": lane, "ts": at(start), "dur": dur, "ph": "X", "args": args}

    processes = {10: "Python", 20: "CANN", 30: hardware, 40: communication, 50: "Overlap Analysis"}
    named = [{"ph": "M", "name": "process_name", "pid": p, "tid": 0, "args": {"name": n}} for p, n in processes.items()]
    host = [
        task(name, start, dur, 10) | {"cat": "cpu_op", "tid": 900}
        for name, start, dur in [
            ("iteration 3", 0, 100),
            ("phase: forward", 10, 40),
            ("module: decoder.layers.1.mlp.experts", 11, 20),
            ("aten::bmm", 12.25, 4),
        ]
    ]
    flow = {"name": "torch_to_npu", "cat": "async_npu", "id": 1762945200040250, "bp": "e"}
    return [
        *named,
        *host,
        flow | {"ph": "s", "pid": 10, "tid": 900, "ts": at(12.25)},
        flow | {"ph": "f", "pid": 30, "tid": 2, "ts": at(40.25)},
        task("BatchMatMulV2", 40.25, 20.5, 30, "AI_CORE"),
        task("Event_Wait", 60.75, 9, 30, "EVENT_WAIT"),
        task("hcom_allGather__305_880_1", 50, 30, 30, "COMMUNICATION", lane=8),
        task("hcom_allGather__305_880_1", 50, 30, 40, lane=100),
        task("Notify_Wait", 51, 3, 40, lane=101),
        task("MatMulV3", 90, 5, 30, "KERNEL_MIX_AIC"),
        *(task("Computing", start, dur, 50, lane=0) for start, dur in overlap),
    ]


def save_ascend(root, events):
    path = root / "rank3_20261112101010123_ascend_pt" / "ASCEND_PROFILER_OUTPUT" / "trace_view.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(events))
    return path


@pytest.mark.parametrize("communication", ["Communication", "HCCL"])
def test_torch_npus_traces(tmp_path, communication):
    path = save_ascend(tmp_path, ascend(communication=communication))
    assert find_traces([tmp_path]) == [path]
    found = summarize(path)
    assert (found.rank, found.device, found.duration) == (3, "npu", 100 * US)
    sent = found.collectives["all-gather"]  # once, though two lanes have it
    assert (sent.count, sent.total, sent.hidden) == (1, 30 * US, 10750)
    assert found.parts["experts"] == {"forward": 20500, "backward": 0, "other": 0}
    assert found.operators == {"BatchMatMulV2": (1, 20500), "MatMulV3": (1, 5 * US)}
    assert page_beside(path) == path.parents[1] / "summary.html"


def test_the_devices_own_account_of_computation_goes_first(tmp_path):
    found = summarize(save_ascend(tmp_path, ascend(overlap=[(40.25, 25)])))
    assert found.collectives["all-gather"].hidden == 15250


def test_a_device_that_is_not_recognised_is_no_ascend(tmp_path):
    """Negative control of the two above: without the process's name nothing of the device is read."""
    found = summarize(save_ascend(tmp_path, ascend(hardware="another")))
    assert found.device == "cpu" and not found.collectives


def test_times_keep_their_nanoseconds():
    assert nanoseconds("1762945200040250.123") == 1762945200040250123
    assert [nanoseconds(text) for text in ("3", "0.5", "2.0004", "-1.5", "1e3", 7)] == [
        3000,
        500,
        2000,
        -1500,
        10**6,
        7000,
    ]
    with pytest.raises(ValueError):
        nanoseconds("soon")


def test_fields_that_are_missing(written):
    odd = kernel("gemm", 10, 5)
    lost = {k: v for k, v in odd.items() if k != "dur"}
    incomplete = [{**odd, "dur": -1}, {**odd, "ts": "soon"}, lost, {**odd, "dur": float("inf")}]
    bare = [{"ph": "X", "ts": 1, "dur": 2}, {"ph": "s", "cat": "ac2g", "id": 9, "ts": 3}, {}, {"ph": "M", "name": "x"}]
    found = written([*incomplete, *bare, kernel("gemm", 0, 10), kernel("gemm", 3, 0)], distributedInfo=None)
    assert found.left_out == 4 and "4 events without a readable time left out" in text([found])
    assert found.operators == {"gemm": (2, 10 * US)} and found.rank == 0


# mtime=0: a file that says when it was made would give the test another name in each worker of the suite.
@pytest.mark.parametrize(
    "name, content, said",
    [
        ("cut.json", json.dumps({"traceEvents": [kernel("gemm", 0, 1)]})[:-20].encode(), "is no whole trace"),
        ("empty.json", b"", "is no whole trace"),
        ("cut.json.gz", gzip.compress(b'{"traceEvents": []}', mtime=0)[:-9], "is no whole trace"),
        ("damaged.json.gz", gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 20, "is no trace"),
        ("picture.json", b"\x89PNG\xff\xfe", "is no trace"),
        ("text.json", b"Dear all", "is no whole trace"),
        ("config.json", b'{"hidden_size": 64}', "is JSON, but no list of events"),
        ("numbers.json", b"[1, 2]", "is JSON, but no list of events"),
        ("silent.json", b'{"traceEvents": [{"ph": "M"}]}', "no event in it has a duration"),
    ],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path, capsys, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        read_trace(tmp_path / name)
    assert name in str(refused.value) and "\n" not in str(refused.value)
    assert main(["trace", "summarize", str(tmp_path / name)]) == 1
    assert capsys.readouterr().err.startswith(f"error: trace: {tmp_path / name} is wrong")


def test_places_without_traces_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is wrong, because nothing is there"):
        find_traces([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="because it holds no trace; legal: .*trace_view.json"):
        find_traces([tmp_path])


def several(root):
    """Three ranks, the middle one slow to arrive: the others wait for it."""
    for rank, (computing, waiting) in enumerate([(10, 30), (36, 4), (12, 28)]):
        events = [kernel("gemm", 0, computing), kernel(REDUCE, computing - 2, waiting + 2, 20)]
        write(root / f"any{rank}.pt.trace.json", events, distributedInfo={"rank": 2 - rank})
    return summarize_all(find_traces([root]))


def test_ranks_are_compared_by_minimum_median_and_maximum(tmp_path):
    found = several(tmp_path)
    assert [one.rank for one in found] == [0, 1, 2]
    rows = {row.name: row for table in comparisons(found) if table.title == "communication" for row in table.rows}
    exposed = rows["all-reduce: exposed"]
    assert (exposed.least, exposed.middle, exposed.greatest) == ((4 * US, 1), (28 * US, 0), (30 * US, 2))
    share = rows["all-reduce: share hidden"]
    assert share.least[1] == 2 and share.greatest == (2 / 6, 1)
    assert "all-reduce: exposed ms" in text(found)


def test_two_traces_of_a_rank_are_refused(tmp_path):
    several(tmp_path)
    write(tmp_path / "rank1.5.pt.trace.json", overlapped([(0, 1)], []))
    with pytest.raises(UserError, match="of rank 1 too; try: name the files of one run"):
        summarize_all(find_traces([tmp_path]))


def test_a_trace_that_does_not_say_its_rank_is_none_of_a_known_one(tmp_path):
    write(tmp_path / "any.pt.trace.json", overlapped([(0, 1)], []))
    found = summarize_all(find_traces([tmp_path]))
    assert [one.rank for one in found] == [None] and "unknown rank on " in text(found)
    write(tmp_path / "rank0.5.pt.trace.json", overlapped([(0, 1)], []))
    with pytest.raises(UserError, match="does not say of which rank it is; try: it alone"):
        summarize_all(find_traces([tmp_path]))


def test_a_row_that_a_rank_lacks_is_nothing_there(tmp_path):
    write(tmp_path / "rank0.1.pt.trace.json", overlapped([(0, 10)], [(5, 5)]))
    write(tmp_path / "rank1.1.pt.trace.json", overlapped([(0, 10)], []))
    rows = {r.name: r for table in comparisons(summarize_all(find_traces([tmp_path]))) for r in table.rows}
    assert rows["all-reduce: total"].least == (0, 1)
    assert rows["all-reduce: share hidden"].least == rows["all-reduce: share hidden"].greatest == (1.0, 0)


def test_operators_beyond_the_first_fifteen_are_one_row(written):
    found = written([kernel(f"kernel{number}", 100 * number, 1 + number) for number in range(20)])
    operators = next(table for table in tables_of(found) if table.title == "operators")
    assert len(operators.rows) == 16 and operators.rows[0][0] == "kernel19"
    assert operators.rows[-1] == ("5 others", (5, 15 * US, 15 / 210))


class Elements(HTMLParser):
    """Tags that are open, texts, and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.rectangles, self.seen = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.rectangles.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_shows_what_the_tables_show_and_is_html(written, tmp_path):
    evil = "<script>alert('&')</script>"
    events = [*marked(), kernel(evil, 101, 3), kernel(REDUCE, 103, 4, 20), event(names.PHASE + evil, 86, 5)]
    found = written(events)
    read = Elements(page([found]))
    assert read.open == [] and "script" not in read.seen and evil in read.texts
    shown = [cell for table in tables_of(found) for name, _ in table.rows for cell in [name]]
    assert set(shown) <= set(read.texts)
    # 1 of 4 us of the collective is hidden: a lane of 1000 pieces for 210 us.
    widths = {}
    for piece in read.rectangles:
        widths[piece["fill"]] = widths.get(piece["fill"], 0) + int(piece["width"])
    assert abs(widths["#e45756"] - 3 / 210 * 1000) <= 2 and abs(widths["#54a24b"] - 1 / 210 * 1000) <= 2
    path = write_page([found, found], tmp_path / "new" / "all.html")
    assert path.read_text().count("<svg") == 2 and "://" not in path.read_text()


def test_the_command_prints_and_writes(tmp_path, capsys):
    several(tmp_path)
    assert main(["trace", "summarize", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "rank 1 on cuda: 0.040 ms" in printed and f"wrote {tmp_path / 'page.html'}" in printed
    assert main(["trace", "summarize", str(next(tmp_path.glob("any0*")))]) == 0
    assert "share hidden" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "trace" in capsys.readouterr().out


class Toy(torch.nn.Module):
    """Two parts, the first of which is computed once more in the backward pass."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"timers": None})()
        self.self_attention, self.mlp = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.self_attention, x, use_reentrant=False)
        return self.mlp(torch.relu(x))


def traced(path, model, marks):
    x = torch.randn(256, 64, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as running:
        marks.open([model])
        for number in (1, 2):
            marks.iteration(number)
            marks.phase(names.DATA)
            marks.phase(names.SCHEDULE)
            timers = model.config.timers
            timers("forward-compute", log_level=2).start()
            y = model(x).square().sum()
            timers("forward-compute").stop()
            timers("backward-compute", log_level=2).start()
            y.backward()
            timers("backward-compute").stop()
            timers("forward-backward", log_level=1).start(barrier=False)
            timers("forward-backward").stop()
        marks.phase(names.BETWEEN)
        timers("forward-compute").start()  # an evaluation is not part of the batch
        timers("forward-compute").stop()
        marks.close()
        model(x)
    running.export_chrome_trace(str(path))
    return summarize(path)


def test_a_real_trace_knows_phases_and_parts_of_both_passes(tmp_path):
    model = Toy()
    found = traced(tmp_path / "real.json", model, Marks())
    assert len(found.iterations) == 2 and sum(found.iterations) <= found.duration
    assert set(found.phase_wall) == {"data", "schedule", "forward", "backward", "between iterations"}
    for part in ("attention", "MLP"):
        assert found.parts[part]["forward"] > 0 and found.parts[part]["backward"] > 0
    products = [spent for name, (_, spent) in found.operators.items() if name in ("aten::mm", "aten::addmm")]
    assert found.operators["aten::addmm"][0] == 2 * 3  # one part runs twice, what follows the marks is left out
    assert (
        sum(products)
        < sum(spent for _, spent in found.operators.values())
        == sum(sum(columns.values()) for columns in found.parts.values())
    )
    assert length(found.times.computing) == sum(spent for _, spent in found.operators.values())


def test_marks_leave_the_model_as_it_was(tmp_path):
    model, marks = Toy(), Marks()
    traced(tmp_path / "real.json", model, marks)
    assert model.config.timers is None
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_a_module_that_fails_closes_its_range(tmp_path):
    model, marks = Toy(), Marks()
    marks.open([model])
    with pytest.raises(RuntimeError):
        model.mlp(torch.randn(2, 3))
    pending = [hook.keywords["open_"] for m in model.modules() for hook in m._forward_hooks.values()]
    marks.close()
    assert len(pending) == 2 and not any(pending)


def test_nothing_is_named_where_no_profiler_runs():
    assert ranges.named("lora: base product") is ranges.named("another")
    ranges.mark_running(True)
    try:
        assert ranges.named("a") is not ranges.named("a")
        assert ranges.named("chunk {} of {}", 2, 4).name == "chunk 2 of 4"
    finally:
        ranges.mark_running(False)
    with profile(activities=[ProfilerActivity.CPU]) as running:
        assert ranges.in_range("module: output_layer")(lambda x: x + 1)(2) == 3
    assert "module: output_layer" in {event.name for event in running.events()}
