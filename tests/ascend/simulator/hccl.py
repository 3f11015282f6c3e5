"""The back end `hccl`, by gloo on the host's view of the tensors. What HCCL cannot do is refused."""

from __future__ import annotations

import collections
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from simulator import host
from simulator.host import host_view, is_on_device, run_current_stream

# HCCL sums and compares integers and floats of up to 32 bits and int64; it moves everything.
REDUCED = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)


def _host(tree: Any) -> Any:
    return tree_map(lambda x: host_view(x) if is_on_device(x) else x, tree)


def _refuse_others(tensors: Any) -> None:
    for tensor in tensors:
        if tensor.device.type != "npu":
            raise RuntimeError(f"HCCL: tensor on {tensor.device}; collectives take tensors of the device")


def _refuse_wide(tensors: Any) -> None:
    for tensor in tensors:
        if tensor.dtype not in REDUCED:
            raise RuntimeError(f"HCCL: {tensor.dtype} cannot be reduced (EI0003, unsupported data type)")


class _Together:
    """Several pieces of work, waited for as one; the tensors live as long."""

    def __init__(self, works: list[Any], tensors: list[torch.Tensor]):
        self._works, self._tensors = works, tensors

    def wait(self) -> bool:
        return all([work.wait() for work in self._works])

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


class _Late:
    """A collective whose results appear when it is waited for, and which notices tensors that change before.

    It runs on copies: whoever reads its results too early sees old numbers every time, not now and then.
    """

    def __init__(self, tensors: list[torch.Tensor]):
        self._tensors = tensors  # their memory is not given to others meanwhile
        places = [host_view(x) for x in tensors]
        self._before = [(x, x.clone(memory_format=torch.contiguous_format)) for x in places]
        self.copies = [copy.clone() for _, copy in self._before]
        # What is written where at the end.
        self.results = list(zip(places, self.copies))
        self.work: Any = None

    def wait(self, timeout: Any = None) -> bool:
        """Wait for it; twice is once.

        Raises:
            RuntimeError: a tensor is not what it was when the collective was started.
        """
        run_current_stream()
        done = self.work.wait()
        for place, before in self._before:
            if not torch.equal(_bytes(place), _bytes(before)):
                raise RuntimeError(f"a race: a tensor {list(place.shape)} of a collective was written before its end")
        for place, result in self.results:
            place.copy_(result)
        self._before, self.results, self._tensors = [], [], []
        return done

    def is_completed(self) -> bool:
        return self.work.is_completed()


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


_groups: dict[str, HCCL] = {}


def group_of(name: str) -> HCCL:
    """The group whose communicator has this name (`get_hccl_comm_name`).

    Raises:
        RuntimeError: there is none.
    """
    if name not in _groups:
        raise RuntimeError(f"HCCL: there is no communicator {name!r}")
    return _groups[name]


class HCCL(dist.ProcessGroup):
    """torch's old and new names of a collective are both answered: releases differ in which they call."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any, options: Any):
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.options = options
        self._communicator = f"simulated_{len(_groups)}"
        _groups[self._communicator] = self

    def getBackendName(self) -> str:
        return "hccl"

    # torch asks these of the back ends inside a group; this group is its own.
    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("npu")]

    def _get_backend(self, device: torch.device) -> HCCL:
        return self

    def get_hccl_comm_name(self, rank: int, *_: Any) -> str:
        return self._communicator

    def _run(self, method: str, tensors: list[Any], *rest: Any, reduces: bool = False) -> Any:
        flat = [x for x in torch.utils._pytree.tree_leaves(tensors) if isinstance(x, torch.Tensor)]
        _refuse_others(flat)
        if reduces:
            _refuse_wide(flat)
        run_current_stream()
        if host.LAZY:
            late = _Late(flat)
            copies = iter(late.copies)
            given = tree_map(lambda x: next(copies) if isinstance(x, torch.Tensor) else x, tensors)
            late.work = getattr(self.gloo, method)(*given, *rest)
            return late
        work = getattr(self.gloo, method)(*_host(tensors), *rest)
        # The device would be waited for on its stream; here the host waits, and the tensors' memory is written then.
        self._kept = tensors
        return work

    def allreduce(self, tensors, options=None):
        return self._run("allreduce", [tensors], *([options] if options else []), reduces=True)

    def allreduce_coalesced(self, tensors, options=None):
        return self._run("allreduce_coalesced", [tensors], *([options] if options else []), reduces=True)

    def reduce(self, tensors, options=None):
        return self._run("reduce", [tensors], *([options] if options else []), reduces=True)

    def broadcast(self, tensors, options=None):
        return self._run("broadcast", [tensors], *([options] if options else []))

    def allgather(self, outputs, inputs, options=None):
        return self._run("allgather", [outputs, inputs])

    def gather(self, outputs, inputs, options=None):
        return self._run("gather", [outputs, inputs], *([options] if options else []))

    def scatter(self, outputs, inputs, options=None):
        return self._run("scatter", [outputs, inputs], *([options] if options else []))

    def _allgather_base(self, output, input, options=None):
        parts = list(output.view(self.size(), *input.shape).unbind(0))
        return self._run("allgather", [[parts], [input]])

    def _reduce_scatter_base(self, output, input, options=None):
        _refuse_others([output, input])
        _refuse_wide([input])
        run_current_stream()
        given = dist.AllreduceOptions()
        if options is not None:
            given.reduceOp = options.reduceOp
        late = _Late([input, output])
        total = late.copies[0]
        late.work = self.gloo.allreduce([total], given)
        late.results = [(host_view(output), total.view(self.size(), -1)[self.rank()].view(output.shape))]
        if not host.LAZY:
            late.wait()
        return late

    def reduce_scatter(self, outputs, inputs, options=None):
        return self._reduce_scatter_base(outputs[0], torch.cat([x.flatten() for x in inputs[0]]), options)

    def alltoall_base(self, output, input, output_sizes, input_sizes, options=None):
        return self._run("alltoall_base", [output, input], output_sizes, input_sizes)

    def alltoall(self, outputs, inputs, options=None):
        received = torch.empty_like(torch.cat([x.flatten() for x in outputs]))
        sizes = ([x.numel() for x in outputs], [x.numel() for x in inputs])
        work = self.alltoall_base(received, torch.cat([x.flatten() for x in inputs]), *sizes)
        work.wait()
        for out, part in zip(outputs, received.split(sizes[0])):
            out.copy_(part.view(out.shape))
        return work

    def barrier(self, *_: Any, **__: Any):
        return self.gloo.barrier()

    def send(self, tensors, destination, tag=0):
        return self._run("send", [tensors], destination, tag)

    def recv(self, tensors, source, tag=0):
        return self._run("recv", [tensors], source, tag)

    def batch_isend_irecv(self, kinds: list[str], tensors: list[torch.Tensor], peers: list[int]) -> _Together:
        """What torch_npu makes of torch's function of that name on most chips; messages between two ranks in order."""
        sent: collections.Counter[tuple[str, int]] = collections.Counter()
        works = []
        for kind, tensor, peer in zip(kinds, tensors, peers, strict=True):
            send = kind == "isend"
            works.append((self.send if send else self.recv)([tensor], peer, sent[kind, peer]))
            sent[kind, peer] += 1
        return _Together(works, tensors)

    def recv_anysource(self, tensors, tag=0):
        return self._run("recv_anysource", [tensors], tag)

    def allgather_into_tensor_coalesced(self, outputs, inputs, options=None):
        works = [self._allgather_base(output, input) for output, input in zip(outputs, inputs, strict=True)]
        return _Together(works, [*outputs, *inputs])

    def reduce_scatter_tensor_coalesced(self, outputs, inputs, options=None):
        works = [
            self._reduce_scatter_base(output, input, options) for output, input in zip(outputs, inputs, strict=True)
        ]
        return _Together(works, [*outputs, *inputs])

    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base
    all_to_all_single = alltoall_base


def _make(distributed_options: Any, options: Any) -> HCCL:
    d = distributed_options
    return HCCL(d.store, d.group_rank, d.group_size, d.timeout, options)


def register() -> None:
    """Put the stand-in where torch_npu entered its own."""
    dist.Backend._plugins["HCCL"] = dist.Backend._BackendPlugin(_make, True)
