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
fp32 ones, with AVX-512 as fast, but in copies of the operands. There the weight is taken to fp32
by `matrix_product`, or a slab of classes at a time; the logits then are not rounded to 16 bits at
all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastft import _native
from fastft.layers import matrix_product
from fastft.loss.options import times

# a 16-bit parameter's gradient is summed in 16 bits over this many chunks at most
NARROW_CHUNKS = 4
# of the buffer that a slab of the weight, or of its gradient, goes through; a device wants few,
# large products
_SLAB_BYTES = 4 << 20
_DEVICE_SLAB_BYTES = 256 << 20


_imagined: str | None = None  # see `imagined_products`


@contextlib.contextmanager
def imagined_products(device_type: str) -> Iterator[None]:
    """Takes products as they are on another device, of which tensors on the CPU have the shapes
    alone."""
    global _imagined
    before, _imagined = _imagined, device_type
    try:
        yield
    finally:
        _imagined = before


def is_emulated(dtype: torch.dtype, device_type: str) -> bool:
    """Whether matrix products of `dtype` are emulated on this device."""
    return _is_emulated(dtype, _imagined or device_type)


@functools.cache
def _is_emulated(dtype: torch.dtype, device_type: str) -> bool:
    if (
        device_type != "cpu"
        or dtype not in (torch.bfloat16, torch.float16)
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    # torch says yes to AVX-512 without bf16 units too, where oneDNN converts whole matrices in
    # memory of its own
    return supported is not None and (
        not supported() or (dtype == torch.bfloat16 and _native.cpu_isa() == "avx512")
    )


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


def slabs(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows, such as the classes of a weight (V, H) or of its gradient, of which a copy in
    fp32 is small."""
    slab_bytes = _SLAB_BYTES if matrix.device.type == "cpu" else _DEVICE_SLAB_BYTES
    size = max(1, min(len(matrix), slab_bytes // max(1, 4 * matrix.shape[1])))
    for begin in range(0, max(1, len(matrix)), size):
        yield slice(begin, min(begin + size, len(matrix)))


def _is_ours(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether a b is `matrix_product`'s: where torch has 16-bit matrix units, they are faster."""
    in_16_bits = a.dtype == b.dtype != torch.float32 and not is_emulated(a.dtype, a.device.type)
    return not in_16_bits and matrix_product.is_ahead() and matrix_product.takes(out, a, b)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, first: bool, alpha: float = 1.0) -> None:
    """Adds alpha a b to `out`, which may be wider than both; `first`: writes it there. Another
    alpha than 1 is for a CPU."""
    if alpha == 1.0 and _is_ours(a, b, out):
        matrix_product.PRODUCT.native(out, a, b, not first)
        return
    b = b.to(a.dtype)
    if out.dtype == a.dtype:
        if first and alpha == 1.0:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(out, a, b, beta=int(not first), alpha=alpha, out=out)
        return
    widens = out.dtype == torch.float32 and knows_out_dtype("mm", a.dtype, a.device)
    if widens and first:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif widens and knows_out_dtype("addmm", a.dtype, a.device):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:  # there is no product that adds to another dtype: it goes through a slab
        for slab in slabs(out):
            part = out.new_empty(out[slab].shape, dtype=out.dtype if widens else a.dtype)
            multiply(a[slab], b, part, first=True, alpha=alpha)
            out[slab].copy_(part) if first else out[slab].add_(part)


class HeadTerm:
    """The products of one linear layer, whose logits are a head's, alone or beside others' (LoRA).

    Args:
        input: x (T, H).
        weight: W (V, H).
        bias: b (V,), or None.
        dtype: of the products.
        gradients: what dx (T, H), dW (V, H) and db (V,) go into; None for each that nobody wants.
            dW may be wider than the products, and hold anything; db holds zeros.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        gradients: Sequence[Tensor | None],
    ) -> None:
        self.input, self.weight = input, weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.gradients = self.d_input, self.d_weight, self.d_bias = gradients
        self.emulated = is_emulated(dtype, weight.device.type)
        self.dtype = working_dtype(dtype, weight.device.type)
        self.is_first = True  # no chunk has written to dW

    def add_logits(self, x: Tensor, z: Tensor, *, first: bool) -> None:
        """Adds x W^T + b to `z` (R, V), of `dtype` or wider; `first`: writes it there."""
        x, ours = x.to(self.dtype), _is_ours(x, self.weight.T, z)
        if first and self.bias is not None and z.dtype == x.dtype and not (ours or self.emulated):
            torch.addmm(self.bias, x, self.weight.T, out=z)
            return
        for slab in slabs(self.weight) if self.emulated and not ours else [slice(None)]:
            multiply(x, self.weight[slab].T, z[:, slab], first=first)
        if self.bias is not None:
            z.add_(self.bias)

    def add_gradients(
        self, dz: Tensor, x: Tensor, where: slice | Tensor, inverse: Tensor | None
    ) -> None:
        """Writes dx of these rows, and adds their part to dW and db.

        `inverse`: () times which dW is summed.
        """
        dz = dz.to(self.dtype)  # as torch's sum of terms of two dtypes hands it to the narrower
        if self.d_input is not None:
            self.d_input[where] = self._input_gradient(dz).to(self.d_input.dtype)
        if self.d_weight is not None:
            alpha = 1.0
            if inverse is not None and inverse.device.type == "cpu":
                alpha = float(inverse)  # of the sums in fp32, before they are rounded
            elif inverse is not None:
                x = times(x, inverse)
            multiply(dz.T, x.to(dz.dtype), self.d_weight, first=self.is_first, alpha=alpha)
        if self.d_bias is not None:
            self.d_bias += dz.sum(0, dtype=self.d_bias.dtype)
        self.is_first = False

    def _input_gradient(self, dz: Tensor) -> Tensor:
        total = dz.new_empty(len(dz), self.weight.shape[1])
        by_slabs = self.emulated and not _is_ours(dz, self.weight, total)
        for slab in slabs(self.weight) if by_slabs else [slice(None)]:
            multiply(dz[:, slab], self.weight[slab], total, first=not slab.start)
        return total
