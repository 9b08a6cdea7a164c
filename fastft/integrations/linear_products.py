"""The linear layers of a model in training, by `layers/matrix_product.py`, where that is faster.

    y  = x W^T + b         (T, N)      x (T, K), W (N, K)
    dx = dy W              (T, K)
    dW = dy^T x            (N, K)
    db = sum of dy's rows  (N,)

2 T N K floating-point operations a product, all in fp32. Where x is what a norm of fastft's has
made (norms.py), backward makes it again, whoever multiplies (layers/normed_linear.py). Only
`forward` of each `nn.Linear` is hidden by an attribute of that one instance, as the output head's
is (`loss/lazy/output_head.py`): state dicts, hooks and classes stay. Every copy of a layer (`copy`,
pickles, the replicas of `nn.DataParallel`) is a stock one with weights of its own, and so is what
`torch.jit.script` makes of it. What is not a plain fp32 product, large enough to be faster, is
`nn.Linear`'s own: autocast, DTensors, other dtypes and layouts, compiled code, adapters of a low
rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastft import _native
from fastft.foreign.compiling import is_batched, is_watched
from fastft.integrations.own_forward import is_stock, is_unseen, put_forward
from fastft.layers import matrix_product
from fastft.layers.normed_linear import Norm, norm_of, normed_linear

# multiplications of a product: with fewer, Python's part of a layer takes what its products save
LEAST_WORK = 1 << 24
# as they were found: whoever replaces one of them wants other layers
_LINEAR, _FORWARD = F.linear, nn.Linear.forward


# numbers that nobody writes to: of an aligned block malloc (glibc 2.36) takes 112 bytes more than
# of its size, so that where a tensor was another one of its size has no room, and holes stay
_SPARE = 1 << 10


def _times(left: Tensor, right: Tensor) -> Tensor:
    rows, columns = len(left), right.shape[1]
    # resized, and no view: a layer's result may be written to
    out = left.new_empty(rows * columns + _SPARE).resize_(rows, columns)
    matrix_product.PRODUCT.native(out, left, right, False)
    return out


class _Product(torch.autograd.Function):
    """left right; its gradients are products of its own kind, so that these have gradients too."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.save_for_backward(left if needs[1] else None, right if needs[0] else None)
        # zeros would be a weight's gradient, and train it, where torch leaves none
        ctx.set_materialize_grads(False)
        return _times(left, right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None
        left, right = ctx.saved_tensors
        times: Any = torch.matmul if _is_torchs() or is_batched(grad) else _Product.apply
        return (
            None if right is None else times(grad, right.T),
            # not (left^T grad): a weight comes transposed, and its gradient is to lie as it does
            None if left is None else times(grad.T, left).T,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of fp32 tensors (..., K), (N, K) and (N,)."""
    rows: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight.T)
    return (rows if bias is None else rows.add_(bias)).view(*x.shape[:-1], len(weight))


def _forward_of(used: set[int] | None) -> Callable[[nn.Linear, Tensor], Tensor]:
    """`nn.Linear.forward` while layers are ours; ids of those that had the kernel go into `used`,
    which is None where none may have it."""

    # of this name and a function, so that the layer's method pickles and torch.jit compiles it
    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if type(self).forward is not _FORWARD:
                return type(self).forward(self, input)
            weight, bias = self.weight, self.bias
            own = used is not None and _is_plain(input, weight, bias)
            if used is not None and own:
                used.add(id(self))
            norm = _norm_of(input, weight, bias)
            if norm is not None:
                return normed_linear(input, weight, bias, norm, _times if own else torch.mm)
            if own:
                return linear(input, weight, bias)
        return F.linear(input, self.weight, self.bias)

    forward.used = used  # type: ignore[attr-defined]
    return forward


def _norm_of(input: Tensor, weight: Tensor, bias: Tensor | None) -> Norm | None:
    """The norm whose result a layer is given, and would keep for its weight's gradient."""
    if _is_torchs() or not _is_trained(weight, input):
        return None
    plain = bias is None or (
        type(bias) is nn.Parameter and (bias.dtype, bias.shape) == (weight.dtype, weight.shape[:1])
    )
    return norm_of(input) if plain else None


def _is_trained(weight: Tensor, input: Tensor) -> bool:
    """Whether a weight that such inputs are multiplied by is a plain one that has a gradient."""
    return (
        type(weight) is nn.Parameter
        and weight.requires_grad
        and torch.is_grad_enabled()
        and weight.dtype == input.dtype
        and (weight.device.type, weight.layout) == ("cpu", torch.strided)
        and weight.shape[1:] == input.shape[-1:]
    )


def times_of(layer: nn.Module, input: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What multiplies matrices where `layer`, for such an input, is the product with a weight that
    is trained: torch, or the kernel, which the layer has had then. None where it is more than that
    (hooks, a bias, an adapter, autocast), or another one."""
    if type(layer) is not nn.Linear or not is_unseen(layer) or _is_torchs():
        return None
    put, weight = vars(layer).get("forward"), layer.weight
    ours = getattr(put, "__func__", None)
    if (
        not (hasattr(ours, "used") or is_stock(layer))
        or layer._compiled_call_impl is not None
        or layer.bias is not None
        or not _is_trained(weight, input)
    ):
        return None
    used: set[int] | None = getattr(ours, "used", None)
    if used is None or not _is_plain(input, weight, None):
        return torch.mm
    used.add(id(layer))
    return _times


def _is_plain(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        not _is_torchs()
        and _is_fp32(input)
        and _is_fp32(weight)
        and (bias is None or _is_fp32(bias))
        and input.shape[-1:] == weight.shape[1:]  # else torch says what is wrong
        and _is_worth_it(input.numel() // weight.shape[1], *weight.shape)
    )


def _is_torchs() -> bool:
    return torch.is_autocast_enabled("cpu") or is_watched() or _is_replaced()


def _is_replaced() -> bool:
    return F.linear is not _LINEAR or nn.Linear.forward is not _FORWARD


def _is_worth_it(*sizes: int) -> bool:
    return min(sizes) >= matrix_product.LEAST and math.prod(sizes) >= LEAST_WORK


def _is_fp32(tensor: Tensor | None) -> bool:
    # what it is, before it is asked for more: a layer may have lost its weight
    if tensor is None or type(tensor) not in (Tensor, nn.Parameter):
        return False
    dense = tensor.layout == torch.strided and not tensor.is_nested
    return dense and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _plain_layers(model: nn.Module) -> list[nn.Linear]:
    """Whose `forward` is not the class's (a head with lazy logits, accelerate's offloading, a
    tensor-parallel plan) is somebody's."""
    return [layer for layer in model.modules() if type(layer) is nn.Linear and is_stock(layer)]


def _large_layers(model: nn.Module) -> list[nn.Linear]:
    """The plain ones that the kernel may be faster for."""
    return [
        layer
        for layer in _plain_layers(model)
        if _is_fp32(layer.weight) and min(layer.weight.shape) >= matrix_product.LEAST
    ]


def is_ahead() -> bool:
    """Whether layers are faster with these products: with AVX2 they save no more than Python's part
    of a layer takes (NOTES.md)."""
    return matrix_product.is_ahead() and _native.cpu_isa() != "avx2"


def reason_against(model: nn.Module, engine: str | None) -> str | None:
    """Why the linear layers of `model` keep torch's products; None where they need not.

    Args:
        engine: who else has a hand in them: "torch.compile", "FSDP", "DeepSpeed"; None for nobody.
    """
    if engine is not None:
        return f"the linear layers are {engine}'s"
    if not is_ahead():
        return NOT_AHEAD
    name = type(model).__name__
    has_none = f"{name} has no large linear layers with fp32 weights on the CPU"
    return None if _large_layers(model) else has_none


NOT_AHEAD = "torch's products are as fast on this processor, or fastft's kernels are not there"


def use_own_layers(
    model: nn.Module, stack: contextlib.ExitStack, products: bool = True, norms: bool = False
) -> set[int]:
    """Gives the plain linear layers of `model` a `forward` of fastft's until `stack` is closed;
    returns the ids of those that have had its products, which grow with the first forward passes.

    Args:
        products: multiply by fastft's kernel where they are large enough.
        norms: make again in backward what a norm of fastft's has given them.
    """
    used: set[int] = set()
    forward = _forward_of(used if products else None)
    layers = _plain_layers(model) if norms else _large_layers(model) if products else []
    for layer in layers:
        stack.callback(put_forward(layer, forward))
    return used
