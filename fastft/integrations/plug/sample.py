"""A few batches of a Trainer that is to be packed, as its own collator makes them: can they be
packed to the same loss, and how much of them is padding?"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from fastft.data.keys import IGNORE_INDEX
from fastft.foreign import loaders, models, objects
from fastft.integrations.plug.collator import Unpackable, rows_of, shifts_usually
from fastft.integrations.probe.untouched import RandomStates

_BATCHES = 4  # of the user's, which are looked at before training


@dataclass
class Sample:
    """A few batches as the user's collator makes them.

    Attributes:
        examples: in a batch.
        tokens: of each batch, without padding.
        total: tokens with padding, in all of them.
        predicts_from_padding: whether some of that is on the left of a token with a label that
            counts.
        labels_first: whether a row's first token has a label that counts.
    """

    examples: int
    tokens: list[int] = field(default_factory=list)
    total: int = 0
    predicts_from_padding: bool = False
    labels_first: bool = False

    def add(self, batch: dict[str, Any]) -> None:
        """Counts a padded batch."""
        if "input_ids" not in batch:  # of sounds: what is packed is what they say
            labels = batch["labels"]
            self.total += labels.numel()
            self.tokens.append(int((labels != IGNORE_INDEX).sum()))
            return
        mask = batch.get("attention_mask")
        self.total += batch["input_ids"].numel()
        self.tokens.append(batch["input_ids"].numel() if mask is None else int(mask.sum()))
        labels = batch["labels"]
        if mask is not None and labels.shape == mask.shape:
            first = labels.gather(1, mask.long().argmax(1, keepdim=True))[:, 0]
            self.predicts_from_padding |= bool(((mask[:, 0] == 0) & (first != IGNORE_INDEX)).any())
        self.labels_first |= labels.dim() > 1 and bool((labels[:, 0] != IGNORE_INDEX).any())


def sample_of(trainer: Any, stock: Any, task: str) -> Sample:
    """Looks at batches of the user's loader, with what it removes and collates; nothing is drawn.

    Raises:
        Unpackable: they cannot be packed.
    """
    states = RandomStates(trainer.model)
    sample = Sample(trainer.args.train_batch_size)
    try:
        with objects.attributes_kept(trainer), loaders.loaders_forgotten(trainer.accelerator):
            loader = stock()
        collate = loader.collate_fn
        with _generator_kept(getattr(collate, "data_collator", collate)):
            for examples in islice(_examples(loader, sample.examples), _BATCHES):
                sample.add(_padded_batch(collate, examples, task, trainer.model))
    finally:
        states.rewind()
    return sample


def _padded_batch(collate: Any, examples: list[Any], task: str, model: Any) -> dict[str, Any]:
    batch = collate(examples)
    if not hasattr(batch, "items"):
        raise Unpackable(f"its batches are no dicts but {type(batch).__name__}")
    batch = dict(batch.items())
    if (
        task.endswith("seq2seq")
        and batch.get("decoder_input_ids") is None
        and not shifts_usually(model)
    ):
        raise Unpackable(
            f"{type(models.base_model(model)).__name__} shifts labels in a way of its own; with "
            "DataCollatorForSeq2Seq(..., model=model) the collator has it do so"
        )
    try:
        rows_of(batch, len(examples), task)
    except Unpackable as error:
        raise Unpackable(f"its batches {error}") from None
    return batch


def _examples(loader: Any, size: int) -> Any:
    """The examples of batches, without a worker or a copy to a device."""
    dataset, batches = loader.dataset, getattr(loader, "batch_sampler", None)
    if isinstance(dataset, IterableDataset):
        # one of `datasets` begins anew each time; another may be used up
        if loaders.is_iterable_dataset(dataset):
            yield list(islice(iter(dataset), size))
        return
    for indices in batches or []:
        yield [dataset[index] for index in indices]


@contextlib.contextmanager
def _generator_kept(collator: Any) -> Iterator[None]:
    """Leaves a collator's own random generator, if it has one, as it is."""
    given = vars(collator).get("generator") if hasattr(collator, "__dict__") else None
    if given is not None:
        collator.generator = copy.deepcopy(given)
    try:
        yield
    finally:
        if hasattr(collator, "generator"):
            collator.generator = given
