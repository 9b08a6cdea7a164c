"""fastft's own CPU kernel as an engine of `segment_attention`.

Forward takes q, k, v (R, H, T, D), in float32 or bfloat16, and gives out (R, T, H, Dv) and lse
(R, H, T); backward takes out and its gradient as (R, H, T, Dv). All pieces of a batch are one call,
with causality, a window and softcap. Scores are float32, of a block of queries and keys at a time;
what the query heads of a shared key head give to its gradients is added up in float32, in one
order, whatever number of threads there is. Weights are divided by their sum at the end: values
above 3e38 / keys may overflow.

Bytes moved: q and out once, keys and values for each 48 queries (64 with AVX-512) that see them;
backward also reads and writes 4 bytes x (D + Dv) for each such block, key and query head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import _native, ops
from fastft.attention.attention_tiles import AttentionCall

DTYPES = (torch.float32, torch.bfloat16)


def _piece_scores(
    query: Tensor, key: Tensor, scale: float, causal: bool, window: int, softcap: float
) -> Tensor:
    """The scores of a piece, (H, queries, keys) in float32 with a gradient; minus infinity where a
    query does not look."""
    scores = query @ key.repeat_interleave(len(query) // len(key), 0).mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    behind = torch.arange(scores.shape[1])[:, None] - torch.arange(scores.shape[2])
    low = 0 if causal else 1 - window if window else -behind.numel()
    hidden = (behind < low) | (behind >= (window or behind.numel() + 1))
    return scores.masked_fill(hidden.to(scores.device), -torch.inf)


def _forward(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Tensor,
    *options: Any,
) -> None:
    for row, q0, q1, k0, k1 in pieces.tolist():
        q, k, v = query[row, :, q0:q1], key[row, :, k0:k1], value[row, :, k0:k1]
        scores = _piece_scores(q.float(), k.float(), *options)
        total = scores.logsumexp(-1)
        # a query that sees nothing but -Inf gets 0
        p = (scores - total.clamp(min=torch.finfo(total.dtype).min)[..., None]).exp()
        lse[row, :, q0:q1] = total
        out[row, :, q0:q1] = p @ v.float().repeat_interleave(len(q) // len(k), 0)


def _backward(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    pieces: Tensor,
    *options: Any,
) -> None:
    for row, q0, q1, k0, k1 in pieces.tolist():
        d_o, o = d_out[row, :, q0:q1].float(), out[row, :, q0:q1].float()
        with torch.enable_grad():
            parts = (query[row, :, q0:q1], key[row, :, k0:k1])
            q, k = (part.detach().float().requires_grad_() for part in parts)
            scores = _piece_scores(q, k, *options)
        total = lse[row, :, q0:q1, None].clamp(min=torch.finfo(lse.dtype).min)
        p = (scores.detach() - total).exp()
        group = len(q) // len(k)
        v = value[row, :, k0:k1].float().repeat_interleave(group, 0)
        d_s = p * (d_o @ v.mT - (d_o * o).sum(-1, keepdim=True))
        d_query[row, :, q0:q1], d_key[row, :, k0:k1] = torch.autograd.grad(scores, (q, k), d_s)
        d_value[row, :, k0:k1] = (p.mT @ d_o).unflatten(0, (-1, group)).sum(1)


_OPTIONS = "Tensor pieces, float scale, bool causal, int window, float softcap) -> ()"
FORWARD = ops.Operator(
    "segment_attention_forward(Tensor(a!) out, Tensor(b!) lse, Tensor query, Tensor key, "
    f"Tensor value, {_OPTIONS}",
    _forward,
    engines={"cpp": ops.takes(*DTYPES)},
)
BACKWARD = ops.Operator(
    "segment_attention_backward(Tensor(a!) d_query, Tensor(b!) d_key, Tensor(c!) d_value, "
    f"Tensor d_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_OPTIONS}",
    _backward,
    engines={"cpp": ops.takes(*DTYPES)},
)


def is_ahead() -> bool:
    """Whether `impl="auto"` takes these kernels: where they were timed they take less time than
    torch's, with AVX2 half of it and with AVX-512 on processors that are not Intel's a third where
    attention is causal (NOTES.md)."""
    isa = _native.cpu_isa() or ""
    # torch's kernel multiplies by MKL in fp32, in which its backward for bf16 is called as well,
    # and MKL keeps to AVX2 on processors that are not Intel's
    return isa == "avx2" or (isa.startswith("avx512") and not _native.is_intel())


def _options(call: AttentionCall) -> tuple[Tensor, float, bool, int, float]:
    window = 0 if call.window is None else min(call.window, call.length)
    return call.pieces.table, call.scale, call.causal, window, call.softcap or 0.0


def forward(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> tuple[Tensor, ...]:
    """Computes out and lse."""
    out, lse = call.new_outputs(query, value)
    FORWARD.native(out.transpose(1, 2), lse, query, key, value, *_options(call))
    return out, lse


def backward(tensors: tuple[Tensor, ...], call: AttentionCall, grads: tuple[Tensor, ...]) -> None:
    """Fills the gradients of query, key and value; those of keys without queries stay."""
    d_out, query, key, value, out, lse = tensors
    BACKWARD.native(*grads, d_out, query, key, value, out, lse, *_options(call))
