"""The examples run, and call nothing that torch, transformers or accelerate will take away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUNS = {  # of each program, the arguments that make it short and a word that it says at its end
    "accelerate_loop.py": ([], "fused losses: 16"),
    "quickstart.py": ([], "fused losses: 40"),
    "finetune.py": (
        ["--steps", "2", "--batch-size", "2", "--max-tokens", "64", "--output", "demo"],
        "tokens/s",
    ),
}


def test_every_example_is_run() -> None:
    assert set(RUNS) == {
        path.name
        for path in EXAMPLES.glob("*.py")
        if f"python examples/{path.name}" in path.read_text()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs_without_a_warning_of_what_will_go(name: str, tmp_path: Path) -> None:
    arguments, said = RUNS[name]
    environment = {**os.environ, "PYTHONWARNINGS": "error::FutureWarning,error::DeprecationWarning"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    )
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert said in done.stdout, done.stdout[-3000:]
