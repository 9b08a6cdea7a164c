"""Chains of steps on lazy logits against the same on dense ones: those that went wrong once, and
each step on each layout. `tests/fuzz/lazy_logits.py` says what is looked at, and draws others."""

from __future__ import annotations

import pytest
import torch
from fuzz.lazy_logits import KINDS, STEPS, Kind, compare

ONCE_WRONG = [
    ([("tanh", 0), ("clone", 0), ("masked_fill_", 0)], KINDS[0]),
    ([("transpose", 0), ("log_softmax", 0), ("view", 0)], KINDS[0]),
    ([("transpose", 0), ("logsigmoid", 0), ("through reshape", 0)], KINDS[0]),
    ([("transpose", 0), ("mask inside", 0), ("view", 0)], KINDS[0]),
    ([("tanh", 0), ("in place, unrecorded", 0)], KINDS[0]),
    ([("detached, in place", 0)], KINDS[0]),
    ([("to copy by position", 0), ("mul_", 0)], KINDS[0]),
    ([("cross entropy of probabilities", 0)], KINDS[2]),
    ([("sigmoid", 0), ("cat", 0), ("relu_", 0)], Kind(torch.float64)),
]


@pytest.mark.parametrize(("chain", "kind"), ONCE_WRONG)
def test_a_chain_that_was_wrong_once(chain, kind):
    compare(chain, kind)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_step_on_each_layout(name, kind):
    for before in ("view", "transpose", "slice", "step", "permute", "index", "last"):
        compare([(before, 0), (name, 0), ("masked_fill_", 0)], kind)
