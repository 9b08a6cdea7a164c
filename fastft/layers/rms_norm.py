"""The root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467), in one pass.

    r     = 1 / sqrt(mean of x^2 in its row + eps)
    n     = x r                         y = (w + o) n          o: 0, or 1 as in Gemma
    g     = dy (w + o)
    dx    = r (g - n (mean of g n in its row))
    dw    = sum of dy n over all rows

Kept for backward: x and one r a row, where plain torch keeps n as well. Bytes moved: 8 an element
of float32 forward and 12 backward, half of that in bfloat16; plain torch moves 28 and 56. All of
an element is computed in fp32 and rounded once; in bf16 most models round n too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import _native, ops
from fastft.foreign.compiling import constant_when_compiled, is_plain, is_watched

DTYPES = (torch.float32, torch.bfloat16)
# elements: with fewer, Python's part takes what the kernel saves (NOTES.md)
LEAST = 1 << 12


def _rms_norm(
    out: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float
) -> None:
    rows = x.float().view(-1, weight.numel())
    root = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    rstd.copy_(root.view_as(rstd))
    out.copy_(((weight.float() + offset) * (rows * root)).view_as(out))


def _rms_norm_backward(
    grad_x: Tensor,
    grad_weight: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
) -> None:
    rows, upstream = x.float().view(-1, weight.numel()), grad.float().view(-1, weight.numel())
    root = rstd.view(-1, 1)
    normal, weighted = rows * root, upstream * (weight.float() + offset)
    mean = (weighted * normal).mean(-1, keepdim=True)
    grad_x.copy_((root * (weighted - normal * mean)).view_as(grad_x))
    if grad_weight.numel():
        grad_weight.copy_((upstream * normal).sum(0))


FORWARD = ops.Operator(
    "rms_norm(Tensor(a!) out, Tensor(b!) rstd, Tensor x, Tensor weight, float eps, float offset) "
    "-> ()",
    _rms_norm,
    engines={"cpp": ops.takes(*DTYPES)},
    samples={"float16": (torch.float16,)},
)
BACKWARD = ops.Operator(
    "rms_norm_backward(Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor grad, Tensor x, "
    "Tensor weight, Tensor rstd, float offset) -> ()",
    _rms_norm_backward,
    engines={"cpp": ops.takes(*DTYPES)},
    samples={"float16": (torch.float16,)},
)


def _normalised(x: Tensor, wide: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """n and r."""
    rows = x.to(wide)
    rstd = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return rows * rstd, rstd


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """In plain torch and fp32 at least, so that they have gradients too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grad, (normal, rstd) = grad.to(wide), _normalised(x, wide, eps)
    weighted = grad * (weight.to(wide) + offset)
    mean = (weighted * normal).mean(-1, keepdim=True)
    of_weight = (grad * normal).reshape(-1, weight.numel()).sum(0)
    return rstd * (weighted - normal * mean), of_weight


def plain_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """y in plain torch and fp32 at least, so that it has gradients."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return ((weight.to(wide) + offset) * _normalised(x, wide, eps)[0]).to(x.dtype)


def normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """y and r of contiguous tensors, without a graph."""
    out = torch.empty_like(x)
    rstd = x.new_empty(x.numel() // weight.numel(), dtype=torch.float32)
    FORWARD.native(out, rstd, x, weight, eps, offset)
    return out, rstd


class _RmsNorm(torch.autograd.Function):
    """Of contiguous tensors, as the kernels take them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        out, rstd = normed(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        # a norm whose result nobody needs leaves no gradient, as in torch
        ctx.set_materialize_grads(False)
        ctx.options = eps, offset
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.norm = None  # what layers behind it were told (normed_linear.py): x goes with the graph
        if grad is None:
            return None, None, None, None
        x, weight, rstd = (saved.contiguous() for saved in ctx.saved_tensors)  # as hooks give them
        eps, offset = ctx.options
        needs = ctx.needs_input_grad
        if not (is_plain(grad, x, weight) and rstd.dtype == torch.float32):
            of_x, of_weight = _gradients(grad, x, weight, eps, offset)
        else:
            of_x, of_weight = torch.empty_like(x), weight.new_empty(weight.numel() * needs[1])
            BACKWARD.native(of_x, of_weight, grad.contiguous(), x, weight, rstd, offset)
        return (
            of_x.to(x.dtype) if needs[0] else None,
            of_weight.to(weight.dtype) if needs[1] else None,
            None,
            None,
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`(weight + offset) * x / sqrt(mean(x^2) + eps)` of two tensors that `takes` has been asked
    about: (..., H) and (H,)."""
    result: Tensor = _RmsNorm.apply(x.contiguous(), weight.contiguous(), eps, offset)
    return result


@constant_when_compiled
def is_ahead() -> bool:
    """Whether the kernel is faster than plain torch on this machine."""
    return _native.cpu_isa() in ("avx2", "avx512", "avx512bf16")


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` computes such tensors, and is faster: plain ones on a CPU, large
    enough."""
    return (
        type(x) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and not is_watched()
        and x.dtype in DTYPES
        and weight.dtype == x.dtype
        and (x.device.type, weight.device.type) == ("cpu", "cpu")
        and x.layout == weight.layout == torch.strided
        and not (x.is_nested or x.is_inference() or weight.is_inference())
        and x.numel() >= LEAST
        and x.shape[-1:] == weight.shape
    )
