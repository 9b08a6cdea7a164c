"""What became of a training, once: figures in Trainer's last log, which every logger gets.

Trainer ends a training with a log of `train_runtime` and `train_loss`. The figures go into it
before the callbacks of `report_to` see it, so that they reach TensorBoard, W&B, MLflow and whatever
else Trainer reports to, and `state.log_history`; there all of them are numbers:

    fastft/fused           losses that were computed without logits
    fastft/materialised    places that asked for real logits
    fastft/skipped         reasons for which a head, or the model, was left as it is
    fastft/padding_share   padding / all places of the batches

They are those of this process, the main one where loggers write. Places and reasons are texts: the
loggers that take texts get them by their own interfaces.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from fastft.foreign.compiling import is_compiled
from fastft.foreign.models import base_model
from fastft.integrations.batch_counts import Totals, count_batch
from fastft.loss.lazy.report import Report
from fastft.stack import callers

_PREFIX = "fastft/"
_records: weakref.WeakKeyDictionary[nn.Module, RunRecord] = weakref.WeakKeyDictionary()


class RunRecord(TrainerCallback):
    """Counts the padding of one training, and writes the figures into its last log."""

    def __init__(self, handler: CallbackHandler, model: nn.Module) -> None:
        # weakly: callbacks whose training was interrupted end when nobody holds them
        self._handler = weakref.ref(handler)
        config = getattr(base_model(model), "config", None)
        self.beside = bool(getattr(config, "is_encoder_decoder", False))
        self.totals = Totals()

    def count(self, inputs: dict[str, Any]) -> None:
        """Counts the places of a forward pass's batch; waits for no device."""
        counts = count_batch(inputs, self.beside, shifts=False)
        if counts is not None:
            for side in (counts.tokens, counts.outputs):
                if side is not None:
                    self.totals.add("tokens", side.sum())
            self.totals.add("places", counts.places)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the figures into the last log of a training."""
        handler = self._handler()
        if logs is None or "train_runtime" not in logs or handler is None:
            return
        reports = reports_of(handler)
        figures = {**_outcome(reports), **self._padding()}
        logs.update({f"{_PREFIX}{name}": value for name, value in figures.items()})
        if state.log_history:
            state.log_history[-1].update({f"{_PREFIX}{name}": figures[name] for name in figures})
        if state.is_world_process_zero:
            _tell(handler, state, _texts(reports))

    def _padding(self) -> dict[str, float]:
        sums = self.totals.read()
        if not sums.get("places"):
            return {}
        return {"padding_share": 1 - sums["tokens"] / sums["places"]}


# a function, not a method: a model with it can be copied and pickled
def _before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    record = _records.get(module)
    if record is not None and module.training and torch.is_grad_enabled():
        record.count(kwargs)


def record_run(model: nn.Module, args: TrainingArguments) -> Callable[[], None]:
    """Has the training that begins now recorded, once whoever asks for it.

    Args:
        model: what is trained.
        args: of its Trainer.

    Returns:
        What ends the record, at the training's end.
    """
    handler = calling_handler()
    known = handler is None or any(isinstance(one, RunRecord) for one in handler.callbacks)
    if handler is None or known:
        return lambda: None
    record = RunRecord(handler, model)
    take_away = put_first(handler, record)
    if args.n_gpu > 1:  # its replicas would count in threads
        return take_away
    count = _before_forward
    if args.torch_compile or is_compiled(model):
        count = torch.compiler.disable(count)
    _records[model] = record
    # first of all, as other hooks take the boundaries off
    hook = model.register_forward_pre_hook(count, with_kwargs=True, prepend=True)

    def end() -> None:
        hook.remove()
        take_away()

    return end


def reports_of(handler: CallbackHandler | None) -> list[Report]:
    """What callbacks of fastft's report of a training's losses."""
    callbacks = [] if handler is None else handler.callbacks
    found = (getattr(callback, "report", None) for callback in callbacks)
    return [report for report in found if isinstance(report, Report)]


def _outcome(reports: list[Report]) -> dict[str, int]:
    if not reports:
        return {}
    return {
        "fused": sum(report.fused for report in reports),
        "materialised": sum(len(report.materialised) for report in reports),
        "skipped": sum(len(report.skipped) for report in reports),
    }


def _texts(reports: list[Report]) -> dict[str, str]:
    """The places and the reasons, a line each."""
    lines = {
        "materialised_places": [place for report in reports for place in report.materialised],
        "skipped_reasons": [reason for report in reports for reason in report.skipped],
    }
    return {name: "\n".join(those) for name, those in lines.items() if those}


def _tell(handler: CallbackHandler, state: TrainerState, texts: dict[str, str]) -> None:
    """Gives texts to the loggers that Trainer reports to, where they have a place for such."""
    there = {type(callback).__name__: callback for callback in handler.callbacks}
    writer = getattr(there.get("TensorBoardCallback"), "tb_writer", None)
    wandb, mlflow = (
        sys.modules.get(module) if callback in there else None
        for module, callback in (("wandb", "WandbCallback"), ("mlflow", "MLflowCallback"))
    )
    for name, text in texts.items():
        if writer is not None:
            writer.add_text(f"{_PREFIX}{name}", text, state.global_step)
        if wandb is not None and wandb.run is not None:
            wandb.run.summary[f"{_PREFIX}{name}"] = text
        if mlflow is not None and mlflow.active_run() is not None:
            mlflow.set_tag(f"{_PREFIX}{name}", text)


def calling_handler() -> CallbackHandler | None:
    """Trainer's list of callbacks, one of whose events this is. No event tells it, only the
    stack."""
    for frame in callers():
        if frame.f_code.co_name == "call_event":
            caller = frame.f_locals.get("self")
            return caller if isinstance(caller, CallbackHandler) else None
    return None


def put_first(handler: CallbackHandler, callback: TrainerCallback) -> Callable[[], None]:
    """Puts `callback` before all others, and returns what takes it away.

    Both give the handler another list: the event that is under way goes through the old one.
    """
    handler.callbacks = [callback, *handler.callbacks]
    held = weakref.ref(handler)

    def take_away() -> None:
        there = held()
        if there is not None:
            there.callbacks = [other for other in there.callbacks if other is not callback]

    return take_away
