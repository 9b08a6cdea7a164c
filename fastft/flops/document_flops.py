"""How many floating-point operations a training step of a model needs for a document of n tokens.

Products of matrices are counted, by `torch.utils.flop_counter`, in a forward and a backward pass
over one document alone: of the model's twin on the meta device, at a few lengths. In between and
beyond, the number follows exactly: layers cost a multiple of n, attention a multiple of n², and
what pads to chunks a polynomial of n rounded up. With a decoder of m tokens beside an encoder there
are m, m² and n m too.

    whole      as the counter has it: every token of a document sees every other one
    causal     attention is counted for the pairs that its mask lets through: n (n + 1) / 2 where
               it is causal, fewer with a sliding window

What is frozen has no gradient of its weight, and below the first part that is trained nothing has
any: autograd itself decides. What is computed twice (by checkpointing, or the scores in the
backward pass of flash attention) is counted once.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastft.flops.attention_masks import Mask, attention_modules, innermost, mask_of
from fastft.flops.document_alone import document_alone, more_than_tokens
from fastft.flops.known_numbers import KnownNumbers
from fastft.flops.meta_copy import meta_copy
from fastft.foreign.models import base_model

Powers = tuple[tuple[int, int, int], ...]
Lengths = tuple[tuple[int, int], ...]

# powers of n, of m and of n rounded up to a chunk
_PLAIN: Powers = ((0, 0, 0), (1, 0, 0), (2, 0, 0))
_BESIDE: Powers = (*_PLAIN, (0, 1, 0), (0, 2, 0), (1, 1, 0))
_CHUNKED: Powers = (*_PLAIN, (0, 0, 1), (0, 0, 2))
# n and m that a model is run with
_SAMPLES: Lengths = ((16, 24), (40, 24), (64, 32))
_SAMPLES_BESIDE: Lengths = (*_SAMPLES, (16, 48), (40, 64), (24, 40))
_CHECKS: Lengths = ((37, 45), (331, 87))
_CHUNKS = (64, 128, 256)  # that models pad to, where their configuration does not say
_TOLERANCE = 1e-6  # of numbers that are integers in truth
_ALL = "Global"  # torch's name of the whole model


class FlopsUnknownError(RuntimeError):
    """The operations of a model cannot be counted; the message says why."""


@dataclass(frozen=True)
class DocumentFlops:
    """FLOPs of a forward and a backward pass over one document, as a function of its length.

    Attributes:
        powers: of each term, the powers of n, of m and of n rounded up to `chunk`.
        factors: of each term.
        chunk: 1 where nothing is padded.
        attentions: masks that hide something, each with the FLOPs of its attention for a pair of
            tokens.
    """

    powers: tuple[tuple[int, int, int], ...]
    factors: tuple[float, ...]
    chunk: int = 1
    attentions: tuple[tuple[Mask, float], ...] = ()

    def whole(self, tokens: Tensor, outputs: Tensor | None = None) -> Tensor:
        """FLOPs as torch's counter has them.

        Args:
            tokens: lengths of documents, floating point (S,); one without tokens costs nothing.
            outputs: the lengths on the decoder's side where there is one beside an encoder.

        Returns:
            FLOPs of each document, (S,).
        """
        terms = _terms(self.powers, self.chunk, tokens, outputs)
        total = sum(factor * term for factor, term in zip(self.factors, terms, strict=True))
        return torch.where(tokens > 0, total, torch.zeros_like(tokens))

    def causal(self, tokens: Tensor, outputs: Tensor | None = None) -> Tensor:
        """FLOPs as `whole` has them, without those for pairs of tokens that a causal mask or a
        window hides."""
        total = self.whole(tokens, outputs)
        for mask, flops in self.attentions:
            side = outputs if mask.of_outputs and outputs is not None else tokens
            total = total - flops * mask.hidden_pairs(side)
        return total


def document_flops(model: nn.Module, inputs: Mapping[str, Any]) -> DocumentFlops:
    """Counts the operations of `model` for a document of any length.

    The model is neither called nor changed, and no random number is drawn. It takes a second or
    two, and no memory of a device.

    Args:
        model: a model of transformers, with adapters or without, in any of the wrappers that
            `fastft.foreign.models.unwrapped` knows; what requires a gradient is what does so now.
        inputs: a batch of it, padded or packed, of which only keys, shapes and dtypes are read.

    Raises:
        FlopsUnknownError: the batch has more than tokens (images, sounds); the model's code does
            not run on the meta device; or what it costs is no polynomial of the length.
    """
    others = more_than_tokens(inputs)
    if others:
        raise FlopsUnknownError(f"the batch has more than tokens: {', '.join(others)}")
    try:
        with _random_states_kept(), torch.enable_grad():
            return _Counting(model, inputs).fit()
    except FlopsUnknownError:
        raise
    except Exception as error:  # whatever a model's code may raise there
        words = " ".join(str(error).split())[:160]
        raise FlopsUnknownError(
            f"the code of {type(base_model(model)).__name__} does not run without numbers "
            f"({type(error).__name__}: {words})"
        ) from error


class _Count(NamedTuple):
    """FLOPs of one document: of both passes, and of the forward pass by names of modules."""

    both: int
    forward: dict[str, int]


class _Counting:
    """Counts passes over single documents of several lengths."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.twin = meta_copy(model)
        self.base = base_model(self.twin)
        self.config = getattr(self.base, "config", None)
        self.beside = bool(getattr(self.config, "is_encoder_decoder", False))
        accepted = inspect.signature(self.twin.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        self.inputs = {k: value for k, value in inputs.items() if takes_any or k in accepted}
        self.modules = attention_modules(self.twin)
        self._counts: dict[tuple[int, int], _Count] = {}

    def fit(self) -> DocumentFlops:
        """Finds the polynomial that goes through all lengths."""
        if self.beside:
            found = self._fitted(_BESIDE, 1, _SAMPLES_BESIDE)
        else:
            found = self._fitted(_PLAIN, 1, _SAMPLES)
        if self._holds(found, _CHECKS):
            return found
        for chunk in self._chunks():
            halves = tuple((chunk * half // 2, 0) for half in range(1, len(_CHUNKED) + 1))
            found = self._fitted(_CHUNKED, chunk, halves)
            if self._holds(found, ((37, 0), (3 * chunk - 5, 0))):
                return found
        raise FlopsUnknownError(
            f"what {type(self.base).__name__} costs is no polynomial of a document's length"
        )

    def _chunks(self) -> list[int]:
        """What lengths may be padded to; nothing is known of that beside a decoder."""
        said = [
            value
            for name, value in vars(self.config).items()
            if name.endswith("chunk_size") and isinstance(value, int) and value > 1
        ]
        return [] if self.beside else [*dict.fromkeys((*said, *_CHUNKS))]

    def _fitted(self, powers: Powers, chunk: int, samples: Lengths) -> DocumentFlops:
        """The polynomial through `samples`."""
        counts = [self._count(lengths) for lengths in samples]
        names = [_ALL, *self.modules]
        forward = [[count.forward.get(name, 0) for name in names] for count in counts]
        values = [[count.both, *row] for count, row in zip(counts, forward, strict=True)]
        columns = torch.tensor(samples, dtype=torch.float64).unbind(1)
        rows = torch.stack(_terms(powers, chunk, *columns), dim=1)
        scale = rows.abs().amax(0)
        solved = torch.linalg.solve(rows / scale, torch.tensor(values).double()) / scale[:, None]
        both, *of_names = solved.T.tolist()
        masks: dict[Mask, float] = defaultdict(float)
        for power, of_outputs in (((2, 0, 0), False), ((0, 2, 0), True)):
            if power in powers:
                at = powers.index(power)
                squares = {name: part[at] for name, part in zip(names, of_names, strict=True)}
                for mask, flops in self._masks(squares, both[at], of_outputs):
                    masks[mask] += flops
        hiding = tuple((mask, flops) for mask, flops in masks.items() if mask.causal or mask.window)
        return DocumentFlops(powers, tuple(both), chunk, hiding)

    def _masks(
        self, squares: dict[str, float], both: float, of_outputs: bool
    ) -> Iterator[tuple[Mask, float]]:
        """Yields the masks of all attention with its FLOPs for a pair of tokens.

        Args:
            squares: FLOPs of each module's forward pass for a pair. In backward passes torch's
                counter does not tell the modules apart: they are taken to have like shares.
            both: FLOPs of both passes of the whole model for a pair.
            of_outputs: whose pairs.
        """
        costly = [name for name in self.modules if squares[name] > 0.5]
        for name in innermost(costly):
            mask = mask_of(self.modules[name], self.base, of_outputs)
            yield mask, squares[name] / squares[_ALL] * both

    def _holds(self, found: DocumentFlops, checks: Lengths) -> bool:
        """Whether `found` is right at those other lengths that the model takes."""
        for lengths in checks:
            try:
                counted = self._count(lengths).both
            except (RuntimeError, ValueError, IndexError):  # more than it has positions for
                continue
            tokens, outputs = torch.tensor(lengths, dtype=torch.float64)[:, None]
            if abs(float(found.whole(tokens, outputs)) / max(counted, 1) - 1) > _TOLERANCE:
                return False
        return True

    def _count(self, lengths: tuple[int, int]) -> _Count:
        """Runs one document through the twin, once for each length."""
        if lengths not in self._counts:
            last = getattr(self.config, "eos_token_id", None)
            document = document_alone(
                self.inputs,
                lengths[0],
                lengths[1] if self.beside else None,
                last if isinstance(last, int) else None,
            )
            with FlopCounterMode(display=False) as counter, KnownNumbers() as numbers:
                output = self.twin(**{key: numbers.know(part) for key, part in document.items()})
                of_modules = counter.get_flop_counts()
                forward = {name: sum(flops.values()) for name, flops in of_modules.items()}
                _loss(output).backward()
            self.twin.zero_grad(set_to_none=True)
            self._counts[lengths] = _Count(counter.get_total_flops(), forward)
        return self._counts[lengths]


def _terms(powers: Powers, chunk: int, tokens: Tensor, outputs: Tensor | None) -> list[Tensor]:
    """The products of powers of n, m and n rounded up."""
    rounded = (tokens / chunk).ceil() * chunk
    outputs = torch.zeros_like(tokens) if outputs is None else outputs
    return [tokens**of_n * outputs**of_m * rounded**of_chunks for of_n, of_m, of_chunks in powers]


def _loss(output: Any) -> Tensor:
    """What the backward pass begins with: the loss, or all that there is where there is none."""
    loss = output.get("loss") if isinstance(output, dict) else None
    if loss is None:
        values = output.values() if isinstance(output, dict) else output
        loss = next(value for value in values if isinstance(value, Tensor) and value.requires_grad)
    return loss.sum()


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Dropout on the meta device draws nothing, but some models draw on the host."""
    of_python, numpy = random.getstate(), sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
