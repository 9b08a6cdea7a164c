"""The packed batches of a plugged Trainer.

`get_train_dataloader` of this one Trainer makes the loader out of packs and a collator that packs;
its `train_dataset`, `data_collator` and `args` stay the user's, and so do its evaluations, but for
those inside `train()` that ask for a loss alone: theirs is the same for packed batches.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer

from fastft.data.collator import PackingCollator
from fastft.data.packed import PackedDataset, pack, packs_in
from fastft.data.streaming import REFUSAL
from fastft.data.tasks.image_text import IMAGE_TEXT
from fastft.data.tasks.speech_seq2seq import ROW_TOKENS
from fastft.foreign import engines, models, objects
from fastft.integrations.packed_loader import packing_collator
from fastft.integrations.packing import ROWS_ARE_CUT, PackingCallback
from fastft.integrations.plug.collator import (
    PackedBatches,
    Unpackable,
    first_position,
    task_of,
)
from fastft.integrations.plug.sample import Sample, sample_of
from fastft.integrations.pool_segments import pool_segments
from fastft.integrations.rows_as_examples import (
    CAUSAL,
    first_labels_are_smoothed,
    smooths_labels_unshifted,
)

COLLATE = "collate"
_GROUPING = ("group_by_length", "batch_rebalance")


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
        self._leak: str | None = None  # why the latest training got no packed batch
        self._why_not: str | None = None
        if packing is None:
            self._why_not = _without(trainer)
            return
        _check(trainer, packing)
        try:
            self._plan(trainer.get_train_dataloader)
        except Unpackable as error:
            self._why_not = f"left alone: {error}"

    def _plan(self, stock: Any) -> None:
        """Decides on the collator, looks at batches, packs the training set.

        `stock`: `get_train_dataloader` of the Trainer's own.
        """
        trainer = self._trainer
        _refuse_packed(trainer, self.packing)
        own = trainer.data_collator
        if isinstance(own, PackingCollator):
            self._collator, self._sample = own, None
        else:
            self._collator = _collator_for(trainer)
            if self.packing != COLLATE and self._task() == "speech_seq2seq":
                raise Unpackable(
                    "a batch of sounds is as many as per_device_train_batch_size says; "
                    "packing='collate' packs what they say"
                )
            self._sample = sample_of(trainer, stock, self._collator.packing.task)
            if self.packing == COLLATE and self._predicts_from_padding():
                raise Unpackable(
                    "stock also predicts the first token of each text from the padding left of it, "
                    "packed batches do not; tokenizer.padding_side = 'right' trains without that"
                )
            if self.packing == COLLATE and self._divides_by_first_labels():
                raise Unpackable(
                    "stock divides the loss of this model by a count of labels that has the first "
                    "token of each text, which nothing predicts; packed batches leave it out, "
                    "and their loss would be larger"
                )
            if self._smooths_first_labels():
                raise Unpackable(first_labels_are_smoothed(trainer.model))
        if self.packing != COLLATE:
            self._pack()

    def _predicts_from_padding(self) -> bool:
        """Whether the user's batches have labels that the token before, a padding one, predicts."""
        sample = self._sample
        return sample is not None and sample.predicts_from_padding and self._is_causal()

    def _divides_by_first_labels(self) -> bool:
        """Whether Trainer takes no notice that a causal model shifts its labels: it does where the
        class is called ForCausalLM, and not for GPT2LMHeadModel."""
        trainer, sample = self._trainer, self._sample
        divides = trainer.model_accepts_loss_kwargs and not trainer._loss_shifts_labels
        return divides and self._is_causal() and sample is not None and sample.labels_first

    def _smooths_first_labels(self) -> bool:
        """Whether Trainer's label smoother gets labels of first tokens, unshifted."""
        trainer, sample = self._trainer, self._sample
        learned = sample is not None and sample.labels_first and self._is_causal()
        return learned and smooths_labels_unshifted(trainer.args, trainer.model)

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
            stack.callback(objects.put_attributes(trainer, **{name: loader}))
        count = functools.partial(_examples_in, trainer.num_examples)
        stack.callback(objects.put_attributes(trainer, num_examples=count))

    def train_begins(self, stack: contextlib.ExitStack) -> None:
        """Pools the segments of a classifier, until `stack` is closed."""
        if self._packs_now() and self._task() == "sequence_classification":
            stack.callback(pool_segments(self._trainer.model).remove)

    def _packs_now(self) -> bool:
        return self._collator is not None and self._why_not is None and self._leak is None

    def _task(self) -> str:
        return _packing(self._collator).task

    def _is_causal(self) -> bool:
        return self._task() in CAUSAL

    def _train_loader(self, stock: Any) -> Any:
        """`get_train_dataloader`: the user's own, with other batches in it."""
        trainer = self._trainer
        if trainer.data_collator is not _users(self._collator):  # since plug
            planned = self._collator
            try:
                self._plan(stock)
            except Unpackable as error:
                self._collator, self._leak = planned, str(error)
                return stock()
        args = copy.copy(trainer.args)
        values: dict[str, Any] = {"data_collator": self._collator}
        if self.packing != COLLATE:
            values |= {"train_dataset": self._pack(), "_train_batch_size": 1}
            if args.train_sampling_strategy in _GROUPING:
                args.train_sampling_strategy = "random"
        with objects.with_attributes(trainer, args=args, **values):
            loader = stock()
        if packing_collator(loader) is _packing(self._collator):
            self._leak = self._why_leaking(loader)
        else:
            kind = type(trainer).__name__
            self._leak = f"{kind}'s get_train_dataloader takes no other data_collator"
        return loader if self._leak is None else stock()

    def _why_leaking(self, loader: Any) -> str | None:
        """Why the model that is about to be trained gets no packed batches, those of `loader`."""
        trainer, packing = self._trainer, _packing(self._collator)
        if packing.task == "sequence_classification":
            try:
                pool_segments(trainer.model).remove()
            except ValueError as error:
                return str(error)
        tokens = self.packing if isinstance(self.packing, int) else None
        assert self._callback is not None
        return self._callback.ask_ahead(trainer.model, loader, tokens, trainer.args)

    def _eval_loader(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """`get_eval_dataloader`: packed where it is for a loss that is the same then."""
        trainer = self._trainer
        alike = self._callback is not None and self._callback.keeps_apart
        if not (alike and self._packs_now() and _asks_for_losses_alone(trainer)):
            return stock(*args, **kwargs)
        with objects.with_attributes(trainer, data_collator=self._collator):
            return stock(*args, **kwargs)

    def line(self) -> str:
        """What batches are like, and which attention they get."""
        if self._why_not is not None:
            return self._why_not
        if self._leak is not None:
            return f"left alone: {self._leak}"
        words = [self._batches(), *self._padding(), *self._apart()]
        if _draws(self._trainer.model):
            words.append("dropout draws other masks than on padded rows")
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
        sample, multiple = self._sample, _packing(self._collator).pad_to_multiple_of or 1
        if sample is None or not sample.total:
            return []
        tokens, plan = torch.tensor(sample.tokens), getattr(self._packs, "plan", None)
        if plan is not None:
            ends = torch.cat([plan.lengths.new_zeros(1), plan.lengths.cumsum(0)])
            tokens = ends[plan.offsets].diff()
        now = _share(int(tokens.sum()), int((tokens + -tokens % multiple).sum()))
        before = _share(sum(sample.tokens), sample.total)
        words = [f"{now} padding" + (", as before" if now == before else f" instead of {before}")]
        if self._predicts_from_padding():
            words.append("no first token predicted from padding left of it")
        return words

    def _apart(self) -> list[str]:
        callback = self._callback
        if callback is None or callback.probe is None:
            return []
        config = getattr(models.base_model(self._trainer.model), "config", None)
        kept = getattr(config, "_attn_implementation", "its own")
        return [
            f"attention {'fastft' if callback.switched else kept}",
            f"probe {callback.probe}",
        ]


def _examples_in(stock: Any, dataloader: Any) -> int:
    """`num_examples`, of which Trainer makes its examples a second: those in packs."""
    packs = packs_in(getattr(dataloader, "dataset", None))
    return len(packs.plan.indices) if isinstance(packs, PackedDataset) else stock(dataloader)


def _share(tokens: int, total: int) -> str:
    return "no" if tokens == total else f"{100 * (1 - tokens / total):.0f} %"


def _packing(collator: Any) -> PackingCollator:
    return collator if isinstance(collator, PackingCollator) else collator.packing


def _users(collator: Any) -> Any:
    return collator.collator if isinstance(collator, PackedBatches) else collator


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
    if engines.rows_are_cut():
        raise ValueError(f"packing={packing!r}: {ROWS_ARE_CUT}")
    tuning = models.prompt_learning(trainer.model)
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
    if packs_in(trainer.train_dataset) is not None:
        raise Unpackable("train_dataset is packed already")
    if trainer.neftune_noise_alpha is not None:
        raise Unpackable("NEFTune makes its noise by the length of a row (neftune_noise_alpha)")
    if packing == COLLATE and isinstance(trainer.data_collator, PackingCollator):
        raise Unpackable("PackingCollator packs already")


def _collator_for(trainer: Any) -> PackedBatches:
    """The collator that packs, with the settings of the user's."""
    model, stock = trainer.model, trainer.data_collator
    task = task_of(model)
    config = models.base_model(model).config
    # of images and text a processor holds the tokenizer
    holder = getattr(stock, "processor", stock)
    pad = getattr(getattr(holder, "tokenizer", holder), "pad_token_id", None)
    pad = getattr(config, "pad_token_id", None) if pad is None else pad
    start = getattr(stock, "position_ids_start", None)
    options: dict[str, Any] = {
        "pad_to_multiple_of": getattr(stock, "pad_to_multiple_of", None),
        "pad_token_id": pad if isinstance(pad, int) and pad >= 0 else 0,
        "position_ids_start": first_position(model) if start is None else start,
    }
    if task == IMAGE_TEXT:
        options["model"] = model
    if task.endswith("seq2seq"):
        options["decoder_start_token_id"] = getattr(config, "decoder_start_token_id", None)
    if task == "speech_seq2seq":
        options["row_tokens"] = getattr(config, "max_target_positions", ROW_TOKENS)
    return PackedBatches(stock, task, **options)


def _draws(model: Any) -> bool:
    """Whether a training of this model has dropout, of a module or of attention."""
    config = getattr(models.base_model(model), "config", None)
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    rates += [
        rate
        for name, rate in ({} if config is None else config.to_dict()).items()
        if re.search("attn_pdrop|attention.*dropout|^dropout", name) and isinstance(rate, float)
    ]
    return any(rate > 0 for rate in rates)


def _has_own_loss(trainer: Trainer) -> bool:
    own = type(trainer).compute_loss is not Trainer.compute_loss
    of_trl = type(trainer).compute_loss.__module__.startswith("trl.")
    return (own and not of_trl) or trainer.compute_loss_func is not None


def _asks_for_losses_alone(trainer: Trainer) -> bool:
    """Whether an evaluation is of Trainer's own code, and nothing looks at rows of predictions."""
    stock = all(
        getattr(type(trainer), name).__module__.startswith("transformers.")
        for name in ("compute_loss", "prediction_step", "evaluation_loop")
    )
    return (
        stock
        and trainer.compute_metrics is None
        and trainer.compute_loss_func is None
        and not trainer.args.dataloader_persistent_workers
    )
