"""The norm of all gradients in one pass, and the factor by which clipping scales them.

    norm = sqrt(sum of g * g over all elements of all gradients)
    factor = min(1, max_norm / (norm + 1e-6))        as torch.nn.utils.clip_grad_norm_

Squares are summed in double; on CUDA 64 at a time in float32, whose rounding errors are summed
beside them, which is off by less than 2e-11. The norm is finite if and only if every gradient is,
and sums over any number of threads, with any instruction set, are the same to the bit, but for the
sign and the payload of a NaN. Bytes moved for each element: 4 (fp32) or 2 (bf16), the gradient read
once; torch's clipping reads it twice and writes it once.

A gradient that lies on the host (offload/gradients.py) comes with its part of the norm, taken while
it was on its device: sums over chunks of it (of plain torch, one over all of it). Their total in
the order of the gradients has the bits of the norm of resident ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

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


def _square_sums_reference(sums: Tensor, grads: Sequence[Tensor]) -> None:
    """Plain torch; writes the sum of squares of each chunk of the gradients, one float64 each."""
    chunks = [chunk for grad in grads for chunk in grad.reshape(-1).split(CHUNK) if chunk.numel()]
    for place, chunk in zip(sums, chunks, strict=True):
        place.copy_(chunk.double().square().sum())


def _norm_total_reference(total: Tensor, sums: Tensor) -> None:
    """Plain torch; writes the total of float64 sums, added in order, into `total`."""
    total.zero_()
    for part in sums:
        total += part


CHUNK = 16384  # elements whose squares are one sum, in csrc/include/grad_norm_args.h too
SQUARE_SUMS = ops.Operator(
    "grad_square_sums_(Tensor(a!) sums, Tensor[] grads) -> ()",
    _square_sums_reference,
    engines=GRAD_NORM.engines,
)
for _name in ("grad_norm_squared_", "grad_square_sums_"):
    # a gradient that is minus its memory: squares have no sign
    ops.library.impl(_name, torch.library.fallthrough_kernel, "Negative")
NORM_TOTAL = ops.Operator(
    "grad_norm_total_(Tensor(a!) total, Tensor sums) -> ()",
    _norm_total_reference,
    engines=dict.fromkeys(("cpp", "cuda")),
)


@runtime_checkable
class WithSums(Protocol):
    """A gradient whose numbers are elsewhere; its part of the norm is here: float64, (n,)."""

    sums: Tensor


def norm_engine(impl: str, device: torch.device) -> str:
    """The engine that takes parts of the norm for an optimizer with `impl`: any, where this has no
    kernel for it (max_grad_norm is refused then)."""
    has_norm = impl == "eager" or impl in GRAD_NORM.engines
    return GRAD_NORM.resolve(impl if has_norm else "auto", device)


def parts_of(numel: int, engine: str) -> int:
    """How many sums are a gradient's part of the norm that `engine` takes."""
    return 1 if engine == "eager" else -(-numel // CHUNK)


def write_parts(sums: Tensor, grad: Tensor, engine: str) -> None:
    """Writes a contiguous gradient's part of the norm, or that of a run of whole chunks of it."""
    if engine == "eager":
        sums.copy_(grad.double().square().sum())
    else:
        SQUARE_SUMS.native(sums, [grad])


def grad_norm(grads: Sequence[Tensor], impl: str = "auto") -> Tensor:
    """The Euclidean norm of all `grads` together.

    Args:
        grads: floating-point tensors of any shape and layout, on any devices; of DTensors, the
            whole counts. All of a device have their sums with them, or none has.
        impl: "auto", "eager", "cpp" or "cuda"; with "auto" gradients without a kernel (another
            device, float16) are computed in plain torch.

    Returns:
        float32, shape (), on the device of the first gradient.

    Raises:
        RuntimeError: the engine asked for cannot compute one of the gradients; says why.
    """
    # the usual case, quickly: to look here at what the kernel looks at, devices, dtypes and
    # layouts, would cost as much as the norm of 1000 small gradients
    if set(map(type, grads)) == {Tensor} and GRAD_NORM.resolve(impl, grads[0].device) != "eager":
        total = torch.zeros((), dtype=torch.float64, device=grads[0].device)
        with contextlib.suppress(RuntimeError):
            GRAD_NORM.native(total, grads)
            return total.sqrt().float()
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


class ToClip:
    """Clipping to `max_norm` by a step that may take the norm itself, together with its update.

    Attributes:
        norm: that of the gradients, once it was taken: float32, shape ().
    """

    def __init__(self, max_norm: float, impl: str) -> None:
        self.max_norm, self._impl = max_norm, impl
        self.norm = torch.empty((), dtype=torch.float32, device="cpu")

    def factor(self, grads: Sequence[Tensor]) -> Tensor:
        """Takes the norm here; returns what every gradient is multiplied by."""
        self.norm = grad_norm(grads, self._impl)
        return clip_factor(self.norm, self.max_norm)


def _total(grads: Sequence[Tensor], impl: str) -> Tensor:
    """The sum of squares of tensors on one device."""
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    if isinstance(grads[0], WithSums):
        sums = torch.cat([grad.sums for grad in grads])  # type: ignore[attr-defined]
        NORM_TOTAL.implementation(impl, total.device)(total, sums)
        return total
    dtypes = {grad.dtype for grad in grads}
    if GRAD_NORM.resolve(impl, total.device, *dtypes) == "eager":
        GRAD_NORM.reference(total, grads)
    else:
        GRAD_NORM.native(total, [grad.contiguous() for grad in grads])
    return total


def _sharded(grads: list[Any], impl: str) -> Tensor:
    """The sum of squares of DTensors with the same placements, over all their processes."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    local = _total([grad.to_local() for grad in grads], impl)
    mesh, placements = grads[0].device_mesh, grads[0].placements
    parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    return DTensor.from_local(local, mesh, parts, run_check=False).full_tensor()
