"""The deferred step: everything of it is fixed at once, each weight is updated when it is needed.

Nothing needs a weight of a new step before that weight is used in the next forward, so that its
update, and the copies of its state, run beside the forwards of the layers before it. `step()` fixes
gradients, clip factor, learning rates, counts and random bits; what is left of it is this:

    awaited     a weight whose update has not run is of a class of its own (foreign/awaited.py):
                whatever torch is asked to do with it, by whoever and wherever, is preceded by its
                update. So no list of who reads which weight can be incomplete.
    hooks       before the forward of a module its own weights are asked for, which a kernel that
                torch does not know may read; and before FSDP2 gathers a unit, those of the unit
    ahead       while a weight is used, those that came after it in the last forward are updated in
                the engine's queues
    at once     what cannot be awaited is updated inside `step()`: a weight that is not the model's,
                of another class than torch's, in TorchScript, or whose memory another tensor of
                the model shares; under torch.compile, which compiles a model with weights of
                their usual class, all of them

Weights are updated in groups: those that one module owns. A weight counts as written when the step
that it belongs to was taken: versions and counts are as if all had been updated there.
"""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastft.foreign import awaited
from fastft.foreign.compiling import constant_when_compiled, is_compiled
from fastft.foreign.sharding import before_gathers
from fastft.foreign.tensors import storage_address
from fastft.optim import device_counts
from fastft.optim.offload import device as devices
from fastft.optim.offload.device import Event
from fastft.optim.offload.streamed import StreamedPart
from fastft.signals import Held

# Elements behind a weight in use whose updates are under way: two layers of a model of 8 B. With
# all of a model's copies in its queues at once a device would keep the host waiting.
AHEAD = 2**29


class LatePart(StreamedPart):
    """The parameters on one device, of which `step` updates none yet."""

    def step(
        self, all_grads: Sequence[Tensor], hyper: Tensor, grad_factor: Tensor | None, seed: int
    ) -> bool:
        """Fixes what the step depends on; True."""
        self.begin(all_grads, hyper, grad_factor, seed)
        return True


class _Group:
    """Weights that are updated together, and where."""

    def __init__(self, params: list[Any], places: dict[StreamedPart, list[int]]) -> None:
        self.params, self.places = params, places
        self.size = sum(param.numel() for param in params)
        self.events: list[tuple[torch.device, Event]] | None = None

    def launch(self) -> None:
        """Puts the update into the engine's queues, once."""
        if self.events is None:
            self.events = [(part.device, part.run(at)) for part, at in self.places.items()]

    def wait(self) -> None:
        """Lets whoever works on the devices now wait for the update."""
        for of, event in self.events or ():
            devices.of(of).current().wait(event)


class PendingStep:
    """A step that has begun, and whose weights are updated as they are asked for.

    Args:
        parts: the step's, with the parameters at their places.
        together: what is updated together, in the order in which it is expected to be asked for;
            parameters that are in none of these are updated now.

    Attributes:
        asked: the groups that have been asked for, in that order.
    """

    def __init__(
        self, parts: Sequence[tuple[Any, Sequence[Tensor]]], together: Iterable[Sequence[Tensor]]
    ) -> None:
        self._parts = [part for part, _ in parts]
        # should nobody wait any more for copies to the host's memory
        self._end = weakref.finalize(self, _settle, self._parts)
        self._end.atexit = False
        where = {
            id(param): (part, place, param)
            for part, params in parts
            for place, param in enumerate(params)
        }
        self._order: list[_Group] = []
        for params in together:
            of_step = [where.pop(id(param)) for param in params if id(param) in where]
            if of_step:
                self._order.append(_group(of_step))
        self._at = {id(group): at for at, group in enumerate(self._order)}
        self.asked: list[list[Tensor]] = []
        with awaited.undisturbed():
            if where:
                now = _group(where.values())
                now.launch()
                now.wait()
            for group in self._order:
                for param in group.params:
                    awaited.await_numbers(param, functools.partial(self._settle, group))
            self._launch_from(0)

    def flush(self) -> None:
        """Updates all that is left, and ends the step: the host may look at states and weights."""
        for group in self._order:
            if id(group) in self._at:
                self._settle(group)
        self._end.detach()
        for part in self._parts:
            part.finish()

    def _settle(self, group: _Group) -> None:
        """Brings a group's weights to whoever asks for one of them."""
        if device_counts.is_capturing():
            raise RuntimeError(
                "a CUDA graph captures code that reads weights whose update is still to come "
                '(offload="overlap"), and its replays would repeat that: call the optimizer\'s '
                "flush() before capturing"
            )
        with Held(), awaited.undisturbed():
            if id(group) not in self._at:
                return  # the handler of a signal has asked first
            group.launch()
            group.wait()
            for param in group.params:
                awaited.arrived(param)
            self.asked.append(group.params)
            self._launch_from(self._at.pop(id(group)) + 1)

    def _launch_from(self, at: int) -> None:
        """Launches what is likely to be asked for next, where that goes on beside other work."""
        size = 0
        for group in itertools.islice(self._order, at, None):
            if size >= AHEAD or not all(devices.of(p.device).separate for p in group.places):
                return
            size += group.size
            group.launch()


def _settle(parts: Sequence[Any]) -> None:
    for part in parts:
        part.settle()


def _group(of_step: Iterable[tuple[Any, int, Tensor]]) -> _Group:
    places: dict[Any, list[int]] = {}
    params = []
    for part, place, param in of_step:
        params.append(param)
        places.setdefault(part, []).append(place)
    return _Group(params, places)


class Followed:
    """A model before whose modules' forwards their weights are asked for.

    Args:
        model: whose parameters, as modules have them now, may be updated after a step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._order: dict[int, int] = {}
        self._compiled, self._said = is_compiled(model), False
        self._key = f"{id(self)}"  # a constant of compiled code
        _followed[self._key] = self
        hook = _AskFirst(self._key)
        self._undo: list[Callable[[], None]] = [
            module.register_forward_pre_hook(hook, prepend=True).remove
            for module in _modules(model)
            if module._parameters
        ]
        self._undo.append(before_gathers(model, _ask_for_gather))

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for undo in self._undo:
            undo()
        self._undo = []

    def is_traced(self) -> None:
        """torch.compile has come upon one of the hooks."""
        self._compiled = True

    def together(self) -> list[list[Tensor]]:
        """The weights that a step may leave to be updated when they are asked for: those that are
        updated together, in the order in which the last forward asked for them."""
        model = self._model()
        if model is None or self._is_compiled():
            return []
        return sorted(_awaitable(model), key=self._place_of)

    def learn(self, asked: Sequence[Sequence[Tensor]]) -> None:
        """Takes the order in which weights were asked for as that of the next forward."""
        self._order = {id(group[0]): at for at, group in enumerate(asked)}

    def _place_of(self, group: Sequence[Tensor]) -> int:
        return min(self._order.get(id(param), len(self._order)) for param in group)

    def _is_compiled(self) -> bool:
        if self._compiled and not self._said:
            self._said = True
            warnings.warn(
                'offload="overlap": torch.compile compiles the model, or a part of it, so that '
                "all weights are updated inside step(): the memory is saved, nothing overlaps",
                stacklevel=5,
            )
        return self._compiled


# by a number that compiled code has as a constant
_followed: weakref.WeakValueDictionary[str, Followed] = weakref.WeakValueDictionary()


class _AskFirst:
    """A forward pre-hook; copies and pickles of a model may keep it, which has nothing to ask for
    there."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            _is_traced(self.key)
        for param in module._parameters.values():
            if param is not None and awaited.is_awaited(param):
                awaited.ask(param)


@constant_when_compiled
def _is_traced(key: str) -> bool:
    followed = _followed.get(key)
    if followed is not None:
        followed.is_traced()
    return True


def _ask_for_gather(shards: Iterable[Tensor]) -> Event | None:
    """Asks for the parts that a unit of FSDP2 is about to gather; the event is behind them."""
    waiting = list(filter(awaited.is_awaited, shards))
    for shard in waiting:
        awaited.ask(shard)
    device = devices.of(waiting[0].device) if waiting else None
    return device.current().record() if device is not None and device.separate else None


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Those whose weights Python hands out."""
    return (one for one in model.modules() if not isinstance(one, torch.jit.ScriptModule))


def _awaitable(model: nn.Module) -> Iterator[list[Tensor]]:
    """The weights of the model that can be awaited, by the modules that own them.

    Not those whose memory another tensor of the model has too, by which it might be read.
    """
    tensors = {id(one): one for module in model.modules() for one in _tensors(module)}
    memory = {number: storage_address(one) for number, one in tensors.items()}
    users = Counter(memory.values())
    done = {
        id(param)
        for module in model.modules()
        if isinstance(module, torch.jit.ScriptModule)
        for param in module._parameters.values()
    }
    for module in _modules(model):
        own = {id(param): param for param in module._parameters.values() if param is not None}
        group: list[Tensor] = [
            param
            for number, param in own.items()
            if number not in done and awaited.can_be_awaited(param) and users[memory[number]] == 1
        ]
        done |= own.keys()
        if group:
            yield group


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    held = (module._parameters.values(), module._buffers.values(), vars(module).values())
    return (one for one in itertools.chain(*held) if isinstance(one, Tensor))
