"""Trainings whose memory runs out: they come to the bits that they would have come to anyway, or
say so and leave the weights of whole steps; with more memory the next one is right."""

from __future__ import annotations

import json
import sys

import pytest
from support.killed import apart
from support.limited_memory import WAYS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")

LEVELS = [number / 11 for number in range(13)]  # of the memory that the training takes
FEW = [0.2, 1.1]
# the last is oneDNN's
SAID = ("memory", "alloc", "MemoryError", "could not create a primitive")


@pytest.mark.parametrize(
    ("way", "levels"),
    [
        pytest.param("packs, 8-bit moments", FEW, id="a few levels"),
        *(pytest.param(way, LEVELS, id=way, marks=pytest.mark.slow) for way in WAYS),
    ],
)
def test_it_is_right_or_says_that_memory_is_at_its_end(tmp_path, way, levels):
    given = f"Path({str(tmp_path)!r}), {way!r}, {levels}"
    found = json.loads(apart("support.limited_memory", f"outcomes({given})"))
    short = 0
    for outcome, _, small, switched in found["limited"]:
        if outcome != found["free"]:
            short += 1
            if isinstance(outcome[0], str):
                error, weights = outcome
                assert any(words in error for words in SAID), error
                assert switched or weights in found["free"][1]
            else:
                assert switched, outcome
        assert small == found["small"]
    assert 0 < short < len(levels)
    assert found["limited"][-1][0] == found["free"]
