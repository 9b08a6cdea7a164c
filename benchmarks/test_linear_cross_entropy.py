"""A head and its loss, forward and backward. The bare work is the GEMMs alone: three, or two where
the head is frozen.

On a CPU N=1024, H=512, V=16384; on a GPU the head of an 8 B Llama, N=8192, H=4096, V=128256. A CPU
that emulates bf16 GEMMs takes most of a minute for one call in bf16: there N=128, H=256, V=8192,
and the bare work is emulated too. Heads of models are whole on a GPU, with 8192 tokens (heads.py).
"""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from compare import compare, rival
from errors import check, peaks_mib
from heads import IDS, make, of_model, shape_of, stepping, told

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


FP32 = torch.float32
NAMES = ("loss", "d_input", "d_weight")
# float64 of as many rows: all on a CPU, what its memory allows on a GPU
CHECKED = 2**27


def checked(benchmark, losses, truth, x, weight, target):
    """Keeps the errors of all ways, of the first rows where they are many."""
    rows = max(min(len(x), CHECKED // len(weight)), 1)
    leaves = x.detach()[:rows].requires_grad_(), weight
    terms = rows + x.shape[1] + len(weight)

    def run():
        benchmark.extra_info["relative_errors"] = check(
            {
                name: lambda *pair, loss=loss: loss(*pair, target[:rows])
                for name, loss in losses.items()
            },
            lambda *pair: truth(*pair, target[:rows]),
            leaves,
            NAMES,
            plain="transformers",
            terms=terms,
        )

    return run


def bare_products(x, weight, target):
    """The GEMMs alone, of the rows that count, and their operations."""
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

    return gemms, 2 * (2 + weight.requires_grad) * logits.numel() * x.shape[1]


def measure(benchmark, losses, truth, x, weight, target):
    gemms, flops = bare_products(x, weight, target)
    steps = {name: stepping(loss, x, weight, target) for name, loss in losses.items()}
    run = checked(benchmark, losses, truth, x, weight, target)
    compare(
        benchmark,
        steps["ours"],
        {name: step for name, step in steps.items() if name != "ours"},
        check=run,
        products=(flops, x.dtype),
        bare=gemms,
    )
    benchmark.extra_info["peak_mib"] = peaks_mib(steps, x, weight)


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
def test_linear_cross_entropy(benchmark, device, small, dtype, head, ignored):
    shape = shape_of(device, dtype, small)
    x, weight, target = make(device, dtype, shape, ignored, head == "trainable")
    benchmark.extra_info["shape"] = told(shape)
    losses = {"ours": linear_cross_entropy, **rivals_of(device, head, ignored)}
    measure(benchmark, losses, eager, x, weight, target)


def with_softcap(cap, loss=None):
    """transformers' way with Gemma 2's final softcap, or ours."""
    if loss is not None:
        return lambda *tensors: loss(*tensors, softcap=cap)
    return lambda x, weight, target: F.cross_entropy(
        (torch.tanh(F.linear(x, weight) / cap) * cap).to(torch.promote_types(x.dtype, FP32)), target
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS.get)
@pytest.mark.parametrize("model", models.NAMES)
def test_head_of_model(benchmark, device, small, model, dtype):
    if device == "cpu" and dtype == FP32 and model not in ("smollm2-135m", "qwen3-0.6b"):
        pytest.skip("on a CPU the heads of large models are measured in bf16")
    shape = of_model(model, device, dtype, small)
    x, weight, target = make(device, dtype, shape)
    config = models.config(model)
    whole = config.vocab_size in (shape.classes, 0) or small
    benchmark.extra_info["shape"] = told(shape) + ("" if whole else f" of {config.vocab_size}")
    cap = getattr(config, "final_logit_softcapping", None)
    ours = with_softcap(cap, linear_cross_entropy) if cap else linear_cross_entropy
    stock = with_softcap(cap) if cap else transformers_eager
    losses = {"ours": ours, "transformers": stock}
    if device == "cuda" and (liger := rival("liger_kernel.transformers")):
        fused = liger.LigerFusedLinearCrossEntropyLoss(softcap=cap)
        losses["Liger"] = lambda x, weight, target: fused(weight, x, target)
    measure(benchmark, losses, stock, x, weight, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS.get)
def test_half_of_the_labels_ignored(benchmark, device, small, dtype):
    """Against all of them: above 1 / 0.6 is the goal."""
    x, weight, target = make(device, dtype, shape_of(device, dtype, small, alone=True))
    half = target.masked_fill(torch.arange(len(target), device=device) % 2 == 0, -100)
    bound = int((half != -100).sum())  # as a collator tells it

    def bounded(*tensors):
        return linear_cross_entropy(*tensors, max_counted=bound)

    def check_gradients():
        pair = [each(x, weight, half) for each in (bounded, linear_cross_entropy)]
        torch.testing.assert_close(*(torch.autograd.grad(loss, (x, weight)) for loss in pair))

    compare(
        benchmark,
        stepping(bounded, x, weight, half),
        {"none ignored": stepping(linear_cross_entropy, x, weight, target)},
        check=check_gradients,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS.get)
def test_frozen_head(benchmark, device, small, dtype):
    """Against a trainable one: above 1 / 0.75 is the goal."""
    x, weight, target = make(device, dtype, shape_of(device, dtype, small, alone=True))
    frozen = weight.detach()

    def check_gradients():
        pair = [linear_cross_entropy(x, head, target) for head in (frozen, weight)]
        torch.testing.assert_close(*(torch.autograd.grad(loss, x) for loss in pair))

    compare(
        benchmark,
        stepping(linear_cross_entropy, x, frozen, target),
        {"trainable": stepping(linear_cross_entropy, x, weight, target)},
        check=check_gradients,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS.get)
def test_accumulating_into_weight_grad(benchmark, device, small, dtype):
    """A step of gradient accumulation that is not the first, against autograd's own sum."""
    x, weight, target = make(device, dtype, shape_of(device, dtype, small, alone=True))
    heads = {}

    def accumulating(name, **options):
        heads[name] = head = weight.detach().clone().requires_grad_()
        head.grad = torch.zeros_like(head)

        def step():
            x.grad = None
            linear_cross_entropy(x, head, target, **options).backward()

        return step

    runs = {
        "ours": accumulating("ours", accumulate_weight_grad=True),
        "autograd": accumulating("autograd"),
    }

    def check_sums():
        for run in runs.values():
            run()
        torch.testing.assert_close(heads["ours"].grad, heads["autograd"].grad)

    compare(benchmark, runs["ours"], {"autograd": runs["autograd"]}, check=check_sums)
    benchmark.extra_info["peak_mib"] = peaks_mib(runs, x)
