from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data.balance import _shared_out, balanced
from fastft.data.collator import PackingCollator
from fastft.data.even_packs import pack_costs
from fastft.data.packed import pack
from fastft.data.plan import PackPlan, plan_packs

RANKS = 8


def lognormal(examples: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(5.8, 0.92, examples), 1, 8192).astype(
        np.int32
    )


def as_lists(plan: PackPlan) -> list[list[int]]:
    return [pack.tolist() for pack in plan]


def examples_of(lengths: list[int], **columns) -> list[dict]:
    return [{"input_ids": [i] * n, **columns} for i, n in enumerate(lengths)]


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_have_equal_tokens_and_squares(batch, seed):
    plan = balanced(plan_packs(lognormal(100_000, seed), 8192), RANKS * batch)
    assert len(plan) % (RANKS * batch) == 0 and plan.indices.numel() == 100_000
    for cost in pack_costs(plan):
        # accelerate gives batch b of a step to rank b
        of_ranks = cost.double().reshape(-1, RANKS, batch).sum(2)
        assert of_ranks.amax(1).sum() / of_ranks.mean(1).sum() <= 1.01


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=80),
    st.integers(1, 9),
    st.none() | st.integers(1, 4),
    st.none() | st.integers(1, 30),
)
def test_every_example_once_in_a_multiple_of_packs(lengths, group, max_sequences, window):
    plain = plan_packs(lengths, 64, max_sequences=max_sequences, window=window)
    plan = balanced(plain, group, max_sequences)
    assert len(plan) % group == 0 and 0 <= len(plan) - len(plain) < group
    assert sorted(plan.indices.tolist()) == list(range(len(lengths)))
    assert plan.lengths.tolist() == [lengths[i] for i in plan.indices.tolist()]
    sizes = [len(pack) for pack in plan]
    assert sum(sizes) == len(lengths) and max(sizes) <= (max_sequences or 64)
    assert pack_costs(plan)[0].max() <= 64
    assert (plan.windows[::group].diff() >= 0).all()  # those of the groups
    for one, label in zip(as_lists(plan), plan.windows.tolist(), strict=True):
        # no pack has examples of two windows
        assert {example // (window or 80) for example in one} <= {label}
    if sizes.count(0):  # only where there are too few examples to divide
        assert len(lengths) < len(plan) or window is not None or len(plan) > group


def test_many_examples_are_shared_out_without_comparing_each_with_each():
    """100,000 examples of 10 packs over 64: the number of comparisons is counted, as no timing
    decides a test."""
    compared = 0

    class Length(int):
        def __lt__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return int(self) < other

    lengths = [Length(n) for n in np.random.default_rng(0).integers(1, 60, 4000).tolist()]
    packs = _shared_out(lengths, [400] * 10, 54, 4000)
    tokens = [sum(lengths[entry] for entry in pack.tolist()) for pack in packs]
    assert max(tokens) - min(tokens) <= 30
    assert compared < 4000 * 100


@pytest.mark.parametrize("group", [3, 4])
def test_groups_stay_together_when_epochs_shuffle(group):
    packed = pack(
        examples_of(np.random.default_rng(0).integers(1, 60, 300).tolist()),
        64,
        balance=group,
        seed=5,
    )

    def groups() -> list[list[float]]:
        return pack_costs(packed.plan)[1].reshape(-1, group).tolist()

    first = groups()
    packed.set_epoch(1)
    assert groups() != first and sorted(groups()) == sorted(first)


@pytest.mark.parametrize("labels", [None, [1, 2, 3, 4, 5], 2])
def test_packs_that_stay_empty_are_ignored(labels):
    examples = [
        {"input_ids": [7] * 5} | ({} if labels is None else {"labels": labels}) for _ in range(3)
    ]
    packed = pack(examples, 8, balance=2)
    assert len(packed) == 4
    empty = [
        one.examples[0]
        for one, members in zip(packed, packed.plan, strict=True)
        if not len(members)
    ]
    assert [list(example["input_ids"]) for example in empty] == [[7]]
    if labels is None:
        batch = PackingCollator()([packed[int(packed.plan.offsets.diff().argmin())]])
        assert batch["labels"].tolist() == [[-100]]
    else:
        assert empty[0]["labels"] in ([-100], -100)


def test_regression_labels_cannot_be_ignored():
    packed = pack([{"input_ids": [7] * 5, "labels": 0.5}] * 3, 8, balance=2)
    with pytest.raises(ValueError, match="balance needs more packs than there are examples for"):
        list(packed)


def loader(packed, **options) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(packed, collate_fn=lambda packs: len(packs), **options)


@pytest.mark.parametrize("order", [{"balance": 4}, {"seed": 0}])
def test_a_sampler_that_shuffles_is_noticed(order):
    lengths = np.random.default_rng(0).integers(1, 60, 300).tolist()
    sequential = pack(examples_of(lengths), 64, **order)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(2):
            sequential.set_epoch(epoch)
            assert sum(loader(sequential, batch_size=4)) == len(sequential)
    for batch_size in (1, 4):
        with pytest.warns(UserWarning, match="train_sampling_strategy='sequential'"):
            list(
                loader(pack(examples_of(lengths), 64, **order), batch_size=batch_size, shuffle=True)
            )


@pytest.mark.parametrize("balance", [0, -1, 2.0, True, 2**20])
def test_bad_balance(balance):
    with pytest.raises(ValueError, match=r"balance must be an integer in \[1, 2\^20\) or None"):
        pack(examples_of([1]), 8, balance=balance)
