"""What no training step is spared on a CPU, done alone by turns with trainings (whole_runs.py).

Of a layer of `out x in` weights over T tokens three products of T in out multiply-adds each,

    y = x W^T        dx = dy W        dW = dy^T x

by torch.mm, or by fastft's kernel where that is ahead, into memory that is there; of the head as
many rows as labels count. And AdamW's bytes in fp32: gradients are read, weights and both moments
read and written. Attention's products, which depend on who computes them, and all that is left of
a step cost nothing here, so that whoever multiplies so is at most so fast.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fastft.foreign.models import base_model, output_embeddings
from fastft.loss import matrix_product

_BEYOND_CACHES = 2**26  # elements


class BareTrainer(Trainer):
    """Its steps train nothing: they do a batch's products and AdamW's bytes."""

    beyond_caches: Tensor | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any) -> Tensor:
        tokens = inputs["input_ids"].numel()
        counted = int((inputs["labels"][:, 1:] != -100).sum())
        layers = layers_of(model, tokens, counted)
        for (rows, out, inner), times in layers.items():
            _multiply(rows, out, inner, times)
        if self.beyond_caches is None:
            self.beyond_caches = torch.ones(_BEYOND_CACHES)
        _move(self.beyond_caches, sum(param.numel() for param in model.parameters()))
        return torch.zeros(())


def layers_of(model: nn.Module, tokens: int, counted: int) -> Counter[tuple[int, int, int]]:
    """How often which (rows, out, in) is multiplied."""
    head = output_embeddings(base_model(model))
    return Counter(
        (counted if module is head else tokens, module.out_features, module.in_features)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )


def _multiply(rows: int, out: int, inner: int, times: int) -> None:
    x, y, weight = torch.ones(rows, inner), torch.ones(rows, out), torch.ones(out, inner)
    dx, grad = torch.empty_like(x), torch.empty_like(weight)
    for _ in range(times):
        for to, a, b in ((y, x, weight.t()), (dx, y, weight), (grad, y.t(), x)):
            if matrix_product.is_ahead():
                matrix_product.PRODUCT.native(to, a, b, False)
            else:
                torch.mm(a, b, out=to)


def _move(floats: Tensor, elements: int) -> None:
    """As many bytes as AdamW's step over `elements`, of `floats` again and again."""
    for begin in range(0, elements, len(floats)):
        part = floats[: elements - begin]
        part.sum()
        for _ in range(3):
            part.mul_(1.0)
