"""Freed memory stays with a process that trains on a CPU, where that can be done and nobody says otherwise."""

import subprocess
import sys
import types

import pytest

from mindspeed_llm.accelerator import host_allocator

FAULTS = """
import resource, torch
from mindspeed_llm.accelerator import host_allocator
torch.set_num_threads(1)
host_allocator.choose({wanted!r})
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
    for name in (*host_allocator.VARIABLES, "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)


def faults(wanted):
    """Page faults of four tensors of 48 MiB after others like them, and whether memory is kept."""
    done = subprocess.run([sys.executable, "-c", FAULTS.format(wanted=wanted)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, kept = done.stdout.split()
    return int(count), kept == "True"


@pytest.mark.skipif(host_allocator.why_not() is not None, reason=f"{host_allocator.why_not()}")
def test_kept_memory_is_not_asked_for_again(plain):
    (kept, is_kept), (given_back, is_kept_too) = faults(None), faults("system")
    assert is_kept and not is_kept_too
    assert kept < 4 * 48 * 2**20 // 4096 // 2 < given_back


def test_who_has_set_glibcs_variables_has_chosen(plain, monkeypatch):
    told = []
    monkeypatch.setattr(host_allocator, "_set", told.append)
    monkeypatch.setattr(host_allocator, "why_not", lambda: None)
    host_allocator.choose(None)
    assert told == [host_allocator.KEEP]
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")
    host_allocator.choose(None)
    assert told == [host_allocator.KEEP] and "MALLOC_TOP_PAD_" in host_allocator.describe()
    host_allocator.choose("keep")
    assert told == [host_allocator.KEEP] * 2
    monkeypatch.delenv("MALLOC_TOP_PAD_")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")
    host_allocator.choose(None)
    assert told == [host_allocator.KEEP] * 2 and "GLIBC_TUNABLES" in host_allocator.describe()


def test_another_c_library_is_left_alone_and_refused_when_asked(plain, monkeypatch):
    monkeypatch.setattr(host_allocator.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    before = host_allocator.kept()
    host_allocator.choose(None)
    assert host_allocator.kept() == before and "not glibc" in host_allocator.describe()
    with pytest.raises(RuntimeError, match="not glibc"):
        host_allocator.choose("keep")


def test_another_allocator_is_left_alone(plain, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert "libjemalloc" in host_allocator.describe()
