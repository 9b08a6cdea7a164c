"""The matrix products of an output head with a chunk of rows, through one reused workspace.

    z  = x W^T + b        (R, V), into the workspace, where the row kernel turns it into dz
    dx = dz W             (R, H)
    dW = sum over chunks of dz^T x                (V, H)
    db = sum over chunks and rows of dz           (V,)

Where dW is fp32 and the operands have 16 bits, a device's product writes to it, or adds to it, in
fp32, as far as torch can (`knows_out_dtype`). On a CPU, and with an older torch, it goes through a
slab of classes at a time.

dW is summed in fp32 and rounded once, except for a 16-bit parameter in a few chunks: there each sum
is rounded, which stays below the rounding of the operands and saves V H 4 bytes (over hundreds of
chunks it doubles the error).

A processor without 16-bit matrix units emulates 16-bit products: with AVX2 twenty times slower than
fp32 ones, with AVX-512 as fast, but in copies of the operands. There the weight is taken to fp32 a
slab of classes at a time; the logits then are not rounded to 16 bits at all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastft import _native

# a 16-bit parameter's gradient is summed in 16 bits over this many chunks at most
NARROW_CHUNKS = 4
# of the buffer that a slab of the weight, or of its gradient, goes through; a device wants few,
# large products
_SLAB_BYTES = 4 << 20
_DEVICE_SLAB_BYTES = 256 << 20


@functools.cache
def is_emulated(dtype: torch.dtype, device_type: str) -> bool:
    """Whether matrix products of `dtype` are emulated on this device."""
    if (
        device_type != "cpu"
        or dtype not in (torch.bfloat16, torch.float16)
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    if supported is None:
        return False
    # torch says yes to AVX-512 without bf16 units too, where oneDNN converts whole matrices in
    # memory of its own
    return not supported() or (dtype == torch.bfloat16 and _native.cpu_isa() == "avx512")


def working_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype of the workspace for operands of `dtype`."""
    return torch.float32 if is_emulated(dtype, device_type) else dtype


@functools.cache
def knows_out_dtype(product: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's "mm", or "addmm" to a sum in fp32, takes `out_dtype=torch.float32` for
    matrices of `dtype`.

    It is tried once for each device, with small matrices: what a version refuses it refuses before
    it looks at numbers.
    """
    if device.type == "cpu":
        return False
    matrix = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        if product == "mm":
            torch.mm(matrix, matrix, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, matrix, matrix, out_dtype=torch.float32, out=total)
    except RuntimeError as error:
        if "dtype" not in str(error):  # another trouble, which is not ours to hide
            raise
        return False
    return True


def _slabs(weight: Tensor) -> Iterator[slice]:
    """Of the classes of a weight (V, H), or of its gradient."""
    slab_bytes = _SLAB_BYTES if weight.device.type == "cpu" else _DEVICE_SLAB_BYTES
    size = max(1, min(len(weight), slab_bytes // max(1, 4 * weight.shape[1])))
    for begin in range(0, len(weight), size):
        yield slice(begin, min(begin + size, len(weight)))


def add_weight_gradient(total: Tensor, dz: Tensor, x: Tensor, *, first: bool = False) -> None:
    """Adds dz^T x to `total` (V, H), which may be wider than both; `first`: writes it there."""
    if total.dtype == dz.dtype:
        torch.mm(dz.T, x, out=total) if first else total.addmm_(dz.T, x)
        return
    widens = total.dtype == torch.float32 and knows_out_dtype("mm", dz.dtype, dz.device)
    if widens and first:
        torch.mm(dz.T, x, out_dtype=torch.float32, out=total)
    elif widens and knows_out_dtype("addmm", dz.dtype, dz.device):
        torch.addmm(total, dz.T, x, out_dtype=torch.float32, out=total)
    else:  # there is no product that adds to another dtype: it goes through a slab
        multiply = functools.partial(torch.mm, out_dtype=torch.float32) if widens else torch.mm
        for slab in _slabs(total):
            product = multiply(dz[:, slab].T, x)
            total[slab].copy_(product) if first else total[slab].add_(product)


class HeadGemms:
    """The products of one head, a chunk after the other.

    Args:
        weight: (V, H), in the dtype of the computation.
        bias: (V,) in the same dtype, or None.
        rows: R, of the largest chunk.
        d_weight: (V, H), receives dW; its dtype is that of the sum.
        d_bias: (V,) zeros, receives db.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rows: int, d_weight: Tensor, d_bias: Tensor
    ) -> None:
        self.weight, self.bias, self.d_weight, self.d_bias = weight, bias, d_weight, d_bias
        self.emulated = is_emulated(weight.dtype, weight.device.type)
        self.workspace = weight.new_empty(
            rows, len(weight), dtype=working_dtype(weight.dtype, weight.device.type)
        )
        self.first = True

    def logits(self, x: Tensor) -> Tensor:
        """z of rows `x` (R, H), in the workspace."""
        z = self.workspace[: len(x)]
        if not self.emulated:
            if self.bias is None:
                return torch.mm(x, self.weight.T, out=z)
            return torch.addmm(self.bias, x, self.weight.T, out=z)
        wide = x.to(z.dtype)
        for slab in _slabs(self.weight):
            torch.mm(wide, self.weight[slab].to(z.dtype).T, out=z[:, slab])
        return z if self.bias is None else z.add_(self.bias)

    def d_input(self, dz: Tensor) -> Tensor:
        """dx of these rows, in the dtype of the workspace."""
        if not self.emulated:
            return torch.mm(dz, self.weight)
        total = dz.new_zeros(len(dz), self.weight.shape[1])
        for slab in _slabs(self.weight):
            total.addmm_(dz[:, slab], self.weight[slab].to(dz.dtype))
        return total

    def add_parameters(self, dz: Tensor, x: Tensor, needs: tuple[bool, bool, bool]) -> None:
        """Adds the part of this chunk to dW and db, as far as they are wanted."""
        if needs[2]:
            self.d_bias += dz.sum(0, dtype=self.d_bias.dtype)
        if needs[1]:
            add_weight_gradient(self.d_weight, dz, x.to(dz.dtype), first=self.first)
        self.first = False
