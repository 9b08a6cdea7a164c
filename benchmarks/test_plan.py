"""Planning packs of lognormal lengths, and packing a dataset, against TRL's best-fit decreasing.

TRL packs windows of 1000 rows as shipped, and all rows at once as ours where it is told to. Its
function takes the tokens along; in the plans here they are nulls, which cost nothing. The bare work
is to write an index and a length for each example, 16 bytes, in new memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import texts
import torch
from compare import compare

from fastft.data.balance import balanced
from fastft.data.even_packs import pack_costs
from fastft.data.packed import pack
from fastft.data.plan import PackPlan, plan_packs

MAX_TOKENS, RANKS = 8192, 8


def lognormal_lengths(examples: int) -> np.ndarray:
    """Mean about 499 tokens, most examples short, a few near the capacity."""
    drawn = np.random.default_rng(0).lognormal(5.8, 0.92, examples)
    return np.clip(drawn, 1, MAX_TOKENS).astype(np.int32)


def check_plan(lengths: np.ndarray, window: int | None = None) -> PackPlan:
    """Every example is in one pack, and no pack is too long."""
    plan = plan_packs(lengths, MAX_TOKENS, window=window)
    assert torch.equal(plan.indices.sort().values, torch.arange(len(lengths)))
    tokens = torch.from_numpy(lengths).long()[plan.indices].cumsum(0)
    ends = tokens[[plan.bounds(pack)[1] - 1 for pack in range(len(plan))]]
    assert int(ends.diff(prepend=ends.new_zeros(1)).max()) <= MAX_TOKENS
    return plan


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def trl_plan(lengths: np.ndarray, window: int) -> Callable[[], int]:
    """The number of packs that TRL makes of `lengths`, `window` of them at a time."""
    import pyarrow
    from trl.data_utils import _pack_bfd

    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    tokens = pyarrow.LargeListArray.from_arrays(offsets, pyarrow.nulls(int(lengths.sum())))
    tables = [
        pyarrow.table({"input_ids": tokens[i : i + window]}) for i in range(0, len(lengths), window)
    ]
    return lambda: sum(len(_pack_bfd(table, MAX_TOKENS)) for table in tables)


@pytest.mark.parametrize(
    ("examples", "window"),
    [(100_000, None), (100_000, 1000), (1_000_000, None)],
    ids=["100k", "100k windows", "1M"],
)
def test_plan(benchmark, small, examples, window):
    """TRL takes seconds for a hundred thousand, and is not asked for a million."""
    plan(benchmark, lognormal_lengths(examples // (1000 if small else 1)), window)


def test_plan_texts(benchmark):
    """As long as the texts of texts.py that a pack holds."""
    lengths = texts.lengths()
    plan(benchmark, lengths[lengths <= MAX_TOKENS], None)


def plan(benchmark: Any, lengths: np.ndarray, window: int | None) -> None:
    examples, info = len(lengths), benchmark.extra_info
    rivals: dict[str, Callable[[], int]] = {}
    info["packs_lower_bound"] = int(-(-lengths.sum(dtype=np.int64) // MAX_TOKENS))
    if installed("trl", "pyarrow") and examples <= 100_000:
        rivals["trl"] = trl_plan(lengths, window or examples)
        info["packs_trl"] = rivals["trl"]()

    def check() -> None:
        info["packs"] = len(check_plan(lengths, window))

    compare(
        benchmark,
        lambda: plan_packs(lengths, MAX_TOKENS, window=window),
        rivals,
        check=check,
        bytes_moved=20 * examples,
        bare=lambda: (
            torch.ones(examples, dtype=torch.int64),
            torch.ones(examples, dtype=torch.int64),
        ),
    )


@pytest.mark.parametrize("kind", ["list", "int64", "int32", "arrow"])
def test_kinds_of_a_million_lengths(benchmark, small, kind):
    lengths = lognormal_lengths(1000 if small else 1_000_000)
    made = {"list": lengths.tolist(), "int64": lengths.astype(np.int64), "int32": lengths}
    if installed("pyarrow"):
        import pyarrow

        made["arrow"] = pyarrow.array(lengths)
    if kind not in made:
        pytest.skip("pyarrow is not installed")
    expected = check_plan(lengths).indices

    def check() -> None:
        assert torch.equal(plan_packs(made[kind], MAX_TOKENS).indices, expected)

    compare(benchmark, lambda: plan_packs(made[kind], MAX_TOKENS), {}, check=check)


def test_pack_dataset(benchmark, small):
    """100,000 rows with two columns of 50 million tokens; TRL as shipped, with windows of 1000
    rows."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    lengths = lognormal_lengths(100 if small else 100_000)
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    tokens = pyarrow.array(
        np.random.default_rng(0).integers(0, 32_000, int(lengths.sum()), dtype=np.int32)
    )
    column = pyarrow.LargeListArray.from_arrays(offsets, tokens)
    dataset = datasets.Dataset(pyarrow.table({"input_ids": column, "labels": column}))
    datasets.disable_progress_bars()
    rivals = {}
    if installed("trl"):
        from trl import pack_dataset

        options = {"keep_in_memory": True, "load_from_cache_file": False}
        rivals["trl"] = lambda: pack_dataset(dataset, MAX_TOKENS, "bfd", map_kwargs=options)
        benchmark.extra_info["packs_trl"] = len(rivals["trl"]())

    def check() -> None:
        packs = pack(dataset, MAX_TOKENS)
        assert torch.equal(packs.plan.indices, check_plan(lengths).indices)
        benchmark.extra_info["packs"] = len(packs)

    compare(benchmark, lambda: pack(dataset, MAX_TOKENS), rivals, check=check)


def max_over_mean(plan: PackPlan, batch: int) -> dict[str, float]:
    """The cost of the rank that the others wait for over the mean of all, for whole steps of all
    ranks."""
    found = {}
    for name, cost in zip(("tokens", "squares"), pack_costs(plan), strict=True):
        steps = cost.numel() // (RANKS * batch)
        of_ranks = cost.double()[: steps * RANKS * batch].reshape(steps, RANKS, batch).sum(2)
        found[name] = round(float(of_ranks.amax(1).sum() / of_ranks.mean(1).sum()), 4)
    return found


@pytest.mark.parametrize("examples", [20_000, 100_000, 1_000_000])
@pytest.mark.parametrize("batch", [1, 2])
def test_balance(benchmark, small, examples, batch):
    examples //= 100 if small else 1
    plan = plan_packs(lognormal_lengths(examples), MAX_TOKENS)
    random = plan_packs(lognormal_lengths(examples), MAX_TOKENS, seed=0)
    benchmark.extra_info["max_over_mean"] = max_over_mean(balanced(plan, RANKS * batch), batch)
    benchmark.extra_info["max_over_mean_in_random_order"] = max_over_mean(random, batch)

    def check() -> None:
        found = balanced(plan, RANKS * batch).indices
        assert torch.equal(found.sort().values, plan.indices.sort().values)

    compare(benchmark, lambda: balanced(plan, RANKS * batch), {}, check=check)


class _Rows(torch.utils.data.IterableDataset):
    def __init__(self, lengths: list[int]) -> None:
        self.rows = [{"input_ids": range(length)} for length in lengths]

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("open_packs", [8, 32, 512])
def test_stream(benchmark, small, open_packs):
    lengths = lognormal_lengths(1000 if small else 100_000).tolist()
    stream = pack(_Rows(lengths), MAX_TOKENS, open_packs=open_packs)

    def check() -> None:
        packs = [len(found["input_ids"]) for found in stream]
        assert sum(packs) == sum(lengths) and max(packs) <= MAX_TOKENS
        benchmark.extra_info["efficiency"] = round(sum(lengths) / (len(packs) * MAX_TOKENS), 4)

    compare(benchmark, lambda: sum(1 for _ in stream), {}, check=check)
