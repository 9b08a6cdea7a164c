"""What a collator is given, as columns: dicts, rows of Arrow tables, and packs, which are columns
already."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from fastft.data.arrow_rows import list_memory
from fastft.data.documents import Columns
from fastft.data.pack import Pack, Values, examples_of, is_pack, transposed


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
        columns, counts = transposed(features), [1] * len(features)
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
        columns, counts = transposed([*itertools.chain(*units)]), [*filter(None, map(len, units))]
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
