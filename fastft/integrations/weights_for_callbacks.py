"""Trainer with `offload="overlap"`: its model is followed, and who looks finds finished weights.

Between a step and the next forward weights wait for their updates. torch brings each that it is
asked about (fastft/foreign/awaited.py), but callbacks of others may look by other ways, so that all
updates are made before any event that one of them handles. Those of Trainer and of fastft look by
none.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from fastft.foreign import engines
from fastft.optim.adamw import AdamW
from fastft.stack import callers

# below "transformers", so that its verbosity rules
logger = logging.get_logger(f"transformers.{__name__}")

_EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
# between a step and the next forward, each time
_OFTEN = ("on_optimizer_step", "on_step_end", "on_step_begin")
_OWN = ("transformers", "fastft")


class _FinishFirst(TrainerCallback):
    """The first callback of a Trainer: before an event that others handle all updates are made."""

    def __init__(self, handler: Any) -> None:
        self._handler, self._said = weakref.ref(handler), False

    def before(self, event: str, optimizer: AdamW) -> None:
        """Makes all updates if somebody else handles `event`, or the training ends."""
        others = [
            type(one).__name__
            for one in getattr(self._handler(), "callbacks", ())
            if _is_anothers(one) and _handles(one, event)
        ]
        if others or event == "on_train_end":
            optimizer.flush()
        if others and event in _OFTEN and not self._said:
            self._said = True
            logger.warning(
                f"fastft: {', '.join(others)} may look at the weights after every step ({event}), "
                'so that all are updated by then: with offload="overlap" nothing overlaps here'
            )


def _handler(event: str) -> Callable[..., None]:
    def handle(self: _FinishFirst, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        inner = engines.inner_optimizer(optimizer)
        if isinstance(inner, AdamW):
            self.before(event, inner)

    return handle


for _event in _EVENTS:
    setattr(_FinishFirst, _event, _handler(_event))


def _is_anothers(callback: Any) -> bool:
    return type(callback).__module__.partition(".")[0] not in _OWN


def _handles(callback: Any, event: str) -> bool:
    own = vars(callback).get(event)
    return own is not None or getattr(type(callback), event) is not getattr(TrainerCallback, event)


def follow_training(
    args: TrainingArguments, model: nn.Module, optimizer: Any, kept: contextlib.ExitStack
) -> None:
    """Lets an AdamW with `offload="overlap"` overlap in the training that begins, until `kept` is
    closed; nothing where another optimizer trains. For callbacks at train begin.

    Raises:
        ValueError: DataParallel trains, whose copies of the model are made anew at each forward.
    """
    inner = engines.inner_optimizer(optimizer)
    if not isinstance(inner, AdamW) or inner.offload != "overlap":
        return
    if args.n_gpu > 1:
        raise ValueError(
            'offload="overlap" under DataParallel, which copies all weights before each forward: '
            "start one process for each device (FSDP2), or let one device be seen "
            "(CUDA_VISIBLE_DEVICES)"
        )
    inner.follow(model)
    kept.callback(inner.follow, None)
    trainer = _trainer()
    handler = getattr(trainer, "callback_handler", None)
    if handler is None or any(isinstance(one, _FinishFirst) for one in handler.callbacks):
        return
    first = _FinishFirst(handler)
    # another list: the handler is going through this one, and would come to somebody twice
    handler.callbacks = [first, *handler.callbacks]
    # what `kept` refers to may not lead to its owner
    kept.callback(_take_off, weakref.ref(handler), first)


def _take_off(handler: weakref.ref[Any], first: TrainerCallback) -> None:
    there = handler()
    if there is not None:
        there.callbacks = [one for one in there.callbacks if one is not first]


def _trainer() -> Trainer | None:
    """The Trainer whose training begins."""
    for frame in callers():
        if frame.f_code.co_name == "_inner_training_loop":
            trainer = frame.f_locals.get("self")
            if isinstance(trainer, Trainer):
                return trainer
    return None
