"""Examples over several rows: balanced, nothing lost, packs whole, padding at the end of a row."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_examples import make, unpacked

from fastft.data.collator import PackingCollator
from fastft.data.pack import Pack
from fastft.data.rows import balanced_rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 6))
def test_rows_are_balanced(sizes, rows):
    members = balanced_rows(sizes, rows)
    assert sorted(unit for row in members for unit in row) == list(range(len(sizes)))
    assert len(members) == min(rows, len(sizes)) and all(
        row == sorted(row) and row for row in members
    )
    assert members == sorted(members)
    longest = max(sum(sizes[unit] for unit in row) for row in members)
    # Graham's bound of any such list, in whole numbers: that of 4/3 is of the best possible, which
    # nobody knows here
    assert longest * rows <= sum(sizes) + (rows - 1) * max(sizes)


@pytest.mark.parametrize(
    ("sizes", "rows", "expected"),
    [
        ([5, 5], 2, [[0], [1]]),
        ([1, 5, 4], 2, [[0, 2], [1]]),
        ([3], 4, [[0]]),
        ([2, 2, 2, 2], 2, [[0, 2], [1, 3]]),
    ],
)
def test_which_row(sizes, rows, expected):
    assert balanced_rows(sizes, rows) == expected


def test_packs_stay_whole():
    examples = make([3, 4, 2, 6, 1])
    packs = [Pack(examples[:2]), Pack(examples[2:3]), Pack(examples[3:])]
    batch = PackingCollator(rows=3)(packs)
    assert batch["input_ids"].shape == (3, 7)
    texts = [example["input_ids"] for example in examples]
    assert unpacked(batch, "input_ids") == [*texts[:3], [0] * 5, *texts[3:]]
    assert batch["seq_idx"].tolist() == [[0] * 3 + [1] * 4, [2] * 2 + [3] * 5, [4] * 6 + [5]]


def test_padding_is_a_segment_of_its_own_in_each_row():
    batch = PackingCollator(rows=2, pad_to_multiple_of=4, pad_token_id=7)(
        make([3, 2], labels=50, token_type_ids=1)
    )
    assert batch["input_ids"].tolist() == [[0, 1, 2, 7], [9, 10, 7, 7]]
    assert batch["labels"].tolist() == [[-100, 51, 52, -100], [-100, 51, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1], [2, 2, 3, 3]]
    assert batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6, 8] and batch["max_length_k"] == 3
    assert batch["token_type_ids"].tolist() == [[1, 2, 3, 0], [1, 2, 0, 0]]
