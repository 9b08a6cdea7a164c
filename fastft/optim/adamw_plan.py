"""The plan of AdamW's steps over the same parameters: found once, looked over at every step.

A plan holds for a step as long as nothing that it was made of is another than before:

    parameters   the very same objects have gradients, in groups of the same sizes and options
    states       the very same objects, and nobody has replaced an entry or moved a count
    memory       `p.data = ...` changes no object: who updates looks at addresses and forms itself

Whatever differs makes a new plan. Nothing is written through a pointer that was not checked in the
same step.

Each look is here because a simpler one was slower or blind. A step over 1000 tensors of 256
elements, on one core, takes 290 us in fp32 and 380 us in bf16; in its place

    a new plan at each step                          35 times as long
    tensors checked anew by the operator             2 times
    memory compared here, not by the engine          2.1 times
    all entries of all states compared               1.3 times
    a flag in each state, not a claim on all         1.04 times
    entries' dicts compared by ==                    1.03 times, but blind where a number that
                                                     equals the old one takes its place
    memory alone, by the engine                      blind for replaced entries: it holds the old
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import compress
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastft.foreign.tensors import is_dtensor, local_gradient, shard_begin, write_stamp
from fastft.optim import device_counts
from fastft.optim.adamw_part import Part, PartTensors, Row
from fastft.optim.adamw_state import Claim, State, ready_state, rounding_of
from fastft.optim.adamw_update import RESIDUES
from fastft.optim.device_counts import DeviceCounts
from fastft.optim.grad_norm import ToClip
from fastft.optim.groups import check_amsgrad, hyper_row
from fastft.optim.offload.deferred import LatePart
from fastft.optim.offload.streamed import StreamedPart
from fastft.optim.weight_bits import KeptWeights

ALIGNMENT = 512  # each parameter's first random bits: whole blocks of the kernels


class Plan:
    """Steps over the parameters that have a gradient.

    Args:
        groups: the optimizer's `param_groups`.
        state: the optimizer's `state`; entries which are missing are made.
        present: for each parameter of the groups, whether it has a gradient.
        rounding, impl, offload: the optimizer's.

    Attributes:
        torn: what has broken off a step behind a part of it.
    """

    torn: BaseException | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        present: list[bool],
        rounding: str,
        impl: str,
        offload: str | None = None,
    ) -> None:
        for group in groups:
            check_amsgrad(group)
        every = [(param, index) for index, group in enumerate(groups) for param in group["params"]]
        found = list(compress(every, present))
        self.params, self.present = [param for param, _ in found], present
        self.signature = _signature(groups)
        self.states: list[State] = [  # whose class is here for pickles of fastft 0.1
            ready_state(state, param, groups[i], rounding, offload is not None)
            for param, i in found
        ]
        self.every_state = list(state.values())
        done = _steps_done([entries["step"] for entries in self.states])
        keys = list(zip((index for _, index in found), done, strict=True))
        self.rows = list(dict.fromkeys(keys))  # (group, steps done) of each row of the hyper table
        firsts = compress(_first_elements(every), present)
        table = [
            Row(self.rows.index(key), rounding_of(param, rounding), groups[key[0]]["amsgrad"], at)
            for param, key, at in zip(self.params, keys, firsts, strict=True)
        ]
        # a step is one call for each device
        by_device = _by_device(self.params)
        self._lay_counts(done, by_device, groups)
        self.sharded = any(map(is_dtensor, self.params))
        kind = LatePart if offload == "overlap" else StreamedPart
        self.parts: list[Part | StreamedPart] = []
        for device, positions in by_device.items():
            tensors = PartTensors(
                [self.params[i] for i in positions],
                [self.states[i] for i in positions],
                [table[i] for i in positions],
            )
            chosen = positions if len(by_device) > 1 else None
            self.parts.append(
                Part(device, chosen, tensors, impl)
                if offload is None
                else kind(device, chosen, tensors, impl, offload != "states")
            )
        kept = [
            (param, entries)
            for param, entries, row in zip(self.params, self.states, table, strict=True)
            if row.rounding in RESIDUES
        ]
        self.kept = KeptWeights(kept, [part.samples for part in self.parts])
        self.claim = Claim()
        for entries in self.states:
            entries.claim(self.claim)

    def _lay_counts(
        self,
        done: list[float],
        by_device: dict[torch.device, list[int]],
        groups: list[dict[str, Any]],
    ) -> None:
        """Makes every state's count an element of one tensor, which a step adds to at once."""
        self.steps = torch.tensor(done, dtype=torch.float32, device="cpu")
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
        # Views have the version of their tensor. Of memory, the first tells: to look at each would
        # cost more than a small tensor's step, and who moves states by `.data = ...` moves all.
        self.first_counts = [views[positions[0]] for positions in by_device.values()]
        self.stamps = list(map(write_stamp, self.first_counts))

    def holds(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        params: list[Tensor],
        present: list[bool],
    ) -> bool:
        """Tells whether a step over `params`, those with a gradient, may use this plan."""
        return (
            same_objects(params, self.params)
            and present == self.present
            and self.signature == _signature(groups)
            and same_objects(state.values(), self.every_state)
            and not self.claim.broken
            and self.stamps == list(map(write_stamp, self.first_counts))
            and all(part.holds() for part in self.parts)
        )

    @property
    def staging(self) -> int:
        """Bytes of the buffers on the devices through which states stream."""
        return sum(part.staging for part in self.parts if isinstance(part, StreamedPart))

    @property
    def takes_norms(self) -> bool:
        """Whether a step's only call may take the norm of all gradients itself."""
        (part, *others) = self.parts
        return not (others or self.sharded) and isinstance(part, Part) and part.takes_norms

    def placed(self) -> list[tuple[Any, list[Any]]]:
        """Each part with its parameters, as they are at its places."""
        return [
            (part, [self.params[i] for i in part.positions or range(len(self.params))])
            for part in self.parts
        ]

    def settle(self) -> None:
        """Goes before any look at states: marks them with what the last step has written; raises
        as `check_whole`."""
        self.check_whole()
        self.kept.settle()

    def check_whole(self) -> None:
        """Raises RuntimeError where a step has broken off in its middle."""
        every: list[BaseException | None] = [self.torn, *(part.torn for part in self.parts)]
        torn = next(filter(None, every), None)
        if torn is not None:
            raise RuntimeError(
                f"a step of AdamW broke off in its middle ({type(torn).__name__}: {torn}): some "
                "weights and their states are of that step, others of the one before. Load the "
                "weights and this optimizer from a checkpoint"
            ) from torn

    def step(
        self,
        groups: list[dict[str, Any]],
        grads: Sequence[Tensor],
        grad_factor: Tensor | ToClip | None,
        seed: int,
        found_inf: Tensor | None = None,
    ) -> bool:
        """Updates once, and counts; False, with nothing done, if memory is other than before.

        Where counts live on the device, nothing is updated or counted if the one element of
        `found_inf` is not 0.
        """
        self.check_whole()
        if isinstance(grad_factor, ToClip) and not self.takes_norms:
            grad_factor = grad_factor.factor(grads)
        # reading the counts or a learning rate of a device would wait for it
        if len(self.counts) < len(self.parts):
            rows = [hyper_row(groups[index], step + 1) for index, step in self.rows]
            of_host = torch.tensor(rows, dtype=torch.float32, device="cpu")
        if self.sharded:
            grads = list(map(local_gradient, grads, self.params))
        begun = False
        try:
            for part in self.parts:
                counts = self.counts.get(part.device)
                hyper = counts.hyper(groups, found_inf) if counts else of_host
                # of both kinds of parts the one that takes norms gets clipping
                if not part.step(grads, hyper, grad_factor, seed):  # type: ignore[arg-type]
                    return False
                begun = True
                if counts:
                    counts.count()
            self._count()
        except BaseException as error:
            if begun:
                self.torn = error
            raise
        return True

    def _count(self) -> None:
        """Counts a step that all parts have taken."""
        self.rows = [(index, step + 1) for index, step in self.rows]
        self.steps.add_(1)
        self.stamps = list(map(write_stamp, self.first_counts))
        # the kernels write outside autograd's sight
        torch.autograd.graph.increment_version(self.params)
        self.kept.wrote()


def same_objects(these: Collection[Any], those: Collection[Any]) -> bool:
    """Tells whether both have the very same objects in the same order."""
    return len(these) == len(those) and all(map(is_, these, those))


def _steps_done(steps: list[Any]) -> list[float]:
    """The counts of states; waits once for each device where some are."""
    counts = [
        step if isinstance(step, Tensor) else torch.tensor(float(step), device="cpu")
        for step in steps
    ]
    done = [0.0] * len(counts)
    for places in _by_device(counts).values():
        # a view of each count would be a call into torch for each parameter
        there = torch.stack([c.reshape(()) if c.ndim else c for c in (counts[i] for i in places)])
        for i, count in zip(places, there.tolist(), strict=True):
            done[i] = float(count)
    return done


def _by_device(tensors: list[Tensor]) -> dict[torch.device, list[int]]:
    """The positions of the tensors on each device."""
    positions: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        positions.setdefault(tensor.device, []).append(i)
    return positions


def _signature(groups: list[dict[str, Any]]) -> list[tuple[int, bool, bool]]:
    return [(len(group["params"]), group["amsgrad"], group["capturable"]) for group in groups]


def _first_elements(every: list[tuple[Tensor, int]]) -> list[int]:
    """Each parameter's first index in the numbering of all elements, whatever the shards."""
    firsts, end = [], 0
    for param, _ in every:
        firsts.append(end + shard_begin(param))
        end += -(-param.numel() // ALIGNMENT) * ALIGNMENT
    return firsts
