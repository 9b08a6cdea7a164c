"""Stock against fused: one class, its loss and the gradients of all its parameters.

Both runs draw the same random numbers and share every operation below the head, so that they may
differ by the rounding of the head and the loss alone. How much that is, the stock model itself
says: it is run once more with its logits, and the gradient that comes back through them, off by one
rounding (`Nudge`). In bf16 autocast the truth is stock fp32, and stock bf16 says how far from it
one may be.
"""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import fastft
from fastft.loss.lazy.output_head import find_heads
from fastft.loss.lazy.report import Report
from support.architectures.models import Case, batch, build, seed, takes_any

FUSED, MATERIALISED, INERT = "exact and fused", "exact, materialised", "exact, inert"
NONDETERMINISTIC, NOT_RUN, WRONG = "non-deterministic in stock", "not run", "WRONG"
KINDS = (FUSED, MATERIALISED, INERT, NONDETERMINISTIC, NOT_RUN, WRONG)
SECONDS = 120
NUDGES = 4.0  # a head's GEMM in another order is off by a few roundings, not by one
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}


@dataclass
class Outcome:
    """One line of the table; errors are relative, the largest of the loss and of all gradients."""

    kind: str
    why: str = ""
    fp32: float = 0.0  # fused from stock
    fp32_nudged: float = 0.0  # stock with one more rounding from stock
    bf16: float = 0.0  # fused bf16 from stock fp32
    bf16_stock: float = 0.0  # stock bf16 from stock fp32


@dataclass
class Run:
    """What one forward and backward pass gave."""

    loss: Tensor
    gradients: dict[str, Tensor]
    logits: Any


def run(model: nn.Module, inputs: dict[str, Any]) -> Run:
    """One pass with the same random numbers as every other."""
    model.zero_grad(set_to_none=True)
    seed(1)
    output = model(**inputs)
    loss = output["loss"] if isinstance(output, dict) else output[0]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    logits = output.get("logits") if isinstance(output, dict) else None
    return Run(loss.detach(), gradients, logits)


def errors(truth: Run, other: Run) -> dict[str, float]:
    """Relative distance of the loss and of each gradient, by norm; a gradient that is next to
    nothing beside the largest counts as a thousandth of it."""
    norms = {name: float(gradient.double().norm()) for name, gradient in truth.gradients.items()}
    least = 1e-3 * max(norms.values(), default=0.0) + 1e-30
    result = {"loss": float((truth.loss - other.loss).abs() / (truth.loss.abs() + 1e-30))}
    for name in truth.gradients.keys() | other.gradients.keys():
        a, b = truth.gradients.get(name), other.gradients.get(name)
        difference = b if a is None else a if b is None else a.double() - b.double()
        result[name] = float(difference.double().norm()) / max(norms.get(name, 0.0), least)
    return {name: float("inf") if error != error else error for name, error in result.items()}


class Nudge:
    """While open, the heads' outputs, and the gradients through them, are off by up to one rounding
    of each row."""

    def __init__(self, model: nn.Module) -> None:
        self.heads = find_heads(model)
        self.generator = torch.Generator().manual_seed(7)

    def __enter__(self) -> None:
        self.hooks = [head.register_forward_hook(self._forward) for head in self.heads]

    def __exit__(self, *exception: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _rounded(self, rows: Tensor) -> Tensor:
        noise = 2 * torch.rand(rows.shape, generator=self.generator) - 1
        return rows + noise * torch.finfo(rows.dtype).eps * rows.detach().abs().amax(
            -1, keepdim=True
        )

    def _forward(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output = self._rounded(output)
        output.register_hook(self._rounded)
        return output


def worst(found: dict[str, float]) -> tuple[str, float]:
    """The name and the size of the largest error."""
    return max(found.items(), key=lambda item: item[1])


def examine(case: Case) -> Outcome:
    """Builds the class and compares; a class that cannot be built, or that stock cannot train, is
    not run."""
    with time_limit():
        try:
            model = build(case)
            inputs = batch(case, model)
            stock, again = run(model, inputs), run(model, inputs)
        except Exception as error:
            return Outcome(NOT_RUN, _reason(error))
        if not torch.isfinite(stock.loss):
            return Outcome(NOT_RUN, f"the loss of stock is {float(stock.loss)}")
        name, difference = worst(errors(stock, again))
        if difference > 0:
            return Outcome(
                NONDETERMINISTIC, f"two runs of stock differ by {difference:.0e} ({name})"
            )
        try:
            return compare(model, inputs, stock)
        except Exception as error:
            return Outcome(WRONG, f"fused fails where stock does not: {_reason(error)}")


def compare(model: nn.Module, inputs: dict[str, Any], stock: Run) -> Outcome:
    """The outcome of a model that stock trains."""
    outcome = _compare_fp32(model, inputs, stock)
    counted = {**inputs, "num_items_in_batch": torch.tensor(123)}
    if (
        outcome.kind != WRONG
        and takes_any(model)
        and (stock_counted := _run_if_it_can(model, counted)) is not None
    ):
        other = _compare_fp32(model, counted, stock_counted)
        outcome = max(outcome, other, key=lambda found: KINDS.index(found.kind))
    return outcome if outcome.kind == WRONG else _compare_bf16(model, inputs, stock, outcome)


def _run_if_it_can(model: nn.Module, inputs: dict[str, Any]) -> Run | None:
    """None where forward hands its **kwargs to somebody who does not know `num_items_in_batch`."""
    try:
        return run(model, inputs)
    except TypeError:
        return None


def _compare_fp32(model: nn.Module, inputs: dict[str, Any], stock: Run) -> Outcome:
    with Nudge(model):
        nudged = worst(errors(stock, run(model, inputs)))[1]
    with fastft.fused_loss(model) as report:
        fused = run(model, inputs)
        kind, why = _what_became(report)
        name, error = worst(errors(stock, fused))
        if error > NUDGES * nudged + FLOOR[torch.float32]:
            kind, why = (
                WRONG,
                f"fp32: {name} is off by {error:.1e}, one rounding of the logits by {nudged:.1e}",
            )
        elif isinstance(stock.logits, Tensor) and not _same_logits(stock.logits, fused.logits):
            kind, why = WRONG, "outputs.logits read other values"
    return Outcome(kind, why, fp32=error, fp32_nudged=nudged)


def _what_became(report: Report) -> tuple[str, str]:
    if report.materialised:
        return MATERIALISED, "; ".join(report.materialised)
    if not report.fused:
        return INERT, "; ".join(report.skipped) or "nothing called the output head"
    return FUSED, ""


def _same_logits(stock: Tensor, fused: Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(
            stock.detach(),
            fused.detach() + 0,
            rtol=1e-5,
            atol=1e-5 * float(stock.detach().abs().max()),
        )


def _compare_bf16(
    model: nn.Module, inputs: dict[str, Any], truth: Run, outcome: Outcome
) -> Outcome:
    with torch.autocast("cpu", torch.bfloat16):
        try:
            stock = errors(truth, run(model, inputs))
        except Exception as error:
            outcome.why = "; ".join(
                filter(None, (outcome.why, f"stock fails in bf16 autocast: {_reason(error)}"))
            )
            return outcome
        with fastft.fused_loss(model) as report:
            fused = errors(truth, run(model, inputs))
            kind, why = _what_became(report)
    if KINDS.index(kind) > KINDS.index(outcome.kind):
        outcome.kind, outcome.why = kind, f"in bf16: {why}"
    typical = sum(stock.values()) / len(stock)
    for name, error in fused.items():
        allowed = 2 * max(stock.get(name, 0.0), typical) + FLOOR[torch.bfloat16]
        if error > allowed:
            outcome.kind, outcome.why = (
                WRONG,
                f"bf16: {name} is off by {error:.1e}, allowed {allowed:.1e}",
            )
    outcome.bf16, outcome.bf16_stock = worst(fused)[1], worst(stock)[1]
    return outcome


def _reason(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = place.filename.split("site-packages/")[-1].split("/tests/")[-1]
    message = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {message} ({where}:{place.lineno})"


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raises TimeoutError in a test that takes longer than SECONDS."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
