"""The unmodified torch_npu on a CPU.

`cann/` stands in for the libraries of CANN, in C: devices, memory, streams, events. `aten.py` computes torch's
operators on the memory that torch_npu's allocator hands out, `kernels/` those of torch_npu, `hccl.py` the collectives,
by gloo. Everything else is the real thing: dispatcher, schemas, checks, derivatives, allocator, statistics.

`start()` in a process with the variables of `build.environment` makes it ready.
"""

from simulator.start import start

__all__ = ["start"]
