"""Torch's flash attention kernels as engines of `segment_attention`.

Forward takes q, k, v (R, H, T, D) and gives out (R, T, H, D) and lse (R, H, T); backward takes out
and its gradient as (R, H, T, D) too. The CPU kernel knows a causal segment and a segment without a
mask, one a call; a window that binds becomes bands of queries with a small additive mask, the same
one for all but the first. The CUDA kernel computes a whole batch a call, and knows segments,
windows and dropout itself. Both share key heads among query heads, and neither stores scores.

Their backward takes out and lse as arguments, and with sinks they are the output and the lse with
sinks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastft.attention.attention_tiles import AttentionCall, Tile

_BAND = (128, 512)  # queries of one call where a window binds: at least, at most


def _cpu_tiles(
    call: AttentionCall, query: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Tile, dict[str, Any]]]:
    """Yields the kernel's calls in `dtype`, a tile and its arguments each."""
    window = call.window

    def block(keys: int) -> int:
        if window is None or keys <= window:
            return sys.maxsize
        return min(max(window, _BAND[0]), _BAND[1])

    masks: dict[tuple[int, int, int], Tensor | None] = {}
    for tile in call.tiles(block):
        square = tile.rows == tile.columns and (window is None or tile.rows <= window)
        causal, mask = call.causal and square, None
        if not causal:
            shape = (tile.rows, tile.columns, tile.shift)
            if shape not in masks:
                masks[shape] = _additive(call.visible(tile, query.device), dtype)
            mask = masks[shape]
        yield tile, {"dropout_p": 0.0, "is_causal": causal, "attn_mask": mask, "scale": call.scale}


def _additive(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns what is added to scores: 0, and minus infinity for what a query may not see."""
    if visible is None:
        return None
    return visible.new_zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)


def cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall
) -> tuple[Tensor, ...]:
    """Computes out and lse."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = call.new_outputs(query, value)
    for tile, options in _cpu_tiles(call, query, query.dtype):
        row = slice(tile.row, tile.row + 1)
        q, k, v = query[row, :, tile.queries], key[row, :, tile.keys], value[row, :, tile.keys]
        part, lse[row, :, tile.queries] = kernel(q, k, v, **options)
        out[row, tile.queries] = part.transpose(1, 2)
    return out, lse


def cpu_backward(
    tensors: tuple[Tensor, ...], call: AttentionCall, grads: tuple[Tensor, ...]
) -> None:
    """Fills the gradients of query, key and value, a segment at a time in at least float32; those
    of keys and values are zeros where a window binds."""
    d_out, query, key, value, out, lse = tensors
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    # In 16 bits the kernel would round the gradient of a key and value for each block of queries,
    # and for each query head that shares them. In float32 it is as fast, and on a processor that
    # emulates 16-bit products many times faster.
    wide = lse.dtype
    for tile, options in _cpu_tiles(call, query, wide):
        row = slice(tile.row, tile.row + 1)
        q, k, v = query[row, :, tile.queries], key[row, :, tile.keys], value[row, :, tile.keys]
        d_o, o = d_out[row, :, tile.queries], out[row, :, tile.queries]
        parts = kernel(
            *(tensor.to(wide) for tensor in (d_o, q, k, v, o)), lse[row, :, tile.queries], **options
        )
        for grad, part, tokens in zip(
            grads, parts, (tile.queries, tile.keys, tile.keys), strict=True
        ):
            if call.window is None or grad is grads[0]:
                grad[row, :, tokens] = part
            else:  # neighbouring bands share keys
                grad[row, :, tokens] += part


def _cuda_options(call: AttentionCall) -> dict[str, Any]:
    """The arguments of the CUDA kernel that both directions take; -1 is no window."""
    left = -1 if call.window is None else call.window - 1
    return {
        "scale": call.scale,
        "window_size_left": left,
        "window_size_right": 0 if call.causal else left,
    }


def _flat(tensor: Tensor) -> Tensor:
    """(R, H, T, D) as (R T, H, D)."""
    return tensor.transpose(1, 2).flatten(0, 1)


def cuda_forward(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall
) -> tuple[Tensor, ...]:
    """Computes out, lse, and two tensors that say where dropout's random numbers came from."""
    out, lse, *random, _ = torch.ops.aten._flash_attention_forward(
        *(_flat(tensor) for tensor in (query, key, value)),
        *call.boundaries(query.device),
        call.dropout,
        call.causal and call.window is None,
        False,
        **_cuda_options(call),
    )
    rows = query.shape[0]
    return out.unflatten(0, (rows, -1)), lse.unflatten(1, (rows, -1)).transpose(0, 1), *random


def cuda_backward(
    tensors: tuple[Tensor, ...], saved: tuple[Tensor, ...], call: AttentionCall
) -> tuple[Tensor, ...]:
    """Computes the gradients of query, key and value; `saved` is what the forward gave after
    lse."""
    d_out, query, key, value, out, lse = tensors
    parts = torch.ops.aten._flash_attention_backward(
        *(_flat(tensor) for tensor in (d_out, query, key, value, out)),
        lse.transpose(0, 1).flatten(1).contiguous(),
        *call.boundaries(query.device),
        call.dropout,
        call.causal and call.window is None,
        *saved,
        **_cuda_options(call),
    )
    return tuple(part.unflatten(0, (query.shape[0], -1)).transpose(1, 2) for part in parts)


def flash_attn(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    """flash-attn's own function, which knows softcap; differentiable. (R, T, H, D)."""
    from flash_attn import flash_attn_varlen_func

    options = _cuda_options(call)
    out = flash_attn_varlen_func(
        *(_flat(tensor) for tensor in (query, key, value)),
        *call.boundaries(query.device),
        dropout_p=call.dropout,
        softmax_scale=call.scale,
        causal=call.causal,
        window_size=(options["window_size_left"], options["window_size_right"]),
        softcap=call.softcap or 0.0,
    )
    return out.unflatten(0, (query.shape[0], -1))
