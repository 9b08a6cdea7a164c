"""What torch.compile and torch.export do to functions and models of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.utils._device import DeviceContext

from fastft.foreign.objects import class_names

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiled(function: _Function) -> _Function:
    """A decorator: torch.compile calls `function` where it traces a call, and keeps the result as a
    constant.

    Its arguments must be constants. This is `torch.compiler.assume_constant_result`, which imports
    all of the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def is_exporting() -> bool:
    """Whether torch.export traces. Dynamo, where it traces torch's own question, says yes to it up
    to torch 2.12."""
    return torch.compiler.is_exporting()


def is_watched() -> bool:
    """Whether somebody records, counts or answers the operations that run now: a compiler, a
    tracer, a mode of torch's, a transformation of torch.func, forward-mode differentiation.

    `torch.set_default_device` is no such mode: it says where new tensors lie."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _len_function_modes()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _len_function_modes() -> int:
    count = torch._C._len_torch_function_stack()
    # torch keeps its one mode of a device below all others
    of_device = count and isinstance(torch._C._get_function_stack_at(0), DeviceContext)
    return count - bool(of_device)


def has_saved_tensors_hooks() -> bool:
    """Whether somebody is given what autograd keeps, and gives it back: checkpointing without
    reentrance, offloading. Where torch does not tell, yes."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether `torch.autograd.grad(..., is_grads_batched=True)` has made many of `tensor`."""
    return bool(_functorch.is_legacy_batchedtensor(tensor))


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has been called on `model` or a part of it."""
    return any(
        "OptimizedModule" in class_names(module) or module._compiled_call_impl is not None
        for module in model.modules()
    )


def is_plain(grad: Tensor, *kept: Tensor) -> bool:
    """Whether kernels may compute gradients: not those that have gradients themselves or are many
    at once, nor of what hooks have given back in another dtype."""
    alike = all(tensor.dtype == grad.dtype for tensor in kept)
    return alike and not (torch.is_grad_enabled() or is_watched() or is_batched(grad))
