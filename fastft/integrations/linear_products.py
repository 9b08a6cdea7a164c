"""The linear layers of a model in training, by oneDNN (`foreign/onednn.py`), where asked for.

    y  = x W^T + b         (T, N)      x (T, K), W (N, K)
    dx = dy W              (T, K)
    dW = dy^T x            (N, K)
    db = sum of dy's rows  (N,)

2 T N K floating-point operations a product, all in fp32. Only `forward` of each `nn.Linear` is
hidden by an attribute of that one instance, as the output head's is (`loss/lazy/output_head.py`):
state dicts, hooks and classes stay, and a copy of the model is a stock one. What is not a plain
fp32 product of enough rows is `nn.Linear`'s own: autocast, DTensors, other dtypes, compiled code.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastft.foreign import onednn
from fastft.foreign.compiling import is_watched
from fastft.foreign.objects import put_attributes

_ROWS = 8  # with fewer, a product is bound by the bytes of W, and MKL has less to prepare


class _Product(torch.autograd.Function):
    """x W^T + b; its gradients are products of its own kind, so that these have gradients too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn.product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()  # an expanded one has strides that oneDNN does not know
        return (
            None if weight is None else _Product.apply(dy, weight.T, None),
            None if x is None else _Product.apply(dy.T, x.T, None),
            dy.sum(0) if ctx.needs_input_grad[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of fp32 tensors (..., K), (N, K) and (N,), by oneDNN."""
    rows: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias)
    return rows.view(*x.shape[:-1], len(weight))


class _ProductForward:
    """The `forward` of a linear layer while the products are on.

    It copies and pickles as the method that the layer's class has.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, input: Tensor) -> Tensor:
        """`nn.Linear.forward`."""
        weight, bias = self.layer.weight, self.layer.bias
        if _is_plain(input, weight, bias):
            return linear(input, weight, bias)
        return F.linear(input, weight, bias)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.layer, "forward")


def _is_plain(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        onednn.takes(input, weight, *([] if bias is None else [bias]))
        and input.shape[-1:] == weight.shape[1:]  # else torch says what is wrong
        and input.numel() >= _ROWS * weight.shape[1]
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and not is_watched()
    )


def _layers(model: nn.Module) -> list[nn.Linear]:
    """The plain ones. Whose `forward` is an attribute already (a head with lazy logits,
    accelerate's offloading, a tensor-parallel plan) is somebody's."""
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear and "forward" not in vars(layer) and onednn.takes(layer.weight)
    ]


def reason_against_onednn(model: nn.Module, engine: str | None) -> str | None:
    """Why the linear layers of `model` keep torch's products; None where they need not.

    Args:
        engine: who else has a hand in them: "torch.compile", "FSDP", "DeepSpeed"; None for nobody.
    """
    if engine is not None:
        return f"the linear layers are {engine}'s"
    if not _layers(model):
        return f"{type(model).__name__} has no linear layers with fp32 weights on the CPU"
    return onednn.reason_against()


def use_onednn(model: nn.Module, stack: contextlib.ExitStack) -> int:
    """Gives the plain linear layers of `model` oneDNN's products until `stack` is closed; returns
    how many there are."""
    layers = _layers(model)
    for layer in layers:
        stack.callback(put_attributes(layer, forward=_ProductForward(layer)))
    return len(layers)
