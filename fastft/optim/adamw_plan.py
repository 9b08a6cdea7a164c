"""What AdamW's steps over the same parameters share, found once and looked over again at every
step.

A plan holds for a step if parameters, groups and states are the very same objects as before; the
native engines look over their memory as well, because `p.data = ...` changes no object. Whatever
differs makes a new plan: nothing is written through a pointer that was not checked in the same
step.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastft import _native, ops
from fastft.foreign import is_dtensor, local, shard_begin
from fastft.optim import device_counts, moments_8bit, weight_bits
from fastft.optim.adamw_update import ADAMW, RESIDUES, Rounding
from fastft.optim.device_counts import DeviceCounts
from fastft.optim.weight_bits import Mark

ALIGNMENT = 512  # each parameter's first random bits: whole blocks of the kernels
MOMENTS = ("fp32", "bf16", "8bit")
_version_of = attrgetter("_version")


class State(dict[str, Any]):
    """A parameter's state. Replacing an entry of any state counts, so that steps need not compare
    every entry.

    `mark` says which bits of the parameter its low bits belong to; copies and pickles do not have
    it.
    """

    changes: ClassVar[int] = 0
    mark: Mark | None = None

    def __reduce__(self) -> Any:
        return State, (dict(self),)

    def _changing(method: Any) -> Any:
        def changed(self: State, *args: Any, **kwargs: Any) -> Any:
            State.changes += 1
            return method(self, *args, **kwargs)

        return changed

    __setitem__, __delitem__, __ior__ = map(
        _changing, (dict.__setitem__, dict.__delitem__, dict.__ior__)
    )
    update, setdefault, pop = map(_changing, (dict.update, dict.setdefault, dict.pop))
    popitem, clear = map(_changing, (dict.popitem, dict.clear))


def rounding_of(param: Tensor, rounding: str) -> Rounding:
    """How `param` is kept where the optimizer was given `rounding`."""
    return Rounding.FP32 if param.dtype == torch.float32 else Rounding[rounding.upper()]


def new_state(param: Tensor, moments: str, rounding: str, amsgrad: bool) -> State:
    """The state before the first step, in the parameter's layout; with 8-bit moments, which short
    vectors do not have, rows lie one after the other.
    """
    coded = moments == "8bit" and moments_8bit.has_codes(param)

    def zeros(dtype: torch.dtype) -> Tensor:
        layout = torch.contiguous_format if coded else torch.preserve_format
        return torch.zeros_like(param, dtype=dtype, memory_format=layout)

    state = State(step=torch.zeros((), dtype=torch.float32))
    if coded:
        state |= moments_8bit.new_entries(param)
    else:
        dtype = torch.bfloat16 if moments == "bf16" else torch.float32
        names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if amsgrad else ())
        state |= {name: zeros(dtype) for name in names}
    if residue := RESIDUES.get(rounding_of(param, rounding)):
        state[residue[0]] = zeros(residue[1])
    return state


class Plan:
    """Steps over the parameters that have a gradient.

    Args:
        groups: the optimizer's `param_groups`.
        state: the optimizer's `state`; entries which are missing are made.
        present: for each parameter of the groups, whether it has a gradient.
        rounding, impl: the optimizer's.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        present: list[bool],
        rounding: str,
        impl: str,
    ) -> None:
        every = [(param, index) for index, group in enumerate(groups) for param in group["params"]]
        found = list(compress(every, present))
        self.params, self.present = [param for param, _ in found], present
        self.signature = _signature(groups)
        self.states = [_ready(state, param, groups[i], rounding) for param, i in found]
        done = _steps_done([entries["step"] for entries in self.states])
        self.steps = torch.tensor(done, dtype=torch.float32)
        self.sharded = any(map(is_dtensor, self.params))
        keys = list(zip((index for _, index in found), done, strict=True))
        self.rows = list(dict.fromkeys(keys))  # (group, steps done) of each row of the hyper table
        firsts = dict(zip((id(param) for param, _ in every), _first_elements(every), strict=True))
        table = [
            [
                self.rows.index(key),
                rounding_of(param, rounding),
                groups[key[0]]["amsgrad"],
                firsts[id(param)],
            ]
            for param, key in zip(self.params, keys, strict=True)
        ]
        by_device = _by_device(self.params)
        self.counts = {
            device: DeviceCounts(device, [done[i] for i in positions], self.rows)
            for device, positions in by_device.items()
            if device_counts.counted_there(device, groups)
        }
        views = dict(enumerate(self.steps.unbind()))
        for device, counts in self.counts.items():
            views |= zip(by_device[device], counts.steps.unbind(), strict=True)
        for i, entries in enumerate(self.states):
            entries["step"] = views[i]
        self.kept_places = [i for i, row in enumerate(table) if Rounding(row[1]) in RESIDUES]
        self.kept = [self.params[i] for i in self.kept_places]
        self.kept_states = [self.states[i] for i in self.kept_places]
        self.forgotten = sum(map(self._look_again, self.kept, self.kept_states))
        self.stepped = False
        self._note_versions()
        self.kept_memory = [
            (local(param).data_ptr(), weight_bits.order_of(param)) for param in self.kept
        ]
        self.every_state, self.entries = list(state.values()), _entries(self.states)
        self.state_changes, self.versions = State.changes, self._versions()
        self.parts = [
            _Part(device, positions if len(by_device) > 1 else None, self, table, impl)
            for device, positions in by_device.items()
        ]

    @staticmethod
    def _look_again(param: Tensor, state: State) -> bool:
        """Whether the low bits of a parameter had to be set to zero."""
        return not (state.mark and state.mark.untouched(param)) and weight_bits.forget(param, state)

    def look_at_weights(self) -> int:
        """Before a step: of how many parameters the low bits had to be set to zero, as others have
        written there."""
        if sum(map(_version_of, self.kept)) == self.sum_of_versions:  # none of them ever falls
            return 0
        self.settle()
        forgotten = sum(map(self._look_again, self.kept, self.kept_states))
        self._note_versions()
        return forgotten

    def _note_versions(self) -> None:
        self.kept_versions, self.counted = list(map(_version_of, self.kept)), 0
        self.sum_of_versions = sum(self.kept_versions)

    def wrote(self) -> None:
        """After a step, and after torch has counted it as a change of the parameters."""
        self.stepped = True
        if all(part.by_engine for part in self.parts):
            # of every parameter; as a list it would cost the step of small tensors a tenth
            self.counted += 1
            self.sum_of_versions += len(self.kept)
        else:
            self._note_versions()

    def settle(self) -> None:
        """Marks the states with what the last step has written."""
        if not self.stepped:
            return
        samples: dict[int, int] = {}
        for part in self.parts:
            samples |= part.samples()
        written = zip(
            self.kept_places,
            self.kept,
            self.kept_states,
            self.kept_versions,
            self.kept_memory,
            strict=True,
        )
        for i, param, state, before, memory in written:
            version = before + self.counted
            if not (state.mark and state.mark.is_later(param, version)):
                state.mark = Mark(weakref.ref(param), version, *memory, samples.get(i))

    def _versions(self) -> list[int]:
        """Others than before where somebody else has written a count."""
        return [self.steps._version, *(counts.steps._version for counts in self.counts.values())]

    def holds(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        params: list[Tensor],
        present: list[bool],
    ) -> bool:
        """Whether a step over `params`, those of the groups with a gradient, may use this plan."""
        if (
            len(params) != len(self.params)
            or len(state) != len(self.every_state)
            or self.present != present
        ):
            return False
        same = all(map(is_, params, self.params)) and all(
            map(is_, state.values(), self.every_state)
        )
        if not same or self.signature != _signature(groups) or self.versions != self._versions():
            return False
        if self.state_changes != State.changes:  # of this optimizer or of another
            if not all(map(is_, _entries(self.states), self.entries)):
                return False
            self.state_changes = State.changes
        return all(part.holds() for part in self.parts)

    def step(
        self,
        groups: list[dict[str, Any]],
        grads: Sequence[Tensor],
        grad_factor: Tensor | None,
        seed: int,
        found_inf: Tensor | None = None,
    ) -> bool:
        """One update, counted; False, with nothing done, if parameters or states have other memory
        than before.

        Where counts live on the device, nothing is updated or counted if the one element of
        `found_inf` is not 0.
        """
        # reading the counts or a learning rate of a device would wait for it
        if len(self.counts) < len(self.parts):
            rows = [_hyper_row(groups[index], step + 1) for index, step in self.rows]
            of_host = torch.tensor(rows, dtype=torch.float32)
        if self.sharded:
            grads = [local(grad) for grad in grads]
        for part in self.parts:
            counts = self.counts.get(part.device)
            hyper = counts.hyper(groups, found_inf) if counts else of_host
            if not part.step(grads, hyper, grad_factor, seed):
                return False
            if counts:
                counts.count()
        self.rows = [(index, step + 1) for index, step in self.rows]
        self.steps.add_(1)
        self.versions = self._versions()
        return True


class _Part:
    """The tensors of a plan that are on one device."""

    def __init__(
        self,
        device: torch.device,
        positions: list[int] | None,
        plan: Plan,
        table: list[list[int]],
        impl: str,
    ) -> None:
        self.device, self.positions = device, positions
        chosen = range(len(plan.params)) if positions is None else positions
        self.kept = [
            (place, i) for place, i in enumerate(chosen) if Rounding(table[i][1]) in RESIDUES
        ]
        self.by_engine, self._samples = False, dict[int, int]()
        self.originals = [plan.params[i] for i in chosen]
        self.params = [local(param) for param in self.originals]
        states = [plan.states[i] for i in chosen]
        self.steps = [state["step"] for state in states]
        self.exp_avgs = [local(state["exp_avg"]) for state in states]
        self.exp_avg_sqs = [local(state["exp_avg_sq"]) for state in states]
        rows = [table[i] for i in chosen]
        self.max_exp_avg_sqs = [
            local(state["max_exp_avg_sq"])
            for state, row in zip(states, rows, strict=True)
            if row[2]
        ]
        self.residues = [
            local(state[name])
            for state, row in zip(states, rows, strict=True)
            for name in _residue_names(state, row[1])
        ]
        self.table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
        # raises where an explicit engine is not there
        self.impl, engine = impl, ADAMW.resolve(impl, device)
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.bound: int | None = None
        if engine in ops.LIBRARIES and all(map(_same_layout, self.params, self.exp_avgs)):
            self.bound = torch.ops.fastft.adamw_bind.default(
                self.params,
                self.exp_avgs,
                self.exp_avg_sqs,
                self.max_exp_avg_sqs,
                self.residues,
                self.table,
            )
            weakref.finalize(self, _release, self.bound, ops.LIBRARIES[engine])
        self.memory, self.first_count = self._memory(), self.steps[0].data_ptr()

    def _memory(self) -> list[Any]:
        """What shows that parameters or states have been given other memory or another form."""
        states = (self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.residues, self.steps)
        forms = [
            (param.dtype, param.shape, param.stride(), param.data_ptr()) for param in self.params
        ]
        return [*forms, *map(Tensor.data_ptr, chain(*states))]

    def holds(self) -> bool:
        """Whether shards, memory and counts are as before.

        A native engine looks over memory itself, just before it updates: enough where there is one
        device, but of several none may be updated before all were looked over. Of counts it sees
        nothing. Looking at each would cost more than the step of a small tensor, and whoever moves
        states by `.data = ...` moves all: the first tells.
        """
        if self.originals[0] is not self.params[0] and not all(
            map(is_, map(local, self.originals), self.params)
        ):
            return False
        if self.bound is None or self.positions is not None:
            return self._memory() == self.memory
        return self.steps[0].data_ptr() == self.first_count

    def step(
        self, all_grads: Sequence[Tensor], hyper: Tensor, grad_factor: Tensor | None, seed: int
    ) -> bool:
        """Updates; False, with nothing done, if what is bound has other memory than before."""
        grads = all_grads if self.positions is None else [all_grads[i] for i in self.positions]
        factor = self.one if grad_factor is None else grad_factor.to(self.one.device)
        if self.bound is not None:
            try:
                code = torch.ops.fastft.adamw_bound_.default(grads, hyper, factor, seed, self.bound)
            except NotImplementedError:  # no such kernel for sparse tensors
                code = 2
            if code == 0:
                self.by_engine = True
            if code != 2:
                return code == 0
        if any(grad.layout != torch.strided for grad in grads):
            raise RuntimeError(
                "AdamW does not take sparse gradients (an Embedding with sparse=True makes them)"
            )
        params = [
            _like(param, exp_avg) for param, exp_avg in zip(self.params, self.exp_avgs, strict=True)
        ]
        grads = [_like(grad, exp_avg) for grad, exp_avg in zip(grads, self.exp_avgs, strict=True)]
        states = (self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.residues)
        update = ADAMW.implementation(self.impl, self.device, params, grads)
        update(params, grads, *states, self.table, hyper, factor, seed)
        for param, updated in zip(self.params, params, strict=True):
            if param is not updated:
                param.copy_(updated)
        self.by_engine = False
        if self.device.type == "cpu":  # elsewhere it would cost launches for each
            self._samples = {i: weight_bits.sample(self.params[place]) for place, i in self.kept}
        return True

    def samples(self) -> dict[int, int]:
        """Of what the last step has written, by the parameter's place in the plan: the samples that
        are known."""
        if not self.by_engine:
            return self._samples
        if self.device.type != "cpu" or not self.kept:
            return {}
        sums = torch.zeros(len(self.params), dtype=torch.int64)
        torch.ops.fastft.adamw_written(sums, self.bound)
        values = sums.tolist()
        return {i: values[place] % 2**64 for place, i in self.kept if values[place]}


def _steps_done(steps: list[Any]) -> list[float]:
    """The counts of states; waits once for each device where some are."""
    counts = [step if isinstance(step, Tensor) else torch.tensor(float(step)) for step in steps]
    done = [0.0] * len(counts)
    for places in _by_device(counts).values():
        there = torch.stack(
            [counts[i] if counts[i].ndim == 0 else counts[i].reshape(()) for i in places]
        )
        for i, count in zip(places, there.tolist(), strict=True):
            done[i] = float(count)
    return done


def _by_device(params: list[Tensor]) -> dict[torch.device, list[int]]:
    """The positions of the parameters on each device."""
    positions: dict[torch.device, list[int]] = {}
    for i, param in enumerate(params):
        positions.setdefault(param.device, []).append(i)
    return positions


def _ready(state: dict[Tensor, Any], param: Tensor, group: dict[str, Any], rounding: str) -> State:
    """The parameter's state, with the entries that are missing."""
    entries, dtypes = state[param], _dtypes(param, group, rounding)
    missing = {"step", *dtypes} - entries.keys()
    if missing or not isinstance(entries, State):
        fresh = new_state(param, group["moments"], rounding, group["amsgrad"]) if missing else {}
        entries = state[param] = State({**fresh, **entries})
    _check_fit(param, entries, dtypes)
    return entries


def _dtypes(param: Tensor, group: dict[str, Any], rounding: str) -> dict[str, torch.dtype]:
    """The entries of a state which have the parameter's shape."""
    residue = RESIDUES.get(rounding_of(param, rounding))
    kept = dict([residue] if residue else [])
    if group["moments"] == "8bit" and moments_8bit.has_codes(param):
        return {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8} | kept
    names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())
    return (
        dict.fromkeys(names, torch.bfloat16 if group["moments"] == "bf16" else torch.float32) | kept
    )


def _check_fit(param: Tensor, entries: State, dtypes: dict[str, torch.dtype]) -> None:
    """Raises where a parameter does not fit its gradient or state, which `p.data = ...` or a new
    entry can make so."""
    if param.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(
            f"AdamW trains float32 and bfloat16 parameters, one has become {param.dtype}"
        )
    grad = param.grad
    if grad is not None and (grad.shape != param.shape or grad.device != param.device):
        of_grad = f"a gradient has shape {tuple(grad.shape)} on {grad.device}"
        raise RuntimeError(f"{of_grad}, its parameter {tuple(param.shape)} on {param.device}")
    for name, dtype in dtypes.items():
        entry = entries[name]
        if entry.shape != param.shape or entry.dtype != dtype:
            needed = f"{dtype} of shape {tuple(param.shape)}"
            raise RuntimeError(
                f"{name} of a parameter must be {needed}, is {entry.dtype} of {tuple(entry.shape)}"
            )
    for name in moments_8bit.SCALES if dtypes["exp_avg"] == torch.int8 else ():
        shape = moments_8bit.scale_shape(param.shape)
        if entries[name].shape != shape or entries[name].dtype != torch.float32:
            raise RuntimeError(f"{name} of a parameter must be torch.float32 of shape {shape}")


def _residue_names(state: State, rounding: int) -> list[str]:
    """What the op's `residues` has of a state: what rounding keeps, and the scales of 8-bit
    moments."""
    residue = RESIDUES.get(Rounding(rounding))
    coded = state["exp_avg"].dtype == torch.int8
    return ([residue[0]] if residue else []) + (list(moments_8bit.SCALES) if coded else [])


def _signature(groups: list[dict[str, Any]]) -> list[tuple[int, bool, bool]]:
    return [(len(group["params"]), group["amsgrad"], group["capturable"]) for group in groups]


def _entries(states: list[State]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, states)))


def _first_elements(every: list[tuple[Tensor, int]]) -> list[int]:
    """Each parameter's first index in the numbering of all elements, which does not depend on
    shards."""
    firsts, end = [], 0
    for param, _ in every:
        firsts.append(end + shard_begin(param))
        end += -(-param.numel() // ALIGNMENT) * ALIGNMENT
    return firsts


def _hyper_row(group: dict[str, Any], step: float) -> list[float]:
    """A row of the hyper table, in double precision up to the table's float32, as torch does."""
    lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
    return [
        1 - lr * float(group["weight_decay"]),
        1 - beta1,
        beta2,
        1 - beta2,
        -(lr / (1 - beta1**step)),
        (1 - beta2**step) ** 0.5,
        float(group["eps"]),
        -1.0 if group["maximize"] else 1.0,
        step,
    ]


def _release(bound: int, kind: str) -> None:
    library = _native.library(kind)
    if isinstance(library, ctypes.CDLL):
        library.fastft_adamw_release(ctypes.c_int64(bound))


def _same_layout(tensor: Tensor, layout: Tensor) -> bool:
    return tensor.stride() == layout.stride() or (tensor.is_contiguous() and layout.is_contiguous())


def _like(tensor: Tensor, layout: Tensor) -> Tensor:
    """`tensor`, or a copy of it in the strides of `layout`, in which the op can walk through
    both."""
    return (
        tensor
        if _same_layout(tensor, layout)
        else torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)
    )
