"""Packed batches in `transformers.Trainer`: sequences are kept apart, or nothing is trained."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from fastft.attention.segments import packed_attention
from fastft.checks import boolean
from fastft.data.collator import PackingCollator
from fastft.data.multi_axis import has_several_axes
from fastft.data.streaming import REFUSAL
from fastft.data.tasks.image_text import IMAGE_TEXT
from fastft.foreign.compiling import is_compiled
from fastft.foreign.engines import rows_are_cut
from fastft.foreign.loaders import dispatches
from fastft.foreign.models import base_model, class_name, unwrapped
from fastft.foreign.sharding import reason_not_to_run
from fastft.integrations.block_mask import block_mask
from fastft.integrations.freed_memory import keep_freed_memory
from fastft.integrations.implementations import switched
from fastft.integrations.optimizer_check import check_optimizer, gradients_are_lost
from fastft.integrations.packed_loader import (
    batches_of,
    described,
    packing_collator,
    size_of_batches,
)
from fastft.integrations.pool_segments import pool_segments
from fastft.integrations.probe.check_packing import PackingLeakError, Unasked, Verdict
from fastft.integrations.probe.images import examples_in, image_examples
from fastft.integrations.probe.rows import Batches
from fastft.integrations.probe.verdicts import verdict_of
from fastft.integrations.rows_as_examples import (
    A_ROW_FOR_EACH,
    CAUSAL,
    first_labels_are_smoothed,
    labels_meet_rows,
    learns_first_tokens,
    refuse_generation,
    refuse_logits_of_rows,
    say_what_trainer_counts,
    smooths_labels_unshifted,
    warn_of_repeats,
)
from fastft.integrations.run_record import record_run
from fastft.integrations.weights_for_callbacks import follow_training
from fastft.optim.adamw import AdamW

# below "transformers", so that its verbosity rules
logger = logging.get_logger(f"transformers.{__name__}")

_DATA_PARALLEL = (
    "DataParallel cuts a packed batch between its devices; start one process for each instead"
)
ROWS_ARE_CUT = (
    "context parallelism (cp_size) and sequence parallelism (sp_size) cut the rows of a batch "
    "between processes, and the boundaries of packed sequences would be lost: leave these out, as "
    "attention within packs takes memory in their length alone, or train unpacked batches"
)
# by model: the state, which Trainer makes for each training, and the callbacks of the latest one
_trainings: weakref.WeakKeyDictionary[nn.Module, tuple[Any, weakref.WeakSet[PackingCallback]]] = (
    weakref.WeakKeyDictionary()
)


class PackingCallback(TrainerCallback):
    """Keeps the sequences of a `PackingCollator`'s batches apart, from train begin to train end.

    At train begin the model is probed as `fastft.check_packing` does it, once in a process for each
    configuration of model, adapters and batches. Where the model has transformers' sdpa or eager
    attention and `attn_implementation="fastft"` is exact, it gets that. A model with attention code
    of its own for which a mask of T x T is exact gets the mask. At the end it has what it had. Any
    other attention (flash, flex) was the user's choice and stays, as it does in a model that
    torch.compile has seen or will see, or that returns its attentions. A classifier gives a row of
    logits for each example, as with `fastft.pool_segments`, or is refused. Batches of other
    collators, such as those of an evaluation, are left alone. `evaluate` and `predict` outside
    `train()` run the model as it is: there it is probed after the first packed batch.

    Args:
        on_leak: `"error"`: raise where the model would be trained or evaluated on contaminated
            batches; `"warn"`: say so and go on.
        attention: False leaves the attention implementation alone.

    Attributes:
        switched: the attention, e.g. `"sdpa"`, in whose place the latest training had `"fastft"`;
            None where the model kept its own.
        probe: what the probe said of the latest training, `"exact"` or a few words; None before the
            first on packed batches.

    Raises:
        PackingLeakError: from `train()`, `evaluate()` and `predict()`, with the reason and the way
            out.
        ValueError: another `on_leak`; from `train()`, where an optimizer of fastft's would not
            train what it was made for, or not as `args` say (docs/adamw.md); where the collator's
            task is `sequence_classification` and `fastft.pool_segments`, which the callback calls,
            does not know how the model pools its tokens; where Trainer would generate from rows of
            several examples.
        TypeError: `attention` is no bool.

    `FusedLossCallback` does all this too, so that only one of the two is needed. An exception out
    of `train()` leaves the model's hooks and its attention, because Trainer then calls no callback:
    `restore()` takes the model back, and so does the next training of the model that has this
    callback, a new one or a `FusedLossCallback`.
    """

    def __init__(self, on_leak: str = "error", attention: bool = True) -> None:
        if on_leak not in ("error", "warn"):
            raise ValueError(f"on_leak must be 'error' or 'warn', got {on_leak!r}")
        self.on_leak, self.attention = on_leak, boolean("attention", attention)
        self.switched: str | None = None
        self.probe: str | None = None
        self._warned_of_repeats = self._warned_of_lost = False
        self._ahead: Verdict | None = None  # of the model before it was sharded
        self._apart, self._asked = False, False  # in a training; in this evaluation outside of one
        # the args of the Trainer that was handed an AdamW of fastft's
        self._handed: TrainingArguments | None = None
        self._kept = contextlib.ExitStack()
        # closed when nobody holds the callback any more, to which nothing in it must refer
        weakref.finalize(self, self._kept.close).atexit = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remembers whether the Trainer was handed an optimizer of fastft's."""
        self._handed = args if isinstance(kwargs.get("optimizer"), AdamW) else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Probes the model and keeps its sequences apart, after `restore()`: auto_find_batch_size
        begins anew."""
        if self._begin(args, state, **kwargs) is not None:
            self._kept.callback(record_run(kwargs["model"], args))
            keep_freed_memory(kwargs["model"], self._kept)
        else:
            logger.warning(
                "fastft: PackingCallback does nothing: batches do not come from a "
                "fastft.PackingCollator"
            )

    def _begin(
        self, args: TrainingArguments, state: TrainerState, **kwargs: Any
    ) -> PackingCollator | None:
        """Checks what trains, and keeps packed sequences apart; None without a collator of ours."""
        self.restore()
        self.switched = self.probe = None
        self._warned_of_lost = False
        model, loader = kwargs["model"], kwargs.get("train_dataloader")
        _training_begins(model, state, self)
        check_optimizer(args, state, model, kwargs.get("optimizer"), self._handed is args)
        follow_training(args, model, kwargs.get("optimizer"), self._kept)
        collator = packing_collator(loader)
        if collator is None:
            return None
        refuse_generation(args, collator)
        self._pool(model, loader, collator)
        cut = [_DATA_PARALLEL] if args.n_gpu > 1 else []
        cut += [REFUSAL] if dispatches(loader) else []
        cut += [ROWS_ARE_CUT] if rows_are_cut() else []
        for reason in cut:
            self._complain(reason)
        say_what_trainer_counts(args, collator, kwargs.get("processing_class"))
        self._refuse_one_axis(model, collator)
        if (
            collator.task in CAUSAL
            and smooths_labels_unshifted(args, model)
            and learns_first_tokens(loader, collator, model)
        ):
            self._complain(first_labels_are_smoothed(model))
        batches = self._with_images(
            model, loader, collator, batches_of(loader, collator, size_of_batches(loader, args))
        )
        # our attention breaks the compiler's graph, and would raise in a part of a batch
        compiled = args.torch_compile or is_compiled(model)
        switch = self.attention and not cut and not compiled
        self._keep_apart(model, self._verdict(model, batches, args, switch))
        return collator

    def _pool(self, model: nn.Module, loader: Any, collator: PackingCollator) -> None:
        """Gives a classifier a row of logits for each example, until `restore`; raises where it
        pools its tokens in a way that is not known."""
        if labels_meet_rows(model, loader, collator) and reason_not_to_run(unwrapped(model)):
            refuse_logits_of_rows(model, loader, collator)
        elif labels_meet_rows(model, loader, collator):
            self._kept.callback(pool_segments(model).remove)

    def _keep_apart(self, model: nn.Module, verdict: Verdict) -> None:
        """Does what the verdict says, and says it; `restore` undoes it."""
        leak, name = verdict.leak, class_name(model)
        masked = leak is not None and leak.block_mask
        if self.probe is None:
            self.probe = "exact" if leak is None else "exact with a mask of T x T"
            if leak is not None and not masked:
                self.probe = "exact for shorter rows" if leak.loud else "leaks"
        if leak is not None and leak.loud:
            logger.warning(f"fastft: {name}: {leak}")
        elif leak is not None and masked:
            logger.warning(f"fastft: {name} gets an attention mask of T x T: {leak.what}")
        elif leak is not None:
            self._complain(f"{name} does not keep packed sequences apart: {leak}")
        if verdict.parts:
            former = self._kept.enter_context(switched(base_model(model), verdict.parts))
            self.switched = ", ".join(sorted(former))
            logger.info(
                f"fastft: {name} has attention 'fastft', not {self.switched}, until the training's "
                "end"
            )
        self._kept.enter_context(block_mask(model) if masked else packed_attention(model))
        self._apart = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses to go on where another training of the model, inside this one, has ended what
        keeps its sequences apart."""
        known = self._apart or self._asked
        if not known and packing_collator(kwargs.get("train_dataloader")) is not None:
            self._asked = True  # one warning is enough
            self._complain(
                "something has called restore() since this training began, or another training of "
                "the model has begun: train one after the other"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warns once of a step that would move nothing."""
        if not self._warned_of_lost:
            self._warned_of_lost = gradients_are_lost(kwargs["model"], kwargs.get("optimizer"))

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses packed batches that nothing keeps apart, and says once where several ranks count
        examples twice."""
        if self._warned_of_repeats and (self._apart or self._asked):
            return
        loader = kwargs.get("eval_dataloader")
        collator = packing_collator(loader)
        if collator is None:
            return
        if not self._warned_of_repeats:
            self._warned_of_repeats = warn_of_repeats(args, loader, collator)
        if not self._apart and not self._asked:
            self._check_evaluation(args, kwargs["model"], loader, collator)
            self._asked = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The next evaluation may be of another model, or of the same in another way."""
        self._asked = False

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any,
        **kwargs: Any,
    ) -> None:
        """The next prediction may be of another model, too."""
        self.on_evaluate(args, state, control, metrics=metrics, **kwargs)

    def _check_evaluation(
        self, args: Any, model: nn.Module, loader: Any, collator: PackingCollator
    ) -> None:
        """Complains where the model as it is, outside a training, does not keep the packed batch
        apart that it got."""
        batches = batches_of(loader, collator, getattr(args, "eval_batch_size", None))
        if collator.pad_examples and batches.max_tokens is None:
            return
        refuse_logits_of_rows(model, loader, collator)
        self._refuse_one_axis(model, collator)
        batches = self._with_images(model, loader, collator, batches)
        try:
            leak = verdict_of(model, batches, args, as_it_is=True).leak
        except ValueError as error:
            logger.warning(
                f"fastft: whether this evaluation keeps packed sequences apart is not checked: "
                f"{error}"
            )
            return
        if leak is not None and not leak.loud:
            self._complain(
                "sequences are kept apart by the callback inside train() alone, and "
                f"{class_name(model)} as it is does not do so: {leak}. The loop is evaluate() "
                f"or predict() here; or evaluate with {A_ROW_FOR_EACH}",
                "evaluating",
            )

    def _refuse_one_axis(self, model: nn.Module, collator: PackingCollator) -> None:
        """Complains where a model's positions have several axes, and the batches' have one."""
        if collator.task == IMAGE_TEXT and collator.positions is None and has_several_axes(model):
            name = type(base_model(model)).__name__
            self._complain(
                f"{name} numbers the tokens of images on several axes (mRoPE), which the collator "
                f"has to ask it for: PackingCollator(task={IMAGE_TEXT!r}, model=model)"
            )

    def _with_images(
        self, model: nn.Module, loader: Any, collator: PackingCollator, batches: Batches
    ) -> Batches:
        """The description with some examples of the loader's, where these have images."""
        if collator.task != IMAGE_TEXT:
            return batches
        examples = examples_in(loader, collator, model)
        if examples is None:
            self._complain(
                "nobody knows whether images of an iterable dataset are kept apart, as it may be "
                "used up by looking: ask fastft.check_packing(model, examples=[...]) with some of "
                "its examples; on_leak='warn' then trains it"
            )
            return batches
        images = image_examples(model, examples)
        if images is None:
            logger.warning(
                "fastft: packing of images is not checked, as none of "
                f"{len(examples)} examples from all over the dataset has one"
            )
        return replace(batches, images=images)

    def _verdict(self, model: nn.Module, batches: Batches, args: Any, switch: bool) -> Verdict:
        """Asks the probe; warns of a model that is elsewhere, and finds nothing wrong with it."""
        if self._ahead is not None and reason_not_to_run(model) is not None:
            return self._ahead
        try:
            return verdict_of(model, batches, args, switch=switch)
        except Unasked as error:
            self.probe = "not possible"
            logger.warning(f"fastft: packing is not checked: {error}")
        except ValueError as error:
            self.probe = "not possible"
            self._complain(
                f"nobody knows whether {class_name(model)} keeps packed sequences apart: "
                f"{error}; on_leak='warn' trains it all the same"
            )
        return Verdict()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves no trace."""
        self.restore()

    def ask_ahead(
        self, model: nn.Module, loader: Any, max_tokens: int | None, args: Any
    ) -> str | None:
        """Probes a model before it is prepared for a training, in which its weights may be sharded.

        Args:
            model: as Trainer has it.
            loader: of batches of a `PackingCollator`.
            max_tokens: of a row; None where that is not known.
            args: of Trainer.

        Returns:
            Why it cannot get packed batches, a clause; None where it can, or where only the
            training will tell.
        """
        self._ahead = None
        parameter = next(model.parameters(), None)
        if parameter is None or parameter.device.type != args.device.type:
            return None  # it is moved later
        collator = packing_collator(loader)
        assert collator is not None
        batches = described(collator, max_tokens)
        if collator.task == IMAGE_TEXT:
            examples = examples_in(loader, collator, model)
            if examples is None:
                return "the images of an iterable dataset cannot be looked at before training"
            batches = replace(batches, images=image_examples(model, examples))
        name, compiled = class_name(model), args.torch_compile or is_compiled(model)
        try:
            verdict = verdict_of(model, batches, args, switch=self.attention and not compiled)
        except Unasked:
            return None
        except ValueError as error:
            return f"nobody knows whether {name} keeps packed sequences apart: {error}"
        leak = verdict.leak
        if leak is None or leak.loud or leak.block_mask:
            self._ahead = verdict
            return None
        return f"{name} does not keep packed sequences apart: {leak}"

    @property
    def keeps_apart(self) -> bool:
        """Whether a training on packed batches is under way, whose sequences are kept apart."""
        return self._apart

    def restore(self) -> None:
        """Takes the model back to stock. Harmless when called twice."""
        self._kept.close()
        self._apart = self._asked = False

    def _complain(self, message: str, doing: str = "training") -> None:
        if self.on_leak == "error":
            raise PackingLeakError(message)
        logger.warning(f"fastft: {doing} on contaminated batches: {message}")


def _training_begins(model: nn.Module, state: Any, callback: PackingCallback) -> None:
    """Restores the callbacks of an earlier training of `model`, in any wrapper, that has not ended.

    Trainer calls no callback after an exception, so that hooks, patched methods and changed
    configurations stay on the model; the callback that put them there may be of another Trainer.
    """
    base = base_model(model)
    former, callbacks = _trainings.get(base, (None, weakref.WeakSet()))
    if former is not state:
        for stale in list(callbacks):
            stale.restore()
        callbacks = weakref.WeakSet()
    callbacks.add(callback)
    _trainings[base] = state, callbacks
