"""How much memory the host has left, and memory that a GPU copies from by itself."""

import contextlib
import gc
import os
from pathlib import Path

import pytest
import torch

from fastft.optim.offload import device, host_memory, page_locked
from fastft.optim.offload.device import Accelerator

GIB = 2**30
CARD = torch.device("cuda", 1)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of a system that has 64 GiB left."""
    monkeypatch.setattr(host_memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path / "groups")

    def write(**files):
        files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {64 * 2**20} kB\n", **files}
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def _group(folder, limit, used, cached, names=host_memory._VERSION_2):
    files = (limit, used, f"anon 5\n{names[2]} {cached}\n")
    return {
        f"groups/{folder}{name}": f"{text}\n"
        for name, text in zip((*names[:2], "memory.stat"), files, strict=True)
    }


def test_what_the_system_has_left(system):
    system()
    assert host_memory.available() == 64 * GIB


def test_a_container_of_control_groups_version_2_counts_but_for_its_cached_files(system):
    system(**{"proc/self/cgroup": "0::/\n"}, **_group("", 8 * GIB, 5 * GIB, GIB))
    assert host_memory.available() == 4 * GIB


def test_a_container_without_a_limit_does_not_count(system):
    system(**{"proc/self/cgroup": "0::/\n"}, **_group("", "max", 5 * GIB, GIB))
    assert host_memory.available() == 64 * GIB


def test_the_narrowest_limit_of_a_batch_systems_nested_groups_counts(system):
    system(
        **{"proc/self/cgroup": "0::/jobs/7/task\n"},
        **_group("jobs/", 30 * GIB, 20 * GIB, 0),
        **_group("jobs/7/", 12 * GIB, 10 * GIB, 0),
        **_group("jobs/7/task/", "max", 10 * GIB, 0),
    )
    assert host_memory.available() == 2 * GIB


def test_control_groups_of_version_1_as_a_container_sees_them(system):
    system(
        **{"proc/self/cgroup": "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n"},
        **_group("memory/", 8 * GIB, 5 * GIB, GIB, host_memory._VERSION_1),
    )
    assert host_memory.available() == 4 * GIB


def test_a_system_that_does_not_say_is_not_asked(system, tmp_path):
    assert host_memory.available() is None


class Runtime:
    """What of CUDA's runtime page-locks memory."""

    def __init__(self, most=10):
        self.locked, self.most, self.calls = {}, most, []

    def cudaHostRegister(self, address, size, flags):
        if len(self.locked) == self.most:
            return 2  # cudaErrorMemoryAllocation
        self.locked[address] = size
        self.calls.append("register")
        return 0

    def cudaHostUnregister(self, address):
        del self.locked[address]
        self.calls.append("unregister")


@pytest.fixture
def runtime(monkeypatch):
    """In the place of CUDA's; notes whose context is current, and waits for a device."""
    runtime = Runtime()

    @contextlib.contextmanager
    def current(device):
        runtime.calls.append(f"context {device}")
        yield

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: runtime.calls.append(f"wait {device}")
    )
    return runtime


@pytest.mark.parametrize("size", [1, 63, 100_001])
def test_page_locked_memory_is_as_large_as_asked_for_and_given_back(runtime, size):
    memory = Accelerator(torch.device("cuda")).host_memory(size)
    part = memory[size // 2 :].view(torch.int8)
    assert memory.shape == (size,) and runtime.locked == {memory.data_ptr(): size}
    del memory
    gc.collect()
    assert runtime.locked  # a part is still there
    part.fill_(1)
    del part
    assert not runtime.locked


def test_memory_is_unlocked_when_the_device_has_done_its_copies(runtime):
    memory = page_locked.memory(100, CARD)
    assert runtime.calls == ["context cuda:1", "register"]
    del memory
    assert runtime.calls[2:] == ["wait cuda:1", "unregister"]


def test_memory_that_goes_after_cuda_makes_no_noise(runtime, monkeypatch, capfd):
    def failed(device):
        raise RuntimeError("CUDA error: driver shutting down")

    monkeypatch.setattr(torch.cuda, "synchronize", failed)
    memory = page_locked.memory(100, CARD)
    del memory
    assert runtime.calls[-1] == "register" and capfd.readouterr().err == ""


def test_memory_that_the_driver_does_not_lock_is_a_sentence(runtime):
    runtime.most = 0
    with pytest.raises(RuntimeError, match=r"does not page-lock 100 more bytes .* error 2"):
        page_locked.memory(100, CARD)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_process_that_is_forked_neither_copies_nor_unlocks_the_memory(runtime):
    memory = page_locked.memory(100_001, CARD)
    address = f"{memory.data_ptr():x}-"
    assert any(line.startswith(address) for line in Path("/proc/self/maps").open())
    child = os.fork()
    if child == 0:
        there = any(line.startswith(address) for line in Path("/proc/self/maps").open())
        del memory
        # whose end would unmap what this process has mapped there since
        pages = [one for one in gc.get_objects() if isinstance(one, page_locked._Pages)]
        os._exit(there or not runtime.locked or not pages)
    assert os.waitpid(child, 0)[1] == 0


def test_a_device_without_memory_or_queues_of_its_own_is_refused():
    with pytest.raises(
        RuntimeError, match=r"a Mac's GPU has the host's memory .* leave out offload"
    ):
        device.of(torch.device("mps"))
