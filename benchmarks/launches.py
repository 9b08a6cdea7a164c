"""Every kind of launch of the CUDA library once, on little and odd work, for compute-sanitizer.

    compute-sanitizer --tool racecheck python benchmarks/launches.py

`make gpu-check` does it. What the launches compute is the tests' affair. Without a GPU the CPU's
engines do the same.
"""

from __future__ import annotations

import torch
from compare import DEVICE
from torch.nn import Parameter

from fastft import AdamW, cross_entropy
from fastft.data.boundaries import packed_boundaries
from fastft.loss.scale_gradients import SCALE
from fastft.optim.grad_norm import grad_norm

ENGINE, DTYPES = "cpp", [torch.float32, torch.bfloat16]
if DEVICE == "cuda":
    ENGINE, DTYPES = "cuda", [*DTYPES, torch.float16]
WAYS = [
    (rounding, moments)
    for rounding in ("exact", "kahan", "stochastic", "nearest")
    for moments in ("fp32", "bf16", "8bit", "4bit")
]


def rows(classes: int) -> None:
    """Rows that fit into shared memory and longer ones, plain and with every option."""
    target = torch.tensor([0, classes - 1, -100, classes // 2, 0], device=DEVICE)
    weight = torch.rand(classes, device=DEVICE)
    every = {"weight": weight, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}
    for dtype in DTYPES:
        logits = torch.randn(5, classes, device=DEVICE).to(dtype).requires_grad_()
        for options in ({}, every):
            cross_entropy(logits, target, impl=ENGINE, **options).backward()


def steps(dtype: torch.dtype, rounding: str, moments: str) -> None:
    """A step that binds, and one that is bound, clipped; more tensors than a warp looks at."""
    shapes = [(4097,), (65, 131), (0,), *[(3,)] * 40]
    params = [Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for shape in shapes]
    options = {"rounding": rounding} if dtype == torch.bfloat16 else {}
    optimizer = AdamW(params, moments=moments, max_grad_norm=1.0, impl=ENGINE, **options)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()


def others() -> None:
    grads = [torch.randn(size, device=DEVICE).to(dtype) for size in (1, 40_003) for dtype in DTYPES]
    grad_norm(grads[:2], ENGINE)
    lengths = torch.tensor([1, 0, 507, 63, *[2] * 2000], device=DEVICE)
    source = torch.arange(int(lengths.sum()), device=DEVICE)
    packed_boundaries(lengths, lengths // 2, source, 0, torch.empty_like(source), ENGINE)
    engine = ENGINE if DEVICE == "cuda" else "eager"  # the CPU has no kernel for it
    SCALE.implementation(engine, torch.device(DEVICE))(grads, torch.tensor(0.25, device=DEVICE))


def main() -> None:
    for classes in (1, 507, 40_003, 128_257):
        rows(classes)
    for moments in ("fp32", "8bit", "4bit"):
        steps(torch.float32, "exact", moments)
    for rounding, moments in WAYS:
        steps(torch.bfloat16, rounding, moments)
    others()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
