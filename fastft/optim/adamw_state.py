"""A parameter's state between two steps of AdamW: its entries, made, completed and checked.

Which entries there are, and in which dtypes: adamw.py. Plans work with the very tensors that they
found here, so that a state tells them when one is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.foreign.tensors import local
from fastft.optim import moment_codes
from fastft.optim.adamw_update import RESIDUES, Rounding
from fastft.optim.moment_blocks import SCALES, has_codes
from fastft.optim.moment_codes import CODES, Forms, code_of
from fastft.optim.offload import device
from fastft.optim.offload.host_memory import house
from fastft.optim.weight_bits import Mark


class Claim:
    """A plan's claim on the entries of its states: broken when one of them has other entries."""

    broken = False


class State(dict[str, Any]):
    """A parameter's state. Replacing an entry breaks the claim of the plan that works with them.

    `mark` says which bits of the parameter its low bits belong to. Copies and pickles have neither;
    a copied optimizer makes marks of its own.
    """

    mark: Mark | None = None
    _claim: Claim | None = None

    def __reduce__(self) -> Any:
        return State, (dict(self),)

    def claim(self, claim: Claim | None) -> None:
        """Breaks the claim that is there, and lets another take its place."""
        if self._claim is not None:
            self._claim.broken = True
        self._claim = claim

    def _changing(method: Any) -> Any:
        def changed(self: State, *args: Any, **kwargs: Any) -> Any:
            self.claim(None)
            return method(self, *args, **kwargs)

        return changed

    __setitem__, __delitem__ = _changing(dict.__setitem__), _changing(dict.__delitem__)
    __ior__, update, setdefault = map(_changing, (dict.__ior__, dict.update, dict.setdefault))
    pop, popitem, clear = map(_changing, (dict.pop, dict.popitem, dict.clear))


def rounding_of(param: Tensor, rounding: str) -> Rounding:
    """The way in which `param` is kept where the optimizer was given `rounding`."""
    return Rounding.FP32 if param.dtype == torch.float32 else Rounding[rounding.upper()]


def new_state(
    param: Tensor, group: dict[str, Any], rounding: str, where: str | None = None
) -> State:
    """The state before the first step, in the parameter's layout.

    With moments that are codes, which short vectors do not have, rows lie one after the other.

    Args:
        where: "cpu", or "meta" for the form alone; on the parameter's device by default.
    """
    state = State(step=torch.zeros((), dtype=torch.float32, device="cpu"))
    coded = _is_coded(param, group)
    if coded:
        state |= moment_codes.new_entries(param, group["moments"], where)
    layout = torch.contiguous_format if coded else torch.preserve_format
    for name, (dtype, _) in _forms(param, group, rounding).items():
        if name not in state:
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=layout, device=where)
    return state


def state_bytes(param: Tensor, group: dict[str, Any], rounding: str) -> int:
    """Bytes of this process's part of a parameter's state, without its count."""
    entries = new_state(param, group, rounding, "meta")
    return sum(local(entry).nbytes for name, entry in entries.items() if name != "step")


def ready_state(
    states: dict[Tensor, Any], param: Tensor, group: dict[str, Any], rounding: str, offloaded: bool
) -> State:
    """The parameter's state out of the optimizer's, with the entries that are missing.

    Where it is `offloaded`, entries that lie elsewhere than in the host's memory are moved there.

    Raises:
        TypeError: the parameter is neither float32 nor bfloat16 any more.
        RuntimeError: its gradient or an entry does not fit it, which `p.data = ...` or a new entry
            can make so.
    """
    entries, forms = states[param], _forms(param, group, rounding)
    missing = {"step", *forms} - entries.keys()
    if missing or not isinstance(entries, State):
        fresh = new_state(param, group, rounding, "meta" if offloaded else None) if missing else {}
        entries = State({**fresh, **entries})
    if offloaded:
        house(entries, forms, device.of(local(param).device))
    states[param] = entries
    _check_fit(param, entries, forms)
    return entries


def residue_names(state: State, rounding: Rounding) -> list[str]:
    """The entries of a state that go into the operator's `residues`, in its order."""
    residue = RESIDUES.get(rounding)
    coded = code_of(state["exp_avg"]) is not None
    return ([residue[0]] if residue else []) + (list(SCALES) if coded else [])


def _is_coded(param: Tensor, group: dict[str, Any]) -> bool:
    return group["moments"] in CODES and has_codes(param)


def _forms(param: Tensor, group: dict[str, Any], rounding: str) -> Forms:
    """The entries of a state but its count, with their dtypes and shapes."""
    residue = RESIDUES.get(rounding_of(param, rounding))
    kept = {residue[0]: (residue[1], param.shape)} if residue else {}
    if _is_coded(param, group):
        return CODES[group["moments"]].forms(param.shape) | kept
    names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())
    dtype = torch.bfloat16 if group["moments"] == "bf16" else torch.float32
    return dict.fromkeys(names, (dtype, param.shape)) | kept


def check_gradient(param: Tensor, grad: Tensor) -> None:
    """Raises where a gradient does not fit its parameter, which `.data = ...` can make so."""
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"a gradient has shape {tuple(grad.shape)} on {grad.device}, its parameter "
            f"{tuple(param.shape)} on {param.device}"
        )


def _check_fit(param: Tensor, entries: State, forms: Forms) -> None:
    if param.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(
            f"AdamW trains float32 and bfloat16 parameters, one has become {param.dtype}"
        )
    if param.grad is not None:
        check_gradient(param, param.grad)
    for name, (dtype, shape) in forms.items():
        entry = entries[name]
        if entry.shape != shape or entry.dtype != dtype:
            raise RuntimeError(
                f"{name} of a parameter must be {dtype} of shape {tuple(shape)}, is {entry.dtype} "
                f"of {tuple(entry.shape)}"
            )
