"""The step over parameters whose states are on the host: piece by piece past the same kernel.

Three queues beside the model's: one copies a piece's states into a staging buffer, one runs the
kernel, one copies the states back. With two buffers the first works at the next piece while the
last still has the one before; what bounds a step is the slower direction of the bus.

Where host and device are one memory nothing is staged, and the same pieces are updated in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fastft.optim.adamw_part import (
    PartTensors,
    check_dense,
    like,
    operator_lists,
    same_layout,
    samples_of,
    table_of,
)
from fastft.optim.adamw_update import ADAMW
from fastft.optim.offload import device as devices
from fastft.optim.offload import pieces
from fastft.optim.offload.device import Event
from fastft.optim.offload.pieces import Span


class _Piece(NamedTuple):
    """A piece, and where it is staged.

    Attributes:
        spans: what is updated.
        natural: whether a span's parameter lies as its state.
        states: the operator's lists of states, on the device.
        table: the operator's.
        copies: parts of states on the host, each with its place in the buffer.
        grads: places in the buffer for gradients; none where they are never on the host.
        buffer: which of the two.
    """

    spans: list[Span]
    natural: list[bool]
    states: tuple[list[Tensor], ...]
    table: Tensor
    copies: list[tuple[Tensor, Tensor]]
    grads: list[Tensor]
    buffer: int


class _Step(NamedTuple):
    """All that a step depends on, as it was when the step began."""

    grads: list[Tensor]
    update: Callable[..., None]
    hyper: Tensor
    factor: Tensor
    seed: int


class StreamedPart:
    """The step over parameters whose states are on the host.

    `begin` fixes all that it depends on, `run` updates some parameters or all that are left,
    `finish` waits until the host may look at the states.

    Args:
        device: the parameters'.
        positions: where they are among the plan's; None: they are all of them.
        tensors: parameters and states.
        impl: the optimizer's.
        held: whether gradients may be on the host as well.

    Attributes:
        torn: what has broken off a step in its middle.
        staging: bytes of the buffers on the device.
    """

    torn: BaseException | None = None

    def __init__(
        self,
        device: torch.device,
        positions: list[int] | None,
        tensors: PartTensors,
        impl: str,
        held: bool,
    ) -> None:
        self.device, self.positions, self.impl, self.tensors = device, positions, impl, tensors
        ADAMW.resolve(impl, device)  # raises where an explicit engine is not there
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._memory = tensors.memory()
        self._there = devices.of(device)
        self._forms = [
            pieces.form(param, entries, held)
            for param, entries in zip(tensors.params, tensors.entries, strict=True)
        ]
        cut = pieces.cut(self._forms, pieces.BUFFER)
        sizes = pieces.buffers(self._forms, cut) if self._there.separate else []
        self._buffers, self.staging = list(map(self._there.memory, sizes)), sum(sizes)
        self._free: list[Event | None] = [None, None]  # when a buffer's states are on the host
        self._pieces = [self._piece(number, spans, held) for number, spans in enumerate(cut)]
        self._into, self._work, self._out = (self._there.queue() for _ in range(3))
        self._step: _Step | None = None
        self._left: list[int] = []  # pieces of this step
        self._samples: list[tuple[Tensor, int]] = []

    def _piece(self, number: int, spans: list[Span], held: bool) -> _Piece:
        tensors = self.tensors
        rows = [
            tensors.rows[span.place]._replace(first=tensors.rows[span.place].first + span.begin)
            for span in spans
        ]
        natural = [
            same_layout(tensors.params[span.place], tensors.layouts[span.place]) for span in spans
        ]
        hosts = [self._entries(span) for span in spans]
        staged, copies, grads = hosts, [], []
        if self._there.separate:
            take = _Room(self._buffers[number % 2]).take
            staged = [[take(part.shape, part.dtype) for part in parts] for parts in hosts]
            copies = list(zip(chain(*hosts), chain(*staged), strict=True))
            if held:
                grads = [
                    take(parts[1].shape, tensors.params[span.place].dtype)
                    for span, parts in zip(spans, hosts, strict=True)
                ]
        states = operator_lists(staged, rows)
        return _Piece(spans, natural, states, table_of(rows), copies, grads, number % 2)

    def _elements(self, tensor: Tensor, span: Span) -> Tensor:
        return pieces.part(tensor, span, self._forms[span.place])

    def _entries(self, span: Span) -> list[Tensor]:
        """The span's parts of its parameter's state."""
        form = self._forms[span.place]
        # behind a state's may come a gradient's
        pairs = zip(self.tensors.entries[span.place], form.staged, strict=False)
        return [pieces.part(entry, span, form, each) for entry, (_, each) in pairs]

    def holds(self) -> bool:
        """Tells whether shards and memory are as before."""
        return not self.tensors.has_other_shards() and self.tensors.memory() == self._memory

    def step(
        self, all_grads: Sequence[Tensor], hyper: Tensor, grad_factor: Tensor | None, seed: int
    ) -> bool:
        """Updates all parameters; True."""
        self.begin(all_grads, hyper, grad_factor, seed)
        self.run()
        self.finish()
        return True

    def begin(
        self, all_grads: Sequence[Tensor], hyper: Tensor, grad_factor: Tensor | None, seed: int
    ) -> None:
        """Fixes what the step depends on; nothing is updated where it raises."""
        grads = all_grads if self.positions is None else [all_grads[i] for i in self.positions]
        check_dense(grads)
        params = self.tensors.params
        update = ADAMW.implementation(self.impl, self.device, params, grads)
        factor = self._one if grad_factor is None else grad_factor.to(self.device)
        laid = [self._laid(grad, place) for place, grad in enumerate(grads)]
        self._step = _Step(laid, update, hyper, factor, seed)
        self._left, self._samples = list(range(len(self._pieces))), []
        # weights, gradients and the factor are the model's queue's, and so was what the buffers'
        # memory had before; each kernel waits for copies that come behind
        self._into.wait(self._there.current().record())

    def _laid(self, grad: Tensor, place: int) -> Tensor:
        """A gradient in the layout of its parameter's state; one of the host that lies otherwise,
        or has another dtype than the parameter, does not fit its place in a buffer."""
        layout, dtype = self.tensors.layouts[place], self.tensors.params[place].dtype
        fits = same_layout(grad, layout) and grad.dtype == dtype
        if not fits and self._there.separate and self._there.reaches(grad):
            memory = self._there.memory(grad.nbytes).view(grad.dtype)
            brought = memory.as_strided(grad.shape, grad.stride())
            self._there.current().copy(brought, grad)
            grad = brought
        return like(grad, layout)

    def run(self, places: Collection[int] | None = None) -> Event:
        """Updates those at these places, or all, that this step has not updated yet.

        Returns:
            An event behind the updates. Neither the host nor the model's queue has waited for it.
        """
        chosen = [
            number
            for number in self._left
            if places is None or any(span.place in places for span in self._pieces[number].spans)
        ]
        try:
            for number in chosen:
                self._run_piece(self._pieces[number])
                self._left.remove(number)
            # before anybody else can write there, or change what they are
            if not self._there.separate:
                self._samples += samples_of(self.tensors, self.device, places)
        except BaseException as error:
            self.torn = error
            self.settle()
            raise
        return self._work.record()

    def _run_piece(self, piece: _Piece) -> None:
        step = self._step
        assert step is not None
        grads = [self._elements(step.grads[span.place], span) for span in piece.spans]
        if self._there.separate:
            free = self._free[piece.buffer]
            if free is not None:
                self._into.wait(free)
            for host, staged in piece.copies:
                self._into.copy(staged, host)
            for i, place in enumerate(piece.grads):
                if self._there.reaches(grads[i]):
                    self._into.copy(place, grads[i])
                    grads[i] = place
            self._work.wait(self._into.record())
        # a plan that kept parts of weights would keep memory that `p.data = ...` lets go of
        wholes = [self.tensors.params[span.place].data for span in piece.spans]
        params = [
            self._elements(whole, span) if natural else whole
            for whole, span, natural in zip(wholes, piece.spans, piece.natural, strict=True)
        ]
        changed = [*params, *chain(*piece.states)]
        self._work.launch(
            functools.partial(self._update, piece, step, params, grads),
            reads=[*grads, step.factor, *changed],
            writes=changed,
        )
        self._out.wait(self._work.record())
        for host, staged in piece.copies:
            self._out.copy(host, staged)
        self._free[piece.buffer] = self._out.record()

    def _update(
        self, piece: _Piece, step: _Step, params: list[Tensor], grads: list[Tensor]
    ) -> None:
        """Runs the kernel; a parameter that lies otherwise than its state is copied there and
        back."""
        laid: dict[int, Tensor] = {}
        parts = []
        for param, span, natural in zip(params, piece.spans, piece.natural, strict=True):
            if not natural and span.place not in laid:
                laid[span.place] = like(param, self.tensors.layouts[span.place])
            parts.append(param if natural else self._elements(laid[span.place], span))
        step.update(parts, grads, *piece.states, piece.table, step.hyper, step.factor, step.seed)
        for place, updated in laid.items():
            self.tensors.params[place].data.copy_(updated)

    def finish(self) -> None:
        """Ends a step of which all was run: waits until the states are on the host."""
        self.settle()
        self._step = None

    def settle(self) -> None:
        """Lets the host wait for all that was put into the queues."""
        self._out.record().synchronize()

    def samples(self) -> list[tuple[Tensor, int]]:
        """The weights whose sampled checksum of what the last step wrote is known, with it."""
        return self._samples


class _Room:
    """A buffer that is given out from its beginning on."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer, self._end = buffer, 0

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        begin, size = self._end, shape.numel() * dtype.itemsize
        self._end = begin + -(-size // pieces.ALIGNMENT) * pieces.ALIGNMENT
        return self._buffer[begin : begin + size].view(dtype).view(shape)
