"""`attn_implementation="fastft"`: attention within packed sequences, for transformers' models.

Two functions are registered with transformers. The attention function asks `segments_of` for the
batch's boundaries and calls `segment_attention`; a batch without boundaries goes to transformers'
own sdpa attention. The mask function builds no mask for packed batches: a mask has T x T elements,
and it knows only of sequences which the model's code tells it.

What the mask would have said is known from its mask function: causal or not, a sliding window,
chunks. Where it says more (tokens of an image that see each other), or was built already, its part
of each segment is used, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.attention.encoder_rows import flattened
from fastft.attention.segment_attention import segment_attention
from fastft.attention.segments import Segments, segments_of, segments_under_way
from fastft.data.host_boundaries import note

NAME = "fastft"

# the names in transformers.masking_utils of mask functions whose meaning `_Pattern` holds; what
# each kind of window is wider than its size, as |i - j| < window
_WINDOWS = {"sliding_window_overlay": 0, "sliding_window_bidirectional_overlay": 1}
_CHUNKS, _CAUSAL = "chunked_overlay", "causal_mask_function"
_PACKED, _REMAPPED = "packed_sequence_mask_function", "remap_positions_for_packed_sequence"
_BLOCKS = "blockwise_overlay"  # tokens of an image, which see each other
_UNDERSTOOD = {
    *_WINDOWS,
    *(_CHUNKS, _PACKED, _CAUSAL),
    *("bidirectional_mask_function", "and_masks", _REMAPPED),
}

# keyword arguments of attention calls in transformers that say which keys are seen or what is added
# to the scores
_NOT_COMPUTED = (
    "indices",
    "block_indices",
    "alibi",
    "attention_bias",
    "attn_bias",
    "head_mask",
    "output_attentions",
)


@dataclass(frozen=True, eq=False)
class _Pattern:
    """Stands for a mask that a packed batch does not need, or must not get."""

    causal: bool
    window: int | None
    chunk: int | None
    # the mask itself, for a batch that turns out not to be packed
    build: Callable[[], Tensor | None]
    complete: bool = True  # False where the mask says more, and says it of positions in the row


def _name(function: Any) -> str:
    """The name of a mask function, or of the function that made it."""
    name: str = getattr(function, "__qualname__", type(function).__name__)
    return name.partition(".")[0]


def _parts(function: Any) -> list[Callable[..., Any]]:
    """The mask functions that a mask function is made of, found in its closure."""
    inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    parts = [part for one in inside for part in (one if isinstance(one, tuple) else (one,))]
    return [part for part in parts if callable(part)]


def _names(function: Any) -> set[str]:
    """The names of a mask function and of all that it is made of."""
    return {_name(function)}.union(*map(_names, _parts(function)))


def _counting_in_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """A packed row's mask function without the step that turns places in the row into places in
    their sequences: for `blockwise_overlay`, which looks places in the row up and would look up
    those of the first sequence. Causality and windows, which compare two places, stay as they are
    inside a sequence."""
    from transformers import masking_utils

    name, parts = _name(function), _parts(function)
    if name == _REMAPPED:
        return _counting_in_rows(parts[0])
    if name in ("and_masks", "or_masks"):
        joined: Callable[..., Any] = getattr(masking_utils, name)(*map(_counting_in_rows, parts))
        return joined
    return function


def _pattern(
    names: set[str], local_size: int | None, complete: bool, build: Callable[[], Tensor | None]
) -> _Pattern:
    """Reads what a mask function with these names says."""
    windows = [more for name, more in _WINDOWS.items() if name in names]
    local = len(windows) + (_CHUNKS in names)
    complete = (
        complete and names <= _UNDERSTOOD and local <= 1 and (local == 0 or local_size is not None)
    )
    window = local_size + windows[0] if windows and local_size is not None else None
    return _Pattern(
        _CAUSAL in names, window, local_size if _CHUNKS in names else None, build, complete
    )


def fastft_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """The mask function: transformers' sdpa mask, except for packed batches.

    A batch is packed if a model with `keep_segments` runs it, or if its positions say so and its
    attention calls get the boundaries as keyword arguments. For these it returns None where only
    causality would be in the mask, else an object that stands for a window or for chunks.
    """
    from transformers.masking_utils import sdpa_mask

    names, known = _names(mask_function), segments_under_way() is not None
    if {_BLOCKS, _REMAPPED} <= names and _CHUNKS not in names:
        mask_function = _counting_in_rows(mask_function)

    def build() -> Tensor | None:
        return sdpa_mask(
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )

    pattern = _pattern(names, local_size, attention_mask is None, build)
    binds = any(size is not None and size < kv_length for size in (pattern.window, pattern.chunk))
    # a mask of chunks counts from the first token of a row: right only where positions made it
    # count from a segment's
    if _CHUNKS in names and binds and not (_PACKED in names and not pattern.complete):
        return pattern
    if not pattern.complete or not (known or _PACKED in names):
        return build()
    return pattern if binds or not known else None


def _refuse(module: nn.Module, kwargs: dict[str, Any], key: Tensor, sinks: Tensor | None) -> None:
    """Raises NotImplementedError for what would change the result and is not computed here."""
    for name, value in kwargs.items():
        bias = (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.ndim == 4
            and value.shape[3:] == key.shape[2:3]
        )
        if bias or (name in _NOT_COMPUTED and value is not None and value is not False):
            raise NotImplementedError(
                f'attn_implementation="fastft" does not know the argument {name} of '
                f"{type(module).__name__} and would compute something else without it: use another "
                "attn_implementation, and attention=False in a callback of fastft's"
            )
    if sinks is None and isinstance(getattr(module, "sinks", None), Tensor):
        raise NotImplementedError(
            f"{type(module).__name__} has sinks, but does not hand them to its attention function"
        )


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Casts to autocast's dtype where it is on, as it does for torch's own attention."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _whole_rows(rows: int, queries: int, keys: int, device: torch.device) -> Segments:
    """Makes every row a segment, on the device where that is read, so that nothing waits."""

    def ends(tokens: int) -> Tensor:
        made = torch.arange(rows + 1, dtype=torch.int32, device=device) * tokens
        note(made, [row * tokens for row in range(rows + 1)])
        return made

    of_queries = ends(queries)
    return Segments(of_queries, of_queries if keys == queries else ends(keys), queries, keys)


def _unpacked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    rule: dict[str, Any],
) -> Tensor:
    """Computes a batch that is not packed, with the softcap and sinks that sdpa does not know."""
    length, bias = query.shape[2], rule["bias"]
    causal = causal and mask is None and length > 1
    if causal and key.shape[2] > length:  # a static cache that holds these tokens alone
        key, value = key[:, :, :length], value[:, :, :length]
        bias = None if bias is None else bias[..., :length]
    rows = _whole_rows(query.shape[0], length, key.shape[2], query.device)
    query, key, value = _autocast(query, key, value)
    return segment_attention(
        query, key, value, rows, causal=causal, mask=mask, **{**rule, "bias": bias}
    )


def fastft_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | _Pattern | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function, as models call it.

    query (R, H, T, D), key (R, G, U, D) and value (R, G, U, Dv) give (R, T, H, Dv).
    `attention_mask` is what `fastft_mask` returned, or a mask (R or 1, H or 1, T, U) that holds
    causality and windows; `is_causal` is `module.is_causal` by default, else True; `s_aux` are
    sinks (H,); `kwargs` has the boundaries, if the model hands them on. There are no attention
    weights to return.

    Raises:
        NotImplementedError: an argument that would change the result and is not computed.
        ValueError: boundaries that do not cover the tokens.
    """
    sinks = s_aux if s_aux is not None else kwargs.pop("sinks", None)
    _refuse(module, kwargs, key, sinks)
    segments = segments_of(module, {**kwargs, "is_causal": is_causal})
    rule: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap,
        "sinks": sinks,
        "bias": position_bias,
        "dropout": dropout,
    }
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if segments is None:
        mask = attention_mask.build() if isinstance(attention_mask, _Pattern) else attention_mask
        if softcap is not None or sinks is not None:
            return _unpacked(query, key, value, mask, causal, rule), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        kwargs |= {"scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, **kwargs)
    rows = len(query)
    if segments.laid:
        if isinstance(attention_mask, Tensor) or position_bias is not None:
            raise NotImplementedError(
                f"{type(module).__name__} has a mask or a bias for the states of an encoder that "
                "are laid end to end: train it on padded batches"
            )
        query = flattened(query, segments.bounds_q[-1])
        key, value = (flattened(one, segments.bounds_k[-1]) for one in (key, value))
    if segments.alike and key.shape[2] != query.shape[2]:
        raise NotImplementedError(
            f"{type(module).__name__} has {key.shape[2]} keys for the {query.shape[2]} tokens of a "
            "packed row: packed batches cannot be combined with a cache of earlier tokens or with "
            "prefix tuning"
        )
    seen = _seen(attention_mask, causal, sliding_window)
    query, key, value = _autocast(query, key, value)
    out = segment_attention(query, key, value, segments, **seen, **rule)
    return out.unflatten(1, (rows, -1)).squeeze(0) if segments.laid else out, None


def _seen(mask: Tensor | _Pattern | None, causal: bool, window: int | None) -> dict[str, Any]:
    """Returns which keys of its segment a query sees, as arguments of `segment_attention`."""
    if mask is None:
        return {"causal": causal, "window": window}
    if isinstance(mask, Tensor):
        return {"causal": False, "mask": mask}
    if not mask.complete:
        raise NotImplementedError(
            "packed batches and a padding mask cannot be combined where attention is chunked"
        )
    return {"causal": mask.causal, "window": mask.window, "chunk": mask.chunk}


def register_attention() -> None:
    """Makes `attn_implementation="fastft"` known to transformers; calling it again does nothing.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if NAME not in AttentionInterface._global_mapping:
        # boundaries differ from batch to batch: torch.compile would compile each anew
        AttentionInterface.register(NAME, torch.compiler.disable(fastft_attention))
        AttentionMaskInterface.register(NAME, fastft_mask)
