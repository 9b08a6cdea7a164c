"""What the engine needs of a device: queues of work, events, copies that nobody waits for, memory.

A queue does what is put into it one after the other. Two queues, and the host, go on beside each
other; only events order them: `queue.wait(event)` lets the queue wait, `event.synchronize()` the
host, for everything that was in another queue when the event was recorded. All work on a device,
and each wait, goes through this interface, so that a test can put a scheduler in its place which
does the work in any order that the waits allow (tests/support/scheduler.py).

The rules of whoever uses it:

* `launch` names what the work reads and writes; a queue must have waited for whoever wrote or read
  it before.
* A tensor whose memory was allocated under another queue is kept alive until that queue has waited
  for its last use: the allocator gives memory back to the queue that it was allocated under.
* The host looks at host memory only after it has synchronized with the last copy there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastft.optim.offload import page_locked


class Event(Protocol):
    """A place in a queue."""

    def synchronize(self) -> None:
        """Lets the host wait until the queue has come there."""


class Queue(Protocol):
    """Work of a device, in order."""

    def launch(
        self, work: Callable[[], Any], reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> None:
        """Puts `work` into the queue: calls of torch and of kernels, which do not wait."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copies between host and device, or within one of them; forms and dtypes are equal."""

    def record(self) -> Event:
        """The place behind what is in the queue now."""

    def wait(self, event: Event) -> None:
        """Lets what comes into the queue from now on wait for an event of another."""


class Device(Protocol):
    """A device and the host beside it.

    Attributes:
        separate: whether host memory is another memory than the device's. Where it is not, nothing
            needs to be staged.
    """

    separate: bool

    def current(self) -> Queue:
        """The queue that torch puts work into now: the model's, or FSDP2's in its hooks."""

    def queue(self) -> Queue:
        """A new queue beside the others."""

    def memory(self, size: int) -> Tensor:
        """Memory of the device: uint8, (size,), allocated under the current queue."""

    def host_memory(self, size: int) -> Tensor:
        """Memory of the host that the device copies from and to by itself: uint8, (size,). Let go
        of, it stays until the device is done with it."""

    def reaches(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in such memory of the host."""


class _Done:
    """The event of a queue whose work is done as it comes."""

    def synchronize(self) -> None:
        pass


class _AtOnce:
    """The queue of a CPU: what is launched is done when `launch` returns."""

    def launch(
        self, work: Callable[[], Any], reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> None:
        work()

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def record(self) -> Event:
        return _Done()

    def wait(self, event: Event) -> None:
        pass


class Host:
    """A CPU, whose memory is the host's own."""

    separate = False
    _queue = _AtOnce()

    def current(self) -> Queue:
        return self._queue

    def queue(self) -> Queue:
        return self._queue

    def memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    host_memory = memory

    def reaches(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"


class _Stream:
    """A stream of an accelerator."""

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream

    def launch(
        self, work: Callable[[], Any], reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> None:
        with self._entered():
            work()

    def copy(self, to: Tensor, source: Tensor) -> None:
        with self._entered():
            to.copy_(source, non_blocking=True)

    def record(self) -> Event:
        return self._stream.record_event()

    def wait(self, event: Any) -> None:
        self._stream.wait_event(event)

    def _entered(self) -> contextlib.AbstractContextManager[Any]:
        return self._stream


class Accelerator:
    """A device of torch's accelerator API with memory of its own."""

    separate = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current(self) -> Queue:
        return _Stream(torch.accelerator.current_stream(self._device))

    def queue(self) -> Queue:
        return _Stream(torch.Stream(device=self._device))

    def memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def host_memory(self, size: int) -> Tensor:
        if self._device.type == "cuda" and size:
            return page_locked.memory(size, self._device)
        # torch's allocator rounds up to a power of two
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def reaches(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and (tensor.numel() == 0 or tensor.is_pinned())


@functools.cache
def of(device: torch.device) -> Device:
    """The device, and the host beside it; a test puts its own in this function's place.

    Raises:
        RuntimeError: it has no queues beside the one that torch works in.
    """
    if device.type == "mps":
        raise RuntimeError(
            "offload needs a device that copies beside its work; a Mac's GPU has the host's memory "
            "anyway: leave out offload"
        )
    return Host() if device.type == "cpu" else Accelerator(device)
