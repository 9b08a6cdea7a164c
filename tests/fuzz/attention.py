"""Attention of packed rows, every option and engine, against the whole matrix of scores in float64.

The oracle knows one mask: who is in whose segment, and may be looked at there. Outputs and all
gradients are at most twice as far from it as plain torch in the same dtype.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from support import drawn_losses
from torch import Tensor

from fastft.attention.segment_attention import segment_attention
from fastft.attention.segments import Segments

EXAMPLES = 60


class Case(NamedTuple):
    dtype: str
    impl: str
    lengths: list[int]  # of the first row's segments
    keys: list[int] | None  # of their keys, in cross-attention
    rows: int
    groups: int
    heads: int  # of a group
    size: int
    value_size: int
    spread: float
    causal: bool
    window: int | None
    chunk: int | None
    scale: float | None
    softcap: float | None
    sinks: bool
    mask: str | None
    bias: bool
    broadcast: tuple[bool, bool, bool, bool]  # dimensions of mask and bias
    seed: int


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(1, 9) | st.just(70), min_size=1, max_size=5))
    crossed = draw(st.sampled_from([False, False, True]))
    local = st.none() | st.sampled_from([1, 2, 5, 64, 100])
    size = draw(st.sampled_from([1, 8, 16]))
    return Case(
        draw(drawn_losses.DTYPES),
        draw(st.sampled_from(["auto", "auto", "eager", "blocks", "cpp", "flash_cpu"])),
        lengths,
        [draw(st.integers(1, 20)) for _ in lengths] if crossed else None,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        size,
        draw(st.sampled_from([size, size, 3])),
        draw(st.sampled_from([0.0, 1.0, 4.0])),
        not crossed and draw(st.booleans()),
        None if crossed else draw(local),
        None if crossed else draw(local),
        draw(st.none() | st.just(0.3)),
        draw(st.none() | st.none() | st.just(2.0)),
        draw(st.booleans()),
        draw(st.sampled_from([None, None, "bool", "float"])),
        draw(st.sampled_from([False, False, True])),
        draw(st.tuples(*[st.booleans()] * 4)),
        draw(drawn_losses.SEED),
    )


CASES = _cases()


def check(case: Case) -> None:
    case = _possible(case)
    generator = torch.Generator().manual_seed(case.seed)
    queries, keys = sum(case.lengths), sum(case.keys or case.lengths)
    heads, dtype = case.groups * case.heads, getattr(torch, case.dtype)

    def draw(*shape: int) -> Tensor:
        return (case.spread * torch.randn(shape, generator=generator)).to(dtype)

    leaves = [
        draw(case.rows, queries, heads, case.size).transpose(1, 2),  # as projections give it
        draw(case.rows, case.groups, keys, case.size),
        draw(case.rows, case.groups, keys, case.value_size),
        *([draw(heads)] if case.sinks else []),
    ]
    whole = zip((case.rows, heads, queries, keys), case.broadcast, strict=True)
    beside = [1 if broadcast else size for size, broadcast in whole]
    leaves += [draw(*beside)] if case.bias else []
    mask = draw(*beside) if case.mask else None
    if mask is not None and case.mask == "bool":
        mask = mask >= 0
    seen = _seen(case) if case.mask != "bool" else _seen(case) & mask
    drawn_losses.check_against_float64(
        lambda *leaves: [_ours(case, mask, *leaves)],
        lambda *leaves: [_plain(case, mask, seen, *leaves)],
        leaves,
        generator,
        terms=case.size + case.value_size + case.rows * queries * heads + keys,
        size=_size_of_sums(case, leaves),
    )


def _possible(case: Case) -> Case:
    """The kernels know less, and say so; what fp16 cannot hold is Inf in plain torch, too."""
    if case.dtype == "float16":
        case = case._replace(spread=min(case.spread, 1.0))
    added = bool(case.mask or case.bias)
    unknown = {
        "cpp": added or case.dtype not in ("float32", "bfloat16"),
        "flash_cpu": added or case.softcap is not None or case.size != case.value_size,
    }
    return case._replace(impl="auto") if unknown.get(case.impl) else case


def _size_of_sums(case: Case, leaves: list[Tensor]) -> float:
    """The size of what is summed into a result: values, or what the scores hand on of them."""
    q, k, v = (float(leaf.abs().max()) for leaf in leaves[:3])
    scores = leaves[0] @ leaves[1].repeat_interleave(case.heads, 1).mT
    # scores are rounded to a share of their own size, and so are the probabilities
    rounded = max(1.0, _scale(case) * float(scores.abs().max()))
    return 4.0 * max(1.0, v) * max(1.0, _scale(case) * max(q, k)) * rounded


def _scale(case: Case) -> float:
    return case.size**-0.5 if case.scale is None else case.scale


def _seen(case: Case) -> Tensor:
    """Whether a query may look at a key, (queries, keys)."""
    (of_query, i), (of_key, j) = map(_places, (case.lengths, case.keys or case.lengths))
    behind = i[:, None] - j
    seen = of_query[:, None] == of_key
    if case.causal:
        seen &= behind >= 0
    if case.window is not None:
        seen &= behind.abs() < case.window
    if case.chunk is not None:
        seen &= i[:, None] // case.chunk == j // case.chunk
    return seen


def _places(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Of each token its segment, and which of it it is."""
    segments = torch.repeat_interleave(torch.tensor(lengths))
    return segments, torch.cat([torch.arange(length) for length in lengths])


def _ours(
    case: Case, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *others: Tensor
) -> Tensor:
    def borders(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths * case.rows)], dtype=torch.int32)

    keys = case.keys or case.lengths
    cu_q = borders(case.lengths)
    cu_k = cu_q if case.keys is None else borders(keys)
    segments = Segments(cu_q, cu_k, max(case.lengths), max(keys))
    options: dict[str, Any] = {"causal": case.causal, "window": case.window, "chunk": case.chunk}
    options |= {"scale": case.scale, "softcap": case.softcap, "mask": mask, "impl": case.impl}
    names = ["sinks"] * case.sinks + ["bias"] * case.bias
    options |= dict(zip(names, others, strict=True))
    return segment_attention(query, key, value, segments, **options)


def _plain(
    case: Case,
    mask: Tensor | None,
    seen: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *others: Tensor,
) -> Tensor:
    key, value = (leaf.repeat_interleave(case.heads, 1) for leaf in (key, value))
    scores = query @ key.mT * _scale(case)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if case.bias:
        scores = scores + others[-1]
    if mask is not None and case.mask == "float":
        scores = scores + mask.to(scores.dtype)
    scores = scores.masked_fill(~seen, -torch.inf)
    if case.sinks:
        sinks = others[0][:, None, None].expand(len(scores), -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], -1)
    # a query that sees nothing has nothing
    blind = ~seen.any(-1, keepdim=True)
    p = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return (p[..., : key.shape[2]] @ value).transpose(1, 2)
