"""Where swapped tensors lie: what comes back is what went, waits are needed, and room is used again."""

import errno
import mmap
import threading
import weakref

import pytest
import torch

from mindspeed_llm import accelerator
from mindspeed_llm.errors import UserError
from mindspeed_llm.memory import mapped_store
from mindspeed_llm.memory.mapped_store import MappedStore
from mindspeed_llm.memory.rooms import rounded
from mindspeed_llm.memory.store import open_store

MEGABYTE = 2**20


def bytes_of(size, seed=0):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def sent(store, source):
    """A copy whose source may go."""
    copy = store.send(source)
    copy.wait_sent()
    return copy


@pytest.fixture
def store():
    return MappedStore()


@pytest.fixture
def gate(monkeypatch):
    """Copies begin when it is set."""
    opened, run = threading.Event(), mapped_store._Job.run

    def wait_and_run(job):
        opened.wait(30)
        run(job)

    monkeypatch.setattr(mapped_store._Job, "run", wait_and_run)
    yield opened
    opened.set()


def test_a_cpu_swaps_into_a_file():
    assert isinstance(open_store(), MappedStore)


def test_what_comes_back_is_what_went(store):
    sources = [bytes_of(size, seed=size) for size in (1, 4095, 4096, 100_001)]
    copies = [store.send(source) for source in sources]
    for copy in copies:
        copy.wait_sent()
        copy.fetch()
    for copy, source in zip(copies, sources):
        assert torch.equal(copy.wait_fetched(), source)


def test_before_the_wait_the_source_is_still_read(store, gate):
    source = bytes_of(1000)
    copy, original = store.send(source), source.clone()
    source.zero_()  # too early
    gate.set()
    copy.wait_sent()
    copy.fetch()
    assert not torch.equal(copy.wait_fetched(), original)


def test_before_the_wait_nothing_has_arrived(store, gate):
    source = bytes_of(1000)
    gate.set()
    copy = sent(store, source)
    gate.clear()
    copy.fetch()
    arrived = threading.Event()
    waiting = threading.Thread(target=lambda: (copy.wait_fetched(), arrived.set()))
    waiting.start()
    assert not arrived.wait(0.05)
    gate.set()
    waiting.join()
    assert arrived.is_set()


def test_memory_of_the_process_falls(store):
    size = 64 * MEGABYTE
    # Memory of its own: what malloc does with a tensor that is freed depends on all that the process did before.
    source = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).copy_(bytes_of(size))
    content = source[::4097].clone()
    before = accelerator.current().resident_memory()
    copy = sent(store, source)
    del source
    assert accelerator.current().resident_memory() < before - 0.9 * size
    copy.fetch()
    assert torch.equal(copy.wait_fetched()[::4097], content)


def test_room_is_counted_given_back_and_used_again(store):
    copy = sent(store, bytes_of(5000))
    assert store.held == 5000
    del copy
    assert store.held == 0
    size = store._size
    for number in range(5):
        again = sent(store, bytes_of(4600, seed=number))
        again.fetch()
        assert torch.equal(again.wait_fetched(), bytes_of(4600, seed=number))
        del again
    assert store._size == size
    sent(store, bytes_of(50_000))
    assert store._size > size


def test_a_copy_that_nobody_waits_for_harms_nobody(store, gate):
    gate.set()
    copy = sent(store, bytes_of(100_000))
    gate.clear()
    copy.fetch()
    target = weakref.ref(copy._target)
    del copy
    assert target() is not None  # it is still written to
    gate.set()
    other = sent(store, bytes_of(10))
    other.fetch()
    assert target() is None
    other.wait_fetched()


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 10_000, 2**20, 2**20 + 1, 123_456_789])
def test_rooms_waste_at_most_a_fifth(nbytes):
    assert nbytes <= rounded(nbytes) <= max(1.25 * nbytes, 4096)


def test_a_full_disk_is_said(store, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mapped_store.os, "posix_fallocate", full)
    with pytest.raises(UserError, match="swap: .* do not fit there .*No space left.*; try: TMPDIR=DIR"):
        store.send(bytes_of(10))


def test_a_copy_that_fails_is_heard_of_by_who_waits(store, monkeypatch):
    def failing(room):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(mapped_store._Room, "forget_pages", failing)
    with pytest.raises(RuntimeError, match="a copy of 10 bytes failed"):
        store.send(bytes_of(10)).wait_sent()
    monkeypatch.undo()
    store.send(bytes_of(10)).wait_sent()


def test_copies_are_timed_on_request(store):
    sent(store, bytes_of(MEGABYTE))
    assert store.seconds_sending() == 0
    store.measure(True)
    sent(store, bytes_of(MEGABYTE))
    assert 0 < store.seconds_sending() < 1
    store.measure(False)
    assert store.seconds_sending() == 0


def test_a_host_without_page_locked_memory_is_said():
    """A CPU's torch can lock none."""
    from mindspeed_llm.memory.pinned_store import _Room

    with pytest.raises(UserError, match="swap: 4096 bytes more of page-locked memory .*try: a smaller --swap-budget"):
        _Room(4096)
