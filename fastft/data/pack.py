"""A pack: the examples that go through the model together, and parts of examples.

Planning makes packs, collation lays them out, and this room is all that the two have in common,
with the forms in which an example may come (`processed.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.data.column_rows import Column, ColumnRows, lengths_in
from fastft.data.columns import (
    Columns,
    flatten,
    flatten_column,
    integers_of,
    token_columns,
)
from fastft.data.documents import (
    KEYS,
    MASK,
    SIZES,
    cut_documents,
    documents_of,
    is_per_token,
    shortened,
    split_documents,
    telling,
)
from fastft.data.keys import IGNORE_INDEX, is_of_images, refuse_reserved
from fastft.data.processed import holds_images, unbatched


class Values:
    """The values of one key in the examples of a pack.

    Its length is that of all of them together, in `input_ids` tokens: `Trainer` asks a feature for
    that where it groups by length.

    Attributes:
        held: the values, or the rows of a column that become `values` when somebody asks for these.
    """

    __slots__ = ("held",)

    def __init__(self, values: Column) -> None:
        self.held = values

    @property
    def values(self) -> list[Any]:
        """The values, which may be written to."""
        if isinstance(self.held, ColumnRows):
            self.held = [*self.held]
        return self.held

    @values.setter
    def values(self, values: list[Any]) -> None:
        self.held = values

    def __reduce__(self) -> Any:
        return Values, (self.values,)

    def __len__(self) -> int:
        if isinstance(self.held, ColumnRows):
            return sum(self.held.lengths)
        return sum(len(value) for value in self.held if hasattr(value, "__len__"))

    def __getitem__(self, place: Any) -> Any:
        raise TypeError(
            "only fastft.PackingCollator makes batches of the packs of fastft.pack: give it to "
            "Trainer as data_collator=fastft.PackingCollator(), or to a DataLoader as collate_fn"
        )


class Pack(dict[str, Values]):
    """Examples that go through the model together, as `fastft.pack` yields them.

    It is a dict by column, of `Values`, so that Trainer's `remove_unused_columns` takes out of it
    what the model has no argument for, as it does with an example. Rows that another tool packed
    are cut into their documents; see `documents.py`.

    Args:
        examples: dicts with the same keys.

    Raises:
        ValueError: their keys differ; a row's documents cannot be told apart.
    """

    def __init__(self, examples: Sequence[dict[str, Any]] = ()) -> None:
        self._hold(transposed(examples))

    @staticmethod
    def of_columns(columns: Columns) -> Pack:
        """Makes a pack of the columns of its examples, `input_ids` among them."""
        pack = Pack.__new__(Pack)
        pack._hold(columns)
        return pack

    def _hold(self, columns: Columns) -> None:
        if not KEYS.isdisjoint(columns):
            lengths = lengths_in(columns["input_ids"])
            columns = cut_documents(columns, lengths, documents_of(columns, lengths))
        for key, values in columns.items():
            self[key] = Values(values)

    @property
    def examples(self) -> list[dict[str, Any]]:
        """The examples, or documents, as dicts."""
        return examples_of(self)

    def joined(self) -> dict[str, Tensor]:
        """Joins the examples into one row, without what is masked or not per token.

        Returns:
            A tensor (T,) of each column, and `seq_lengths`, the tokens of each example.

        Raises:
            ValueError: a column has not one number for each token.
        """
        columns: Columns = {key: column.held for key, column in self.items()}
        columns = token_columns(columns, ["labels", *telling(columns)])
        refuse_reserved(columns)
        columns, lengths, _ = split_documents(columns, [len(columns["input_ids"])])
        row = {key: flatten_column(key, values) for key, values in columns.items()}
        return row | {SIZES: integers_of(lengths)}

    def __reduce__(self) -> Any:
        return Pack, (self.examples,)


def packs_of_columns(columns: Columns, sizes: Sequence[int]) -> list[Pack]:
    """Makes packs of so many examples each, which follow one another in the columns."""
    of_packs = [
        {key: values[end - size : end] for key, values in columns.items()}
        for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)
    ]
    return [Pack.of_columns(part) for part in of_packs]


def transposed(examples: Sequence[dict[str, Any]]) -> Columns:
    """Turns examples into columns; raises ValueError where keys differ, or there are no tokens.

    Keys of images may be missing where there is no image: None stands there.
    """
    if not examples:
        return {}
    keys = examples[0].keys()
    alike = [example.keys() for example in examples].count(keys) == len(examples)
    if "input_ids" in keys and alike:
        return {key: [example[key] for example in examples] for key in keys}
    of_tokens = [key for key in keys if not is_of_images(key)]
    for index, example in enumerate(examples):
        if "input_ids" not in example:
            raise ValueError(f"example {index} has no input_ids, only {sorted(example)}")
        if {key for key in example if not is_of_images(key)} != {*of_tokens}:
            raise ValueError(
                f"example {index} has the keys {sorted(example)}, example 0 has {sorted(keys)}"
            )
    of_images = dict.fromkeys(key for one in examples for key in one if is_of_images(key))
    return {key: [one.get(key) for one in examples] for key in (*of_tokens, *of_images)}


def is_pack(feature: Any) -> bool:
    """Recognises a `Pack`, also what Trainer's `remove_unused_columns` left of one."""
    return isinstance(feature, Pack) or (
        isinstance(feature, dict) and type(feature.get("input_ids")) is Values
    )


def examples_of(pack: dict[str, Values]) -> list[dict[str, Any]]:
    """Reads the examples of a pack as dicts."""
    columns = [column.values for column in pack.values()]
    return [dict(zip(pack, row, strict=True)) for row in zip(*columns, strict=True)]


def refuse_images(example: dict[str, Any], length: int) -> None:
    """Raises ValueError where an example that is to be cut to `length` tokens has images."""
    for key, value in example.items():
        if holds_images(key, value):
            raise ValueError(
                f"an example has {key} and cannot be cut to {length} tokens: the rest of its "
                "images would meet no token. overlong='drop' leaves such examples out, a larger "
                "max_tokens keeps them"
            )


def refuse_masked_pieces(example: dict[str, Any], length: int) -> None:
    """Raises ValueError where an example, cut into pieces of `length` tokens, has one of padding
    alone."""
    mask, tokens = example.get(MASK), len(example["input_ids"])
    if mask is None or not is_per_token(mask, tokens):
        return
    kept = flatten(MASK, [mask]) != 0
    if not all(bool(piece.any()) for piece in kept.split(length)):
        raise ValueError(
            f"overlong='split' would make a piece of padding alone: an example has {tokens} tokens "
            f"of which its {MASK} keeps {int(kept.sum())}, max_tokens is {length}. Leave the "
            "padding out (tokenize with padding=False), packs need none"
        )


def cut(example: dict[str, Any], start: int, length: int) -> dict[str, Any]:
    """Cuts `length` tokens from `start` out of an example.

    A key that has another number of values than tokens is kept whole. Of a row that another tool
    packed the part has its share of each document.

    Raises:
        ValueError: it has images, whose tokens and pixels belong together.
    """
    tokens = len(example["input_ids"])
    if start == 0 and tokens == length:
        return example
    refuse_images(example, length)
    rewritten = shortened(example, start, length) if example.keys() & KEYS else {}
    return {
        key: rewritten[key]
        if key in rewritten
        else value[start : start + length]
        if is_per_token(value, tokens)
        else value
        for key, value in example.items()
    }


def filler(example: dict[str, Any]) -> dict[str, Any]:
    """Makes what stands in an empty pack: one token of an example, with ignored labels.

    Raises:
        ValueError: the labels are not integers, of which none can be ignored.
    """
    example = {key: value for key, value in unbatched(example).items() if not is_of_images(key)}
    part = cut(example, 0, 1)
    if "labels" not in part:
        return part  # a causal model has nothing to predict the first token from
    given = part["labels"]
    labels = torch.as_tensor(given.tolist() if hasattr(given, "tolist") else given)
    if labels.is_floating_point():
        raise ValueError(
            "balance needs more packs than there are examples for, and the labels cannot be ignored"
        )
    return part | {"labels": torch.full_like(labels, IGNORE_INDEX).tolist()}
