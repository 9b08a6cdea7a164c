"""torch's CUDA flash attention for variable lengths, in plain torch: what runs on a CPU in the
kernels' place.

The operators have the schemas of the torch that is installed, so that torch itself refuses a call
which the real ones would refuse; what the kernels ask beyond a schema is asserted. float64 is taken
too, for exact comparisons.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

NAMES = ("_flash_attention_forward", "_flash_attention_backward")
CALLS: list[dict[str, Any]] = []  # what the forward was called with, but for its tensors
# what the forward says of its random numbers, and the backward must be told again
_RANDOM = (11, 12)
_library = torch.library.Library("flash_kernels", "DEF")


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int]
) -> None:
    assert q.dtype == k.dtype == v.dtype and q.dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float64,
    )
    assert q.shape[2] == k.shape[2] == v.shape[2] <= 256 and q.shape[2] % 8 == 0
    assert q.shape[1] % k.shape[1] == 0 and k.shape[:2] == v.shape[:2]
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
    for cu, tokens, most in ((cu_q, q, longest[0]), (cu_k, k, longest[1])):
        assert (
            cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0 and cu[-1] == len(tokens)
        )
        assert cu.diff().min() >= 0 and cu.diff().max() <= most, (
            "max_q or max_k is less than a segment has"
        )


def _segments(cu_q: Tensor, cu_k: Tensor) -> Any:
    return zip(
        *(itertools.starmap(slice, itertools.pairwise(cu.tolist())) for cu in (cu_q, cu_k)),
        strict=True,
    )


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float, left: int, right: int) -> Tensor:
    # the last query has the last key
    behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    hidden = (
        (behind > left) & (left >= 0) | (-behind > right) & (right >= 0) | (behind < 0) & causal
    )
    return (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(hidden, -torch.inf)


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int = -1,
    window_size_right: int = -1,
) -> tuple[Tensor, ...]:
    _check(query, key, value, cum_seq_q, cum_seq_k, (max_q, max_k))
    sides = {"window_size_left": window_size_left, "window_size_right": window_size_right}
    lengths = {"max_q": max_q, "max_k": max_k}
    CALLS.append({**lengths, "dropout": dropout_p, "causal": is_causal, "scale": scale, **sides})
    q, k, v = _wide(query, key, value)
    k, v = (tensor.repeat_interleave(q.shape[1] // key.shape[1], 1) for tensor in (k, v))
    out, lse = torch.zeros_like(q), q.new_empty(q.shape[1], len(q))
    for at, to in _segments(cum_seq_q, cum_seq_k):
        scores = _scores(q[at], k[to], is_causal, scale, window_size_left, window_size_right)
        lse[:, at] = scores.logsumexp(-1)
        out[at] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[to])
    return out.to(query.dtype), lse, *map(torch.tensor, _RANDOM), torch.empty(0)


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int = -1,
    window_size_right: int = -1,
) -> tuple[Tensor, ...]:
    _check(query, key, value, cum_seq_q, cum_seq_k, (max_q, max_k))
    assert (rng_state.item(), unused.item()) == _RANDOM
    assert (
        logsumexp.shape == (query.shape[1], len(query))
        and logsumexp.is_contiguous()
        and grad_out.stride(-1) == 1
    )
    assert logsumexp.dtype == torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    d_out, q, k, v, o = _wide(grad_out, query, key, value, out)
    d_q, d_k, d_v = (torch.zeros_like(tensor) for tensor in (q, k, v))
    for at, to in _segments(cum_seq_q, cum_seq_k):
        keys, values = (tensor[to].repeat_interleave(group, 1) for tensor in (k, v))
        scores = _scores(q[at], keys, is_causal, scale, window_size_left, window_size_right)
        p = (scores - logsumexp[:, at, None]).exp()
        delta = (d_out[at] * o[at]).sum(-1).T
        d_s = p * (torch.einsum("qhd,khd->hqk", d_out[at], values) - delta[..., None]) * scale
        d_q[at] = torch.einsum("hqk,khd->qhd", d_s, keys)
        d_k[to] = torch.einsum("hqk,qhd->khd", d_s, q[at]).unflatten(1, (-1, group)).sum(2)
        d_v[to] = torch.einsum("hqk,qhd->khd", p, d_out[at]).unflatten(1, (-1, group)).sum(2)
    return d_q.to(query.dtype), d_k.to(key.dtype), d_v.to(value.dtype)


KERNELS = dict(zip(NAMES, (_flash_attention_forward, _flash_attention_backward), strict=True))
for _name, _kernel in KERNELS.items():
    _library.define(str(getattr(torch.ops.aten, _name).default._schema).removeprefix("aten::"))
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


def install(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts them in the place of torch's own; returns the list of what their forward is called with
    from now on."""
    CALLS.clear()
    for name in NAMES:
        monkeypatch.setattr(torch.ops.aten, name, getattr(torch.ops.flash_kernels, name))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return CALLS
