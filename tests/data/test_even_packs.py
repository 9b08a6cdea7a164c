"""Packs made a group at a time; the oracle is a bound that no packs can be below."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data import even_packs
from fastft.data.balance import balanced
from fastft.data.plan import PackPlan, plan_packs

CAPACITY, RANKS = 8192, 8


def lognormal(examples: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(5.8, 0.92, examples)
    return np.clip(drawn, 1, CAPACITY).astype(np.int32)


def squares_over_mean(plan: PackPlan, batch: int = 1) -> float:
    """The squares of the rank that the others wait for, over the mean of all."""
    squares = even_packs.pack_costs(plan)[1].view(-1, RANKS, batch).sum(2)
    return float(squares.amax(1).sum() / squares.mean(1).sum())


def least(lengths: np.ndarray) -> float:
    """What no packs of these examples can be below, batch 1.

    Of examples longer than half a pack each has a pack of its own, with squares between L^2 and
    L^2 + (C - L)^2. The group that is k-th by its dearest pack has at least the squares of example
    1 + 8 k; and no 8 k packs have more than those of the longest.
    """
    longest = [int(n) for n in np.sort(lengths)[::-1] if 2 * n > CAPACITY]
    lacking, most = 0, 0
    for first in range(0, len(longest) // RANKS * RANKS, RANKS):
        group = longest[first : first + RANKS]
        lacking += RANKS * group[0] ** 2 - sum(n**2 + (CAPACITY - n) ** 2 for n in group)
        most = max(most, lacking)
    return 1 + most / float(np.square(lengths, dtype=np.float64).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_20_000_examples_come_near_to_what_is_possible(seed):
    lengths = lognormal(20_000, seed)
    plan = plan_packs(lengths, CAPACITY)
    one, two = balanced(plan, RANKS), balanced(plan, 2 * RANKS)
    assert len(one) == len(plan) + -len(plan) % RANKS
    assert squares_over_mean(one) <= least(lengths) + 0.003
    assert squares_over_mean(two, 2) <= 1.01
    if seed == 0:  # the lengths of benchmarks/test_plan.py
        assert squares_over_mean(one) <= 1.01


@pytest.mark.parametrize(
    ("options", "most"), [({"window": 1000}, 1.25), ({"max_sequences": 100}, 1.01)]
)
def test_what_limits_a_pack_does_not_keep_packs_from_being_even(options, most):
    plan = plan_packs(lognormal(20_000, 0), CAPACITY, **options)
    made = balanced(plan, RANKS, options.get("max_sequences"))
    assert squares_over_mean(made) <= most
    assert int(made.offsets.diff().max()) <= options.get("max_sequences", 20_000)


@pytest.mark.parametrize("name", ["uniform", "two kinds", "exponential"])
def test_packs_are_made_anew_only_where_that_is_better(name, monkeypatch):
    rng = np.random.default_rng(0)
    drawn = {
        "uniform": rng.integers(1, 513, 3000),
        "two kinds": np.where(
            rng.random(3000) < 0.1, rng.integers(256, 513, 3000), rng.integers(1, 25, 3000)
        ),
        "exponential": np.clip(rng.exponential(51, 3000), 1, 512).astype(int),
    }
    plan = plan_packs(drawn[name], 512)
    ours = squares_over_mean(balanced(plan, RANKS))
    monkeypatch.setattr("fastft.data.balance.even_packs", lambda *_: None)
    assert ours <= squares_over_mean(balanced(plan, RANKS))


def test_a_plan_that_is_even_stays():
    plan = plan_packs([4] * 64, 8)
    assert even_packs.even_packs(plan, RANKS, 64) is None


@pytest.mark.parametrize("window", [None, 2000])
def test_what_is_searched_grows_with_the_examples(monkeypatch, window):
    """Look-ups, and steps of these, are counted: no timing decides a test."""
    looked, longest = 0, even_packs._Pool.longest

    def counted(pool: even_packs._Pool, most: float) -> int:
        nonlocal looked
        looked += 1
        return longest(pool, most)

    monkeypatch.setattr(even_packs._Pool, "longest", counted)
    plan = plan_packs(lognormal(100_000, 0), CAPACITY, window=window)
    assert even_packs.even_packs(plan, RANKS, 100_000) is not None
    assert 0 < looked < 3 * 100_000


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.lists(st.integers(0, 10)))
def test_the_longest_that_fits_is_found(lengths, asked):
    pool = even_packs._Pool(lengths)
    left = dict(enumerate(lengths))
    for most in asked:
        place = pool.longest(most)
        fitting = [length for length in left.values() if length <= most]
        assert (place >= 0) == bool(fitting)
        if fitting:
            assert left.pop(pool.take(place)) == max(fitting)
    assert sorted(pool.left()) == sorted(left)


def test_packs_cost_what_their_sequences_do():
    tokens, squares = even_packs.pack_costs(plan_packs([5, 3, 4, 4], 8))
    assert tokens.tolist() == [8, 8] and squares.tolist() == [34, 32]
    assert squares.dtype == torch.float64
