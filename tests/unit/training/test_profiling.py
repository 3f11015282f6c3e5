"""--profile: which iterations are traced, what a trace holds, what is refused."""

import json
import types

import pytest
import torch

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator import profiling, ranges
from mindspeed_llm.config.parser import parse
from mindspeed_llm.config.profiling import ProfilingConfig
from mindspeed_llm.plan.profiling import profiling_problems
from mindspeed_llm.training.profiling import Profiler

torch.set_num_threads(1)


def options(**changed):
    return ProfilingConfig(profile=True, **changed)


class Watched:
    """Stands for a device's profiler; what was done and when."""

    def __init__(self, monkeypatch):
        self.done, self.iteration = [], 0
        monkeypatch.setattr(
            accelerator.current(), "profiler", lambda given, worker: self.done.append(worker) or self, raising=False
        )

    def start(self):
        self.done.append(("start", self.iteration))

    def stop(self):
        self.done.append(("stop", self.iteration))

    def train(self, profiler, first, last):
        for self.iteration in iterate(profiler, first, last):
            pass
        return self.done


def iterate(profiler, first, last):
    """Every iteration while it runs."""
    loop = types.SimpleNamespace(
        progress=types.SimpleNamespace(iteration=first), model=types.SimpleNamespace(chunks=[])
    )
    for number in range(first + 1, last + 1):
        yield number
        profiler.before_batch(loop)
        loop.progress.iteration = number
        profiler.end_of_iteration(loop)
    profiler.close(last)


@pytest.mark.parametrize(
    "profile_step_start, profile_step_end, first, last, traced",
    [
        (1, 3, 0, 5, (2, 3)),
        (0, 1, 0, 5, (1, 1)),
        (2, -1, 0, 5, (3, 5)),
        (1, 9, 0, 4, (2, 4)),  # training ends first
        (1, 6, 3, 8, (4, 6)),  # goes on from a checkpoint
    ],
)
def test_iterations_between_start_and_end_are_traced(
    monkeypatch, profile_step_start, profile_step_end, first, last, traced
):
    watched = Watched(monkeypatch)
    profiler = Profiler(options(profile_step_start=profile_step_start, profile_step_end=profile_step_end))
    assert watched.train(profiler, first, last) == ["rank0", ("start", traced[0]), ("stop", traced[1])]


def test_after_a_failure_nothing_is_named_any_more(monkeypatch):
    watched = Watched(monkeypatch)
    profiler = Profiler(options(profile_step_start=0, profile_step_end=3))
    next(iterations := iterate(profiler, 0, 3))
    next(iterations)
    assert isinstance(ranges.named("x"), torch.profiler.record_function)
    profiler.abandon()
    assert not isinstance(ranges.named("x"), torch.profiler.record_function)
    assert watched.done == ["rank0", ("start", 0)]
    profiler.abandon()


def test_other_ranks_and_other_iterations_are_not_traced(monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    steps = {"profile_step_start": 1, "profile_step_end": 3}
    assert Watched(monkeypatch).train(Profiler(options(**steps)), 0, 5) == []
    assert capsys.readouterr().out == ""
    for profile_ranks in ([1], [-1]):
        assert Watched(monkeypatch).train(Profiler(options(**steps, profile_ranks=profile_ranks)), 0, 5)[0] == "rank1"
    capsys.readouterr()
    late = Profiler(options(profile_ranks=[-1]))
    assert Watched(monkeypatch).train(late, 0, 5) == []
    said = "nothing was traced: training ended after iteration 5 and did none of iterations 11 to 12"
    assert said in capsys.readouterr().out
    goes_on_behind = Profiler(options(profile_ranks=[-1]))
    assert Watched(monkeypatch).train(goes_on_behind, 12, 15) == []
    assert "nothing was traced: training ended after iteration 15" in capsys.readouterr().out


def trace(folder, **changed):
    """Events of a trace of one product."""
    profiler = profiling.torch_profiler(options(profile_save_path=str(folder), **changed), "rank3", "cpu")
    profiler.start()
    torch.ones(4, 5) @ torch.ones(5, 6)
    profiler.stop()
    (file,) = folder.iterdir()
    assert file.name.startswith("rank3.") and file.name.endswith(".pt.trace.json")
    return json.loads(file.read_text())


def test_a_trace_lies_in_profile_save_path_and_holds_what_is_asked_for(tmp_path):
    def of_product(found):
        return next(event for event in found["traceEvents"] if event.get("name") == "aten::mm")

    plain = trace(tmp_path / "plain")
    assert "Input Dims" not in of_product(plain).get("args", {})
    shapes = trace(tmp_path / "shapes", profile_record_shapes=True)
    assert of_product(shapes)["args"]["Input Dims"] == [[4, 5], [5, 6]]
    memory = trace(tmp_path / "memory", profile_with_memory=True)
    names = [{event.get("name") for event in found["traceEvents"]} for found in (plain, memory)]
    assert "[memory]" not in names[0] and "[memory]" in names[1]
    stack = trace(tmp_path / "stack", profile_with_stack=True)
    assert plain.get("with_stack", 0) == 0 and stack["with_stack"] == 1


def test_the_host_of_a_gpu_is_traced_with_profile_with_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.profiler, "profile", lambda **given: asked.append(given["activities"]))
    for profile_with_cpu in (False, True):
        profiling.torch_profiler(options(profile_with_cpu=profile_with_cpu), "rank0", "cuda")
    activity = profiling.ProfilerActivity
    assert asked == [[activity.CUDA], [activity.CUDA, activity.CPU]]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--profile", None),
        ("--profile --profile-step-start 3 --profile-step-end 4 --profile-ranks 0 1", None),
        ("--profile --profile-step-end -1", None),
        (
            "--profile-with-stack --profile-ranks -1",
            "--profile-ranks, --profile-with-stack: no meaning without --profile",
        ),
        ("--profile --profile-step-start 12", "--profile-step-end 12 is not after --profile-step-start 12"),
        ("--profile --profile-level level1", "--profile-level: needs an Ascend NPU, and the device is cpu"),
        ("--profile --profile-export-type db", "--profile-export-type: needs an Ascend NPU"),
        ("--profile --profile-data-simplification", "--profile-data-simplification: needs an Ascend NPU"),
        ("--profile --profile-with-cpu", "--profile-with-cpu has no meaning on a CPU"),
    ],
)
def test_what_cannot_be_met_is_refused(words, said):
    problems = profiling_problems(parse("pretrain", [*words.split(), "--device", "cpu"]).config)
    assert problems == [] if said is None else [line for line in problems if said in line] == problems != []


class Writes:
    """Stands for a device's profiler that leaves these files, one after each stop."""

    def __init__(self, monkeypatch, folder, *files):
        self.folder, self.files = folder, list(files)
        monkeypatch.setattr(accelerator.current(), "profiler", lambda given, worker: self, raising=False)

    def start(self):
        pass

    def stop(self):
        if self.files:
            path = self.folder / self.files.pop(0)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([{"ph": "X", "name": "aten::mm", "cat": "cpu_op", "ts": "1.5", "dur": 2}]))


def trace_once(folder):
    steps = {"profile_step_start": 0, "profile_step_end": 1, "profile_save_path": str(folder)}
    assert list(iterate(Profiler(options(**steps)), 0, 2)) == [1, 2]


@pytest.mark.parametrize(
    "file, page",
    [
        ("rank0.17.pt.trace.json", "rank0.17.summary.html"),
        ("rank0_17_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json", "rank0_17_ascend_pt/summary.html"),
    ],
)
def test_the_new_trace_of_this_rank_is_summed_up(monkeypatch, tmp_path, capsys, file, page):
    Writes(monkeypatch, tmp_path, "rank0.99.pt.trace.json").stop()  # of an earlier run
    Writes(monkeypatch, tmp_path, "rank01.99.pt.trace.json").stop()
    Writes(monkeypatch, tmp_path, file)
    trace_once(tmp_path)
    assert f" summary of rank 0: {tmp_path / page}" in capsys.readouterr().out
    assert [found.relative_to(tmp_path).as_posix() for found in tmp_path.rglob("*.html")] == [page]
    assert "aten::mm" in (tmp_path / page).read_text()


def test_a_page_that_cannot_be_written_does_not_stop_training(monkeypatch, tmp_path, capsys):
    Writes(monkeypatch, tmp_path, "rank0.17.pt.trace.json")
    (tmp_path / "rank0.17.summary.html").mkdir()
    trace_once(tmp_path)
    assert "no summary of rank 0: [Errno 21] Is a directory" in capsys.readouterr().out


def test_without_a_trace_as_text_there_is_no_page(monkeypatch, tmp_path, capsys):
    Writes(monkeypatch, tmp_path, "rank0_17_ascend_pt/ASCEND_PROFILER_OUTPUT/ascend_pytorch_profiler_0.db")
    trace_once(tmp_path)
    assert "no summary of rank 0: no trace as text was written" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.html"))
