"""The packed batches of a plugged Trainer.

`get_train_dataloader` of this one Trainer makes the loader out of packs and a collator that packs;
its `train_dataset`, `data_collator` and `args` stay the user's, and so do its evaluations, but for
those inside `train()` that ask for a loss alone: theirs is the same for packed batches.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.utils import logging

from fastft import foreign
from fastft.data.collator import PackingCollator
from fastft.data.packed import PackedDataset, pack, packs_of
from fastft.data.streaming import REFUSAL
from fastft.integrations.packing import PackingCallback, why_not_packed
from fastft.integrations.plug_collator import (
    PackedBatches,
    Unpackable,
    first_position,
    padding_of,
    pads_left,
    rows_of,
    task_of,
)
from fastft.integrations.pool_segments import pool_segments
from fastft.integrations.untouched import RandomStates

# below "transformers", so that its verbosity rules
logger = logging.get_logger(f"transformers.{__name__}")

COLLATE = "collate"
_BATCHES = 4  # of the user's, which are looked at before training
_GROUPING = ("group_by_length", "batch_rebalance")


@dataclass
class Sample:
    """A few batches as the user's collator makes them.

    Attributes:
        padding: their share of padding.
        pads_left: whether they have it on the left.
        examples: in a batch.
    """

    padding: float
    pads_left: bool
    examples: int


class PackingPiece:
    """What `plug` does for batches.

    Args:
        trainer: a Trainer before `train()`.
        packing: of `plug`: tokens in a pack, "collate" or None.
        callback: keeps packed sequences apart; None where packing is None.

    Raises:
        ValueError: packing that is no such thing, or cannot be in this training.
    """

    def __init__(
        self, trainer: Trainer, packing: int | str | None, callback: PackingCallback | None
    ) -> None:
        self._trainer: Any = trainer
        self.packing, self._callback = packing, callback
        self._collator: PackedBatches | PackingCollator | None = None
        self._packs: Any = None
        self._sample: Sample | None = None
        self._leak: str | None = None  # why the model of the latest training got no packed batch
        self._training: contextlib.ExitStack | None = None
        self._why_not: str | None = None
        if packing is None:
            self._why_not = _without(trainer)
            return
        _check(trainer, packing)
        try:
            self._plan()
        except Unpackable as error:
            self._why_not = f"left alone: {error}"

    def _plan(self) -> None:
        """Decides on the collator, looks at batches, packs the training set."""
        trainer = self._trainer
        _refuse_packed(trainer, self.packing)
        stock = trainer.data_collator
        if isinstance(stock, PackingCollator):
            self._collator = stock
        else:
            self._collator = _collator_for(trainer)
            self._sample = _sample(trainer, self._collator.packing.task)
            if self._sample.pads_left and self._collator.packing.task == "causal_lm":
                self._why_left()
        if self.packing != COLLATE:
            self._pack()

    def _why_left(self) -> None:
        if self.packing == COLLATE:
            raise Unpackable(
                "stock also predicts the first token of each text from the padding left of it, "
                "packed batches do not (tokenizer.padding_side = 'right' trains without that)"
            )

    def _pack(self) -> Any:
        """The packs of the Trainer's training set as it is now."""
        dataset = self._trainer.train_dataset
        if self._packs is None or self._packs.dataset is not dataset:
            try:
                self._packs = pack(dataset, self.packing)  # type: ignore[arg-type]
            except ValueError as error:
                if "more than max_tokens" not in str(error):
                    raise Unpackable(f"its training set cannot be packed: {error}") from error
                raise ValueError(
                    f"packing={self.packing} is less than the longest example has: {error}. Give "
                    "plug as many tokens, shorten the examples, or hand the Trainer "
                    "fastft.pack(dataset, max_tokens, overlong=...) and a PackingCollator"
                ) from error
        return self._packs

    def install(self, stack: contextlib.ExitStack) -> None:
        """Gives the Trainer loaders of its own, until `stack` is closed."""
        if self._collator is None or self._why_not is not None:
            return
        trainer = self._trainer
        for name, make in (
            ("get_train_dataloader", self._train_loader),
            ("get_eval_dataloader", self._eval_loader),
        ):
            stock = getattr(trainer, name)
            loader = functools.wraps(stock)(functools.partial(make, stock))
            stack.enter_context(foreign.with_attributes(trainer, **{name: loader}))

    def train_begins(self, stack: contextlib.ExitStack) -> None:
        """Pools the segments of a classifier, until `stack` is closed."""
        if self._packs_now() and self._task() == "sequence_classification":
            stack.callback(pool_segments(self._trainer.model).remove)

    def _packs_now(self) -> bool:
        return self._collator is not None and self._why_not is None and self._leak is None

    def _task(self) -> str:
        return _packing(self._collator).task

    def _train_loader(self, stock: Any) -> Any:
        """`get_train_dataloader`: the user's own, with other batches in it."""
        trainer = self._trainer
        args = copy.copy(trainer.args)
        values: dict[str, Any] = {"data_collator": self._collator}
        if self.packing != COLLATE:
            values |= {"train_dataset": self._pack(), "_train_batch_size": 1}
            if args.train_sampling_strategy in _GROUPING:
                args.train_sampling_strategy = "random"
        self._leak = self._why_leaking()
        if self._leak is not None:
            return stock()
        with foreign.with_attributes(trainer, args=args, **values):
            return stock()

    def _why_leaking(self) -> str | None:
        """Why the model that is about to be trained gets no packed batches."""
        trainer, packing = self._trainer, _packing(self._collator)
        if packing.task == "sequence_classification":
            try:
                pool_segments(trainer.model).remove()
            except ValueError as error:
                return str(error)
        tokens = self.packing if isinstance(self.packing, int) else None
        switch = self._callback is not None and self._callback.attention
        return why_not_packed(trainer.model, packing, tokens, trainer.args, switch)

    def _eval_loader(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """`get_eval_dataloader`: packed where it is for a loss that is the same then."""
        trainer = self._trainer
        alike = self._callback is not None and self._callback.keeps_apart
        if not (alike and self._packs_now() and _asks_for_losses_alone(trainer)):
            return stock(*args, **kwargs)
        with foreign.with_attributes(trainer, data_collator=self._collator):
            return stock(*args, **kwargs)

    def line(self) -> str:
        """What batches are like, and which attention they get."""
        if self._why_not is not None:
            return self._why_not
        if self._leak is not None:
            return f"left alone: {self._leak}"
        words = [self._batches(), *self._padding(), *self._apart()]
        if _has_own_loss(self._trainer):
            words.append(f"{type(self._trainer).__name__}'s own loss gets rows of several examples")
        return ", ".join(words)

    def _batches(self) -> str:
        if self.packing == COLLATE:
            return "the same batches"
        packs, batch = self._packs, self._sample.examples if self._sample else None
        words = f"{self.packing} tokens, one pack a batch"
        if isinstance(packs, PackedDataset) and batch is not None:
            words += f" (about {len(packs.plan.indices) / len(packs):.3g} examples, not {batch})"
        if self._trainer.args.train_sampling_strategy in _GROUPING:
            words += ", in random order, not by length"
        return words

    def _padding(self) -> list[str]:
        """The share of padding, before and now."""
        if self._sample is None:
            return []
        stock = f"{100 * self._sample.padding:.0f} %"
        words = [f"no padding instead of {stock}" if self._sample.padding else "no padding before"]
        if self._sample.pads_left and self._task() == "causal_lm":
            words.append("no first token predicted from padding left of it")
        return words

    def _apart(self) -> list[str]:
        callback = self._callback
        if callback is None or callback.probe is None:
            return []
        config = getattr(foreign.base_model(self._trainer.model), "config", None)
        kept = getattr(config, "_attn_implementation", "its own")
        return [
            f"attention {'fastft' if callback.switched else kept}",
            f"probe {callback.probe}",
        ]


def _packing(collator: Any) -> PackingCollator:
    return collator if isinstance(collator, PackingCollator) else collator.packing


def _without(trainer: Trainer) -> str:
    if isinstance(trainer.data_collator, PackingCollator):
        return "PackingCollator as it was given"
    return "off: packing=None"


def _check(trainer: Trainer, packing: Any) -> None:
    """Raises for what a user has to decide otherwise."""
    is_count = isinstance(packing, int) and not isinstance(packing, bool) and packing > 0
    if not is_count and packing != COLLATE:
        raise ValueError(
            f"packing must be a number of tokens above 0, 'collate' or None, got {packing!r}"
        )
    args = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f"packing={packing!r}: DataParallel cuts a packed batch between its devices; start one "
            "process for each (torchrun), or leave packing out"
        )
    tuning = foreign.prompt_learning(trainer.model)
    if tuning is not None:
        raise ValueError(
            f"packing={packing!r}: {tuning} puts virtual tokens before each row of a batch, not "
            "before each text in it; use an adapter that adds no tokens (LoRA), or leave packing "
            "out"
        )
    if packing != COLLATE and args.auto_find_batch_size:
        raise ValueError(
            f"packing={packing}: a batch is one pack, which auto_find_batch_size cannot make "
            "smaller; leave that out and give plug fewer tokens"
        )
    dispatch = trainer.accelerator.dispatch_batches
    if isinstance(trainer.train_dataset, IterableDataset) and dispatch is not False:
        raise ValueError(f"packing={packing!r}: {REFUSAL}")


def _refuse_packed(trainer: Trainer, packing: Any) -> None:
    """Raises Unpackable where somebody else packs, or makes batches of another kind."""
    name, args = type(trainer).__name__, trainer.args
    kinds = {kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.startswith("trl.")}
    if kinds and "SFTTrainer" not in kinds:
        raise Unpackable(f"{name} makes batches of its own, of pairs or of what it generates")
    if kinds and (getattr(args, "packing", False) or getattr(trainer, "padding_free", False)):
        raise Unpackable("TRL packs already")
    if trainer.train_dataset is None:
        raise Unpackable("the Trainer has no train_dataset")
    if packs_of(trainer) is not None or packs_of(_Holder(trainer.train_dataset)) is not None:
        raise Unpackable("train_dataset is packed already")
    if packing == COLLATE and isinstance(trainer.data_collator, PackingCollator):
        raise Unpackable("PackingCollator packs already")


@dataclass
class _Holder:
    dataset: Any


def _collator_for(trainer: Any) -> PackedBatches:
    """The collator that packs, with the settings of the user's."""
    model, stock = trainer.model, trainer.data_collator
    task = task_of(model)
    config = foreign.base_model(model).config
    pad = getattr(getattr(stock, "tokenizer", None), "pad_token_id", None)
    pad = getattr(config, "pad_token_id", None) if pad is None else pad
    start = getattr(stock, "position_ids_start", None)
    options = {
        "pad_to_multiple_of": getattr(stock, "pad_to_multiple_of", None),
        "pad_token_id": pad if isinstance(pad, int) and pad >= 0 else 0,
        "position_ids_start": first_position(model) if start is None else start,
    }
    if task == "seq2seq":
        options["decoder_start_token_id"] = getattr(config, "decoder_start_token_id", None)
    return PackedBatches(stock, task, **options)


def _sample(trainer: Any, task: str) -> Sample:
    """Looks at batches of the user's loader, with what it removes and collates; nothing is drawn.

    Raises:
        Unpackable: they cannot be packed.
    """
    states = RandomStates(trainer.model)
    padding = total = 0
    left, size = False, trainer.args.train_batch_size
    try:
        with foreign.loaders_forgotten(trainer.accelerator):
            loader = trainer.get_train_dataloader()
        collate = _fresh(loader.collate_fn)
        for examples in islice(_examples(loader, size), _BATCHES):
            batch = _padded_batch(collate, examples, task)
            (some, all_), left = padding_of(batch), left or pads_left(batch)
            padding, total = padding + some, total + all_
    finally:
        states.rewind()
    return Sample(padding / max(total, 1), left, size)


def _padded_batch(collate: Any, examples: list[Any], task: str) -> dict[str, Any]:
    batch = collate(examples)
    try:
        rows_of(dict(batch), len(examples), task)
    except Unpackable as error:
        raise Unpackable(f"its batches {error}") from None
    return dict(batch)


def _examples(loader: Any, size: int) -> Any:
    """The examples of batches, without a worker or a copy to a device."""
    dataset, batches = loader.dataset, getattr(loader, "batch_sampler", None)
    if isinstance(dataset, IterableDataset):
        # one of `datasets` begins anew each time; another may be used up
        if foreign.is_iterable_dataset(dataset):
            yield list(islice(iter(dataset), size))
        return
    for indices in batches or []:
        yield [dataset[index] for index in indices]


def _fresh(collate: Any) -> Any:
    """A collator whose random generator, if it has one, is not the user's."""
    return copy.deepcopy(collate) if hasattr(collate, "generator") else collate


def _has_own_loss(trainer: Trainer) -> bool:
    own = type(trainer).compute_loss is not Trainer.compute_loss
    of_trl = type(trainer).compute_loss.__module__.startswith("trl.")
    return (own and not of_trl) or trainer.compute_loss_func is not None


def _asks_for_losses_alone(trainer: Trainer) -> bool:
    """Whether an evaluation is of Trainer's own code, and nothing looks at rows of predictions."""
    kinds = type(trainer), Trainer
    stock = all(
        getattr(kinds[0], name) is getattr(kinds[1], name)
        for name in ("compute_loss", "evaluation_loop")
    )
    return (
        stock
        and trainer.compute_metrics is None
        and trainer.compute_loss_func is None
        and not trainer.args.dataloader_persistent_workers
    )
