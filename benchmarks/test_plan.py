"""The packing plan of a million lognormal lengths against TRL's best-fit decreasing, over all of them as ours.

TRL as shipped packs windows of 1000 rows, and its function takes the tokens along; here they are nulls,
which cost nothing. It takes seconds for a hundred thousand, so that it competes over those only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
from compare import compare

from fastft.data.plan import plan_packs

MAX_TOKENS = 8192


def lognormal_lengths(examples: int) -> np.ndarray:
    """Mean about 499 tokens, most examples short, a few near the capacity."""
    drawn = np.random.default_rng(0).lognormal(5.8, 0.92, examples)
    return np.clip(drawn, 1, MAX_TOKENS).astype(np.int64)


def trl_plan(lengths: np.ndarray) -> Callable[[], int]:
    """The number of packs that TRL makes of `lengths`."""
    import pyarrow
    from trl.data_utils import _pack_bfd

    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]))
    tokens = pyarrow.LargeListArray.from_arrays(offsets, pyarrow.nulls(int(lengths.sum())))
    table = pyarrow.table({"input_ids": tokens})
    return lambda: len(_pack_bfd(table, MAX_TOKENS))


@pytest.mark.parametrize(
    ("examples", "rounds", "against_trl"), [(100_000, 3, True), (1_000_000, 9, False)], ids=["100k", "1M"]
)
def test_plan(benchmark, examples, rounds, against_trl):
    lengths = lognormal_lengths(examples)
    rivals = {}
    benchmark.extra_info["packs"] = len(plan_packs(lengths, MAX_TOKENS))
    benchmark.extra_info["packs_lower_bound"] = int(-(-lengths.sum() // MAX_TOKENS))
    if against_trl and importlib.util.find_spec("trl") and importlib.util.find_spec("pyarrow"):
        rivals["trl"] = trl_plan(lengths)
        benchmark.extra_info["packs_trl"] = rivals["trl"]()
    compare(
        benchmark,
        lambda: plan_packs(lengths, MAX_TOKENS),
        rivals,
        rounds=rounds,
        bytes_moved=32 * examples,
        limit=lambda: np.argsort(lengths),
    )
