"""Memory that a training frees stays with the process until its end, and goes back then."""

import contextlib
import gc
import os
import platform
import subprocess
import sys
import textwrap

import pytest
from support.fused_trainings import examples, llama
from support.trainers import quiet_arguments
from torch import nn
from transformers import Trainer, TrainerCallback

from fastft import PackingCollator, _native
from fastft.integrations import freed_memory
from fastft.integrations.freed_memory import keep_freed_memory
from fastft.integrations.fused_loss import FusedLossCallback
from fastft.integrations.packing import PackingCallback

MIB = 1 << 20
needs_glibc = pytest.mark.skipif(
    _native.missing("cpu") is not None or platform.libc_ver()[0] != "glibc",
    reason="needs the CPU library and glibc",
)


@pytest.fixture
def asked(monkeypatch):
    """What malloc was told."""
    for name in ("GLIBC_TUNABLES", *freed_memory._SETTINGS):
        monkeypatch.delenv(name, raising=False)
    told = []
    gc.collect()  # the trainings of other tests, which would end in this one
    monkeypatch.setattr(freed_memory, "_trainings", 0)
    monkeypatch.setattr(_native, "keep_freed", lambda keep: told.append(keep) or True)
    return told


def test_from_begin_to_end(asked):
    with contextlib.ExitStack() as kept:
        keep_freed_memory(nn.Linear(2, 2), kept)
        assert asked == [True]
    assert asked == [True, False]


@pytest.mark.parametrize(
    "name, value",
    [
        ("MALLOC_TRIM_THRESHOLD_", "65536"),
        ("MALLOC_MMAP_THRESHOLD_", "65536"),
        ("MALLOC_TOP_PAD_", "65536"),
        ("MALLOC_MMAP_MAX_", "0"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=65536"),
    ],
)
def test_settings_of_the_user_stay(asked, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as kept:
        keep_freed_memory(nn.Linear(2, 2), kept)
    assert asked == []


def test_tunables_of_others_are_none_of_malloc(asked, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.cpu.x86_ibt=off")
    with contextlib.ExitStack() as kept:
        keep_freed_memory(nn.Linear(2, 2), kept)
    assert asked == [True, False]


@pytest.mark.parametrize("some", [False, True])
def test_a_model_elsewhere_leaves_malloc_alone(asked, some):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1 if some else slice(None)].to("meta")
    with contextlib.ExitStack() as kept:
        keep_freed_memory(model, kept)
    assert asked == []


def test_another_malloc(asked, monkeypatch):
    monkeypatch.setattr(_native, "keep_freed", lambda keep: asked.append(keep) and False)
    with contextlib.ExitStack() as kept:
        keep_freed_memory(nn.Linear(2, 2), kept)
    assert asked == [True]


def test_a_training_inside_another(asked):
    outer, inner = contextlib.ExitStack(), contextlib.ExitStack()
    keep_freed_memory(nn.Linear(2, 2), outer)
    keep_freed_memory(nn.Linear(2, 2), inner)
    inner.close()
    assert asked == [True]
    outer.close()
    assert asked == [True, False]


@needs_glibc
def test_the_heap_stays_and_goes():
    """In a process of its own, since malloc's settings are all of a process's; malloc itself, as
    torch may have another one."""
    script = f"""
        import ctypes
        from fastft import _native
        from fastft.integrations.process_memory import resident

        libc = ctypes.CDLL(None)
        libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
        blocks = (ctypes.c_void_p * 200)()  # all of it now: a list that grows would pin the heap

        def left_behind():
            before, heap = resident(), libc.sbrk(0)
            for index in range(200):
                blocks[index] = libc.malloc({MIB})
                ctypes.memset(blocks[index], 1, {MIB})
            grown = libc.sbrk(0) - heap
            for block in reversed(blocks):
                libc.free(ctypes.c_void_p(block))
            return resident() - before, grown

        assert _native.keep_freed(True)
        (kept, _), (again, _), held = left_behind(), left_behind(), resident()
        assert _native.keep_freed(False)
        print(kept, again, held - resident(), *left_behind())
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GLIBC_TUNABLES", "LD_PRELOAD", *freed_memory._SETTINGS)
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, again, given_back, afterwards, grown = (int(word) for word in done.stdout.split())
    assert kept > 150 * MIB
    assert again < 40 * MIB
    assert given_back > 150 * MIB
    # where the system has no room behind the heap, glibc's goes on elsewhere and stays
    assert afterwards < 100 * MIB or grown < 150 * MIB


class Interrupts(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("make", [FusedLossCallback, PackingCallback])
def test_a_training(asked, tmp_path, make):
    callback = make()
    stages = []
    trainer = Trainer(
        llama(),
        quiet_arguments(tmp_path, max_steps=2, per_device_train_batch_size=3, use_cpu=True),
        train_dataset=examples(),
        data_collator=PackingCollator(),
        callbacks=[callback],
    )
    step = trainer.training_step
    trainer.training_step = lambda *a, **k: stages.append(list(asked)) or step(*a, **k)
    trainer.train()
    assert stages == [[True], [True]] and asked == [True, False]

    trainer.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    callback.restore()
    assert asked == [True, False, True, False]
