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

from fastft.foreign.compiling import has_saved_tensors_hooks, is_plain
from fastft.layers.gated_down import Times
from fastft.layers.rms_norm import normed, plain_norm, rms_norm


class Norm(NamedTuple):
    """What a norm's result was made of."""

    x: Tensor
    weight: Tensor
    eps: float
    offset: float
    versions: tuple[int, ...]  # of the result, x and the weight, as they were then
    sample: Tensor  # of the result


_SAMPLED, _LAST = 64, 16  # numbers


def remembered(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """`rms_norm` of these, of whose result `norm_of` tells until its backward pass; not where hooks
    are given what is kept, as by checkpointing: they alone hold it then."""
    x, weight = x.contiguous(), weight.contiguous()
    y = rms_norm(x, weight, eps, offset)
    node: Any = y.grad_fn
    if node is not None and not has_saved_tensors_hooks():
        # views keep the memory of tensors that are given another one
        of = x.view_as(x), weight.view_as(weight)
        node.norm = Norm(*of, eps, offset, _versions(y, *of), _sample(y))
    return y


def norm_of(y: Tensor) -> Norm | None:
    """The norm whose result `y` is, unless something has become of one of them since."""
    norm: Norm | None = getattr(y.grad_fn, "norm", None) if type(y) is Tensor else None
    if (
        norm is None
        or _versions(y, norm.x, norm.weight) != norm.versions
        or (y.shape, y.dtype) != (norm.x.shape, norm.x.dtype)
        or not y.is_contiguous()
        or not torch.equal(_sample(y), norm.sample)
    ):
        return None
    return norm


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


def _sample(y: Tensor) -> Tensor:
    """Bits of numbers in all rows and columns, and of the last ones: who writes to a result where
    torch does not count it (`.data`, NumPy) writes to many of them, or to the last token's."""
    flat = y.detach().view(-1)
    step = max(len(flat) // _SAMPLED, 1) | 1
    sample = torch.cat((flat[::step], flat[-_LAST:]))
    return sample.view(torch.int16 if y.dtype == torch.bfloat16 else torch.int32)


class _NormedLinear(torch.autograd.Function):
    """Of y (T, K), W^T, a view that keeps the weight's memory though it be given another one, and a
    bias, if any; `times` multiplies two matrices."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, transposed: Tensor, bias: Tensor | None, norm: Norm, times: Times
    ) -> Tensor:
        ctx.save_for_backward(norm.x, norm.weight, transposed)
        ctx.set_materialize_grads(False)
        # hooks may give back other numbers, as who asks for them knows
        sample = None if has_saved_tensors_hooks() else norm.sample
        ctx.options = norm.eps, norm.offset, times, sample
        # in one, as torch does it: bfloat16 is rounded once
        return times(y, transposed) if bias is None else torch.addmm(bias, y, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        *of, transposed = ctx.saved_tensors
        eps, offset, times, sample = ctx.options
        plain = is_plain(grad, *of, transposed) and not torch.is_autocast_enabled("cpu")
        if not plain:
            times = torch.matmul
        needs = ctx.needs_input_grad
        of_y = times(grad, transposed.mT.to(grad.dtype)) if needs[0] else None
        of_weight = None
        if needs[1]:
            x, weight = (saved.contiguous() for saved in of)  # as hooks give them back
            y = normed(x, weight, eps, offset)[0] if plain else plain_norm(x, weight, eps, offset)
            if plain and sample is not None and not torch.equal(_sample(y), sample):
                raise RuntimeError(_CHANGED)
            # to lie as the weight does
            of_weight = times(grad.mT, y.view(-1, y.shape[-1]).to(grad.dtype)).mT
        return of_y, of_weight, grad.sum(-2) if needs[2] else None, None, None


_CHANGED = (
    "fastft: what a norm has given to a linear layer cannot be made again for the gradient of its "
    "weight: between forward and backward somebody has written to the norm's input or weight where "
    "torch does not count it (`.data`, NumPy). FusedLossCallback(rms_norm=False) leaves norms to "
    "torch"
)


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
