"""Freed memory stays with a process that is told to keep it; another C library or allocator is left alone."""

import subprocess
import sys
import types

import pytest

from mindspeed_llm.accelerator import host_allocator

FAULTS = """
import resource, torch
from mindspeed_llm.accelerator import host_allocator
torch.set_num_threads(1)
if {keep}:
    host_allocator.keep_freed_memory()
def fill(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(48 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fill(12)  # until the heap has settled: small objects cut what was freed first
print(fill(4), host_allocator.kept())
"""


@pytest.fixture
def plain(monkeypatch):
    """An environment that says nothing about malloc."""
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)


def faults(keep):
    """Page faults of four tensors of 48 MiB after others like them, and whether memory is kept."""
    done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, kept = done.stdout.split()
    return int(count), kept == "True"


@pytest.mark.slow
@pytest.mark.skipif(host_allocator.why_not() is not None, reason=f"{host_allocator.why_not()}")
def test_kept_memory_is_not_asked_for_again(plain):
    (kept, is_kept), (given_back, is_kept_too) = faults(True), faults(False)
    assert is_kept and not is_kept_too
    assert kept < 4 * 48 * 2**20 // 4096 // 2 < given_back


def test_another_c_library_is_left_alone(plain, monkeypatch):
    monkeypatch.setattr(host_allocator.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert "not glibc" in host_allocator.describe()
    with pytest.raises(RuntimeError, match="not glibc"):
        host_allocator.keep_freed_memory()


def test_another_allocator_is_left_alone(plain, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert "libjemalloc" in host_allocator.describe()
    with pytest.raises(RuntimeError, match="libjemalloc"):
        host_allocator.keep_freed_memory()
