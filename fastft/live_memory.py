"""Live tensor memory: what all tensors of a piece of code hold at its peak, by what they are for.

    live(t) = sum of bytes of the storages that exist at t;    peak = max live(t)

A storage counts from the operation which first shows it until nobody holds it any more; views
share it and cost nothing. What a kernel allocates for itself and frees before it returns is not
seen, except in fastft's operator of an output head, which is written in torch's operations and
looked into.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.loss.lazy.logits import LazyLogits
from fastft.loss.linear_rows import HEAD

ROLES = ("weights", "gradients", "optimizer", "activations", "logits")
HOST = "host"  # a role of tensors that are on the device's host: they count by themselves


class Block:
    """A storage: its size, what it is for, and when it was made."""

    __slots__ = ("bytes", "phase", "role")

    def __init__(self, bytes: int, role: str, phase: str) -> None:
        self.bytes, self.role, self.phase = bytes, role, phase


@dataclass(frozen=True)
class Peak:
    """The most that was live at a time, in bytes: in all, for each of `ROLES`, and in which
    phase; and the most logits, and the most on the host, which may be at other times."""

    bytes: int
    parts: dict[str, int]
    phase: str
    logits: int
    host: int = 0


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of live storages while it is entered.

    Args:
        classes: of the vocabulary: what is as wide counts as logits; 0: nothing does.

    Attributes:
        phase: the name of what goes on now, for the blocks to come: a backward pass is noticed
            without it.
    """

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.classes, self.phase = classes, "start"
        self._live: dict[int, tuple[Any, Block]] = {}
        self._events: list[tuple[Block, int]] = []  # 1: made, -1: freed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if LazyLogits in types:  # which answer for themselves, by operations on their operands
            return NotImplemented
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            self._see(tensor)  # made where no operation shows it, such as out of numpy's memory
        if func is HEAD.native:
            with self:
                result = self._run_head(args, kwargs)
        else:
            result = self._run(func, args, kwargs)
        for tensor in tensors_in(result):
            self._see(tensor)
        return result

    def _run_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return HEAD.reference(*args, **kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _see(self, tensor: Tensor) -> None:
        no_memory = isinstance(tensor, LazyLogits) or tensor.is_meta
        if no_memory or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        wide = tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[-1] == self.classes
        running = torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks
        phase = "backward" if running else self.phase
        block = Block(storage.nbytes(), "logits" if wide else "activations", phase)
        self._live[key] = weakref.ref(storage, lambda _: self._free(key)), block
        self._events.append((block, 1))

    def _free(self, key: int) -> None:
        _, block = self._live.pop(key)
        self._events.append((block, -1))

    def tag(self, role: str, tensors: Iterable[Tensor]) -> None:
        """Says what these tensors are for; what is on the host stays there."""
        for tensor in tensors:
            self._see(tensor)
            kept = self._live.get(tensor.untyped_storage()._cdata)
            if kept is not None and kept[1].role != HOST:
                kept[1].role = role

    @property
    def now(self) -> int:
        """A moment, for `peak`."""
        return len(self._events)

    def peak(self, begin: int = 0, end: int | None = None) -> Peak:
        """The peak between two moments, of all that was live then, whenever it was made."""
        events = self._events[:end]
        live = dict.fromkeys((*ROLES, HOST), 0)
        now, most, logits, host, at, parts = 0, -1, 0, 0, begin, dict(live)
        for place, (block, change) in enumerate(events):
            live[block.role] += change * block.bytes
            now += change * block.bytes * (block.role != HOST)
            if place >= begin:
                logits, host = max(logits, live["logits"]), max(host, live[HOST])
                if now > most:
                    most, at, parts = now, place, dict(live)
        del parts[HOST]
        phase = events[at][0].phase if events[at:] else self.phase
        return Peak(max(most, 0), parts, phase, logits, host)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an operation's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
