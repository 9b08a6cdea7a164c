"""A training that was killed goes on from its last checkpoint to the bits of one that was not."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from support import system_calls
from support.killed import KINDS, apart

pytestmark = [pytest.mark.slow, system_calls.needs_ptrace]
needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"
)
# one kind at every place, the others at every seventh
EVERY = {"8-bit moments": 1}
OF_TWO = ["packs, stochastic rounding, bf16 moments", "states on the host", "4-bit moments"]


@pytest.mark.way("killed in the middle, resumed", loss="exact", optimizer="exact", packing="exact")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_place_of_a_save_and_of_a_step(kind, tmp_path):
    given = f"Path({str(tmp_path / 'out')!r}), {kind!r}, {EVERY.get(kind, 7)}"
    print(apart("support.killed", f"kill_everywhere({given})"))


@needs_gloo
@pytest.mark.way("killed in the middle, resumed", loss="exact", optimizer="exact", packing="exact")
@pytest.mark.parametrize("kind", OF_TWO)
def test_one_of_two_processes_is_killed_at_any_place(kind, tmp_path):
    given = f"Path({str(tmp_path / 'out')!r}), {kind!r}, 8"
    print(apart("support.killed_ranks", f"kill_one_of_two({given})"))


@needs_gloo
def test_one_of_two_processes_is_killed_in_a_collective(tmp_path):
    given = f"Path({str(tmp_path / 'out')!r})"
    print(apart("support.killed_ranks", f"kill_at_collectives({given})"))
