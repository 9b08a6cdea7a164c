"""PackingCollator of sounds: what they say lies in few rows, each example beside its own sound."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import fastft
from fuzz.collator import FORMS, IGNORED, START

EXAMPLES = 150
Row = dict[str, Any]


class Example(NamedTuple):
    frames: int
    tokens: int
    form: str


class Case(NamedTuple):
    examples: list[Example]
    row_tokens: int
    multiple: int | None
    start: int
    pad: int
    pads: bool
    key: str
    features: int  # of a frame; 0: sounds are waves
    masked: bool
    given: bool  # what the decoder reads
    fault: str | None


CASES = st.builds(
    Case,
    examples=st.lists(
        st.builds(
            Example, st.integers(1, 5), st.integers(1, 12), st.sampled_from([*FORMS, "list"])
        ),
        min_size=1,
        max_size=8,
    ),
    row_tokens=st.integers(1, 30),
    multiple=st.none() | st.sampled_from([1, 4]),
    start=st.sampled_from([0, 2]),
    pad=st.sampled_from([0, 3]),
    pads=st.booleans(),
    key=st.sampled_from(["input_features", "input_values"]),
    features=st.sampled_from([0, 2]),
    masked=st.booleans(),
    given=st.booleans(),
    fault=st.sampled_from([None] * 20 + ["no sound", "no labels", "no tokens", "other length"]),
)


def check(case: Case) -> None:
    rows = [_row(case, index, example) for index, example in enumerate(case.examples)]
    collator = fastft.PackingCollator(
        task="speech_seq2seq",
        row_tokens=case.row_tokens,
        pad_to_multiple_of=case.multiple,
        position_ids_start=case.start,
        pad_token_id=case.pad,
        pad_examples=case.pads,
        decoder_start_token_id=START,
    )
    if case.fault:
        rows[-1] |= {"decoder_input_ids": [1] * 99, "labels": [] if "tokens" in case.fault else [1]}
        for key in {"no sound": [case.key], "no labels": ["labels"]}.get(case.fault, []):
            del rows[-1][key]
        with pytest.raises(ValueError, match=r"example|labels|input_features"):
            collator(rows)
        return
    batch, expected = collator(rows), _expected(case)
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        found = batch[key].tolist() if isinstance(batch[key], torch.Tensor) else batch[key]
        assert found == value, f"{key} is {found}, not {value}"
    assert batch.counted == sum(x != IGNORED for line in expected["labels"] for x in line)


def _sound(case: Case, index: int, frames: int) -> Any:
    values = [100.0 * index + t + 1 for t in range(frames)]
    return [[value, -value] for value in values] if case.features else values


def _tokens(index: int, count: int) -> list[int]:
    return [IGNORED if t % 5 == 3 else 1000 * (index + 1) + t for t in range(count)]


def _row(case: Case, index: int, example: Example) -> Row:
    make = FORMS[example.form]
    sound = np.array(_sound(case, index, example.frames), np.float32)
    row = {case.key: torch.from_numpy(sound) if "torch" in example.form else sound}
    row["labels"] = make(_tokens(index, example.tokens))
    if case.masked:
        row["attention_mask"] = make([1] * example.frames)
    if case.given:
        row["decoder_input_ids"] = make([500 + t for t in range(example.tokens)])
    return row


def _shared_out(case: Case) -> list[list[int]]:
    """The fewest rows that hold the examples, when each takes the longest that is left by turns."""
    sizes = [example.tokens for example in case.examples]
    most = max(case.row_tokens, *sizes)
    for count in range(1, len(sizes)):
        rows: list[list[int]] = [[] for _ in range(count)]
        for one in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
            min(rows, key=lambda row: sum(sizes[other] for other in row)).append(one)
        if not case.pads and max(sum(sizes[one] for one in row) for row in rows) <= most:
            return sorted(map(sorted, rows))
    return [[one] for one in range(len(sizes))]


def _expected(case: Case) -> Row:
    rows, sizes = _shared_out(case), [example.tokens for example in case.examples]
    width = max(sum(sizes[one] for one in row) for row in rows)
    width += -width % (case.multiple or 1)
    batch: Row = _sounds(case, [*itertools.chain(*rows)])
    batch |= {"labels": [], "decoder_input_ids": [], "use_cache": False}
    places, segments = [], []
    for row in rows:
        rest = width - sum(sizes[one] for one in row)
        labels = [_tokens(one, sizes[one]) for one in row]
        labels[-1] = labels[-1] + [IGNORED] * rest  # padding is behind the last example
        segments += [*map(len, labels)]
        batch["labels"].append([*itertools.chain(*labels)])
        places.append([case.start + t for one in row for t in range(sizes[one])])
        places[-1] += [case.start] * rest
        if case.given:
            read = [500 + t for one in row for t in range(sizes[one])] + [case.pad] * rest
        else:
            read = [x for held in labels for x in [START, *held[:-1]]]
        batch["decoder_input_ids"].append([case.pad if x == IGNORED else x for x in read])
    if case.pads:
        return batch
    borders = [0, *itertools.accumulate(segments)]
    batch |= {"decoder_position_ids": places, "decoder_cu_seq_lens": borders}
    return batch | {"decoder_max_length": max(segments)}


def _sounds(case: Case, order: list[int]) -> Row:
    frames = [case.examples[one].frames for one in order]
    longest, silence = max(frames), [0.0, 0.0] if case.features else 0.0
    sounds = [
        _sound(case, one, count) + [silence] * (longest - count)
        for one, count in zip(order, frames, strict=True)
    ]
    mask = [[int(t < count) for t in range(longest)] for count in frames]
    told = case.masked or len({*frames}) > 1
    return {case.key: sounds} | ({"attention_mask": mask} if told else {})
