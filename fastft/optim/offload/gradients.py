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
from torch.utils.hooks import RemovableHandle

from fastft.foreign import sharding
from fastft.foreign.tensors import in_flat_parameter, is_dtensor, local, sharded_like
from fastft.optim.grad_norm import CHUNK, GRAD_NORM, parts_of, write_parts
from fastft.optim.offload import device as devices
from fastft.optim.offload.absent import AbsentGradient
from fastft.optim.offload.device import Event, Queue

IN_FLIGHT = 2**28  # bytes of gradients that wait for their copy; one may be larger
STAGE = 2**22  # elements of each of the two stages, which only micro-batches need
assert STAGE % CHUNK == 0  # a run in a stage has the norm's whole chunks

_ELSEWHERE = (
    "AdamW(offload='gradients') keeps gradients on the host. Clip inside the step: "
    "AdamW(max_grad_norm=...), with Trainer fastft.fuse_clipping(trainer) or fastft.plug(trainer). "
    "GradScaler, DistributedDataParallel and what else needs all gradients on the device want "
    "offload='states'. One gradient is read by p.grad.clone(), and set by p.grad = ..."
)


class Slot:
    """A gradient's place on the host, for one filling after the other.

    Attributes:
        value: its numbers on the host, in the form that the gradient had.
        sums: its part of the norm, on the device.
        filling: how often it has been filled anew.
    """

    def __init__(self, lane: Lane, form: Tensor) -> None:
        self.lane, self.form, self.filling = lane, _without_memory(form), 0
        self.sent: Event  # the last copy to it
        count = parts_of(form.numel(), lane.engine)
        self.sums = lane.place.memory(8 * count).view(torch.float64)
        if lane.place.separate:
            bytes_ = lane.place.host_memory(form.numel() * form.element_size())
            self.flat = bytes_.view(form.dtype)
            self.value = self.flat.as_strided(form.shape, form.stride())

    def fits(self, form: Tensor) -> bool:
        """Whether a gradient of this form has its place here."""
        mine = self.form.shape, self.form.stride(), self.form.dtype, self.lane.device
        return mine == (form.shape, form.stride(), form.dtype, form.device)

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
        self.slot.lane.arrive()
        return self.slot.sums

    def read(self) -> Tensor:
        return self.slot.lane.read(self.slot)

    def add(self, new: Tensor) -> None:
        _check_addend(new)
        self.slot.lane.add(self.slot, local(new).detach())

    def zero(self) -> None:
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
        has_norm = impl == "eager" or impl in GRAD_NORM.engines
        self.engine = GRAD_NORM.resolve(impl if has_norm else "auto", device)
        self.fetch, self.send = self.place.queue(), self.place.queue()
        self.flying: deque[_InUse] = deque()
        self.stages: deque[_InUse] = deque()

    def put(self, slot: Slot, gradient: Tensor) -> None:
        """Fills the slot with a gradient of its form."""
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
            self.flying.append(stage)
        return _InUse(self.place.memory(size), now, now.record())

    def _take_part(self, slot: Slot, run: slice, numbers: Tensor) -> None:
        """Takes the part of the norm of a run, all of whose numbers there are."""
        whole = self.engine == "eager"
        sums = slot.sums if whole else slot.sums[run.start // CHUNK : -(-run.stop // CHUNK)]
        work = partial(_write, sums, numbers, self.engine)
        self.send.launch(work, [numbers], [sums])

    def _depart(self, slot: Slot, gradient: Tensor, queue: Queue) -> None:
        slot.sent = self.send.record()
        self.flying.append(_InUse(gradient, queue, slot.sent))
        while len(self.flying) > 1 and sum(use.memory.nbytes for use in self.flying) > IN_FLIGHT:
            self._land()

    def _land(self) -> None:
        use = self.flying.popleft()
        use.queue.wait(use.end)

    def arrive(self) -> None:
        """Lets the current queue wait for all that was sent, and lets go of what it was sent of."""
        self.place.current().wait(self.send.record())
        while self.flying:
            self._land()

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
        self._handles: dict[Tensor, RemovableHandle] = {}
        removals: list[RemovableHandle] = []
        self._removals = removals
        weakref.finalize(self, _let_go, removals, self._lanes).atexit = False

    def watch(self, params: Sequence[Any]) -> None:
        """Holds from now on what backward makes for these parameters, and for no others."""
        kept = set(params)
        for param in [param for param in self._handles if param not in kept]:
            self._handles.pop(param).remove()
            self._slots.pop(param, None)
        self._removals[:] = self._handles.values()
        hold = weakref.WeakMethod(self.hold)  # a parameter must not keep its optimizer alive
        for param in params:
            if param.requires_grad and param.is_leaf and param not in self._handles:
                handle = param.register_post_accumulate_grad_hook(partial(_hold_if_alive, hold))
                self._handles[param] = handle
                self._removals.append(handle)

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
            slot = self._slots[param] = Slot(lane, part)
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


def check_gradient(param: Any, gradient: Any) -> None:
    """Raises where a gradient cannot be used and given back in the middle of a backward pass."""
    _check_addend(gradient)
    check_place(param)
    placements = getattr(gradient, "placements", None)
    if placements is None:
        return
    if placements != getattr(param, "placements", None):
        raise RuntimeError(
            f"a gradient has placements {placements}, its parameter {param.placements}: gradients "
            "on the host are those that FSDP2 shards as their parameters; use offload='states'"
        )
    if gradient.device_mesh.ndim > 1 and any(place.is_replicate() for place in placements):
        raise RuntimeError(
            f"gradients of placements {placements} are reduced in two queues (HSDP), and their "
            "memory cannot be given back in between: use offload='states'"
        )


def check_place(param: Any) -> None:
    """Raises where others still need the gradient when backward has made it."""
    what = "gradients are freed as backward makes them (offload='gradients', release_gradients), "
    if in_flat_parameter(param) or type(param).__name__ == "FlatParameter":
        raise RuntimeError(f"{what}which FSDP1's flat ones cannot be: use FSDP2")
    if sharding.world_size() > 1 and not is_dtensor(param):
        raise RuntimeError(
            f"{what}and in several processes only FSDP2 has reduced them by then: under "
            "DistributedDataParallel and DeepSpeed use offload='states'"
        )


def _check_addend(gradient: Any) -> None:
    """Raises for what no slot can hold."""
    if gradient.layout != torch.strided:
        raise RuntimeError(
            "AdamW does not take sparse gradients (an Embedding with sparse=True makes them)"
        )
    if gradient.requires_grad:
        raise RuntimeError(
            "backward(create_graph=True) makes gradients with a history, which cannot leave the "
            "device: train without offload='gradients' and release_gradients"
        )
    if gradient.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"gradients on the host are float32 or bfloat16, got {gradient.dtype}")


def _hold_if_alive(method: weakref.WeakMethod[Any], param: Tensor) -> None:
    hold = method()
    if hold is not None:
        hold(param)


def _let_go(handles: list[RemovableHandle], lanes: dict[torch.device, Lane]) -> None:
    """Takes the hooks off, and gives memory back behind what is still done with it."""
    for handle in handles:
        handle.remove()
    for lane in lanes.values():
        lane.arrive()


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
