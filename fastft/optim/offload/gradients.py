"""Gradients on the host: as backward makes one, it is copied there and its memory is given back.

    hook of p        | send:  wait for p.grad, its part of the norm, copy to the host
    a micro-batch    | fetch: the sum so far into a stage     | send: stage += p.grad, norm, copy
    step()           | waits for the copies; the gradients stream past the kernel with the states

A micro-batch is added on the device, as `p.grad += new` would: the same dtype, the same addition.
Where host and device have one memory the gradient itself is kept, and only `p.grad` looks as ever.

What a gradient is made of stays alive until the queue that it came in has waited for its copy.
`IN_FLIGHT` bounds the bytes of these, so that backward waits for the bus, not for memory. In
`p.grad` stands an `AbsentGradient`: it alone says whether there is a gradient, so that
`zero_grad()` of a model, and whatever else sets `p.grad`, does here what it does to a resident one.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.foreign.awaited import ask
from fastft.foreign.tensors import local, sharded_like
from fastft.optim.grad_norm import CHUNK, norm_engine, parts_of, write_parts
from fastft.optim.offload import device as devices
from fastft.optim.offload.absent import AbsentGradient
from fastft.optim.offload.device import Event, Queue
from fastft.optim.offload.hooks import Hooks, check_gradient, check_kind

IN_FLIGHT = 2**28  # bytes of gradients that wait for their copy; one may be larger
STAGE = 2**22  # elements of each of the two stages, which only micro-batches need
assert STAGE % CHUNK == 0  # a run in a stage has the norm's whole chunks

_ELSEWHERE = (
    "AdamW(offload='gradients' or 'overlap') keeps gradients on the host. Clip inside the step: "
    "AdamW(max_grad_norm=...), with Trainer fastft.fuse_clipping(trainer) or fastft.plug(trainer). "
    "GradScaler, DistributedDataParallel and what else needs all gradients on the device want "
    "offload='states'. One gradient is read by p.grad.clone(), and changed by "
    "p.grad = 0.5 * p.grad e.g."
)


class Slot:
    """A gradient's place on the host, for one filling after the other.

    Attributes:
        value: its numbers on the host, in the form that the gradient had.
        sums: its part of the norm, on the device.
        filling: how often it has been filled anew.
    """

    def __init__(self, lane: Lane, form: Tensor, param: Any) -> None:
        self.lane, self.form, self.filling = lane, _without_memory(form), 0
        self._param = weakref.ref(param)
        self.sent: Event  # the last copy to it
        count = parts_of(form.numel(), lane.engine)
        self.sums = lane.memory(8 * count).view(torch.float64)
        if lane.place.separate:
            bytes_ = lane.place.host_memory(form.numel() * form.element_size())
            self.flat = bytes_.view(form.dtype)
            self.value = self.flat.as_strided(form.shape, form.stride())

    def fits(self, form: Tensor) -> bool:
        """Whether a gradient of this form has its place here."""
        mine = self.form.shape, self.form.stride(), self.form.dtype, self.lane.device
        return mine == (form.shape, form.stride(), form.dtype, form.device)

    def make_room(self) -> None:
        """Before the slot is written: a step that has still to read it does so now."""
        param = self._param()
        if param is not None:
            ask(param)

    def runs(self) -> Iterator[slice]:
        """The elements, in runs that a stage holds; the norm may need all at once."""
        whole = self.lane.engine == "eager" or not self.form.is_contiguous()
        numel = self.form.numel()
        size = max(numel, 1) if whole else STAGE
        for begin in range(0, numel, size):
            yield slice(begin, min(begin + size, numel))


class Filling:
    """The keeper of a gradient: what a slot holds until it is filled anew."""

    refusal = _ELSEWHERE

    def __init__(self, slot: Slot) -> None:
        slot.filling += 1
        self._slot, self._number = slot, slot.filling

    @property
    def slot(self) -> Slot:
        """The slot; raises where it has the numbers of a later backward pass by now."""
        if self._slot.filling != self._number:
            raise RuntimeError(
                "this gradient was thrown away, and the memory on the host has another one by now: "
                "keep p.grad.clone() where an older gradient is needed"
            )
        return self._slot

    @property
    def sums(self) -> Tensor:
        """The part of the norm, which the current queue has waited for."""
        self.slot.lane.arrive()
        return self.slot.sums

    def read(self) -> Tensor:
        """The numbers, in new memory of the device."""
        return self.slot.lane.read(self.slot)

    def add(self, new: Tensor) -> None:
        """`p.grad += new`."""
        check_kind(new)
        slot = self.slot
        slot.lane.add(slot, local(new).detach().expand(slot.form.shape))

    def zero(self) -> None:
        """`p.grad.zero_()`."""
        form = self.slot.form
        zeros = torch.empty_strided(
            form.shape, form.stride(), dtype=form.dtype, device=self.slot.lane.device
        )
        self.slot.lane.put(self.slot, zeros.zero_())


class _InUse(NamedTuple):
    """Memory that the side queues use, the queue that it is of, and the end of that use.

    A gradient on its way to the host, or a stage.
    """

    memory: Tensor
    queue: Queue
    end: Event


class Lane:
    """The way of gradients between a device and the host.

    Args:
        device: of the gradients.
        impl: the optimizer's, which takes the norm.
    """

    def __init__(self, device: torch.device, impl: str) -> None:
        self.device, self.place = device, devices.of(device)
        self.engine = norm_engine(impl, device)
        self.fetch, self.send = self.place.queue(), self.place.queue()
        self.flying: deque[_InUse] = deque()
        self._bytes_flying = 0
        self.stages: deque[_InUse] = deque()
        self.owners: list[Queue] = []  # of the memory that lasts

    def memory(self, size: int) -> Tensor:
        """Memory of the device that lasts."""
        self.owners.append(self.place.current())
        return self.place.memory(size)

    def put(self, slot: Slot, gradient: Tensor) -> None:
        """Fills the slot with a gradient of its form."""
        slot.make_room()
        if not self.place.separate:
            slot.value = gradient
            self._take_part(slot, slice(0, gradient.numel()), gradient)
            return
        now = self.place.current()
        self.send.wait(now.record())
        flat = _flat(gradient)
        self._take_part(slot, slice(0, flat.numel()), gradient)
        self.send.copy(slot.flat, flat)
        self._depart(slot, gradient, now)

    def add(self, slot: Slot, gradient: Tensor) -> None:
        """Adds a gradient to the slot, as `p.grad += gradient`."""
        slot.make_room()
        if not self.place.separate:
            slot.value += gradient
            self._take_part(slot, slice(0, gradient.numel()), slot.value)
            return
        if gradient.stride() != slot.form.stride():
            laid = torch.empty_strided(
                slot.form.shape, slot.form.stride(), dtype=gradient.dtype, device=self.device
            )
            gradient = laid.copy_(gradient)
        now, flat = self.place.current(), _flat(gradient)
        self.send.wait(now.record())
        for run in slot.runs():
            self._add_run(slot, run, flat[run], now)
        self._depart(slot, gradient, now)

    def _add_run(self, slot: Slot, run: slice, new: Tensor, now: Queue) -> None:
        host = slot.flat[run]
        stage = self._stage(host.nbytes, now)
        memory = stage.memory[: host.nbytes].view(host.dtype)
        self.fetch.wait(stage.end)
        self.fetch.wait(slot.sent)
        self.fetch.copy(memory, host)
        self.send.wait(self.fetch.record())
        self.send.launch(lambda: memory.add_(new), [memory, new], [memory])
        form = slot.form
        total = memory if form.is_contiguous() else memory.as_strided(form.shape, form.stride())
        self._take_part(slot, run, total)
        self.send.copy(host, memory)
        self.stages.append(stage._replace(end=self.send.record()))

    def _stage(self, size: int, now: Queue) -> _InUse:
        """The stage whose last use is the older one; a new one where it has fewer bytes."""
        if len(self.stages) == 2:
            stage = self.stages.popleft()
            if len(stage.memory) >= size:
                return stage
            self._take_off(stage)
        return _InUse(self.memory(size), now, now.record())

    def _take_part(self, slot: Slot, run: slice, numbers: Tensor) -> None:
        """Takes the part of the norm of a run, all of whose numbers there are."""
        whole = self.engine == "eager"
        sums = slot.sums if whole else slot.sums[run.start // CHUNK : -(-run.stop // CHUNK)]
        work = partial(_write, sums, numbers, self.engine)
        self.send.launch(work, [numbers], [sums])

    def _depart(self, slot: Slot, gradient: Tensor, queue: Queue) -> None:
        slot.sent = self.send.record()
        self._take_off(_InUse(gradient, queue, slot.sent))
        while len(self.flying) > 1 and self._bytes_flying > IN_FLIGHT:
            self._land()

    def _take_off(self, use: _InUse) -> None:
        self.flying.append(use)
        self._bytes_flying += use.memory.nbytes

    def _land(self) -> None:
        use = self.flying.popleft()
        self._bytes_flying -= use.memory.nbytes
        use.queue.wait(use.end)

    def arrive(self) -> None:
        """Lets the current queue wait for all that was sent, and lets go of what it was sent of."""
        self.place.current().wait(self.send.record())
        while self.flying:
            self._land()

    def close(self) -> None:
        """Comes before memory that lasts is let go of."""
        self.arrive()
        end = self.place.current().record()
        for owner in self.owners:
            owner.wait(end)

    def read(self, slot: Slot) -> Tensor:
        """The numbers of a slot in new memory of the device."""
        if not self.place.separate:
            return slot.value.clone()
        now, flat = self.place.current(), self.place.memory(slot.flat.nbytes).view(slot.flat.dtype)
        now.wait(slot.sent)
        now.copy(flat, slot.flat)
        return flat.as_strided(slot.form.shape, slot.form.stride())


class HeldGradients:
    """The gradients of an optimizer's parameters, on the host.

    Args:
        impl: the optimizer's.
    """

    def __init__(self, impl: str) -> None:
        self._impl = impl
        self._lanes: dict[torch.device, Lane] = {}
        self._slots: dict[Tensor, Slot] = {}
        self._hooks = Hooks(self.hold)
        weakref.finalize(self, _let_go, self._lanes).atexit = False

    def watch(self, params: Sequence[Any]) -> None:
        """Holds from now on what backward makes for these parameters, and for no others."""
        for gone in self._hooks.watch(params):
            self._drop(gone)

    def _drop(self, param: Any) -> None:
        slot = self._slots.pop(param, None)
        if slot is not None:
            slot.lane.close()

    def hold(self, param: Any) -> None:
        """Sends `p.grad` to the host, if it is not there, and leaves an absent one in its place."""
        gradient = param.grad
        if gradient is None or isinstance(local(gradient), AbsentGradient):
            return
        check_gradient(param, gradient)
        part = local(gradient.detach())
        lane = self._lanes.get(part.device)
        if lane is None:
            lane = self._lanes[part.device] = Lane(part.device, self._impl)
        if lane.place.separate and not _is_dense(part):
            part = part.contiguous()
        slot = self._slots.get(param)
        if slot is None or not slot.fits(part):
            self._drop(param)
            slot = self._slots[param] = Slot(lane, part, param)
        filling = Filling(slot)
        lane.put(slot, part)
        param.grad = sharded_like(AbsentGradient(part, filling), gradient)

    def take(self, params: Sequence[Any]) -> None:
        """Before a step: also holds what no hook has seen, and waits for nothing on the host."""
        self.watch(params)
        for param in params:
            self.hold(param)

    def on_host(self, gradients: Iterable[Any]) -> list[Tensor]:
        """The numbers in the place of absent gradients, for work that waits for the current
        queue."""
        slots = [local(gradient).keeper.slot for gradient in gradients]
        for lane in {slot.lane for slot in slots}:
            lane.arrive()
        return [slot.value for slot in slots]


def _let_go(lanes: dict[torch.device, Lane]) -> None:
    """Gives memory back behind what is still done with it."""
    for lane in lanes.values():
        lane.close()


def _write(sums: Tensor, numbers: Tensor, engine: str) -> None:
    write_parts(sums, numbers.contiguous(), engine)


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor without gaps in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie without gaps, each once, in some order of its dimensions."""
    return (
        tensor.is_contiguous()
        or torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    )
