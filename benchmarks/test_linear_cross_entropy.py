"""A head and its loss, forward and backward. The bare work is the GEMMs alone: three, or two where
the head is frozen.

On a CPU N=1024, H=512, V=16384; on a GPU the head of an 8 B Llama, N=8192, H=4096, V=128256. A CPU
that emulates bf16 GEMMs takes most of a minute for one call in bf16: there N=128, H=256, V=8192,
and the bare work is emulated too.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import compare, rival
from errors import peaks_mib, relative_errors
from heads import IDS, make, stepping

from fastft.loss.linear_cross_entropy import linear_cross_entropy


def eager(x, weight, target):
    return F.cross_entropy(F.linear(x, weight), target)


def transformers_eager(x, weight, target):
    return F.cross_entropy(F.linear(x, weight).float(), target)


def rivals_of(device, head, ignored):
    """Every other way to this loss that can be imported here."""
    rivals = {"torch eager": eager, "transformers": transformers_eager}
    # torch's chunked option takes seconds a call on a CPU, TRL's head too: one case is enough
    slow = device == "cpu" and (head == "frozen" or ignored)
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and not slow:
        options = torch.nn.LinearCrossEntropyOptions()
        rivals["torch chunked"] = lambda *tensors: F.linear_cross_entropy(
            *tensors, ignore_index=-100, options=options
        )
    if (trl := rival("trl.kernels.chunked_logprob")) and not slow:
        rivals["TRL"] = lambda x, weight, target: trl_loss(
            trl.ChunkedLogProbFunction, x, weight, target
        )
    if device == "cuda" and (liger := rival("liger_kernel.transformers")):
        fused = liger.LigerFusedLinearCrossEntropyLoss()
        rivals["Liger"] = lambda x, weight, target: fused(weight, x, target)
    return rivals


def trl_loss(function, x, weight, target):
    """What TRL's `add_fused_lm_head` does with the mask and the mean, with its own vocabulary
    tile."""
    mask = target != -100
    chunk = rival("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    rows, indices = (x[mask], target[mask]) if x.is_cuda else (x, target.clamp(min=0))
    log_probs = function.apply(rows, weight, None, indices, 1.0, chunk, None, 1.0, ())[0]
    return -(log_probs if x.is_cuda else log_probs.masked_fill(~mask, 0)).sum() / mask.sum()


@pytest.mark.parametrize(
    ("dtype", "head", "ignored"),
    [
        (torch.float32, "trainable", 0.0),
        (torch.float32, "trainable", 0.5),
        (torch.float32, "frozen", 0.0),
        (torch.bfloat16, "trainable", 0.0),
        (torch.bfloat16, "trainable", 0.5),
        (torch.bfloat16, "frozen", 0.0),
    ],
    ids=IDS.get,
)
def test_linear_cross_entropy(benchmark, device, dtype, head, ignored):
    x, weight, target = make(device, dtype, ignored, head == "trainable")
    counted = (target != -100).nonzero()[:, 0]
    logits = x.new_empty(len(counted), len(weight))
    d_x, d_weight = torch.empty_like(x[counted]), torch.empty_like(weight)

    def gemms():
        with torch.no_grad():
            rows = x[counted]
            torch.mm(rows, weight.T, out=logits)
            torch.mm(logits, weight, out=d_x)
            if weight.requires_grad:
                torch.mm(logits.T, rows, out=d_weight)

    losses = {"ours": linear_cross_entropy, **rivals_of(device, head, ignored)}
    steps = {name: stepping(loss, x, weight, target) for name, loss in losses.items()}
    info = benchmark.extra_info
    info["shape"] = f"N={len(x)}, H={x.shape[1]}, V={len(weight)}"
    if device == "cpu":  # float64 of the size of a GPU's case takes too much memory
        info["relative_errors"] = relative_errors(losses, eager, x, weight, target)
    info["peak_mib"] = peaks_mib(steps, x, weight)
    compare(
        benchmark,
        steps.pop("ours"),
        steps,
        rounds=7 if device == "cuda" else 5,
        bytes_moved=dtype.itemsize * 4 * len(counted) * len(weight),
        bare=gemms,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS.get)
def test_half_of_the_labels_ignored(benchmark, device, dtype):
    """Against all of them: above 1 / 0.6 is the goal."""
    x, weight, target = make(device, dtype, alone=True)
    half = target.masked_fill(torch.arange(len(target), device=device) % 2 == 0, -100)
    bound = int((half != -100).sum())  # as a collator tells it
    ours = stepping(
        lambda *tensors: linear_cross_entropy(*tensors, max_counted=bound), x, weight, half
    )
    compare(
        benchmark,
        ours,
        {"none ignored": stepping(linear_cross_entropy, x, weight, target)},
        rounds=7,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS.get)
def test_frozen_head(benchmark, device, dtype):
    """Against a trainable one: above 1 / 0.75 is the goal."""
    x, weight, target = make(device, dtype, alone=True)
    frozen = stepping(linear_cross_entropy, x, weight.detach(), target)
    compare(
        benchmark,
        frozen,
        {"trainable": stepping(linear_cross_entropy, x, weight, target)},
        rounds=7,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS.get)
def test_accumulating_into_weight_grad(benchmark, device, dtype):
    """A step of gradient accumulation that is not the first, against autograd's own sum."""
    x, weight, target = make(device, dtype, alone=True)

    def accumulating(**options):
        head = weight.detach().clone().requires_grad_()
        head.grad = torch.zeros_like(head)

        def step():
            x.grad = None
            linear_cross_entropy(x, head, target, **options).backward()

        return step

    runs = {"autograd": accumulating()}
    ours = accumulating(accumulate_weight_grad=True)
    benchmark.extra_info["peak_mib"] = peaks_mib({"ours": ours, **runs}, x)
    compare(benchmark, ours, runs, rounds=7)
