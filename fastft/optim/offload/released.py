"""Gradients that are used up inside backward: neither device nor host keeps them.

As backward makes a gradient, its parameter takes its step, by a plan of its own with the numbers
and bits of the resident one; the memory of the gradient is given back. `step()` only counts and
checks. What would need a gradient longer than that is a sentence:

    a second micro-batch    raises where it would be added to what is not there any more
    clipping                needs the norm of all before the first update
    GradScaler              knows of Inf only when backward is over
    a skipped step          cannot be taken back: a warning says of how many parameters
    a rate, or a weight,    that is changed between backward and `step()` comes too late for the
                            update: `step()` raises

A backward pass that raises has updated the parameters whose gradients it had made. They are whole,
with their states and counts; the next `zero_grad()` or `step()` goes on from there.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.foreign import engines, sharding
from fastft.foreign.tensors import local, sharded_like
from fastft.optim.adamw_plan import Plan
from fastft.optim.grad_norm import norm_engine, parts_of, write_parts
from fastft.optim.offload.absent import AbsentGradient
from fastft.optim.offload.hooks import Hooks, check_gradient
from fastft.signals import Held

if TYPE_CHECKING:
    from fastft.optim.adamw import AdamW

_USED_UP = (
    "AdamW(release_gradients=True) has used it up inside backward, and its parameter has been "
    "updated. Clipping, accumulation, GradScaler and DistributedDataParallel need gradients "
    "longer: use offload='gradients' or offload='states'. For the norm that Trainer logs, "
    "fastft.fuse_clipping(trainer) with TrainingArguments(max_grad_norm=0)"
)


class Used:
    """The keeper of a gradient that has been used up.

    Attributes:
        sums: its part of the norm.
        stepped: whether `step()` has counted it.
        after: the parameter's version behind the update, and what its group had for it.
    """

    refusal = _USED_UP
    stepped = False
    after: tuple[int, list[Any]]

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    def read(self) -> Tensor:
        """Raises: there are none."""
        raise RuntimeError(f"the numbers of a gradient are gone: {_USED_UP}")

    def add(self, new: Tensor) -> None:
        """Raises: there is nothing to add to."""
        raise RuntimeError(
            "a second gradient of a parameter, which is to be added to one that is gone (a second "
            "backward pass before zero_grad(), gradient_accumulation_steps, reentrant "
            f"checkpointing of what is used twice): {_USED_UP}"
        )

    def zero(self) -> None:
        """Raises: there is nothing to set to zero."""
        raise RuntimeError(
            "zero_grad(set_to_none=False) would make gradients of zeros, which train too: use "
            "zero_grad(), or leave out release_gradients"
        )


class ReleasedGradients:
    """The gradients of an optimizer whose backward pass updates.

    Args:
        optimizer: held weakly: it holds this.
    """

    def __init__(self, optimizer: AdamW) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._plans: dict[Tensor, Plan] = {}
        self._sums: dict[Tensor, Tensor] = {}
        self._pending: dict[Tensor, Used] = {}
        self._hooks = Hooks(self.use)
        self._warned = False

    def watch(self, params: Sequence[Any]) -> None:
        """Uses up from now on what backward makes for these parameters, and for no others."""
        for gone in self._hooks.watch(params):
            for kept in (self._plans, self._sums, self._pending):
                kept.pop(gone, None)

    def use(self, param: Any) -> None:
        """Updates a parameter with `p.grad`, if that is there, and leaves an absent one."""
        optimizer, gradient = self._optimizer(), param.grad
        if optimizer is None or gradient is None or isinstance(local(gradient), AbsentGradient):
            return
        check_gradient(param, gradient)
        if not self._plans:
            _check_first(param)
        if param in self._pending:
            self._warn_of_thrown_away()
        gradient = gradient.detach()
        with Held(), torch.no_grad():
            used = Used(self._part_of_the_norm(optimizer, param, local(gradient)))
            self._update(optimizer, param, gradient)
            used.after = self._now(optimizer, param)
            self._pending[param] = used
            param.grad = sharded_like(AbsentGradient(local(gradient), used), gradient)

    def _part_of_the_norm(self, optimizer: AdamW, param: Any, part: Tensor) -> Tensor:
        engine = norm_engine(optimizer.impl, part.device)
        sums = self._sums.get(param)
        if sums is None or sums.device != part.device:
            count = parts_of(part.numel(), engine)
            sums = torch.empty(count, dtype=torch.float64, device=part.device)
            self._sums[param] = sums
        write_parts(sums, part.contiguous(), engine)
        return sums

    def _update(self, optimizer: AdamW, param: Any, gradient: Any) -> None:
        groups = optimizer.param_groups
        plan, seed = self._plan_of(optimizer, param), groups[0]["seed"] or 0
        while not plan.step(groups, [gradient], None, seed):
            plan = self._new_plan(optimizer, param)

    def _plan_of(self, optimizer: AdamW, param: Any) -> Plan:
        plan, own = self._plans.get(param), {param: optimizer.state[param]}
        if plan is None or not plan.holds(optimizer.param_groups, own, [param], plan.present):
            return self._new_plan(optimizer, param)
        optimizer._warn_of_stale(plan.kept.look())
        return plan

    def _new_plan(self, optimizer: AdamW, param: Any) -> Plan:
        """A plan for this parameter alone, whose random bits are those that it has among all."""
        self._settle(self._plans.pop(param, None))
        own, groups = {param: optimizer.state[param]}, optimizer.param_groups
        present = [other is param for group in groups for other in group["params"]]
        plan = Plan(groups, own, present, optimizer.rounding, optimizer.impl)
        self._plans[param], optimizer.state[param] = plan, own[param]
        optimizer._warn_of_stale(plan.kept.forgotten)
        return plan

    def step(self, params: Sequence[Any]) -> None:
        """Counts what backward has updated; updates with what no hook has seen.

        Raises:
            RuntimeError: gradients that an earlier step has counted, or an update that did not see
                what has been changed since.
        """
        self.watch(params)
        for param in params:
            self.use(param)
        for param in params:
            gradient = local(param.grad)
            if gradient is None:
                continue
            if gradient.keeper.stepped:
                raise RuntimeError(
                    "step() came a second time after one backward pass, and could not repeat the "
                    f"update: {_USED_UP}"
                )
            self._check_unchanged(param, gradient.keeper)
        for param in params:
            if param.grad is not None:
                local(param.grad).keeper.stepped = True
                self._pending.pop(param, None)
        self._drop_thrown_away()

    def _now(self, optimizer: AdamW, param: Any) -> tuple[int, list[Any]]:
        """What an update depends on and others may change: the version of the weight, and options
        of its group, of tensors their versions."""
        of_group, _ = self._plans[param].rows[0]
        group = optimizer.param_groups[of_group]
        names = ("lr", "weight_decay", "eps", "maximize", "amsgrad")
        values = [*(group[name] for name in names), *group["betas"]]
        return param._version, [
            (id(value), value._version) if isinstance(value, Tensor) else value for value in values
        ]

    def _check_unchanged(self, param: Any, used: Used) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and used.after != self._now(optimizer, param):
            raise RuntimeError(
                "a weight, or the learning rate or another option of its group, was changed "
                "between backward and step(), too late for the update, which "
                "release_gradients=True has made inside backward: change it after step(), or use "
                "offload='gradients'"
            )

    def zero_grad(self) -> None:
        """Goes on from what has been updated, if no step has counted it."""
        self._drop_thrown_away()

    def _drop_thrown_away(self) -> None:
        if self._pending:
            self._warn_of_thrown_away()
            self._pending.clear()

    def _warn_of_thrown_away(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"gradients were thrown away that {len(self._pending)} parameters had been updated "
                "with inside backward, which release_gradients=True cannot take back",
                stacklevel=4,
            )

    def settle(self) -> None:
        """Marks the states with what the last updates have written."""
        for plan in self._plans.values():
            self._settle(plan)

    def _settle(self, plan: Plan | None) -> None:
        if plan is not None:
            plan.kept.settle()


def _check_first(param: Any) -> None:
    """Raises where somebody will look for gradients when parameters have been updated with them."""
    if engines.losses_are_scaled():
        raise RuntimeError(
            "fp16 training scales its loss, which release_gradients=True would learn of too late: "
            "train in bf16, or use offload='states'"
        )
    if sharding.is_under_ddp(param):
        raise RuntimeError(
            "DistributedDataParallel, if only of one process, reduces gradients that "
            "release_gradients=True has used up: leave out one of them"
        )
