"""What a device did: computation, communication and copies, out of the events of a trace.

CUDA and Ascend: kernels on streams, each with the place on the host where it was launched if the host was traced.
CPU: operators, each counted without those it calls, and gloo's collectives, which run on threads of gloo's own. What
the host spends inside c10d's calls, packing and handing over, counts as a copy; operators on gloo's threads are part of
the communication. A collective of gloo begins when one of gloo's threads takes it up and lasts until all its peers took
part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mindspeed_llm.training.trace.intervals import Intervals, union
from mindspeed_llm.training.trace.names import collective
from mindspeed_llm.training.trace.reading import Event, Lane, Trace

# An operator that computes: namespace::name, and not what carries others (autograd's nodes) or communicates.
OPERATOR = re.compile(r"(?!c10d::|autograd::|torch::autograd::)[A-Za-z_]\w*::\w")
# Kinds of tasks of an Ascend device that compute, in the spellings of msprof's versions.
ASCEND_COMPUTES = re.compile(r"(KERNEL_)?(AI_?CORE|AI_?VEC(TOR_CORE)?|MIX_AI[CV]|AI_?CPU)\b", re.IGNORECASE)
ASCEND_COPIES = re.compile(r"SDMA|MEMCPY|PCIE_DMA", re.IGNORECASE)
ASCEND_HARDWARE, ASCEND_OVERLAP = "Ascend Hardware", "Overlap Analysis"
# The lane of collectives, as CANN named it before version 8 and names it since.
ASCEND_COMMUNICATION = ("HCCL", "Communication")


@dataclass(frozen=True, slots=True)
class Work:
    """One operator or kernel.

    Attributes:
        spent: ns, without operators called by this one.
        origin: lane and time on the host that it comes from; None where the trace does not say.
    """

    name: str
    start: int
    end: int
    spent: int
    origin: tuple[Lane, int] | None


@dataclass
class DeviceWork:
    """All of a trace.

    Attributes:
        device: "cpu", "cuda" or "npu".
        computing: when computation ran.
        collectives: their names are kinds (names.COLLECTIVES).
        copying: between host and device; on a CPU the calls that hand tensors to gloo.
    """

    device: str
    computation: list[Work]
    computing: Intervals
    collectives: list[Work]
    copying: Intervals


def device_work(trace: Trace) -> DeviceWork:
    """Sorted out by the kind of device that the trace is of."""
    if ASCEND_HARDWARE in trace.processes.values():
        return _ascend(trace)
    if any(event.category == "kernel" for event in trace.events):
        return _cuda(trace)
    return _cpu(trace)


def _cuda(trace: Trace) -> DeviceWork:
    kernels = [event for event in trace.events if event.category == "kernel"]
    sends = [event for event in kernels if _is_nccl(event)]
    computes = [event for event in kernels if not _is_nccl(event)]
    copies = [(e.start, e.end) for e in trace.events if e.category in ("gpu_memcpy", "gpu_memset")]
    return _of_streams("cuda", computes, sends, copies, _launches(trace, "ac2g"))


def _is_nccl(event: Event) -> bool:
    return event.name.lower().startswith("nccl")


def _ascend(trace: Trace) -> DeviceWork:
    def on(event: Event, *processes: str) -> bool:
        return trace.processes.get(event.lane[0]) in processes

    tasks = [event for event in trace.events if on(event, ASCEND_HARDWARE)]
    # The same collective also stands on the stream that waits for it.
    sends = [event for event in trace.events if on(event, *ASCEND_COMMUNICATION) and _is_hcom(event)]
    sends = sends or [event for event in tasks if _is_hcom(event)]
    computes = [event for event in tasks if ASCEND_COMPUTES.match(_task_type(event)) and not _is_hcom(event)]
    copies = [(event.start, event.end) for event in tasks if ASCEND_COPIES.search(_task_type(event))]
    work = _of_streams("npu", computes, sends, copies, _launches(trace, "async_npu"))
    # The device's own account of when it computed knows every kind of task.
    stated = [(e.start, e.end) for e in trace.events if on(e, ASCEND_OVERLAP) and e.name == "Computing"]
    work.computing = union(stated) or work.computing
    return work


def _is_hcom(event: Event) -> bool:
    return event.name.lower().startswith("hcom")


def _task_type(event: Event) -> str:
    return str(event.args.get("Task Type", ""))


def _of_streams(
    device: str,
    computes: list[Event],
    sends: list[Event],
    copies: Iterable[tuple[int, int]],
    origins: dict[tuple[Lane, int], tuple[Lane, int]],
) -> DeviceWork:
    def made(event: Event, name: str) -> Work:
        origin = origins.get((event.lane, event.start))
        return Work(name, event.start, event.end, event.end - event.start, origin)

    computation = [made(event, event.name) for event in computes]
    collectives = [made(event, collective(str(event.args.get("Collective name") or event.name))) for event in sends]
    computing = union((event.start, event.end) for event in computes)
    return DeviceWork(device, computation, computing, collectives, union(copies))


def _launches(trace: Trace, category: str) -> dict[tuple[Lane, int], tuple[Lane, int]]:
    """Lane and start of a kernel -> lane and time of its launch."""
    return {end: start for (kind, _), (start, end) in trace.flows.items() if kind == category}


def _cpu(trace: Trace) -> DeviceWork:
    gloo = {lane for lane, names in trace.lanes.items() if any("gloo" in name for name in names)}
    sent = [event for event in trace.events if event.name.startswith("gloo:")]
    by_lane: dict[Lane, list[Event]] = {}
    copies = []
    for event in trace.events:
        if event.category != "cpu_op" or event.lane in gloo:
            continue
        if event.name.startswith("c10d::"):
            copies.append((event.start, event.end))
        if event.name.startswith("c10d::") or OPERATOR.match(event.name):
            by_lane.setdefault(event.lane, []).append(event)
    computation = [work for events in by_lane.values() for work in _own_time(events)]
    computation.sort(key=lambda work: work.start)
    collectives = [Work(collective(e.name), e.start, e.end, e.end - e.start, (e.lane, e.start)) for e in sent]
    outermost = union((work.start, work.end) for work in computation)
    return DeviceWork("cpu", computation, outermost, collectives, union(copies))


def _own_time(events: Iterable[Event]) -> Iterator[Work]:
    """The computing operators of one thread, sorted, each without those inside it; none inside c10d."""
    open_: list[list] = []  # event, ns of those directly inside

    def close(until: int | None) -> Iterator[Work]:
        while open_ and (until is None or open_[-1][0].end <= until):
            event, inside = open_.pop()
            if not event.name.startswith("c10d::") and not any(e.name.startswith("c10d::") for e, _ in open_):
                spent = event.end - event.start - inside
                yield Work(event.name, event.start, event.end, spent, (event.lane, event.start))

    for event in events:
        yield from close(event.start)
        if open_:
            open_[-1][1] += event.end - event.start
        open_.append([event, 0])
    yield from close(None)
