"""A peer that dies or stalls: the other process ends with an error within the time limit, and a
training that is resumed then comes to the weights of one that nobody has disturbed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import peers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]
MARGIN = 60  # seconds that an interpreter may need to end on a machine that is busy


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights that a training comes to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = peers.run(folder)
    assert [end.status for end in ended] == [0, 0], ended[0].output + ended[1].output
    return torch.load(folder / "0.pt")


def assert_ends_in_time(ended):
    """The process that is left says what has happened."""
    left = ended[0]
    assert left.status not in (0, None), left.output
    assert left.seconds < peers.LIMIT + MARGIN
    assert "RuntimeError" in left.output or "DistBackendError" in left.output, left.output
    assert any(word in left.output for word in ("Timed out", "closed by peer", "reset by peer"))


@pytest.mark.parametrize("how", ["die", "stall"])
def test_a_training_is_resumed_after_a_peer_is_gone(how, undisturbed, tmp_path):
    assert_ends_in_time(peers.run(tmp_path, how))
    ended = peers.run(tmp_path, "resume")
    assert [end.status for end in ended] == [0, 0], ended[0].output + ended[1].output
    for rank in range(peers.PROCESSES):
        resumed = torch.load(tmp_path / f"{rank}.pt")
        assert resumed.keys() == undisturbed.keys()
        assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)


@pytest.mark.parametrize("how", ["die", "stall"])
def test_collectives_of_a_spread_head_and_of_clipping_end_in_time(how, tmp_path):
    assert_ends_in_time(peers.run(tmp_path, how, kind="tensor parallel"))


def test_a_refusal_of_one_rank_ends_all(tmp_path):
    left, refusing = peers.run(tmp_path, "refuse")
    assert "PackingLeakError" in refusing.output and refusing.status == 1
    assert "PackingLeakError" not in left.output
    assert_ends_in_time([left, refusing])


def test_a_slow_way_to_the_store_changes_nothing(undisturbed, tmp_path):
    ended = peers.run(tmp_path, delay=0.05)
    assert [end.status for end in ended] == [0, 0], ended[0].output + ended[1].output
    found = torch.load(tmp_path / "0.pt")
    assert all(torch.equal(found[name], undisturbed[name]) for name in found)
