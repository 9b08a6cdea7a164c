"""Attention within the segments of packed rows, with memory linear in the tokens.

    s[i, j] = cap(scale q[i] . k[j]) + bias[i, j]
    lse[i]  = log(sum_j exp(s[i, j]) + exp(sink))
    out[i]  = sum_j p[i, j] v[j]                    p = exp(s - lse)

for the j in the segment of i, with j <= i if causal, |i - j| < window. cap(x) is softcap tanh(x /
softcap); without a sink exp(sink) is 0. Backward needs no matrix of the forward, only q, k, v, out
and lse:

    delta = dout . out    ds = p (dout v^T - delta)    dbias = ds
    dq = scale ds k       dk = scale ds^T q            dv = p^T dout
    dsink = -sum_i exp(sink - lse[i]) delta[i]

A kernel that knows no sinks still serves: out sigmoid(lse - sink) and log(exp(lse) + exp(sink)) are
the output and the lse with them, and its backward is right for whatever out and lse it is given.

Engines: fastft's own CPU kernel, a batch a call; torch's CPU flash attention kernel, a segment a
call (a window that binds: a band of queries a call); torch's CUDA flash attention kernel for
variable lengths; flash-attn, if installed, for softcap on CUDA; and blocks of queries in plain
torch, on any device, for bias, masks, dropout on a CPU, and for what else the kernels lack.

Bytes moved: q, k, v and out, each 2 or 4 bytes x R T H D, and lse; the scores of one block live in
cache.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import ops
from fastft.attention import attention_cpp, attention_flash
from fastft.attention.attention_tiles import AttentionCall, Tile, mask_scores, part_of, pieces_of
from fastft.attention.segments import Segments

_BLOCK_SCORES = 1 << 19  # scores of one block of queries, all heads: 2 MiB in float32


def _attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    call: AttentionCall,
) -> Tensor:
    """Computes a segment at a time in plain torch, all its scores at once, for autograd."""
    out = []
    group, generator = query.shape[1] // key.shape[1], call.generator(query.device)
    for tile in call.tiles(lambda keys: sys.maxsize):
        q, k, v = (
            query[tile.row, :, tile.queries],
            key[tile.row, :, tile.keys],
            value[tile.row, :, tile.keys],
        )
        scores = q @ k.repeat_interleave(group, 0).mT * call.scale
        if call.softcap is not None:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        if bias is not None:
            scores = scores + part_of(bias, tile)
        scores = mask_scores(call, tile, scores.clone())
        if sinks is not None:
            scores = torch.cat(
                [scores, sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)], -1
            )
        # a query that a mask leaves no key has p = 0, not NaN
        blind = scores.isneginf().all(-1, keepdim=True)
        p = scores.masked_fill(blind, 0.0).softmax(
            -1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32
        )
        p = p.masked_fill(blind, 0.0)[..., : k.shape[1]].to(v.dtype)
        if generator is not None:
            p = p * _kept(p, call.dropout, generator)
        out.append((p @ v.repeat_interleave(group, 0)).transpose(0, 1))
    flat = torch.cat(out) if out else query.new_empty((0, query.shape[1], value.shape[3]))
    return flat.reshape(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _kept(p: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """Draws what dropout multiplies the probabilities with: 0, or 1 / (1 - dropout)."""
    uniform = torch.rand(p.shape, generator=generator, device=p.device)
    return (uniform >= dropout).to(p.dtype).div_(1 - dropout)


def _block(heads: int) -> Callable[[int], int]:
    """Returns how many queries of a piece with so many keys are computed at once."""
    return lambda keys: max(1, _BLOCK_SCORES // (heads * keys))


def _scores(
    call: AttentionCall, tile: Tile, q: Tensor, k: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Computes s of a tile (H, queries, keys) from q (G, H/G x queries, D) and k (G, keys, D), and
    the capped scores before bias and masks, which backward needs."""
    scores = ((q * call.scale) @ k.mT).unflatten(1, (-1, tile.rows)).flatten(0, 1)
    capped = None
    if call.softcap is not None:
        capped = scores.div_(call.softcap).tanh_().mul_(call.softcap)
        scores = capped.clone()
    if bias is not None:
        scores.add_(part_of(bias, tile))
    return mask_scores(call, tile, scores), capped


def _by_key_head(
    tensor: Tensor, tile: Tile, part: slice, groups: int, dtype: torch.dtype
) -> Tensor:
    """Takes the heads of a tile's tokens, by the key head that they share: (G, H/G x tokens, D)."""
    # one product for all query heads of a key head, without a copy of keys and values for each
    return tensor[tile.row, :, part].to(dtype).unflatten(0, (groups, -1)).flatten(1, 2)


def _blocks_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, call: AttentionCall
) -> tuple[Tensor, ...]:
    """Computes out and lse, a block of queries at a time; its scores live in cache."""
    out, lse = call.new_outputs(query, value)
    heads, groups, generator = query.shape[1], key.shape[1], call.generator(query.device)
    for tile in call.tiles(_block(heads)):
        q, k, v = (
            _by_key_head(tensor, tile, part, groups, lse.dtype)
            for tensor, part in ((query, tile.queries), (key, tile.keys), (value, tile.keys))
        )
        scores, _ = _scores(call, tile, q, k, bias)
        total = scores.logsumexp(-1)
        # a query that a mask leaves no key has p = 0, not NaN
        p = scores.sub_(total.clamp(min=torch.finfo(total.dtype).min)[..., None]).exp_()
        if generator is not None:
            p *= _kept(p, call.dropout, generator)
        lse[tile.row, :, tile.queries] = total
        mixed = p.unflatten(0, (groups, -1)).flatten(1, 2) @ v
        out[tile.row, tile.queries] = (
            mixed.unflatten(1, (heads // groups, -1)).flatten(0, 1).transpose(0, 1)
        )
    return out, lse


def _blocks_backward(
    tensors: tuple[Tensor, ...],
    bias: Tensor | None,
    d_bias: Tensor | None,
    call: AttentionCall,
    grads: tuple[Tensor, ...],
) -> None:
    """Fills `grads` and `d_bias`: computes the scores of each block again, and draws the same
    dropout in the same order."""
    d_out, query, key, value, out, lse = tensors
    d_query, d_key, d_value = grads
    heads, groups, generator = query.shape[1], key.shape[1], call.generator(query.device)
    for tile in call.tiles(_block(heads)):
        q, k, v, d_o, o = (
            _by_key_head(tensor, tile, part, groups, lse.dtype)
            for tensor, part in (
                (query, tile.queries),
                (key, tile.keys),
                (value, tile.keys),
                (d_out, tile.queries),
                (out, tile.queries),
            )
        )
        scores, capped = _scores(call, tile, q, k, bias)
        total = lse[tile.row, :, tile.queries].clamp(min=torch.finfo(lse.dtype).min)
        p = scores.sub_(total[..., None]).exp_()
        d_p = (d_o @ v.mT).view_as(p)
        kept = p
        if generator is not None:
            factor = _kept(p, call.dropout, generator)
            d_p *= factor
            kept = p * factor
        d_value[tile.row, :, tile.keys] += kept.unflatten(0, (groups, -1)).flatten(1, 2).mT @ d_o
        d_s = d_p.sub_((d_o * o).sum(-1).view_as(total)[..., None]).mul_(p)
        if d_bias is not None:
            # a view: where the bias is broadcast, tiles add up in it
            part = part_of(d_bias, tile)
            part += d_s.sum_to_size(part.shape)
        if capped is not None:
            d_s *= 1 - capped.div_(call.softcap or 1.0).square_()
        d_s = d_s.unflatten(0, (groups, -1)).flatten(1, 2)
        d_q = (d_s @ k).unflatten(1, (heads // groups, -1)).flatten(0, 1)
        d_query[tile.row, :, tile.queries] = d_q * call.scale
        d_key[tile.row, :, tile.keys] += (d_s.mT @ q) * call.scale


def _dense(tensor: Tensor) -> Tensor:
    """Puts the elements of a head side by side: the flash kernels do not ask for the stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _gradients_to_fill(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, summed_in: Any
) -> tuple[Tensor, ...]:
    """Allocates the gradients of query, key and value; `summed_in` is the dtype of parts that add
    up in those of keys and values, None where each is written once."""
    # a segment of keys without queries is never written
    zeros = summed_in is not None or not call.segments.alike
    like = torch.zeros_like if zeros else torch.empty_like
    return torch.empty_like(query), like(key, dtype=summed_in), like(value, dtype=summed_in)


_FORWARD = {
    "cpp": attention_cpp.forward,
    "flash_cpu": attention_flash.cpu_forward,
    "flash_cuda": attention_flash.cuda_forward,
}


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        call: AttentionCall,
        engine: str,
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            if engine == "blocks":
                out, lse, *saved = _blocks_forward(query, key, value, bias, call)
            else:
                out, lse, *saved = _FORWARD[engine](query, key, value, call)
            if sinks is not None:
                sink = sinks.to(lse.dtype)[:, None]
                out.mul_(torch.sigmoid(lse - sink).transpose(1, 2)[..., None])
                lse = torch.logaddexp(lse, sink)
        ctx.save_for_backward(query, key, value, sinks, bias, out, lse, *saved)
        ctx.call, ctx.engine = call, engine
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, bias, out, lse, *saved = ctx.saved_tensors
        call, d_out = ctx.call, _dense(d_out)
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if ctx.needs_input_grad[4] else None
        tensors = (d_out.transpose(1, 2), query, key, value, out.transpose(1, 2), lse)
        with torch.autocast(query.device.type, enabled=False):
            if ctx.engine == "flash_cuda":
                grads = attention_flash.cuda_backward(tensors, tuple(saved), call)
            else:
                bands = ctx.engine == "flash_cpu" and call.window is not None
                summed = bands or ctx.engine == "blocks"
                grads = _gradients_to_fill(query, key, value, call, lse.dtype if summed else None)
                if ctx.engine == "blocks":
                    _blocks_backward(tensors, bias, d_bias, call, grads)
                elif ctx.engine == "cpp":
                    attention_cpp.backward(tensors, call, grads)
                else:
                    attention_flash.cpu_backward(tensors, call, grads)
            d_sinks = None
            if ctx.needs_input_grad[3]:
                delta = (d_out * out).sum(-1, dtype=lse.dtype).transpose(1, 2)
                d_sinks = (
                    -((sinks.to(lse.dtype)[:, None] - lse).exp_() * delta)
                    .sum((0, 2))
                    .to(sinks.dtype)
                )
        return (
            grads[0],
            grads[1].to(key.dtype),
            grads[2].to(value.dtype),
            d_sinks,
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


class _Asked(NamedTuple):
    """A call as the engines' rules look at it."""

    dtype: torch.dtype = torch.bfloat16
    size: int = 64  # of a head of queries and keys
    value_size: int = 64
    masked: bool = False  # or biased
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    by_name: bool = False  # the engine is asked for


def _cpp(device: torch.device, asked: _Asked) -> str | None:
    if asked.masked or asked.dropout:
        return f"its kernel takes {'neither bias nor mask' if asked.masked else 'no dropout'}"
    if asked.dtype not in attention_cpp.DTYPES:
        return f"its kernel takes float32 and bfloat16, got {asked.dtype}"
    if asked.by_name or attention_cpp.is_ahead():
        return None
    return "it has not been compared with torch's on such a processor"


def _any_flash(device: torch.device, asked: _Asked) -> str | None:
    if asked.masked:
        return "its kernel takes neither bias nor mask"
    if asked.size != asked.value_size:
        return (
            f"its kernel needs values of the queries' head size {asked.size}, got "
            f"{asked.value_size}"
        )
    return None


def _flash_cpu(device: torch.device, asked: _Asked) -> str | None:
    missing = "softcap" if asked.softcap else "dropout" if asked.dropout else None
    return _any_flash(device, asked) or (missing and f"its kernel knows no {missing}")


def _flash_on_gpu(device: torch.device, asked: _Asked) -> str | None:
    if asked.dtype not in (torch.float16, torch.bfloat16) or asked.size % 8 or asked.size > 256:
        return (
            f"its kernel takes float16 and bfloat16 with head sizes 8, 16 .. 256, got "
            f"{asked.dtype}, {asked.size}"
        )
    major, minor = ops.capability(device)
    # backward's tiles are larger than these chips' shared memory; whether there will be a backward
    # is not known under gradient checkpointing, whose second forward must take the engine of the
    # first
    small = (major == 8 and minor >= 6) or major == 12
    if small and (192 < asked.size <= 224 or (asked.size > 224 and asked.dropout)):
        case = f"head size {asked.size}{' with dropout' if asked.dropout else ''}"
        return f"its kernel has no backward for {case} at compute capability {major}.{minor}"
    return _any_flash(device, asked)


def _flash_cuda(device: torch.device, asked: _Asked) -> str | None:
    return "its kernel knows no softcap" if asked.softcap else _flash_on_gpu(device, asked)


def _flash_attn(device: torch.device, asked: _Asked) -> str | None:
    return "flash-attn takes no sinks" if asked.sinks else _flash_on_gpu(device, asked)


def _no_flash_on(device: torch.device) -> str | None:
    if torch.version.hip:
        return "it is known of NVIDIA's GPUs alone, this torch is built for AMD's ROCm"
    return ops.too_old(device, (8, 0)) if ops.capability(device) < (8, 0) else None


def _no_flash_cuda_on(device: torch.device) -> str | None:
    built = torch.backends.cuda.is_flash_attention_available()
    return _no_flash_on(device) if built else "this torch is built without flash attention"


def _no_flash_attn_on(device: torch.device) -> str | None:
    return (
        "flash-attn is not installed"
        if importlib.util.find_spec("flash_attn") is None
        else _no_flash_on(device)
    )


ATTENTION = ops.Operation(
    "packed attention",
    _attention_reference,
    engines={
        "cpp": _cpp,
        "flash_cpu": _flash_cpu,
        "flash_cuda": _flash_cuda,
        "flash_attn": _flash_attn,
        "blocks": None,
    },
    table={
        "cpp": ops.ENGINES["cpp"],
        "flash_cpu": ops.Engine(("cpu",)),
        "flash_cuda": ops.Engine(("cuda",), _no_flash_cuda_on),
        "flash_attn": ops.Engine(("cuda",), _no_flash_attn_on),
        "blocks": ops.Engine(),
    },
    samples={
        "float32": (_Asked(torch.float32),),
        "softcap": (_Asked(softcap=True),),
        "sinks": (_Asked(sinks=True),),
        "bias or mask": (_Asked(masked=True),),
        "dropout": (_Asked(dropout=True),),
    },
)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    dropout: float,
) -> None:
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    if (
        any(len(shape) != 4 for shape in shapes)
        or key.shape[:3] != value.shape[:3]
        or query.shape[0] != key.shape[0]
    ):
        raise ValueError(
            f"query, key and value must be (rows, heads, tokens, head size), got {shapes}"
        )
    if query.shape[3] != key.shape[3] or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query needs the key's head size and a multiple of its heads, got {shapes}"
        )
    if len({query.dtype, key.dtype, value.dtype}) > 1 or not query.is_floating_point():
        raise TypeError(
            f"query, key and value must share a floating dtype, got {query.dtype}, {key.dtype}, "
            f"{value.dtype}"
        )
    for name, size in (("window", window), ("chunk", chunk)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be positive or None, got {size}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    causal: bool,
    window: int | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Attention of packed rows: queries of segment s over keys of segment s. (R, T, H, Dv),
    differentiable.

    Args:
        query: (R, H, T, D); any strides.
        key, value: (R, G, U, D) and (R, G, U, Dv), H a multiple of G; of the query's dtype.
        segments: the boundaries; a segment lies in one row.
        causal: token i of a segment sees its tokens up to i.
        window: token i sees tokens j with |i - j| < window alone.
        chunk: a segment is cut in chunks of so many tokens, which do not see each other.
        scale: default D ** -0.5.
        softcap: scores become softcap tanh(scores / softcap).
        sinks: (H,), one more score for each query, whose probability goes nowhere.
        mask: (1 or R, 1 or H, 1 or T, 1 or U); bool, False where a query may not look, or added to
            the scores. A gradient for it is not computed. A query that may look at nothing gets 0.
        bias: as a floating-point mask, differentiable.
        dropout: of the probabilities; its random numbers come from torch's default generator of the
            CPU.
        impl: `"auto"`, `"eager"`, `"blocks"`, `"cpp"`, `"flash_cpu"`, `"flash_cuda"` or
            `"flash_attn"`.

    Raises:
        ValueError: shapes that do not fit, boundaries that do not cover the tokens, an argument out
            of its range.
        TypeError: dtypes that differ.
        RuntimeError: the engine asked for cannot compute this; says why.
    """
    _check(query, key, value, window, chunk, softcap, dropout)
    rows, _, length, size = query.shape
    local = causal or window is not None or chunk is not None
    pieces = pieces_of(segments, rows, length, key.shape[2], local, chunk)
    seed = int(torch.randint(2**62, ())) if dropout > 0 else 0
    scale = size**-0.5 if scale is None else float(scale)
    call = AttentionCall(
        segments, pieces, length, causal, window, chunk, scale, softcap, mask, dropout, seed
    )
    masked, sizes = bias is not None or mask is not None, (size, value.shape[3])
    options = (masked, softcap is not None, sinks is not None, dropout > 0, impl != "auto")
    asked = _Asked(query.dtype, *sizes, *options)
    engine = ATTENTION.resolve(impl, query.device, asked)
    if engine == "eager":
        return _attention_reference(query, key, value, sinks, bias, call)
    query, key, value = map(_dense, (query, key, value))
    if engine == "flash_attn":
        return attention_flash.flash_attn(query, key, value, call)
    return _SegmentAttention.apply(query, key, value, sinks, bias, call, engine)
