"""The norm of all gradients in one pass, and the factor by which clipping scales them.

    norm = sqrt(sum of g * g over all elements of all gradients)
    factor = min(1, max_norm / (norm + 1e-6))        as torch.nn.utils.clip_grad_norm_

Squares are summed in double; on CUDA 64 at a time in float32, whose rounding errors are summed
beside them, which is off by less than 2e-11. The norm is finite if and only if every gradient is,
and sums over any number of threads are the same to the bit. Bytes moved for each element: 4 (fp32)
or 2 (bf16), the gradient read once; torch's clipping reads it twice and writes it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft import ops
from fastft.foreign.tensors import is_dtensor, summed


def _grad_norm_squared_reference(total: Tensor, grads: Sequence[Tensor]) -> None:
    """Plain torch; writes the sum of the squares of all elements into `total`, one float64."""
    total.zero_()
    for grad in grads:
        total += grad.double().square().sum()


GRAD_NORM = ops.Operator(
    "grad_norm_squared_(Tensor(a!) total, Tensor[] grads) -> ()",
    _grad_norm_squared_reference,
    engines=dict.fromkeys(("cpp", "cuda"), ops.takes(torch.float32, torch.bfloat16)),
    samples={"float16 gradients": (torch.float16,)},
)


def grad_norm(grads: Sequence[Tensor], impl: str = "auto") -> Tensor:
    """The Euclidean norm of all `grads` together.

    Args:
        grads: floating-point tensors of any shape and layout, on any devices; of DTensors, the
            whole counts.
        impl: "auto", "eager", "cpp" or "cuda"; with "auto" gradients without a kernel (another
            device, float16) are computed in plain torch.

    Returns:
        float32, shape (), on the device of the first gradient.

    Raises:
        RuntimeError: the engine asked for cannot compute one of the gradients; says why.
    """
    # the usual case, quickly
    if set(map(type, grads)) == {Tensor} and len(set(map(Tensor.get_device, grads))) == 1:
        return _total(grads, impl).sqrt().float()
    groups: dict[Any, list[Any]] = {}
    grad: Any  # a Tensor or a DTensor
    for grad in map(summed, grads):
        key = (grad.device_mesh, grad.placements) if is_dtensor(grad) else grad.device
        groups.setdefault(key, []).append(grad)
    totals = [
        _sharded(members, impl) if isinstance(key, tuple) else _total(members, impl)
        for key, members in groups.items()
    ]
    if not totals:
        return torch.zeros(())
    return sum((total.to(totals[0].device) for total in totals[1:]), totals[0]).sqrt().float()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """The factor of gradients that clips to `max_norm`: float32, shape (); NaN if the norm is."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _total(grads: Sequence[Tensor], impl: str) -> Tensor:
    """The sum of squares of tensors on one device."""
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    if GRAD_NORM.resolve(impl, total.device) != "eager":
        dense = all(map(Tensor.is_contiguous, grads))
        try:
            GRAD_NORM.native(total, grads if dense else [grad.contiguous() for grad in grads])
            return total
        except RuntimeError:
            # to look at dtypes before would cost a fifth of the norm of 1000 small gradients
            if GRAD_NORM.resolve(impl, total.device, *{grad.dtype for grad in grads}) != "eager":
                raise
    GRAD_NORM.reference(total, grads)
    return total


def _sharded(grads: list[Any], impl: str) -> Tensor:
    """The sum of squares of DTensors with the same placements, over all their processes."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    local = _total([grad.to_local() for grad in grads], impl)
    mesh, placements = grads[0].device_mesh, grads[0].placements
    parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    return DTensor.from_local(local, mesh, parts, run_check=False).full_tensor()
