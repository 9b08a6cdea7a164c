"""Integers at the door: which are taken, and what is said of others."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from fastft import PackingCollator, pack
from fastft.checks import integer, optional_integer


@pytest.mark.parametrize("value", [7, np.int64(7), np.uint8(7), torch.tensor(7)], ids=repr)
def test_every_kind_of_integer_becomes_pythons(value):
    for made in (integer("n", value), optional_integer("n", value)):
        assert made == 7 and type(made) is int
    assert optional_integer("n", None) is None


@pytest.mark.parametrize(
    "value", [True, np.True_, 2.0, "2", None, torch.ones(2), torch.tensor(2.0), 1, 8, -3], ids=repr
)
def test_others_are_named(value):
    message = f"n must be an integer in [2, 2^3), got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        integer("n", value, least=2, bits=3)
    with pytest.raises(ValueError, match=re.escape(message.replace("2^3)", "2^3) or a list"))):
        integer("n", value, least=2, bits=3, otherwise=" or a list")


def test_limits_are_those_of_int64_if_nobody_says_others():
    assert integer("n", 2**63 - 1) == 2**63 - 1
    for value in (0, 2**63, 2**80):
        with pytest.raises(ValueError, match=rf"n must be an integer in \[1, 2\^63\), got {value}"):
            integer("n", value)


def test_options_may_come_from_numpy():
    packs = pack([{"input_ids": [1, 2]}] * 3, np.int64(4), max_sequences=np.int32(2))
    batch = PackingCollator(rows=np.int64(1), pad_to_multiple_of=np.int64(3))([packs[0]])
    assert batch["input_ids"].tolist() == [[1, 2, 1, 2, 0, 0]]
