"""The probe's row of examples with images, as a processor gave them.

Nobody but a processor knows what the inputs of a tower look like, so that the user's own examples
are asked with: the shortest of each kind (images, videos, both, text) and others up to three, each
alone and all packed. Then the first one gets other pixels, and other tokens where these are
ordinary; nothing behind it may move.

A mask that looks a later sequence's images up in the first one is right as long as both have theirs
at the same place: an example that is alike gets a few words in front. Another mask joins images
that touch, also those of two examples: where one ends with an image and another begins with one,
these come first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from fastft.data.batch import PackedBatch
from fastft.data.collator import PackingCollator
from fastft.data.keys import is_of_images
from fastft.data.pack import Pack, examples_of, is_pack
from fastft.data.packed import packs_of
from fastft.data.processed import holds_images, tensor_of, unbatched
from fastft.data.tasks.image_text import IMAGE_TEXT
from fastft.foreign.models import base_model
from fastft.foreign.objects import with_attributes
from fastft.integrations.probe.probe import Probe, Trouble, kinds_of_tokens, stock_attention
from fastft.integrations.probe.rows import Batches, Row, random_tokens, special_tokens
from fastft.integrations.probe.untouched import RandomStates

_LOOKED_AT, _PACKED = 16, 3  # examples; of these in the row, or more where there are more kinds
_WORDS = 3  # in front of an example that is alike
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
Example = dict[str, Any]


@dataclass(frozen=True, eq=False)
class ImageExamples:
    """Examples that a row is made of; two are equal where theirs have the same shapes.

    Attributes:
        examples: the tensors of each: (n,) of its tokens, of its images as they are.
    """

    examples: tuple[dict[str, Tensor], ...]

    @property
    def _shapes(self) -> Any:
        return tuple(
            tuple((key, tuple(value.shape)) for key, value in sorted(example.items()))
            for example in self.examples
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageExamples) and other._shapes == self._shapes

    def __hash__(self) -> int:
        return hash(self._shapes)


def image_examples(model: nn.Module, examples: Sequence[Example]) -> ImageExamples | None:
    """Chooses the shortest examples of each kind; None where none has an image.

    They are without the tokens that are masked and what `model` does not take, and their images are
    at different places.

    Raises:
        ValueError: an example has no `input_ids`.
    """
    base = base_model(model)
    takes = inspect.signature(base.forward).parameters
    made = []
    for index, example in enumerate(islice(examples, _LOOKED_AT)):
        if "input_ids" not in example:
            raise ValueError(f"example {index} has no input_ids, only {sorted(example)}")
        tensors = {
            key: tensor_of(value)
            for key, value in unbatched(example).items()
            if key in takes and key != "labels" and _has(key, value)
        }
        mask = tensors.pop("attention_mask", torch.ones_like(tensors["input_ids"])).bool()
        made.append({k: v if is_of_images(k) else v[mask] for k, v in tensors.items()})
    made.sort(key=lambda one: (not _kind(one), len(one["input_ids"])))
    if not (made and _kind(made[0])):
        return None
    kinds = {_kind(example): index for index, example in reversed([*enumerate(made)])}
    needed = dict.fromkeys([*_touching(base, made), *sorted(kinds.values())])
    row = [*dict.fromkeys([*needed, *range(len(made))])][: max(_PACKED, len(needed))]
    chosen = list[Example]()
    for example in (made[index] for index in row):
        while any(_alike(base, example, other) for other in chosen):
            example = _with_words(base, example)
        chosen.append(example)
    return ImageExamples(tuple(chosen))


def _touching(base: Any, examples: Sequence[Example]) -> list[int]:
    """The first example that ends with an image, and the first other one that begins with one."""
    tokens = [[getattr(base.config, name, None)] for name in _IMAGE_TOKENS]
    ids = [example["input_ids"] for example in examples]
    first, last = (
        [index for index, one in enumerate(ids) if one[end:][:1].tolist() in tokens]
        for end in (0, -1)
    )
    return next(([end, begin] for end in last for begin in first if end != begin), [])


def _has(key: str, value: Any) -> bool:
    return holds_images(key, value) if is_of_images(key) else value is not None


def _kind(example: Example) -> tuple[str, ...]:
    """The keys of images or videos that an example has; none of a text."""
    return tuple(sorted(filter(is_of_images, example)))


def _meant(base: Any, example: Example) -> Tensor:
    """Which tokens the configuration gives a meaning or stand for an image, bool (n,)."""
    ids = example["input_ids"]
    meant = torch.isin(ids, torch.tensor([*special_tokens(base)]))
    return meant | (example.get("mm_token_type_ids", torch.zeros_like(ids)) != 0)


def _alike(base: Any, example: Example, other: Example) -> bool:
    places, others = (_meant(base, one).nonzero() for one in (example, other))
    return len(places) > 0 and torch.equal(places, others)


def _with_words(base: Any, example: Example) -> Example:
    words = random_tokens(base, [_WORDS], 16)[0]
    front = {
        key: words if key == "input_ids" else value.new_zeros(_WORDS)  # the kind of text
        for key, value in example.items()
        if not is_of_images(key)
    }
    return example | {key: torch.cat([part, example[key]]) for key, part in front.items()}


def examples_in(loader: Any, collator: PackingCollator, model: nn.Module) -> list[Example] | None:
    """Examples from all over a loader's dataset, which may begin with texts, as they come to its
    `PackingCollator`; None of an iterable dataset, which may be used up by looking.

    What lies between loader and collator, another collator or Trainer's removal of columns, is done
    to them.
    """
    packs = packs_of(loader)
    dataset: Any = getattr(loader, "dataset", None) if packs is None else packs.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return None
    seen: list[Any] = []

    def note(features: Any) -> PackedBatch:
        seen.extend(features)
        return PackedBatch()

    states = RandomStates(model)
    try:
        with with_attributes(collator, collate=note):
            count = len(dataset)
            spread = {place * (count - 1) // (_LOOKED_AT - 1) for place in range(_LOOKED_AT)}
            loader.collate_fn([dataset[index] for index in sorted(spread)])
    finally:
        states.rewind()
    units = [examples_of(part) if is_pack(part) else [part] for part in seen]
    return [example for unit in units for example in unit]


@dataclass
class ImageRow(Row):
    """Sequences with images, packed into one row.

    Attributes:
        inputs: of each sequence, by key.
        changed: what the probe puts in place of the first sequence.
    """

    inputs: list[dict[str, Tensor]] = field(default_factory=list)
    changed: dict[str, Tensor] = field(default_factory=dict)


def _row_of(base: Any, examples: Sequence[dict[str, Tensor]]) -> ImageRow:
    tokens = [example["input_ids"] for example in examples]
    row = ImageRow(tokens, tokens, (tokens[0], tokens[0]), range(len(tokens)))
    row.inputs, row.changed = list(examples), _changed(base, examples[0])
    return row


def _changed(base: Any, example: dict[str, Tensor]) -> dict[str, Tensor]:
    """The example with other pixels, and other tokens where the configuration gives them no
    meaning and they stand for no image."""
    generator = torch.Generator().manual_seed(14)
    ids = example["input_ids"]
    words = random_tokens(base, [len(ids)], 15)[0]
    made = {"input_ids": torch.where(_meant(base, example), ids, words)}
    for key, value in example.items():
        if is_of_images(key) and value.is_floating_point():
            others = torch.randn(value.shape, generator=generator).to(value.dtype)
            made[key] = torch.where(value == 0, value, others)  # zeros may be no pixels
    return example | made


class ImageProbe(Probe):
    """The probe of a model whose batches have images.

    Raises:
        what the model raises for a text, or for an example, alone.
    """

    def __init__(self, model: nn.Module, batches: Batches, states: RandomStates) -> None:
        super().__init__(model, batches, states)
        assert batches.images is not None
        self._images = _row_of(self.base, batches.images.examples)
        with stock_attention(self.base), _positions_forgotten(self.base):
            self._images.alone = [
                self._call(_alone(inputs), len(inputs["input_ids"]), hidden=True)[0]
                for inputs in self._images.inputs
            ]

    def _trouble_of_more(self, start: int) -> Trouble | None:
        found = self._trouble_of(self._images, start)
        if found is None:
            return None
        return replace(found, what=f"with images, {found.what}", loud=False)

    def _task(self) -> dict[str, Any]:
        return {"task": IMAGE_TEXT, "model": self.base}

    def _examples(self, tokens: list[Tensor], targets: list[Tensor]) -> list[dict[str, Any]]:
        """Texts, as a processor gives them."""
        return [_labelled({"input_ids": ids, **kinds_of_tokens(self.base, ids)}) for ids in tokens]

    def _batch(
        self, row: Row, start: int, *, other: bool = False, rows: int, padded: bool
    ) -> tuple[dict[str, Any], int]:
        if not isinstance(row, ImageRow):
            return super()._batch(row, start, other=other, rows=rows, padded=padded)
        inputs = [row.changed if other else row.inputs[0], *row.inputs[1:]]
        collate = PackingCollator(position_ids_start=start, **self._task())
        batch: Any = collate([Pack([*map(_labelled, inputs)])])
        del batch["labels"]
        return batch, len(row)


def _labelled(example: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**example, "labels": example["input_ids"]}


def _alone(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One example as Trainer hands a batch of it to the model."""
    made = {key: v if is_of_images(key) else v[None] for key, v in inputs.items()}
    return made | {"attention_mask": torch.ones_like(made["input_ids"])}


@contextmanager
def _positions_forgotten(base: nn.Module) -> Iterator[None]:
    """Gives a model back what it remembers of the positions of its latest batch (`rope_deltas`)."""
    name = "rope_deltas"
    before = [(module, getattr(module, name)) for module in base.modules() if name in vars(module)]
    try:
        yield
    finally:
        for module, value in before:
            setattr(module, name, value)
