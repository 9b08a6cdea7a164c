"""Notes of the host on boundaries that lie on a device, for which it then need not wait.

Boundaries, cu_seqlens of S + 1 integers, are made on the host. They are needed there again at every
attention call: to check them, to cut rows into tiles, to know the longest segment. A batch that is
moved by its own `.to` notes them with the tensor on the device, and whoever copies the dict holds
that tensor still. Others are read, all that are asked for together with one wait, and noted too. A
note ends with its tensor. It counts for what was read alone:

    on a device    the tensor's version, which every operation in place raises, and its address
    on the host    the numbers themselves, which nobody waits for

Tensors of inference mode have no version: those on a device are read each time. Who writes to a
device's boundaries through `.data`, which has a version of its own, is not seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastft.foreign.tensors import write_stamp


@dataclass(eq=False)
class HostBoundaries:
    """The numbers of a tensor of boundaries.

    Attributes:
        ends: S + 1 integers.
        made: what follows from them, by names of those who made it once; never the tensor that they
            are noted with.
    """

    ends: list[int]
    made: dict[Hashable, Any] = field(default_factory=dict)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest segment; 0 if there is none."""
        return max((end - begin for begin, end in itertools.pairwise(self.ends)), default=0)


_notes: Any = WeakTensorKeyDictionary()  # by the tensor: its write_stamp, HostBoundaries


def known(boundaries: Tensor) -> HostBoundaries | None:
    """Finds what the host knows of `boundaries`; None where it would have to wait for a device."""
    stamp, noted = _notes.get(boundaries, (None, None))
    if boundaries.device.type == "cpu":
        ends = boundaries.tolist()
        return noted if noted is not None and noted.ends == ends else note(boundaries, ends)
    return noted if stamp is not None and stamp == write_stamp(boundaries) else None


def note(boundaries: Tensor, ends: list[int]) -> HostBoundaries:
    """Remembers that `boundaries` are `ends`, as long as nobody writes to them."""
    noted = HostBoundaries(ends)
    _notes[boundaries] = (write_stamp(boundaries), noted)
    return noted


def note_copy(source: Tensor, copy: Tensor) -> None:
    """Remembers of a copy on a device what the host knows of `source`; waits for nothing."""
    if copy is not source:
        noted = known(source)
        if noted is not None:
            note(copy, noted.ends)


def on_host(*boundaries: Tensor) -> list[HostBoundaries]:
    """Finds the numbers of each, and reads those that are not known: with one wait a device."""
    tensors_by_id = {id(tensor): tensor for tensor in boundaries}
    found = {key: known(tensor) for key, tensor in tensors_by_id.items()}
    unknown: dict[torch.device, dict[int, Tensor]] = {}
    for key, tensor in tensors_by_id.items():
        if found[key] is None:
            unknown.setdefault(tensor.device, {})[key] = tensor
    for tensors in unknown.values():
        numbers = iter(torch.cat(list(tensors.values())).tolist())
        for key, tensor in tensors.items():
            found[key] = note(tensor, list(itertools.islice(numbers, tensor.numel())))
    return [noted for tensor in boundaries if (noted := found[id(tensor)]) is not None]
