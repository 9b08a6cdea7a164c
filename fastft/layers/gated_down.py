"""The last layer of a gated unit (layers/swiglu.py), whose input backward makes again.

    z  = y W^T                y = silu(g) u: (T, I); W: (N, I); z: (T, N)
    dW = dz^T y               (N, I)
    dy = dz W                 (T, I), of which dg and du follow

Kept for backward: g and u, which the unit keeps anyway, and W; plain torch keeps y as well, a third
of what a unit keeps. That takes one more pass over g and u, 12 bytes an element in float32. y has
the same bits again, and gradients those of a layer that has kept it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.foreign.compiling import is_plain
from fastft.layers.swiglu import gradients, multiplied

Times = Callable[[Tensor, Tensor], Tensor]


class _GatedDown(torch.autograd.Function):
    """Of contiguous gates and ups (T, I), and W^T, a view that keeps the weight's memory though it
    be given another one; `times` multiplies two matrices."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, transposed: Tensor, times: Times) -> Tensor:
        ctx.save_for_backward(gate, up, transposed)
        ctx.set_materialize_grads(False)
        ctx.times = times
        return times(multiplied(gate, up), transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        *kept, transposed = ctx.saved_tensors
        gate, up = (saved.contiguous() for saved in kept)  # as hooks give them back
        plain = is_plain(grad, gate, up, transposed) and not torch.is_autocast_enabled("cpu")
        times: Times = ctx.times if plain else torch.matmul
        needs = ctx.needs_input_grad
        of_weight = None
        if needs[2]:
            y = multiplied(gate, up) if plain else F.silu(gate) * up
            of_weight = times(grad.mT, y.to(grad.dtype)).mT  # to lie as the weight does
            del y  # before there is as much again
        if not (needs[0] or needs[1]):
            return None, None, of_weight, None
        found = gradients(times(grad, transposed.mT.to(grad.dtype)), gate, up)
        needed = zip(needs, found, strict=False)
        return *(each if needs else None for needs, each in needed), of_weight, None


def gated_down(gate: Tensor, up: Tensor, weight: Tensor, times: Times) -> Tensor:
    """`F.linear(silu(gate) * up, weight)` of tensors that `takes` has been asked about.

    Args:
        gate, up: (..., I).
        weight: (N, I), of the same dtype.
        times: computes the product of two matrices, neither of which has a graph.
    """
    rows = [tensor.contiguous().view(-1, tensor.shape[-1]) for tensor in (gate, up)]
    result: Tensor = _GatedDown.apply(*rows, weight.T, times)
    return result.view(*gate.shape[:-1], len(weight))
