"""The next training of a model takes off what callbacks of an earlier one have left on it.

Trainer calls no callback after an exception, so that hooks, patched methods and changed
configurations stay on the model. The callback that put them there may be gone, and so may its
Trainer: what it keeps for its end must not refer to it, and is closed when nobody holds it any
more.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, NamedTuple

from torch import nn
from transformers import TrainerCallback

from fastft.foreign import base_model


class _Training(NamedTuple):
    state: Any  # Trainer makes one for each training
    callbacks: weakref.WeakSet[Any]


_of_model: weakref.WeakKeyDictionary[nn.Module, _Training] = weakref.WeakKeyDictionary()


def until_the_end_of(callback: TrainerCallback) -> contextlib.ExitStack:
    """Makes what `callback` closes to leave no trace; it closes when the callback is gone."""
    kept = contextlib.ExitStack()
    weakref.finalize(callback, kept.close).atexit = False
    return kept


def training_begins(model: nn.Module, state: Any, callback: Any) -> None:
    """Restores the callbacks of an earlier training of `model` (in any wrapper) that has not come
    to its end."""
    base = base_model(model)
    training = _of_model.get(base)
    if training is None or training.state is not state:
        for stale in () if training is None else list(training.callbacks):
            stale.restore()
        training = _of_model[base] = _Training(state, weakref.WeakSet())
    training.callbacks.add(callback)
