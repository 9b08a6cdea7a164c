"""pack of an iterable dataset: best fit as examples come, wherever it stops and is taken up again.

A consumer takes packs, saves, loads what it saved before, begins an epoch, copies or moves to
another process; the oracle knows all packs of each epoch, and where the consumer stands in them.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import datasets
from hypothesis import strategies as st
from support.packed_examples import parts_of_example
from torch.utils.data import IterableDataset

import fastft

EXAMPLES = 100
Row = dict[str, Any]
Parts = list[tuple[int, int, int]]  # example, first token, tokens


class Plain(IterableDataset[Row]):
    """As torch has it: no state, no epochs."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


class Epochs(Plain):
    """Begins with another row in each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Row]:
        first = self.epoch % len(self.rows)
        return iter(self.rows[first:] + self.rows[:first])


class Stateful(Epochs):
    """In torchdata's convention."""

    position, start = 0, 0

    def __iter__(self) -> Iterator[Row]:
        rows = [*super().__iter__()]
        self.position, self.start = self.start, 0
        while self.position < len(rows):
            self.position += 1
            yield rows[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.start = state_dict["position"]


def _stored(rows: list[Row], shards: int = 1) -> datasets.IterableDataset:
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)


FORMS: dict[str, Callable[[list[Row]], Any]] = {
    "plain": Plain,
    "epochs": Epochs,
    "stateful": Stateful,
    "datasets": _stored,
    "shards": lambda rows: _stored(rows, min(3, len(rows))),
    "shuffled shards": lambda rows: _stored(rows, min(3, len(rows))).shuffle(seed=1, buffer_size=1),
    "numpy": lambda rows: _stored(rows).with_format("numpy"),
    "torch": lambda rows: _stored(rows).with_format("torch"),
    "mapped": lambda rows: _stored(rows).map(dict),
    "generated": lambda rows: datasets.IterableDataset.from_generator(
        _generated, gen_kwargs={"rows": rows}
    ),
}


def _generated(rows: list[Row]) -> Iterator[Row]:
    yield from rows


class Case(NamedTuple):
    form: str
    lengths: list[int]
    max_tokens: int
    overlong: str
    max_sequences: int | None
    open_packs: int | None
    actions: list[tuple[str, int]]


ACTIONS = ("take", "take", "take", "save", "save", "load", "load", "begin", "epoch", "copy", "move")


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    max_tokens = draw(st.sampled_from([1, 7, 31, 64]))
    overlong = draw(st.sampled_from(["error", "truncate", "split", "drop"]))
    longest = max_tokens if overlong == "error" else 3 * max_tokens
    return Case(
        draw(st.sampled_from(sorted(FORMS))),
        draw(st.lists(st.integers(1, longest), min_size=1, max_size=25)),
        max_tokens,
        overlong,
        draw(st.none() | st.integers(1, 5)),
        draw(st.none() | st.integers(1, 4)),
        draw(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(1, 7)), max_size=9)),
    )


CASES = _cases()


def check(case: Case) -> None:
    consumer = _Consumer(case)
    for action, number in [*case.actions, ("take", 100)]:
        getattr(consumer, f"{action}_")(number)
    consumer.check_copies()


class _Consumer:
    """Takes one action after another; `place` is how many packs of the epoch it has had."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rows = [
            {"input_ids": [1000 * i + t for t in range(n)], "text": f"example {i}"}
            for i, n in enumerate(case.lengths)
        ]
        self.stream = self._made()
        self.epoch, self.place = 0, 0
        self.loaded: tuple[int, int] | None = None  # waits for an iteration of its epoch
        self.running: Iterator[Any] | None = None
        self.saved: list[tuple[Any, int, int]] = []
        self.copies: list[tuple[Any, int, int]] = []  # of a running iteration

    def _made(self) -> Any:
        case = self.case
        limits = {"overlong": case.overlong, "max_sequences": case.max_sequences}
        data = FORMS[case.form](self.rows)
        return fastft.pack(data, case.max_tokens, open_packs=case.open_packs, **limits)

    def _expected(self, epoch: int) -> list[Parts]:
        data = FORMS[self.case.form](self.rows)
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        return _best_fit(self.case, [_parts_of(row) for row in data])

    def _beginning(self) -> int:
        """Where the next iteration begins."""
        return self.loaded[1] if self.loaded and self.loaded[0] == self.epoch else 0

    def take_(self, number: int) -> None:
        if self.running is None:
            self.running, self.place, self.loaded = iter(self.stream), self._beginning(), None
        found = _packs_of(islice(self.running, number))
        expected = self._expected(self.epoch)[self.place : self.place + number]
        assert found == expected, f"packs from {self.place} on are others"
        self.place += len(found)

    def save_(self, _: int) -> None:
        self.saved.append((pickle.dumps(self.stream.state_dict()), self.epoch, self.place))

    def load_(self, number: int) -> None:
        if not self.saved:
            return
        state, self.epoch, self.place = self.saved[number % len(self.saved)]
        self.running, self.loaded = None, (self.epoch, self.place)
        self.stream.load_state_dict(pickle.loads(state))

    def move_(self, number: int) -> None:
        """Another process makes the stream again before it loads."""
        if self.saved:
            self.stream = self._made()
            self.load_(number)

    def begin_(self, _: int) -> None:
        self.running = None

    def epoch_(self, number: int) -> None:
        is_another, self.epoch = number % 3 != self.epoch, number % 3
        if is_another:  # what was left of the one before is neither resumed nor written
            self.place = self._beginning()
        self.running = None
        self.stream.set_epoch(self.epoch)

    def copy_(self, number: int) -> None:
        copied = copy.deepcopy(self.stream) if number % 2 else _pickled(self.stream)
        if self.running is None:
            self.stream = copied
        else:
            self.copies.append((copied, self.epoch, self.place))

    def check_copies(self) -> None:
        """Wherever the stream has gone meanwhile, a copy stands where it stood, and begins anew."""
        for copied, epoch, place in self.copies:
            state = copied.state_dict()
            assert _packs_of(copied) == self._expected(epoch), "a copy has other packs"
            copied.load_state_dict(state)
            assert _packs_of(copied) == self._expected(epoch)[place:], "a copy stands elsewhere"


def _packs_of(packs: Iterable[Any]) -> list[Parts]:
    return [[_parts_of(example) for example in pack.examples] for pack in packs]


def _pickled(stream: Any) -> Any:
    return pickle.loads(pickle.dumps(stream))


def _parts_of(example: Row) -> tuple[int, int, int]:
    """Which part of which example it is; all its tokens are those."""
    ids = [int(token) for token in example["input_ids"]]
    number, first = divmod(ids[0], 1000)
    assert ids == [ids[0] + place for place in range(len(ids))]
    assert example["text"] == f"example {number}"
    return number, first, len(ids)


def _best_fit(case: Case, examples: Parts) -> list[Parts]:
    """Looks at every open pack for every example."""
    waiting: list[Parts] = []
    done: list[Parts] = []

    def room(pack: Parts) -> int:
        return case.max_tokens - sum(length for *_, length in pack)

    for number, _, length in examples:
        for first, tokens in parts_of_example(length, case.max_tokens, case.overlong):
            part = number, first, tokens
            fitting = [pack for pack in waiting if room(pack) >= part[2]]
            if not fitting and len(waiting) == (case.open_packs or 32):
                done.append(min(waiting, key=room))
                waiting.remove(done[-1])
            if not fitting:
                waiting.append([])
            chosen = min(fitting, key=room) if fitting else waiting[-1]
            chosen.append(part)
            if room(chosen) == 0 or len(chosen) == case.max_sequences:
                waiting.remove(chosen)
                done.append(chosen)
    return done + sorted(waiting, key=room)
