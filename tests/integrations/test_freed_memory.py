"""Memory that a training frees stays with the process until its end, and goes back then."""

import contextlib
import os
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
needs_library = pytest.mark.skipif(
    _native.missing("cpu") is not None or not sys.platform.startswith("linux"),
    reason="needs the CPU library and glibc",
)


@pytest.fixture
def asked(monkeypatch):
    """What malloc was told."""
    for name in ("GLIBC_TUNABLES", *freed_memory._SETTINGS):
        monkeypatch.delenv(name, raising=False)
    told = []
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


def test_another_malloc(monkeypatch):
    told = []
    monkeypatch.setattr(_native, "keep_freed", lambda keep: told.append(keep) and False)
    with contextlib.ExitStack() as kept:
        keep_freed_memory(nn.Linear(2, 2), kept)
    assert False not in told


@needs_library
def test_the_heap_stays_and_goes():
    """In a process of its own, since malloc's settings are all of a process's."""
    script = f"""
        import torch
        from fastft import _native
        from fastft.integrations.process_memory import resident

        def touched_and_freed():
            before = resident()
            blocks = [torch.ones({MIB} // 4) for _ in range(200)]
            del blocks
            return resident() - before

        assert _native.keep_freed(True)
        kept = touched_and_freed()
        again = touched_and_freed()
        held = resident()
        assert _native.keep_freed(False)
        print(kept, again, held - resident())
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GLIBC_TUNABLES", *freed_memory._SETTINGS)
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, again, given_back = (int(number) for number in done.stdout.split())
    assert kept > 190 * MIB
    assert again < 10 * MIB
    assert given_back > 190 * MIB


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
