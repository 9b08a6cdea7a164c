"""`fastft.plug(trainer)`: what fits this Trainer, by its official inputs, and a line that says so.

A piece is what is done for the loss, the optimizer or the batches. It decides when `plug` is
called, so that nothing is half done where one raises, and then

    install(stack)        gives the Trainer what it needs, until restore()
    train_begins(stack)   what belongs to one training, until that ends, whichever way
    line()                one sentence, up to date

On the Trainer itself there are only attributes of this one instance and callbacks. `train` is one
of them, because after an exception Trainer calls no callback, and because checkpoints are looked at
before Trainer loads one; `save_model` is another, with which each checkpoint begins.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from fastft.checks import boolean
from fastft.foreign import objects
from fastft.integrations.checkpoint_folder import check_checkpoints, forget_earlier_save
from fastft.integrations.packing import PackingCallback
from fastft.integrations.plug.loss import LossPiece
from fastft.integrations.plug.optimizer import OptimizerPiece
from fastft.integrations.plug.packing import PackingPiece
from fastft.integrations.processes_apart import is_first_started, processes_apart
from fastft.loss.lazy.report import Report

# below "transformers", so that its verbosity rules
logger = logging.get_logger(f"transformers.{__name__}")


class Plugged:
    """A Trainer that `plug` has changed, and what became of it.

    `str` of it, and the log of the main process when a training has begun, have one line for each
    piece.
    """

    def __init__(
        self, trainer: Trainer, loss: LossPiece, optimizer: OptimizerPiece, packing: PackingPiece
    ) -> None:
        self._trainer = trainer
        self._loss, self._optimizer, self._packing = loss, optimizer, packing
        self._course = _Course(self)
        self._trained = False
        self._installed, self._training = contextlib.ExitStack(), contextlib.ExitStack()
        try:
            self._install()
        except BaseException:
            self.restore()
            raise

    def __str__(self) -> str:
        return "\n".join(f"fastft: {piece}: {line}" for piece, line in self.lines.items())

    @staticmethod
    def of(trainer: Trainer) -> Plugged | None:
        """What `plug` returned for this Trainer; None if it is not plugged."""
        callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", [])
        return next((one.plugged for one in callbacks if isinstance(one, _Course)), None)

    @property
    def lines(self) -> dict[str, str]:
        """What is done for each piece here, and why not more; after a step also what was fused."""
        return {
            "loss": self._loss.line(self._trained),
            "optimizer": self._optimizer.line(),
            "packing": self._packing.line(),
        }

    @property
    def report(self) -> Report:
        """What became of the logits in the latest training, as `FusedLossCallback.report`."""
        return self._loss.report

    @property
    def evaluation(self) -> Report:
        """The same of the latest evaluations, in and outside of `train()`."""
        return self._loss.evaluation

    def restore(self) -> None:
        """Takes it off: the Trainer has the attributes and callbacks that it had before `plug`.

        An optimizer that a training has made stays, as Trainer's own would. Harmless when called
        twice.
        """
        self._training_ends()
        self._installed.close()

    def _install(self) -> None:
        trainer, stack = self._trainer, self._installed
        # first, so that classifiers are pooled before the other callbacks look at them
        trainer.callback_handler.callbacks.insert(0, self._course)
        stack.callback(_remove, trainer.callback_handler, self._course)
        for piece in (self._loss, self._optimizer, self._packing):
            piece.install(stack)
        train = functools.wraps(trainer.train)(functools.partial(self._train, trainer.train))
        saving = functools.partial(_save, trainer, trainer.save_model)
        save = functools.wraps(trainer.save_model)(saving)
        stack.callback(objects.put_attributes(trainer, train=train, save_model=save))

    def _train(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        check_checkpoints(self._trainer, args[0] if args else kwargs.get("resume_from_checkpoint"))
        self._optimizer.refresh()
        try:
            return stock(*args, **kwargs)
        finally:
            self._training_ends()

    def _training_begins(self) -> None:
        self._training_ends()  # auto_find_batch_size begins again without an end
        self._trained = False
        apart = processes_apart(self._trainer.args.world_size)
        if apart is not None and is_first_started():
            logger.warning(f"fastft: {apart}")
        for piece in (self._optimizer, self._packing):
            piece.train_begins(self._training)

    def _training_ends(self) -> None:
        self._training.close()
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, PackingCallback):
                callback.restore()

    def _say(self, *pieces: str) -> None:
        if self._trainer.is_world_process_zero():
            lines = self.lines
            for piece in pieces:
                if not lines[piece].startswith("off"):  # as the user has said himself
                    logger.warning(f"fastft: {piece}: {lines[piece]}")


class _Course(TrainerCallback):
    """Tells `Plugged` how its Trainer's trainings go."""

    def __init__(self, plugged: Plugged) -> None:
        self.plugged = plugged
        self._began = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The other callbacks have not looked at the model yet."""
        self._began = True
        vars(self).pop("on_step_end", None)
        self.plugged._training_begins()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The other callbacks have decided."""
        if self._began:
            self._began = False
            self.plugged._say("optimizer", "packing")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the first step it is known what was fused."""
        self.plugged._trained = True
        self.plugged._say("loss")
        # the later steps are none of ours: this one hides the method until the next training
        self.on_step_end = super().on_step_end  # type: ignore[method-assign]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves nothing on the model."""
        self.plugged._training_ends()


def _save(trainer: Trainer, stock: Any, *args: Any, **kwargs: Any) -> Any:
    folder = args[0] if args else kwargs.get("output_dir")
    # another process may come here when the one that saves has written all of it
    if folder is not None and kwargs.get("_internal_call") and trainer.args.should_save:
        forget_earlier_save(folder)
    return stock(*args, **kwargs)


def _remove(handler: Any, callback: Any) -> None:
    # the list of now: a training may have given the handler another one
    if callback in handler.callbacks:
        handler.callbacks.remove(callback)


def plug(
    trainer: Trainer,
    *,
    loss: bool = True,
    optimizer: bool = True,
    packing: int | str | None = None,
    attention: bool = True,
    linear: bool | None = None,
    swiglu: bool = True,
    rms_norm: bool = True,
    **adamw_options: Any,
) -> Plugged:
    """Does for a built Trainer what fits it: the fused loss, AdamW, packed batches.

        trainer = Trainer(model, args, train_dataset=dataset)
        fastft.plug(trainer)
        trainer.train()

    What does not fit is left as it is, and a line says why. Losses stay those of the Trainer
    without it, up to rounding, but for `packing` as a number, which makes other batches. `train`
    raises a ValueError before it begins where `output_dir` cannot take checkpoints, or the one to
    resume from is half; the sentence has the file and the way out.

    Args:
        trainer: a `transformers.Trainer` or a subclass, before `train()`.
        loss: compute losses without logits, in trainings, `evaluate` and `predict`.
        optimizer: train with `fastft.AdamW` where `args.optim` is an AdamW and nothing else chose
            another; those of bitsandbytes and torchao with 8 or 4 bits become `moments="8bit"` and
            "4bit", the paged ones `offload="states"`. Clips inside the step.
        packing: a number packs the training set, that many tokens in a pack and one pack in a
            batch; `"collate"` keeps the batches and leaves out their padding; None leaves them as
            they are. Labels are those of the Trainer's own collator.
        attention: let packed batches have `attn_implementation="fastft"` where it is exact.
        linear: whether the model's linear layers multiply by fastft's kernel, as
            `FusedLossCallback` has it, with `loss` alone. None (default): where it is faster.
        swiglu, rms_norm: whether large gated units, and root mean square norms, are computed in one
            pass on a CPU, as `FusedLossCallback` has it, with `loss` alone; one that the Trainer
            has keeps its own, and False needs that.
        adamw_options: keywords of `fastft.AdamW`: `moments`, `rounding`, `offload`, `seed`, ...;
            what `args` have comes from there, when Trainer makes the optimizer.

    Returns:
        What became of it. `lines`: a dict, piece -> its sentence, up to date; `str` of it is all of
        them. `report`, `evaluation`: as those of `FusedLossCallback`. `restore()` takes it off.

    Raises:
        TypeError: `trainer` is no Trainer, a switch is no bool, an option is unknown.
        ValueError: the Trainer is plugged already; `packing` is none of these, or impossible
            (DataParallel, context or sequence parallelism, prompt tuning, `auto_find_batch_size`,
            dispatched batches, an example that is too long); options for an optimizer that is left
            alone, or that `args` have.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer must be a transformers.Trainer, got {type(trainer).__name__}; a loop of your "
            "own takes fastft.fused_loss(model) and fastft.adamw(model)"
        )
    layers = {"swiglu": swiglu, "rms_norm": rms_norm}
    switches = {"loss": loss, "optimizer": optimizer, "attention": attention, **layers}
    switches |= {} if linear is None else {"linear": linear}
    for name, value in switches.items():
        boolean(name, value)
    if Plugged.of(trainer) is not None:
        raise ValueError(
            "this Trainer is plugged already: call restore() of what plug returned first"
        )
    losses = LossPiece(trainer, loss, packing is not None, attention, linear, layers)
    adamw = OptimizerPiece(trainer, optimizer, adamw_options, loss=loss, packing=packing)
    return Plugged(trainer, losses, adamw, PackingPiece(trainer, packing, losses.callback))
