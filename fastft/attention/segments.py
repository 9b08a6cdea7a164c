"""Where packed sequences begin, for attention that the model's code does not tell.

A packed batch has R rows of T tokens; flattened row by row, segment s is the tokens cu_seqlens[s]
.. cu_seqlens[s + 1]. Attention learns the boundaries from its keyword arguments, as transformers'
flash attention does. Where the model's code drops these on the way, or has an encoder and a decoder
with boundaries of their own, it learns them from a holder: a hook before the model's forward puts
the batch's boundaries there, a hook after it takes them away.

The holder belongs to the modules, not to a thread or a context: gradient checkpointing runs a
layer's forward again during backward, on another thread where a GPU is used. Such a second forward
reads the boundaries of the forward whose output backward has come through.

Where a batch has boundaries for a decoder alone (task "speech_seq2seq"), its encoder runs a row for
each example; a hook before the decoder lays the states end to end (`encoder_rows.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastft.attention.beside_text import parts_beside_text
from fastft.attention.encoder_rows import lay_end_to_end
from fastft.attention.router_loss import count_no_padding
from fastft.data.host_boundaries import HostBoundaries, on_host
from fastft.data.keys import (
    BOUNDARY_KEYS,
    CU_SEQLENS_K,
    CU_SEQLENS_Q,
    DECODER_CU_SEQLENS,
    DECODER_MAX_LENGTH,
    MAX_LENGTH_K,
    MAX_LENGTH_Q,
    PADDING_LENGTHS,
    USE_CACHE,
)
from fastft.foreign.models import base_model


@dataclass(frozen=True, eq=False)
class Segments:
    """The boundaries of one attention call: segment s of queries reads segment s of keys alone.

    `cu_seqlens_q` and `cu_seqlens_k` are int32 (S + 1,) over the rows flattened one after another;
    they begin with 0 and end with the number of tokens. The two differ in cross-attention alone.
    `beside` are other boundaries of the batch, which are read along with these where the host must
    wait for a device. Where `laid`, the rows of queries and of keys count end to end: a segment of
    keys may cross rows, and there may be more keys behind the last.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    beside: tuple[Tensor, ...] = ()
    laid: bool = False

    @cached_property
    def _host(self) -> list[HostBoundaries]:
        return on_host(self.cu_seqlens_q, self.cu_seqlens_k, *self.beside)[:2]

    @property
    def bounds_q(self) -> list[int]:
        """cu_seqlens_q as host integers; waits for the device where nobody has noted them, once."""
        return self._host[0].ends

    @property
    def bounds_k(self) -> list[int]:
        """cu_seqlens_k as host integers; waits likewise."""
        return self._host[1].ends

    @cached_property
    def alike(self) -> bool:
        """Whether queries and keys have the same boundaries, as in self-attention."""
        return self.cu_seqlens_k is self.cu_seqlens_q or self.bounds_k == self.bounds_q

    @cached_property
    def made(self) -> dict[Any, Any]:
        """Things computed from the boundaries, by name: each is made once a batch, and shared with
        other Segments over the same tensors."""
        return self._host[0].made if self.alike else {}

    @property
    def longest(self) -> tuple[int, int]:
        """max_seqlen_q and max_seqlen_k, or more where a segment has more."""
        # a kernel leaves out the tokens of a segment that are behind the length it is told
        of_queries, of_keys = self._host
        return max(self.max_seqlen_q, of_queries.longest), max(self.max_seqlen_k, of_keys.longest)

    def on_device(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cu_seqlens_q and cu_seqlens_k in int32 on `device`, copied there once a batch."""
        of_queries, of_keys = self._host
        return _on_device(self.cu_seqlens_q, of_queries, device), _on_device(
            self.cu_seqlens_k, of_keys, device
        )


def _on_device(boundaries: Tensor, host: HostBoundaries, device: torch.device) -> Tensor:
    if boundaries.device == device and boundaries.dtype == torch.int32:
        return boundaries
    if device not in host.made:
        host.made[device] = boundaries.to(device, torch.int32)
    moved: Tensor = host.made[device]
    return moved


def _check(name: str, cu: Any) -> None:
    if not isinstance(cu, Tensor) or cu.ndim != 1 or cu.numel() < 1 or cu.is_floating_point():
        got = (
            f"shape {tuple(cu.shape)}, {cu.dtype}" if isinstance(cu, Tensor) else type(cu).__name__
        )
        raise ValueError(f"{name} must be an integer tensor of shape (segments + 1,), got {got}")


def _segments(
    cu_q: Tensor, cu_k: Tensor, max_q: Any, max_k: Any, beside: tuple[Tensor, ...]
) -> Segments:
    """Makes Segments of what a batch says; a length that it does not say follows from the
    boundaries, as does one on a device, for which the host would have to wait."""
    unknown = [value is None or isinstance(value, Tensor) for value in (max_q, max_k)]
    if any(unknown):
        of_q, of_k, *_ = on_host(cu_q, cu_k, *beside)
        max_q, max_k = of_q.longest if unknown[0] else max_q, of_k.longest if unknown[1] else max_k
    return Segments(cu_q, cu_k, int(max_q), int(max_k), beside)


# what a decoder calls its tokens
_DECODER_TOKENS = ("input_ids", "inputs_embeds", "input_values")


@dataclass(eq=False)
class _Batch:
    """The boundaries of one forward."""

    inputs: Segments | None  # of the model, or of its encoder; None where that has a row an example
    outputs: Segments | None = None  # of the decoder beside an encoder
    crossing: Segments | None = None  # queries from the decoder, keys from the encoder

    def of(self, in_decoder: bool, causal: bool) -> Segments | None:
        """The boundaries of an attention call: of self-attention, or from decoder to encoder."""
        if self.outputs is None or not in_decoder:
            return self.inputs
        return self.outputs if causal else self.crossing  # a decoder is causal towards itself alone

    def cross(self, keys: Tensor, longest: int, laid: bool) -> None:
        """Sets the boundaries of the encoder's states, `keys`."""
        assert self.outputs is not None
        queries = self.outputs
        self.crossing = Segments(
            queries.cu_seqlens_q, keys, queries.max_seqlen_q, longest, laid=laid
        )


def _batch(kwargs: dict[str, Any]) -> _Batch | None:
    """The boundaries among a forward's keyword arguments; None if there are none."""
    get, cu_q = kwargs.get, kwargs.get(CU_SEQLENS_Q)
    if cu_q is None:
        return _batch_of_decoder(kwargs)
    cu_k, decoder = get(CU_SEQLENS_K), get(DECODER_CU_SEQLENS)
    every = {CU_SEQLENS_Q: cu_q, CU_SEQLENS_K: cu_q if cu_k is None else cu_k}
    every |= {} if decoder is None else {DECODER_CU_SEQLENS: decoder}
    for name, cu in every.items():
        _check(name, cu)
        if cu.numel() != cu_q.numel():
            raise ValueError(
                f"{CU_SEQLENS_Q} has {cu_q.numel() - 1} segments, {name} has {cu.numel() - 1}: "
                "segment s of the queries reads segment s of the keys, and segment s of a decoder "
                "that of the encoder"
            )
    # one wait for a device is to bring all of them
    beside = tuple(every.values())
    inputs = _segments(cu_q, every[CU_SEQLENS_K], get(MAX_LENGTH_Q), get(MAX_LENGTH_K), beside)
    if decoder is None:
        return _Batch(inputs)
    longest = get(DECODER_MAX_LENGTH)
    batch = _Batch(inputs, _segments(decoder, decoder, longest, longest, beside))
    batch.cross(inputs.cu_seqlens_q, inputs.max_seqlen_q, laid=False)
    return batch


def _batch_of_decoder(kwargs: dict[str, Any]) -> _Batch | None:
    """The boundaries of a batch whose encoder has a row for each example; None if there are
    none."""
    decoder = kwargs.get(DECODER_CU_SEQLENS)
    if decoder is None:
        return None
    _check(DECODER_CU_SEQLENS, decoder)
    longest = kwargs.get(DECODER_MAX_LENGTH)
    return _Batch(None, _segments(decoder, decoder, longest, longest, (decoder,)))


def _before_decoder(
    decoder: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Lays the states of an encoder that has a row for each example end to end."""
    holder = _holders.get(decoder)
    batch = holder.batch() if holder is not None else None
    if batch is None or batch.inputs is not None or batch.outputs is None:
        return None
    states, mask = (kwargs.get(f"encoder_{name}") for name in ("hidden_states", "attention_mask"))
    tokens = next((kwargs[key] for key in _DECODER_TOKENS if kwargs.get(key) is not None), None)
    if not isinstance(states, Tensor) or not isinstance(tokens, Tensor):
        raise ValueError(
            f"{type(decoder).__name__} must be called with its tokens and encoder_hidden_states "
            "by keyword, for a packed batch whose encoder has a row for each example"
        )
    if getattr(decoder.config, "_attn_implementation", None) != "fastft":
        raise ValueError(
            f"{type(decoder).__name__} needs attn_implementation='fastft' for a packed batch whose "
            "encoder has a row for each example: other attention lets each read all of them"
        )
    segments = batch.outputs.cu_seqlens_q.numel() - 1
    if len(states) != segments:
        raise ValueError(
            f"{DECODER_CU_SEQLENS} has {segments} segments, the encoder has states of "
            f"{len(states)} examples"
        )
    laid, keys, longest = lay_end_to_end(states, mask, len(tokens))
    batch.cross(keys, longest, laid=True)
    hidden = {} if mask is None else {"encoder_attention_mask": None}
    return args, {**kwargs, "encoder_hidden_states": laid, **hidden}


@dataclass(eq=False)
class _Holder:
    """Keeps the boundaries of the forward at hand; all modules of one model share it."""

    # empty unless the model has an encoder and a decoder
    decoder_modules: weakref.WeakSet[nn.Module]
    running: int = 0  # forwards under way, one inside the other
    current: _Batch | None = None  # of the innermost
    differentiated: _Batch | None = None  # of the forward that backward is in, or will be
    handles: int = 0
    decoder_hook: Any = None  # as long as there are handles

    def batch(self) -> _Batch | None:
        """The boundaries for an attention call that happens now."""
        # with checkpointing backward runs layers again after all forwards have ended: then the
        # batch is that of the output which this backward pass has come through
        return self.differentiated if self.running == 0 and _in_backward() else self.current


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks


_holders: weakref.WeakKeyDictionary[nn.Module, _Holder] = weakref.WeakKeyDictionary()


def _decoder_of(model: nn.Module) -> nn.Module | None:
    """Finds the decoder of a model that has an encoder beside it."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    decoder, encoder = (
        getattr(model, name, lambda: None)() for name in ("get_decoder", "get_encoder")
    )
    return (
        decoder
        if isinstance(decoder, nn.Module) and decoder is not model and decoder is not encoder
        else None
    )


def _holder_of(model: nn.Module) -> _Holder:
    """Finds the holder of a model or of its parts; makes one if they have none."""
    kept = {_holders[module] for module in model.modules() if module in _holders}
    if len(kept) > 1:
        raise ValueError(
            "model has parts that were given to keep_segments one by one: give it the model alone"
        )
    holder = kept.pop() if kept else _Holder(weakref.WeakSet())
    decoder = _decoder_of(base_model(model))
    holder.decoder_modules.update(decoder.modules() if decoder is not None else ())
    return holder


def _for_model(model: nn.Module, holder: _Holder, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leaves out the keyword arguments which the model must not see, or does not take."""
    parameters = inspect.signature(base_model(model).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # an encoder and a decoder would hand the same boundaries to both of their attentions
    dropped = {
        key
        for key in (*BOUNDARY_KEYS, PADDING_LENGTHS, USE_CACHE)
        if key == PADDING_LENGTHS
        or (key != USE_CACHE and holder.decoder_modules)
        or key.startswith("decoder_")
        or not (takes_any or key in parameters)
    }
    return {key: value for key, value in kwargs.items() if key not in dropped}


@dataclass(frozen=True, eq=False)
class _Forward:
    """A forward under way of a model that has the hooks."""

    module: nn.Module
    holder: _Holder
    batch: _Batch | None
    before: _Batch | None  # what its holder held, to be put back


# one list for each thread: a forward may be inside another, of a part or of another model
_under_way = threading.local()


def _forwards() -> list[_Forward]:
    forwards: list[_Forward] = _under_way.__dict__.setdefault("forwards", [])
    return forwards


def segments_under_way() -> Segments | None:
    """The boundaries of the innermost forward with `keep_segments` that this thread runs: the
    encoder's, where that is packed, else the decoder's; None unless it got a packed batch."""
    forwards = _forwards()
    batch = forwards[-1].batch if forwards else None
    return None if batch is None else batch.inputs or batch.outputs


def _before_forward(
    module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Puts the batch's boundaries into the holder, before the model's own code runs."""
    holder = _holders.get(module)
    if holder is None:  # a copy of a model that has the hooks
        return None
    batch, forwards = _batch(kwargs), _forwards()
    # part of a model whose hook took the keys off
    if batch is None and forwards and forwards[-1].holder is holder:
        batch = forwards[-1].batch
    if batch is not None and holder.decoder_modules and batch.outputs is None:
        raise ValueError(
            "a packed batch of an encoder-decoder model needs decoder_cu_seq_lens (task='seq2seq')"
        )
    forwards.append(_Forward(module, holder, batch, holder.current))
    holder.current, holder.running = batch, holder.running + 1
    return args, _for_model(module, holder, kwargs)


def _before_tower(
    module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Hides the batch's boundaries from a part that stands beside the text."""
    holder = _holders.get(module)
    if holder is None:
        return None
    _forwards().append(_Forward(module, holder, None, holder.current))
    holder.current, holder.running = None, holder.running + 1
    return args, {key: value for key, value in kwargs.items() if key not in BOUNDARY_KEYS}


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    """Takes the boundaries out of the holder, and leaves them with the output for backward."""
    forwards = _forwards()
    if not forwards or forwards[-1].module is not module:  # the hook before did not get through
        return
    forward = forwards.pop()
    holder = forward.holder
    holder.current, holder.running = forward.before, holder.running - 1
    if not torch.is_grad_enabled() or _in_backward():
        return
    holder.differentiated = forward.batch

    def backward_begins(grad: Tensor) -> None:
        holder.differentiated = forward.batch  # there may have been other forwards since

    parts = output if isinstance(output, tuple) else (output,)
    for value in output.values() if isinstance(output, dict) else parts:
        if type(value) is Tensor and value.requires_grad:
            value.register_hook(backward_begins)


class SegmentsHandle:
    """Ends what `keep_segments` began."""

    def __init__(self, model: nn.Module, holder: _Holder) -> None:
        self._holder = holder
        # functions, not methods: a model with them can be copied and pickled
        self._hooks = [
            model.register_forward_pre_hook(_before_forward, with_kwargs=True),
            model.register_forward_hook(_after_forward, always_call=True),
        ]
        for tower in parts_beside_text(model):
            self._hooks += [
                tower.register_forward_pre_hook(_before_tower, with_kwargs=True),
                tower.register_forward_hook(_after_forward, always_call=True),
            ]
        holder.handles += 1
        decoder = _decoder_of(base_model(model))
        if decoder is not None and holder.decoder_hook is None:
            holder.decoder_hook = decoder.register_forward_pre_hook(
                _before_decoder, with_kwargs=True
            )

    def remove(self) -> None:
        """Takes the hooks off. The last handle of a model forgets its batch; another call does
        nothing."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._holder.handles -= 1
        if self._holder.handles == 0:
            if self._holder.decoder_hook is not None:
                self._holder.decoder_hook.remove()
            for module in [key for key, holder in _holders.items() if holder is self._holder]:
                del _holders[module]
            _forwards()[:] = [
                forward for forward in _forwards() if forward.holder is not self._holder
            ]


def keep_segments(model: nn.Module) -> SegmentsHandle:
    """Makes the boundaries of packed batches known to all attention modules of `model`, until
    `.remove()`.

    Before each forward of `model` a hook reads the boundary keys of the batch (`cu_seq_lens_q`; of
    an encoder-decoder model `decoder_cu_seq_lens` too). It takes off the keys that the model's
    forward does not accept; of an encoder-decoder model all of them. A batch without boundaries is
    not packed: the model runs as without the hook. Towers for images see no boundaries of the text.

    Args:
        model: the outermost module that is called with the batch, or the model inside the wrapper
            of DDP, FSDP or PEFT. It, a part of it or a wrapper of it may have been given already:
            all ends with the last handle.

    Raises:
        TypeError: `model` is no module.
        ValueError: parts of `model` were given one by one; in a forward, boundaries of a wrong
            shape or of different counts, or none for the decoder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    holder = _holder_of(model)
    _holders.update(dict.fromkeys(model.modules(), holder))
    return SegmentsHandle(model, holder)


def keeps_segments(model: nn.Module) -> bool:
    """Whether `model` or a part of it was given to `keep_segments`, and still is."""
    return any(module in _holders for module in model.modules())


def segments_of(module: nn.Module, kwargs: dict[str, Any]) -> Segments | None:
    """The boundaries for an attention call of `module` with `kwargs`; None if the batch is not
    packed.

    They come from `kwargs`, else from what `keep_segments` remembered. In the decoder of an
    encoder-decoder model causal attention (`is_causal` in `kwargs`, else of the module) is
    self-attention, other attention reads the encoder.

    Raises:
        ValueError: boundaries of the wrong shape.
    """
    holder = _holders.get(module)
    batch, given = holder.batch() if holder is not None else None, kwargs.get(CU_SEQLENS_Q)
    inputs = None if batch is None else batch.inputs
    if given is not None and (inputs is None or inputs.cu_seqlens_q is not given):
        batch = _batch(kwargs)
    if batch is None:
        return None
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    in_decoder = (
        module in holder.decoder_modules
        if holder is not None
        else getattr(module, "is_decoder", False)
    )
    return batch.of(in_decoder, bool(causal))


@contextlib.contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Keeps packed sequences apart in `model` inside this context, for training loops of one's own.

    For a model with `attn_implementation="fastft"`; `fastft.PackingCallback` does the same for
    `Trainer`. The cache that models make unless told otherwise is turned off too, also in the
    configurations of a composite model's parts.

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastft")
        with fastft.packed_attention(model):
            for batch in DataLoader(packs, collate_fn=fastft.PackingCollator()):
                model(**batch).loss.backward()

    Args:
        model: the module that is called with the batches.

    Raises:
        TypeError: `model` is no module.
    """
    with contextlib.ExitStack() as kept:
        # in this order: the second takes off what the first reads
        kept.enter_context(count_no_padding(model))
        kept.callback(keep_segments(model).remove)
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "use_cache", False) is True:
                config.use_cache = False
                kept.callback(setattr, config, "use_cache", True)
        yield
