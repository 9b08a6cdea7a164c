"""What a step of a full fine-tune in fp32 is not spared on a CPU, done alone by turns with the
trainings of whole_runs.py.

Of a layer of `out x in` weights over T tokens three products of T in out multiply-adds each,

    y = x W^T        dx = dy W        dW = dy^T x

by torch.mm, or by fastft's kernel where that is ahead, into memory that earlier steps have touched;
of the head as many rows as labels count. And AdamW's bytes: gradients are read, weights and both
moments read and written. Attention's products, which depend on who computes them, and all that is
left of a step cost nothing here, so that whoever multiplies so is at most so fast.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fastft.foreign.models import base_model, output_embeddings
from fastft.layers import matrix_product

_PART = 2**24  # elements of AdamW's that are one after the other in the same memory
_ROOM = 1.5  # of what a batch needs, for longer ones


class BareTrainer(Trainer):
    """Its steps train nothing: they do a batch's products and AdamW's bytes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: dict[str, Tensor] = {}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any) -> Tensor:
        tokens = inputs["input_ids"].numel()
        counted = int((inputs["labels"][:, 1:] != -100).sum())
        for (rows, out, inner), times in layers_of(model, tokens, counted).items():
            self._multiply(rows, out, inner, times)
        elements = sum(param.numel() for param in model.parameters())
        for begin in range(0, elements, _PART):
            part = self._floats("optimizer", min(_PART, elements - begin))
            part.sum()
            for _ in range(3):
                part.mul_(1.0)
        return torch.zeros(())

    def _multiply(self, rows: int, out: int, inner: int, times: int) -> None:
        x, dx = (self._floats(name, rows, inner) for name in ("x", "dx"))
        weight, grad = (self._floats(name, out, inner) for name in ("weight", "grad"))
        y = self._floats("y", rows, out)
        for _ in range(times):
            _product(y, x, weight.t())
            _product(dx, y, weight)
            _product(grad, y.t(), x)

    def _floats(self, name: str, *shape: int) -> Tensor:
        """The first ones of a tensor that is kept from step to step."""
        count = math.prod(shape)
        if name not in self.kept or self.kept[name].numel() < count:
            self.kept[name] = torch.ones(int(_ROOM * count))
        return self.kept[name][:count].view(shape)


def _product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if matrix_product.is_ahead() and matrix_product.takes(out, left, right):
        matrix_product.PRODUCT.native(out, left, right, False)
    else:
        torch.mm(left, right, out=out)


def layers_of(model: nn.Module, tokens: int, counted: int) -> Counter[tuple[int, int, int]]:
    """How often which (rows, out, in) is multiplied."""
    head = output_embeddings(base_model(model))
    return Counter(
        (counted if module is head else tokens, module.out_features, module.in_features)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
