"""The gated unit of Llama and its kind (SwiGLU: Shazeer 2020, arXiv:2002.05202), in one pass.

    y     = s g u                      g: the gate, u: up, both of any one shape
    s     = sigmoid(g) = 1 / (1 + exp(-g))
    dg    = dy u s (1 + g (1 - s))
    du    = dy s g

Kept for backward: g and u, where plain torch keeps silu(g) as well. Bytes moved: 12 an element of
float32 forward and 20 backward, half of that in bfloat16; plain torch moves 20 and 36. All of an
element is computed in fp32 and rounded once; plain torch rounds silu(g) too. Of gates below -87 it
makes 0, where silu(g) is above -2e-36.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import _native, ops
from fastft.foreign.compiling import constant_when_compiled, is_plain, is_watched

DTYPES = (torch.float32, torch.bfloat16)
# elements: with fewer, Python's part takes what the kernel saves (NOTES.md)
LEAST = 1 << 15


def _swiglu(out: Tensor, gate: Tensor, up: Tensor) -> None:
    out.copy_(torch.nn.functional.silu(gate.float()) * up.float())


def _swiglu_backward(
    grad_gate: Tensor, grad_up: Tensor, grad: Tensor, gate: Tensor, up: Tensor
) -> None:
    for out, found in zip((grad_gate, grad_up), _gradients(grad, gate, up), strict=True):
        out.copy_(found)


def _gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """In plain torch and fp32 at least, so that they have gradients too."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    grad, gate, up = grad.to(wide), gate.to(wide), up.to(wide)
    sigmoid, opposite = torch.sigmoid(gate), torch.sigmoid(-gate)
    return grad * up * (sigmoid * (1 + gate * opposite)), grad * (gate * sigmoid)


FORWARD = ops.Operator(
    "swiglu(Tensor(a!) out, Tensor gate, Tensor up) -> ()",
    _swiglu,
    engines={"cpp": ops.takes(*DTYPES)},
    samples={"float16": (torch.float16,)},
)
BACKWARD = ops.Operator(
    "swiglu_backward(Tensor(a!) grad_gate, Tensor(b!) grad_up, Tensor grad, Tensor gate, "
    "Tensor up) -> ()",
    _swiglu_backward,
    engines={"cpp": ops.takes(*DTYPES)},
    samples={"float16": (torch.float16,)},
)


def multiplied(gate: Tensor, up: Tensor) -> Tensor:
    """y of contiguous tensors, without a graph."""
    out = torch.empty_like(gate)
    FORWARD.native(out, gate, up)
    return out


def gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dg and du of contiguous g and u, in the dtype of these."""
    if not is_plain(grad, gate, up):
        of_gate, of_up = _gradients(grad, gate, up)
        return of_gate.to(gate.dtype), of_up.to(gate.dtype)
    found = torch.empty_like(gate), torch.empty_like(up)
    BACKWARD.native(*found, grad.contiguous(), gate, up)
    return found


class _Swiglu(torch.autograd.Function):
    """Of contiguous tensors, as the kernels take them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        # a unit whose result nobody needs leaves no gradient, as in torch
        ctx.set_materialize_grads(False)
        return multiplied(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None
        gate, up = (saved.contiguous() for saved in ctx.saved_tensors)  # as hooks give them back
        needed = zip(ctx.needs_input_grad, gradients(grad, gate, up), strict=True)
        return tuple(each if needs else None for needs, each in needed)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` of two tensors that `takes` has been asked about."""
    result: Tensor = _Swiglu.apply(gate.contiguous(), up.contiguous())
    return result


@constant_when_compiled
def is_ahead() -> bool:
    """Whether the kernel is faster than plain torch on this machine."""
    return _native.cpu_isa() in ("avx2", "avx512", "avx512bf16")


def takes(gate: Tensor, up: Tensor | None = None) -> bool:
    """Whether `swiglu` computes such tensors, and is faster: plain ones on a CPU, large enough."""
    return (
        type(gate) is Tensor
        and not is_watched()
        and gate.dtype in DTYPES
        and gate.device.type == "cpu"
        and gate.layout == torch.strided
        and not gate.is_nested
        and gate.numel() >= LEAST
        and (up is None or (takes(up) and (up.shape, up.dtype) == (gate.shape, gate.dtype)))
    )
