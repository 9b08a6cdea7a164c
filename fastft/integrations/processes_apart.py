"""Processes that a launcher has started together, and that nobody has joined."""

from __future__ import annotations

import os
from typing import NamedTuple


class Apart(NamedTuple):
    """Three sentences: what there is, what it does to a training, and what to do."""

    what: str
    why: str
    remedy: str

    def __str__(self) -> str:
        return " ".join(self)


def processes_apart(joined: int) -> Apart | None:
    """What to say where a launcher has started several processes, each of which trains alone; None
    where they train together, or where there is one.

    accelerate joins processes where LOCAL_RANK is set and there is a GPU for it, or where it was
    told that it is to use CPUs; in all other cases it says nothing.

    Args:
        joined: how many processes train together, as transformers or accelerate counts them.
    """
    started = os.environ.get("WORLD_SIZE", "")
    if joined != 1 or not started.isdecimal() or int(started) < 2:
        return None
    return Apart(
        f"A launcher has started {started} processes (WORLD_SIZE), and they have not been joined.",
        "Each trains a model of its own on all examples, and all write to the same output folder.",
        "On CPUs pass use_cpu=True to TrainingArguments, or cpu=True to Accelerator; on GPUs start "
        "the script with torchrun or accelerate launch, which set LOCAL_RANK too. Unset WORLD_SIZE "
        "if each is to train alone.",
    )


def is_first_started() -> bool:
    """Whether this is the first of the processes that a launcher has started, joined or not."""
    return os.environ.get("RANK", "0") == "0"
