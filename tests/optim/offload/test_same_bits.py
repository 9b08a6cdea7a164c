"""Where the optimizer's states and gradients lie changes no bit of a training: losses, norms,
weights and states, in every combination.

The whole matrix has every pair of values of the choices in `support.offloaded.CHOICES`."""

from __future__ import annotations

import contextlib
import warnings

import pytest
from support.offloaded import (
    TIERS,
    Case,
    assert_same_bits,
    pairwise,
    small_buffers,
    trained,
)
from support.scheduler import Scheduler

MATRIX = pairwise(seed=15)
# what the issue says is not refused, in every tier
PROMISED = [
    Case("llama", tier, "exact", moments, "call", 4, "all", True, "as before", order)
    for tier in TIERS
    for moments, order in (("fp32", "late"), ("8bit", "host"), ("4bit", "early"))
]
SWITCHES = [
    Case("chain", offload, clipping="option", params="late", resumed=resumed)
    for offload in (None, *TIERS)
    for resumed in ("None", *TIERS)
]


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch):
    small_buffers(monkeypatch)


def check(case: Case, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = trained(case._replace(resumed="no"), offload=None, steps=steps)
        on = case.order == "host"
        with contextlib.nullcontext() if on else Scheduler(case.order).installed():
            found = trained(case, offload=case.offload, steps=steps)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("case", PROMISED, ids=str)
def test_what_is_promised_has_the_resident_bits(case, quiet):
    check(case, steps=8)


@pytest.mark.parametrize("case", MATRIX[:8], ids=str)
def test_eight_cases_of_the_matrix_have_the_resident_bits(case, quiet):
    check(case, steps=9)


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_every_pair_of_choices_has_the_resident_bits_after_50_steps(case, quiet):
    check(case, steps=50)


@pytest.mark.parametrize("case", SWITCHES, ids=str)
def test_a_checkpoint_of_each_tier_goes_on_in_each_other(case):
    check(case, steps=6)
