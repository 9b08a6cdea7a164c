"""Planning packs of lognormal lengths, and packing a dataset, against TRL's best-fit decreasing.

TRL packs windows of 1000 rows as shipped, and all rows at once as ours where it is told to. Its
function takes the tokens along; in the plans here they are nulls, which cost nothing. The limit is
to write an index and a length for each example, 16 bytes, in new memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch
from compare import compare

from fastft.data.balance import balanced, pack_costs
from fastft.data.packed import pack
from fastft.data.plan import PackPlan, plan_packs

MAX_TOKENS, RANKS = 8192, 8


def lognormal_lengths(examples: int) -> np.ndarray:
    """Mean about 499 tokens, most examples short, a few near the capacity."""
    drawn = np.random.default_rng(0).lognormal(5.8, 0.92, examples)
    return np.clip(drawn, 1, MAX_TOKENS).astype(np.int32)


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
    ("examples", "window", "rounds"),
    [(100_000, None, 3), (100_000, 1000, 3), (1_000_000, None, 9)],
    ids=["100k", "100k windows", "1M"],
)
def test_plan(benchmark, examples, window, rounds):
    """TRL takes most of a second for a hundred thousand: a million it packs once, for the number of
    packs."""
    lengths = lognormal_lengths(examples)
    info, rivals = benchmark.extra_info, {}
    info["packs"] = len(plan_packs(lengths, MAX_TOKENS, window=window))
    info["packs_lower_bound"] = int(-(-lengths.sum(dtype=np.int64) // MAX_TOKENS))
    if installed("trl", "pyarrow"):
        trl = trl_plan(lengths, window or examples)
        info["packs_trl"] = trl()
        rivals = {"trl": trl} if examples == 100_000 else {}
    compare(
        benchmark,
        lambda: plan_packs(lengths, MAX_TOKENS, window=window),
        rivals,
        rounds=rounds,
        bytes_moved=20 * examples,
        bare=lambda: (
            torch.ones(examples, dtype=torch.int64),
            torch.ones(examples, dtype=torch.int64),
        ),
    )


@pytest.mark.parametrize("kind", ["list", "int64", "int32", "arrow"])
def test_kinds_of_a_million_lengths(benchmark, kind):
    lengths = lognormal_lengths(1_000_000)
    made = {"list": lengths.tolist(), "int64": lengths.astype(np.int64), "int32": lengths}
    if installed("pyarrow"):
        import pyarrow

        made["arrow"] = pyarrow.array(lengths)
    if kind not in made:
        pytest.skip("pyarrow is not installed")
    compare(benchmark, lambda: plan_packs(made[kind], MAX_TOKENS), {})


def test_pack_dataset(benchmark):
    """100,000 rows with two columns of 50 million tokens; TRL as shipped, with windows of 1000
    rows."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    lengths = lognormal_lengths(100_000)
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
    benchmark.extra_info["packs"] = len(pack(dataset, MAX_TOKENS))
    compare(benchmark, lambda: pack(dataset, MAX_TOKENS), rivals, rounds=3)


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
def test_balance(benchmark, examples, batch):
    plan = plan_packs(lognormal_lengths(examples), MAX_TOKENS)
    random = plan_packs(lognormal_lengths(examples), MAX_TOKENS, seed=0)
    benchmark.extra_info["max_over_mean"] = max_over_mean(balanced(plan, RANKS * batch), batch)
    benchmark.extra_info["max_over_mean_in_random_order"] = max_over_mean(random, batch)
    compare(benchmark, lambda: balanced(plan, RANKS * batch), {}, rounds=5)


class _Rows(torch.utils.data.IterableDataset):
    def __init__(self, lengths: list[int]) -> None:
        self.rows = [{"input_ids": range(length)} for length in lengths]

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("open_packs", [8, 32, 512])
def test_stream(benchmark, open_packs):
    lengths = lognormal_lengths(100_000).tolist()
    stream = pack(_Rows(lengths), MAX_TOKENS, open_packs=open_packs)
    packs = sum(1 for _ in stream)
    benchmark.extra_info["efficiency"] = round(sum(lengths) / (packs * MAX_TOKENS), 4)
    compare(benchmark, lambda: sum(1 for _ in stream), {}, rounds=3)
