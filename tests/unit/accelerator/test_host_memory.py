"""What a host can still give: its own memory, and limits of control groups."""

import pytest

from mindspeed_llm.accelerator import host_memory

MIB = 2**20


@pytest.fixture
def host(tmp_path, monkeypatch):
    """host({path: text}) is a root directory of a host with 100 MiB available."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def make(files):
        for path, text in {"proc/meminfo": f"MemFree: 1 kB\nMemAvailable: {100 * 1024} kB\n", **files}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(str(text))
        return tmp_path

    return make


def limited(folder, limit, taken, cached=0, version=2):
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    files = {f"{folder}/memory.{names[0]}": f"{limit}\n", f"{folder}/memory.{names[1]}": f"{taken}\n"}
    return files | {f"{folder}/memory.stat": f"anon 5\ninactive_file {cached}\n"}


def test_without_a_group_it_is_what_the_system_has(host, monkeypatch):
    assert host_memory.host_room(host({})) == 100 * MIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_memory.host_room(host({})) == 25 * MIB


def test_a_group_gives_no_more_than_its_limit_and_takes_back_what_is_cached(host):
    files = {"proc/self/cgroup": "0::/job\n", **limited("sys/fs/cgroup/job", 60 * MIB, 50 * MIB, 20 * MIB)}
    assert host_memory.host_room(host(files)) == 30 * MIB


def test_the_narrowest_of_the_groups_above_counts(host):
    files = {"proc/self/cgroup": "0::/slice/job\n", **limited("sys/fs/cgroup/slice/job", "max", 10 * MIB)}
    assert host_memory.host_room(host(files)) == 100 * MIB
    assert host_memory.host_room(host(files | limited("sys/fs/cgroup/slice", 40 * MIB, 10 * MIB))) == 30 * MIB


def test_groups_of_version_1(host):
    files = {"proc/self/cgroup": "9:cpu,cpuacct:/x\n8:memory:/job\n"}
    files |= limited("sys/fs/cgroup/memory/job", 40 * MIB, 30 * MIB, version=1)
    assert host_memory.host_room(host(files)) == 10 * MIB
    assert host_memory.host_room(host({"proc/self/cgroup": "8:memory:/other\n"})) == 100 * MIB


def test_a_group_that_has_taken_too_much_leaves_nothing(host):
    files = {"proc/self/cgroup": "0::/\n", **limited("sys/fs/cgroup", 40 * MIB, 50 * MIB)}
    assert host_memory.host_room(host(files)) == 0
