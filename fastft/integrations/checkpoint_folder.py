"""Trainer's checkpoints: can they be written, and is the one that a training goes on from whole?

Trainer writes a checkpoint file by file, `trainer_state.json` last. It finds out at its first save
that it cannot, and of a half checkpoint it says little:

    optimizer.pt or scheduler.pt is missing    both begin anew, without a word
    all of optimizer, scheduler, random state  the same; and that is a checkpoint of save_only_model
    rng_state_1.pth is missing                 process 1 draws other numbers, without a word
    the rest is missing, or a file is cut off  an error that names no file and no way out, when the
                                               model has its weights already
    saved over a checkpoint of another         what was not reached yet is the other's
    training

So all files that Trainer would read are looked at before anything is loaded: their names, the
headers of safetensors, the directories of torch's zip files, JSON. What else lies there is the
user's. And a checkpoint that is saved again loses its `trainer_state.json` first.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy, get_last_checkpoint
from transformers.utils import logging

from fastft.optim import weight_files

# below "transformers", so that its verbosity rules
logger = logging.get_logger(f"transformers.{__name__}")

STATE = "trainer_state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")
# with the names that each has for FSDP, XLA or SageMaker, or on several processes
_TOGETHER = {
    "optimizer.pt": re.compile(
        r"optimizer(\.pt(_\d+)*|(_\d+)?(_rank\d+)?\.bin|_\d+)|rank\d+-of-\d+-optimizer\.pt"
    ),
    "scheduler.pt": re.compile(r"scheduler\.pt"),
    "rng_state.pth": re.compile(r"rng_state(_\d+)?\.pth"),
}
_NOT_READ = "training_args.bin"  # when a training goes on
_OF_STATE = ("global_step", "train_batch_size")
_JSON = {"config.json", "adapter_config.json"}
_INDEX = (".safetensors.index.json", ".bin.index.json")
_ZIP, _PICKLE = b"PK", b"\x80"
_SINGLE = {"model.safetensors", "pytorch_model.bin"}  # where one is, no index is read


def check_checkpoints(trainer: Any, resume: str | bool | None) -> None:
    """Raises where a training could not save, or would go on from a half checkpoint.

    To be called by every process, before anything is loaded: what one finds, all raise.

    Args:
        trainer: a `transformers.Trainer`.
        resume: `resume_from_checkpoint` of its `train()`.

    Raises:
        ValueError: with the file, and with the way out.
    """
    problem = _why_not_written(trainer.args)
    folder = resume
    if resume is True and os.path.isdir(trainer.args.output_dir):
        folder = get_last_checkpoint(trainer.args.output_dir)
    if problem is None and isinstance(folder, str | os.PathLike) and os.path.isdir(folder):
        problem = _why_not_loaded(Path(folder), trainer)
    processes = trainer.args.world_size
    if processes > 1:
        found = torch.tensor([problem is not None], device=trainer.accelerator.device)
        others = trainer.accelerator.gather(found.int()).nonzero().flatten().tolist()
        if problem is None and others:
            problem = f"process {others[0]} has said why this training does not begin"
    if problem is not None:
        raise ValueError(problem)


def forget_earlier_save(folder: str | os.PathLike[str]) -> None:
    """Before a checkpoint is saved: one that is there already is no whole one from now on."""
    (Path(folder) / STATE).unlink(missing_ok=True)


def _why_not_written(args: Any) -> str | None:
    if args.save_strategy == SaveStrategy.NO or not args.should_save:
        return None
    folder, why = Path(args.output_dir), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            why = "it is read-only"
        for path in folder.iterdir():
            if _FOLDER.fullmatch(path.name) and not path.is_dir():
                why = f"{path.name} in it is a file"
    except OSError as error:
        why = str(error)
    return why and (
        f"args.output_dir={args.output_dir!r} cannot take the checkpoints of this training: {why}. "
        "Choose another folder, or save_strategy='no'"
    )


def _why_not_loaded(folder: Path, trainer: Any) -> str | None:
    fault = _fault_of(folder, trainer)
    if fault is None:
        return None
    number = _number(folder)
    others = [path for path in folder.parent.iterdir() if path.is_dir() and _number(path) < number]
    others.sort(key=_number, reverse=True)
    whole = next((path for path in others if _fault_of(path, trainer) is None), None)
    way_out = (
        "Begin anew, without resume_from_checkpoint: no checkpoint before it is whole"
        if whole is None
        else f"Go on from the one before, resume_from_checkpoint={str(whole)!r}, or delete this one"
    )
    return f"the checkpoint {folder} is not whole: {fault}. {way_out}"


def _number(folder: Path) -> int:
    """The step of a checkpoint's name; -1 of another name."""
    found = _FOLDER.fullmatch(folder.name)
    return int(found[1]) if found else -1


def _fault_of(folder: Path, trainer: Any) -> str | None:
    """What is missing, or cut off, of a checkpoint's files; None of a whole one."""
    names = {path.name for path in folder.iterdir()}
    of_all = _files_missing(folder, names, trainer)
    of_own = _random_state_missing(names, trainer.args)
    adapters = sorted(folder.glob("*/adapter_*"))  # of several, each in a folder
    cut = (_why_cut_off(path) for path in [*(folder / name for name in sorted(names)), *adapters])
    return next((fault for faults in (of_all, of_own, cut) for fault in faults if fault), None)


def _files_missing(folder: Path, names: set[str], trainer: Any) -> Iterator[str]:
    if STATE not in names:
        yield f"{STATE} is missing, which Trainer writes last"
    weights = (name for name in names if name.endswith((".safetensors", ".bin")))
    # a Trainer that loads weights in its own way knows their names
    theirs = type(trainer)._load_from_checkpoint is Trainer._load_from_checkpoint
    # those of several adapters, of FSDP and of DeepSpeed are in folders
    in_folders = any(path.is_dir() for path in folder.iterdir())
    if theirs and not set(weights) - {_NOT_READ} and not in_folders:
        yield "model.safetensors is missing, or adapter_model.safetensors"
    missing = [
        file for file, pattern in _TOGETHER.items() if not any(map(pattern.fullmatch, names))
    ]
    # DeepSpeed has its own; none of them: saved with save_only_model
    if not trainer.is_deepspeed_enabled and len(missing) < len(_TOGETHER):
        yield from (f"{file} is missing" for file in missing)


def _random_state_missing(names: set[str], args: Any) -> Iterator[str]:
    """That of this process, in a checkpoint of as many processes as far as is known."""
    if not any(map(_TOGETHER["rng_state.pth"].fullmatch, names)):
        return  # saved without
    of_processes = [re.fullmatch(r"rng_state_(\d+)\.pth", name) for name in names]
    known = {int(found[1]) for found in of_processes if found}
    own, several = args.process_index, args.world_size > 1
    file = f"rng_state_{own}.pth" if several else "rng_state.pth"
    if file in names:
        return
    if several and known and (own < max(known) or len(known) == 1):
        yield f"{file} is missing, of process {own}"
    logger.warning(
        f"fastft: the checkpoint has no {file}, it is of another number of processes: process "
        f"{own} draws random numbers anew"
    )


def _why_cut_off(file: Path) -> str | None:
    if file.is_dir() or file.name == _NOT_READ:
        return None
    try:
        if file.name.endswith(".safetensors"):
            with weight_files.opened(file):
                pass
        elif file.name == STATE:
            return _not_a_state(file)
        elif file.name in _JSON:
            json.loads(file.read_bytes())
        elif file.name.endswith(_INDEX):
            return _shard_missing(file)
        elif file.suffix in (".pt", ".pth", ".bin") and not _is_whole_zip(file):
            return f"{file.name} is cut off"
    except OSError as error:
        return f"{file.name} is there, but cannot be read ({error})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{file.name} is cut off, or damaged"
    return None


def _not_a_state(file: Path) -> str | None:
    """What JSON lacks without which Trainer ends with an error that names no file."""
    content = json.loads(file.read_bytes())
    if isinstance(content, dict) and all(isinstance(content.get(name), int) for name in _OF_STATE):
        return None
    return f"{file.name} is damaged: it has not what Trainer writes there"


def _shard_missing(index: Path) -> str | None:
    there = {path.name for path in index.parent.iterdir()}
    if there & _SINGLE:
        return None
    shards = set(json.loads(index.read_bytes())["weight_map"].values())
    missing = sorted(shards - there)
    return f"{missing[0]} is missing, which {index.name} names" if missing else None


def _is_whole_zip(file: Path) -> bool:
    """Whether torch can have written it; of its files from before 1.6, pickles, nobody can tell.

    What others have written under a name that Trainer does not read is theirs.
    """
    with open(file, "rb") as content:
        begin = content.read(2)
    read = any(pattern.fullmatch(file.name) for pattern in _TOGETHER.values())
    if begin.startswith(_PICKLE) or (not read and not _ZIP.startswith(begin)):
        return True
    try:
        with zipfile.ZipFile(file) as content:
            return bool(content.infolist())
    except zipfile.BadZipFile:
        return False
