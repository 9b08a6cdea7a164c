"""Trainings in processes whose address space ends where there is too little of it for them.

A process that has imported everything, and has trained something small, forks for each limit: all
begin with the same memory, of which malloc has next to nothing to spare. It runs apart from pytest,
whose heap has gigabytes of room (`support.killed.apart`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import fastft
from support.trainers import logged, quiet_arguments, tiny_llama

LENGTH = 128
LARGE, SMALL = 12_000, 100  # vocabularies
# options of `plug`, the dtype of the weights
WAYS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "packs, 8-bit moments": ({"packing": LENGTH, "moments": "8bit", "seed": 1}, torch.bfloat16),
    "4-bit moments on the host": ({"moments": "4bit", "offload": "states"}, torch.bfloat16),
    "linear layers": ({"linear": True}, torch.float32),
}


class Steps(transformers.TrainerCallback):
    """The digest of the weights before the first step and behind each."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.digests.append(digest(model))

    def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.digests.append(digest(model))


def digest(model: torch.nn.Module) -> str:
    """Of all weights, without a copy of them."""
    found = hashlib.sha256()
    for param in model.parameters():
        found.update(param.detach().view(torch.uint8).numpy())
    return found.hexdigest()


def training(folder: Path, way: str, vocabulary: int) -> tuple[transformers.Trainer, Steps]:
    """A plugged training of two steps, whose need of memory is that of its vocabulary."""
    options, dtype = WAYS[way]
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(3, SMALL, (8, LENGTH // 2), generator=draw).tolist()
    steps = Steps()
    trainer = transformers.Trainer(
        tiny_llama(vocabulary, hidden_size=256, max_position_embeddings=LENGTH).to(dtype),
        quiet_arguments(folder, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        data_collator=transformers.default_data_collator,
        callbacks=[steps],
    )
    fastft.plug(trainer, **options)
    return trainer, steps


def trained(trainer: transformers.Trainer, steps: Steps) -> list[Any]:
    """What came of a training."""
    trainer.train()
    return [logged(trainer, "loss", "grad_norm"), steps.digests]


def outcomes(folder: Path, way: str, shares: Sequence[float]) -> str:
    """As JSON: what a training comes to without a limit and a small one, and of each share of the
    memory that it takes then: what `_attempt` says, with an error and the weights that it has left
    in the place of the outcome."""
    torch.set_num_threads(1)
    small = trained(*training(folder, way, SMALL))
    free, need, *_ = _of_a_child(folder, way, None)
    assert need > 30 * 2**20, need
    found = [_of_a_child(folder, way, int(share * need)) for share in shares]
    return json.dumps({"free": free, "small": small, "limited": found})


def _of_a_child(folder: Path, way: str, room: int | None) -> Any:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writer, json.dumps(_attempt(folder, way, room)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader) as answer:
        text = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"with {room} bytes of room the process ended with {status}"
    return json.loads(text)


def _attempt(folder: Path, way: str, room: int | None) -> list[Any]:
    """The outcome, the bytes that it took at most, the small training's outcome, and whether torch
    has said that it computes products without oneDNN from now on, which had no memory: the rounding
    differs then, so that oneDNN is given back for the small training."""
    trainer, steps = training(folder, way, LARGE)
    held, limits = _bytes_of("VmSize"), resource.getrlimit(resource.RLIMIT_AS)
    if room is not None:
        resource.setrlimit(resource.RLIMIT_AS, (held + room, limits[1]))
    try:
        outcome: Any = trained(trainer, steps)
    except (MemoryError, RuntimeError) as error:
        outcome = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_AS, limits)
    if isinstance(outcome, str):
        outcome = [outcome, digest(trainer.model)]
    need, switched = _bytes_of("VmPeak") - held, not torch.backends.mkldnn.enabled
    torch.backends.mkldnn.set_flags(True)
    return [outcome, need, trained(*training(folder, way, SMALL)), switched]


def _bytes_of(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
