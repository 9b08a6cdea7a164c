"""A `torch.optim.AdamW` that somebody has made becomes fastft's, and stays the object that it is.

Whoever holds it goes on holding the optimizer that trains: a scheduler (which writes rates into its
groups, whatever dicts `load_state_dict` has put there), accelerate's wrapper, a GradScaler, the
program's own variable. A second optimizer with the same group dicts would lose the scheduler at the
first `load_state_dict`, and accelerate calls that in `prepare`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from fastft.foreign.engines import is_counting_step
from fastft.optim.adamw import AdamW

_OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "capturable")


def turn_into_ours(optimizer: torch.optim.Optimizer) -> str | None:
    """Makes a plain `torch.optim.AdamW` a `fastft.AdamW`: groups, state, hooks and schedulers stay.

    bf16 weights follow fp32 from here on (`rounding="exact"`), moments are fp32.

    Args:
        optimizer: any; nothing of it has changed where a reason is returned.

    Returns:
        Why it is left alone, in words; None where it is fastft's now, or has been.
    """
    if isinstance(optimizer, AdamW):
        return None
    if type(optimizer) is not torch.optim.AdamW:
        return f"{type(optimizer).__name__} is not torch.optim.AdamW"
    counted = is_counting_step(vars(optimizer).get("step"), torch.optim.AdamW.step)
    if "step" in vars(optimizer) and not counted:
        return "something else than a scheduler has wrapped its step"
    options = {name: optimizer.defaults[name] for name in _OPTIONS}
    try:
        AdamW([dict(group) for group in optimizer.param_groups], **options)
    except (TypeError, ValueError) as error:
        return str(error)
    state = optimizer.state_dict() if optimizer.state else None
    hooks = {name: kept for name, kept in vars(optimizer).items() if name.endswith("_hooks")}
    vars(optimizer).pop("step", None)
    optimizer.__class__ = AdamW
    ours: Any = optimizer
    AdamW.__init__(ours, optimizer.param_groups, **options)  # keeps the dicts of its groups
    vars(optimizer).update(hooks)
    if counted:
        _Counting(optimizer)
    if state is not None:
        optimizer.load_state_dict(state)
    return None


class _Counting(LRScheduler):
    """Lets torch count the steps of an optimizer that has a scheduler, and changes no rate.

    The schedulers that there are warn where they find `step` uncounted.
    """

    def _initial_step(self) -> None:
        pass
