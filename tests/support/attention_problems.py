"""Attention of packed batches: calls with every option, and each segment by itself in plain
torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastft.attention.segment_attention import segment_attention
from fastft.attention.segments import Segments
from support.numerics import assert_no_worse

HEADS, GROUPS, SIZE, VALUE_SIZE = 4, 2, 8, 12
BATCHES = {  # lengths, rows
    "ragged": ((11, 7, 0, 13), 1),
    "one_token": ((1, 63), 1),
    "long": ((507, 130), 1),
    "rows": ((30, 33, 63), 2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "both_ways": {"causal": False},
    "window": {"causal": True, "window": 5},
    "window_both_ways": {"causal": False, "window": 5},
    "wide_window": {"causal": True, "window": 140},
    "chunks": {"causal": True, "chunk": 5},
    "scale": {"causal": True, "scale": 0.3},
    "sinks": {"causal": True, "sinks": True},
    "sinks_and_window": {"causal": True, "sinks": True, "window": 5},
    "softcap": {"causal": True, "softcap": 1.5},
    "bias": {"causal": False, "bias": True},
    "bool_mask": {"causal": False, "mask": "bool"},
    "float_mask": {"causal": False, "mask": "float"},
    "all": {
        "causal": True,
        "window": 5,
        "softcap": 1.5,
        "bias": True,
        "sinks": True,
        "mask": "bool",
    },
}


def segments_of_lengths(lengths: tuple[int, ...], keys: tuple[int, ...] | None = None) -> Segments:
    cu_q = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    cu_k = (
        cu_q if keys is None else torch.tensor([0, *itertools.accumulate(keys)], dtype=torch.int32)
    )
    return Segments(cu_q, cu_k, max(lengths), max(keys or lengths))


def inputs(
    batch: str, options: dict[str, Any], dtype: torch.dtype, value_size: int = SIZE
) -> dict[str, Any]:
    """Tensors of a call: q as projections give it (not contiguous), leaves that need gradients."""
    lengths, rows = BATCHES[batch]
    length = sum(lengths) // rows
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        # the same numbers in each dtype, but for rounding
        return torch.randn(shape, generator=generator).to(dtype)

    call = {
        "query": draw(rows, length, HEADS, SIZE).transpose(1, 2).requires_grad_(),
        "key": draw(rows, GROUPS, length, SIZE).requires_grad_(),
        "value": draw(rows, length, GROUPS, value_size).transpose(1, 2).requires_grad_(),
        **options,
    }
    if options.get("sinks"):
        call["sinks"] = draw(HEADS).requires_grad_()
    if options.get("bias"):
        call["bias"] = draw(1, HEADS, length, length).requires_grad_()
    if options.get("mask") == "bool":
        call["mask"] = (draw(rows, 1, length, length) > 0) | torch.eye(length, dtype=torch.bool)
    if options.get("mask") == "float":
        call["mask"] = draw(1, 1, 1, length)
    return call


def each_segment(
    lengths: tuple[int, ...], *, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> Tensor:
    """The same in plain torch: each segment, or chunk, cut out and attended to by itself; (R, T, H,
    D)."""
    out = query.new_zeros(query.shape[0], query.shape[2], HEADS, value.shape[3])
    begin = 0
    for length in lengths:
        for at in range(begin, begin + length, options.get("chunk") or max(length, 1)):
            row, first = divmod(at, query.shape[2])
            part = slice(first, first + min(options.get("chunk") or length, begin + length - at))
            one = {
                name: options[name]
                for name in ("causal", "window", "scale", "softcap", "sinks")
                if name in options
            }
            for name in ("bias", "mask"):
                if name in options:
                    whole = options[name].expand(query.shape[0], -1, query.shape[2], -1)
                    one[name] = whole[row, :, part, part]
            out[row, part] = attended_alone(
                query[row, :, part], key[row, :, part], value[row, :, part], **one
            )
        begin += length
    return out


def attended_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    key, value = (tensor.repeat_interleave(HEADS // GROUPS, 0) for tensor in (key, value))
    scores = query @ key.mT * (SIZE**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    behind = torch.arange(query.shape[1])[:, None] - torch.arange(key.shape[1])
    seen = (behind >= 0 if causal else behind == behind) & (behind.abs() < (window or math.inf))
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, query.shape[1], 1)], -1)
    elif (
        softcap is None and scores.dtype != torch.float64
    ):  # torch's own kernel is what there is to be as good as
        add = torch.zeros_like(scores) if bias is None else bias
        add = add if mask is None or mask.dtype == torch.bool else add + mask
        add = add.masked_fill(~seen, -torch.inf)
        # its fast kernel takes four dimensions alone
        four = (tensor[None] for tensor in (query, key, value))
        plain = torch.nn.functional.scaled_dot_product_attention(
            *four, attn_mask=add[None], scale=scale
        )
        return plain[0].transpose(0, 1)
    return (scores.softmax(-1)[..., : key.shape[1]] @ value).transpose(0, 1)


def results(
    function: Callable[..., Tensor], first: Any, call: dict[str, Any], **more: Any
) -> list[Tensor]:
    """The output and the gradients of all leaves."""
    leaves = [value for value in call.values() if isinstance(value, Tensor) and value.requires_grad]
    if first is None:
        out = function(**call, **more)
    else:
        query, key, value = (call[name] for name in ("query", "key", "value"))
        rest = {
            name: value for name, value in call.items() if name not in ("query", "key", "value")
        }
        out = function(query, key, value, first, **rest, **more)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weights)]


def assert_as_each_segment(
    batch: str, options: dict[str, Any], dtype: torch.dtype, impl: str, value_size: int = SIZE
) -> None:
    lengths, _ = BATCHES[batch]
    calls = [inputs(batch, options, kind, value_size) for kind in (dtype, torch.float64)]
    for name in ("query", "key", "value", "sinks", "bias"):  # the same numbers, rounded
        if isinstance(calls[0].get(name), Tensor):
            calls[1][name] = calls[0][name].detach().double().requires_grad_()
    if options.get("mask") == "float":
        calls[1]["mask"] = calls[0]["mask"].double()
    ours = results(segment_attention, segments_of_lengths(lengths), calls[0], impl=impl)
    plain, truth = (
        results(lambda **call: each_segment(lengths, **call), None, call) for call in calls
    )
    terms = SIZE + value_size + sum(lengths) * HEADS // GROUPS
    for index, (actual, other, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        assert actual.dtype == dtype
        assert_no_worse(actual, other, exact, f"tensor {index}", terms=terms)
