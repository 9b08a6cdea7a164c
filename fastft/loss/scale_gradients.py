"""Gradients that are known before backward, times the number which backward brings.

    gradient <- round(scale * gradient)         in fp32, rounded once, into the same memory

scale () is the derivative by the loss: 1 in most training, a GradScaler's scale, 1 over the steps
of a gradient accumulation. It is on the gradients' device, where no host can look at it without a
wait; so the kernel does, and where it is 1 returns at once.

Bytes moved: 4 a thread, all of them the same, where scale is 1; else all gradients read and
written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import ops
from fastft.loss.options import unrounded


def _scale_gradients(gradients: list[Tensor], scale: Tensor) -> None:
    if scale.device.type == "cpu" and scale == 1:
        return
    for gradient in gradients:
        torch.mul(gradient, unrounded(scale), out=gradient)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE = ops.Operator(
    "scale_gradients_(Tensor(a!)[] gradients, Tensor scale) -> ()",
    _scale_gradients,
    engines={"cuda": ops.takes(*_DTYPES), "triton": ops.takes(*_DTYPES)},
    samples={"float64 gradients": (torch.float64,)},
)


def scale_gradients(gradients: list[Tensor], scale: Tensor) -> None:
    """Multiplies each of `gradients`, contiguous and on the device of `scale` (), in place."""
    dtypes = {gradient.dtype for gradient in gradients}
    SCALE.implementation("auto", scale.device, *dtypes)(gradients, scale)
