"""Loading optimizer states: without a lost bit, and from the optimizers whose checkpoints people have.

`torch.optim.Optimizer.load_state_dict` casts every state to its parameter's dtype; here each state keeps the dtype that
it has in training.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor


class _Verbatim:
    """Hides a restored state from `Optimizer.load_state_dict`, which would cast it to the parameter's dtype."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.entries = entries


def load(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    check_group: Callable[[dict[str, Any]], None],
    new_state: Callable[[Tensor], dict[str, Any]],
) -> None:
    """What `optimizer.load_state_dict(state_dict)` does; nothing changes where it raises.

    `check_group` raises on a group that `optimizer` cannot follow; `new_state` makes a parameter's state, which gives
    names, shapes, dtypes and devices.
    """

    def restore(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        for group in loaded["param_groups"]:
            check_group({**optimizer.defaults, **group})
        saved_ids = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        by_id = dict(zip(saved_ids, params, strict=False))  # torch raises next where the groups do not fit
        state = {
            key: _Verbatim(_restored(entries, new_state(by_id[key]))) if key in by_id else entries
            for key, entries in loaded["state"].items()
        }
        return {**loaded, "state": state}

    handle = optimizer.register_load_state_dict_pre_hook(restore)  # the last one: the user's hooks see plain states
    try:
        torch.optim.Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        handle.remove()


def reveal(optimizer: torch.optim.Optimizer) -> None:
    """Puts the states that `load` has hidden into place; for `__setstate__`, before which hooks do not run."""
    for param, entries in optimizer.state.items():
        if isinstance(entries, _Verbatim):
            optimizer.state[param] = entries.entries


def _restored(saved: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """A saved state with the dtypes, devices and layouts of a fresh one; unknown entries are kept as they are."""
    if not saved:
        return {}
    if missing := {"step", "exp_avg", "exp_avg_sq"} - saved.keys():
        raise ValueError(
            f"this is no AdamW state: {', '.join(sorted(missing))} missing, found {', '.join(map(str, saved))}"
        )
    restored = {name: value for name, value in saved.items() if name != "remainder"}
    # a tensor of its own: plans replace it by a view
    restored["step"] = torch.tensor(float(saved["step"]), dtype=torch.float32)
    for name in fresh.keys() - {"step"}:
        template = fresh[name]
        value = saved.get(name, template)
        if value.shape != template.shape:
            shapes = f"{tuple(value.shape)}, the parameter has {tuple(template.shape)}"
            raise ValueError(f"the loaded {name} has shape {shapes}")
        value = value.to(device=template.device, dtype=template.dtype)
        restored[name] = value if value.stride() == template.stride() else template.copy_(value)
    return restored
