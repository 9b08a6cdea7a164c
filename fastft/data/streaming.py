"""Packs of an iterable dataset, as it comes: best fit into the packs that are open.

An example goes into the open pack whose remaining capacity is the smallest that takes it, among
equal ones into the oldest. Where none takes it a new pack is opened, and if there are too many, the
fullest goes out first. A pack that is full goes out at once, the rest when the dataset ends.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from fastft.checks import integer
from fastft.data.pack import Pack, cut
from fastft.data.processed import unbatched
from fastft.foreign.loaders import active_dataloader, dispatches, is_iterable_dataset

OPEN_PACKS = 32
# the state of a stream that has yielded nothing, but for its epoch
BEGINNING: dict[str, Any] = {"seen": 0, "source": None, "ready": [], "open": []}
REFUSAL = (
    "accelerate would slice packed batches along dimension 0, and their boundaries with them "
    "(dispatch_batches, its default for an iterable dataset); each rank has to load its own "
    "batches: TrainingArguments(accelerator_config={'dispatch_batches': False})"
)
Examples = list[dict[str, Any]]


def refuse_dispatch(dataset: Any) -> None:
    """Raises ValueError if accelerate is about to dispatch the batches of `dataset`.

    Rank 0 would load all batches, join them along dimension 0 and give each rank a slice of every
    tensor. A packed batch has its boundaries in dimension 0: even on one rank only the first of
    them would be left, and nothing would raise. It is accelerate's default for an iterable dataset.

    To be called where the loader hands over, `set_epoch` and `__iter__`: accelerate has then made
    it the active one.
    """
    active = active_dataloader()
    if dispatches(active) and active.dataset is dataset:
        raise ValueError(REFUSAL)


class _Packer:
    """Open packs, and those in `ready` that are done and wait to be taken."""

    def __init__(self, max_tokens: int, max_sequences: int | None, open_packs: int) -> None:
        self.max_tokens, self.max_sequences, self.open_packs = max_tokens, max_sequences, open_packs
        self.ready: deque[Examples] = deque()
        # (remaining capacity, number) of each open pack, sorted
        self._rooms: list[tuple[int, int]] = []
        self._packs: dict[int, Examples] = {}  # by number; the oldest come first
        self._opened = 0

    def put(self, example: dict[str, Any], tokens: int) -> None:
        place = bisect_left(self._rooms, (tokens, 0))
        if place < len(self._rooms):
            room, number = self._rooms.pop(place)
        else:
            if len(self._rooms) == self.open_packs:
                self._close(self._rooms.pop(0)[1])
            room, number = self.max_tokens, self._open([])
        self._packs[number].append(example)
        if room == tokens or len(self._packs[number]) == self.max_sequences:
            self._close(number)
        else:
            insort(self._rooms, (room - tokens, number))

    def close(self) -> None:
        while self._rooms:
            self._close(self._rooms.pop(0)[1])

    def take(self) -> Iterator[Pack]:
        """Yields the packs that are done; each is gone from the state when it comes out."""
        while self.ready:
            yield Pack(self.ready.popleft())

    def _open(self, examples: Examples) -> int:
        self._opened += 1
        self._packs[self._opened] = examples
        return self._opened

    def _close(self, number: int) -> None:
        self.ready.append(self._packs.pop(number))

    def state_dict(self) -> dict[str, list[Examples]]:
        return {"ready": list(map(list, self.ready)), "open": list(map(list, self._packs.values()))}

    def load_state_dict(self, state: dict[str, list[Examples]]) -> None:
        self.ready.extend(map(list, state["ready"]))
        for examples in state["open"]:
            tokens = sum(len(example["input_ids"]) for example in examples)
            insort(self._rooms, (self.max_tokens - tokens, self._open(list(examples))))


def _check_state(state: Any) -> None:
    """Raises where a state is not one that `PackedStream.state_dict` makes."""
    if not isinstance(state, dict):
        raise TypeError(f"state_dict must be a dict, got {type(state).__name__}")
    missing = {"epoch", *BEGINNING} - state.keys()
    if missing:
        raise ValueError(
            f"state_dict must be one of PackedStream.state_dict(), it lacks {sorted(missing)}"
        )
    for key in ("epoch", "seen"):
        integer(f"state_dict[{key!r}]", state[key], least=0)
    for key in ("ready", "open"):
        packs = state[key]
        if not isinstance(packs, list) or not all(
            isinstance(pack, list)
            and all(isinstance(one, dict) and "input_ids" in one for one in pack)
            for pack in packs
        ):
            raise ValueError(f"state_dict[{key!r}] must be lists of examples, got {packs!r}")


class PackedStream(IterableDataset[Pack]):
    """An iterable dataset of `Pack`s without a length, as `pack` returns it for one of examples.

    `state_dict` and `load_state_dict` hold what the open packs contain and where the dataset
    stands, in the convention of `datasets` and of torchdata's `StatefulDataLoader`: a stream that
    resumes yields the packs that were left. A dataset without a `state_dict` is read again up to
    where it stood.

    A copy or a pickle, which a DataLoader's worker gets, begins where another iteration of this
    stream would: at the beginning, or at a state that was loaded and not gone on from. Its
    `state_dict` is the one that this stream had then; loaded, it goes on there.

    With DataLoader workers each packs what its copy of the dataset yields. A
    `datasets.IterableDataset` gives each worker shards of its own; one of torch has to do so itself
    (`torch.utils.data.get_worker_info`).

    With accelerate, and therefore Trainer, batches must not be dispatched, not even with one
    process: `TrainingArguments(accelerator_config={"dispatch_batches": False}, max_steps=...)`.
    Each rank then reads the whole stream, makes all packs and takes its own.

    Args:
        dataset: an iterable of dicts with `input_ids`.
        max_tokens: tokens in a pack, at most; below 2^31.
        overlong: what becomes of an example with more, `"error"`, `"truncate"`, `"split"`,
            `"drop"`; see `plan_packs`.
        max_sequences: examples in a pack, at most; None for no limit.
        open_packs: packs that wait for more examples at the same time.

    Raises:
        ValueError: while iterating, an example without tokens, or with more than `max_tokens` and
            `overlong="error"`; accelerate is about to dispatch the batches.
    """

    def __init__(
        self,
        dataset: Any,
        max_tokens: int,
        *,
        overlong: str = "error",
        max_sequences: int | None = None,
        open_packs: int = OPEN_PACKS,
    ) -> None:
        self.dataset, self.max_tokens, self.overlong = dataset, max_tokens, overlong
        self.max_sequences, self.open_packs = max_sequences, open_packs
        # in shared memory, because persistent workers keep a copy of this dataset over many epochs
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._packer = _Packer(max_tokens, max_sequences, open_packs)
        self._begun: int | None = None  # the epoch of the iteration
        self._seen = 0  # examples that it took
        self._loaded: dict[str, Any] | None = None  # the state to begin the next iteration with
        # the dataset's state of a loaded one, until its first example comes
        self._source: Any = None
        self._is_placed = False  # whether the dataset was given a place to begin at

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: it stands still, however far an iteration of this stream goes on."""
        packer = _Packer(self.max_tokens, self.max_sequences, self.open_packs)
        packer.load_state_dict(self._packer.state_dict())
        return {**vars(self), "_packer": packer, "_source": self.state_dict()["source"]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._epoch.share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Tells the dataset the epoch.

        A state that was loaded waits for the first iteration: it is resumed where that is of the
        state's epoch, whatever was set between, and let go of where it is not.
        """
        refuse_dispatch(self)
        epoch = integer("epoch", epoch, least=0)
        if epoch != int(self._epoch):
            self._begun = None  # going back to an epoch begins it anew
        self._epoch.fill_(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Tells where the iteration stands: after the pack that it last yielded, or where an epoch
        begins that was set since."""
        epoch = int(self._epoch)
        if self._loaded is not None and self._loaded["epoch"] == epoch:
            return self._loaded
        if self._begun != epoch:
            return {"epoch": epoch, **BEGINNING}
        source = self._source
        if source is None and hasattr(self.dataset, "state_dict"):
            source = self.dataset.state_dict()
        return {
            "epoch": epoch,
            "seen": self._seen,
            "source": source,
            **self._packer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next iteration go on from a state, with the options and dataset of then.

        Raises:
            TypeError: it is no dict.
            ValueError: it is not the state of such a stream.
        """
        _check_state(state_dict)
        self.set_epoch(state_dict["epoch"])
        self._loaded, self._begun = state_dict, None

    def __iter__(self) -> Iterator[Pack]:
        refuse_dispatch(self)
        state, self._loaded = self._loaded, None
        self._begun = int(self._epoch)
        if state is None or state["epoch"] != self._begun:
            state = BEGINNING
        packer = self._packer = _Packer(self.max_tokens, self.max_sequences, self.open_packs)
        packer.load_state_dict(state)
        self._seen, self._source = state["seen"], state["source"]
        examples = self._examples(state)
        yield from packer.take()  # those that had been ready when the state was taken
        for example in examples:
            self._source = None
            self._seen += 1
            self._put(packer, example)
            yield from packer.take()
        packer.close()
        yield from packer.take()
        self._forget_place()

    def _examples(self, state: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._forget_place()  # of an iteration that was left before its end
        if state["seen"] > 0 and state["source"] is None:
            return islice(self.dataset, state["seen"], None)
        if state["seen"] > 0:
            self.dataset.load_state_dict(state["source"])
            self._is_placed = True
        return iter(self.dataset)

    def _forget_place(self) -> None:
        if self._is_placed and is_iterable_dataset(self.dataset):
            # it would begin every iteration at the place that it was given
            self.dataset.load_state_dict({})
        self._is_placed = False

    def _put(self, packer: _Packer, example: dict[str, Any]) -> None:
        number = self._seen - 1
        try:
            example = unbatched(example)
            tokens = len(example["input_ids"])
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"example {number} has no input_ids to pack ({type(error).__name__}: {error})"
            ) from None
        if tokens == 0:
            raise ValueError(f"example {number} has no tokens; take it out of the dataset")
        if tokens <= self.max_tokens:
            packer.put(example, tokens)
        elif self.overlong == "error":
            raise ValueError(
                f"example {number} has {tokens} tokens, more than max_tokens={self.max_tokens}; "
                "overlong='truncate', 'split' or 'drop' says what to do with it"
            )
        elif self.overlong != "drop":
            end = tokens if self.overlong == "split" else self.max_tokens
            for start in range(0, end, self.max_tokens):
                length = min(self.max_tokens, end - start)
                packer.put(cut(example, start, length), length)
