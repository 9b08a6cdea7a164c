"""Trainings that are killed: in a save at each call that changes a file, in a step at each function
that is entered or left; and what a resumed one must come to.

A process which has imported everything trains to the place, and forks there for each kill. It runs
apart from pytest (`apart`), with one thread, because OpenMP does not survive a fork.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers

import fastft
from support import system_calls
from support.plugged import examples, trainer_of
from support.trainers import logged

STEPS, SAVED = 6, 2
PACKS = {"packing": 40}
# options of `plug`
KINDS: dict[str, dict[str, Any]] = {
    "fp32 moments": {},
    "packs, stochastic rounding, bf16 moments": {
        **PACKS,
        "rounding": "stochastic",
        "moments": "bf16",
    },
    "a packed stream": {"moments": "8bit"},
    "8-bit moments": {"moments": "8bit"},
    "4-bit moments": {"moments": "4bit"},
    "states on the host": {"moments": "8bit", "offload": "states"},
    "gradients on the host": {"moments": "4bit", "offload": "gradients"},
    "packs, overlap": {**PACKS, "offload": "overlap"},
    "gradients used up in backward": {"release_gradients": True},
}
# whose functions are the phases of a step
_CODE = ("fastft", "transformers.trainer", "accelerate", "torch.optim", "torch.autograd")
_NOT_NEEDED = {"training_args.bin", "config.json", "generation_config.json"}


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The examples, one after the other."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from examples()


def training(
    folder: Path | str,
    kind: str,
    *callbacks: transformers.TrainerCallback,
    **changes: Any,
) -> transformers.Trainer:
    """bf16 weights with their low bits, Trainer's clipping, a checkpoint every two steps.

    Where gradients are used up in backward nothing is accumulated or clipped.
    """
    options = KINDS[kind]
    saving = {"save_strategy": "steps", "save_steps": SAVED, "max_steps": STEPS}
    saving |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    if options.get("release_gradients"):
        saving |= {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    given = {}
    if kind == "a packed stream":
        stream = fastft.pack(Stream(), max_tokens=40)
        given = {"train_dataset": stream, "data_collator": fastft.PackingCollator()}
        saving |= {"accelerator_config": {"dispatch_batches": False}}
        saving |= {"per_device_train_batch_size": 1}
    trainer = trainer_of(folder, options=given, **{**saving, **changes})
    trainer.model.to(torch.bfloat16)
    for callback in callbacks:
        trainer.add_callback(callback)
    fastft.plug(trainer, seed=5, **options)
    return trainer


def assert_goes_on(folder: Path, kind: str, whole: Any, resume: bool | str = True) -> None:
    """A training resumed there comes to the losses and the bits of one that nobody interrupted."""
    again = training(folder, kind)
    again.train(resume_from_checkpoint=resume)
    assert logged(again, "loss", "grad_norm") == logged(whole, "loss", "grad_norm")
    assert len(logged(whole)) == STEPS
    for name, param in again.model.named_parameters():
        assert torch.equal(param, whole.model.get_parameter(name)), name


def digest(folder: Path) -> str:
    """Of all files that a resumed training reads."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = hashlib.sha256()
    for path in files:
        if path.name not in _NOT_NEEDED:
            found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()


class KilledSaves(transformers.TrainerCallback):
    """When the second checkpoint is due, processes try to save it and are killed, one at each call
    that changes a file, or each `every`-th; then the training goes on.

    Attributes:
        kills: how many.
        refused: how many left a checkpoint from which no training goes on.
        whole: a copy of the folder for each distinct checkpoint from which one does.
        half: a copy with a half checkpoint.
    """

    def __init__(self, folder: Path, every: int = 1) -> None:
        self.folder, self.every = folder, every
        self.kills = self.refused = 0
        self.trainer: Any = None  # whose saves they are
        self.whole: dict[str, Path] = {}
        self.half: Path | None = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Behind it Trainer saves."""
        if state.global_step == 2 * SAVED:
            trainer = self.trainer
            earlier = shutil.copytree(self.folder, f"{self.folder} before")
            drawn = random.getstate()

            def save() -> None:
                random.setstate(drawn)  # a fork seeds it anew
                trainer._save_checkpoint(trainer.model, None)

            faults = list(system_calls.faults_of(save, self.folder, "before", "half", "after"))
            for fault in faults[:: -self.every]:
                shutil.rmtree(self.folder)
                shutil.copytree(earlier, self.folder)
                ended = system_calls.run(save, self.folder, fault)
                assert ended.killed, ended
                self.kills += 1
                self._look(trainer, Path(earlier))
            shutil.rmtree(self.folder)
            shutil.copytree(earlier, self.folder)

    def _look(self, trainer: Any, earlier: Path) -> None:
        """The earlier checkpoint is whole; the new one is, or it is refused."""
        from fastft.integrations.checkpoint_folder import check_checkpoints

        kept = f"checkpoint-{SAVED}"
        assert digest(self.folder / kept) == digest(earlier / kept)
        new = self.folder / f"checkpoint-{2 * SAVED}"
        try:
            check_checkpoints(trainer, True)
        except ValueError as error:
            assert f"the checkpoint {new} is not whole: " in str(error)
            assert str(self.folder / kept) in str(error)
            self.refused += 1
            self.half = self.half or _copy(self.folder, "half")
        else:
            found = digest(new) if new.exists() else ""
            if found not in self.whole:
                self.whole[found] = _copy(self.folder, f"whole {len(self.whole)}")


def _copy(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, f"{folder} {name}"))


class Places:
    """The places by which this thread comes, each a function of the modules of `code` that is
    entered or left for the first time; at number `at` the process is killed."""

    def __init__(self, at: int | None = None, code: tuple[str, ...] = _CODE) -> None:
        self.at, self.code, self.seen = at, code, set[tuple[Any, str]]()

    def begin(self) -> None:
        """From now on."""
        sys.setprofile(self._came_by)

    def end(self) -> int:
        """How many there were."""
        sys.setprofile(None)
        return len(self.seen)

    def _came_by(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        place = frame.f_code, event
        if place in self.seen or not frame.f_globals.get("__name__", "").startswith(self.code):
            return
        self.seen.add(place)
        if len(self.seen) - 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledSteps(transformers.TrainerCallback):
    """In the step behind the first checkpoint processes are killed, one at each place, or each
    `every`-th; then the training goes on.

    Attributes:
        kills: how many.
    """

    def __init__(self, folder: Path, every: int = 1) -> None:
        self.folder, self.every, self.kills = folder, every, 0
        self._counting: Places | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != SAVED or self._counting is not None:
            return
        before = digest(self.folder)
        count = self._step_of(Places())
        if count is None:
            return
        for number in range(self.every // 2, count, self.every):
            if self._step_of(Places(number)) is None:
                return
            self.kills += 1
        assert digest(self.folder) == before

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._counting is not None:
            (self.folder / "places").write_text(str(self._counting.end()))
            os._exit(0)

    def _step_of(self, places: Places) -> int | None:
        """The end of a child's step: the places that it counted, or 0 if it was killed. None in
        the child, which goes on."""
        child = os.fork()
        if child == 0:
            self._counting = places
            places.begin()
            return None
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (0 if places.at is None else -signal.SIGKILL), (status, places.at)
        counted = self.folder / "places"
        number = int(counted.read_text()) if counted.exists() else 0
        counted.unlink(missing_ok=True)
        return number


def kill_everywhere(folder: Path, kind: str, every: int = 1) -> str:
    """A training of a kind, killed in its second save and in a step; what came of it, in a line."""
    folder.mkdir(parents=True)
    saves, steps = KilledSaves(folder, every), KilledSteps(folder, every)
    whole = training(folder, kind, saves, steps)
    saves.trainer = whole
    whole.train()
    assert saves.kills and saves.refused and steps.kills and saves.half
    assert set(saves.whole) >= {digest(folder / f"checkpoint-{2 * SAVED}")}, "none was whole"
    for copy in saves.whole.values():
        assert_goes_on(copy, kind, whole)
    assert_goes_on(saves.half, kind, whole, str(saves.half / f"checkpoint-{SAVED}"))
    return (
        f"{saves.kills} kills in a save ({saves.refused} left a half checkpoint, the others one of "
        f"{len(saves.whole)}), {steps.kills} in a step"
    )


def apart(module: str, call: str) -> str:
    """Runs `call` of a module in a process of its own; what it printed last."""
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    code = f"from pathlib import Path; import {module} as module; print(module.{call})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().rpartition("\n")[2]
