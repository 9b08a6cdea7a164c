"""fastft's own CPU kernel as an engine of `segment_attention`.

Forward takes q, k, v (R, H, T, D), in float32 or bfloat16, and gives out (R, T, H, Dv) and lse
(R, H, T); backward takes out and its gradient as (R, H, T, Dv). All pieces of a batch are one call,
with causality, a window and softcap; scores are float32, a block of some thousand at a time, and
products read their factors where these lie. What the query heads of a shared key head give to its
gradients is added up in float32, in one order.

Bytes moved: q, k, v and out once, keys and values again for each 48 queries (64 with AVX-512) that
see them; backward writes and reads 4 bytes (D + Dv) for each key and query head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import _native, ops
from fastft.attention.attention_tiles import AttentionCall
from fastft.foreign.compiling import constant_when_compiled

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
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> None:
    for row, q0, q1, k0, k1 in pieces.tolist():
        q, k, v = query[row, :, q0:q1], key[row, :, k0:k1], value[row, :, k0:k1]
        scores = _piece_scores(q.float(), k.float(), scale, causal, window, softcap)
        total = scores.logsumexp(-1)
        p = (scores - total[..., None]).exp()
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
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> None:
    for row, q0, q1, k0, k1 in pieces.tolist():
        d_o, o = d_out[row, :, q0:q1].float(), out[row, :, q0:q1].float()
        with torch.enable_grad():
            parts = (query[row, :, q0:q1], key[row, :, k0:k1])
            q, k = (part.detach().float().requires_grad_() for part in parts)
            scores = _piece_scores(q, k, scale, causal, window, softcap)
        p = (scores.detach() - lse[row, :, q0:q1, None]).exp()
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
    samples={"float16": (torch.float16,)},
)
BACKWARD = ops.Operator(
    "segment_attention_backward(Tensor(a!) d_query, Tensor(b!) d_key, Tensor(c!) d_value, "
    f"Tensor d_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_OPTIONS}",
    _backward,
    engines={"cpp": ops.takes(*DTYPES)},
    samples={"float16": (torch.float16,)},
)


@constant_when_compiled
def is_ahead(dtype: torch.dtype) -> bool:
    """Whether these kernels are known to be faster than torch's on this machine."""
    isa = _native.cpu_isa()
    # torch has bf16 products of its own where there are units for them
    return isa is not None and isa.startswith("avx") and (isa, dtype) != ("avx512bf16", DTYPES[1])


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
