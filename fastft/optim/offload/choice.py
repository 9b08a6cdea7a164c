"""`offload="auto"`: the first tier in which a training fits its device.

    needed(tier) = weights + gradients + states + staging of the tier (tiers.py) + activations
    budget       = what the device has free + what this process's weights take there already

Where the model's configuration and the batch are known, activations are known too: `estimate` runs
the training by shapes, in a process of its own, because it sets up a Trainer. Where they are not,
activations are taken for as much as all the rest. "overlap" is never chosen: it needs no less than
"gradients", and between two steps a weight may be stale.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from fastft.foreign import engines, models, sharding
from fastft.foreign.tensors import is_dtensor, local
from fastft.optim.offload import tiers

if TYPE_CHECKING:
    from fastft.optim.origin import Origin

_SECONDS = 600.0  # of an estimate; 70 billion parameters take two minutes
# what tells a process that it is one of several, or has a GPU
_OF_THIS_PROCESS = re.compile("(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_|ACCELERATE_|CUDA_VISIBLE_DEVICES")
_GIB = 2**30


class Batch(NamedTuple):
    """What goes through a model at once, and which pieces of fastft beside AdamW do."""

    rows: int
    tokens: int
    pieces: tuple[str, ...] = ()


class Choice(NamedTuple):
    """A tier, and why it was chosen, as a clause."""

    offload: str | None
    why: str


class Unknown(Exception):
    """Activations are not known; says why."""


def choose_for(
    params: Iterable[Any], moments: str, amsgrad: bool, rounding: str, origin: Origin | None
) -> tuple[list[Any], Choice]:
    """The choice for what an optimizer is going to be made of, and that, which may be a generator,
    as a list."""
    params = list(params)
    if all(isinstance(group, dict) for group in params):
        params = [{**group, "params": _listed(group["params"])} for group in params]
    defaults = {"moments": moments, "amsgrad": amsgrad}
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    groups = [{**defaults, **group, "params": _tensors(group["params"])} for group in groups]
    if not any(group["params"] for group in groups):
        return params, Choice(None, "there are no parameters")  # which torch refuses
    known = {} if origin is None else origin.training()
    return params, choose(groups, rounding, **known)


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _tensors(params: Iterable[Any]) -> list[Tensor]:
    """Without the names that may go with them, and without what torch refuses."""
    found = (param[1] if isinstance(param, tuple) else param for param in params)
    return [param for param in found if isinstance(param, Tensor)]


def choose(
    groups: list[dict[str, Any]],
    rounding: str,
    *,
    model: Any = None,
    args: Any = None,
    batch: Batch | None = None,
) -> Choice:
    """The tier of an optimizer over these parameter groups, the same in all processes.

    Args:
        groups: with `params`, `moments`, `amsgrad`.
        rounding: of the optimizer.
        model: that is trained; None where nobody knows, as the others.
        args: a TrainingArguments.
        batch: of which activations are estimated.
    """
    device = _device(groups, args)
    if device.type == "cpu":
        return Choice(None, "on a CPU the host's memory is the device's")
    if device.type == "mps":
        return Choice(None, "a Mac's GPU has the host's memory")
    allowed = _allowed(groups, args)
    budget = _least(_budget(device, groups, model))
    try:
        choice = _by_estimate(groups, rounding, model, args, batch, budget)
    except Unknown as error:
        choice = _by_bytes(groups, rounding, allowed, budget, _processes(groups, args), str(error))
    if choice.offload not in allowed:
        last = allowed[-1]
        why = f"{choice.offload} is not possible here, and {last} may not fit"
        choice = Choice(last, why)
    return _of_first(choice)


def _device(groups: list[dict[str, Any]], args: Any) -> torch.device:
    """Where the training will be: Trainer moves a model there later than its optimizer is made."""
    device: torch.device | None = getattr(args, "device", None)
    first = next(param for group in groups for param in group["params"])
    return device or local(first).device


def _allowed(groups: list[dict[str, Any]], args: Any) -> tuple[str | None, ...]:
    """Gradients leave the device where this process alone has them, or a shard of them, and no
    GradScaler looks for them."""
    copies = sharding.world_size() > 1 and not _are_cut(groups) and not _will_be_cut(args)
    is_scaled = bool(getattr(args, "fp16", False))
    return (None, "states") if copies or is_scaled else (None, "states", "gradients")


def _are_cut(groups: list[dict[str, Any]]) -> bool:
    return any(is_dtensor(param) for group in groups for param in group["params"])


def _will_be_cut(args: Any) -> bool:
    return engines.engine_of(args) == "FSDP"


def _processes(groups: list[dict[str, Any]], args: Any) -> int:
    """Among how many processes FSDP will cut the parameters that are whole now."""
    return sharding.world_size() if _will_be_cut(args) and not _are_cut(groups) else 1


def _budget(device: torch.device, groups: list[dict[str, Any]], model: Any) -> int:
    """Bytes of the device for all that is to be trained, but for frozen weights."""
    free, _ = torch.accelerator.get_memory_info(device)
    # of torch's allocator, which no tensor has
    free += torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    trained = [local(param) for group in groups for param in group["params"]]
    there = sum(part.nbytes for part in trained if part.device.type == device.type)
    coming = 0
    if model is not None:
        known = {id(param) for group in groups for param in group["params"]}
        rest = (local(param) for param in model.parameters() if id(param) not in known)
        coming = sum(part.nbytes for part in rest if part.device.type != device.type)
    return int(free + there - coming)


def _by_bytes(
    groups: list[dict[str, Any]],
    rounding: str,
    allowed: tuple[str | None, ...],
    budget: int,
    processes: int,
    unknown: str,
) -> Choice:
    """The first tier that leaves activations as much as it takes; else the last."""
    for tier in allowed:
        size = tiers.bytes_of(groups, rounding, tier).device // processes
        if 2 * size <= budget:
            break
    return Choice(
        tier,
        f"{size / _GIB:.1f} of {budget / _GIB:.1f} GiB beside activations, which are taken for "
        f"half of it: {unknown}",
    )


def _by_estimate(
    groups: list[dict[str, Any]],
    rounding: str,
    model: Any,
    args: Any,
    batch: Batch | None,
    budget: int,
) -> Choice:
    """What `python -m fastft estimate` takes.

    Raises:
        Unknown: there is nothing to estimate.
    """
    if batch is None or args is None or model is None:
        raise Unknown("the model or the length of its rows is not known")
    if engines.engine_of(args) is not None:
        raise Unknown("the model is sharded")
    with tempfile.TemporaryDirectory() as folder:
        command = _command(groups, rounding, model, args, batch, Path(folder))
        found = _asked([*command, "--memory", f"{budget}"], Path(folder) / "found.json")
    column = next(iter(found["columns"].values()))
    peak = max(column["training"]["bytes"], column["evaluation"]["bytes"])
    return Choice(
        found["offload"],
        f"{peak / _GIB:.1f} of {budget / _GIB:.1f} GiB, as estimated for {batch.rows} x "
        f"{batch.tokens} tokens",
    )


def _command(
    groups: list[dict[str, Any]],
    rounding: str,
    model: Any,
    args: Any,
    batch: Batch,
    folder: Path,
) -> list[str]:
    """The estimate of this very training."""
    config, params = getattr(model, "config", None), [*model.parameters()]
    dtypes = {param.dtype for param in params}
    if (
        config is None
        or not models.is_config(config)
        or not all(param.requires_grad for param in params)
    ):
        raise Unknown("it is no model of transformers, or not all of it is trained")
    if len(dtypes) > 1 or any(group["amsgrad"] for group in groups):
        raise Unknown("it has weights of several dtypes, or amsgrad")
    config.to_json_file(folder / "config.json")
    is_bf16 = dtypes == {torch.bfloat16}
    moments = next((name for g in groups if (name := g["moments"]) != "fp32"), "fp32")
    command = ["estimate", str(folder / "config.json"), "--offload", "auto", "--moments", moments]
    command += ["--rounding", rounding, "--only", ",".join((*batch.pieces, "optimizer"))]
    command += ["--rows", f"{batch.rows}", "--max-tokens", f"{batch.tokens}"]
    command += ["--accumulation", f"{args.gradient_accumulation_steps}"]
    command += ["--label-smoothing", f"{args.label_smoothing_factor}"]
    command += ["--dtype", "bf16" if is_bf16 else "fp32"]
    command += ["--autocast"] if args.bf16 and not is_bf16 else []
    names = ("activation_checkpointing", "gradient_checkpointing")
    checkpoints = any(getattr(args, name, False) for name in names)
    command += ["--checkpointing"] if checkpoints else []
    return [*command, "--json", str(folder / "found.json")]


def _asked(command: list[str], found: Path) -> dict[str, Any]:
    """What fastft's command writes in a process of its own, on a CPU."""
    kept = {name: text for name, text in os.environ.items() if not _OF_THIS_PROCESS.match(name)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fastft", *command],
            env={**kept, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Unknown(f"no estimate was made ({type(error).__name__})") from error
    if done.returncode or not found.exists():
        said = done.stderr.strip().splitlines() or ["nothing said"]
        raise Unknown(said[-1])
    result: dict[str, Any] = json.loads(found.read_text())
    return result


def _least(number: int) -> int:
    """The smallest of all processes' numbers."""
    if sharding.world_size() == 1:
        return number
    numbers: list[Any] = [None] * sharding.world_size()
    torch.distributed.all_gather_object(numbers, number)
    return int(min(numbers))


def _of_first(choice: Choice) -> Choice:
    """The first process's choice."""
    if sharding.world_size() == 1:
        return choice
    chosen = [choice]
    torch.distributed.broadcast_object_list(chosen)
    return chosen[0]
