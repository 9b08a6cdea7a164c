"""When logits of a head that FSDP or ZeRO-3 shards may be lazy: for a loss inside the model's
forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastft.foreign.sharding import shares_a_resharded_unit


class Sharding:
    """Follows the forward passes of `model`, whose head `library` shards, until `remove()`.

    FSDP1, FSDP2 and ZeRO-3 gather a weight when the module that owns it is called, take it away
    afterwards, and learn from the gradient of what a forward pass *returns* that a backward pass
    begins. A loss which is computed inside the model's forward is returned by it, and its weight is
    there, or comes back when the head is called again. A loss that is computed outside, from logits
    that were never computed, would pass by all of that: the logits then have to be real.
    """

    def __init__(self, library: str, head: nn.Linear, model: nn.Module) -> None:
        self.library = library
        self.head = head
        self._passes = 0
        self._computes_loss = False
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._passes += 1
        self._computes_loss = kwargs.get("labels") is not None

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._computes_loss = False

    @contextlib.contextmanager
    def loss_inside(self) -> Iterator[None]:
        """Within, what is made of the logits is returned by the model's forward."""
        before, self._computes_loss = self._computes_loss, True
        try:
            yield
        finally:
            self._computes_loss = before

    def reason_now(self) -> str | None:
        """Why this forward pass needs real logits; None where the model computes the loss."""
        if not self._computes_loss:
            return (
                f"the output head is sharded by {self.library}, and the loss is computed outside "
                f"the model's forward"
            )
        if shares_a_resharded_unit(self.head):
            return (
                "the output head shares an FSDP2 unit that reshards after forward with other "
                "modules"
            )
        return None

    def permission(self) -> Callable[[bool], None]:
        """What raises when logits of this forward pass are used unknown to the library.

        It is told whether the head has to be entered for its weight, which may be another one after
        the forward pass.
        """
        made_in = self._passes

        def check(entering: bool) -> None:
            inside = self._computes_loss and self._passes == made_in
            if not inside and (entering or torch.is_grad_enabled() or self._passes != made_in):
                raise RuntimeError(
                    f"fastft: the output head is sharded by {self.library}; with labels given to "
                    "the model its logits are for the loss inside its forward alone and cannot be "
                    "used afterwards. Leave the labels out and compute the loss outside, or train "
                    "without the fused loss."
                )

        return check
