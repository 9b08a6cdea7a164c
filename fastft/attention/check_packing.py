"""Does a model keep packed sequences apart? A probe that asks the model itself, and says what to do where it does not.

Three sequences go through the model alone, and packed into one row. Two things must hold of the packed outputs y of a
token t behind the first sequence, in units of the root mean square of all outputs:

    leak[t]  = |y'[t] - y[t]|      y' is the packed run with other tokens in the first sequence
    error[t] = |y[t] - alone[t]|   alone is the run of t's sequence by itself, with transformers' own attention

Attention that ends at a boundary gives leak = 0 to the bit. Where experts share a matrix product, or a kernel adds in
no fixed order, other tokens change the rounding; how much, the model says itself: `noise` is the movement of one row of
an ordinary batch when the tokens of the other rows change (and of two equal runs). A leak counts above eight times the
noise and a floor; fresh models of 32 to 64 features, which attend to everything alike, leak between 1e-3 and 1.

Cost: about ten forward passes over at most 31 tokens, without gradients; more where a way out is looked for.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.attention.attention import register_attention
from fastft.attention.block_mask import block_mask, implementation_restored
from fastft.attention.segments import packed_attention
from fastft.data.collator import PackingCollator
from fastft.foreign import base_model, reason_not_to_run, unwrapped

LENGTHS, DECODER_LENGTHS = (11, 7, 13), (6, 9, 5)
STOCK = ("sdpa", "eager")

_LEAK = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 5e-4}
_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SMALL = 2**20  # elements of a buffer that is worth a copy; larger ones are quantised weights


class PackingLeakError(RuntimeError):
    """A model does not compute for packed sequences what it computes for each of them alone."""


@dataclass(frozen=True)
class Leak:
    """What is wrong, and what helps; `block_mask`: whether that is a block mask."""

    what: str
    way_out: str
    block_mask: bool

    def __str__(self) -> str:
        return f"{self.what}. {self.way_out}"


def check_packing(model: nn.Module, *, position_ids_start: int = 0) -> None:
    """Returns if `model`, as it is configured, computes for packed sequences what it computes for each of them alone.

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastft")
        fastft.check_packing(model)

    A few sequences of random tokens are packed as `PackingCollator` does it and go through the model in evaluation
    mode, without gradients. Weights, gradients, buffers, modes, configurations, hooks and random states stay as they
    are; hooks of others see these forward passes.

    Args:
        model: a transformers model, or one inside the wrappers of PEFT, DistributedDataParallel or torch.compile.
        position_ids_start: as in `PackingCollator`.

    Raises:
        PackingLeakError: it does not. The message says why, and the way out: each one that it names was tried on this
            model and found exact.
        ValueError: it cannot be asked: its parameters are sharded or on the meta device, or it takes no text alone.
        TypeError: `model` is no module.
    """
    leak = find_leak(model, position_ids_start)
    if leak is not None:
        raise PackingLeakError(f"{type(base_model(model)).__name__} does not keep packed sequences apart: {leak}")


def find_leak(model: nn.Module, position_ids_start: int = 0) -> Leak | None:
    """What `check_packing` raises, as a value; None if nothing is wrong. The same errors otherwise."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    reason = _reason_not_to_ask(model)
    if reason is not None:
        raise ValueError(f"model cannot be checked for packing: {reason}")
    register_attention()
    with _untouched(model):
        try:
            probe = _Probe(model)
        except Exception as error:
            raise ValueError(f"model cannot be checked for packing: alone, a text makes it raise {error!r}") from error
        problem = probe.problem(position_ids_start)
        return None if problem is None else Leak(problem, *_way_out(probe, position_ids_start))


def _reason_not_to_ask(model: nn.Module) -> str | None:
    base = base_model(model)
    if not hasattr(base, "config") or not hasattr(base, "get_input_embeddings"):
        return f"{type(base).__name__} is no transformers model"
    reason = reason_not_to_run(model)
    return None if reason is None else f"{reason}; check it before it is prepared for training"


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes, buffers and random states are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.numel() <= _SMALL]
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


class _Probe:
    """One model, three sequences, and what they give alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.base = model, base_model(model)
        self.crossed = bool(getattr(self.base.config, "is_encoder_decoder", False))
        self.tokens = [_random_tokens(self.base, LENGTHS, seed) for seed in (0, 1)]
        self.targets = [_random_tokens(self.base, DECODER_LENGTHS, seed) for seed in (2, 3)]
        self.outputs = DECODER_LENGTHS if self.crossed else LENGTHS
        self.body: nn.Module | None = None
        self.mixers = _mixers(self.base)
        with _stock_attention(self.base):
            self.alone = self._alone()
            self.noise = self._noise()
        self.scale = float(torch.cat(self.alone).pow(2).mean().sqrt()) or 1.0
        dtypes = {self._dtype(), *(p.dtype for p in self.base.parameters() if p.dtype in _LEAK)}
        self.least, self.largest_error = (max(table.get(d, 0.0) for d in dtypes) for table in (_LEAK, _ERROR))

    def _dtype(self) -> torch.dtype | None:
        kind = self._device().type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def _device(self) -> Any:
        return self.base.get_input_embeddings().weight.device

    def problem(self, start: int) -> str | None:
        """What is wrong with packed batches; None if nothing is."""
        if getattr(self.base.config.get_text_config(), "expert_capacity", None):
            return "tokens of all sequences compete for the capacity of its experts"
        first = self.first_position(start)
        if first != start:
            return f"it counts positions from {first}, position_ids_start is {start}"
        try:
            packed, moved = (self._packed(start, other) for other in (False, True))
        except Exception as error:
            return f"it raises {type(error).__name__} for a packed batch: {' '.join(str(error).split())[:300]}"
        leak = float(_distance(packed, moved)[self.outputs[0] :].max()) / self.scale
        if not leak <= 8 * self.noise / self.scale + self.least:
            return f"other tokens in the first sequence move the outputs of the later ones by {leak:.1e}{self._why()}"
        errors = _distance(packed, torch.cat(self.alone)) / self.scale
        # experts that are chosen differently by a rounding make a few tokens of a 16-bit model err
        worst = float(errors.median() if self.largest_error > 1e-2 else errors.max())
        if not worst <= self.largest_error + 8 * self.noise / self.scale:
            return f"no sequence sees another, but the outputs are off by {worst:.1e} from those of sequences alone"
        return None

    def first_position(self, start: int) -> int:
        """The first position as the model itself counts: `start`, or the one behind its padding token."""
        pad = getattr(self.base.config, "pad_token_id", None)
        for first in (start, 0 if pad is None else pad + 1):
            inputs = self._inputs(self.tokens[0][0][None], self.targets[0][0][None])
            positions = torch.arange(first, first + LENGTHS[0])[None]
            with contextlib.suppress(Exception):  # there may be no such argument
                outputs = self._call({**inputs, "position_ids": positions}, self.outputs[0])[0]
                if float(_distance(outputs, self.alone[0]).max()) <= 8 * self.noise + self.least * self.scale:
                    return first
        return start

    def _why(self) -> str:
        if self.mixers:
            return f" ({', '.join(self.mixers)}: tokens mix without attention)"
        return f" (attn_implementation={self.base.config._attn_implementation!r})"

    def _alone(self) -> list[Tensor]:
        """The outputs (tokens, features) of each sequence by itself."""
        rows = zip(self.tokens[0], self.targets[0], self.outputs, strict=True)
        inputs = [(self._inputs(tokens[None], targets[None]), length) for tokens, targets, length in rows]
        if self._call(*inputs[0], or_none=True) is None:  # one label for a sequence: look at its tokens
            self.body = self.base.base_model
        return [self._call(*each)[0] for each in inputs]

    def _noise(self) -> float:
        """How far outputs move that must not: by other tokens in other rows, and by nothing at all."""
        length = max(LENGTHS)
        kept, *others = (_random_tokens(self.base, [length], seed)[0] for seed in (4, 5, 6, 7))
        rows = [torch.stack([other, kept]) for other in (*others, others[0])]
        runs = [self._call(self._inputs(both, both), length)[1] for both in rows]
        return max(float(_distance(runs[0], run).max()) for run in runs[1:])

    def _inputs(self, tokens: Tensor, targets: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": tokens}
        return {**inputs, "decoder_input_ids": targets} if self.crossed else inputs

    def _packed(self, start: int, other: bool) -> Tensor:
        """The outputs of all sequences in one row, with other tokens in the first or not."""
        tokens, targets = (
            [parts[other][0], *parts[0][1:]] if other else parts[0] for parts in (self.tokens, self.targets)
        )
        examples: list[dict[str, Tensor]] = [{"input_ids": ids} for ids in tokens]
        if self.crossed:
            examples = [{**e, "labels": t, "decoder_input_ids": t} for e, t in zip(examples, targets, strict=True)]
        task = "seq2seq" if self.crossed else "causal_lm"
        batch: Any = PackingCollator(task=task, position_ids_start=start)(examples)
        del batch["labels"]
        return self._call(batch, sum(self.outputs))[0]

    def _call(self, inputs: dict[str, Any], length: int, or_none: bool = False) -> Any:
        """The first output of a forward with one vector for each token, in float64."""
        device = self._device()
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        output = self.model(**inputs) if self.body is None else self._output_of_body(self.body, inputs)
        values = list(output.values()) if isinstance(output, dict) else list(output)
        for value in values:
            if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == length and value.is_floating_point():
                return value.cpu().double().nan_to_num()
        if or_none:
            return None
        raise ValueError(f"{type(self.base).__name__} returns nothing of shape (rows, {length}, features)")

    def _output_of_body(self, body: nn.Module, inputs: dict[str, Any]) -> Any:
        """What the model without its head returns when the model is called, whose hooks may be needed."""
        outputs: list[Any] = []
        hook = body.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            self.model(**inputs)
        except Exception:
            if not outputs:  # else only the head does not like the batch
                raise
        finally:
            hook.remove()
        return outputs[-1]


def _way_out(probe: _Probe, start: int) -> tuple[str, bool]:
    """What makes the model exact, and whether that is a block mask."""
    first = probe.first_position(start)
    place = "" if first == start else f"PackingCollator(position_ids_start={first})"
    for text, context, masked in _remedies(probe, bool(place)):
        with contextlib.suppress(ValueError, KeyError), context:  # the model does not take this one
            if probe.problem(first) is None:
                steps = " and ".join(filter(None, (place, text)))
                return f"Way out, tried on this model: {steps}", masked
    if probe.mixers:
        return (
            "No way out was found: such layers keep sequences apart only if their kernels are told the boundaries "
            "(causal-conv1d, mamba-ssm, flash-linear-attention); without these, train it on padded batches"
        ), False
    return "No way out was found: train it on padded batches", False


def _remedies(probe: _Probe, moved: bool) -> Iterator[tuple[str, Any, bool]]:
    """What to tell, the context in which the model is like that, and whether that is a block mask."""
    if moved:
        yield "", contextlib.nullcontext(), False
    inside = "fastft.PackingCallback() in Trainer, or fastft.packed_attention(model) around the loop"
    yield inside, packed_attention(probe.model), False
    for name in ("fastft", *STOCK):
        if name != probe.base.config._attn_implementation:
            implementation = f"attn_implementation={name!r}"
            yield implementation, _attention(probe.base, name), False
            both = _both(_attention(probe.base, name), packed_attention(probe.model))
            yield f"{implementation} and {inside}", both, False
    mask = "fastft.PackingCallback() in Trainer, or fastft.block_mask(model) around the loop: a mask of T x T"
    yield mask, block_mask(probe.model), True


@contextlib.contextmanager
def _both(*contexts: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _stock_attention(base: Any) -> Any:
    """transformers' own attention, where ours is chosen: what its implementation gets wrong must show."""
    if base.config._attn_implementation != "fastft":
        return contextlib.nullcontext()
    return _attention(base, "sdpa" if getattr(base, "_supports_sdpa", False) else "eager")


@contextlib.contextmanager
def _attention(base: Any, name: str) -> Iterator[None]:
    """Another attention implementation for a while. Raises ValueError where the model does not take it."""
    with implementation_restored(base):
        base.set_attn_implementation(name)
        if base.config._attn_implementation != name:
            raise ValueError(f"{type(base).__name__} has attention code of its own")
        yield


def _mixers(base: nn.Module) -> list[str]:
    """Classes of layers that mix tokens otherwise than by attention: convolutions over time and recurrences."""
    found = set()
    for module in base.modules():
        convolves = any(isinstance(part, nn.Conv1d) and part.kernel_size[0] > 1 for part in module.children())
        decays = any("time_decay" in name or "A_log" in name for name, _ in module.named_parameters(recurse=False))
        if convolves or decays or "lstm" in type(module).__name__.lower():
            found.add(type(module).__name__)
    return sorted(found)[:3]


def _random_tokens(base: Any, lengths: Sequence[int], seed: int) -> list[Tensor]:
    """Ordinary tokens: none that the configuration gives a meaning."""
    config = base.config.get_text_config()
    sizes = [getattr(part, "vocab_size", None) for part in (config, base.config)]
    size = min(int(given) for given in (*sizes, base.get_input_embeddings().weight.shape[0]) if given)
    special = set(_special_tokens(base.config.to_dict()))
    allowed = torch.tensor([token for token in range(min(size, 32_768)) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    return [allowed[torch.randint(len(allowed), (n,), generator=generator)] for n in lengths]


def _special_tokens(config: dict[Any, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif str(name).endswith(("_token_id", "_token_index", "_token_ids")):
            yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square of the difference for each token."""
    return (a - b).pow(2).mean(-1).sqrt()
