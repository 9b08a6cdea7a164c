"""Checks that a bf16 weight still has the bits that its remainder or compensation belongs to.

The low bits of a weight mean nothing beside other high bits. Who writes to a weight (a best
checkpoint, an average swapped in, pruning) does not know of them. So each state notes what the
weight was when its low bits were written:

    version     torch's count of in-place changes, which writing through `.data` does not move
    sample      a checksum of every 32nd section of 128 elements; the C++ engine takes it as it
                writes
    checksum    of all sections: in state dicts, where there is time to read everything

The checksum of the bf16 bits x, as signed 16-bit numbers, j the place in section q; modulo 2^64:

    sum over q of (sum over j of w_j * x_qj, modulo 2^32) * (2 q + 1) * 0x9E3779B97F4A7C15
    w_j = ((j + 1) * 40503 mod 2^15) | 1

It is kept in checkpoints: another formula would be another name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastft import ops
from fastft.foreign.tensors import in_flat_parameter, is_dtensor, local

SECTION = 128
EVERY = 32
_WEIGHTS = ((torch.arange(1, SECTION + 1) * 40503) & 0x7FFF) | 1
_FACTOR = 0x9E3779B97F4A7C15 - 2**64
_PIECE = SECTION * 2**14  # elements that plain torch looks at together


def _checksum_reference(sum: Tensor, weight: Tensor, every: int) -> None:
    """Plain torch: writes the checksum of every so many sections of a contiguous bf16 weight."""
    bits, weights = weight.reshape(-1).view(torch.int16), _WEIGHTS.to(weight.device)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for begin in range(0, bits.numel(), _PIECE * every):
        piece = bits[begin : begin + _PIECE * every].long()
        padded = torch.nn.functional.pad(piece, (0, -piece.numel() % SECTION))
        piece = padded.view(-1, SECTION)[::every]
        section = begin // SECTION + every * torch.arange(len(piece), device=weight.device)
        total += (((piece * weights).sum(1) & 0xFFFFFFFF) * ((2 * section + 1) * _FACTOR)).sum()
    sum.copy_(total.reshape(sum.shape))


WEIGHT_CHECKSUM = ops.Operator(
    "weight_checksum_(Tensor(a!) sum, Tensor weight, int every) -> ()",
    _checksum_reference,
    engines={"cpp": None},
)


def checksum(weight: Tensor, every: int = 1, order: Sequence[int] | None = None) -> int:
    """The checksum of this process's part of a bf16 weight: an integer in [0, 2^64).

    `order`: its dimensions, the one whose steps through memory are largest first; as they come by
        default.
    """
    part = local(weight.detach())
    part = (part if order is None else part.permute(*order)).contiguous()
    sum = torch.zeros((), dtype=torch.int64, device=part.device)
    WEIGHT_CHECKSUM.implementation("auto", part.device)(sum, part, every)
    return int(sum) % 2**64


def order_of(weight: Tensor) -> list[int] | None:
    """The dimensions in the order in which this process's part lies in memory; None: as usual."""
    part = local(weight)
    return None if part.is_contiguous() else sorted(range(part.ndim), key=part.stride, reverse=True)


def sample(weight: Tensor) -> int:
    """The sampled checksum in the order of memory, as the C++ engine takes it."""
    return checksum(weight, EVERY, order_of(weight))


@dataclass
class Mark:
    """The weight as it was when its low bits were written; None for what is not known."""

    owner: weakref.ref[Tensor] | None = None
    version: int | None = None
    memory: int | None = None
    order: list[int] | None = None
    sample: int | None = None
    checksum: int | None = None

    def untouched(self, weight: Tensor) -> bool:
        """Tells whether nothing that torch counts has happened to the weight since."""
        return (
            (self.owner is not None and self.owner() is weight)
            and self.version == weight._version
            and self.memory == local(weight).data_ptr()
        )

    def is_later(self, weight: Tensor, version: int) -> bool:
        """Tells whether the low bits were written after this version, as `load_fp32` does."""
        return self.owner is not None and self.owner() is weight and (self.version or 0) > version

    def fits(self, weight: Tensor) -> bool:
        """Tells whether the weight has these bits still, as far as is known."""
        if self.checksum is not None:
            return checksum(weight) == self.checksum
        if self.sample is not None:
            return checksum(weight, EVERY, self.order) == self.sample
        return self.owner is None or self.owner() is not weight or self.version == weight._version


def mark_written(weight: Tensor, state: Any) -> None:
    """Notes that weight and low bits have just been written together, which no version shows."""
    if hasattr(state, "mark") and residue_of(state) is not None:
        torch.autograd.graph.increment_version(weight)
        mark_copied(weight, state)


def mark_copied(weight: Tensor, state: Any) -> None:
    """Notes of a weight and low bits that have just been copied together that they fit."""
    if hasattr(state, "mark") and residue_of(state) is not None:
        place = local(weight).data_ptr(), order_of(weight)
        state.mark = Mark(weakref.ref(weight), weight._version, *place, sample(weight))


class KeptWeights:
    """The weights that a plan's steps write together with low bits, and what is known of them.

    Reading every version after a step as well would cost a step over small tensors a tenth. But a
    step adds one to each, and none ever falls: their sum tells whether somebody else wrote.

    Args:
        weights: each with its state. Those that others have written to lose their low bits.
        samples: functions that return the sampled checksums of what the last step wrote, with the
            weights where they are known.

    Attributes:
        forgotten: of how many weights the low bits had to be set to zero, as others had written
            there.
    """

    def __init__(
        self,
        weights: list[tuple[Tensor, Any]],
        samples: list[Callable[[], list[tuple[Tensor, int]]]],
    ) -> None:
        self._weights, self._samples, self._stepped = weights, samples, False
        self._memory = [(local(weight).data_ptr(), order_of(weight)) for weight, _ in weights]
        self._look_at_each()

    def look(self) -> int:
        """Before a step: returns `forgotten`, of what has happened since the last one."""
        if sum([weight._version for weight, _ in self._weights]) == self._sum:
            return 0
        self.settle()
        return self._look_at_each()

    def wrote(self) -> None:
        """After a step, which has added one to each version."""
        self._stepped = True
        self._steps += 1
        self._sum += len(self._weights)

    def settle(self) -> None:
        """Marks the states with what the last step has written."""
        if not self._stepped:
            return
        samples = dict(chain.from_iterable(known() for known in self._samples))
        for (weight, state), version, memory in zip(
            self._weights, self._versions, self._memory, strict=True
        ):
            version += self._steps
            if not (state.mark and state.mark.is_later(weight, version)):
                state.mark = Mark(weakref.ref(weight), version, *memory, samples.get(weight))

    def _look_at_each(self) -> int:
        self.forgotten = sum(
            forget(weight, state)
            for weight, state in self._weights
            if not (state.mark and state.mark.untouched(weight))
        )
        self._versions, self._steps = [weight._version for weight, _ in self._weights], 0
        self._sum = sum(self._versions)
        return self.forgotten


def residue_of(state: dict[str, Any]) -> Any:
    """The bits of its weight that a state keeps: the remainder, the compensation, or None."""
    return next((state[name] for name in ("remainder", "kahan") if name in state), None)


def forget(weight: Tensor, state: Any) -> bool:
    """Sets low bits that are not the weight's to zero; returns whether there were any."""
    found = is_stale(weight, state)
    if found:
        local(residue_of(state)).zero_()
    state.mark = None
    return found


def is_stale(weight: Tensor, state: Any) -> bool:
    """Tells whether others have written to the weight since, and its low bits are not zero."""
    mark, residue = getattr(state, "mark", None), residue_of(state)
    return (
        residue is not None
        and mark is not None
        and not mark.fits(weight)
        and bool(local(residue).any())
    )


def claim(weight: Tensor, state: Any) -> int:
    """The checksum for a state dict, of a weight to which `claim_applies`.

    One that was loaded and not yet looked at stays: the weights may be loaded after the states.
    """
    return state.mark.checksum if awaits_weights(state) else checksum(weight)


def awaits_weights(state: Any) -> bool:
    """Tells whether a loaded checksum has not been compared with the weights yet."""
    mark = getattr(state, "mark", None)
    return mark is not None and mark.checksum is not None


def claim_applies(weight: Tensor) -> bool:
    """Tells whether a state dict's checksum is of all elements of this weight, in its order."""
    return not is_dtensor(weight) and not in_flat_parameter(weight) and weight.is_contiguous()
