"""What a head says about each token, every option, against float64: log-probabilities, entropies,
means, which class comes first; and losses made of them, also with gradients in the forward pass.

Values and all gradients are at most twice as far from it as plain torch in the same dtype; NaN and
Inf are in the same places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support import drawn_losses, oracle
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
    bias: bool
    mean_logits: bool
    log_sum_sq_probs: bool
    index: str  # the dtype of targets
    cube: bool  # a batch of sequences
    chunk_rows: int | None
    counted: bool
    columns_first: bool
    autocast: bool
    unusual: float | None
    seed: int


CASES = st.builds(
    Case,
    of=st.sampled_from(["log_probs", "dft", "policy", "entropy"]),
    dtype=drawn_losses.DTYPES,
    impl=st.sampled_from(["auto", "eager", "cpp"]),
    **drawn_losses.SHAPES,
    **drawn_losses.OF_LOGITS,
    bias=st.booleans(),
    mean_logits=st.booleans(),
    log_sum_sq_probs=st.booleans(),
    index=st.sampled_from(["int64", "int32"]),
    cube=st.booleans(),
    chunk_rows=st.none() | st.sampled_from([1, 7, 64]),
    counted=st.booleans(),
    columns_first=st.booleans(),
    autocast=st.booleans(),
    unusual=drawn_losses.UNUSUAL,
    seed=drawn_losses.SEED,
)
# of a token and what belongs to it: old log-probabilities, an advantage
TOKEN_LOSSES = {
    "dft": lambda token, old, gain: -token.log_probs * token.log_probs.detach().exp(),
    "policy": lambda token, old, gain: -gain * (token.log_probs - old).clamp(-4, 4).exp(),
    "entropy": lambda token, old, gain: gain * token.entropy + token.lse,
}


def check(case: Case) -> None:
    case = _possible(case)
    generator = torch.Generator().manual_seed(case.seed)
    shapes = [(case.rows, case.hidden), (case.classes, case.hidden), (case.classes,)]
    leaves = [drawn(shape, generator, case.columns_first) for shape in shapes[: 2 + case.bias]]
    leaves[1] *= case.spread
    leaves = [leaf.to(getattr(torch, case.dtype)) for leaf in leaves]
    target = drawn_losses.targets(
        case.rows, case.classes, case.ignored, generator, case.ignore_index
    )
    ours, plain = (_log_probs if case.of == "log_probs" else _losses)(case, target, generator)
    size = drawn_losses.size_of_sums(leaves, case.logit_scale, True)
    size *= 1 if case.of == "log_probs" else max(1, case.rows)  # summed over the tokens
    terms = case.rows + case.hidden + case.classes
    drawn_losses.put_unusual(leaves[case.seed % 2], case.unusual, generator)
    drawn_losses.check_against_float64(
        ours, plain, leaves, generator, case.autocast, terms=terms, size=size
    )
    if not case.autocast and case.unusual is None:
        _check_unrecorded(case, leaves, target)


def _possible(case: Case) -> Case:
    """Autocast leaves float64 alone."""
    impl, spread = drawn_losses.within_dtype(case.dtype, case.impl, case.spread)
    autocast = case.autocast and case.dtype != "float64"
    return case._replace(impl=impl, spread=spread, autocast=autocast)


def _given(case: Case, target: Tensor) -> dict[str, object]:
    counted = int((target != case.ignore_index).sum()) if case.counted else None
    return {
        "softcap": case.softcap,
        "logit_scale": case.logit_scale,
        "ignore_index": case.ignore_index,
        "chunk_rows": case.chunk_rows,
        "max_counted": counted,
        "impl": case.impl,
    }


def _operands(case: Case, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As the case lays them out."""
    target = target.to(getattr(torch, case.index))
    return (x[None], target[None]) if case.cube else (x, target)


def _plain(
    case: Case, x: Tensor, head: Tensor, bias: Tensor | None, target: Tensor
) -> list[Tensor]:
    # a row that is ignored is no part of any gradient, whatever it holds
    ignored = (target == case.ignore_index)[:, None]
    logits = F.linear(x.masked_fill(ignored, 0.0), head, bias).masked_fill(ignored, 0.0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.autocast("cpu", enabled=False):
        options = {"softcap": case.softcap, "logit_scale": case.logit_scale}
        found = oracle.log_probs(logits, target, ignore_index=case.ignore_index, **options)
        log_probs, entropy, lse, is_top1 = found
        # of a row whose largest logit is infinite all is NaN, as torch's log_softmax
        largest = oracle.capped(logits, **options).amax(1)
        unknown = largest.isinf() & (target != case.ignore_index)
        return [log_probs, entropy, torch.where(unknown, torch.nan, lse), is_top1]


def _log_probs(case: Case, target: Tensor, generator: torch.Generator) -> tuple[Computed, Computed]:
    def ours(x: Tensor, head: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        x, y = _operands(case, x, target)
        tokens = fastft.linear_log_probs(x, head, y, linear_bias=bias, **_given(case, target))
        assert tokens.log_probs.shape == y.shape
        return [tokens.log_probs.flatten(), tokens.entropy.flatten(), tokens.lse.flatten()]

    return ours, lambda x, head, bias=None: _plain(case, x, head, bias, target)[:3]


def _losses(case: Case, target: Tensor, generator: torch.Generator) -> tuple[Computed, Computed]:
    old = torch.rand(case.rows, generator=generator).log()
    gain = torch.randn(case.rows, generator=generator)
    of_token = TOKEN_LOSSES[case.of]

    def ours(x: Tensor, head: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        x, y = _operands(case, x, target)
        rows, given = [old.view(y.shape), gain.view(y.shape)], _given(case, target)
        return [fastft.linear_token_loss(x, head, y, of_token, *rows, linear_bias=bias, **given)]

    def plain(x: Tensor, head: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        tokens = fastft.LinearLogProbs(*_plain(case, x, head, bias, target))
        rows = (row.to(tokens.lse.dtype) for row in (old, gain))
        losses = of_token(tokens, *rows)
        return [torch.where(target != case.ignore_index, losses, 0.0).sum()]

    return ours, plain


def _check_unrecorded(case: Case, leaves: list[Tensor], target: Tensor) -> None:
    """What has no gradient: the same numbers without one, the first class, means and squares."""
    x, head, *bias = leaves
    asked = {"mean_logits": case.mean_logits, "log_sum_sq_probs": case.log_sum_sq_probs}
    given = {"linear_bias": bias[0] if bias else None, **asked, **_given(case, target)}
    with torch.no_grad():
        tokens = fastft.linear_log_probs(x, head, target, **given)
        logits = F.linear(x, head, given["linear_bias"])
        kept = logits.to(torch.promote_types(logits.dtype, torch.float32))
        exact = oracle.capped(
            F.linear(*(leaf.double() for leaf in leaves)), case.softcap, case.logit_scale
        )
        plain = oracle.capped(kept, case.softcap, case.logit_scale)
    counted = target != case.ignore_index
    assert not tokens.is_top1[~counted].any(), "an ignored token comes first"
    # where the second class is far enough that no rounding makes it the first
    y = target.masked_fill(~counted, 0).long()[:, None]
    lead = exact.gather(1, y) - exact.scatter(1, y, -torch.inf).amax(1, keepdim=True)
    clear = counted & (lead[:, 0].abs() > 0.1 * exact.abs().amax(1))
    assert torch.equal(tokens.is_top1[clear], lead[clear, 0] > 0), "another class comes first"
    size = drawn_losses.size_of_sums(leaves, case.logit_scale, False)
    for name, of_row in (
        ("mean_logits", lambda z: z.mean(1)),
        ("log_sum_sq_probs", lambda z: (2 * z.log_softmax(1)).logsumexp(1)),
    ):
        found = getattr(tokens, name)
        assert (found is None) is not asked[name]
        if found is not None:
            results = (torch.where(counted, of_row(z), 0.0) for z in (plain, exact))
            terms = case.hidden + case.classes
            drawn_losses.assert_no_worse(found, *results, name, terms=terms, size=size)
