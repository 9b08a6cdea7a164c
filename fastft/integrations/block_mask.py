"""A mask of T x T for models with attention code of their own.

Code that does not call transformers' attention interface still asks transformers for its mask, and
looks the builder up by the name of the attention implementation. A name that nobody else knows, put
into the model's configuration, thus brings this mask where the model's own code adds it to the
scores:

    mask[r, q, k] = 0 if q and k are of one segment and the model's rule (causal, window) allows it,
    else finfo.min

Bytes: R * T * T elements of the model's dtype, where `attn_implementation=
"fastft"` needs none; for models alone that cannot have that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastft.attention.segments import Segments, packed_attention, segments_under_way
from fastft.integrations.implementations import attention_configs, implementation_restored

NAME = "fastft_block_mask"


@contextlib.contextmanager
def block_mask(model: nn.Module) -> Iterator[None]:
    """`fastft.packed_attention(model)` with the mask. Whether it is exact, `check_packing` inside
    the context tells."""
    _register()
    with implementation_restored(model), packed_attention(model):
        for config in attention_configs(model):
            config._attn_implementation_internal = NAME
        yield


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask

    def mask(
        *, batch_size: int, q_length: int, mask_function: Callable[..., Any], **kwargs: Any
    ) -> Tensor | None:
        segments = segments_under_way()
        if segments is not None:
            mask_function = _within_segments(mask_function, segments, batch_size, q_length)
            kwargs["allow_is_bidirectional_skip"] = False
        return eager_mask(
            batch_size=batch_size, q_length=q_length, mask_function=mask_function, **kwargs
        )

    AttentionMaskInterface.register(NAME, mask)
    AttentionInterface.register(NAME, sdpa_attention_forward)


def _within_segments(
    rule: Callable[..., Any], segments: Segments, rows: int, length: int
) -> Callable[..., Any]:
    """`rule`, a mask function of (row, head, query, key), inside each segment alone."""
    end = segments.bounds_q[-1]
    if end != rows * length:
        raise ValueError(
            f"the batch has {rows} x {length} tokens, its cu_seq_lens_q ends with {end}"
        )
    segment = torch.repeat_interleave(segments.cu_seqlens_q.diff(), output_size=end).view(
        rows, length
    )

    def within(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same: Tensor = segment[row, query] == segment[row, key]
        return same & rule(row, head, query, key)

    return within
