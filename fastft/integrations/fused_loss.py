"""The fused loss for `transformers.Trainer`: `callbacks=[FusedLossCallback()]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from fastft.foreign import unwrapped
from fastft.integrations.packing import PackingCallback, packing_collator
from fastft.loss.output_head import Attachment
from fastft.loss.report import Report

logger = logging.get_logger(f"transformers.{__name__}")  # below "transformers", so that its verbosity rules

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class FusedLossCallback(TrainerCallback):
    """From train begin to train end the model's loss is computed without ever holding logits.

    Args:
        verify: compute the loss of the first batch by the stock model as well, and raise `RuntimeError` if the two
            differ by more than rounding explains. Costs one more forward pass. Needs a model that returns its own loss.
        on_leak: where batches come from a `PackingCollator`, the callback does what `fastft.PackingCallback` does:
            `"error"` raises if the model does not keep packed sequences apart, `"warn"` says so and trains.

    Attributes:
        report: `fused`, how many losses were fused; `materialised`, the places (file:line) which asked for real logits;
            `skipped`, why the model was left as it is. Of the latest training.

    Under FSDP and ZeRO-3 the loss is fused where the model computes it from its `labels`; with label smoothing or a
    `compute_loss_func` it stays stock, and `report.skipped` says so. Tensor-parallel heads, DataParallel, and models
    whose loss others compute (Liger, TRL) are left alone, and a warning says so.

    An exception out of `train()` leaves the model attached, because Trainer then calls no callback: `restore()` takes
    it off, and so does the next `train()`.
    """

    def __init__(self, verify: bool = False, on_leak: str = "error") -> None:
        self.verify = verify
        self._packing = PackingCallback(on_leak)
        self.report = Report()
        self._attachment: Attachment | None = None
        self._compiled_loss_of: nn.Module | None = None
        self._hooks: list[Any] = []
        self._said, self._said_places = False, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches, after `restore()`: auto_find_batch_size begins again without an end."""
        self.restore()
        if packing_collator(kwargs.get("train_dataloader")) is not None:
            self._packing.on_train_begin(args, state, control, **kwargs)  # first: the probe sees the model without us
        model = kwargs["model"]
        self._said, self._said_places = False, 0
        if args.n_gpu > 1:
            self.report = Report(skipped=["DataParallel: its replicas would call the head of the first device"])
            return
        self._attachment = Attachment(model)
        self.report = self._attachment.report
        if args.torch_compile and self._attachment.heads:
            self._keep_loss_uncompiled(unwrapped(model))
        if self.verify and self._attachment.heads:
            self._verify_first_batch(model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Says after the first step what became of the loss, and later of each new place that asks for real logits."""
        places = self.report.materialised[self._said_places :]
        self._said_places += len(places)
        if places:
            where = ", ".join(places)
            logger.warning(f"fastft: real logits were asked for by {where}: right, but without the saving")
        if self._said:
            return
        self._said = True
        if self.report.fused:
            logger.info(f"fastft: the loss is fused ({self.report.fused} evaluations in the first step)")
            return
        why = "; ".join(self.report.skipped)
        if not why and places:
            why = "something asked for real logits before the loss"
        why = why or "nothing called the output head (is Liger, or another fused loss, at work?)"
        logger.warning(f"fastft: no loss was fused in the first step: {why}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves no trace."""
        self.restore()

    def restore(self) -> None:
        """Takes the model back to stock. Harmless when called twice."""
        self._packing.restore()
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
        if self._compiled_loss_of is not None:
            self._compiled_loss_of.__dict__.pop("_loss_function", None)
            self._compiled_loss_of = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _keep_loss_uncompiled(self, model: Any) -> None:
        """One graph break at the loss function instead of one at each operation on lazy logits."""
        if hasattr(type(model), "loss_function") and "_loss_function" not in model.__dict__:
            model.loss_function = torch.compiler.disable(model.loss_function)
            self._compiled_loss_of = model

    def _verify_first_batch(self, model: nn.Module) -> None:
        stock: list[torch.Tensor | None] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not stock and module.training:
                with torch.no_grad(), torch.random.fork_rng():  # heads are stock where no gradients are recorded
                    stock.append(_loss_of(module.forward(*args, **kwargs)))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not stock:
                return
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            _compare(stock[0], _loss_of(output), _working_dtype(module))

        self._hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]


def _loss_of(output: Any) -> torch.Tensor | None:
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return loss.detach() if isinstance(loss, torch.Tensor) else None


def _working_dtype(model: nn.Module) -> torch.dtype:
    """The least precise dtype at work."""
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    dtypes = {parameter.dtype}
    if torch.is_autocast_enabled(parameter.device.type):
        dtypes.add(torch.get_autocast_dtype(parameter.device.type))
    if getattr(model, "_original_forward", None) is not None:  # accelerate's mixed precision runs inside forward
        dtypes.add(torch.bfloat16)
    return max(dtypes, key=lambda dtype: _TOLERANCE.get(dtype, 5e-2))


def _compare(stock: torch.Tensor | None, fused: torch.Tensor | None, dtype: torch.dtype) -> None:
    if stock is None or fused is None:
        logger.warning("fastft: verify=True found nothing to compare: the model returned no loss of its own")
        return
    expected, actual = float(stock), float(fused)
    if abs(expected - actual) > _TOLERANCE.get(dtype, 5e-2) * max(1.0, abs(expected)):
        raise RuntimeError(
            f"fastft: the fused loss of the first batch is {actual:.8g}, the stock loss {expected:.8g}. Please report "
            "this model; train it without FusedLossCallback."
        )
