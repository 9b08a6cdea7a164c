"""The plan: every token once, no pack too full, the packs of best fit, windows and epochs kept."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
from hypothesis import strategies as st
from support.packed_examples import best_fit_decreasing, parts_of_example

from fastft.data.balance import balanced
from fastft.data.plan import LARGEST_TABLES, PackPlan, epoch_plan, plan_packs

EXAMPLES = 60


class Case(NamedTuple):
    lengths: list[int]
    max_tokens: int
    max_sequences: int | None
    window: int | None
    overlong: str
    seed: int | None
    group: int
    epoch: int


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    max_tokens = draw(st.sampled_from([1, 2, 3, 7, 63, 64, 65, 507, 4096, 2**31 - 1]))
    longest = min(3 * max_tokens, 2**31 - 1)
    some = st.integers(1, longest) | st.integers(1, min(8, longest)) | st.just(max_tokens)
    lengths = draw(st.lists(some, min_size=1, max_size=60))
    fits = max(lengths) <= max_tokens
    policies = ["truncate", "split", "drop", *["error"] * fits]
    return Case(
        lengths,
        max_tokens,
        draw(st.none() | st.integers(1, 6)),
        draw(st.none() | st.integers(1, 70)),
        draw(st.sampled_from(policies)),
        draw(st.none() | st.integers(0, 2**63 - 1)),
        draw(st.integers(1, 9)),
        draw(st.integers(0, 3)),
    )


CASES = _cases()


def check(case: Case) -> None:
    if case.overlong == "drop" and min(case.lengths) > case.max_tokens:
        with pytest.raises(ValueError, match="leaves nothing"):
            _planned(case, "eager")
        return
    # beyond that the C++ engine refuses
    small = min(case.max_tokens, sum(case.lengths)) <= LARGEST_TABLES
    plan = _planned(case, "eager")
    other = _planned(case, "cpp" if small else "auto")
    assert _as_entries(plan) == _as_entries(other), "engines differ"
    _check_tokens(case, plan)
    _check_windows(case, plan)
    _check_best_fit(case, plan)
    groups = balanced(plan, case.group, case.max_sequences)
    assert len(groups) % case.group == 0 and 0 <= len(groups) - len(plan) < case.group
    _check_tokens(case, groups)
    _check_windows(case, groups)
    epoch = epoch_plan(groups, case.seed or 0, case.epoch, case.group)
    _check_tokens(case, epoch)
    _check_windows(case, epoch)
    again = epoch_plan(groups, case.seed or 0, case.epoch, case.group)
    assert _as_entries(again) == _as_entries(epoch), "an epoch differs when it is drawn again"


def _planned(case: Case, impl: str) -> PackPlan:
    return plan_packs(
        case.lengths,
        case.max_tokens,
        max_sequences=case.max_sequences,
        window=case.window,
        overlong=case.overlong,
        seed=case.seed,
        impl=impl,
    )


def _as_entries(plan: PackPlan) -> list[list[tuple[int, int, int]]]:
    entries = list(
        zip(plan.indices.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True)
    )
    edges = plan.offsets.tolist()
    return [entries[a:b] for a, b in itertools.pairwise(edges)]


def _check_tokens(case: Case, plan: PackPlan) -> None:
    """Each example's tokens are there once, in pieces as `overlong` says, and no pack is full."""
    pieces = sorted(entry for pack in _as_entries(plan) for entry in pack)
    expected = [
        (example, *part)
        for example, length in enumerate(case.lengths)
        for part in parts_of_example(length, case.max_tokens, case.overlong)
    ]
    assert pieces == expected, "tokens are missing or twice"
    for pack in _as_entries(plan):
        assert sum(length for *_, length in pack) <= case.max_tokens, "a pack is too full"
        assert len(pack) <= (case.max_sequences or len(pieces)), "a pack has too many sequences"


def _check_windows(case: Case, plan: PackPlan) -> None:
    """A pack has examples of its window alone."""
    size = case.window or len(case.lengths)
    for pack, window in zip(_as_entries(plan), plan.windows.tolist(), strict=True):
        assert {example // size for example, *_ in pack} <= {window}, "a pack mixes windows"


def _check_best_fit(case: Case, plan: PackPlan) -> None:
    """The packs of the textbook, window by window: in its order unless a seed has shuffled them."""
    size = case.window or len(case.lengths)
    expected = []
    for first in range(0, len(case.lengths), size):
        parts = [
            (example, *part)
            for example, length in enumerate(case.lengths[first : first + size], first)
            for part in parts_of_example(length, case.max_tokens, case.overlong)
        ]
        lengths = [length for *_, length in parts]
        packs = best_fit_decreasing(lengths, case.max_tokens, case.max_sequences)
        expected += [[parts[place] for place in pack] for pack in packs]
    found = _as_entries(plan)
    if case.seed is not None:
        found, expected = sorted(found), sorted(expected)
    assert found == expected, "the packs are not those of best fit decreasing"
