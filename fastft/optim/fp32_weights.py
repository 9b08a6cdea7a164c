"""The exact fp32 weights of a model trained in bf16, as safetensors files.

A bf16 parameter is written together with the 16 bits of its remainder. Files are those of
`save_pretrained` (`model.safetensors`, or shards with an index), keys those of
`model.state_dict()`, so that a program which knows nothing of fastft reads the masters. At most one
shard is in memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastft import checks
from fastft.foreign.engines import inner_optimizer
from fastft.foreign.models import unwrapped
from fastft.foreign.sharding import world_size
from fastft.foreign.tensors import local, placed_like, sharded_like
from fastft.optim import weight_files
from fastft.optim.adamw import AdamW
from fastft.optim.adamw_state import new_state
from fastft.optim.adamw_update import load_value
from fastft.optim.checkpoint import write_master
from fastft.optim.weight_bits import residue_of
from fastft.optim.weight_files import Header

_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d*)?)\s*([KMGT])B\s*")
# what goes through fp32
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save_fp32(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes every weight as the optimizer knows it, in fp32, under the model's own keys.

    Of 16-bit parameters without a remainder (frozen, or of another `rounding`) the values are
    written as fp32; tensors of other dtypes are written as they are, tied weights once. Under FSDP2
    every rank must call this; rank 0 writes. New files are written aside, which takes room for
    both: whatever ends the process, earlier weights in the folder or the new ones can be loaded.

    Args:
        model: the model that is trained; DistributedDataParallel and torch.compile are looked
            through.
        optimizer: the AdamW that trains it, or accelerate's wrapper around it.
        path: a folder, made if need be; weights that are there under the same file names are
            replaced. It holds weights only: `from_pretrained` also wants
            `model.config.save_pretrained(path)`.
        max_shard_size: bytes of a file, or a string such as "5GB".

    Raises:
        TypeError: `model` is no module, or `optimizer` is not fastft's AdamW.
        ValueError: `optimizer` trains no parameter of `model`; `path` is a file; `max_shard_size`
            is no number of bytes.
        OSError: the files cannot be written there (no space left, read-only). Earlier weights are
            whole, and nothing of the new ones remains.
        ImportError: huggingface_hub or safetensors is missing.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder, most = Path(path), _bytes_of(max_shard_size)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder, and {folder} is a file")
    adamw, tensors, untied = _trained(model, optimizer)
    sizes = {
        names[0]: _as_saved(torch.empty_like(tensor, device="meta")) for names, tensor in untied
    }
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=most)
    writes = world_size() == 1 or torch.distributed.get_rank() == 0
    stale = adamw.stale_weights()
    with weight_files.saving(folder) if writes else contextlib.nullcontext():
        for file, names in plan.filename_to_tensors.items():
            # by every rank, also where it writes nothing: a collective where tensors are sharded
            shard = {name: _master(tensors[name], adamw, stale) for name in names}
            if writes:
                weight_files.write_aside(folder, file, shard, _step_of(adamw))
        if writes:
            weight_files.publish(folder, plan.tensor_to_filename, plan.metadata)


@torch.no_grad()
def load_fp32(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: str | os.PathLike[str]
) -> None:
    """Restores what `save_fp32` wrote: each weight and, with `rounding="exact"`, its remainder.

    The moments come from `optimizer.load_state_dict`, before or after; without it they start from
    zero. A warning says so where they are there already, and of another step than the weights.

    Args:
        model: of the same keys and shapes, in bf16 or fp32. An fp32 model takes the masters as they
            are.
        optimizer: the AdamW that will train it, or accelerate's wrapper around it.
        path: the folder.

    Raises:
        FileNotFoundError: there are no weights in the folder.
        TypeError: `model` is no module, or `optimizer` is not fastft's AdamW.
        ValueError: `optimizer` trains no parameter of `model`; keys, shapes or dtypes differ (fp32,
            bf16 and fp16 become each other, any other dtype must be the model's); files are of
            several saves; the index or a file is damaged, or the index names a file outside the
            folder. Nothing has changed then.
    """
    adamw, tensors, untied = _trained(model, optimizer)
    headers = weight_files.read_headers(Path(path))
    chosen = [
        (next((name for name in names if name in headers), names[0]), tensor)
        for names, tensor in untied
    ]
    _check_fit(chosen, headers, tensors, path)
    steps = {headers[name].step for name, _ in chosen}
    _check_steps(adamw, {step for step in steps if step is not None}, path)
    group_of = {param: group for group in adamw.param_groups for param in group["params"]}
    for file in sorted({headers[name].file for name, _ in chosen}):
        with weight_files.opened(file) as weights:
            for name, tensor in chosen:
                if headers[name].file != file:
                    continue
                value = weights.get_tensor(name).to(tensor.device)
                if headers[name].dtype in _FLOATS:
                    if tensor in group_of and tensor not in adamw.state:
                        # there was no step yet, and a residue needs a place
                        adamw.state[tensor] = new_state(
                            tensor,
                            group_of[tensor],
                            adamw.rounding,
                            "cpu" if adamw.offload else None,
                        )
                    write_master(tensor, value, adamw.state.get(tensor, {}))
                else:
                    local(tensor).copy_(local(placed_like(value, tensor)))


def _check_fit(
    chosen: list[tuple[str, Tensor]],
    headers: dict[str, Header],
    tensors: dict[str, Tensor],
    path: Any,
) -> None:
    """Raises where keys, shapes or dtypes of the files are not the model's."""
    missing = [name for name, _ in chosen if name not in headers]
    unknown = sorted(headers.keys() - tensors.keys())
    if missing or unknown:
        raise ValueError(
            f"the weights in {path} do not fit the model: missing {missing}, unknown {unknown}"
        )
    for name, tensor in chosen:
        file, shape, dtype, _ = headers[name]
        if shape != tuple(tensor.shape):
            raise ValueError(
                f"{name} has shape {shape} in {path} and {tuple(tensor.shape)} in the model"
            )
        if dtype in _FLOATS:
            fits, found = tensor.dtype in _FLOATS.values(), _FLOATS[dtype]
        else:
            with weight_files.opened(file) as weights:
                found = weights.get_tensor(name).dtype
            fits = found == tensor.dtype
        if not fits:
            raise ValueError(
                f"{name} is {found} in {path} and {tensor.dtype} in the model, which it does not "
                "convert to"
            )


def _check_steps(optimizer: AdamW, saved: set[int], path: Any) -> None:
    """Raises for files of several saves; warns where the optimizer is not where they were saved."""
    if len(saved) > 1:
        raise ValueError(f"the files in {path} are of several saves, at the steps {sorted(saved)}")
    held = _step_of(optimizer)
    if held and saved - {held}:
        warnings.warn(
            f"the weights in {path} were saved at the optimizer's step {saved.pop()}, and its "
            f"moments here are of step {held}: load the state dict of the same save, or weights "
            "saved with it, unless you mean to go on with both",
            stacklevel=3,
        )


def _step_of(optimizer: AdamW) -> int:
    """The steps that it has taken, or another of which it has loaded the states; 0 without."""
    return max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)


def _trained(
    model: Any, optimizer: Any
) -> tuple[AdamW, dict[str, Tensor], list[tuple[list[str], Tensor]]]:
    """The AdamW inside `optimizer`, and the tensors that it trains among others.

    They are those of the model's state dict: tied ones under each of their names; and each distinct
    one with its names, first that which `save_pretrained` keeps.
    """
    inner, model = inner_optimizer(optimizer), unwrapped(model)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(inner, AdamW):
        raise TypeError(
            f"optimizer must be fastft's AdamW or a wrapper around it, got {type(inner).__name__}"
        )
    tensors = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }
    names_of: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    if not any(id(param) in names_of for group in inner.param_groups for param in group["params"]):
        raise ValueError("optimizer trains no parameter of model: is it another model's optimizer?")
    tied = getattr(model, "all_tied_weights_keys", {})
    every = (sorted(names, key=tied.__contains__) for names in names_of.values())
    return inner, tensors, [(names, tensors[names[0]]) for names in every]


def _bytes_of(max_shard_size: Any) -> int:
    """The bytes of a string as huggingface_hub reads it, or of a number."""
    size = isinstance(max_shard_size, str) and _SIZE.fullmatch(max_shard_size.upper())
    return checks.integer(
        "max_shard_size",
        int(float(size[1]) * 1000 ** (" KMGT".index(size[2]))) if size else max_shard_size,
        otherwise=' bytes, or a string such as "5GB"',
    )


def _as_saved(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@torch.no_grad()
def _master(tensor: Any, optimizer: AdamW, stale: set[Tensor]) -> Tensor:
    """Copies a whole tensor to the CPU, with the bits of its remainder unless that is stale."""
    residue = residue_of(optimizer.state[tensor]) if tensor in optimizer.state else None
    if residue is not None and tensor in stale:
        # and not None: under FSDP2 it may be another rank's part alone
        residue = torch.zeros_like(residue)
    if residue is None:
        master = _as_saved(tensor.detach())
    else:
        part = local(tensor.detach())
        value = load_value(part, local(residue).to(part.device))
        # a write to one weight may be unnoticed: its old low bits would make NaN of Inf
        value = torch.where(part.isfinite(), value, part.float())
        master = sharded_like(value, tensor)
    whole: Tensor = master.full_tensor() if hasattr(master, "full_tensor") else master
    return whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
