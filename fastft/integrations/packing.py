"""Packed batches in `transformers.Trainer`: sequences are kept apart, or nothing is trained."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from fastft.attention.segments import keeps_segments, packed_attention
from fastft.data.collator import PackingCollator
from fastft.data.keys import LABEL_SEGMENTS
from fastft.data.multi_axis import has_several_axes
from fastft.data.packed import PackedDataset, packs_of
from fastft.data.streaming import REFUSAL
from fastft.foreign import (
    base_model,
    class_name,
    dispatches,
    inner_loader,
    is_compiled,
    modules_with_hooks,
    reason_not_to_run,
    rows_are_cut,
    unwrapped,
)
from fastft.integrations.block_mask import block_mask
from fastft.integrations.check_packing import PackingLeakError, Unasked, Verdict, judge
from fastft.integrations.implementations import attention_configs, switched
from fastft.integrations.optimizer_check import check_optimizer, gradients_are_lost
from fastft.integrations.pool_segments import is_pooled, pool_segments
from fastft.integrations.probe_images import TASK, examples_in, image_examples
from fastft.integrations.probe_rows import Batches
from fastft.integrations.run_record import record_run
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
_PADDED = (
    "PackingCollator(pad_examples=True) with train_dataset=fastft.pack(...) and eval_dataset the "
    "dataset itself"
)
_verdicts: dict[Any, Verdict] = {}
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
        if not isinstance(attention, bool):
            raise TypeError(f"attention must be True or False, got {attention!r}")
        self.on_leak, self.attention = on_leak, attention
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
        collator = packing_collator(loader)
        if collator is None:
            return None
        _refuse_generation(args, collator)
        self._pool(model, loader, collator)
        cut = [_DATA_PARALLEL] if args.n_gpu > 1 else []
        cut += [REFUSAL] if dispatches(loader) else []
        cut += [ROWS_ARE_CUT] if rows_are_cut() else []
        for reason in cut:
            self._complain(reason)
        _say_what_trainer_counts(args, collator, kwargs.get("processing_class"))
        self._refuse_one_axis(model, collator)
        batches = self._with_images(
            model, loader, collator, _batches(loader, collator, _size_of_batches(loader, args))
        )
        # our attention breaks the compiler's graph, and would raise in a part of a batch
        compiled = args.torch_compile or is_compiled(model)
        switch = self.attention and not cut and not compiled
        self._keep_apart(model, self._verdict(model, batches, args, switch))
        return collator

    def _pool(self, model: nn.Module, loader: Any, collator: PackingCollator) -> None:
        """Gives a classifier a row of logits for each example, until `restore`; raises where it
        pools its tokens in a way that is not known."""
        if _labels_meet_rows(model, loader, collator) and reason_not_to_run(unwrapped(model)):
            _refuse_logits_of_rows(model, loader, collator)
        elif _labels_meet_rows(model, loader, collator):
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
            self._warned_of_repeats = _warn_of_repeats(args, loader, collator)
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
        batches = _batches(loader, collator, getattr(args, "eval_batch_size", None))
        if collator.pad_examples and batches.max_tokens is None:
            return
        _refuse_logits_of_rows(model, loader, collator)
        self._refuse_one_axis(model, collator)
        batches = self._with_images(model, loader, collator, batches)
        try:
            leak = _verdict(model, batches, args, as_it_is=True).leak
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
                f"or predict() here; or evaluate with {_PADDED}",
                "evaluating",
            )

    def _refuse_one_axis(self, model: nn.Module, collator: PackingCollator) -> None:
        """Complains where a model's positions have several axes, and the batches' have one."""
        if collator.task == TASK and collator.positions is None and has_several_axes(model):
            name = type(base_model(model)).__name__
            self._complain(
                f"{name} numbers the tokens of images on several axes (mRoPE), which the collator "
                f"has to ask it for: PackingCollator(task={TASK!r}, model=model)"
            )

    def _with_images(
        self, model: nn.Module, loader: Any, collator: PackingCollator, batches: Batches
    ) -> Batches:
        """The description with some examples of the loader's, where these have images."""
        if collator.task != TASK:
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
            return _verdict(model, batches, args, switch=switch)
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
        batches = _described(collator, max_tokens)
        if collator.task == TASK:
            examples = examples_in(loader, collator, model)
            if examples is None:
                return "the images of an iterable dataset cannot be looked at before training"
            batches = replace(batches, images=image_examples(model, examples))
        name, compiled = class_name(model), args.torch_compile or is_compiled(model)
        try:
            verdict = _verdict(model, batches, args, switch=self.attention and not compiled)
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


def packing_collator(dataloader: Any) -> PackingCollator | None:
    """The collator of a loader's batches, also inside what calls it: wrappers, functions, methods,
    partials."""
    level: list[Any] = [getattr(inner_loader(dataloader), "collate_fn", None)]
    seen: set[int] = set()
    for _ in range(5):
        for part in level:
            if isinstance(part, PackingCollator):
                return part
        seen.update(map(id, level))
        parts = (part for whole in level for part in _parts(whole) if id(part) not in seen)
        level = [part for part in parts if callable(part) or hasattr(part, "data_collator")]
    return None


def _parts(whole: Any) -> Iterator[Any]:
    """Yields what a callable refers to, without models and classes."""
    if isinstance(whole, nn.Module | type):
        return
    if isinstance(whole, functools.partial):
        yield from (whole.func, *whole.args, *whole.keywords.values())
    elif isinstance(whole, types.MethodType):
        yield from (whole.__self__, whole.__func__)
    elif isinstance(whole, types.FunctionType):
        for cell in whole.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is empty
                yield cell.cell_contents
        yield from (
            whole.__globals__[name] for name in whole.__code__.co_names if name in whole.__globals__
        )
    else:
        yield from getattr(whole, "__dict__", {}).values()


def _refuse_generation(args: TrainingArguments, collator: PackingCollator) -> None:
    """Raises ValueError where Trainer would generate from rows that hold several examples."""
    if getattr(args, "predict_with_generate", False) and not collator.pad_examples:
        if collator.task == "speech_seq2seq":
            raise ValueError(
                "fastft: predict_with_generate=True would generate from packed batches; give the "
                "Trainer your padding collator, and fastft.plug(trainer, packing='collate'), which "
                "packs in training alone"
            )
        raise ValueError(
            "fastft: predict_with_generate=True would generate one text for a row of several "
            f"examples; use {_PADDED}, which then has a row for each example, or leave "
            "predict_with_generate out"
        )


def _warn_of_repeats(args: TrainingArguments, loader: Any, collator: PackingCollator) -> bool:
    """Warns, and says whether it did, where predictions of repeated examples would stay.

    accelerate gives some examples out twice, so that all ranks have equally many, and takes their
    predictions away again by counting rows. Rows of several examples it cannot count.
    """
    if (
        args.world_size <= 1
        or args.prediction_loss_only
        or collator.task == "sequence_classification"  # pool_segments refuses these
        or collator.rows >= args.per_device_eval_batch_size
        or collator.pad_examples
    ):
        return False
    try:
        repeated = -len(loader.dataset) % (args.per_device_eval_batch_size * args.world_size)
    except TypeError:  # an iterable dataset has no length
        return False
    if repeated:
        logger.warning(
            f"fastft: this evaluation has {repeated} examples (or packs) twice, so that ranks have "
            "equally many. The loss leaves them out; predictions, and metrics computed from them, "
            f"do not, as rows hold several examples. For a row each: {_PADDED}; or "
            "rows=per_device_eval_batch_size"
        )
    return bool(repeated)


def _labels_meet_rows(model: nn.Module, loader: Any, collator: PackingCollator) -> bool:
    """Whether labels of examples would meet logits of rows: torch broadcasts the two in a
    regression."""
    if collator.task != "sequence_classification" or is_pooled(model):
        return False
    padded = collator.pad_examples and packs_of(loader) is None
    signature = inspect.signature(base_model(model).forward)
    return not padded and LABEL_SEGMENTS not in signature.parameters


def _refuse_logits_of_rows(model: nn.Module, loader: Any, collator: PackingCollator) -> None:
    """Raises ValueError where labels of examples would meet logits of rows."""
    if _labels_meet_rows(model, loader, collator):
        raise ValueError(
            f"{type(base_model(model)).__name__} makes one row of logits of a row of several "
            "examples: call fastft.pool_segments(model), which makes one of each example, before "
            "the model is sharded, and before an evaluation outside of a training"
        )


def _batches(loader: Any, collator: PackingCollator, packs: int | None) -> Batches:
    """Describes the loader's batches, of so many packs or examples; the longest row is known of
    packs alone."""
    dataset, longest = packs_of(loader), None
    if packs is not None and dataset is not None:
        tokens = (
            dataset.plan.max_tokens if isinstance(dataset, PackedDataset) else dataset.max_tokens
        )
        longest = -(-packs // collator.rows) * tokens
    return _described(collator, longest)


def _described(collator: PackingCollator, longest: int | None) -> Batches:
    """Describes batches of rows of at most `longest` tokens, before they are rounded up."""
    if collator.task == "speech_seq2seq":
        return Batches(collator.position_ids_start, collator.row_tokens, padded=True)
    multiple = collator.pad_to_multiple_of or 1
    longest = None if longest is None else longest + -longest % multiple
    return Batches(
        collator.position_ids_start, longest, collator.rows, collator.rows > 1 or multiple > 1
    )


def _size_of_batches(loader: Any, args: Any) -> int | None:
    """How many packs or examples are in a batch."""
    sampled: int | None = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return sampled or getattr(args, "train_batch_size", None)


def _verdict(
    model: nn.Module, batches: Batches, args: Any, *, as_it_is: bool = False, switch: bool = False
) -> Verdict:
    """Probes a model that keeps sequences apart; `as_it_is`: by its own means, if at all."""
    hooked, elsewhere = modules_with_hooks(model), reason_not_to_run(model)
    name = class_name(base_model(model))
    if elsewhere is not None:
        logger.info(
            f"fastft: {elsewhere}: in its place the packing probe asks a small model of the class "
            f"and configuration of {name}, with random weights"
        )
    if hooked:
        names = ", ".join(hooked[:5]) + (" and others" if len(hooked) > 5 else "")
        logger.warning(
            f"fastft: the packing probe asks a twin of {name} ({elsewhere}), without the forward "
            f"hooks of {names}"
            if elsewhere is not None
            else f"fastft: the packing probe runs {name} on batches of its own, which the forward "
            f"hooks of {names} see too"
        )
    key = (_key(model, batches, args), as_it_is, as_it_is and keeps_segments(model), switch)
    if key not in _verdicts or hooked:
        with contextlib.nullcontext() if as_it_is else packed_attention(model):
            _verdicts[key] = judge(model, batches, switch=switch)
    return _verdicts[key]


def _key(model: nn.Module, batches: Batches, args: Any) -> Any:
    """Gathers all that a verdict may depend on, but weights and the code of hooks."""
    adapters = getattr(model, "peft_config", {})
    return (
        batches,
        tuple(
            (name, type(module), _attributes(module))
            for name, module in model.named_modules(remove_duplicate=False)
        ),
        tuple(
            (str(vars(config)), config._attn_implementation) for config in attention_configs(model)
        ),
        frozenset((parameter.dtype, parameter.device.type) for parameter in model.parameters()),
        str(adapters) + str(getattr(model, "active_adapter", None)),
        (getattr(args, "bf16", None), getattr(args, "fp16", None)),
    )


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    """Plain attributes of a module, which may be changed after it was made, and functions that were
    put on it."""
    plain = [
        (name, value)
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, bool | int | float | str | None)
    ]
    functions = [
        (name, id(value))
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType)
    ]
    return (*plain, *functions)


def _say_what_trainer_counts(args: Any, collator: PackingCollator, processing_class: Any) -> None:
    """Trainer knows padding by the attention mask, which a packed batch has not, or by the padding
    token."""
    if getattr(args, "include_num_input_tokens_seen", "no") != "non_padding":
        return
    pad = getattr(processing_class, "pad_token_id", None)
    pads = collator.rows > 1 or collator.pad_to_multiple_of is not None
    if pads and collator.pad_token_id != pad:
        logger.warning(
            "fastft: num_input_tokens_seen will count padding: Trainer leaves out the padding "
            f"token of processing_class, {pad}, that of PackingCollator is "
            f"{collator.pad_token_id}; give it pad_token_id={pad}"
        )
    elif pad is not None and pad == getattr(processing_class, "eos_token_id", None):
        logger.warning(
            "fastft: num_input_tokens_seen will leave out every end token: Trainer takes the "
            f"padding token of processing_class, {pad}, for padding. Without padding in the rows, "
            "'all' counts right"
        )
