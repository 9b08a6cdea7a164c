"""A linear layer behind a root mean square norm (layers/rms_norm.py), which backward makes again.

    y  = norm(x)              (T, K)
    z  = y W^T + b            (T, N)      W: (N, K); b: (N,)
    dy = dz W                 dW = dz^T y                db = sum of dz's rows

Kept for backward: x, which the norm keeps anyway, and W; plain torch keeps y as well, as long as
one layer behind it is trained. Each such layer makes y once more, 8 bytes an element in float32. y
has the same bits again, and gradients those of a layer that has kept it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastft.foreign.compiling import is_plain
from fastft.layers.gated_down import Times
from fastft.layers.rms_norm import normal, normed, rms_norm


class Norm(NamedTuple):
    """What a norm's result was made of."""

    x: Tensor
    weight: Tensor
    eps: float
    offset: float
    states: tuple[tuple[int, int], ...]  # of the result, x and the weight, as they were then


_NORMS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of results that somebody still has


def remembered(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """`rms_norm` of these, of whose result `norm_of` tells."""
    x, weight = x.contiguous(), weight.contiguous()
    y = rms_norm(x, weight, eps, offset)
    _NORMS[y] = Norm(x, weight, eps, offset, _states(y, x, weight))
    return y


def norm_of(y: Tensor) -> Norm | None:
    """The norm whose result `y` is, unless something has become of one of them since."""
    norm: Norm | None = _NORMS.get(y) if type(y) is Tensor else None
    if norm is None or _states(y, norm.x, norm.weight) != norm.states:
        return None
    return norm if y.shape == norm.x.shape and y.is_contiguous() else None


def _states(*tensors: Tensor) -> tuple[tuple[int, int], ...]:
    """Where each lies, and how often it has been written to."""
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


class _NormedLinear(torch.autograd.Function):
    """Of y (T, K), W^T, a view that keeps the weight's memory though it be given another one, and a
    bias, if any; `times` multiplies two matrices."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, transposed: Tensor, bias: Tensor | None, norm: Norm, times: Times
    ) -> Tensor:
        ctx.save_for_backward(norm.x, norm.weight, transposed)
        ctx.set_materialize_grads(False)
        ctx.options = norm.eps, norm.offset, times
        # in one, as torch does it: bfloat16 is rounded once
        return times(y, transposed) if bias is None else torch.addmm(bias, y, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        x, norm_weight, transposed = ctx.saved_tensors
        eps, offset, times = ctx.options
        plain = is_plain(grad, x, norm_weight, transposed)
        if not plain:
            times = torch.matmul
        needs = ctx.needs_input_grad
        of_y = times(grad, transposed.mT.to(grad.dtype)) if needs[0] else None
        of_weight = None
        if needs[1]:
            given = x.contiguous(), norm_weight.contiguous(), eps, offset
            y = normed(*given)[0] if plain else normal(*given)
            # to lie as the weight does
            of_weight = times(grad.mT, y.view(-1, y.shape[-1]).to(grad.dtype)).mT
        return of_y, of_weight, grad.sum(-2) if needs[2] else None, None, None


def normed_linear(
    y: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, times: Times
) -> Tensor:
    """`F.linear(y, weight, bias)` of tensors of one dtype on a CPU.

    Args:
        y: (..., K), contiguous, of which `norm_of` has told `norm`.
        weight, bias: (N, K) and (N,).
        times: computes the product of two matrices, neither of which has a graph.
    """
    torchs = bias if times is torch.mm else None
    rows: Tensor = _NormedLinear.apply(y.view(-1, y.shape[-1]), weight.T, torchs, norm, times)
    if bias is not None and torchs is None:
        rows = rows.add_(bias)
    return rows.view(*y.shape[:-1], len(weight))
