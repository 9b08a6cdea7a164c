"""States that other optimizers saved, in torch's form.

    torch.optim.AdamW       any dtype, fused, foreach or neither, with amsgrad
    bitsandbytes AdamW*     32-bit and block-wise 8-bit `state1`, `state2`, nested or not:
                            qmap[code] * absmax[block]
    torchao AdamW*          8-bit, 4-bit and fp8 tensors, whose class knows what they stand for
    apex FusedAdam          `step` in the group; masters as a list `master` of the group, or
                            FP16_Optimizer's own dict
    TransformerEngine       `master_param`: the fp32 master, or the int16 remainder, which is ours

DeepSpeed's CPUAdam and FusedAdam are as torch's or as apex's. Files that hold something else, above
all ZeRO's parts of all parameters in a row, are refused by name and with the way to what loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fastft.foreign.tensors import local, sharded_like

OF_APEX = ("step", "master", "bias_correction")  # entries of its groups
_NESTED_BY_BITSANDBYTES = "__bnb_optimizer_quant_state__"
_BLOCK_SIZES = (256, 2048)  # of bitsandbytes since 0.45, and before
# keys that another file has where an optimizer's state dict has its own
_OF_DEEPSPEED = {"ds_version", "zero_stage"}
_OF_CPU_OFFLOAD = "offloaded"
_AT_ONCE = 1 << 22  # elements that are looked at


def state_dict_of(loaded: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict that a file has: itself, or what apex's FP16_Optimizer (with its masters in
    their groups) or torchao's CPUOffloadOptimizer keep in its place.

    Args:
        groups: the optimizer's that it is for.

    Raises:
        TypeError: its states or groups are none.
        ValueError: it has none, or a group names no parameters, or has the betas of another rule.
    """
    if _OF_CPU_OFFLOAD in loaded:
        return _of_cpu_offload(loaded, groups)
    is_apex = "fp32_from_fp16" in loaded
    needed = {"optimizer_state_dict", "fp32_from_fp16"} if is_apex else {"state", "param_groups"}
    if missing := needed - loaded.keys():
        raise ValueError(
            f"this is no optimizer's state dict: {', '.join(sorted(missing))} missing, found "
            f"{_first_of(loaded)}{_what_it_is(loaded)}"
        )
    state_dict = loaded["optimizer_state_dict"] if is_apex else loaded
    for name, kinds in (("state", (dict,)), ("param_groups", (list, tuple))):
        if not isinstance(state_dict[name], kinds):
            raise TypeError(
                f"{name} of the loaded state dict must be a {kinds[0].__name__}, got "
                f"{type(state_dict[name]).__name__}"
            )
    for number, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(
                f"param_groups[{number}] of the loaded state dict must be a dict with a list of "
                f"params, got {group!r:.60}"
            )
        if "t_beta3" in group and len(group.get("betas", ())) == 3:
            raise ValueError(
                "this is bitsandbytes' AdEMAMix, which has two first moments, not AdamW: begin "
                "with new moments"
            )
    if not is_apex:
        return loaded
    pairs = zip(state_dict["param_groups"], loaded["fp32_from_fp16"], strict=True)
    made = [{**group, "master": masters} for group, masters in pairs]
    return {**state_dict, "param_groups": made}


def torch_form(
    saved: dict[str, Any], group: dict[str, Any], position: int, owner: str
) -> tuple[dict[str, Any], Tensor | None]:
    """A parameter's saved state under torch's names, and its fp32 master where there is one.

    Args:
        saved: of any optimizer above; nothing of a parameter that took no step.
        group: the parameter's, as it was saved.
        position: the parameter's, in the group.
        owner: the parameter, for messages.
    """
    if not isinstance(saved, dict):
        raise TypeError(f"the loaded state of {owner} must be a dict, got {type(saved).__name__}")
    if not saved:
        return {}, None
    if not group.get("bias_correction", True):
        raise ValueError(
            "the checkpoint was trained with bias_correction=False, which AdamW does not do"
        )
    of_group = {"step": group["step"]} if "step" in group else {}
    entries = {**of_group, **saved, **saved.get(_NESTED_BY_BITSANDBYTES, {})}
    entries.pop(_NESTED_BY_BITSANDBYTES, None)
    if "state1" in entries:
        entries = _of_bitsandbytes(entries, owner)
    entries = {name: _numbers(value) for name, value in entries.items()}
    masters = group.get("master")
    if masters is not None and len(masters) != len(group["params"]):
        raise ValueError(
            f"the checkpoint has {len(masters)} masters for a group of {len(group['params'])} "
            f"parameters"
        )
    master = entries.pop("master_param", None if masters is None else masters[position])
    if isinstance(master, Tensor) and master.dtype == torch.int16:
        entries["remainder"], master = master, None
    if missing := {"step", "exp_avg", "exp_avg_sq"} - entries.keys():
        raise ValueError(
            f"{owner} has no AdamW state: {', '.join(sorted(missing))} missing, found "
            f"{_first_of(entries)}"
        )
    return entries, master


def check_number(value: Any, name: str, owner: str, *others: torch.dtype) -> None:
    """Raises unless `value` is a dense tensor of floating-point numbers, or of one of `others`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"the loaded {name} of {owner} must be a tensor, got {value!r}")
    if value.layout != torch.strided:
        raise TypeError(
            f"the loaded {name} of {owner} must be a dense tensor, has the layout {value.layout}"
        )
    if not value.is_floating_point() and value.dtype not in others:
        raise TypeError(
            f"the loaded {name} of {owner} must be floating-point numbers, is {value.dtype}"
        )
    if value.is_meta:
        raise ValueError(f"the loaded {name} of {owner} is on the meta device: it has no numbers")


def check_values(
    value: Tensor, name: str, owner: str, is_wrong: Callable[[Tensor], Tensor], what: str
) -> None:
    """Raises where some values of a tensor are such as no step writes.

    Args:
        is_wrong: which of them are, of a part of them.
        what: what they are then, for the message.
    """
    wrong = sum(
        int(is_wrong(part).sum()) for part in local(value).detach().flatten().split(_AT_ONCE)
    )
    if wrong:
        raise ValueError(
            f"the loaded {name} of {owner} has {wrong} values of {value.numel()} that are {what}, "
            "which no step writes and every later one would spread: the checkpoint is damaged or "
            "of another optimizer. Take an earlier one, or begin with new moments"
        )


def in_dtype(value: Tensor, dtype: torch.dtype, name: str, owner: str) -> Tensor:
    """`value` in the dtype in which it is kept; raises where a finite number would become Inf."""
    floats = value.is_floating_point() and dtype.is_floating_point
    if floats and torch.finfo(value.dtype).max > torch.finfo(dtype).max:
        check_values(
            value,
            name,
            owner,
            lambda part: part.isfinite() & part.to(dtype).isinf(),
            f"too large for {dtype}",
        )
    return value.to(dtype)


def _of_cpu_offload(loaded: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict that torchao's CPUOffloadOptimizer keeps in pieces: of one optimizer for each
    parameter of some size or more, in their order, and of one for all others that are trained."""
    large = [(saved["state"].get(0, {}), saved["param_groups"][0]) for saved in loaded["offloaded"]]
    rest = loaded.get("on-device", {"state": {}, "param_groups": []})
    small = [
        (rest["state"].get(key, {}), group)
        for group in rest["param_groups"]
        for key in group["params"]
    ]
    trained = [p for group in groups for p in group["params"] if p.requires_grad]
    sizes = sorted((param.numel() for param in trained), reverse=True)
    least = sizes[len(large) - 1] if 0 < len(large) <= len(sizes) else float("inf")
    many = sum(size >= least for size in sizes)
    if (len(large), len(small)) != (many, len(sizes) - many):
        raise ValueError(
            f"the state dict of torchao's CPUOffloadOptimizer is of {len(large)} large and "
            f"{len(small)} small parameters, this optimizer trains {len(sizes)}: they must be the "
            "same"
        )
    state: dict[int, Any] = {}
    made, pieces, keys = [], {True: iter(large), False: iter(small)}, count()
    for group in groups:
        options: dict[str, Any] = {}
        params = list(zip(group["params"], keys, strict=False))
        for param, key in params:
            if param.requires_grad:
                state[key], options = next(pieces[param.numel() >= least])
        made.append({**options, "params": [key for _, key in params]})
    return {"state": state, "param_groups": made}


def _of_bitsandbytes(entries: dict[str, Any], owner: str) -> dict[str, Any]:
    if "state2" not in entries:
        raise ValueError(
            "this is a bitsandbytes optimizer with one moment, not AdamW: it has state1 and no "
            "state2"
        )
    return {name: value for name, value in entries.items() if name == "step"} | {
        "exp_avg": _dequantised(entries, "1", owner),
        "exp_avg_sq": _dequantised(entries, "2", owner),
    }


def _dequantised(entries: dict[str, Any], number: str, owner: str) -> Tensor:
    codes: Tensor = entries["state" + number]
    check_number(codes, "state" + number, owner, torch.uint8)
    if codes.dtype != torch.uint8:
        return codes
    if missing := {"qmap" + number, "absmax" + number} - entries.keys():
        raise ValueError(
            f"the 8-bit bitsandbytes state lacks {', '.join(sorted(missing))}: it is not block-wise"
        )
    for name in ("qmap" + number, "absmax" + number):
        check_number(entries[name], name, owner)
    scale: Tensor = entries["absmax" + number].float()
    check_values(scale, "absmax" + number, owner, lambda part: part < 0, "below zero")
    block = next(
        (size for size in _BLOCK_SIZES if -(-codes.numel() // size) == scale.numel()), None
    )
    if block is None:
        raise ValueError(f"absmax{number} has {scale.numel()} blocks for {codes.numel()} elements")
    values = entries["qmap" + number].float()[codes.flatten().int()]
    return (values * scale.repeat_interleave(block)[: values.numel()]).view(codes.shape)


def _numbers(value: Any) -> Any:
    """A tensor whose class keeps codes and knows what they stand for, as numbers; anything else."""
    part = local(value)
    kind = type(part)
    if not isinstance(part, Tensor) or kind.dequantize is Tensor.dequantize:
        return value
    return sharded_like(part.dequantize(), value)


def _what_it_is(loaded: dict[str, Any]) -> str:
    """The end of a sentence: what else a dict is, as far as its keys tell, and what can be done."""
    inside = loaded.get("optimizer_state_dict")
    if _OF_DEEPSPEED & (loaded.keys() | (inside.keys() if isinstance(inside, dict) else set())):
        return (
            ". It is of a DeepSpeed checkpoint, where each process's file has parts of all "
            "parameters in a row: resume under DeepSpeed, or let its ds_to_universal.py write the "
            "whole states (docs/adamw.md, Checkpoints, shows how they load)"
        )
    if any(str(key).startswith("param_groups.") for key in loaded):
        return (
            ". It is flattened: load it, with torch.distributed.checkpoint.state_dict."
            "set_optimizer_state_dict, into an optimizer of the class that saved it, whose "
            "state_dict() loads here"
        )
    places = list(_state_dicts_in(loaded))
    return f". Its {', '.join(places)} is one: load that" if places else ""


def _state_dicts_in(loaded: dict[str, Any]) -> Iterator[str]:
    """Where in a dict there are optimizers' state dicts, as Python writes it."""
    for key, value in loaded.items():
        several = isinstance(value, (list, tuple))
        for number, each in enumerate(value if several else [value]):
            if isinstance(each, dict) and {"state", "param_groups"} <= each.keys():
                yield f"[{key!r}]" + f"[{number}]" * several


def _first_of(entries: dict[Any, Any]) -> str:
    names = [str(name) for name in entries]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more or "nothing"
