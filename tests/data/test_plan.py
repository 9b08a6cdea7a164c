from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.packed_examples import best_fit_decreasing

from fastft.data.plan import OVERLONG, PLAN, PackPlan, plan_packs

try:
    import pyarrow
except ImportError:
    pyarrow = None

FIELDS = ("indices", "offsets", "starts", "lengths", "windows")
ENGINES = ["eager", "cpp"]


def as_lists(plan: PackPlan) -> list[list[int]]:
    return [pack.tolist() for pack in plan]


def assert_same(ours: PackPlan, theirs: PackPlan) -> None:
    for field in FIELDS:
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=0, atol=0)
        assert getattr(ours, field).dtype == torch.int64


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int, int | None]:
    max_tokens = draw(st.sampled_from([1, 2, 7, 63, 64, 65, 100, 4095, 4096, 4097, 8192, 100_000]))
    some = st.integers(1, max_tokens) | st.integers(1, min(8, max_tokens)) | st.just(max_tokens)
    lengths = draw(st.lists(some, min_size=1, max_size=120))
    return lengths, max_tokens, draw(st.none() | st.integers(1, 5))


@settings(max_examples=200, deadline=None)
@given(problems())
@example(([1], 1, None))
@example(([5] * 63, 64, None))
@example(([1] * 507, 2**31 - 1, None))
def test_equals_the_oracle(problem):
    lengths, max_tokens, max_sequences = problem
    expected = best_fit_decreasing(lengths, max_tokens, max_sequences)
    native = plan_packs(lengths, max_tokens, max_sequences=max_sequences, impl="cpp")
    assert as_lists(native) == expected
    assert_same(native, plan_packs(lengths, max_tokens, max_sequences=max_sequences, impl="eager"))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=100),
    st.integers(1, 100),
    st.sampled_from(["truncate", "split", "drop"]),
    st.none() | st.integers(0, 2**40),
)
def test_every_token_once_and_no_pack_too_full(lengths, max_tokens, overlong, seed):
    if overlong == "drop" and min(lengths) > max_tokens:
        return
    plan = plan_packs(lengths, max_tokens, overlong=overlong, seed=seed)
    spans: dict[int, list[tuple[int, int]]] = {}
    for entry, start, length in zip(
        plan.indices.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True
    ):
        spans.setdefault(entry, []).append((start, start + length))
    for i, length in enumerate(lengths):
        kept = {
            "truncate": min(length, max_tokens),
            "split": length,
            "drop": length * (length <= max_tokens),
        }[overlong]
        pieces = sorted(spans.get(i, []))
        assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])][
            : len(pieces)
        ]
        assert (pieces[-1][1] if pieces else 0) == kept
    tokens = torch.stack([part.sum() for part in plan.lengths.split(plan.offsets.diff().tolist())])
    assert tokens.max() <= max_tokens
    assert len(plan) >= math.ceil(int(tokens.sum()) / max_tokens)
    assert plan.efficiency == pytest.approx(int(tokens.sum()) / (len(plan) * max_tokens))


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 40))
@example(([1, 2, 3], 4, None), 1)
def test_windows_are_planned_one_by_one(problem, window):
    lengths, max_tokens, max_sequences = problem
    plan = plan_packs(lengths, max_tokens, max_sequences=max_sequences, window=window, impl="cpp")
    expected = []
    for first in range(0, len(lengths), window):
        made = best_fit_decreasing(lengths[first : first + window], max_tokens, max_sequences)
        expected += [[first + i for i in pack] for pack in made]
    assert as_lists(plan) == expected
    assert plan.windows.tolist() == [pack[0] // window for pack in expected]
    assert_same(
        plan,
        plan_packs(lengths, max_tokens, max_sequences=max_sequences, window=window, impl="eager"),
    )


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_windows_count_examples_not_pieces(overlong):
    plan = plan_packs([9, 3, 20, 2, 2, 5], 8, overlong=overlong, window=2)
    windows = {int(i) // 2 for pack in plan for i in pack}
    assert all(len({int(i) // 2 for i in pack}) == 1 for pack in plan)
    assert windows == {0, 1, 2}
    shuffled = plan_packs([9, 3, 20, 2, 2, 5], 8, overlong=overlong, window=2, seed=1)
    assert shuffled.windows.tolist() == plan.windows.tolist()
    assert sorted(as_lists(shuffled)) == sorted(as_lists(plan))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 50), max_size=6), min_size=1, max_size=40),
    st.integers(50, 60),
    st.randoms(),
)
def test_stays_below_the_bound_of_best_fit_decreasing(cuts, max_tokens, random):
    """Packs that are full to the last token are cut up: so many would do, and at most 11/9 of them
    + 6/9 are made."""
    pieces = []
    for places in cuts:
        edges = sorted({0, max_tokens, *(place for place in places if place < max_tokens)})
        pieces += [end - begin for begin, end in itertools.pairwise(edges)]
    random.shuffle(pieces)
    assert len(cuts) <= len(plan_packs(pieces, max_tokens)) <= (11 * len(cuts) + 6) / 9


@pytest.mark.parametrize("max_tokens", [512, 1000, 2048])
def test_same_packs_as_trl(max_tokens):
    pyarrow = pytest.importorskip("pyarrow")
    trl = pytest.importorskip("trl.data_utils")
    lengths = np.clip(np.random.default_rng(max_tokens).lognormal(4.5, 0.9, 3000), 1, 3000).astype(
        np.int64
    )
    column = pyarrow.array([[i] * length for i, length in enumerate(lengths.tolist())])
    table = trl._pack_bfd(pyarrow.table({"input_ids": column}), max_tokens)
    theirs = [[*dict.fromkeys(row)] for row in table["input_ids"].to_pylist()]
    assert as_lists(plan_packs(lengths, max_tokens, overlong="truncate")) == theirs


def test_engines_agree_on_many_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.8, 0.9, 20_000), 1, 8192).astype(
        np.int64
    )
    native, eager = (plan_packs(lengths, 8192, impl=impl) for impl in ("cpp", "eager"))
    assert_same(native, eager)
    assert len(native) <= math.ceil(lengths.sum() / 8192) + 2


def test_outputs_are_written_whole(poisoned_empty):
    plan = plan_packs([3, 4, 5, 6, 1], 7, overlong="split", impl="cpp")
    assert as_lists(plan) == [[3, 4], [2], [1, 0]]
    assert plan.offsets.tolist() == [0, 2, 3, 5] and plan.lengths.tolist() == [6, 1, 5, 4, 3]


def test_seed_shuffles_the_packs_and_nothing_else():
    lengths = torch.randint(1, 50, (507,))
    plain, shuffled, again, other = (plan_packs(lengths, 64, seed=seed) for seed in (None, 3, 3, 4))
    assert_same(shuffled, again)
    assert as_lists(shuffled) != as_lists(plain) and as_lists(shuffled) != as_lists(other)
    assert sorted(as_lists(shuffled)) == sorted(as_lists(plain))
    assert torch.equal(shuffled.lengths, lengths[shuffled.indices])


@pytest.mark.parametrize(
    "lengths",
    [
        [3, 1, 2],
        (3, 1, 2),
        [np.int64(3), 1, 2],
        np.array([3, 1, 2], np.int32),
        np.array([3, 1, 2], np.uint16),
        torch.tensor([3, 1, 2]).short(),
        pyarrow and pyarrow.array([3, 1, 2]),
        pyarrow and pyarrow.chunked_array([[3], [1, 2]]),
        np.broadcast_to(np.int32([3, 1, 2]), (3,)),
    ],
)
@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_kinds_of_lengths(lengths, impl):
    if lengths is None:
        pytest.skip("pyarrow is not installed")
    assert as_lists(plan_packs(lengths, 3, impl=impl)) == [[0], [2, 1]]


def test_totals_beyond_int32():
    lengths = torch.full((3000,), 2**20)
    plan = plan_packs(lengths, 2**21)
    assert len(plan) == 1500 and int(plan.lengths.sum()) == 3000 * 2**20 > 2**31
    assert len(plan_packs([2**33], 2**31 - 1, overlong="split")) == 5


@pytest.mark.parametrize("impl", ["cpp", "eager"])
def test_lengths_whose_sum_does_not_fit_into_int64(impl):
    """Nor does one of them and the capacity."""
    largest = 2**63 - 1
    plan = plan_packs([largest, 3, largest], 5, overlong="truncate", impl=impl)
    assert as_lists(plan) == [[0], [2], [1]]
    assert as_lists(plan_packs([largest, 3, largest], 5, overlong="drop", impl=impl)) == [[1]]
    for lengths in ([largest], [5, 2**33, largest], [2**32] * 3):
        with pytest.raises(ValueError, match=r"would make \d+ pieces of at most 5 tokens"):
            plan_packs(lengths, 5, overlong="split", impl=impl)


@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
def test_the_kernel_refuses_lengths_that_nobody_has_checked(wide):
    """Their sum fits into no integer, and each is outside of the tables."""
    for lengths in ([torch.iinfo(wide).max] * 3, [torch.iinfo(wide).min] * 3, [1, 6, 1], [0, 1, 1]):
        made = [torch.empty(3 + extra, dtype=torch.int64) for extra in (0, 0, 1, -2)]
        with pytest.raises(RuntimeError, match=r"length -?\d+ at \d of a window is not in \[1, "):
            PLAN.native(torch.tensor(lengths, dtype=wide), torch.tensor([0, 3]), 5, 0, *made)


def test_noncontiguous_lengths():
    lengths = torch.tensor([[3, 9], [1, 9], [2, 9]])[:, 0]
    assert as_lists(plan_packs(lengths, 3, impl="cpp")) == [[0], [2, 1]]


def test_plan_is_a_sequence_that_pickles():
    plan = plan_packs([3, 1, 2], 3)
    assert len(plan) == 2 and plan[0].tolist() == [0] and plan[-1].tolist() == [2, 1]
    assert_same(pickle.loads(pickle.dumps(plan)), plan)
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"pack {index} of a plan with 2 packs"):
            plan[index]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "lengths is empty"),
        ([1, 0, 2], {}, "example 1 has no tokens"),
        ([1, -4], {}, "example 1 has the negative length -4"),
        ([1.5], {}, "one-dimensional integers"),
        ([[1, 2]], {}, r"shape \(1, 2\)"),
        ([True], {}, "torch.bool"),
        ([4, 11, 3], {}, "example 1 has 11 tokens, more than max_tokens=10"),
        ([11, 12], {"overlong": "drop"}, "leaves nothing"),
        ([1], {"overlong": "wrap"}, f"overlong must be one of {', '.join(OVERLONG)}, got 'wrap'"),
        ([1, 2.5], {}, "one-dimensional integers"),
        ([1], {"window": 0}, r"window must be an integer in \[1, 2\^63\) or None, got 0"),
        ([1], {"max_sequences": 0}, "max_sequences must be an integer .* or None, got 0"),
        ([1], {"max_sequences": 2**63}, "max_sequences must be an integer .* or None, got 9223"),
        *[
            ([1], {"seed": seed}, r"seed must be an integer in \[0, 2\^63\) or None, got ")
            for seed in (-1, 2**63, True, 1.5, "x")
        ],
        ([1], {"impl": "numba"}, "impl must be"),
        ([1, 2**70], {}, "lengths must fit into int64"),
        (np.array([1, 2**63], np.uint64), {}, "lengths must fit into int64"),
    ],
)
def test_bad_input(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        plan_packs(lengths, 10, **options)


@pytest.mark.parametrize(
    "lengths",
    [
        [1, None],
        {},
        None,
        "ab",
        [[1], [2, 3]],
        ["1"],
        np.array(["1"]),
        torch.ones(3, dtype=torch.int64, device="meta"),
        torch.ones(3, dtype=torch.int64).to_sparse(),
    ],
)
def test_lengths_that_are_no_numbers(lengths):
    with pytest.raises(
        TypeError, match="lengths must be a list, array or dense tensor of integers, got"
    ):
        plan_packs(lengths, 10)


@pytest.mark.parametrize("max_tokens", [0, -1, 2.0, True, None, 2**31])
def test_bad_capacity(max_tokens):
    with pytest.raises(ValueError, match="max_tokens must be an integer"):
        plan_packs([1], max_tokens)


def test_explicit_engine_never_falls_back():
    with pytest.raises(RuntimeError, match="no cuda kernel"):
        plan_packs([1], 10, impl="cuda")


@pytest.mark.parametrize(
    ("windows", "outputs", "message"),
    [([0, 3], 1, "outputs do not fit 3 lengths"), ([0, 2], 3, "windows do not cover 3 lengths")],
)
def test_kernel_refuses_what_does_not_fit(windows, outputs, message):
    made = torch.empty(outputs, dtype=torch.int64)
    offsets, counts = torch.empty(outputs + 1, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=message):
        PLAN.native(
            torch.tensor([1, 2, 3]),
            torch.tensor(windows),
            10,
            0,
            made,
            made.clone(),
            offsets,
            counts,
        )
