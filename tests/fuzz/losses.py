"""The losses: of logits and of a head, every option, against float64.

Values and all gradients are at most twice as far from it as plain torch in the same dtype; NaN and
Inf are in the same places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support import drawn_losses
from support.drawn_losses import Computed, drawn
from torch import Tensor

import fastft

EXAMPLES = 80


class Case(NamedTuple):
    of: str
    dtype: str
    impl: str
    rows: int
    hidden: int
    classes: int
    spread: float
    ignored: float
    softcap: float | None
    logit_scale: float
    ignore_index: int
    label_smoothing: float
    z_loss: float
    weight: bool
    bias: bool
    reduction: str
    num_items: float | None
    chunk_rows: int | None
    counted: bool
    accumulate: bool  # the gradient of the head, by the loss itself
    unusual: float | None
    columns_first: bool
    seed: int


CASES = st.builds(
    Case,
    of=st.sampled_from(["logits", "head"]),
    dtype=drawn_losses.DTYPES,
    impl=st.sampled_from(["auto", "eager", "cpp"]),
    **drawn_losses.SHAPES,
    **drawn_losses.OPTIONS,
    bias=st.booleans(),
    chunk_rows=st.none() | st.sampled_from([1, 7, 64]),
    counted=st.booleans(),
    accumulate=st.booleans(),
    unusual=drawn_losses.UNUSUAL,
    columns_first=st.booleans(),
    seed=drawn_losses.SEED,
)


def check(case: Case) -> None:
    impl, spread = drawn_losses.within_dtype(case.dtype, case.impl, case.spread)
    accumulate = case.accumulate and case.of == "head" and case.reduction != "none"
    case = case._replace(impl=impl, spread=spread, accumulate=accumulate)
    generator = torch.Generator().manual_seed(case.seed)
    leaves = _leaves(case, generator, getattr(torch, case.dtype))
    target = drawn_losses.targets(
        case.rows, case.classes, case.ignored, generator, case.ignore_index
    )
    weight = torch.rand(case.classes, generator=generator) + 0.1 if case.weight else None
    compute = {"logits": _of_logits, "head": _of_head}[case.of]
    size = drawn_losses.size_of_loss(case, leaves, target) * (1 + accumulate)
    terms = case.rows + case.hidden + case.classes
    drawn_losses.put_unusual(leaves[case.seed % len(leaves[:2])], case.unusual, generator)
    pair = compute(case, target, weight)
    drawn_losses.check_against_float64(
        *pair, leaves, generator, accumulated=accumulate, terms=terms, size=size
    )


def _leaves(case: Case, generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    def make(*shape: int) -> Tensor:
        return drawn(shape, generator, case.columns_first).to(dtype)

    if case.of == "logits":
        return [case.spread * make(case.rows, case.classes)]
    head = [make(case.rows, case.hidden), case.spread * make(case.classes, case.hidden)]
    return head + ([make(case.classes)] if case.bias else [])


def _of_logits(case: Case, target: Tensor, weight: Tensor | None) -> tuple[Computed, Computed]:
    options = drawn_losses.asked(case) | drawn_losses.options_of(case)

    def ours(logits: Tensor) -> list[Tensor]:
        return [fastft.cross_entropy(logits, target, weight=weight, impl=case.impl, **options)]

    return ours, drawn_losses.plain(case, target, weight)


def _of_head(case: Case, target: Tensor, weight: Tensor | None) -> tuple[Computed, Computed]:
    plain = drawn_losses.plain(case, target, weight)
    options = drawn_losses.asked(case) | drawn_losses.options_of(case)
    ignored = target == case.ignore_index
    counted = int((~ignored).sum()) if case.counted else None
    options |= {"chunk_rows": case.chunk_rows, "max_counted": counted, "impl": case.impl}
    options |= {"accumulate_weight_grad": case.accumulate}

    def ours(x: Tensor, head: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        given = {"linear_bias": bias, "weight": weight, **options}
        return [fastft.linear_cross_entropy(x, head, target, **given)]

    def theirs(x: Tensor, head: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        # a row that is ignored is no part of the head's gradient, whatever it holds
        return plain(F.linear(x.masked_fill(ignored[:, None], 0.0), head, bias))

    return ours, theirs
