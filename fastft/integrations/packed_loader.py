"""A loader of packed batches: which collator makes them, and how long their rows are."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastft.data.collator import PackingCollator
from fastft.data.packed import PackedDataset, packs_of
from fastft.foreign.loaders import inner_loader
from fastft.integrations.probe.rows import Batches


def packing_collator(dataloader: Any) -> PackingCollator | None:
    """The collator of a loader's batches, also inside what calls it: wrappers, functions, methods,
    partials."""
    level: list[Any] = [getattr(inner_loader(dataloader), "collate_fn", None)]
    seen: set[int] = set()
    for _ in range(5):
        for part in level:
            if isinstance(part, PackingCollator):
                return part
        seen.update(map(id, level))
        parts = (part for whole in level for part in _parts(whole) if id(part) not in seen)
        level = [part for part in parts if callable(part) or hasattr(part, "data_collator")]
    return None


def _parts(whole: Any) -> Iterator[Any]:
    """Yields what a callable refers to, without models and classes."""
    if isinstance(whole, nn.Module | type):
        return
    if isinstance(whole, functools.partial):
        yield from (whole.func, *whole.args, *whole.keywords.values())
    elif isinstance(whole, types.MethodType):
        yield from (whole.__self__, whole.__func__)
    elif isinstance(whole, types.FunctionType):
        for cell in whole.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is empty
                yield cell.cell_contents
        yield from (
            whole.__globals__[name] for name in whole.__code__.co_names if name in whole.__globals__
        )
    else:
        yield from getattr(whole, "__dict__", {}).values()


def batches_of(loader: Any, collator: PackingCollator, packs: int | None) -> Batches:
    """Describes the loader's batches, of so many packs or examples; the longest row is known of
    packs alone."""
    dataset, longest = packs_of(loader), None
    if packs is not None and dataset is not None:
        tokens = (
            dataset.plan.max_tokens if isinstance(dataset, PackedDataset) else dataset.max_tokens
        )
        longest = -(-packs // collator.rows) * tokens
    return described(collator, longest)


def described(collator: PackingCollator, longest: int | None) -> Batches:
    """Describes batches of rows of at most `longest` tokens, before they are rounded up."""
    if collator.task == "speech_seq2seq":
        return Batches(collator.position_ids_start, collator.row_tokens, padded=True)
    multiple = collator.pad_to_multiple_of or 1
    longest = None if longest is None else longest + -longest % multiple
    return Batches(
        collator.position_ids_start, longest, collator.rows, collator.rows > 1 or multiple > 1
    )


def size_of_batches(loader: Any, args: Any) -> int | None:
    """How many packs or examples are in a batch."""
    sampled: int | None = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return sampled or getattr(args, "train_batch_size", None)
