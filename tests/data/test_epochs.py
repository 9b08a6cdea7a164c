from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data.plan import epoch_plan, plan_packs


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=80),
    st.none() | st.integers(1, 20),
    st.integers(0, 2**40),
    st.integers(0, 5),
    st.sampled_from(["split", "truncate"]),
)
def test_only_the_order_and_the_mates_change(lengths, window, seed, epoch, overlong):
    plan = plan_packs(lengths, 25, window=window, overlong=overlong)
    drawn = epoch_plan(plan, seed, epoch)
    assert torch.equal(drawn.windows, plan.windows) and len(drawn) == len(plan)

    def shapes(plan):
        return sorted(
            zip(
                plan.windows.tolist(),
                map(torch.Tensor.tolist, plan.lengths.split(sizes(plan))),
                strict=True,
            )
        )

    def sizes(plan):
        return plan.offsets.diff().tolist()

    def entries(plan):
        packs = torch.repeat_interleave(plan.windows, plan.offsets.diff()).tolist()
        return sorted(
            zip(
                packs,
                plan.indices.tolist(),
                plan.starts.tolist(),
                plan.lengths.tolist(),
                strict=True,
            )
        )

    assert shapes(drawn) == shapes(plan)
    assert entries(drawn) == entries(plan)


def test_epochs_and_seeds_differ_and_repeat():
    plan = plan_packs([5] * 60, 20)
    drawn = [
        epoch_plan(plan, seed, epoch).indices.tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert drawn[0] == drawn[3] and len(set(map(tuple, drawn))) == 3


@pytest.mark.parametrize("threads", [1, 2])
def test_other_processes_draw_the_same(threads):
    code = f"""
import torch
torch.set_num_threads({threads})
torch.manual_seed({threads})
from fastft.data.plan import epoch_plan
from fastft.data.plan import plan_packs
print(epoch_plan(plan_packs([*range(1, 500)], 600), 3, 2, 1).indices.tolist())
"""
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert made.strip() == str(epoch_plan(plan_packs([*range(1, 500)], 600), 3, 2).indices.tolist())
