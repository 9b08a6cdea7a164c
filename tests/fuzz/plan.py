"""The plan: every token once, no pack too full, the packs of best fit, windows and epochs kept."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from support.packed_examples import parts_of_example

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
    return Case(
        lengths,
        max_tokens,
        draw(st.none() | st.integers(1, 6)),
        draw(st.none() | st.integers(1, 70)),
        draw(st.sampled_from(["error", "truncate", "split"] if fits else ["truncate", "split"])),
        draw(st.none() | st.integers(0, 2**63 - 1)),
        draw(st.integers(1, 9)),
        draw(st.integers(0, 3)),
    )


CASES = _cases()


def check(case: Case) -> None:
    # beyond that the C++ engine refuses
    small = min(case.max_tokens, sum(case.lengths)) <= LARGEST_TABLES
    plans = {
        impl: plan_packs(
            case.lengths,
            case.max_tokens,
            max_sequences=case.max_sequences,
            window=case.window,
            overlong=case.overlong,
            seed=case.seed,
            impl=impl,
        )
        for impl in ("eager", "cpp" if small else "auto")
    }
    assert _as_entries(plans["eager"]) == _as_entries(plans.popitem()[1]), "engines differ"
    plan = plans["eager"]
    _check_tokens(case, plan)
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
    """The fullest packs by the textbook: longest first, into the open pack with the least room."""
    size = case.window or len(case.lengths)
    entries = sorted(entry for pack in _as_entries(plan) for entry in pack)
    for window in range(-(-len(case.lengths) // size)):
        mine = [entry for entry in entries if entry[0] // size == window]
        rooms: list[tuple[int, int]] = []  # room, sequences
        for _, _, length in sorted(mine, key=lambda entry: -entry[2]):
            fitting = [
                (room, at)
                for at, (room, sequences) in enumerate(rooms)
                if room >= length and sequences < (case.max_sequences or len(mine))
            ]
            if fitting:
                room, at = min(fitting)
                rooms[at] = room - length, rooms[at][1] + 1
            else:
                rooms.append((case.max_tokens - length, 1))
        packs = (plan.windows == window).nonzero().flatten().tolist()
        tokens = [int(plan.lengths[torch.arange(*plan.bounds(pack))].sum()) for pack in packs]
        if case.max_sequences is None:  # else ties among packs decide, which test_plan.py knows
            expected = sorted(case.max_tokens - room for room, _ in rooms)
            assert sorted(tokens) == expected, "the packs are not those of best fit decreasing"
