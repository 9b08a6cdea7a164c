"""How many FLOP/s devices promise, for MFU.

Dense matrix products on tensor cores, with fp32 accumulation, without sparsity, as the vendors'
data sheets have them: NVIDIA's for each product and the architecture white papers (Turing, Ampere,
Ada, Hopper, Blackwell), AMD's for Instinct. Data sheets that give numbers "with sparsity" alone are
halved.
"""

from __future__ import annotations

import re

import torch

# less than the whole card of this name: notebooks, MIG, shares of a virtual GPU ("A40-24Q"), and
# cards of another size
_OTHERS = re.compile(r"Laptop|Max-Q|MIG|-\d+[ABCQ]\b| Ti\b|RTX \d+ D\b")
_WITHOUT_BF16 = re.compile(r"\b(V100|T4\b)")
# what `get_device_name` has in it: TFLOP/s in bf16 and fp16, in TF32, in fp32; the first that
# matches counts. The 16-bit ones have been compared with units x clock where a vendor gives both
_TFLOPS: tuple[tuple[str, float, float, float], ...] = (
    (r"GB[23]00", 2500.0, 1250.0, 80.0),
    (r"B[23]00", 2250.0, 1125.0, 75.0),
    (r"H20", 148.0, 74.0, 44.0),
    (r"H([18]00|200) NVL", 835.0, 417.5, 60.0),
    (r"H[18]00 PCIe", 756.0, 378.0, 51.0),
    (r"(G?H200|H[18]00)", 989.4, 494.7, 67.0),
    (r"A[18]00", 312.0, 156.0, 19.5),
    (r"A40", 149.7, 74.8, 37.4),
    (r"A30", 165.0, 82.0, 10.3),
    (r"A10G", 70.0, 35.0, 35.0),
    (r"A10", 125.0, 62.5, 31.2),
    (r"L40S", 362.05, 183.2, 91.6),
    (r"L40", 181.05, 90.5, 90.5),
    (r"L4", 121.0, 60.0, 30.3),
    (r"RTX 6000 Ada", 364.2, 182.1, 91.1),
    (r"RTX A6000", 154.8, 77.4, 38.7),
    (r"RTX 5090", 209.5, 104.8, 104.8),
    (r"RTX 4090", 165.2, 82.6, 82.6),
    (r"RTX 3090", 71.0, 35.6, 35.6),
    (r"V100S-PCIE", 130.0, 16.4, 16.4),
    (r"V100-PCIE", 112.0, 14.0, 14.0),
    (r"V100-(SXM[23]|DGXS)", 125.0, 15.7, 15.7),
    (r"T4", 65.0, 8.1, 8.1),
    (r"MI355X", 2516.6, 157.3, 157.3),
    (r"MI350X", 2306.9, 144.2, 144.2),
    (r"MI3(00|25)X", 1307.4, 653.7, 163.4),
    (r"MI250X", 191.5, 47.9, 47.9),  # of one of the two devices that it is
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The FLOP/s of `device` in matrix products of `dtype`; None where they are not known.

    fp32 counts as TF32 where torch may use it.
    """
    if device.type != "cuda":
        return None
    return of_name(torch.cuda.get_device_name(device), dtype)


def of_name(name: str, dtype: torch.dtype) -> float | None:
    """The same of a GPU with this name."""
    if _OTHERS.search(name):
        return None
    for pattern, half, tf32, single in _TFLOPS:
        if re.search(rf"\b{pattern}(?![0-9A-Z])", name):
            if dtype == torch.bfloat16 and _WITHOUT_BF16.search(name):
                return None
            if dtype in (torch.bfloat16, torch.float16):
                return half * 1e12
            is_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
            return (tf32 if is_tf32 else single) * 1e12
    return None
