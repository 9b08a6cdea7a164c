"""Lazy logits that are handed on, those of an evaluation above all: how they become plain tensors.

In training a loss uses lazy logits up. In an evaluation they are handed on: to
`preprocess_logits_for_metrics`, which may need tokens alone (argmax, top-k, log-probabilities), or
to metrics that want the numbers. So the owner of the loop calls `settle()` after each batch: logits
that somebody still holds become plain tensors, and nothing lazy is left when the weights change.
Logits without a history, which a training keeps (`logits.detach()`, for a metric), are `Held` in
the same way until the optimizer's step.

Processes of an evaluation make their logits equally long, and so they are padded while lazy:

    padded = logits.new_zeros(shape) + value          accelerate's `pad_across_processes`
    padded[:, :length] = logits

A tensor of one value is the logits of a layer without hidden states (H = 0): it costs nothing.
Logits written into it make it their own layer over padded hidden states, with a mark at each row
that keeps the value.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.loss.lazy.expressions import LOGITS, Place, Recorded, autocast_state, evaluate
from fastft.loss.lazy.report import Report
from fastft.loss.lazy.sources import Linear, Source

if TYPE_CHECKING:
    from fastft.loss.lazy.logits import LazyLogits


class Held:
    """Remembers lazy logits that somebody may read later, without keeping them."""

    def __init__(self) -> None:
        self._alive: list[weakref.ref[LazyLogits]] = []

    def watch(self, lazy: LazyLogits) -> None:
        """Remembers one."""
        self._alive.append(weakref.ref(lazy))

    def settle(self) -> None:
        """Makes plain tensors, in place, of all lazy logits that somebody still holds.

        But for those of a training that have a history by now: a Function made them without one,
        and handed them on (DDP's, of every output).
        """
        held = (reference() for reference in self._alive)
        alive = [
            lazy
            for lazy in held
            if lazy is not None
            and _is_readable(lazy)
            and (lazy.is_evaluated or not lazy.requires_grad)
        ]
        self._alive.clear()
        # all first: views read their roots
        numbers = [lazy.materialise("logits that were kept") for lazy in alive]
        for lazy, dense in zip(alive, numbers, strict=True):
            lazy._dense = None
            _become(lazy, dense)


class Evaluation(Held):
    """The evaluations of one training.

    Args:
        in_loop: whether the forward pass that runs now is one of an evaluation loop.

    Attributes:
        report: what became of their logits.
        built: bytes of the real logits that were built since they were last taken.
    """

    def __init__(self, in_loop: Callable[[], bool]) -> None:
        super().__init__()
        self.report = Report()
        self.in_loop = in_loop
        self.built = 0

    def take_built(self) -> int:
        """Settles, and returns `built`, which begins anew."""
        self.settle()
        built, self.built = self.built, 0
        return built


def guard(weight: Tensor) -> Callable[[bool], None]:
    """What raises RuntimeError when a head's weight has changed, though no version number tells.

    Whoever averages weights swaps them by `parameter.data.copy_`, perhaps inside a
    `prediction_step` of his own.
    """

    def sample() -> Tensor:
        rows, columns = (max(1, size // 16) for size in weight.shape)
        return weight.detach()[::rows, ::columns].nan_to_num()

    taken = sample().clone()

    def check(entering: bool) -> None:
        if not torch.equal(taken, sample()):
            raise RuntimeError(
                "fastft: logits of an evaluation are read after the output head's weight was "
                "changed, and they were never computed. Put weights in and out around evaluate(), "
                "not within prediction_step, or read the logits before."
            )

    return check


def _is_readable(lazy: LazyLogits) -> bool:
    """Whether the numbers exist or can be computed; else whoever reads them hears why not."""
    try:
        if lazy.is_lazy:
            lazy._family().recorded.check_unchanged()
    except RuntimeError:
        return False
    return True


def _become(lazy: LazyLogits, dense: Tensor) -> None:
    """Makes the object `lazy` a plain tensor over the numbers of `dense`."""
    plain = dense.detach()  # an object that nobody else has: the two are swapped
    # where it cannot be swapped, because of somebody's weak reference, it still has its numbers
    lazy._dense = plain
    with torch._C.DisableTorchFunctionSubclass(), contextlib.suppress(RuntimeError):
        torch.utils.swap_tensors(lazy, plain)
        plain.__dict__.clear()


def new_zeros(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`new_zeros`: lazy in an evaluation where the shape is one of logits, else real zeros."""
    zeros, head = func(lazy.shadow, *args, **kwargs), lazy.recorded.head
    x, weight, _ = head.terms[0]
    is_alike = zeros.dim() == lazy.shadow.dim() and zeros.shape[-1] == head.origin.vocab
    if not is_alike or kwargs or not lazy.is_evaluated:
        return func(x.new_empty(0, dtype=lazy.shadow.dtype), *args, **kwargs)
    nothing = x.new_empty(*zeros.shape[:-1], 0), weight.new_empty(zeros.shape[-1], 0), None
    origin = head.origin._replace(head=None, check=None)
    expression = Recorded(Tensor.to, (LOGITS, lazy.shadow.dtype), {}, autocast_state(x.device.type))
    source = Source((Linear.of(nothing, origin=origin),))
    return lazy._make(source, expression, zeros, lazy._recipe.report)


def write(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`lazy[slices] = logits`, where `lazy` has one value everywhere and nobody else knows it."""
    index, logits = args
    zeros = lazy.recorded.head.terms[0][0]
    fits = (
        # nobody else knows it
        (lazy._root is None and not lazy._has_views and zeros.shape[-1] == 0)
        and (isinstance(logits, type(lazy)) and logits.is_lazy and logits.recorded.is_single)
        and (isinstance(index, tuple) and len(index) == lazy.shadow.dim())
        and all(isinstance(item, slice) for item in index)
        and (lazy.shadow[index].shape, lazy.shadow.dtype) == (logits.shape, logits.shadow.dtype)
    )
    if not fits:
        return NotImplemented
    value = evaluate(lazy.expression, [zeros.new_zeros(1)])
    if value.numel() != 1:
        return NotImplemented

    def longer(x: Tensor) -> Tensor:
        result = x.new_zeros(*lazy.shadow.shape[:-1], x.shape[-1])
        result[index[:-1]] = x
        return result

    rows = torch.ones(*logits.shape[:-1], 1, dtype=torch.bool, device=value.device)
    marked = ~longer(rows)
    lazy._recipe.source = logits.checked().with_inputs(longer).with_operands([marked])
    operands = Place("operand", 0), value.reshape(()), logits.expression
    lazy._recipe.expression = Recorded(torch.where, operands, {}, autocast_state(value.device.type))
    return None
