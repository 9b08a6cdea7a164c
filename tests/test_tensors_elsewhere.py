"""A tensor that is not on the device of the others gets a sentence, at the door and in front of every kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fastft

CSRC = Path(__file__).resolve().parents[1] / "csrc"
X, HEAD, TARGET = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 1, 2, -100, 6])
ELSEWHERE = TARGET.to("meta")
DOORS = {
    "cross_entropy": ("target", lambda: fastft.cross_entropy(X @ HEAD.T, ELSEWHERE)),
    "probabilities": ("target", lambda: fastft.cross_entropy(X @ HEAD.T, torch.rand(5, 7, device="meta"))),
    "weight": ("weight", lambda: fastft.cross_entropy(X @ HEAD.T, TARGET, weight=torch.ones(7, device="meta"))),
    "linear_cross_entropy": ("target", lambda: fastft.linear_cross_entropy(X, HEAD, ELSEWHERE)),
    "linear_probabilities": (
        "target",
        lambda: fastft.linear_cross_entropy(X, HEAD, torch.rand(5, 7, device="meta")),
    ),
    "linear_weight": ("linear_weight", lambda: fastft.linear_cross_entropy(X, HEAD.to("meta"), TARGET)),
    "linear_log_probs": ("target", lambda: fastft.linear_log_probs(X, HEAD, ELSEWHERE)),
    "linear_token_loss": ("target", lambda: fastft.linear_token_loss(X, HEAD, ELSEWHERE, lambda t: t.log_probs)),
    "argument": (
        r"arguments\[0\]",
        lambda: fastft.linear_token_loss(X, HEAD, TARGET, lambda t, w: t.log_probs * w, ELSEWHERE),
    ),
}


@pytest.mark.parametrize("name", DOORS)
def test_the_door_names_the_argument(name):
    argument, call = DOORS[name]
    with pytest.raises(ValueError, match=f"{argument} is on meta, .* on cpu; they must be on one device"):
        call()


def test_a_triton_kernel_is_not_launched():
    pytest.importorskip("triton")
    from fastft.data.boundaries_triton import packed_boundaries
    from fastft.loss.cross_entropy_triton import cross_entropy_rows
    from fastft.loss.scale_gradients_triton import scale_gradients_

    rows, classes = torch.zeros(5), torch.ones(7)
    good = [torch.randn(5, 7), TARGET, [classes], [rows, rows, rows], rows, rows, [rows, rows], [torch.zeros(5, 7)]]
    names = "logits", "target", "weight[0]", "upstream[0]", "losses", "lse", "entropy", "grad[0]"
    for i, name in enumerate(names[1:], 1):
        given = good[i]
        wrong = [given[0].to("meta"), *given[1:]] if isinstance(given, list) else given.to("meta")
        with pytest.raises(RuntimeError, match=re.escape(f"cross_entropy_rows: {name} is on meta")):
            cross_entropy_rows(*good[:i], wrong, *good[i + 1 :], -100, 0.1, 0.0, 0.0, 1.0)
    tokens, segments = torch.zeros(9, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    good = [segments, segments, tokens, 0, tokens, tokens, tokens.int(), torch.zeros(3, dtype=torch.int32)]
    for i in (0, 1, 4, 5, 6, 7):
        with pytest.raises(RuntimeError, match=r"packed_boundaries: \w+ is on meta"):
            packed_boundaries(*good[:i], good[i].to("meta"), *good[i + 1 :])
    with pytest.raises(RuntimeError, match=r"scale_gradients_: gradients\[1\] is on meta"):
        scale_gradients_([torch.zeros(9), torch.zeros(9, device="meta")], torch.ones(()))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_native_kernels_are_not_launched(tmp_path):
    source, program = Path(__file__).with_name("support") / "device_arguments.cpp", tmp_path / "program"
    subprocess.run(["g++", "-std=c++17", f"-I{CSRC / 'include'}", source, "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    of_rows = "target", "weight", *["upstream"] * 3, "losses", "lse", "entropy", "is_top1", "grad"
    of_boundaries = "lengths", "ignored", "labels", "position_ids", "seq_idx", "cu_seqlens"
    expected = [f"fastft: cross_entropy_rows: {name} must be on the device of logits" for name in of_rows]
    expected += [f"fastft: packed_boundaries: {name} must be on the device of source" for name in of_boundaries]
    expected += [f"fastft: scale_gradients_: gradient {i} must be on the device of scale" for i in range(2)]
    assert [line.partition(" (")[0] for line in said] == [line for line in expected for _ in range(2)]
