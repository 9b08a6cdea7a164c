"""The locked environments are complete, for every Python that fastft promises, and the oldest is as
old as promised."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
tomllib = pytest.importorskip("tomllib")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
NAMED = [
    *PROJECT["build-system"]["requires"],
    *PROJECT["project"]["dependencies"],
    *chain(*EXTRAS.values()),
]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def lines(name: str) -> list[Requirement]:
    text = (ROOT / "requirements" / name).read_text()
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def versions(name: str, python: str) -> dict[str, str]:
    """What the lock pins for a Python on Linux."""
    system = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
    }
    system |= {"platform_machine": "x86_64", "os_name": "posix", "platform_system": "Linux"}
    pins = [each for each in lines(name) if each.marker is None or each.marker.evaluate(system)]
    found = {
        canonicalize_name(pin.name): re.fullmatch(r"==([\w.]+)", str(pin.specifier))[1]
        for pin in pins
    }
    assert len(found) == len(pins), "a package is pinned twice"
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", ["locked.txt", "oldest.txt"])
def test_everything_that_the_project_names_is_pinned_within_its_bounds(
    lock: str, python: str
) -> None:
    pinned = versions(lock, python)
    for named in map(Requirement, NAMED):
        if named.name != "fastft":
            assert named.specifier.contains(pinned[canonicalize_name(named.name)]), (
                named,
                pinned[named.name],
            )


def test_a_lock_names_no_build_of_torch() -> None:
    for lock in ("locked.txt", "oldest.txt"):
        assert "--hash" not in (ROOT / "requirements" / lock).read_text()
        assert re.fullmatch(r"[\d.]+", versions(lock, "3.11")["torch"])


def test_the_oldest_environment_is_as_old_as_promised() -> None:
    promised = {each.name: each for each in map(Requirement, [*EXTRAS["hf"], *EXTRAS["test"]])}
    for oldest in lines("oldest.in"):
        if oldest.name != "torch":  # 2.10 comes with gigabytes of another CUDA
            bound = str(promised[oldest.name].specifier).removeprefix(">=")
            version = str(oldest.specifier).removeprefix("==")
            assert version == bound or version.startswith(f"{bound}.0"), (
                oldest,
                promised[oldest.name],
            )
