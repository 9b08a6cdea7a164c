"""Lazy logits of an evaluation: who gets them, and how they become plain tensors.

In training a loss uses lazy logits up. In an evaluation they are handed on: to `preprocess_logits_for_metrics`, which
may need tokens alone (argmax, top-k, log-probabilities), or to metrics that want the numbers. So the owner of the loop
calls `settle()` after each batch: logits that somebody still holds become plain tensors, and nothing lazy is left when
the weights change.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastft.loss.report import Report

if TYPE_CHECKING:
    from fastft.loss.lazy_logits import LazyLogits


class Evaluation:
    """The evaluations of one training.

    Args:
        in_loop: whether the forward pass that runs now is one of an evaluation loop.

    Attributes:
        report: what became of their logits.
    """

    def __init__(self, in_loop: Callable[[], bool]) -> None:
        self.report = Report()
        self.in_loop = in_loop
        self._alive: list[weakref.ref[LazyLogits]] = []

    def watch(self, lazy: LazyLogits) -> None:
        """Remembers logits without keeping them."""
        self._alive.append(weakref.ref(lazy))

    def settle(self) -> int:
        """Makes plain tensors, in place, of all lazy logits that somebody still holds; returns their bytes."""
        alive = [lazy for lazy in (reference() for reference in self._alive) if lazy is not None]
        self._alive.clear()
        numbers = [lazy.materialise("logits that were kept") for lazy in alive]  # all first: views read their roots
        for lazy, dense in zip(alive, numbers, strict=True):
            lazy._dense = None
            _become(lazy, dense)
        return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in numbers}.values())


def _become(lazy: LazyLogits, dense: Tensor) -> None:
    """Makes the object `lazy` a plain tensor over the numbers of `dense`."""
    plain = dense.detach()  # an object that nobody else has: the two are swapped
    lazy._dense = plain  # where it cannot be swapped, because of somebody's weak reference, it still has its numbers
    with torch._C.DisableTorchFunctionSubclass(), contextlib.suppress(RuntimeError):
        torch.utils.swap_tensors(lazy, plain)
        plain.__dict__.clear()
