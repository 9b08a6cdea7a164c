"""Peak memory of Trainer above the start, stock and with the fused loss, each in a process of its
own (memory.py): a step over 4096 tokens and 128,256 classes, and evaluations inside of `train()`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

MEASURES = {"step": "step", "evaluation": "loss", "evaluation_with_accuracy": "metrics"}


@pytest.mark.parametrize("measured", MEASURES)
def test_memory_of_trainer(benchmark, small, measured):
    """The losses are the same to what fp32 sums differ in."""
    pytest.importorskip("transformers")
    if small and measured != "step":
        pytest.skip("nothing is timed: one of the three tells whether they run")
    tokens, classes = (64, 1003) if small else (4096, 128256)
    command = [sys.executable, str(Path(__file__).with_name("memory.py"))]
    command += [f"--measure={MEASURES[measured]}", f"--tokens={tokens}", f"--classes={classes}"]

    def run(variant: str) -> dict:
        ran = subprocess.run(
            [*command, f"--variant={variant}"], capture_output=True, text=True, check=True
        )
        return json.loads(ran.stdout.splitlines()[-1])

    # side by side: what a process holds does not depend on how fast it is
    with ThreadPoolExecutor() as pool:
        stock = pool.submit(run, "stock")
        found = {"ours": benchmark.pedantic(run, args=("fused",)), "stock": stock.result()}
    losses = {name: each["loss"] for name, each in found.items()}
    assert losses["ours"] == pytest.approx(losses["stock"], rel=1e-6)
    info = benchmark.extra_info
    info["shape"] = f"T={tokens}, H=512, V={classes}, fp32"
    info["peak_mib"] = {name: each["peak_mib"] for name, each in found.items()}
    info["losses"] = losses
