"""Trainings of two processes of which one is killed: in its save, at calls that change a file, or
in a step, at functions that are entered or left.

As in `killed.py`, a process that has imported everything forks both for each kill.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import Shard, distribute_tensor

import fastft
from fastft.integrations.checkpoint_folder import _fault_of
from support import peers, system_calls
from support.killed import SAVED, Places, digest, training
from support.system_calls import Ended, Fault

RANKS, LIMIT, MARGIN = 2, 60, 60  # seconds of a collective; more for a machine that is busy
_WORDS = ("Timed out", "closed by peer", "reset by peer", "Broken pipe")


class Left(NamedTuple):
    """How the other process ended, after how many seconds, and what it said."""

    status: int | None
    seconds: float
    said: str


class InStep(transformers.TrainerCallback):
    """Counts the places of the step behind the first checkpoint, or dies at one of them."""

    def __init__(self, places: Places, counted: Path) -> None:
        self.places, self.counted = places, counted

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SAVED:
            self.places.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SAVED + 1:
            self.counted.write_text(str(self.places.end()))


def _trained(rank: int, folder: Path, kind: str, resume: Any, *callbacks: Any) -> None:
    """A training by Trainer, which leaves its weights."""
    trainer = training(folder, kind, *callbacks, per_device_train_batch_size=1)
    trainer.train(resume_from_checkpoint=resume)
    found = {name: value.detach() for name, value in trainer.model.named_parameters()}
    torch.save(found, _beside(folder, f"{rank}.pt"))


def _spread(places: Places, counted: Path) -> None:
    """A loop with every collective of fastft's own: classes spread over the processes by `group=`
    and as a DTensor, log-probabilities, the norm of gradients that are DTensors."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    hidden = torch.nn.Linear(8, 8)
    sharded = torch.nn.Parameter(distribute_tensor(torch.randn(32, 8), mesh, [Shard(0)]))
    own, target = torch.nn.Parameter(torch.randn(16, 8)), torch.arange(9)
    params = [sharded, own, *hidden.parameters()]
    optimizer = fastft.AdamW(params, lr=1e-2, max_grad_norm=0.1)
    for step in range(3):
        if step == 1:
            places.begin()
        x = hidden(torch.randn(9, 8))
        loss = fastft.linear_cross_entropy(x, sharded, target)
        loss = loss + fastft.linear_cross_entropy(x, own, target, group=dist.group.WORLD)
        log_probs = fastft.linear_log_probs(x, sharded, target)
        (loss - log_probs.log_probs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            counted.write_text(str(places.end()))


def _join(rank: int, port: int, folder: Path, work: Callable[[], None]) -> None:
    """What a process does: it joins the other, works, and says why it fails."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = open(_beside(folder, f"{rank}.log"), "w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
        work()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _beside(folder: Path, name: str) -> Path:
    return folder.with_name(f"{folder.name} {name}")


def both(
    folder: Path,
    works: Sequence[Callable[[], None]],
    watched: int = 0,
    fault: Fault | None = None,
) -> tuple[Ended, Left]:
    """The work of each process; rank `watched` may meet a fault."""
    port = peers.free_port()
    other = os.fork()
    if other == 0:
        try:
            _join(1 - watched, port, folder, works[1 - watched])
            os._exit(0)
        finally:
            os._exit(1)
    ended = system_calls.run(lambda: _join(watched, port, folder, works[watched]), folder, fault)
    begin, status = time.monotonic(), None
    while status is None and time.monotonic() < begin + LIMIT + MARGIN:
        found, code = os.waitpid(other, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if found else None
        time.sleep(0.05)
    seconds = time.monotonic() - begin
    if status is None:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    return ended, Left(status, seconds, _beside(folder, f"{1 - watched}.log").read_text())


def run(
    folder: Path,
    kind: str,
    resume: Any,
    watched: int = 0,
    fault: Fault | None = None,
    in_step: Places | None = None,
) -> tuple[Ended, Left]:
    """A training by both; rank `watched` has the fault, or the places of a step."""
    counted = _beside(folder, "places")
    callbacks: list[list[Any]] = [[], []]
    if in_step is not None:
        callbacks[watched].append(InStep(in_step, counted))
    works = [
        functools.partial(_trained, rank, folder, kind, resume, *callbacks[rank])
        for rank in range(RANKS)
    ]
    return both(folder, works, watched, fault)


def _assert_ended_in_time(left: Left) -> None:
    assert left.status == 1, left
    assert any(word in left.said for word in _WORDS), left


def _faults(folder: Path, kind: str, watched: int) -> Iterator[Fault]:
    """Of the second checkpoint's files: before each is begun, when half of it is there, behind the
    last."""
    ended, left = run(folder, kind, True, watched)
    assert ended.status == left.status == 0, (ended.error, left)
    begun = set()
    mine = [
        (number, change)
        for number, change in enumerate(ended.changes)
        if change.file.startswith(f"checkpoint-{2 * SAVED}")
    ]
    for number, change in mine:
        place = change.file, change.call
        if place not in begun and not Path(change.file).name.startswith(".tmp"):
            yield Fault(number, "half" if "write" in change.call else "before")
        begun.add(place)
    yield Fault(mine[-1][0], "after")


def kill_one_of_two(folder: Path, kind: str, every: int = 1) -> str:
    """A training of two, one of them killed in the second save or in a step, and resumed; what came
    of it, in a line."""
    folder.mkdir(parents=True)
    ended, left = run(folder, kind, None, in_step=Places())
    assert ended.status == left.status == 0, (ended.error, left)
    count = int(_beside(folder, "places").read_text())
    whole = torch.load(_beside(folder, "0.pt"))
    earlier = folder.with_name("earlier")
    shutil.copytree(folder / f"checkpoint-{SAVED}", earlier / f"checkpoint-{SAVED}")
    kept: dict[str, Path] = {}
    slowest, kills = 0.0, 0

    def killed(watched: int, resume: Any, **how: Any) -> None:
        nonlocal slowest, kills
        _restart(folder, earlier)
        ended, left = run(folder, kind, resume, watched, **how)
        assert ended.killed, (ended, left)
        _assert_ended_in_time(left)
        slowest, kills = max(slowest, left.seconds), kills + 1
        assert digest(folder / f"checkpoint-{SAVED}") == digest(earlier / f"checkpoint-{SAVED}")
        if (found := digest(folder)) not in kept:
            kept[found] = Path(shutil.copytree(folder, _beside(folder, f"kept {len(kept)}")))

    for watched in range(RANKS):
        _restart(folder, earlier)
        for fault in list(_faults(folder, kind, watched))[::-every]:
            killed(watched, True, fault=fault)
    for number in range(0, count, max(count // 40, 1) * every):
        killed(1, True, in_step=Places(number))
    refused = sum(_goes_on(copy, kind, whole, earlier) for copy in kept.values())
    return (
        f"{kills} kills of one of two, the other ended within {slowest:.1f} seconds, {refused} of "
        f"{len(kept)} folders refused"
    )


def kill_at_collectives(folder: Path, every: int = 1) -> str:
    """A loop of two, one of them killed inside each function of torch.distributed; what came of it,
    in a line."""
    folder.mkdir(parents=True)
    code = ("torch.distributed.distributed_c10d", "torch.distributed._functional_collectives")
    counted = _beside(folder, "places")

    def works(at: int | None) -> list[Callable[[], None]]:
        ranks = (Places(None, code), Places(at, code))
        return [functools.partial(_spread, places, counted) for places in ranks]

    ended, left = both(folder, works(None), 1)
    assert ended.status == left.status == 0, (ended.error, left)
    slowest, kills = 0.0, 0
    for number in range(0, int(counted.read_text()), every):
        ended, left = both(folder, works(number), 1)
        assert ended.killed, (ended, left)
        _assert_ended_in_time(left)
        slowest, kills = max(slowest, left.seconds), kills + 1
    return f"{kills} kills in a collective, the other ended within {slowest:.1f} seconds"


def _restart(folder: Path, earlier: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(earlier, folder)


def _goes_on(folder: Path, kind: str, whole: dict[str, torch.Tensor], earlier: Path) -> bool:
    """Resumes what a killed process has left; whether the last checkpoint was refused first."""
    new, resume = folder / f"checkpoint-{2 * SAVED}", str(folder / f"checkpoint-{SAVED}")
    faults = [_fault_of(new, _trainer(rank)) for rank in range(RANKS)] if new.exists() else [None]
    if any(faults):
        ended, left = run(folder, kind, True)
        assert ended.status == left.status == 1, (ended, left)
        said = _beside(folder, "0.log").read_text() + left.said
        assert f"the checkpoint {new} is not whole: " in said and resume in said, said
    ended, left = run(folder, kind, resume if any(faults) else True)
    assert ended.status == left.status == 0, (ended.error, left)
    for rank in range(RANKS):
        found = torch.load(_beside(folder, f"{rank}.pt"))
        assert all(torch.equal(found[name], whole[name]) for name in whole)
    return any(faults)


def _trainer(rank: int) -> Any:
    """What a checkpoint of a process is looked at for."""
    trainer: Any = object.__new__(transformers.Trainer)
    trainer.args = SimpleNamespace(world_size=RANKS, process_index=rank)
    trainer.is_deepspeed_enabled = False
    return trainer
