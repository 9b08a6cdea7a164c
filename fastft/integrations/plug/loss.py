"""The loss of a plugged Trainer: fused in its trainings and in all of its evaluations."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from torch import nn
from transformers import Trainer

from fastft.foreign import models, objects
from fastft.integrations.fused_loss import FusedLossCallback
from fastft.integrations.packing import PackingCallback
from fastft.loss.lazy.output_head import expects_head, find_heads
from fastft.loss.lazy.report import Report


class _PluggedLoss(FusedLossCallback):
    """A `FusedLossCallback` whose outcome is a line of `Plugged`."""

    def _say_outcome(self, model: nn.Module) -> None:
        pass


class LossPiece:
    """What `plug` does for the loss.

    Args:
        trainer: a Trainer before `train()`.
        wanted: `loss` of `plug`.
        packs: whether batches are packed.
        attention, linear, layers: of `plug`; `layers` its switches of the model's layers.

    Attributes:
        callback: what fuses the loss and keeps packed sequences apart: the Trainer's own, if it has
            one; None if there is nothing to do.
    """

    def __init__(
        self,
        trainer: Trainer,
        wanted: bool,
        packs: bool,
        attention: bool,
        linear: bool | None,
        layers: dict[str, Any],
    ) -> None:
        self._trainer: Any = trainer
        self._wanted = wanted
        there = trainer.callback_handler.callbacks
        kind = FusedLossCallback if wanted else PackingCallback
        given = next((callback for callback in there if isinstance(callback, kind)), None)
        of_given = getattr(given, "linear", linear)
        if (linear and not wanted) or linear not in (None, of_given):
            raise ValueError(
                f"linear={linear} needs loss=True and, where the Trainer has a FusedLossCallback "
                f"of its own, that callback's linear={linear}"
            )
        for name, on in layers.items():
            if wanted and not on and getattr(given, name, False):
                raise ValueError(
                    f"{name}=False needs {name}=False of the Trainer's own FusedLossCallback"
                )
        self._is_new = given is None
        self.callback: PackingCallback | None = given
        if given is None and wanted:
            self.callback = _PluggedLoss(attention=attention, linear=linear, **layers)
        elif given is None and packs:
            self.callback = PackingCallback(attention=attention)

    @property
    def fusing(self) -> FusedLossCallback | None:
        """The callback that fuses, where it was asked for: of several the last one takes over."""
        if not self._wanted:
            return None
        there = [self.callback, *self._trainer.callback_handler.callbacks]
        return next(one for one in reversed(there) if isinstance(one, FusedLossCallback))

    def install(self, stack: contextlib.ExitStack) -> None:
        """Gives the Trainer its callback and its evaluation loop, until `stack` is closed."""
        trainer, callback = self._trainer, self.callback
        if self._is_new and callback is not None:
            trainer.add_callback(callback)
            stack.callback(_without_callback, trainer, callback)
        if callback is not None:
            stack.callback(callback.restore)
        if self.fusing is not None:
            stock = trainer.evaluation_loop
            loop = functools.wraps(stock)(functools.partial(self._evaluation_loop, stock))
            stack.callback(objects.put_attributes(trainer, evaluation_loop=loop))

    def _evaluation_loop(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        trainer, callback = self._trainer, self.fusing
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        unprepared = trainer.model_wrapped is trainer.model
        # a head that is sharded in the loop itself has to be looked at afterwards
        if callback is None or (sharded and unprepared):
            return stock(*args, **kwargs)
        with callback.evaluating(trainer.model, trainer.args):
            return stock(*args, **kwargs)

    def line(self, trained: bool) -> str:
        """What becomes of the loss; `trained`: a step has been taken."""
        callback, model = self.fusing, self._trainer.model
        if callback is None:
            return "off: loss=False"
        heads = " and ".join(_names(model, find_heads(model))) or "the output head"
        report = callback.report
        if report.fused:
            also = ", ".join(report.materialised)
            asked = f"; real logits were asked for by {also}" if also else ""
            return f"fused at {heads}{_softcap(model)}{_layers(callback)}{asked}"
        if report.materialised:
            return f"left alone: real logits were asked for by {', '.join(report.materialised)}"
        if trained:
            return f"left alone: {callback.why_not_fused(model)}"
        if self._trainer.args.n_gpu > 1:
            return "left alone: DataParallel: its replicas would call the head of the first device"
        if not expects_head(model):
            name = type(models.base_model(model)).__name__
            return f"left alone: {name} has no output head over a vocabulary"
        return f"to be fused at {heads}{_softcap(model)}"

    @property
    def report(self) -> Report:
        """`FusedLossCallback.report`."""
        return Report() if self.fusing is None else self.fusing.report

    @property
    def evaluation(self) -> Report:
        """`FusedLossCallback.evaluation`."""
        return Report() if self.fusing is None else self.fusing.evaluation


def _without_callback(trainer: Trainer, callback: Any) -> None:
    if callback in trainer.callback_handler.callbacks:
        trainer.remove_callback(callback)


def _names(model: nn.Module, heads: list[nn.Linear]) -> list[str]:
    names = {id(module): name for name, module in models.base_model(model).named_modules()}
    return [names.get(id(head), "the output head") for head in heads]


def _layers(callback: FusedLossCallback) -> str:
    linear = callback.linear_layers
    said = f"; {linear} linear layers by fastft's products" if linear else ""
    for count, what in ((callback.gated_units, "gated unit"), (callback.norms, "norm")):
        said += f"; {count} {what}{'s' * (count != 1)} in one pass" if count else ""
    return said


def _softcap(model: nn.Module) -> str:
    config: Any = getattr(models.base_model(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(text, "final_logit_softcapping", None)
    return "" if cap is None else f", softcap {cap:g}"
