"""A training loop of one's own with `accelerate.Accelerator`: the loss and AdamW, at `prepare`."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastft.foreign import engines, models
from fastft.loss.lazy.output_head import Attachment, LazyForward
from fastft.loss.lazy.report import Report
from fastft.optim.in_place import turn_into_ours

if TYPE_CHECKING:
    from accelerate import Accelerator

# accelerate's names of what hands an optimizer's parameters on as they are
_PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")


class AcceleratorLoop:
    """What an Accelerator prepares trains with fastft's loss and AdamW until `restore()`.

    Give `before` and `after` to `fastft.integrations.trainings.at_prepare`. An optimizer becomes
    fastft's before accelerate wraps it; it stays so after `restore()`, with the moments that it
    has. Models get the loss when they are wrapped, and only in training mode with gradients:
    evaluations and `generate` are stock.

    Args:
        pieces: "loss", "optimizer", or both.
    """

    def __init__(self, pieces: Collection[str]) -> None:
        self._pieces = pieces
        self._reports: list[Report] = []
        self._optimizers: list[str] = []
        self._over = False
        # weakly: a program that makes a model for each fold must lose the last one
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._heads: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def before(self, accelerator: Accelerator, objects: tuple[Any, ...]) -> None:
        """Makes the optimizers among them fastft's, where they are plain AdamW of torch's."""
        if "optimizer" not in self._pieces:
            return
        for optimizer in objects:
            if isinstance(optimizer, torch.optim.Optimizer) and not engines.is_prepared(optimizer):
                self._optimizers.append(_become(optimizer, accelerator))

    def after(self, accelerator: Accelerator, prepared: tuple[Any, ...]) -> None:
        """Gives the models among them the loss without logits."""
        if "loss" not in self._pieces:
            return
        for model in prepared:
            if isinstance(model, nn.Module) and models.base_model(model) not in self._models:
                attachment = Attachment(model)
                self._models.add(models.base_model(model))
                self._heads.update(attachment.heads)
                self._reports.append(attachment.report)

    @property
    def is_at_work(self) -> bool:
        """Whether `prepare` has seen a model or an optimizer."""
        return bool(self._reports or self._optimizers)

    @property
    def lines(self) -> dict[str, str]:
        """Of each piece, what it does here and why not more, as of now."""
        seen = {}
        if self._reports:
            seen["loss"] = _of_loss(self.report)
        if self._optimizers:
            seen["optimizer"] = "; ".join(dict.fromkeys(self._optimizers))
        if self._over:
            missed = {"loss": "a model", "optimizer": "an optimizer", "packing": "a Trainer"}
            for piece in self._pieces:
                seen.setdefault(piece, f"left alone: prepare was not given {missed[piece]}")
        return seen

    @property
    def report(self) -> Report:
        """The reports of all models together."""
        whole = Report(sum(report.fused for report in self._reports))
        for report in self._reports:
            whole.materialised += report.materialised
            whole.skipped += report.skipped
        return whole

    @property
    def evaluation(self) -> Report:
        """Nothing: evaluations are stock."""
        return Report()

    def restore(self) -> None:
        """Takes the loss off the models. Harmless when called twice."""
        self._over = True
        for head in self._heads:
            forward = vars(head).get("forward")
            if isinstance(forward, LazyForward):
                forward.remove()


def _become(optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> str:
    kind = accelerator.distributed_type.value
    reason = turn_into_ours(optimizer) if kind in _PLAIN else f"{kind} makes its own of it"
    if reason is None and engines.optimizers_are_replaced():
        reason = "ZeRO's offload_optimizer puts DeepSpeedCPUAdam in its place"
    return "AdamW" if reason is None else f"left alone: {reason}"


def _of_loss(report: Report) -> str:
    skipped = "; ".join(dict.fromkeys(report.skipped))
    if report.fused:
        places = f"; real logits asked for by {', '.join(report.materialised)}"
        return f"fused, {report.fused} times{places if report.materialised else ''}"
    if skipped:
        return f"left alone: {skipped}"
    if report.materialised:
        return f"not fused: real logits asked for by {', '.join(report.materialised)}"
    return "fused where the loop computes it of the output head's logits"
