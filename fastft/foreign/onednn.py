"""fp32 matrix products by torch's oneDNN in the place of its MKL, where that leaves half of a
processor unused.

torch multiplies fp32 matrices by MKL, which takes AVX2 on processors of other makers than Intel.
oneDNN, which torch has for convolutions and 16 bits, takes what the processor has: on a Zen 5 it
multiplies twice as fast. Both sum in fp32; the order of the terms differs, as it does between two
shapes of one product.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor


@functools.cache
def reason_against() -> str | None:
    """Why MKL's products are as good here; None on AMD's processors with AVX-512."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch has no products by oneDNN"
    if not torch.backends.mkl.is_available():
        return "this torch multiplies by another library than MKL, which has not been compared"
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in _processor():
        return "MKL has the same instructions as oneDNN on this processor"
    return None


def is_faster() -> bool:
    """Whether oneDNN's products have wider instructions than MKL's."""
    return reason_against() is None and bool(torch.backends.mkldnn.enabled)


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    return listing.read_text() if listing.exists() else platform.processor()


def takes(*matrices: Tensor) -> bool:
    """Whether `product` computes these: fp32 in the host's memory, and nobody's own kind."""
    return all(
        type(matrix) in (Tensor, torch.nn.Parameter)
        and matrix.dtype == torch.float32
        and matrix.device.type == "cpu"
        for matrix in matrices
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias (M, N) in new memory, from a (M, K) and b (N, K), which may be a transposed
    view, and bias (N,). a is copied where its rows are not dense."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return made
