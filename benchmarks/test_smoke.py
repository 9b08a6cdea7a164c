"""One case of each kernel and engine: is it right, and how long does it take at the size of a
model?

What `make gpu-check` runs first. Right is near to plain torch in float64, on a problem of odd size;
the bits are the tests' affair. Times are the device's (compare.py), for as much as a row of
results/kernels.md has its estimate for and under that row's name. On a CPU its own engines do it
with a thousandth of the work.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, timed
from torch import Tensor

from fastft.attention.segment_attention import segment_attention
from fastft.attention.segments import Segments
from fastft.data.boundaries import BOUNDARIES, boundaries_reference
from fastft.loss.cross_entropy_rows import ROWS
from fastft.loss.linear_cross_entropy import linear_cross_entropy
from fastft.loss.linear_log_probs import linear_log_probs
from fastft.ops import ENGINES, Operator
from fastft.optim.adamw import AdamW
from fastft.optim.adamw_update import ADAMW
from fastft.optim.grad_norm import GRAD_NORM, grad_norm

GPU, BF16 = DEVICE == "cuda", torch.bfloat16
CLASSES = 128_256 if GPU else 128
ATTENTION = ("flash_cuda", "blocks") if GPU else ("cpp", "flash_cpu", "blocks")
# of keeping a bf16 parameter
WAYS = (("exact", "fp32"), ("stochastic", "bf16"), ("stochastic", "8bit"), ("exact", "4bit"))
Keep = Callable[[str, object], None]


def engines(operator: Operator) -> list[str]:
    """Of this device. One that is missing fails, but for Triton where there is none."""
    return [engine for engine in operator.engines if ENGINES[engine].serves(torch.device(DEVICE))]


def function(operator: Operator, engine: str) -> Callable[..., None]:
    device = torch.device(DEVICE, 0)
    if engine == "triton" and (reason := operator.unavailable(engine, device)):
        pytest.skip(reason)
    return operator.implementation(engine, device)


def milliseconds(run: Callable[[], object], rounds: int = 7) -> float:
    run()
    host = timed(run).host
    return 1e3 * statistics.median(timed(run, host).seconds for _ in range(rounds))


def error(ours: Tensor, truth: Tensor) -> float:
    """The norm of the difference, relative to the truth's."""
    return float((ours.double() - truth).norm() / truth.norm())


def keep(record: Keep, kernel: str, ms: float, **more: object) -> None:
    record("found", {"kernel": kernel, "ms": round(ms, 4), **more})


def test_ceilings(record_property: Keep) -> None:
    """What this machine copies and multiplies in a second, whoever asks."""
    size = 8192 if GPU else 256
    left, right = (torch.randn(size, size, device=DEVICE).to(BF16) for _ in range(2))
    product = milliseconds(lambda: left @ right)
    source = torch.randn(2**29 if GPU else 2**16, device=DEVICE)
    target = torch.empty_like(source)
    copied = milliseconds(lambda: target.copy_(source))
    rates = {
        "tera_flop_s": 2e-9 * size**3 / product,
        "giga_byte_s": 2e-6 * source.numel() * 4 / copied,
    }
    record_property("found", {name: round(rate, 1) for name, rate in rates.items()})


@pytest.mark.parametrize("engine", engines(ROWS))
def test_cross_entropy_rows(engine: str, record_property: Keep) -> None:
    rows = function(ROWS, engine)

    def made(count: int, classes: int) -> tuple[Tensor, ...]:
        logits = (4 * torch.randn(count, classes, device=DEVICE)).to(BF16)
        return logits, torch.randint(classes, (count,), device=DEVICE), torch.empty_like(logits)

    def run(logits: Tensor, target: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        losses, lse = torch.empty(2, len(logits), device=DEVICE)
        rows(logits, target, [], [], losses, lse, [], [grad], -100, 0.0, 0.0, 0.0, 1.0)
        return losses, grad

    small = made(63, 2051)
    truth = small[0].double().requires_grad_()
    expected = F.cross_entropy(truth, small[1], reduction="none")
    expected.sum().backward()
    errors = [
        error(*pair) for pair in zip(run(*small), (expected.detach(), truth.grad), strict=True)
    ]
    large = made(8192 if GPU else 64, CLASSES)
    ms = milliseconds(lambda: run(*large))
    keep(record_property, f"{engine}, cross-entropy, plain, bf16, V={CLASSES}", ms, errors=errors)
    assert errors[0] < 1e-6 and errors[1] < 4e-3


@pytest.mark.parametrize(("rounding", "moments"), WAYS)
@pytest.mark.parametrize("engine", engines(ADAMW))
def test_adamw(engine: str, rounding: str, moments: str, record_property: Keep) -> None:
    function(ADAMW, engine)

    def steps(
        cls: type[torch.optim.AdamW], shape: tuple[int, int], dtype: torch.dtype, **options: object
    ) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(
            torch.randn(shape, generator=generator).to(BF16).to(DEVICE, dtype)
        )
        optimizer = cls([param], lr=1e-2, **options)
        for _ in range(3):
            param.grad = torch.randn(shape, generator=generator).to(BF16).to(DEVICE, dtype)
            optimizer.step()
        return param.detach()

    options = {"rounding": rounding, "moments": moments, "impl": engine, "seed": 5}
    shape = (65, 1003)
    off = error(
        steps(AdamW, shape, BF16, **options), steps(torch.optim.AdamW, shape, torch.float64)
    )
    elements = 2**28 if GPU else 2**16
    param = torch.nn.Parameter(torch.randn(elements // 4096, 4096, device=DEVICE).to(BF16))
    param.grad = torch.randn_like(param)
    optimizer = AdamW([param], **options)
    ms = milliseconds(optimizer.step) * 1e9 / elements
    name = f"{engine}, AdamW, {rounding}, moments {moments.replace('bit', '-bit')}"
    keep(record_property, name, ms, error=off)
    assert off < 1e-2


@pytest.mark.parametrize("engine", engines(ADAMW))
def test_adamw_with_states_on_the_host(engine: str, record_property: Keep) -> None:
    """Also how many GB of states a second go each way over the bus."""
    function(ADAMW, engine)

    def made(rows: int, columns: int, offload: str | None) -> tuple[torch.nn.Parameter, AdamW]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        start, grad = torch.randn(2, rows, columns, generator=generator, device=DEVICE).to(BF16)
        param = torch.nn.Parameter(start)
        param.grad = grad
        return param, AdamW([param], moments="8bit", impl=engine, offload=offload, seed=5)

    ended = []
    for offload in (None, "states"):
        param, optimizer = made(65, 1003, offload)
        for _ in range(3):
            optimizer.step()
        ended.append(param.detach())
    assert torch.equal(*ended)
    elements = 2**28 if GPU else 2**16
    param, optimizer = made(elements // 4096, 4096, "states")
    ms = milliseconds(optimizer.step, rounds=3)
    moved = sum(entry.nbytes for entry in optimizer.state[param].values())
    name = f"{engine}, AdamW, exact, moments 8-bit, states on the host"
    keep(record_property, name, ms * 1e9 / elements, giga_byte_s=round(1e-6 * moved / ms, 1))


@pytest.mark.parametrize("engine", engines(GRAD_NORM))
def test_norm_of_gradients(engine: str, record_property: Keep) -> None:
    function(GRAD_NORM, engine)
    grads = [torch.randn(size, device=DEVICE).to(BF16) for size in (1, 63, 1_000_003)]
    off = error(grad_norm(grads, engine), torch.cat(grads).double().norm())
    large = [torch.randn(2**28 if GPU else 2**16, device=DEVICE).to(BF16)]
    ms = milliseconds(lambda: grad_norm(large, engine)) * 1e9 / large[0].numel()
    keep(record_property, f"{engine}, norm of gradients, bf16", ms, error=off)
    assert off < 1e-6


@pytest.mark.parametrize("engine", engines(BOUNDARIES))
def test_boundaries(engine: str, record_property: Keep) -> None:
    fill = function(BOUNDARIES, engine)

    def made(lengths: Tensor) -> list[Tensor]:
        wide = torch.arange(int(lengths.sum()), device=DEVICE)
        outputs = [
            torch.empty_like(wide),
            torch.empty_like(wide),
            torch.empty_like(wide, dtype=torch.int32),
        ]
        return [wide, *outputs, torch.empty(len(lengths) + 1, dtype=torch.int32, device=DEVICE)]

    def run(by: Callable[..., None], lengths: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        by(lengths, torch.ones_like(lengths), tensors[0], 0, *tensors[1:])
        return tensors[1:]

    small = torch.tensor([1, 507, 63, 2051], device=DEVICE)
    results = zip(
        run(fill, small, made(small)), run(boundaries_reference, small, made(small)), strict=True
    )
    assert all(torch.equal(ours, truth) for ours, truth in results)
    large = torch.full((512 if GPU else 8,), 128, device=DEVICE)
    tensors = made(large)
    keep(
        record_property,
        f"{engine}, boundaries, tokens",
        milliseconds(lambda: run(fill, large, tensors)),
    )


def scale_and_error(ours: Tensor, truth: Tensor) -> tuple[float, float]:
    """By what all of `ours` is too large in the mean, and its error."""
    truth = truth.flatten()
    return float(ours.double().flatten() @ truth / (truth @ truth)) - 1, error(
        ours.flatten(), truth
    )


def head(rows: int, hidden: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, hidden, device=DEVICE).to(BF16).requires_grad_()
    weight = (torch.randn(classes, hidden, device=DEVICE) / hidden**0.5).to(BF16).requires_grad_()
    return x, weight, torch.randint(classes, (rows,), device=DEVICE)


def step(loss: Callable[..., Tensor], x: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
    value = loss(x, weight, target)
    return [value.detach(), *torch.autograd.grad(value, (x, weight))]


LOSSES = {
    "linear cross-entropy": linear_cross_entropy,
    "log-probabilities": lambda *tensors: -linear_log_probs(*tensors).log_probs.mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_head(name: str, record_property: Keep) -> None:
    """8100 rows: 1 / 8100 in bf16 is 0.38 % off, and must be nobody's factor."""
    small = head(8100, 64, 1003 if GPU else 63)
    doubles = [tensor.detach().double().requires_grad_() for tensor in small[:2]]
    truth = step(
        lambda x, weight, target: F.cross_entropy(x @ weight.T, target), *doubles, small[2]
    )
    found = [scale_and_error(*pair) for pair in zip(step(LOSSES[name], *small), truth, strict=True)]
    large = head(8192, 4096, CLASSES) if GPU else small
    ms = milliseconds(lambda: step(LOSSES[name], *large), 3)
    keep(
        record_property,
        f"{name}, bf16, N={len(large[0])}, H={large[0].shape[1]}, V={len(large[1])}",
        ms,
        found=found,
    )
    assert all(abs(scale) < 1e-3 and off < 1e-2 for scale, off in found)


@pytest.mark.parametrize("engine", ATTENTION)
def test_attention(engine: str, record_property: Keep) -> None:
    def made(lengths: list[int]) -> tuple[list[Tensor], Segments]:
        shapes = [(1, heads, sum(lengths), 64) for heads in (8, 2, 2)]
        ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
        segments = Segments(ends, ends, max(lengths), max(lengths))
        return [
            torch.randn(shape, device=DEVICE).to(BF16).requires_grad_() for shape in shapes
        ], segments

    def run(tensors: list[Tensor], segments: Segments) -> list[Tensor]:
        out = segment_attention(*tensors, segments, causal=True, impl=engine)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), tensors)]

    small, segments = made([30, 1, 96])
    doubles = [tensor.detach().double().requires_grad_() for tensor in small]
    parts = [
        F.scaled_dot_product_attention(
            *(t[:, :, a:b] for t in doubles), is_causal=True, enable_gqa=True
        )
        for a, b in pairwise(segments.bounds_q)
    ]
    truth = torch.cat(parts, 2).transpose(1, 2)
    exact = [truth.detach(), *torch.autograd.grad(truth.square().sum(), doubles)]
    errors = [error(*pair) for pair in zip(run(small, segments), exact, strict=True)]
    large, boundaries = made([512] * (16 if GPU else 1))
    ms = milliseconds(lambda: run(large, boundaries))
    keep(record_property, f"{engine}, attention, bf16, documents of 512", ms, errors=errors)
    assert max(errors) < 2e-2
