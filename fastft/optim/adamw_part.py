"""The tensors of a plan that are on one device, and the step over them where all lie there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import ops
from fastft.foreign.tensors import local, write_stamp
from fastft.optim import weight_bits
from fastft.optim.adamw_state import State, check_gradient, residue_names
from fastft.optim.adamw_update import ADAMW, RESIDUES, Binding, Rounding
from fastft.optim.grad_norm import ToClip


class Row(NamedTuple):
    """A tensor's row of the operator's `table`."""

    hyper: int
    rounding: Rounding
    amsgrad: bool
    first: int


class PartTensors:
    """Parameters on one device with their states, as the operator takes them.

    The engine gets this process's parts; FSDP may put others behind the same parameters.

    Attributes:
        params: the parts of the parameters.
        entries: of each parameter those of its state, in the operator's order: `exp_avg`,
            `exp_avg_sq`, `max_exp_avg_sq` if it has that, its residues.
        layouts: of each the entry that has the parameter's shape and layout of its state, whatever
            its kind of moments.
        rows: the parameters' rows of the operator's table.
        kept: the weights that are written together with low bits, with their places.
    """

    def __init__(self, originals: list[Any], states: list[State], rows: list[Row]) -> None:
        self.rows = rows
        self.params = [local(param) for param in originals]
        self._shards = [
            (param, part)
            for param, part in zip(originals, self.params, strict=True)
            if param is not part
        ]
        self.kept = [
            (place, originals[place]) for place, row in enumerate(rows) if row.rounding in RESIDUES
        ]
        self.entries = [
            [local(state[name]) for name in entry_names(state, row)]
            for state, row in zip(states, rows, strict=True)
        ]
        self.layouts = [entries[1] for entries in self.entries]

    def memory(self) -> list[Any]:
        """Addresses and forms, which show that parameters or states have been given others."""
        forms = [
            (param.dtype, param.shape, param.stride(), param.data_ptr()) for param in self.params
        ]
        return [*forms, *map(Tensor.data_ptr, chain(*self.entries))]

    def has_other_shards(self) -> bool:
        """Tells whether another part has been put behind one of the parameters."""
        return any(local(param) is not part for param, part in self._shards)


class Part:
    """The step over parameters whose states are on their device.

    Attributes:
        torn: what has broken off a step in its middle.
    """

    torn: BaseException | None = None

    def __init__(
        self, device: torch.device, positions: list[int] | None, tensors: PartTensors, impl: str
    ) -> None:
        self.device, self.positions, self.impl, self.tensors = device, positions, impl, tensors
        self.eager_samples: list[tuple[Tensor, int]] | None = None
        self.states = operator_lists(tensors.entries, tensors.rows)
        self.table = table_of(tensors.rows)
        engine = ADAMW.resolve(impl, device)  # raises where an explicit one is not there
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.binding: Binding | None = None
        if engine in ops.LIBRARIES and all(map(same_layout, tensors.params, tensors.layouts)):
            self.binding = Binding(engine, (tensors.params, *self.states), self.table)
        self.memory = tensors.memory()

    def holds(self) -> bool:
        """Tells whether shards and memory are as before.

        A native engine looks over memory itself, just before it updates. That is enough where there
        is one device; of several, none may be updated before all were looked over.
        """
        if self.tensors.has_other_shards():
            return False
        looks_itself = self.binding is not None and self.positions is None
        return looks_itself or self.tensors.memory() == self.memory

    @property
    def takes_norms(self) -> bool:
        """Whether a step may be given clipping whose norm is still to be taken."""
        return self.binding is not None and self.binding.takes_norms and self.positions is None

    def step(
        self,
        all_grads: Sequence[Tensor],
        hyper: Tensor,
        grad_factor: Tensor | ToClip | None,
        seed: int,
    ) -> bool:
        """Updates; False, with nothing done, if what is bound has other memory than before."""
        grads = all_grads if self.positions is None else [all_grads[i] for i in self.positions]
        done, factor = None, self.one
        if isinstance(grad_factor, ToClip):
            if self.binding is not None and self.takes_norms:
                done = self.binding.clip_and_step(grads, hyper, grad_factor, seed)
            factor = factor if done is not None else grad_factor.factor(grads)
        elif grad_factor is not None:
            factor = grad_factor.to(self.one.device)
        if done is None and self.binding is not None:
            done = self.binding.step(grads, hyper, factor, seed)
        if done is None:
            self._step_unbound(grads, hyper, factor, seed)
        elif done:  # else those of the last step are still to be asked for
            self.eager_samples = None
        return done is not False

    def _step_unbound(
        self, grads: Sequence[Tensor], hyper: Tensor, factor: Tensor, seed: int
    ) -> None:
        """Updates by way of the operator, with copies of what lies otherwise than its state."""
        check_dense(grads)
        for param, grad in zip(self.tensors.params, grads, strict=True):
            check_gradient(param, grad)  # plain torch would say it between two of them
        # under `.data` torch counts no change: the plan counts one for every engine
        targets = [param.data for param in self.tensors.params]
        params, grads = (
            [like(tensor, layout) for tensor, layout in zip(of, self.tensors.layouts, strict=True)]
            for of in (targets, grads)
        )
        update = ADAMW.implementation(self.impl, self.device, params, grads)
        # plain torch may end between two operations, and counts what it wrote; a kernel cannot
        written = [*params, *chain(*self.states)] if update is ADAMW.reference else []
        stamps, updated = list(map(write_stamp, written)), False
        try:
            update(params, grads, *self.states, self.table, hyper, factor, seed)
            updated = True
            for target, laid in zip(targets, params, strict=True):
                if target is not laid:
                    target.copy_(laid)
            self.eager_samples = samples_of(self.tensors, self.device)
        except BaseException as error:
            # a kernel raises before it writes anything, plain torch anywhere
            if updated or stamps != list(map(write_stamp, written)):
                self.torn = error
            raise

    def samples(self) -> list[tuple[Tensor, int]]:
        """The weights whose sampled checksum of what the last step wrote is known, with it."""
        if self.eager_samples is not None:
            return self.eager_samples
        if self.binding is None or self.device.type != "cpu" or not self.tensors.kept:
            return []
        written = self.binding.written()
        return [(param, written[place]) for place, param in self.tensors.kept if written[place]]


def entry_names(state: State, row: Row) -> list[str]:
    """The entries of a state that the operator takes, in its order."""
    largest = ["max_exp_avg_sq"] if row.amsgrad else []
    return ["exp_avg", "exp_avg_sq", *largest, *residue_names(state, row.rounding)]


def operator_lists(
    entries: Sequence[Sequence[Tensor]], rows: Sequence[Row]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The operator's arguments from `exp_avgs` to `residues`, of the entries of each tensor."""
    residues = [of[3 if row.amsgrad else 2 :] for of, row in zip(entries, rows, strict=True)]
    return (
        [of[0] for of in entries],
        [of[1] for of in entries],
        [of[2] for of, row in zip(entries, rows, strict=True) if row.amsgrad],
        list(chain(*residues)),
    )


def table_of(rows: Sequence[Row]) -> Tensor:
    """The operator's `table`."""
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 4)


def check_dense(grads: Sequence[Tensor]) -> None:
    """Raises where one is sparse."""
    if any(grad.layout != torch.strided for grad in grads):
        raise RuntimeError(
            "AdamW does not take sparse gradients (an Embedding with sparse=True makes them)"
        )


def samples_of(
    tensors: PartTensors, device: torch.device, places: Collection[int] | None = None
) -> list[tuple[Tensor, int]]:
    """The weights beside low bits, of all or those at these places, with their sampled checksums;
    right after a step has written them."""
    # elsewhere than on a CPU samples would cost launches for each
    kept = tensors.kept if device.type == "cpu" else []
    return [
        (param, weight_bits.sample(tensors.params[place]))  # a DTensor may be awaited
        for place, param in kept
        if places is None or place in places
    ]


def same_layout(tensor: Tensor, layout: Tensor) -> bool:
    """Tells whether elements at the same place in memory belong together."""
    return tensor.stride() == layout.stride() or (tensor.is_contiguous() and layout.is_contiguous())


def like(tensor: Tensor, layout: Tensor) -> Tensor:
    """`tensor`, or a copy of it in the strides of `layout`, which the operator walks through."""
    if same_layout(tensor, layout):
        return tensor
    return torch.empty_like(layout, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
