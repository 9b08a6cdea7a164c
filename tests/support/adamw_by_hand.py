"""A step of AdamW by hand, in float64, from what an optimizer has kept, and whether it came to it.

States are read by the layout that `AdamW` promises, and codes by their formulas, written anew: of
the fastft that is under test nothing computes here. What may lie between a value and its truth is

    |kept - truth| <= gap + error

with `error` what roundings of fp32 may do to the terms, and `gap` that of the form in which it is
kept: nothing in fp32, half of a last place to nearest, one where it is rounded stochastically, and
one step of codes. What is rounded stochastically must also be right in the mean, by Hoeffding's
inequality for sums of independent numbers with bounds.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FP32 = 2.0**-19  # of the roundings of a step together: 32 halves of a last place
BLOCK, LONG = 128, 4096
# the exponent of a chance of 2e-13 that a sum which is right in the mean is taken for one that is
# not
DOUBT = 30.0

# shares of a block's scale that codes stand for, without their signs: 127 of 8 bits, 7 of 4
OF_M = {
    "8bit": (torch.arange(128, dtype=torch.float64) / 127) ** 4,
    "4bit": torch.arange(8, dtype=torch.float64) / 7,
}
_code = torch.arange(256, dtype=torch.float64)
OF_V = 2 ** (_code / 12).floor() * (12 + _code % 12) / (15 * 2**21)


class Kept(NamedTuple):
    """What is kept of one parameter, in float64.

    Attributes:
        weight: the parameter alone.
        low: what is kept beside it; zeros where nothing is.
        moments: first, second and, with amsgrad, the largest second.
        scales: of codes, an element each: those of both moments; empty where there are none.
    """

    weight: Tensor
    low: Tensor
    moments: list[Tensor]
    scales: list[Tensor]
    count: float

    @property
    def total(self) -> Tensor:
        return self.weight + self.low


def look(optimizer: torch.optim.Optimizer, written: Collection[Tensor]) -> list[Kept]:
    """What an optimizer keeps of each parameter now.

    Args:
        written: weights that somebody else has written to: nothing beside them counts.
    """
    return [
        kept(param, optimizer.state.get(param, {}), group, any(param is one for one in written))
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def kept(param: Tensor, state: dict[str, Any], group: dict[str, Any], written: bool) -> Kept:
    weight = param.detach().double()
    zeros = torch.zeros_like(weight)
    if not state:
        return Kept(weight, zeros, [zeros] * (2 + group["amsgrad"]), [], 0.0)
    low = zeros
    if "remainder" in state and not written:
        low = with_remainder(param, state["remainder"]).double() - weight
    elif "kahan" in state and not written:
        low = state["kahan"].double()
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    if is_coded(param, group):
        moments, scales = _of_codes(param, state, group["moments"])
    else:
        wanted = torch.bfloat16 if group["moments"] == "bf16" else torch.float32
        assert all(state[name].dtype == wanted for name in names)
        moments, scales = [state[name].double() for name in names], []
    return Kept(weight, low, moments, scales, float(state["step"]))


def with_remainder(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 number that a bf16 weight and its remainder are: the topmost 16 bits are the
    weight's, one more where the remainder is below zero."""
    bits = param.detach().view(torch.int16).int() << 16
    return (bits + remainder.view(torch.int16).int()).view(torch.float32)


def is_coded(param: Tensor, group: dict[str, Any]) -> bool:
    long = param.ndim > 1 or (param.ndim == 1 and param.numel() >= LONG)
    return group["moments"] in OF_M and long


def _of_codes(param: Tensor, state: dict[str, Any], kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """The moments and, an element each, the scales."""
    rows, columns = _lines(param)
    scales = [
        state[name].double().repeat_interleave(BLOCK, 1)[:, :columns].reshape(param.shape)
        for name in ("exp_avg_scale", "exp_avg_sq_scale")
    ]
    v = OF_V[state["exp_avg_sq"].long()] * scales[1]
    code = state["exp_avg"].long()
    unit = scales[0]
    if kind == "4bit":
        halves = torch.stack([code % 16, code // 16], 2).reshape(rows, code.shape[1] * 2)
        assert not halves[:, columns:].any(), "the half behind the last code of a row"
        halves = torch.where(halves > 7, halves - 16, halves)
        code, unit = halves[:, :columns].reshape(param.shape), scales[0] * v.sqrt()
    table = OF_M[kind]
    assert (code.abs() < len(table)).all(), "a code of NaN"
    return [code.sign() * table[code.abs()] * unit, v], scales


def _lines(param: Tensor) -> tuple[int, int]:
    rows = param.shape[0] if param.ndim > 1 else 1
    return rows, param.numel() // max(1, rows)


class Truth(NamedTuple):
    """A value in float64, and how far fp32 may be off."""

    value: Tensor
    error: Tensor

    def check(self, of: Tensor, what: str, gap: Tensor | float = 0.0) -> None:
        off = (of - self.value).abs()
        bad = ~(off <= gap + self.error)  # NaN too
        assert not bad.any(), (
            f"{what}: {of[bad][0]:.9g} instead of {self.value[bad][0]:.9g}, {int(bad.sum())} of "
            f"{bad.numel()} are off by up to {off[bad].max():.3g}"
        )

    def check_drawn(self, of: Tensor, what: str, gap: Tensor) -> None:
        """Of what is rounded stochastically, `gap` being the distance of both neighbours."""
        self.check(of, what, gap)
        wide = gap > 20 * self.error
        off, error = ((part / gap)[wide] for part in (of - self.value, self.error))
        allowed = (DOUBT / 2 * wide.sum()).sqrt() + error.sum() + wide.sum() / 2**16
        assert off.sum().abs() <= allowed, (
            f"{what}: rounded by {off.mean():+.3g} steps in the mean of {off.numel()}"
        )


def last_place(size: Tensor) -> Tensor:
    """The distance of neighbours in bf16 at a number of this size."""
    exponent = torch.frexp(size).exponent.double().masked_fill(size == 0, -125)
    return 2.0 ** (exponent - 8).clamp(min=-133)


def grad_factor(grads: list[Tensor], max_norm: float | None, scale: float) -> float:
    """What clipping to a norm and loss scaling multiply gradients by."""
    if max_norm is None:
        return 1 / scale
    norm = float(sum(float((grad.double() / scale).square().sum()) for grad in grads)) ** 0.5
    return min(1.0, max_norm / (norm + 1e-6)) / scale


def step(before: Kept, grad: Tensor, group: dict[str, Any]) -> tuple[Truth, list[Truth]]:
    """The weight and the moments that a step comes to, from a gradient in float64."""
    lr, decay, eps = (float(group[name]) for name in ("lr", "weight_decay", "eps"))
    beta1, beta2 = map(float, group["betas"])
    count = before.count + 1
    grad = -grad if group["maximize"] else grad
    m, v, *largest = before.moments
    first = Truth(m + (1 - beta1) * (grad - m), FP32 * (grad.abs() + m.abs()))
    second = v * beta2 + (1 - beta2) * grad * grad
    seconds = [second, *(torch.maximum(w, second) for w in largest)]
    denominator = (seconds[-1] / (1 - beta2**count)).sqrt() + eps
    rate = lr / (1 - beta1**count) / denominator
    weight = before.total * (1 - lr * decay) - rate * first.value
    error = FP32 * (before.total.abs() + (rate * first.value).abs()) + rate * first.error
    return Truth(weight, error), [first, *(Truth(each, FP32 * each) for each in seconds)]


def check_step(
    optimizer: torch.optim.Optimizer,
    before: list[Kept],
    after: list[Kept],
    *,
    rounding: str,
    max_norm: float | None = None,
    scale: float = 1.0,
) -> None:
    """Raises unless a step leads from `before` to `after`, by the gradients that the parameters
    still have; what has none stays as it was."""
    pairs = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param, _ in pairs if param.grad is not None]
    factor = grad_factor(grads, max_norm, scale)
    for at, ((param, group), was, now) in enumerate(zip(pairs, before, after, strict=True)):
        what = f"parameter {at}"
        if param.grad is None:
            _check_same(was, now, what)
            continue
        assert now.count == was.count + 1, f"{what} counts {now.count} behind {was.count}"
        weight, moments = step(was, param.grad.double() * factor, group)
        _check_weight(now, weight, param.dtype, rounding, what)
        if is_coded(param, group):
            _check_codes(now, moments, param, group["moments"], what)
        else:
            for name, value, truth in zip("mvw", now.moments, moments, strict=False):
                _check_moment(value, truth, group["moments"], f"{name} of {what}")


def check_same(before: list[Kept], after: list[Kept], *, split_anew: bool = False) -> None:
    """Raises unless all that is kept is what it was.

    Args:
        split_anew: weights have become fp32, and bf16 with a compensation again.
    """
    for at, (was, now) in enumerate(zip(before, after, strict=True)):
        _check_same(was, now, f"parameter {at}", split_anew)


def _check_same(was: Kept, now: Kept, what: str, split_anew: bool = False) -> None:
    assert now.count == was.count, f"{what} counts {now.count} behind {was.count}"
    rounded = last_place(now.low) / 2 + 2.0**-24 * was.total.abs()
    Truth(was.total, rounded * split_anew).check(now.total, what)
    for name, old, new in zip("mvw", was.moments, now.moments, strict=False):
        assert torch.equal(old, new), f"{name} of {what} has changed"


def _check_weight(now: Kept, truth: Truth, dtype: torch.dtype, rounding: str, what: str) -> None:
    size = truth.value.abs() + truth.error
    if dtype == torch.float32 or rounding == "exact":
        truth.check(now.total, what)
    elif rounding == "stochastic":
        truth.check_drawn(now.weight, what, last_place(size))
    else:
        truth.check(now.weight, what, last_place(size) / 2)
    if dtype == torch.bfloat16 and rounding == "kahan":
        truth.check(now.total, f"{what} and its compensation", last_place(now.low) / 2)


def _check_moment(value: Tensor, truth: Truth, kind: str, what: str) -> None:
    if kind == "bf16":
        truth.check_drawn(value, what, last_place(truth.value.abs() + truth.error))
    else:
        truth.check(value, what)


def _check_codes(now: Kept, moments: list[Truth], param: Tensor, kind: str, what: str) -> None:
    if param.numel() == 0:
        return
    m, v = moments
    for name, truth, value, scale, table, unit in (
        ("m", m, now.moments[0], now.scales[0], OF_M[kind], _unit_of_m(now, kind)),
        ("v", v, now.moments[1], now.scales[1], OF_V, torch.ones_like(v.value)),
    ):
        # in units of the scale; where the unit is zero, all is
        there = unit > 0
        share = Truth(*(torch.where(there, part / unit, 0.0) for part in truth))
        largest = Truth(*(_largest(part.abs(), param) for part in share))
        in_blocks = Truth(largest.value, largest.error + FP32 * largest.value)
        in_blocks.check(_largest(scale, param), f"scales of {name} of {what}")
        whole = unit * scale
        known = whole > 0
        part = torch.where(known, truth.value / whole, 0.0)
        error = torch.where(known, truth.error / whole, 0.0) + FP32 * part.abs()
        if name == "v":  # no code is zero
            part = part.clamp(min=float(table[0]))
        of = torch.where(known, value / whole, 0.0)
        gap = torch.where(known, _gap(table, part.abs() + error), 0.0)
        Truth(torch.where(known, part, 0.0), error).check_drawn(of, f"{name} of {what}", gap)


def _unit_of_m(now: Kept, kind: str) -> Tensor:
    return now.moments[1].sqrt() if kind == "4bit" else torch.ones_like(now.moments[1])


def _largest(values: Tensor, param: Tensor) -> Tensor:
    """The largest of each block."""
    rows, columns = _lines(param)
    blocks = -(-columns // BLOCK)
    padded = F.pad(values.reshape(rows, columns), (0, blocks * BLOCK - columns))
    return padded.view(rows, blocks, BLOCK).amax(2)


def _gap(table: Tensor, share: Tensor) -> Tensor:
    """The distance of the codes around a share of the scale."""
    above = torch.searchsorted(table, share.contiguous(), right=True).clamp(1, len(table) - 1)
    return table[above] - table[above - 1]
