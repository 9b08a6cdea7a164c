"""The norm of all gradients in one pass, and the factor by which clipping scales them.

    norm = sqrt(sum of g * g over all elements of all gradients)
    factor = min(1, max_norm / (norm + 1e-6))        as torch.nn.utils.clip_grad_norm_

Squares are summed in double: the norm is finite if and only if every gradient is, and sums over any number of threads
are the same to the bit. Bytes moved for each element: 4 (fp32) or 2 (bf16), the gradient read once; torch's clipping
reads it twice and writes it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft import ops


def _grad_norm_reference(norm: Tensor, grads: Sequence[Tensor]) -> None:
    """Plain torch; writes the norm into `norm`, one float32."""
    squares = [grad.double().square().sum() for grad in grads]
    norm.copy_(torch.stack(squares).sum().sqrt() if squares else torch.zeros(()))


OP = ops.Operator("grad_norm_(Tensor(a!) norm, Tensor[] grads) -> ()", _grad_norm_reference, engines=("cpp", "cuda"))


def grad_norm(grads: Sequence[Tensor], impl: str = "auto") -> Tensor:
    """The Euclidean norm of all `grads` together.

    Args:
        grads: float32 or bfloat16 tensors of any shape and layout, on any devices; DTensors count as a whole.
        impl: as of `AdamW`; devices without a kernel of their own are computed with plain torch.

    Returns:
        float32, shape (), on the device of the first gradient.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    sharded: list[Any] = [grad for grad in grads if hasattr(grad, "full_tensor")]
    for grad in grads if not sharded else [grad for grad in grads if not hasattr(grad, "full_tensor")]:
        by_device.setdefault(grad.device, []).append(grad)
    norms = [_norm_on(device, local, impl) for device, local in by_device.items()]
    if sharded:
        total: Any = torch.nn.utils.get_total_norm(sharded)
        norms.append(total.full_tensor().float())  # reduces over the processes
    if not norms:
        return torch.zeros(())
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What clipping to `max_norm` multiplies every gradient by: float32, shape (); NaN where the norm is NaN."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _norm_on(device: torch.device, grads: list[Tensor], impl: str) -> Tensor:
    norm = torch.zeros((), device=device)
    native = impl in ("auto", *ops.LIBRARIES) and OP.resolve("auto", device) != "eager"
    compute = OP.native if native else OP.reference
    compute(norm, [grad.contiguous() for grad in grads] if native else grads)
    return norm
