"""Parameters whose numbers are still to come: whoever asks for them gets them first.

While a parameter is awaited its class is a subclass of its own, as that of torch's
`UninitializedParameter` is before its time. So it does not matter who asks, where, or by which
name: the module that owns the parameter, another one, a hook, a list that somebody keeps. Every
function of torch that gets it, inside a compiled function too, first has the numbers brought; only
its gradient is given and taken without.

What asks without torch's knowledge gets what is in memory: a kernel in C++ that is handed the
parameter itself, `torch.func` where it wraps one, memory that is known by another tensor
(`p.data`, a view), and FSDP2, which gathers from such memory (`sharding.before_gathers`).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch, _pytree

from fastft.foreign.tensors import is_dtensor

_ASK = "_fastft_ask"
# what zero_grad asks for
_OF_ITS_GRADIENT = {getattr(Tensor.grad, name) for name in ("__get__", "__set__", "__delete__")}


class _Asked:
    """What a copy or a pickle is made of is asked for before its class is read."""

    def __deepcopy__(self: Any, memo: Any) -> Any:
        ask(self)
        return self.__deepcopy__(memo)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        ask(self)
        return self.__reduce_ex__(protocol)


class _Awaited(_Asked, nn.Parameter):
    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OF_ITS_GRADIENT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for leaf in _pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, _Awaited):
                ask(leaf)
        return func(*args, **kwargs)


@functools.cache
def _awaited_dtensor() -> Any:
    """The class of a DTensor whose part is awaited; all that torch does with one reads its part."""

    class AwaitedDTensor(_Asked, sys.modules["torch.distributed.tensor"].DTensor):  # type: ignore[misc]
        @property
        def _local_tensor(self) -> Tensor:
            ask(self)
            return self._local_tensor

    return AwaitedDTensor


def can_be_awaited(param: Tensor) -> bool:
    """Whether who asks for its numbers can be told: a Parameter or a DTensor, of no subclass."""
    return type(param) is nn.Parameter or (is_dtensor(param) and type(param).__name__ == "DTensor")


def await_numbers(param: Any, bring: Callable[[], None]) -> None:
    """Has `bring` called, once, before anybody reads or writes the numbers of `param`.

    `bring` has to call `arrived(param)`.
    """
    setattr(param, _ASK, bring)
    param.__class__ = _awaited_dtensor() if is_dtensor(param) else _Awaited


def is_awaited(param: Tensor) -> bool:
    """Whether the numbers of `param` are still to come."""
    return isinstance(param, _Asked)


def arrived(param: Any) -> None:
    """The numbers of an awaited parameter are there: it is what it was."""
    param.__class__ = type(param).__bases__[1]  # behind _Asked
    delattr(param, _ASK)


@torch._disable_dynamo
def ask(param: Any) -> None:
    """Has the numbers of `param` brought, if they are awaited."""
    if is_awaited(param):
        getattr(param, _ASK)()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Work of our own in the middle of somebody else's code, whatever modes that is in.

    Selective checkpointing, for one, counts the operations of a forward and of its recomputation,
    and inference mode makes tensors that can only be used in it.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch._C.DisableTorchFunction(),
        _python_dispatch._disable_current_modes(),
    ):
        yield
