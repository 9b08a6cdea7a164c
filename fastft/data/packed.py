"""A packed view of a dataset: item p is the examples of pack p.

Making it reads lengths only, and one example where some are to be cut; it copies no token.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fastft.checks import integer, optional_integer
from fastft.data.arrow_rows import ArrowRows
from fastft.data.balance import balanced
from fastft.data.column_rows import lengths_in
from fastft.data.lengths import scan_lengths
from fastft.data.pack import (
    Pack,
    cut,
    filler,
    packs_of_columns,
    refuse_images,
    refuse_masked_pieces,
)
from fastft.data.plan import PackPlan, PlanNumbers, checked_limits, epoch_plan, plan_packs
from fastft.data.processed import unbatched
from fastft.data.streaming import OPEN_PACKS, PackedStream, refuse_dispatch
from fastft.foreign.loaders import is_dataset, is_transformed
from fastft.foreign.sharding import world_size

ROWS_OF_A_TABLE = 1024  # of `to_dataset`: so many packs are in memory twice


class PackedDataset(Dataset[Pack]):
    """A map-style dataset of `Pack`s, as `pack` returns it.

    Its length and the lengths in its packs never change: examples may have other tokens in the next
    epoch, but where there are more or fewer of them, or of their tokens, the next batch raises a
    ValueError. With a seed, `set_epoch` changes the order of the packs, and which of equally long
    examples (of the same window) is in which pack. accelerate, and therefore Trainer, calls it.

    Attributes:
        dataset: the examples.
    """

    def __init__(
        self,
        dataset: Any,
        plan: PackPlan,
        *,
        seed: int | None = None,
        group: int = 1,
        overlong: str = "error",
    ) -> None:
        self.dataset, self.seed, self.group, self.overlong = dataset, seed, group, overlong
        self._base, self._examples = plan, len(dataset)
        # of each example, as its last piece may be a full pack, like one that is cut off
        self._tokens = _tokens_of(plan) if overlong == "split" else None
        # in shared memory, because persistent workers keep a copy of this dataset over many epochs
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._forget()

    def _forget(self) -> None:
        """Resets what each process makes or notes for itself."""
        # the dataset, and views of its Arrow tables
        self._rows: tuple[Any, ArrowRows] | None = None
        self._drawn: tuple[int, PackPlan] | None = None
        # a plan, and its numbers
        self._read: tuple[PackPlan, PlanNumbers] | None = None
        # the pack that a batch last ended with; None: no longer watched
        self._last: int | None = -1

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in vars(self).items()
            if key not in ("_rows", "_drawn", "_read", "_last")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._epoch.share_memory_()
        self._forget()

    def __copy__(self) -> PackedDataset:
        copied = self.__new__(type(self))
        copied.__setstate__({**self.__getstate__(), "_epoch": self._epoch.clone()})
        return copied

    def set_epoch(self, epoch: int) -> None:
        """Draws the packs of an epoch anew, out of the seed and its number; nothing happens without
        a seed."""
        refuse_dispatch(self)
        self._epoch.fill_(integer("epoch", epoch, least=0))

    @property
    def plan(self) -> PackPlan:
        """The plan of the current epoch: which example, which part of it, is in which pack."""
        if self.seed is None:
            return self._base
        epoch = int(self._epoch)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, epoch_plan(self._base, self.seed, epoch, self.group)
            self._last = -1
        return self._drawn[1]

    def __len__(self) -> int:
        return len(self._base)

    @property
    def total_dataset_length(self) -> int:
        """Rows of predictions, by which accelerate cuts the last batch of an evaluation.

        On one process it must cut nothing: no pack comes twice there, and one can have several rows
        of predictions, those of its examples.
        """
        return len(self) if world_size() > 1 else 0

    def __getitem__(self, index: int) -> Pack:
        return self._packs([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Pack]:
        """Makes the packs of a batch, with one access to a dataset that has `__getitems__` too."""
        made = self._packs(indices)
        self._watch_order(list(indices))
        return made

    def to_dataset(self) -> Any:
        """Copies the packs into a `datasets.Dataset`, a row for each, for trainers that want one.

        A row joins the pack's examples: `input_ids` and every other column with a number for each
        token, int64 or of the floating-point dtype that it has. `seq_lengths`, the tokens of each
        example, says where they begin: TRL's padding-free collator and `PackingCollator` keep them
        apart by it. What is masked is left out, and so is what is not per token.

            options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
            SFTTrainer(
                model,
                args=SFTConfig(**options),
                train_dataset=fastft.pack(dataset, 8192).to_dataset(),
                data_collator=fastft.PackingCollator(),
            )

        Raises:
            ImportError: `datasets` is not installed.
            ValueError: examples lack what the first one has, or a column has not one number per
                token.
        """
        import datasets
        import pyarrow

        tables = []
        for first in range(0, len(self), ROWS_OF_A_TABLE):
            packs = self._packs(range(first, min(first + ROWS_OF_A_TABLE, len(self))))
            rows = [one.joined() for one in packs]
            tables.append(
                pyarrow.table({key: [row[key].numpy() for row in rows] for key in rows[0]})
            )
        return datasets.Dataset(pyarrow.concat_tables(tables))

    def _packs(self, indices: Sequence[int]) -> list[Pack]:
        if len(self.dataset) != self._examples:
            raise ValueError(
                f"the dataset has {len(self.dataset)} examples, but had {self._examples} when it "
                "was packed, and the packs are of those: call pack again when a dataset has changed"
            )
        plan = self.plan
        if self._read is None or self._read[0] is not plan:
            self._read = plan, plan.numbers()
        bounds, (examples, lengths, starts) = self._read[1].packs(indices)
        fillers = sum(begin == end for begin, end in bounds)
        table = self._table()
        # a processor's (1, n) has the length 1, too, and is not whole for it
        if table is not None and not fillers and not any(starts) and 1 not in lengths:
            columns = table.columns(examples)
            if lengths_in(columns.get("input_ids", ())) == lengths:  # all are whole, as a rule
                return packs_of_columns(columns, [end - begin for begin, end in bounds])
        fetched = self._fetch(examples + plan.indices[:1].tolist() * fillers)
        # an example is whole as a rule: for that, no function is called
        parts = [
            example
            if start == 0 and len(example["input_ids"]) == length > 1
            else self._part(example, index, start, length)
            for example, index, start, length in zip(
                fetched, examples, starts, lengths, strict=False
            )
        ]
        blank, left = [filler(fetched[-1])] if fillers else [], iter(parts)
        return [Pack([*itertools.islice(left, end - begin)] or blank) for begin, end in bounds]

    def _table(self) -> ArrowRows | None:
        """Reads a `datasets.Dataset` straight from Arrow, whatever its format: no Python object is
        made of a token. None for another dataset."""
        if not is_dataset(self.dataset) or is_transformed(self.dataset):
            return None
        if self._rows is None or self._rows[0] is not self.dataset:
            self._rows = self.dataset, ArrowRows(self.dataset)
        return self._rows[1]

    def _fetch(self, examples: list[int]) -> list[dict[str, Any]]:
        fetch = self._table() or getattr(self.dataset, "__getitems__", None)
        return fetch(examples) if fetch else [self.dataset[example] for example in examples]

    def _part(self, example: dict[str, Any], index: int, start: int, length: int) -> dict[str, Any]:
        """Cuts out the tokens of an example that the plan wants."""
        example = unbatched(example)
        tokens = len(example["input_ids"])
        planned = start + length if self._tokens is None else int(self._tokens[index])
        cut_short = self.overlong == "truncate" and length == self._base.max_tokens
        if tokens < planned or (tokens > planned and not cut_short):
            raise ValueError(
                f"example {index} has {tokens} tokens, but had {planned} when it was packed"
            )
        return cut(example, start, length)

    def _watch_order(self, indices: list[int]) -> None:
        """Warns once where packs do not come in their order, although `seed` or `balance` made
        one."""
        if self.seed is None or self._last is None or not indices:
            return
        onwards = indices[0] > self._last or indices[0] < self.group  # or the next epoch begins
        if onwards and indices == sorted(indices):
            self._last = indices[-1]
            return
        self._last = None
        warnings.warn(
            "packs are in the order of seed= and balance=, but the sampler takes them in another; "
            "with Trainer say TrainingArguments(train_sampling_strategy='sequential') or leave "
            "seed= and balance= out; without it, call set_epoch before each epoch",
            stacklevel=3,
        )


def pack(
    dataset: Any,
    max_tokens: int,
    *,
    overlong: str = "error",
    max_sequences: int | None = None,
    window: int | None = None,
    balance: int | None = None,
    seed: int | None = None,
    length_column: str | None = None,
    open_packs: int | None = None,
) -> PackedDataset | PackedStream:
    """Groups the examples of a dataset so that each group has at most `max_tokens` tokens.

    Goes into `Trainer(train_dataset=...)` together with `PackingCollator`; a batch has
    `per_device_train_batch_size` packs. `len` is exact; an iterable dataset gives an iterable one,
    without a length.

    Args:
        dataset: a list, a map-style torch dataset or a `datasets.Dataset` of dicts with
            `input_ids`; or an iterable dataset of torch or `datasets`, which is packed as it comes:
            see `PackedStream`.
        max_tokens: tokens in a pack, at most; below 2^31.
        overlong: what becomes of an example with more, `"error"`, `"truncate"`, `"split"`,
            `"drop"`; see `plan_packs`.
        max_sequences: examples in a pack, at most; None for no limit.
        window: only examples of the same `window` consecutive ones share a pack, and windows keep
            their order.
        balance: packs that are computed at the same time: number of ranks times per-device batch
            size. Each so many consecutive packs cost nearly equal, and their number is a multiple
            of it, so that no rank gets a pack twice. The order is shuffled group by group, with
            seed 0 if there is none; it needs a sampler that keeps it,
            `TrainingArguments(train_sampling_strategy="sequential")`. Below 2^20.
        seed: in [0, 2^63), shuffles the packs, anew in each epoch, the same way for the same seed
            and epoch; for a sampler that keeps the order, too. None leaves those of the longest
            examples first (Trainer's own sampler shuffles).
        length_column: the column or key which says how many tokens an example has. None: they are
            counted, in a `datasets.Dataset` without reading them.
        open_packs: of an iterable dataset: packs that wait for more examples at the same time; 32
            if None.

    Raises:
        TypeError: `dataset` is neither iterable nor has a length and can be indexed.
        ValueError: it is empty, input_ids are missing, an argument is out of its range, or is not
            for such a dataset; an example with images would be cut.
    """
    max_tokens, max_sequences = checked_limits(max_tokens, max_sequences, overlong)
    window, seed = optional_integer("window", window), optional_integer("seed", seed, least=0)
    # each of so many packs is there, be it empty: no machine has as many ranks
    balance = optional_integer("balance", balance, bits=20)
    open_packs = optional_integer("open_packs", open_packs)
    limits: dict[str, Any] = {"overlong": overlong, "max_sequences": max_sequences}
    if isinstance(dataset, IterableDataset):
        others = {"balance": balance, "seed": seed, "length_column": length_column}
        _only_for("a map-style dataset", window=window, **others)
        return PackedStream(dataset, max_tokens, open_packs=open_packs or OPEN_PACKS, **limits)
    _only_for("an iterable dataset", open_packs=open_packs)
    sequence = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not sequence or isinstance(dataset, dict):
        raise TypeError(
            "pack needs a map-style dataset, with __len__ and __getitem__, or an iterable one of "
            f"torch or datasets, got {type(dataset).__name__}"
        )
    if len(dataset) == 0:
        raise ValueError("dataset is empty: there is nothing to pack")
    lengths = scan_lengths(dataset, length_column)
    plan = plan_packs(lengths, max_tokens, window=window, **limits)
    if balance is not None:
        plan, seed = balanced(plan, balance, max_sequences), seed or 0
    packed = PackedDataset(dataset, plan, seed=seed, group=balance or 1, overlong=overlong)
    # the first that is too long tells now what would be an error in training
    if overlong in ("truncate", "split") and bool((lengths > max_tokens).any()):
        (example,) = packed._fetch([int((lengths > max_tokens).nonzero()[0])])
        refuse_images(example, max_tokens)
        if overlong == "split":
            refuse_masked_pieces(unbatched(example), max_tokens)
    return packed


def _tokens_of(plan: PackPlan) -> Tensor:
    """How many tokens each example has, int64 (N,): where its last piece ends."""
    ends = plan.starts + plan.lengths
    tokens = ends.new_zeros(int(plan.indices.max()) + 1)
    return tokens.scatter_reduce_(0, plan.indices, ends, "amax")


def packs_of(loader: Any) -> PackedDataset | PackedStream | None:
    """Finds the packs that a loader gives out, also inside what others wrap a dataset in; None if
    it gives out something else."""
    return packs_in(getattr(loader, "dataset", None))


def packs_in(dataset: Any) -> PackedDataset | PackedStream | None:
    """The same of a dataset."""
    while dataset is not None and not isinstance(dataset, PackedDataset | PackedStream):
        # accelerate's share of a stream, a torch Subset
        dataset = getattr(dataset, "dataset", None)
    return dataset


def _only_for(kind: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is only for {kind}, got {value!r}")
