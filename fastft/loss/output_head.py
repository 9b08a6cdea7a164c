"""Finding a model's output head and letting it return lazy logits.

A head is patched only if it is a plain `nn.Linear`: an attribute `forward` on that one instance, and nothing else. No
parameter, buffer, hook or class is added, so that state dicts keep their keys; a copy or a pickle of the model has
stock heads. Quantised, offloaded, kernelised or custom heads are left alone.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastft.foreign import base_model, is_dtensor, sharding_library
from fastft.loss.lazy_logits import lazy_linear
from fastft.loss.report import Report
from fastft.loss.sharding import Sharding


class LazyForward:
    """The `forward` of an attached head: lazy in training, stock in evaluation and where no gradients are recorded.

    It copies and pickles as the method that the module's class has, so that a copy of the model is a stock one.
    """

    def __init__(self, head: nn.Linear, around: list[nn.Module], sharding: Sharding | None, report: Report) -> None:
        self.head = head
        self.around = around
        self.sharding = sharding
        self.report = report
        self._outside_compiled = torch.compiler.disable(self._forward)

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`nn.Linear.forward`: lazy logits or stock ones."""
        return self._outside_compiled(input, *args, **kwargs)

    def _forward(self, input: Tensor, *args: Any, fastft_task: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        head = self.head
        if fastft_task is not None:  # entered again by Linear.inside_head, so that a sharded weight is gathered
            return fastft_task(input, head.weight, head.bias)
        if args or kwargs or not self._can_be_lazy(input):
            return type(head).forward(head, input, *args, **kwargs)
        check = None if self.sharding is None else self.sharding.permission()
        return lazy_linear(input, head.weight, head.bias, self.report, head, check)

    def _can_be_lazy(self, input: Tensor) -> bool:
        if not (self.head.training and torch.is_grad_enabled()) or torch.jit.is_tracing():
            return False
        if type(input) not in (Tensor, nn.Parameter) or input.dim() < 2:
            return False
        reason = self._reason_now()
        if reason is not None and reason not in self.report.skipped:
            self.report.skipped.append(reason)
        return reason is None

    def _reason_now(self) -> str | None:
        """What forbids lazy logits in this forward pass alone."""
        if type(self.head.weight) not in (Tensor, nn.Parameter):
            return f"the weight of the output head is a {type(self.head.weight).__name__}"
        if _has_global_backward_hooks() or any(m._backward_hooks or m._backward_pre_hooks for m in self.around):
            return "a module backward hook watches the gradient of the logits"
        return None if self.sharding is None else self.sharding.reason_now()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.head, "forward")


class Attachment:
    """The heads of `model` that return lazy logits until `remove()`."""

    def __init__(self, model: nn.Module) -> None:
        self.report = Report()
        self.heads: list[nn.Linear] = []
        self._shardings: list[Sharding] = []
        if isinstance(model, nn.DataParallel):
            self.report.skipped.append("DataParallel: its replicas would call the head of the first device")
            return
        for head in find_heads(model):
            around = [module for module in model.modules() if any(part is head for part in module.modules())]
            library = sharding_library(head, around)
            reason = _reason_against(head)
            if library is None and is_dtensor(head.weight):
                reason = "the output head is tensor-parallel: its weight is a DTensor that no FSDP gathers"
            if reason is not None:
                self.report.skipped.append(reason)
                continue
            sharding = None if library is None else Sharding(library, head, base_model(model))
            head.forward = LazyForward(head, around, sharding, self.report)  # type: ignore[method-assign]
            self.heads.append(head)
            self._shardings += [] if sharding is None else [sharding]
        if not self.heads and not self.report.skipped:
            self.report.skipped.append(f"{type(model).__name__} has no output head that could be found")

    def remove(self) -> None:
        """Takes the heads back to stock. Harmless when called twice."""
        for head in self.heads:
            if isinstance(head.__dict__.get("forward"), LazyForward):
                del head.__dict__["forward"]
        for sharding in self._shardings:
            sharding.remove()
        self.heads, self._shardings = [], []


def find_heads(model: nn.Module) -> list[nn.Linear]:
    """The linear modules whose sum is the model's logits: the output embeddings, looked up inside PEFT wrappers."""
    base = base_model(model)
    try:
        head = base.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if head is not None:
        return _linear_parts(head)
    config: Any = getattr(base, "config", None)
    sizes = {getattr(config, "vocab_size", None)}
    if hasattr(config, "get_text_config"):
        sizes.add(getattr(config.get_text_config(), "vocab_size", None))
    return [module for module in base.modules() if type(module) is nn.Linear and module.out_features in sizes]


def _has_global_backward_hooks() -> bool:
    everywhere = torch.nn.modules.module
    return bool(everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks)


def _linear_parts(module: nn.Module) -> list[nn.Linear]:
    if type(module).__name__ == "ModulesToSaveWrapper":
        copies: Any = module.modules_to_save
        return [part for copy in copies.values() for part in _linear_parts(copy)]
    if hasattr(module, "base_layer"):  # LoRA: the base head plus one B matrix, V x rank, for each adapter
        adapters: Any = getattr(module, "lora_B", {})
        layers: list[Any] = [module.base_layer, *adapters.values()]
        return [part for layer in layers for part in _linear_parts(layer)]
    return [module] if isinstance(module, nn.Linear) else []


def _reason_against(head: nn.Linear) -> str | None:
    """Why this head must keep its own forward; None if it is a plain linear layer."""
    if type(head).forward is not nn.Linear.forward:
        return f"the output head is a {type(head).__name__}, not a plain torch.nn.Linear"
    own = head.__dict__.get("forward")
    stock = isinstance(own, types.MethodType) and own.__func__ is nn.Linear.forward and own.__self__ is head
    if isinstance(own, LazyForward):
        return "the output head is attached to another fused loss already"
    if own is not None and not stock:
        return "the output head's forward is patched by somebody else"
    return None


@contextlib.contextmanager
def fused_loss(model: nn.Module) -> Iterator[Report]:
    """While the context is open, `model` computes its training losses without logits.

    The output head returns lazy logits in training mode; any loss which the model, or the loop, computes of them by
    `torch.nn.functional.cross_entropy`, `nll_loss`, `log_softmax` and `gather`, ... is fused; any other use computes
    real logits and is still right. Evaluation, and forward passes without gradients, are stock.

    Args:
        model: any model with an output head that is a plain `torch.nn.Linear` (PEFT wrappers included). Where there is
            none, or under DataParallel or tensor parallelism, the model is left as it is and the report's `skipped`
            says why.

    Yields:
        `Report`: `fused`, `materialised`, `skipped`, growing as the loop runs.

    Raises:
        RuntimeError: from the loop, when logits are read after an optimizer step has changed the head's weight, when
            the gradient of logits is asked for (`register_hook`, `retain_grad`, `torch.autograd.grad`) after their loss
            was computed, or when logits of a sharded head are used after the forward pass that computed their loss.
    """
    attachment = Attachment(model)
    try:
        yield attachment.report
    finally:
        attachment.remove()
