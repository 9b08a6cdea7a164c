"""What a collator is given, as columns: dicts, rows of Arrow tables, and packs, which are columns
already."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from fastft.data.arrow_rows import list_memory
from fastft.data.columns import flatten_integers
from fastft.data.documents import KEYS, cut_documents, document_lengths

Columns = dict[str, list[Any]]


class Values:
    """One key's values in the examples of a pack. Its length is that of all of them together: in
    `input_ids`, tokens.

    `Trainer` asks a feature for that where it groups by length.
    """

    __slots__ = ("values",)

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return sum(len(value) for value in self.values if hasattr(value, "__len__"))

    def __getitem__(self, place: Any) -> Any:
        raise TypeError(
            "only fastft.PackingCollator makes batches of the packs of fastft.pack: give it to "
            "Trainer as "
            "data_collator=fastft.PackingCollator(), or to a DataLoader as collate_fn"
        )


class Pack(dict[str, Values]):
    """Examples that go through the model together, as `fastft.pack` yields them: a `Values` for
    each of their keys.

    It is a dict by column, so that Trainer's `remove_unused_columns` takes out of it what the model
    has no argument for, as it does with an example. Rows that another tool packed are cut into
    their documents; see `documents.py`.

    Args:
        examples: dicts with the same keys.

    Raises:
        ValueError: their keys differ; a row's documents cannot be told apart.
    """

    def __init__(self, examples: Sequence[dict[str, Any]] = ()) -> None:
        columns = _transposed(examples)
        if columns.keys() & KEYS:
            lengths = [*map(len, columns["input_ids"])]
            documents = document_lengths(columns, lengths, masks=_masks(columns, lengths))
            columns = cut_documents(columns, lengths, documents or [[length] for length in lengths])
        super().__init__((key, Values(values)) for key, values in columns.items())

    @property
    def examples(self) -> list[dict[str, Any]]:
        """The examples, or documents, as dicts."""
        return examples_of(self)

    def __reduce__(self) -> Any:
        return Pack, (self.examples,)


def _masks(columns: Columns, lengths: Sequence[int]) -> Any:
    """The attention masks one after another, if every token has one."""
    masks = columns.get("attention_mask")
    if masks is None or [len(mask) if hasattr(mask, "__len__") else -1 for mask in masks] != list(
        lengths
    ):
        return None
    return flatten_integers("attention_mask", masks)


def _transposed(examples: Sequence[dict[str, Any]]) -> Columns:
    """The values by key, one of each example; raises ValueError where keys differ, or input_ids are
    missing."""
    if not examples:
        return {}
    keys = examples[0].keys()
    if "input_ids" not in keys or [example.keys() for example in examples].count(keys) < len(
        examples
    ):
        for index, example in enumerate(examples):
            if "input_ids" not in example:
                raise ValueError(f"example {index} has no input_ids, only {sorted(example)}")
            if example.keys() != keys:
                raise ValueError(
                    f"example {index} has the keys {sorted(example)}, example 0 has {sorted(keys)}"
                )
    return {key: [example[key] for example in examples] for key in keys}


def is_pack(feature: Any) -> bool:
    """Whether a feature is a `Pack`, or what Trainer's `remove_unused_columns` left of one."""
    return isinstance(feature, Pack) or (
        isinstance(feature, dict) and type(feature.get("input_ids")) is Values
    )


def examples_of(pack: dict[str, Values]) -> list[dict[str, Any]]:
    """The examples of a pack as dicts."""
    columns = [column.values for column in pack.values()]
    return [dict(zip(pack, row, strict=True)) for row in zip(*columns, strict=True)]


def arrow_examples(table: Any) -> list[dict[str, Any]]:
    """The rows of a pyarrow Table or RecordBatch; lists of numbers as views of its memory."""
    columns = {}
    for key in table.schema.names:
        column = table.column(key)
        whole = column.combine_chunks() if hasattr(column, "chunks") else column
        memory = list_memory(whole)
        if memory is None:
            columns[key] = whole.to_pylist()
        else:
            numbers, offsets = memory
            columns[key] = [
                numbers[begin:end] for begin, end in itertools.pairwise(offsets.tolist())
            ]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_arrow(feature: Any) -> bool:
    return type(feature).__module__.startswith("pyarrow") and hasattr(feature, "schema")


def _units_of(features: list[Any]) -> list[list[dict[str, Any]]]:
    """The examples, grouped as they must stay in a row: those of a pack together, others alone."""
    units: list[list[dict[str, Any]]] = []
    # whose columns do not say any more where documents begin
    among_packs = any(map(is_pack, features))
    for feature in features:
        if is_pack(feature):
            units.append(examples_of(feature))
        elif isinstance(feature, dict) or (hasattr(feature, "keys") and not _is_arrow(feature)):
            units.append(Pack([feature]).examples if among_packs else [feature])
        elif _is_arrow(feature):
            units.extend([example] for example in arrow_examples(feature))
        else:
            raise TypeError(f"the collator takes dicts or packs, got {type(feature).__name__}")
    return units


def columns_of(features: Iterable[Any], required: Iterable[str] = ()) -> tuple[Columns, list[int]]:
    """The values by key, one of each example, of the keys that may hold numbers for tokens;
    input_ids first.

    Args:
        features: examples, packs or Arrow tables.
        required: keys that are kept whatever they hold: those which the task knows. `input_ids` is
            one of them.

    Returns:
        The columns, and how many examples each feature is: those of a pack must stay in one row.

    Raises:
        TypeError: a feature is neither a dict nor a pack nor an Arrow table.
        ValueError: there are no examples, input_ids are missing, or the examples' keys differ.
    """
    features = list(features)
    if not features:
        raise ValueError("the collator got no examples")
    if {*map(type, features)} == {dict} and Values not in {
        type(feature.get("input_ids")) for feature in features
    }:
        columns, counts = _transposed(features), [1] * len(features)
    elif (
        all(map(is_pack, features))
        and all(features)
        and all(one.keys() == features[0].keys() for one in features)
    ):
        columns = {
            key: [*itertools.chain(*[pack[key].values for pack in features])] for key in features[0]
        }
        counts = [len(pack["input_ids"].values) for pack in features]
    else:
        units = _units_of(features)
        columns, counts = _transposed([*itertools.chain(*units)]), [*filter(None, map(len, units))]
    if not columns:
        raise ValueError("the collator got no examples")
    chosen = {"input_ids": columns.pop("input_ids")}
    for key, values in columns.items():
        if key in required or any(map(_is_per_token, values)):
            chosen[key] = values
    return chosen, counts


def _is_per_token(value: Any) -> bool:
    """Whether a column may hold numbers for tokens. Text, single numbers and None go nowhere near a
    model."""
    if isinstance(value, list | tuple):
        return bool(value) and not isinstance(value[0], str | dict) and value[0] is not None
    return (
        hasattr(value, "ndim") and value.ndim > 0 and getattr(value.dtype, "kind", "i") not in "OSU"
    )
