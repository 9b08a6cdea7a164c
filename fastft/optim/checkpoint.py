"""Loading optimizer states: without a lost bit, and also those that other optimizers saved.

`torch.optim.Optimizer.load_state_dict` casts every state to its parameter's dtype; here each state
keeps the dtype that it has in training. foreign_states.py has the forms of other optimizers. Where
a checkpoint has masters, they overwrite the parameters (of which the model's file has the
roundings).

Values that no step writes are refused: a second moment below zero, which makes its weight NaN, a
scale of codes which is not finite or below zero, which makes its block so, and a number that would
be Inf in the dtype in which it is kept. NaN and Inf in moments are what a training with such
gradients has: they come back as they were.

What is missing starts from zero where the other optimizer may have had none. Where the state dict
says otherwise a maximum, by amsgrad in its group, is refused; of low bits, by their checksums, a
warning speaks, for `load_fp32` may still bring them.

A state dict holds the 16 bits of a `remainder` under the dtype bfloat16: neither gloo nor NCCL
sends int16, so that FSDP could not gather it, and torch's own optimizers would cast it. Loading
takes either dtype.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.foreign.tensors import in_flat_parameter, local, placed_like, sharded_like
from fastft.optim import weight_bits
from fastft.optim.adamw_state import State, new_state
from fastft.optim.adamw_update import RESIDUES, store_value
from fastft.optim.foreign_states import (
    OF_APEX,
    check_number,
    check_values,
    in_dtype,
    state_dict_of,
    torch_form,
)
from fastft.optim.groups import check_group
from fastft.optim.moment_blocks import BLOCK, ENTRIES, SCALES
from fastft.optim.moment_codes import CODES, code_of, dequantise, entries_of, restore
from fastft.optim.weight_bits import residue_of

if TYPE_CHECKING:
    from fastft.optim.adamw import AdamW

# what an optimizer of another `rounding` has no use for
_RESIDUES = {name for name, _ in RESIDUES.values()}
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_OF_REMAINDERS = (torch.int16, torch.bfloat16)
_OWN_OPTIONS = ("seed", "moments")
# beside torch's `state` and `param_groups`, where nobody who cuts states sees it
CHECKSUMS = "weight_checksums"


class _Verbatim:
    """A restored state, hidden from torch's `load_state_dict`, which would cast its entries."""

    def __init__(self, entries: State) -> None:
        self.entries = entries


def packed(
    state_dict: dict[str, Any], optimizer: torch.optim.Optimizer, stale: set[Tensor]
) -> dict[str, Any]:
    """Returns torch's state dict with the remainders as bfloat16; its tensors are the optimizer's.

    Codes of FSDP1's vectors become fp32 moments: it gathers, and cuts into parameters, what has the
    vector's shape only. Loading makes codes of them which mean the same. Beside `stale` weights the
    low bits are zero; so is the maximum of a group which has got amsgrad since its last step.
    """
    keys = (key for group in state_dict["param_groups"] for key in group["params"])
    params = (param for group in optimizer.param_groups for param in group["params"])
    param_of, checksums = dict(zip(keys, params, strict=False)), {}
    with_maximum = {
        key for group in state_dict["param_groups"] if group["amsgrad"] for key in group["params"]
    }

    def entries_of(key: Any, state: Any) -> Any:
        param = param_of.get(key)
        if not isinstance(state, dict) or param is None:
            return state
        state = dict(_decoded(state) if in_flat_parameter(param) else state)
        if param in stale:
            state |= {name: torch.zeros_like(state[name]) for name in _RESIDUES & state.keys()}
        if residue_of(state) is not None and weight_bits.claim_applies(param):
            checksums[key] = weight_bits.claim(param, optimizer.state.get(param))
        if "remainder" in state:
            state["remainder"] = _reinterpreted(state["remainder"], torch.bfloat16)
        if key in with_maximum and state.keys() & {"exp_avg_sq", "max_exp_avg_sq"} == {
            "exp_avg_sq"
        }:
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        return state

    state = {key: entries_of(key, entries) for key, entries in state_dict["state"].items()}
    return {**state_dict, "state": state} | ({CHECKSUMS: checksums} if checksums else {})


def for_torch(state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` with fp32 moments and torch's own entries only."""
    state = {
        key: {
            name: value.float()
            for name, value in _decoded(entries).items()
            if name in ("step", *_MOMENTS)
        }
        for key, entries in state_dict["state"].items()
    }
    groups = [
        {k: v for k, v in group.items() if k not in _OWN_OPTIONS}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": state, "param_groups": groups}


def load(optimizer: AdamW, state_dict: dict[str, Any]) -> None:
    """Does what `optimizer.load_state_dict` promises; nothing changes where it raises."""
    if not isinstance(state_dict, dict):
        raise TypeError(
            f"state_dict must be an optimizer's state_dict(), got {type(state_dict).__name__}"
        )
    masters: list[tuple[Tensor, Tensor, State]] = []

    def restore(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        loaded = state_dict_of(loaded, optimizer.param_groups)
        _check_groups(loaded["param_groups"], optimizer.param_groups)
        state, checksums = dict(loaded["state"]), _checksums_of(loaded)
        groups = [
            {name: value for name, value in saved.items() if name not in OF_APEX}
            for saved in loaded["param_groups"]
        ]
        for saved, restored, group in zip(
            loaded["param_groups"], groups, optimizer.param_groups, strict=True
        ):
            masters.extend(_restore_group(optimizer, group, saved, state, checksums))
            restored["moments"] = group["moments"]
        _warn_of_lost(loaded["state"], state, checksums)
        return {**loaded, "state": state, "param_groups": groups}

    # the last one: the user's hooks see the file's form
    handle = optimizer.register_load_state_dict_pre_hook(restore)
    try:
        torch.optim.Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        handle.remove()
    for param, master, entries in masters:
        write_master(param, master, entries)


def _restore_group(
    optimizer: AdamW,
    group: dict[str, Any],
    saved: dict[str, Any],
    state: dict[Any, Any],
    checksums: dict[Any, int],
) -> list[tuple[Tensor, Tensor, State]]:
    """Puts the states of a group's parameters, in their form here, into the loaded `state`.

    Returns:
        Parameter, fp32 master and state, where the checkpoint has a master.
    """
    whole_group = {**optimizer.defaults, **saved, "moments": group["moments"]}
    check_group(whole_group)
    masters = []
    for position, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
        owner = f"parameter {key}"
        entries, master = torch_form(state.get(key, {}), saved, position, owner)
        if not entries:
            continue
        _check_entries(entries, owner)
        fresh = new_state(
            param, whole_group, optimizer.rounding, "cpu" if optimizer.offload else None
        )
        if saved.get("amsgrad"):
            _check_maximum(entries, owner)
        restored = _restored(entries, fresh, owner)
        state[key] = _Verbatim(restored)
        if key in checksums and weight_bits.claim_applies(param):
            restored.mark = weight_bits.Mark(checksum=checksums[key])
        if master is not None:
            check_number(master, "master", owner)
            _same_shape(master, param, "master", owner)
            masters.append((param, in_dtype(master, torch.float32, "master", owner), restored))
    return masters


def _warn_of_lost(saved: dict[Any, Any], restored: dict[Any, Any], checksums: Any) -> None:
    """Warns of low bits that are needed here, and that the saved states had and have no more."""
    needed = [
        key
        for key in checksums
        if isinstance(restored.get(key), _Verbatim)
        and residue_of(restored[key].entries) is not None
    ]
    lost = [
        key for key in needed if residue_of(saved[key]) is None and "master_param" not in saved[key]
    ]
    if lost:
        warnings.warn(
            f"the loaded states of {len(lost)} bf16 parameters ({lost!r:.60}) "
            f"have neither remainder nor kahan, and {CHECKSUMS} of the state dict says that they "
            "had: the weights count as their bf16 values, unless load_fp32 brings these bits. If "
            "nobody has taken them out, the checkpoint is damaged: take another",
            stacklevel=2,
        )


def reveal(optimizer: torch.optim.Optimizer) -> None:
    """Puts the states that `load` has hidden into place, before the user's hooks run."""
    for param, entries in optimizer.state.items():
        if isinstance(entries, _Verbatim):
            optimizer.state[param] = entries.entries


@torch.no_grad()
def write_master(param: Tensor, master: Tensor, state: dict[str, Any]) -> None:
    """Sets a parameter, and what `state` keeps with it, to an fp32 master. All may be DTensors."""
    residue = residue_of(state)
    value, part, kept = map(local, (placed_like(master.float(), param), param, residue))
    there = None if kept is None else kept.to(part.device)  # it may be on the host
    store_value(value, part, there)
    if there is not kept:
        kept.copy_(there)
    if part.dtype == torch.bfloat16 and value.isnan().any():
        # rounding has one NaN; sign and payload are in the 16 bits that a weight has
        bits, high = part.view(torch.int16), (value.view(torch.int32) >> 16).short()
        bits.copy_(torch.where(high.view(torch.bfloat16).isnan(), high, bits))
    weight_bits.mark_written(param, state)


def _check_groups(saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    there, here = ([len(group["params"]) for group in of] for of in (saved, groups))
    if there != here:
        raise ValueError(
            f"the loaded state dict has groups of {there} parameters, this optimizer of {here}: "
            'they must be the same. With moments="8bit" or "4bit" fastft.adamw and plug make '
            "groups of their own for embeddings and head; adamw_spec, whose groups are always "
            "Trainer's, can go on with other moments"
        )
    keys = [key for group in saved for key in group["params"]]
    try:
        distinct = len(set(keys)) == len(keys)
    except TypeError:  # lists, say
        distinct = False
    if not distinct:
        raise ValueError(
            "params of the loaded state dict's groups must name each parameter once, by an integer "
            f"or a string, got {keys!r:.60}"
        )


def _checksums_of(loaded: dict[str, Any]) -> dict[Any, int]:
    """The checksums of the weights with remainders, by key; none in other optimizers' states."""
    checksums = loaded.get(CHECKSUMS, {})
    if not isinstance(checksums, dict) or not all(
        type(value) is int for value in checksums.values()
    ):
        raise TypeError(
            f"{CHECKSUMS} of a state dict must be integers by parameter, got {checksums!r:.60}"
        )
    return checksums


def _check_entries(entries: dict[str, Any], owner: str) -> None:
    """Raises where an entry under one of our names is not what that says, or is missing."""
    _check_step(entries["step"], owner)
    _check_codes(entries, owner)
    coded = SCALES[0] in entries
    for name in (*_MOMENTS, *_RESIDUES):
        if name in entries and not (coded and name in ENTRIES):
            check_number(
                entries[name], name, owner, *((torch.int16,) if name == "remainder" else ())
            )
    if "remainder" in entries and entries["remainder"].dtype not in _OF_REMAINDERS:
        raise ValueError(
            f"the loaded remainder of {owner} must be 16 bits as int16 or bfloat16, is "
            f"{entries['remainder'].dtype}"
        )
    _check_no_codes_as_numbers(entries, owner)
    _check_values(entries, owner)


def _check_step(step: Any, owner: str) -> None:
    try:
        count = float(step)
    except OverflowError:
        count = float("inf")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"the loaded step of {owner} must be a number, got {step!r}") from None
    if not 0 <= count <= torch.finfo(torch.float32).max or count % 1:
        raise ValueError(
            f"the loaded step of {owner} must be a whole number, finite in float32 and not "
            f"negative, got {count}"
        )


def _check_maximum(entries: dict[str, Any], owner: str) -> None:
    if "max_exp_avg_sq" not in entries:
        raise ValueError(
            f"{owner} has no max_exp_avg_sq, and its group has amsgrad: its largest second moments "
            "so far are lost. Take another checkpoint, or set amsgrad to False in its group"
        )


def _check_codes(entries: dict[str, Any], owner: str) -> None:
    """Raises where codes or scales of moments are missing or do not fit each other."""
    code = code_of(entries["exp_avg"])
    coded_v = getattr(entries["exp_avg_sq"], "dtype", None) == torch.uint8
    if code is None and not coded_v and not any(name in entries for name in SCALES):
        return
    if missing := set(ENTRIES) - entries.keys():
        raise ValueError(
            f"the moments of {owner} are codes and lack {', '.join(sorted(missing))}: without it "
            "they mean nothing"
        )
    kinds = dict.fromkeys(SCALES, (torch.float32,)) | {
        "exp_avg": tuple(kind.dtype for kind in CODES.values()),
        "exp_avg_sq": (torch.uint8,),
    }
    for name, dtypes in kinds.items():
        found = getattr(entries[name], "dtype", type(entries[name]).__name__)
        if found not in dtypes:
            raise ValueError(
                f"the loaded {name} of {owner}, of moments that are codes, must be "
                f"{' or '.join(map(str, dtypes))}, is {found}"
            )
        check_number(entries[name], name, owner, *dtypes)
    assert code is not None
    shape = entries["exp_avg_sq"].shape
    for name, (_, needed) in code.forms(shape).items():
        if entries[name].shape != needed:
            raise ValueError(
                f"the loaded {name} of {owner} has shape {tuple(entries[name].shape)}; "
                f"{tuple(shape)} codes need {tuple(needed)}"
            )


def _check_values(entries: dict[str, Any], owner: str) -> None:
    """Raises where numbers are such as no step writes. NaN is not: of a moment, a step does."""
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        if name in entries and entries[name].is_floating_point():
            check_values(entries[name], name, owner, lambda part: part < 0, "below zero")

    def no_scale(part: Tensor) -> Tensor:
        return ~((part >= 0) & part.isfinite())

    for name in SCALES:
        if name in entries:
            check_values(entries[name], name, owner, no_scale, "NaN, infinite or below zero")


def _check_no_codes_as_numbers(entries: dict[str, Any], owner: str) -> None:
    """Raises where codes were read as numbers, to which torch.distributed.checkpoint casts.

    The largest second moment of a block has the code 255, beside which no moment is an integer by
    chance. (Codes of 4 bits have the parameter's shape, without which nothing is cast, in rows of
    one element.)
    """
    for name in ("exp_avg", "exp_avg_sq"):
        value = local(entries[name])
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
            return
        first = value.detach().reshape(-1)[:BLOCK].float()
        if not torch.equal(first, first.trunc()):
            return
    if first.max() != 255:
        return
    raise ValueError(
        f"the loaded moments of {owner} are codes that were read as numbers: the checkpoint has "
        "moments of 8 or 4 bits where this optimizer has none. Give both the same `moments`; long "
        'vectors, which have none under FSDP2, need "fp32"'
    )


def _restored(saved: dict[str, Any], fresh: State, owner: str) -> State:
    """`fresh` with the saved values, in its own forms; unknown entries come as they are."""
    saved = _in_form_of(fresh, saved, owner)
    for name, value in saved.items():
        if name == "step":
            # of its own: plans replace it by a view
            fresh["step"] = torch.tensor(float(value), dtype=torch.float32, device="cpu")
        elif name not in fresh:
            if name not in _RESIDUES:
                fresh[name] = value
        else:
            template = fresh[name]
            if name == "remainder" and value.dtype == torch.bfloat16:
                value = _reinterpreted(value, torch.int16)
            _same_shape(value, template, name, owner)
            # cutting a whole tensor leaves its part on the mesh's device
            value = in_dtype(value, template.dtype, name, owner)
            value = placed_like(value, template).to(template.device)
            fresh[name] = value if value.stride() == template.stride() else template.copy_(value)
    return fresh


def _in_form_of(fresh: dict[str, Any], saved: dict[str, Any], owner: str) -> dict[str, Any]:
    """`saved` with its moments as the codes of `fresh` where that has some, else in numbers."""
    wanted, there = (code_of(entries["exp_avg"]) for entries in (fresh, saved))
    if wanted is there:
        return saved
    saved = _decoded(saved)
    if wanted is None:
        return saved
    values, template = [], fresh["exp_avg_sq"]  # of the parameter's shape
    for name in ("exp_avg", "exp_avg_sq"):
        _same_shape(saved[name], template, name, owner)
        placed = placed_like(in_dtype(saved[name], torch.float32, name, owner), template)
        values.append(local(placed.to(template.device)).contiguous())
    restore(values[0], values[1], entries_of(fresh))
    return saved | {name: fresh[name] for name in ENTRIES}


def _decoded(saved: dict[str, Any]) -> dict[str, Any]:
    """`saved` with fp32 moments where they are codes."""
    if SCALES[0] not in saved:
        return saved
    moments = (sharded_like(value, saved["exp_avg_sq"]) for value in dequantise(*entries_of(saved)))
    others = {name: value for name, value in saved.items() if name not in SCALES}
    return others | dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))


def _same_shape(value: Tensor, template: Tensor, name: str, owner: str) -> None:
    if value.shape != template.shape:
        raise ValueError(
            f"the loaded {name} of {owner} has shape {tuple(value.shape)}, the parameter has "
            f"{tuple(template.shape)}"
        )


def _reinterpreted(tensor: Any, dtype: torch.dtype) -> Tensor:
    """Views the bits under another dtype of the same size."""
    return sharded_like(local(tensor).view(dtype), tensor)
