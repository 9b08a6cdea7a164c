"""What stands in `p.grad` for a gradient whose memory on the device has been given back.

It has the gradient's shape, strides, dtype and device, and no memory. So whoever asks whether there
is a gradient, counts gradients or throws them away (`model.zero_grad()`) needs to know nothing:

    p.grad += new               its keeper adds: autograd and FSDP2 do so with a second micro-batch
    p.grad.zero_()              its keeper has zeros from now on
    p.grad.norm(), .clone()     reading one gradient brings its numbers to the device for that
    all else                    a sentence: who reads many at once would need the memory that was to
                                be saved (clip_grad_norm_, GradScaler, DDP), and what is written to
                                a copy would be lost
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_SAME = (aten.detach.default, aten.alias.default)
_ZEROES = (aten.zero_.default, aten._foreach_zero_.default)


class Keeper(Protocol):
    """Who has, or had, the numbers of a gradient."""

    refusal: str  # why nobody may write to it or read it among many, and what to do

    @property
    def sums(self) -> Tensor:
        """Its part of the norm: float64, (n,)."""

    def read(self) -> Tensor:
        """The numbers, on the device."""

    def add(self, new: Tensor) -> None:
        """`p.grad += new`."""

    def zero(self) -> None:
        """`p.grad.zero_()`."""


class AbsentGradient(Tensor):
    """A gradient without memory.

    Args:
        like: a tensor of its form, on its device.
        keeper: who has its numbers. Must not hold the parameter: `p.grad` would keep `p` alive.
    """

    keeper: Keeper

    @staticmethod
    def __new__(cls, like: Tensor, keeper: Keeper) -> AbsentGradient:  # noqa: D102
        made = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made.keeper = keeper
        return made

    def __init__(self, like: Tensor, keeper: Keeper) -> None:
        pass

    # every function of torch comes here below autograd alone
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def sums(self) -> Tensor:
        """Its part of the norm (grad_norm.py)."""
        return self.keeper.sums

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AbsentGradient(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        absent = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        first = absent[0]
        if func in _SAME or (func is aten.view.default and tuple(args[1]) == first.shape):
            return cls(first, first.keeper)
        if func is aten.add_.Tensor and args[0] is first and len(absent) == 1 and not kwargs:
            first.keeper.add(args[1])
            return first
        if func in _ZEROES:
            for gradient in absent:
                gradient.keeper.zero()
            return first if func is aten.zero_.default else None
        shares = any(result.alias_info is not None for result in func._schema.returns)
        several = any(gradient.keeper is not first.keeper for gradient in absent)
        if func._schema.is_mutable or shares or several:
            raise RuntimeError(
                f"{func} cannot work on a gradient without memory: {first.keeper.refusal}"
            )
        numbers = first.keeper.read()
        args, kwargs = tree_map(
            lambda leaf: numbers if isinstance(leaf, cls) else leaf, (args, kwargs)
        )
        return func(*args, **kwargs)
