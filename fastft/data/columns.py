"""From examples to columns: the values of one key in all examples, checked and laid out as one flat tensor.

An example is a dict (or what has its keys, as transformers' BatchEncoding), a row of an Arrow table, or one of a
`Pack`. The values of a key may be lists, tuples, numpy arrays or tensors. What is right costs a few calls for the whole
column and none for a token; only what is wrong is looked at one by one, to name it.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.data.arrow_rows import list_memory

MAX_TOKENS = 2**31 - 1  # what int32 boundaries can count


@dataclass(frozen=True, eq=False)
class Pack:
    """Examples that go through the model together, as `fastft.pack` yields them.

    It is no dict, so that Trainer's `remove_unused_columns` lets it pass to the collator.
    """

    examples: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.examples)


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
            columns[key] = [numbers[begin:end] for begin, end in itertools.pairwise(offsets.tolist())]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_arrow(feature: Any) -> bool:
    return type(feature).__module__.startswith("pyarrow") and hasattr(feature, "schema")


def units_of(features: Iterable[Any]) -> list[list[dict[str, Any]]]:
    """The examples, grouped as they must stay in a row: those of a pack together, others alone.

    Raises:
        TypeError: a feature is neither a dict nor a pack nor an Arrow table.
        ValueError: there are no examples.
    """
    units: list[list[dict[str, Any]]] = []
    for feature in features:
        if isinstance(feature, dict):
            units.append([feature])
        elif isinstance(feature, Pack):
            if feature.examples:
                units.append(feature.examples)
        elif _is_arrow(feature):
            units.extend([example] for example in arrow_examples(feature))
        elif hasattr(feature, "keys"):
            units.append([feature])
        else:
            raise TypeError(f"the collator takes dicts or packs, got {type(feature).__name__}")
    if not units:
        raise ValueError("the collator got no examples")
    return units


def _is_per_token(value: Any) -> bool:
    """Whether a column may hold numbers for tokens. Text, single numbers and None go nowhere near a model."""
    if isinstance(value, list | tuple):
        return bool(value) and not isinstance(value[0], str | dict) and value[0] is not None
    return hasattr(value, "ndim") and value.ndim > 0 and getattr(value.dtype, "kind", "i") not in "OSU"


def columns_of(examples: list[dict[str, Any]], required: Sequence[str] = ()) -> dict[str, list[Any]]:
    """The values by key, one of each example, of the keys that may hold numbers for tokens; input_ids first.

    Args:
        examples: one or more.
        required: keys that are kept whatever they hold: those which the task knows. `input_ids` is one of them.

    Raises:
        ValueError: input_ids are missing, or the examples' keys differ.
    """
    keys = examples[0].keys()
    for index, example in enumerate(examples):
        if "input_ids" not in example:
            raise ValueError(f"example {index} has no input_ids, only {sorted(example)}")
        if example.keys() != keys:
            raise ValueError(f"example {index} has the keys {sorted(example)}, example 0 has {sorted(keys)}")
    columns = {"input_ids": [example["input_ids"] for example in examples]}
    for key in keys - {"input_ids"}:
        values = [example[key] for example in examples]
        if key in required or any(map(_is_per_token, values)):
            columns[key] = values
    return columns


def _are_vectors(values: list[Any]) -> bool:
    """Whether all values are lists, or all one-dimensional arrays or tensors: the usual columns, without a loop."""
    try:
        return {*map(type, values)} == {list} or [value.ndim for value in values].count(1) == len(values)
    except AttributeError:
        return False


def _check_vector(key: str, index: int, value: Any) -> None:
    if not hasattr(value, "__len__") or isinstance(value, str | dict) or getattr(value, "ndim", 1) != 1:
        shape = getattr(value, "shape", None)
        what = f"shape {tuple(shape)}" if shape is not None else f"{type(value).__name__} {value!r}"
        raise ValueError(f"{key} of example {index} must hold one number per token, got {what}")


def lengths_of(key: str, values: list[Any]) -> list[int]:
    """The length of each value of a column.

    Raises:
        ValueError: a value is not one-dimensional or empty, or together they are longer than int32 can count.
    """
    if not _are_vectors(values):
        for index, value in enumerate(values):
            _check_vector(key, index, value)
    lengths = [*map(len, values)]
    if 0 in lengths:
        raise ValueError(f"example {lengths.index(0)} has no tokens: {key} is empty")
    if sum(lengths) > MAX_TOKENS:
        raise ValueError(
            f"the {len(lengths)} examples of the batch have {sum(lengths)} {key}, int32 boundaries count {MAX_TOKENS}"
        )
    return lengths


def check_lengths(key: str, values: list[Any], lengths: list[int], of: str) -> None:
    """Raises ValueError unless the values of `key` are as long as those of the column `of`, `lengths`."""
    if _are_vectors(values) and [*map(len, values)] == lengths:
        return
    for index, value in enumerate(values):
        _check_vector(key, index, value)
        if len(value) != lengths[index]:
            raise ValueError(f"{key} of example {index} has length {len(value)}, its {of} {lengths[index]}")


def _all_ones(key: str, masks: list[Any]) -> bool:
    if {*map(type, masks)} == {list}:
        return all(mask.count(1) == len(mask) for mask in masks)
    return bool(flatten(key, masks).all())


def drop_masked(mask_key: str, columns: dict[str, list[Any]], keys: Iterable[str], lengths: list[int]) -> list[int]:
    """Takes `mask_key` out of the columns, and the tokens which it masks out of `keys`; returns the new lengths.

    Raises:
        ValueError: nothing is left of an example.
    """
    masks = columns.pop(mask_key, None)
    if masks is None or _all_ones(mask_key, masks):
        return lengths
    keys, left = [key for key in keys if key != mask_key], list(lengths)
    for index, mask in enumerate(masks):
        kept = torch.as_tensor(mask) != 0
        left[index] = int(kept.sum())
        if left[index] == 0:
            raise ValueError(f"example {index} has no tokens: its {mask_key} is all zeros")
        for key in keys:
            columns[key][index] = flatten(key, [columns[key][index]])[kept]
    return left


def flatten(key: str, values: Sequence[Any]) -> Tensor:
    """All values of a column one after another in a new CPU tensor (T,): int64, or the floating-point dtype they have.

    Numbers from lists that are no integers become float32.

    Raises:
        ValueError: something in it is no number, or an integer too large for int64.
    """
    kinds = {*map(type, values)}
    if kinds == {list}:
        return _flat_lists(key, values)
    if all(issubclass(kind, Tensor) for kind in kinds):
        flat = torch.cat(list(values)).cpu()
        return flat if flat.is_floating_point() else flat.long()
    if all(kind.__module__ == "numpy" for kind in kinds):
        return _flat_arrays(key, values)
    parts = [flatten(key, [value if hasattr(value, "dtype") else list(value)]) for value in values]
    return torch.cat(parts)


def flatten_integers(key: str, values: Sequence[Any]) -> Tensor:
    """`flatten` for tokens and labels: int64; raises ValueError where the numbers are no integers."""
    flat = flatten(key, values)
    if flat.is_floating_point():
        raise ValueError(f"{key} must be integers, got {flat.dtype}")
    return flat


def _flat_lists(key: str, values: Sequence[list[Any]]) -> Tensor:
    for code, dtype in (("q", torch.int64), ("f", torch.float32)):
        flat = array(code)  # by far the fastest way from lists of Python numbers to memory
        try:
            for value in values:
                flat.fromlist(value)
        except TypeError:
            continue
        except OverflowError:
            raise ValueError(f"{key} holds an integer that does not fit into int64") from None
        return torch.frombuffer(flat, dtype=dtype)
    raise ValueError(f"{key} must hold one number per token")


def _flat_arrays(key: str, values: Sequence[Any]) -> Tensor:
    import numpy

    # numpy, because its concatenation takes arrays that are read-only, as those from Arrow are
    kinds = {value.dtype.kind for value in values}
    if kinds <= {*"iub"}:
        return torch.from_numpy(numpy.concatenate(values, dtype=numpy.int64, casting="unsafe"))
    if kinds <= {*"iubf"}:
        return torch.from_numpy(numpy.concatenate(values))
    raise ValueError(f"{key} must hold one number per token, got the dtype {values[0].dtype}")


def padding_like(value: Any, count: int, fill: int) -> Any:
    """A value for `flatten` that holds `fill` `count` times, and changes nothing about its column's dtype."""
    floating = "float" in str(getattr(value, "dtype", ""))
    if isinstance(value, Tensor):
        return torch.full((count,), fill, dtype=value.dtype if floating else torch.int64, device=value.device)
    if isinstance(value, list | tuple):
        return [fill] * count
    import numpy

    return numpy.full(count, fill, value.dtype if floating else numpy.int64)
