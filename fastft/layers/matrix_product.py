"""Matrix products in fp32 on a CPU whose BLAS does not use all of it.

    out (M, N) = left (M, K) right (K, N)        or added to it

MKL, which torch comes with, uses AVX2 at most on processors that are not Intel's: half of the speed
of those that have AVX-512. With AVX2 alone these products take as long as MKL's, and up to a tenth
less where other threads share the cores (NOTES.md). Factors are float32 or bfloat16, which is
widened on the way, so that nobody holds a copy of it in float32. 192 terms of a sum at most are
added up in a row, then these sums, which is what keeps the error at that of MKL.

Bytes moved: `right` is read once, `left` once for each 1024 columns of `right`; `out` is written
once where 2 MiB hold those columns of all terms, else read and written again for each 2 MiB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import _native, ops
from fastft.foreign.compiling import constant_when_compiled

_DTYPES = (torch.float32, torch.bfloat16)
# of rows, columns and terms: below, packing takes longer than the products
LEAST = 64


def _matrix_product(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    product = left.to(out.dtype) @ right.to(out.dtype)
    out.add_(product) if add else out.copy_(product)


PRODUCT = ops.Operator(
    "matrix_product(Tensor(a!) out, Tensor left, Tensor right, bool add) -> ()",
    _matrix_product,
    engines={"cpp": ops.takes(*_DTYPES)},
    samples={"float16 factors": (torch.float16,)},
)


@constant_when_compiled
def is_ahead() -> bool:
    """Whether these products are at least as fast as torch's on this machine."""
    has_kernel = _native.cpu_isa() in ("avx2", "avx512", "avx512bf16")
    return has_kernel and torch.backends.mkl.is_available() and not _native.is_intel()


def takes(out: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether the kernel computes this product, and is large enough to be faster."""
    return (
        out.device.type == "cpu"
        and out.dtype == torch.float32
        and out.stride(1) == 1
        and left.dtype in _DTYPES
        and right.dtype in _DTYPES
        and min(*out.shape, len(right)) >= LEAST
    )
