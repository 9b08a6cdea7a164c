"""A tensor that is not on the device of the others gets a sentence, at the door and in front of
every kernel."""

from __future__ import annotations

import re

import pytest
import torch
from support import ptx

import fastft

X, HEAD, TARGET = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 1, 2, -100, 6])
ELSEWHERE = TARGET.to("meta")
DOORS = {
    "cross_entropy": ("target", lambda: fastft.cross_entropy(X @ HEAD.T, ELSEWHERE)),
    "probabilities": (
        "target",
        lambda: fastft.cross_entropy(X @ HEAD.T, torch.rand(5, 7, device="meta")),
    ),
    "weight": (
        "weight",
        lambda: fastft.cross_entropy(X @ HEAD.T, TARGET, weight=torch.ones(7, device="meta")),
    ),
    "linear_cross_entropy": ("target", lambda: fastft.linear_cross_entropy(X, HEAD, ELSEWHERE)),
    "linear_probabilities": (
        "target",
        lambda: fastft.linear_cross_entropy(X, HEAD, torch.rand(5, 7, device="meta")),
    ),
    "linear_weight": (
        "linear_weight",
        lambda: fastft.linear_cross_entropy(X, HEAD.to("meta"), TARGET),
    ),
    "linear_log_probs": ("target", lambda: fastft.linear_log_probs(X, HEAD, ELSEWHERE)),
    "linear_token_loss": (
        "target",
        lambda: fastft.linear_token_loss(X, HEAD, ELSEWHERE, lambda t: t.log_probs),
    ),
    "argument": (
        r"arguments\[0\]",
        lambda: fastft.linear_token_loss(X, HEAD, TARGET, lambda t, w: t.log_probs * w, ELSEWHERE),
    ),
}


@pytest.mark.parametrize("name", DOORS)
def test_the_door_names_the_argument(name):
    argument, call = DOORS[name]
    with pytest.raises(
        ValueError, match=f"{argument} is on meta, .* on cpu; they must be on one device"
    ):
        call()


def test_a_triton_kernel_is_not_launched():
    pytest.importorskip("triton")
    from fastft.data.boundaries_triton import packed_boundaries
    from fastft.loss.cross_entropy_rows_triton import cross_entropy_rows
    from fastft.loss.scale_gradients_triton import scale_gradients_

    rows, classes = torch.zeros(5), torch.ones(7)
    good = [torch.randn(5, 7), TARGET, [classes], [rows] * 3, rows, rows, [rows] * 2]
    good.append([torch.zeros(5, 7)])
    names = "logits", "target", "weight[0]", "upstream[0]", "losses", "lse", "entropy", "grad[0]"
    for i, name in enumerate(names[1:], 1):
        given = good[i]
        wrong = [given[0].to("meta"), *given[1:]] if isinstance(given, list) else given.to("meta")
        with pytest.raises(RuntimeError, match=re.escape(f"cross_entropy_rows: {name} is on meta")):
            cross_entropy_rows(*good[:i], wrong, *good[i + 1 :], -100, 0.1, 0.0, 0.0, 1.0)
    tokens, segments = torch.zeros(9, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    narrow = tokens.int(), torch.zeros(3, dtype=torch.int32)
    good = [segments, segments, tokens, 0, tokens, tokens, *narrow]
    for i in (0, 1, 4, 5, 6, 7):
        with pytest.raises(RuntimeError, match=r"packed_boundaries: \w+ is on meta"):
            packed_boundaries(*good[:i], good[i].to("meta"), *good[i + 1 :])
    with pytest.raises(RuntimeError, match=r"scale_gradients_: gradients\[1\] is on meta"):
        scale_gradients_([torch.zeros(9), torch.zeros(9, device="meta")], torch.ones(()))


@pytest.mark.skipif(ptx.missing() is not None, reason=f"the CUDA kernels: {ptx.missing()}")
@pytest.mark.parametrize("place", [ptx.HOST, 1], ids=["host", "another device"])
def test_a_cuda_kernel_is_not_launched(place):
    def refused(name, operator, arguments, i, of_list, others):
        wrong = [list(given) if isinstance(given, list) else given for given in arguments]
        given = wrong[i] if of_list is None else wrong[i][of_list]
        moved = given.clone()
        if of_list is None:
            wrong[i] = moved
        else:
            wrong[i][of_list] = moved
        with ptx.cuda_operators(90) as gpu:
            gpu.place(moved, place)
            with pytest.raises(
                RuntimeError, match=f"{operator}: {name} must be on the device of {others}"
            ):
                getattr(gpu.ops, operator)(*wrong)
            assert gpu.launches == []

    losses, lse, entropy, *upstream = (torch.zeros(5) for _ in range(6))
    outputs = losses, lse, [entropy, torch.zeros(5, dtype=torch.bool)], [torch.zeros(5, 7)]
    options = (-100, 0.1, 0.0, 0.0, 1.0)
    rows = [torch.randn(5, 7), TARGET, [torch.ones(7)], upstream, *outputs, *options]
    inputs = {"target": (1, None), "weight": (2, 0)}
    places = {"losses": (4, None), "lse": (5, None), "entropy": (6, 0), "is_top1": (6, 1)}
    for name, where in {**inputs, **places, "grad": (7, 0)}.items():
        refused(name, "cross_entropy_rows", rows, *where, "logits")
    for i in range(3):
        refused("upstream", "cross_entropy_rows", rows, 3, i, "logits")
    tokens, labels, position_ids = (torch.arange(9) for _ in range(3))
    seq_idx, cu_seqlens = (torch.zeros(size, dtype=torch.int32) for size in (9, 3))
    boundaries = [torch.tensor([4, 5]), torch.tensor([1, 1]), tokens, 0]
    boundaries += [labels, position_ids, seq_idx, cu_seqlens]
    names = {0: "lengths", 1: "ignored", 4: "labels", 5: "position_ids"}
    names |= {6: "seq_idx", 7: "cu_seqlens"}
    for i, name in names.items():
        refused(name, "packed_boundaries", boundaries, i, None, "source")
    gradients = [torch.zeros(5, 7, dtype=torch.bfloat16), torch.zeros(9)]
    for i in range(2):
        refused(f"gradient {i}", "scale_gradients_", [gradients, torch.ones(())], 0, i, "scale")
