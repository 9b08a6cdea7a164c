"""Features, which a collator is given, as columns: dicts, rows of Arrow tables, and packs."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable
from typing import Any

from fastft.data.arrow_rows import fetcher
from fastft.data.column_rows import chained
from fastft.data.columns import Columns, token_columns
from fastft.data.documents import telling
from fastft.data.pack import Pack, Values, examples_of, is_pack, transposed


def arrow_examples(table: Any) -> list[dict[str, Any]]:
    """Reads the rows of a pyarrow Table or RecordBatch; lists of numbers as views of its memory."""
    import pyarrow

    whole = table if isinstance(table, pyarrow.Table) else pyarrow.Table.from_batches([table])
    every = array("q", range(len(whole)))
    columns = [fetcher(column)(every) for column in whole.columns]
    return [dict(zip(whole.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _is_arrow(feature: Any) -> bool:
    return type(feature).__module__.startswith("pyarrow") and hasattr(feature, "schema")


def _units_of(features: list[Any]) -> list[list[dict[str, Any]]]:
    """Groups the examples that must stay in a row: those of a pack together, others alone."""
    units: list[list[dict[str, Any]]] = []
    # the columns of a pack do not say any more where documents begin, so that no other may
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


def _columns_of_alike(features: list[Any]) -> Columns | None:
    """Turns dicts that have the same keys into columns, without a look at the keys of each; None
    for other features."""
    # in a subclass of dict, looking a key up may invent it
    if {*map(type, features)} != {dict}:
        return None
    keys = features[0].keys()
    if {*map(len, features)} != {len(keys)}:
        return None
    try:
        columns: Columns = {key: [feature[key] for feature in features] for key in keys}
    except KeyError:
        return None
    ids = columns.get("input_ids")
    return None if ids is None or Values in {*map(type, ids)} else columns


def columns_of(features: list[Any], required: Iterable[str] = ()) -> tuple[Columns, list[int]]:
    """Turns features into columns: of the keys that may hold numbers for tokens.

    Args:
        features: examples, packs or Arrow tables.
        required: keys that are kept whatever they hold: those which the task knows.

    Returns:
        The columns, input_ids first, and how many examples each feature is: those of a pack must
        stay in one row.

    Raises:
        TypeError: a feature is neither a dict nor a pack nor an Arrow table.
        ValueError: there are no examples, input_ids are missing, or the examples' keys differ.
    """
    alike = _columns_of_alike(features)
    if alike is not None:
        columns, counts = alike, [1] * len(features)
    elif (
        features
        and all(map(is_pack, features))
        and all(features)
        and all(one.keys() == features[0].keys() for one in features)
    ):
        columns = {key: chained([pack[key].held for pack in features]) for key in features[0]}
        counts = [len(pack["input_ids"].held) for pack in features]
    else:
        units = _units_of(features)
        columns, counts = transposed([*itertools.chain(*units)]), [*filter(None, map(len, units))]
    if not columns:
        raise ValueError("the collator got no examples")
    return token_columns(columns, {*required, *telling(columns)}), counts
