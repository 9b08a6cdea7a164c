"""The hooks through which backward hands over its gradients, and which of them can be taken."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from fastft.foreign import sharding
from fastft.foreign.tensors import in_flat_parameter, is_dtensor
from fastft.optim.adamw_part import check_dense


class Hooks:
    """Hooks on parameters, which call a method behind each gradient, and go with its object.

    Args:
        method: of the object, which is held weakly: a parameter must not keep its optimizer alive.
    """

    def __init__(self, method: Callable[[Any], None]) -> None:
        self._method = weakref.WeakMethod(method)
        self._of: dict[torch.Tensor, RemovableHandle] = {}
        self._all: list[RemovableHandle] = []  # without the parameters, for when the object goes
        weakref.finalize(method.__self__, _remove, self._all).atexit = False  # type: ignore[attr-defined]

    def watch(self, params: Sequence[Any]) -> list[Any]:
        """Has hooks on these parameters and on no others, from now on; returns those that lost
        theirs.

        Libraries put others in a group, and what was frozen may be trained later.
        """
        kept = set(params)
        gone = [param for param in self._of if param not in kept]
        for param in gone:
            self._of.pop(param).remove()
        for param in params:
            if param.requires_grad and param.is_leaf and param not in self._of:
                hook = partial(_call_if_alive, self._method)
                self._of[param] = param.register_post_accumulate_grad_hook(hook)
        self._all[:] = self._of.values()
        return gone


def _call_if_alive(method: weakref.WeakMethod[Any], param: Any) -> None:
    alive = method()
    if alive is not None:
        alive(param)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def check_gradient(param: Any, gradient: Any) -> None:
    """Raises where a gradient cannot be taken in the middle of a backward pass."""
    check_kind(gradient)
    check_place(param)
    placements = getattr(gradient, "placements", None)
    if placements is None:
        return
    if placements != getattr(param, "placements", None):
        raise RuntimeError(
            f"a gradient has placements {placements}, its parameter {param.placements}: gradients "
            "that are freed in backward are those that FSDP2 shards as their parameters; use "
            "offload='states'"
        )
    if gradient.device_mesh.ndim > 1 and any(place.is_replicate() for place in placements):
        raise RuntimeError(
            f"gradients of placements {placements} are reduced in two queues (HSDP), and their "
            "memory cannot be given back in between: use offload='states'"
        )


def check_place(param: Any) -> None:
    """Raises where others still need the gradient of a parameter when backward has made it."""
    what = "gradients are freed as backward makes them (offload='gradients', release_gradients)"
    if in_flat_parameter(param) or type(param).__name__ == "FlatParameter":
        raise RuntimeError(f"{what}, which FSDP1's flat ones cannot be: use FSDP2")
    if sharding.world_size() > 1 and not is_dtensor(param):
        raise RuntimeError(
            f"{what}, and in several processes only FSDP2 has reduced them by then: under "
            "DistributedDataParallel and DeepSpeed use offload='states'"
        )


def check_kind(gradient: Any) -> None:
    """Raises for a gradient that is kept, or used, only while backward is under way."""
    check_dense([gradient])
    if gradient.requires_grad:
        raise RuntimeError(
            "backward(create_graph=True) makes gradients with a history, which freeing them would "
            "lose: train without offload='gradients' and release_gradients"
        )
    if gradient.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(
            f"gradients that are freed in backward are float32 or bfloat16, got {gradient.dtype}"
        )
