"""The ways in which AdamW keeps parameters and moments, and the bytes that each promises
(docs/adamw.md): the one table of tests and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

FP32, BF16 = torch.float32, torch.bfloat16


class Mode(NamedTuple):
    """Dtype and rounding of parameters, kind of moments; bytes of an element, gradient included:
    resident, and moved by a step without clipping."""

    dtype: torch.dtype
    rounding: str
    moments: str
    resident: float
    moved: float
    amsgrad: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of AdamW."""
        kept = {"moments": self.moments, "amsgrad": self.amsgrad}
        return kept | ({"rounding": self.rounding} if self.dtype == BF16 else {})


MODES = {
    "fp32-fp32": Mode(FP32, "exact", "fp32", 16, 28),
    "fp32-bf16": Mode(FP32, "exact", "bf16", 12, 20),
    "fp32-8bit": Mode(FP32, "exact", "8bit", 10.0625, 16.125),
    "fp32-4bit": Mode(FP32, "exact", "4bit", 9.5625, 15.125),
    "exact-fp32": Mode(BF16, "exact", "fp32", 14, 26),
    "exact-bf16": Mode(BF16, "exact", "bf16", 10, 18),
    "exact-8bit": Mode(BF16, "exact", "8bit", 8.0625, 14.125),
    "exact-4bit": Mode(BF16, "exact", "4bit", 7.5625, 13.125),
    "kahan-fp32": Mode(BF16, "kahan", "fp32", 14, 26),
    "kahan-bf16": Mode(BF16, "kahan", "bf16", 10, 18),
    "kahan-8bit": Mode(BF16, "kahan", "8bit", 8.0625, 14.125),
    "kahan-4bit": Mode(BF16, "kahan", "4bit", 7.5625, 13.125),
    "stochastic-fp32": Mode(BF16, "stochastic", "fp32", 12, 22),
    "stochastic-bf16": Mode(BF16, "stochastic", "bf16", 8, 14),
    "stochastic-8bit": Mode(BF16, "stochastic", "8bit", 6.0625, 10.125),
    "stochastic-4bit": Mode(BF16, "stochastic", "4bit", 5.5625, 9.125),
    "nearest-fp32": Mode(BF16, "nearest", "fp32", 12, 22),
    "nearest-bf16": Mode(BF16, "nearest", "bf16", 8, 14),
    "nearest-8bit": Mode(BF16, "nearest", "8bit", 6.0625, 10.125),
    "nearest-4bit": Mode(BF16, "nearest", "4bit", 5.5625, 9.125),
}
WITH_AMSGRAD = {"fp32-amsgrad": Mode(FP32, "exact", "fp32", 20, 36, amsgrad=True)}
