"""A device for tests, which finds every wait that is missing: the adversary of
fastft/optim/offload.

It stands in the place of `device.of`. Side queues hold their work back and do it in any order that
the waits allow. Work of the model (plain torch) runs as it comes, on the current queue, and a
dispatch mode sees it. What is found:

    Race    two queues, or a queue and the host, touch the same bytes, one of them writes, and
            nothing makes the later one wait for the earlier (vector clocks: in whatever order it
            has run here). The sentence has the lines of both.
    Freed   device memory was let go of while a queue other than its own had still to use it.
    poison  0xFF, which is NaN in fp32 and bf16, fills fresh memory, and memory that is going to be
            overwritten as soon as its last use is over: who reads too early, or late, or what
            `launch` was not told of, gets numbers that no test takes for right.

What is in `writes` and not in `reads` of a launch is written as a whole: poisoned before. Copies
and launches are held back with weak references to device memory, as a device would; host memory is
kept alive, as torch's allocator of pinned memory does.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.optim.offload import device as device_room

_TORCH = os.path.dirname(torch.__file__)
_OPTIMIZER = os.path.dirname(os.path.dirname(device_room.__file__))
_HIDDEN = (__file__, device_room.__file__, contextlib.__file__, functools.__file__)


class Race(AssertionError):
    """Nothing orders two uses of the same memory."""


class Freed(AssertionError):
    """Memory was let go of while it was still to be used."""


class Scheduler:
    """A `Device` (fastft/optim/offload/device.py) whose memory and host are this process's.

    Args:
        order: when queues work. "late": only when somebody waits; "early": at once; or a Random
            (also one of hypothesis), or its seed, which decides at each call.
        without: (end of a file's name, lines): waits called there, or by what is called there, are
            ignored, and counted in `ignored`.
        watched: whether a dispatch mode sees the model's work (not under torch.compile).

    Attributes:
        device_bytes, device_peak: of `memory`, of plain tensors that fastft's optimizer makes, and
            of parameters given to `count` and their gradients, as seen at each allocation and
            each wait.
        host_bytes, host_peak: of `host_memory`.
    """

    separate = True

    def __init__(
        self,
        order: str | int | Random = "late",
        *,
        without: tuple[str, range] | None = None,
        watched: bool = True,
    ) -> None:
        self._order = Random(order) if isinstance(order, int) else order
        self._without, self._watched = without, watched
        self.ignored = 0
        self.faults: list[AssertionError] = []
        self._inside = False  # the scheduler's own work, which nobody races with
        self._numbers = itertools.count()
        self.host = _Queue(self, "the host", at_once=True)
        self.model = _Queue(self, "the current queue", at_once=True)
        self._queues = [self.model]
        self._current = self.model
        self._known: dict[int, _Memory] = {}
        self._crowd = 1000  # known memories, many of which will have gone
        self._params: list[Tensor] = []
        self.device_bytes = self.device_peak = self.host_bytes = self.host_peak = 0

    # the interface

    def current(self) -> _Queue:
        return self._current

    def queue(self) -> _Queue:
        queue = _Queue(self, f"queue {len(self._queues)}")
        self._queues.append(queue)
        return queue

    def memory(self, size: int) -> Tensor:
        return self._allocated(size, self._current)

    def host_memory(self, size: int) -> Tensor:
        return self._allocated(size, None)

    def reaches(self, tensor: Tensor) -> bool:
        return self.memory_of(tensor).owner is None

    # for tests

    @contextlib.contextmanager
    def installed(self) -> Iterator[Scheduler]:
        """Is the device of every tensor; at the end all work is done, and what was found is
        raised, if the code under it has swallowed it."""
        of, device_room.of = device_room.of, lambda device: self
        try:
            with _Watch(self) if self._watched else contextlib.nullcontext():
                yield self
            self.finish()
        finally:
            device_room.of = of
        if self.faults:
            raise self.faults[0]

    @contextlib.contextmanager
    def under(self, queue: _Queue) -> Iterator[None]:
        """Lets the model's work run in another queue, as FSDP2's hooks do."""
        before, self._current = self._current, queue
        queue.at_once, was = True, queue.at_once
        self._force(queue, queue.count)
        try:
            yield
        finally:
            self._current, queue.at_once = before, was

    def count(self, params: Iterable[Tensor] = ()) -> None:
        """Looks what is there; these parameters and their gradients are memory of the device."""
        self._params += params
        self._sweep()

    def finish(self) -> None:
        """Does all work, and looks for memory that went too early."""
        self._sweep()
        for queue in self._queues:
            self._force(queue, queue.count)

    # memory

    def _allocated(self, size: int, owner: _Queue | None) -> Tensor:
        with self._own():
            tensor = torch.full((size,), 0xFF, dtype=torch.uint8)
        self._known[tensor.untyped_storage()._cdata] = _Memory(tensor, owner, allocated=True)
        self._sweep()
        self._step()
        if owner is not None:  # whose earlier work may still use what the allocator gives out again
            owner.tick()
            self.touch(owner, tensor, True, f"the allocation at {_place()}")
        return tensor

    def memory_of(self, tensor: Tensor) -> _Memory:
        number = tensor.untyped_storage()._cdata
        memory = self._known.get(number)
        if memory is None:
            memory = self._known[number] = _Memory(tensor, self._current, allocated=False)
        return memory

    def _sweep(self) -> None:
        """Looks for memory that has gone, and counts what is there."""
        gone = [number for number, memory in self._known.items() if memory.weak.expired()]
        for number in gone:
            memory = self._known.pop(number)
            if memory.owner is None:
                continue
            for access in memory.accesses:
                if not (memory.owner.knows(access) or self.host.knows(access)):
                    self.fail(
                        Freed,
                        f"{access} and the memory was let go of before {memory.owner} had waited "
                        f"for that: noticed at {_place()}",
                    )
        alive = [memory for memory in self._known.values() if memory.allocated]
        self.host_bytes = sum(memory.size for memory in alive if memory.owner is None)
        self.device_bytes = sum(memory.size for memory in alive if memory.owner is not None)
        with torch._C.DisableTorchFunctionSubclass():
            of_model = [p.grad for p in self._params if p.grad is not None] + self._params
            local = [t for t in map(_local, of_model) if not _dispatches(type(t))]
            storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in local}
        self.device_bytes += sum(
            storage.nbytes()
            for number, storage in storages.items()
            if number not in self._known or not self._known[number].allocated
        )
        self.device_peak = max(self.device_peak, self.device_bytes)
        self.host_peak = max(self.host_peak, self.host_bytes)

    # order

    def _step(self) -> None:
        """At each call of the interface: somebody may work now."""
        if self._order == "late":
            return
        while ready := [queue for queue in self._queues if queue.is_ready()]:
            if isinstance(self._order, Random):
                choice = self._order.randint(0, len(ready))
                if choice == len(ready):
                    return
                self._run_first(ready[choice])
            else:
                self._run_first(ready[0])

    def _force(self, queue: _Queue, at: int) -> None:
        """Does what is in a queue up to a place, and first what that waits for."""
        while queue.items and queue.items[0].at <= at:
            self._run_first(queue)

    def _run_first(self, queue: _Queue) -> None:
        item = queue.items[0]
        if item.needs is not None:
            self._force(item.needs.queue, item.needs.at)
        queue.items.popleft()
        with self._own():
            try:
                item.run()
            except Freed as error:
                self.fail(Freed, f"{item.place}: {error}")
        item.run = _nothing  # lets go of what it held
        for later, memories in item.awaited_by:
            later.before -= 1
            if not later.before:
                self._poison(memories)

    def _poison(self, memories: Iterable[_Weak]) -> None:
        with self._own():
            for weak in memories:
                tensor = weak.tensor()
                if tensor is not None:
                    tensor.view(torch.uint8).fill_(0xFF) if tensor.is_contiguous() else (
                        tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
                    )

    def poison_before(self, item: _Item, writes: Sequence[Tensor]) -> None:
        """Poisons what an item will overwrite, as soon as everybody before it is done with it."""
        before = {
            access.item
            for tensor in writes
            for access in self.memory_of(tensor).overlapping(*_span(tensor))
            if access.item is not None and access.item is not item and access.item.is_waiting()
        }
        memories, item.before = list(map(_Weak, writes)), len(before)
        for earlier in before:
            earlier.awaited_by.append((item, memories))
        if not before:
            self._poison(memories)

    @contextlib.contextmanager
    def _own(self) -> Iterator[None]:
        before, self._inside = self._inside, True
        try:
            with torch.no_grad():
                yield
        finally:
            self._inside = before

    # what is looked for

    def fail(self, kind: type[AssertionError], sentence: str) -> None:
        self.faults.append(kind(sentence))
        raise self.faults[-1]

    def is_ignored(self) -> bool:
        """Tells whether the wait that is being called is to be ignored."""
        if self._without is None:
            return False
        name, lines = self._without
        frame: types.FrameType | None = _caller()
        while frame is not None:
            if frame.f_lineno in lines and frame.f_code.co_filename.endswith(name):
                self.ignored += 1
                return True
            frame = frame.f_back
        return False

    def touch(
        self, queue: _Queue, tensor: Tensor, writes: bool, place: str, item: _Item | None = None
    ) -> None:
        """Notes a use of memory; raises where nothing orders it behind an earlier one."""
        begin, end = _span(tensor)
        if begin == end:
            return
        memory = self.memory_of(tensor)
        new = _Access(begin, end, queue, queue.count, place, writes, item)
        for old in memory.overlapping(begin, end):
            if (writes or old.writes) and not queue.knows(old):
                self.fail(Race, f"{old} and {new}: nothing makes the second wait for the first")
        memory.accesses = [
            old
            for old in memory.accesses
            if not (
                begin <= old.begin
                and old.end <= end
                and (writes or (not old.writes and old.queue is queue))
            )
        ]
        memory.accesses.append(new)

    def saw(self, func: Any, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Plain torch, of the model or of the host."""
        place = f"{_place()} ({func})"
        for queue in (self._current, self.host):
            queue.tick()
        self._current.join(self.host.clock)
        if func is torch.ops.aten._local_scalar_dense.default:
            self._force(self._current, self._current.count)
            self.host.join(self._current.clock)
        for tensors, wrote in ((reads, False), (writes, True)):
            for tensor in tensors:
                on_host = self.memory_of(tensor).owner is None
                self.touch(self.host if on_host else self._current, tensor, wrote, place)
        if len(self._known) > self._crowd:
            self._sweep()
            self._crowd = 2 * len(self._known) + 1000

    def made(self, func: Any, results: list[Tensor]) -> None:
        """Results of plain torch, of which those in new memory have been written just now."""
        fresh = [t for t in results if t.untyped_storage()._cdata not in self._known]
        if _caller().f_code.co_filename.startswith(_OPTIMIZER):
            for tensor in fresh:
                self.memory_of(tensor).allocated = True
        if "empty" in func.__name__:
            for tensor in fresh:
                self.memory_of(tensor)
        elif fresh:
            self.saw(func, [], fresh)


class _Queue:
    """A queue of the device, or the host. `clock`: up to which count it knows each to be done."""

    def __init__(self, scheduler: Scheduler, name: str, *, at_once: bool = False) -> None:
        self._scheduler, self.name, self.at_once = scheduler, name, at_once
        self.count = 0
        self.clock: dict[_Queue, int] = {}
        self.items: deque[_Item] = deque()

    def __repr__(self) -> str:
        return self.name

    def launch(
        self, work: Callable[[], Any], reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> None:
        run = work if self.at_once else _Weakened(work)
        self._put(run, reads, writes)

    def copy(self, to: Tensor, source: Tensor) -> None:
        if to.shape != source.shape or to.dtype != source.dtype:
            raise ValueError(
                f"a copy needs the same form and dtype on both sides, got {to.dtype} of "
                f"{tuple(to.shape)} from {source.dtype} of {tuple(source.shape)}"
            )
        ends = _Weak(to), _Weak(source)
        if self._scheduler.memory_of(to).owner is None:
            ends = _Kept(to), ends[1]
        if self._scheduler.memory_of(source).owner is None:
            ends = ends[0], _Kept(source)
        self._put(lambda: _copy(*ends), [source], [to])

    def record(self) -> _Event:
        self._scheduler._step()
        self.join(self._scheduler.host.clock)
        return _Event(self, self.tick(), dict(self.clock), self._scheduler)

    def wait(self, event: _Event) -> None:
        self._scheduler._sweep()  # memory that goes from here on goes behind the wait
        self._scheduler._step()
        _check_event(event)
        if self._scheduler.is_ignored():
            return
        self.join(event.clock)
        if self.at_once:
            self._scheduler._force(event.queue, event.at)
        else:
            self.items.append(_Item(self, self.tick(), _nothing, needs=event))

    def _put(self, run: Callable[[], Any], reads: Sequence[Tensor], writes: Sequence[Tensor]):
        scheduler, place = self._scheduler, _place()
        scheduler._step()
        self.join(scheduler.host.clock)
        item = None if self.at_once else _Item(self, self.tick(), run, place=place)
        if item is None:
            self.tick()
        read_too = [tensor for tensor in writes if any(_overlap(tensor, read) for read in reads)]
        overwritten = [tensor for tensor in writes if not any(tensor is r for r in read_too)]
        if item is not None:
            scheduler.poison_before(item, overwritten)
        for tensors, wrote in ((reads, False), (writes, True)):
            for tensor in tensors:
                scheduler.touch(self, tensor, wrote, place, item)
        if item is None:
            self._now(run, reads, writes)
        else:
            self.items.append(item)

    def _now(self, run: Callable[[], Any], reads: Sequence[Tensor], writes: Sequence[Tensor]):
        """Works at once, but lets the host have what comes out only later."""
        scheduler = self._scheduler
        on_host = [t for t in writes if scheduler.memory_of(t).owner is None]
        if on_host or any(scheduler.memory_of(t).owner is None for t in reads):
            scheduler._force(self, self.count)
        with scheduler._own():
            run()
            results = [(_Kept(tensor), tensor.clone()) for tensor in on_host]
        scheduler._poison([to for to, _ in results])
        for to, result in results:
            self.items.append(_Item(self, self.count, functools.partial(_deliver, to, result)))

    def is_ready(self) -> bool:
        return bool(self.items) and (
            self.items[0].needs is None or self.items[0].needs.has_happened()
        )

    def tick(self) -> int:
        self.count += 1
        self.clock[self] = self.count
        return self.count

    def join(self, clock: dict[_Queue, int]) -> None:
        for queue, at in clock.items():
            if at > self.clock.get(queue, 0):
                self.clock[queue] = at

    def knows(self, access: _Access) -> bool:
        """Tells whether an access is over for whatever comes next here."""
        return access.queue is self or self.clock.get(access.queue, 0) >= access.at


class _Event:
    """A place in a queue, with all that has happened before it."""

    def __init__(self, queue: _Queue, at: int, clock: dict[_Queue, int], scheduler: Scheduler):
        self.queue, self.at, self.clock, self._scheduler = queue, at, clock, scheduler

    def has_happened(self) -> bool:
        return not self.queue.items or self.queue.items[0].at > self.at

    def synchronize(self) -> None:
        self._scheduler._sweep()
        self._scheduler._step()
        if self._scheduler.is_ignored():
            return
        self._scheduler._force(self.queue, self.at)
        self._scheduler.host.join(self.clock)


class _Item:
    """Work in a queue, or a wait there. `awaited_by`: whoever overwrites what it uses, with what is
    to be poisoned when nobody of those `before` it has to use it any more."""

    def __init__(
        self,
        queue: _Queue,
        at: int,
        run: Callable[[], Any],
        *,
        needs: _Event | None = None,
        place: str = "",
    ) -> None:
        self.queue, self.at, self.run, self.needs, self.place = queue, at, run, needs, place
        self.before, self.awaited_by = 0, list[tuple[_Item, list[_Weak]]]()

    def is_waiting(self) -> bool:
        return bool(self.queue.items) and self.queue.items[0].at <= self.at


class _Access:
    """Somebody's use of some bytes of a storage."""

    def __init__(
        self,
        begin: int,
        end: int,
        queue: _Queue,
        at: int,
        place: str,
        writes: bool,
        item: _Item | None,
    ) -> None:
        self.begin, self.end, self.queue, self.at = begin, end, queue, at
        self.place, self.writes, self.item = place, writes, item

    def __str__(self) -> str:
        verb = "writes" if self.writes else "reads"
        return f"{self.place} {verb} bytes {self.begin} to {self.end} in {self.queue}"


class _Memory:
    """What is known of a storage. `owner`: the queue it was allocated under; None: host memory."""

    def __init__(self, tensor: Tensor, owner: _Queue | None, *, allocated: bool) -> None:
        storage = tensor.untyped_storage()
        self.weak, self.size = StorageWeakRef(storage), storage.nbytes()
        self.owner, self.allocated = owner, allocated
        self.accesses: list[_Access] = []

    def overlapping(self, begin: int, end: int) -> list[_Access]:
        return [old for old in self.accesses if old.begin < end and begin < old.end]


class _Weak:
    """A tensor, as far as its memory is still there."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._form = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> Tensor | None:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return None
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._form)

    def needed(self) -> Tensor:
        tensor = self.tensor()
        if tensor is None:
            raise Freed("work that was held back has lost its memory")
        return tensor


class _Kept:
    """A tensor that stays."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()

    def tensor(self) -> Tensor:
        return self._tensor

    needed = tensor


class _Weakened:
    """A function that holds the tensors of its closure, or of its arguments, no longer."""

    def __init__(self, work: Any) -> None:
        self._work = work
        owner = getattr(work, "__self__", None)
        if isinstance(owner, Tensor):
            work = functools.partial(getattr(type(owner), work.__name__), owner)
        if isinstance(work, functools.partial):
            self._work = _Weakened(work.func)
            self._arguments = _weakened(list(work.args)), _weakened(dict(work.keywords))
        elif isinstance(work, types.FunctionType):
            cells = [cell.cell_contents for cell in work.__closure__ or ()]
            self._cells, self._defaults = _weakened(cells), _weakened(list(work.__defaults__ or ()))
            # a copy without cells, lest it hold them
            self._work = work.__code__, work.__globals__, work.__name__

    def __call__(self, *args: Any) -> Any:
        work = self._work
        if isinstance(work, _Weakened):
            positional, named = map(_strong, self._arguments)
            return work(*positional, *args, **named)
        if isinstance(work, tuple):
            cells = tuple(map(types.CellType, _strong(self._cells)))
            work = types.FunctionType(*work, tuple(_strong(self._defaults)), cells)
        return work(*args)


def _weakened(value: Any) -> Any:
    if type(value) is Tensor:
        return _Weak(value)
    if isinstance(value, types.FunctionType | functools.partial):
        return _Weakened(value)
    return _with_entries(value, _weakened)


def _strong(value: Any) -> Any:
    return value.needed() if isinstance(value, _Weak) else _with_entries(value, _strong)


def _with_entries(value: Any, of: Callable[[Any], Any]) -> Any:
    """A container with `of` each of its entries; anything else as it is."""
    if type(value) in (list, tuple):
        return type(value)(map(of, value))
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map(of, value))
    if type(value) is dict:
        return {key: of(entry) for key, entry in value.items()}
    return value


class _Watch(TorchDispatchMode):
    """Tells the scheduler what plain torch reads and writes."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if FakeTensor in types:  # DTensors ask what an operation's result looks like
            return func(*args, **kwargs)
        if any(map(_dispatches, types)):
            return NotImplemented  # its own tensors come here after it
        if self._scheduler._inside or _is_view(func):
            return func(*args, **kwargs)
        written = _written(func)
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        named = [(i, value) for i, value in enumerate(args)] + list(kwargs.items())
        for name, value in named:
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if _has_memory(tensor):
                    (writes if name in written else reads).append(tensor)
        self._scheduler.saw(func, reads, writes)
        result = func(*args, **kwargs)
        if not written:
            results = result if isinstance(result, list | tuple) else (result,)
            self._scheduler.made(func, list(filter(_has_memory, results)))
        return result


def _has_memory(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    )


@functools.cache
def _is_view(func: Any) -> bool:
    return any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


@functools.cache
def _written(func: Any) -> frozenset[int | str]:
    """The places and names of the arguments that an operation writes to."""
    written = [
        (i, argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info and argument.alias_info.is_write
    ]
    return frozenset(itertools.chain.from_iterable(written))


def _copy(to: _Weak | _Kept, source: _Weak | _Kept) -> None:
    to.needed().copy_(source.needed())


def _deliver(to: _Kept, result: Tensor) -> None:
    to.needed().copy_(result)


def _nothing() -> None:
    pass


def _check_event(event: Any) -> None:
    if not isinstance(event, _Event):
        raise AssertionError(f"a queue waits for {event!r}, which no queue has recorded")


def _dispatches(kind: type) -> bool:
    """Tells whether tensors of a class are made of others, or of none."""
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def _local(tensor: Any) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage between its first element and its last."""
    if not tensor.numel():
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.storage_offset() * tensor.itemsize
    return begin, begin + (last + 1) * tensor.itemsize


def _overlap(one: Tensor, other: Tensor) -> bool:
    (a, b), (c, d) = _span(one), _span(other)
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata and a < d and c < b


def _caller() -> types.FrameType:
    """The frame that called the interface, or torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename in _HIDDEN or frame.f_code.co_filename.startswith(_TORCH)
    ):
        frame = frame.f_back
    return frame


def _place() -> str:
    frame = _caller()
    return f"{'/'.join(frame.f_code.co_filename.split(os.sep)[-2:])}:{frame.f_lineno}"
