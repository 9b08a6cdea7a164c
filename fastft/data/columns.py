"""Columns: the values of one key in all examples, checked and laid out as one flat tensor.

The values of a key may be lists, tuples, numpy arrays or tensors. What is right costs a few calls
for the whole column and none for a token; only what is wrong is looked at one by one, to name it.
"""

from __future__ import annotations

import contextlib
import operator
import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.data import listed
from fastft.data.column_rows import Column, ColumnRows, lengths_in

MAX_TOKENS = 2**31 - 1  # what int32 boundaries can count
INTEGERS = ("input_ids", "labels", "decoder_input_ids")  # columns in which nothing else makes sense
Columns = dict[str, Column]
_NDIM = operator.attrgetter("ndim")


def _are_vectors(values: Column) -> bool:
    """Recognises the usual columns without a loop: lists alone, or vectors alone."""
    if isinstance(values, ColumnRows):
        return True
    try:
        return {*map(type, values)} == {list} or {*map(_NDIM, values)} == {1}
    except AttributeError:
        return False


def _check_vector(key: str, index: int, value: Any) -> None:
    if (
        not hasattr(value, "__len__")
        or isinstance(value, str | dict)
        or getattr(value, "ndim", 1) != 1
    ):
        shape = getattr(value, "shape", None)
        what = f"shape {tuple(shape)}" if shape is not None else f"{type(value).__name__} {value!r}"
        raise ValueError(f"{key} of example {index} must hold one number per token, got {what}")


def token_columns(columns: Columns, required: Iterable[str] = ()) -> Columns:
    """Chooses the columns that may hold numbers for tokens, `input_ids` first, and those required.

    Text, single numbers and None of the others go nowhere near a model.
    """
    return {"input_ids": columns.pop("input_ids")} | {
        key: values
        for key, values in columns.items()
        if key in required or any(map(may_hold_numbers, values))
    }


def may_hold_numbers(value: Any) -> bool:
    """Tells arrays and lists of numbers from text, single numbers, None and lists of objects."""
    if isinstance(value, list | tuple):
        return bool(value) and (
            isinstance(value[0], int | float | list | tuple) or hasattr(value[0], "dtype")
        )
    return (
        hasattr(value, "ndim") and value.ndim > 0 and getattr(value.dtype, "kind", "i") not in "OSU"
    )


def lengths_of(key: str, values: Column) -> list[int]:
    """Measures a column's values.

    Raises:
        ValueError: a value is not one-dimensional or empty, or together they are longer than int32
            can count.
    """
    if not _are_vectors(values):
        for index, value in enumerate(values):
            _check_vector(key, index, value)
    lengths = lengths_in(values)
    if 0 in lengths:
        raise ValueError(f"example {lengths.index(0)} has no tokens: {key} is empty")
    if sum(lengths) > MAX_TOKENS:
        raise ValueError(
            f"the {len(lengths)} examples of the batch have {sum(lengths)} {key}, int32 boundaries "
            f"count {MAX_TOKENS}"
        )
    return lengths


def check_lengths(key: str, values: Column, lengths: list[int], of: str) -> None:
    """Raises ValueError unless the values of `key` are as long as those of `of`, `lengths`."""
    if _are_vectors(values) and lengths_in(values) == lengths:
        return
    for index, value in enumerate(values):
        _check_vector(key, index, value)
        if len(value) != lengths[index]:
            raise ValueError(
                f"{key} of example {index} has length {len(value)}, its {of} {lengths[index]}"
            )


def take_mask(key: str, columns: Columns) -> Tensor | None:
    """Takes the masks `key` out of the columns: int64 (T,), or None if nothing is masked or
    numbered.

    Raises:
        ValueError: they hold something else than integers from 0 on.
    """
    masks = columns.pop(key, None)
    if masks is None or (
        isinstance(masks, list)
        and {*map(type, masks)} == {list}
        and all(mask.count(1) == len(mask) for mask in masks)
    ):
        return None
    flat = flatten(key, masks)
    whole = flat.long()
    low, high = map(int, whole.aminmax())
    if low < 0 or (flat.is_floating_point() and not torch.equal(whole.to(flat.dtype), flat)):
        wrong = flat[(whole < 0) | (whole != flat)][0].item()
        raise ValueError(
            f"{key} must be 0 where a token is masked, else 1 or its document's number, got {wrong}"
        )
    return None if low == high == 1 else whole


def drop_masked(
    key: str,
    mask: Tensor | None,
    columns: Columns,
    lengths: list[int],
) -> list[int]:
    """Takes the tokens that `mask` (T,), the values of `key`, masks out of all columns.

    Returns:
        The new lengths.

    Raises:
        ValueError: nothing is left of an example.
    """
    if mask is None or bool(mask.all()):
        return lengths
    left = list(lengths)
    cut = {name: [*values] for name, values in columns.items()}
    for index, kept in enumerate((mask != 0).split(lengths)):
        left[index] = int(kept.sum())
        if left[index] == 0:
            raise ValueError(f"example {index} has no tokens: its {key} is all zeros")
        for name, values in cut.items():
            values[index] = flatten(name, [values[index]])[kept]
    columns.update(cut)
    return left


def flatten(key: str, values: Sequence[Any] | ColumnRows) -> Tensor:
    """Joins the values of a column in a new CPU tensor (T,).

    It is int64, or of the floating-point dtype that they have; numbers from lists that are no
    integers become float32.

    Raises:
        ValueError: something in it is no number, or an integer too large for int64.
    """
    if isinstance(values, ColumnRows):
        return values.joined()
    kinds = {*map(type, values)}
    if kinds <= {list, tuple}:
        return _flat_lists(key, values if kinds == {list} else [*map(list, values)])
    if {kind.__module__ for kind in kinds} == {"numpy"}:
        return _flat_arrays(key, values)
    if all(issubclass(kind, Tensor) for kind in kinds):
        return _flat_tensors(key, values)
    return torch.cat(
        [flatten(key, [value if hasattr(value, "dtype") else list(value)]) for value in values]
    )


def flatten_integers(key: str, values: Sequence[Any] | ColumnRows) -> Tensor:
    """Joins integers as `flatten` does; raises ValueError for other numbers."""
    flat = flatten(key, values)
    if flat.is_floating_point():
        raise ValueError(f"{key} must be integers, got {flat.dtype}")
    return flat


def flatten_column(key: str, values: Sequence[Any] | ColumnRows) -> Tensor:
    """Joins what `key` may hold: integers for tokens and labels, any numbers for others."""
    return (flatten_integers if key in INTEGERS else flatten)(key, values)


def integers_of(numbers: Sequence[int]) -> Tensor:
    """Makes int64 (n,) of n > 0 integers; of short lists many times faster than torch.tensor."""
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


def _flat_integers(values: Sequence[list[Any]]) -> Tensor | None:
    """Joins lists of integers by the fastest way there is; None where something is none."""
    if listed.can_read():
        return listed.integers_of_lists([*values])
    memory, end = bytearray(8 * sum(map(len, values))), 0
    try:
        for value in values:
            struct.pack_into(f"{len(value)}q", memory, end, *value)
            end += 8 * len(value)
    except (struct.error, TypeError):
        return None
    # padding may be all that a column has, and there may be none of it
    return torch.frombuffer(memory, dtype=torch.int64) if memory else torch.empty(0).long()


def _flat_lists(key: str, values: Sequence[list[Any]]) -> Tensor:
    integers = _flat_integers(values)
    if integers is not None:
        return integers
    for code, dtype in (("q", torch.int64), ("f", torch.float32)):
        flat = array(code)
        try:
            for value in values:
                flat.fromlist(value)
        except TypeError:
            continue
        except OverflowError:
            raise ValueError(f"{key} holds an integer that does not fit into int64") from None
        return torch.frombuffer(flat, dtype=dtype)
    raise ValueError(f"{key} must hold one number per token")


def _flat_tensors(key: str, values: Sequence[Tensor]) -> Tensor:
    try:
        flat = torch.cat(list(values))
        if flat.is_meta or flat.layout != torch.strided or flat.is_complex():
            raise NotImplementedError
        flat = flat.cpu()
    except RuntimeError:  # of which NotImplementedError is one: torch cannot join or read them
        kinds = sorted({f"{value.dtype} {value.layout} on {value.device}" for value in values})
        raise ValueError(
            f"{key} must be dense tensors of numbers on one device, got {', '.join(kinds)}"
        ) from None
    if flat.is_floating_point():
        return flat
    if flat.dtype == torch.uint64 and bool((flat.long() < 0).any()):
        raise ValueError(f"{key} holds an integer that does not fit into int64")
    return flat.long()


def _flat_arrays(key: str, values: Sequence[Any]) -> Tensor:
    import numpy

    # numpy, because its concatenation takes arrays that are read-only, as those from Arrow are
    if values[0].dtype == numpy.int64:
        with contextlib.suppress(TypeError):  # of dtypes that numpy cannot join: named below
            joined = numpy.concatenate(values)
            # with any other kind of numbers, uint64 too, it has another dtype
            if joined.dtype == numpy.int64:
                return torch.from_numpy(joined)
    dtypes = {value.dtype for value in values}
    kinds = {dtype.kind for dtype in dtypes}
    if kinds <= {*"iub"}:
        if numpy.dtype("uint64") in dtypes and any(
            (value > numpy.uint64(2**63 - 1)).any() for value in values
        ):
            raise ValueError(f"{key} holds an integer that does not fit into int64")
        return torch.from_numpy(numpy.concatenate(values, dtype=numpy.int64, casting="unsafe"))
    if kinds <= {*"iubf"}:
        return torch.from_numpy(numpy.concatenate(values))
    raise ValueError(f"{key} must hold one number per token, got the dtype {values[0].dtype}")


def padding_like(value: Any, count: int, fill: int) -> Any:
    """Makes a value for `flatten`, `count` times `fill`, that leaves its column's dtype alone."""
    floating = "float" in str(getattr(value, "dtype", ""))
    if isinstance(value, Tensor):
        return torch.full(
            (count,), fill, dtype=value.dtype if floating else torch.int64, device=value.device
        )
    if isinstance(value, list | tuple):
        return [fill] * count
    import numpy

    return numpy.full(count, fill, value.dtype if floating else numpy.int64)
