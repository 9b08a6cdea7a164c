"""A model asked about packed rows: its outputs for sequences alone, and for the same ones packed.

In units of the root mean square of all outputs, of the packed outputs y of a token t behind the
first sequence:

    leak[t]  = |y'[t] - y[t]|      y' is the packed run with other tokens in the first sequence
    error[t] = |y[t] - alone[t]|   alone is the run of t's sequence by itself

Sequences alone run with transformers' own attention, where the model has ours. Attention that ends
at a boundary gives leak = 0 to the bit. Where experts share a matrix product, or a kernel adds in
no fixed order, other tokens change the rounding; how much, the model says itself: `noise` is the
movement of one row of an ordinary batch when the tokens of the other rows change (and of two equal
runs). A leak counts above eight times the noise and a floor; fresh models of 32 to 64 features,
which attend to everything alike, leak between 1e-3 and 1. All runs begin with the same random
states, so that what a model draws moves nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.data.collator import PackingCollator
from fastft.data.pack import Pack
from fastft.foreign.models import base_model, output_embeddings
from fastft.integrations.implementations import attention, stock_parts
from fastft.integrations.probe.rows import (
    LENGTHS,
    PADDING,
    Batches,
    Row,
    beside_long,
    limits_of,
    long_row,
    other_row,
    random_tokens,
    short_row,
)
from fastft.integrations.probe.sounds import shape_of_sounds, sound_key, sounds
from fastft.integrations.probe.untouched import RandomStates, training_mode

_LEAK = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 5e-4}
_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_MOST_NOISE = 0.3  # of the outputs; what moves more for no reason could hide a leak


@dataclass(frozen=True)
class Trouble:
    """A fault with packed rows.

    Attributes:
        what: a clause.
        loud: whether training would raise too, at the first row that is as long.
        long_row: whether short rows are exact.
    """

    what: str
    loud: bool = False
    long_row: bool = False


@dataclass(frozen=True)
class Noise:
    """Movements of outputs that other rows and random states cause.

    Attributes:
        of_others: of the token that moves most by other tokens in other rows.
        usual: of the median token, which a few experts chosen differently do not move.
        drawn: of the token that moves most by these or by other random states.
    """

    of_others: float
    usual: float
    drawn: float


class Probe:
    """One model, and what it gives for sequences alone. Raises what the model raises for these."""

    def __init__(self, model: nn.Module, batches: Batches, states: RandomStates) -> None:
        self.model, self.base, self.batches = model, base_model(model), batches
        self.crossed = bool(getattr(self.base.config, "is_encoder_decoder", False))
        self.sound = sound_key(self.base)
        self._shape = () if self.sound is None else shape_of_sounds(self.base, self.sound)
        self.short, self.long = short_row(self.base), long_row(self.base, batches)
        self.limits = limits_of(self.base.config)
        # an encoder of sounds has a row for each, and may mix what is in it
        self.mixers = _mixers(self.base) if self.sound is None else []
        self._states = states
        self._body: nn.Module | None = None
        self._before_head = False
        self._dtypes = {p.dtype for p in self.base.parameters() if p.dtype in _LEAK}
        with stock_parts(self.base) as called, stock_attention(self.base):
            self._choose_outputs()
            self._run_alone(self.short)
            self._other_row = other_row(self.base)
            if batches.rows > 1:
                self._run_alone(self._other_row)
            self.noise = self._noise(max(LENGTHS))
        self.stock_parts = tuple(called.values())

    @property
    def _least(self) -> float:
        return max(_LEAK.get(dtype, 0.0) for dtype in self._dtypes)

    @property
    def _largest_error(self) -> float:
        return max(_ERROR.get(dtype, 0.0) for dtype in self._dtypes)

    def trouble(self, start: int) -> Trouble | None:
        """Looks for a fault with packed rows, short ones first; None if there is none."""
        if getattr(self.base.config.get_text_config(), "expert_capacity", None):
            return Trouble("tokens of all sequences compete for the capacity of its experts")
        first = self.first_position(start)
        if first != start:
            return Trouble(f"it counts positions from {first}, position_ids_start is {start}")
        return (
            self._trouble_of(self.short, start)
            or self._trouble_in_training(start)
            or self._trouble_with_padding(start)
            or self._trouble_of_more(start)
            or (None if self.long is None else self.trouble_of_long(self.long, start))
        )

    def _trouble_of_more(self, start: int) -> Trouble | None:
        """Looks for a fault with what batches have beside tokens."""
        return None

    def tolerates(self, trouble: Trouble) -> bool:
        """Whether the model may be trained all the same: rows that make it raise need not come."""
        return trouble.loud and self.batches.max_tokens is None

    def first_position(self, start: int) -> int:
        """The first position as the model itself counts: `start`, or the one behind its padding
        token."""
        pad, row = getattr(self.base.config, "pad_token_id", None), self.short
        for first in (start, 0 if pad is None else pad + 1):
            inputs = self._inputs(row.tokens[0][None], row.targets[0][None])
            positions = torch.arange(first, first + len(row.tokens[0]))[None]
            with contextlib.suppress(Exception):  # there may be no such argument
                outputs = self._call({**inputs, "position_ids": positions}, len(row.alone[0]))[0]
                allowed = 8 * self.noise.of_others + self._least * _scale(row.alone)
                if float(_distance(outputs, row.alone[0]).max()) <= allowed:
                    return first
        return start

    def _trouble_of(self, row: Row, start: int) -> Trouble | None:
        try:
            packed, moved = (self._packed(row, start, other) for other in (False, True))
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            what = f"it raises {type(error).__name__} for a packed batch: {said}"
            return Trouble(what, loud=row is not self.short)
        scale, ends = _scale(row.alone), row.ends(self.crossed)
        leaks, noise = _distance(packed, moved)[ends[1] :] / scale, self.noise
        if row is not self.short and not leaks.max() <= self._least + 8 * noise.of_others / _scale(
            self.short.alone
        ):
            noise = self._noise(min(len(row), 256))
        leak, allowed = float(leaks.max()), self._least + 8 * noise.of_others / scale
        # the tokens whose experts change could hide a leak: look at the usual one
        if allowed > _MOST_NOISE:
            leak, allowed = float(leaks.median()), self._least + 8 * noise.usual / scale
        if not leak <= allowed:
            return Trouble(
                "other tokens in the first sequence move the outputs of the later ones by "
                f"{leak:.1e}{self._why()}"
            )
        if not allowed <= _MOST_NOISE:
            return Trouble(
                f"its outputs move by {noise.usual / scale:.1e} for no reason, which could hide a "
                f"leak"
            )
        own = torch.cat([packed[ends[at] : ends[at + 1]] for at in row.compared])
        # the second row, if there is one
        others = packed[ends[-1] :] if row is self.short else packed[:0]
        alone = [*row.alone, *(self._other_row.alone if len(others) else [])]
        errors = _distance(torch.cat([own, others]), torch.cat(alone)) / scale
        # experts that are chosen differently by a rounding make a few tokens of a 16-bit model err
        worst = float(errors.median() if self._largest_error > 1e-2 else errors.max())
        if not worst <= self._largest_error + 8 * noise.drawn / scale:
            return Trouble(
                f"no sequence sees another, but the outputs are off by {worst:.1e} from those of "
                "sequences alone"
            )
        return None

    def _why(self) -> str:
        if self.mixers:
            return f" ({', '.join(self.mixers)}: tokens mix without attention)"
        return f" (attn_implementation={self.base.config._attn_implementation!r})"

    def trouble_of_long(self, row: Row, start: int) -> Trouble | None:
        """Looks for a fault with a row that passes the limits of the configuration."""
        if not row.alone:
            with stock_attention(self.base):
                try:
                    self._run_alone(row, hidden=True)
                except Exception as error:
                    longest = max(len(row.tokens[at]) for at in row.compared)
                    what = (
                        f"alone, a sequence of {longest} tokens makes it raise "
                        f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    )
                    return Trouble(what, loud=True, long_row=True)
        found = self._trouble_of(row, start)
        if found is None:
            return None
        passed = ", ".join(f"{name} of {size}" for size, name in self.limits.passed(len(row))[:2])
        place = f"a row of {len(row)} tokens" + (f", longer than its {passed}" if passed else "")
        return Trouble(f"in {place}: {found.what}", found.loud, long_row=True)

    def _trouble_in_training(self, start: int) -> Trouble | None:
        """Whether sequences see each other in training mode alone. Dropout is the same in both
        runs."""
        with training_mode(self.model):
            try:
                packed, moved = (self._packed(self.short, start, other) for other in (False, True))
            except Exception as error:
                said = " ".join(str(error).split())[:300]
                return Trouble(f"in training mode it raises {type(error).__name__}: {said}")
            scale, end = _scale(self.short.alone), self.short.ends(self.crossed)[1]
            leak = float(_distance(packed, moved)[end:].max()) / scale
            if (
                leak <= self._least + 8 * self.noise.of_others / scale
                or leak <= self._least + 8 * self._noise(max(LENGTHS)).of_others / scale
            ):
                return None
        return Trouble(
            f"in training mode other tokens in the first sequence move the later ones by {leak:.1e}"
        )

    def _trouble_with_padding(self, start: int) -> Trouble | None:
        """Whether the numbers that a model returns beside its outputs, such as a router's loss,
        count padding."""
        # a head of labels may not like the batch
        if self._body is not None or not self.batches.padded:
            return None
        plain, padded = (
            self._numbers(self._batch(self.short, start, rows=1, padded=padded)[0])
            for padded in (False, True)
        )
        for name in plain.keys() & padded.keys():
            if not abs(plain[name] - padded[name]) <= max(1e-5, 10 * self._least) * abs(
                plain[name]
            ):
                return Trouble(f"padding at the end of a row changes its {name}")
        return None

    def _numbers(self, batch: dict[str, Any]) -> dict[str, float]:
        output = self._run(batch)
        return {
            name: float(value)
            for name, value in (output.items() if isinstance(output, dict) else ())
            if isinstance(value, Tensor) and value.ndim == 0
        }

    def _choose_outputs(self) -> None:
        """Looks at the model's body where its head labels sequences, before its head where that
        says nothing."""
        row = self.short
        inputs = self._inputs(row.tokens[0][None], row.targets[0][None])
        outputs = self._call(inputs, self._outputs_of(row)[0], or_none=True)
        if outputs is None:
            self._body = self.base.base_model
        elif _says_nothing(outputs[0]):
            self._before_head = True

    def _outputs_of(self, row: Row) -> list[int]:
        return [len(part) for part in (row.targets if self.crossed else row.tokens)]

    def _run_alone(self, row: Row, hidden: bool = False) -> None:
        """The outputs (n, features) of the sequences that are compared, each by itself."""
        lengths = self._outputs_of(row)
        alone = []
        for at in row.compared:
            inputs = self._inputs(row.tokens[at][None], row.targets[at][None])
            alone.append(self._call(inputs, lengths[at], hidden=hidden)[0])
        if _says_nothing(torch.cat(alone)):
            raise ValueError("its outputs are not finite, or the same for every token")
        row.alone = alone

    def _noise(self, length: int) -> Noise:
        """Measures how far outputs move that must not."""
        kept, *others = (random_tokens(self.base, [length], seed)[0] for seed in (4, 5, 6, 7))
        rows = [torch.stack([other, kept]) for other in (*others, others[0])]
        hidden = length > max(LENGTHS)
        runs = [self._call(self._inputs(both, both), length, hidden=hidden)[1] for both in rows]
        drawn = self._call(self._inputs(rows[0], rows[0]), length, hidden=hidden, rewind=False)[1]
        moved = [_distance(runs[0], run) for run in runs[1:]]
        of_others, usual = (
            max(float(each.max()) for each in moved),
            max(float(each.median()) for each in moved),
        )
        return Noise(of_others, usual, max(of_others, float(_distance(runs[0], drawn).max())))

    def _inputs(self, tokens: Tensor, targets: Tensor) -> dict[str, Any]:
        read = tokens if self.sound is None else self._sounds(tokens)
        decoder = {"decoder_input_ids": targets} if self.crossed else {}
        return {self.sound or "input_ids": read} | decoder

    def _sounds(self, tokens: Tensor) -> Tensor:
        return sounds(tokens, self._shape, next(self.base.parameters()).dtype)

    def _batch(
        self, row: Row, start: int, *, other: bool = False, rows: int, padded: bool
    ) -> tuple[dict[str, Any], int]:
        """The sequences in one row, and a second row where `rows` is more than 1; tokens of a row
        of outputs."""
        sides = zip((row.tokens, row.targets), row.others, strict=True)
        tokens, targets = ([first, *parts[1:]] if other else parts for parts, first in sides)
        packs = [Pack(self._examples(tokens, targets))]
        if rows > 1:
            beside = self._other_row if row is self.short else beside_long(row)
            packs.append(Pack(self._examples(beside.tokens, beside.targets)))
        collate = PackingCollator(
            rows=len(packs),
            row_tokens=sum(map(len, targets)),
            position_ids_start=start,
            pad_to_multiple_of=len(row) + PADDING if padded else None,
            **self._task(),
        )
        batch: Any = collate(packs)
        del batch["labels"]
        return batch, batch["decoder_input_ids" if self.crossed else "input_ids"].shape[1]

    def _task(self) -> dict[str, Any]:
        """What the collator is told of its task."""
        if self.sound is not None:
            return {"task": "speech_seq2seq"}
        return {"task": "seq2seq" if self.crossed else "causal_lm"}

    def _examples(self, tokens: list[Tensor], targets: list[Tensor]) -> list[dict[str, Any]]:
        if not self.crossed:
            return [{"input_ids": ids} for ids in tokens]
        heard: list[dict[str, Any]] = [{} for _ in tokens]
        if self.sound is not None:
            heard = [{self.sound: self._sounds(ids[None])[0]} for ids in tokens]
        return [
            {"input_ids": ids, "labels": goal, "decoder_input_ids": goal, **sound}
            for ids, goal, sound in zip(tokens, targets, heard, strict=True)
        ]

    def _packed(self, row: Row, start: int, other: bool) -> Tensor:
        """The outputs of all sequences in one row and, behind them, in the second, if there is
        one."""
        batch, width = self._batch(
            row, start, other=other, rows=self.batches.rows, padded=self.batches.padded
        )
        if self.model.training and self.sound is None:
            batch |= kinds_of_tokens(self.base, batch["input_ids"])
        outputs = self._call(batch, width, hidden=row is not self.short)
        second = (
            outputs[1, : self._outputs_of(self._other_row)[0]]
            if len(outputs) > 1
            else outputs[0, :0]
        )
        return torch.cat([outputs[0, : sum(self._outputs_of(row))], second])

    def _call(
        self,
        inputs: dict[str, Any],
        length: int,
        *,
        or_none: bool = False,
        hidden: bool = False,
        rewind: bool = True,
    ) -> Any:
        """The first output with one vector for each token, in float64: (rows, length, features).

        `hidden`: what the head is given instead; it then computes a single token of each row.
        """
        seen: list[Any] = []
        with contextlib.ExitStack() as hooks:
            if self._body is not None:  # called by the model, whose hooks may be needed
                hooks.callback(
                    self._body.register_forward_hook(
                        lambda module, args, output: seen.append(output)
                    ).remove
                )
            head = output_embeddings(self.base) if hidden or self._before_head else None
            if head is not None:
                hooks.callback(
                    head.register_forward_pre_hook(_last_token_alone(length, seen)).remove
                )
            try:
                output = self._run(inputs, rewind)
            except Exception:
                if not seen:  # else only the head does not like the batch
                    raise
        output = seen[-1] if seen else output
        values = (
            [output]
            if isinstance(output, Tensor)
            else output.values()
            if isinstance(output, dict)
            else output
        )
        for value in values:
            if (
                isinstance(value, Tensor)
                and value.ndim == 3
                and value.shape[1] == length
                and value.is_floating_point()
            ):
                return value.cpu().double()
        if or_none:
            return None
        raise ValueError(
            f"{type(self.base).__name__} returns nothing of shape (rows, {length}, features)"
        )

    def _run(self, inputs: dict[str, Any], rewind: bool = True) -> Any:
        """The model's output, by default with the random states of the first run; autocast inside
        is remembered."""
        embeddings = self.base.get_input_embeddings()
        device = embeddings.weight.device
        inputs = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }

        def note_dtype(module: nn.Module, args: Any) -> None:
            if torch.is_autocast_enabled(device.type):  # by accelerate, inside forward
                self._dtypes.add(torch.get_autocast_dtype(device.type))

        if rewind:
            self._states.rewind()
        hook = embeddings.register_forward_pre_hook(note_dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # checkpointing without gradients
                return self.model(**inputs)
        finally:
            hook.remove()


def _last_token_alone(length: int, seen: list[Any]) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    """A hook before a head: notes hidden states (rows, length, features), and leaves it the last
    token of each row."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = args[0] if args else None
        if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[1] != length:
            return None
        seen.append([states])
        return (states[:, -1:], *args[1:])

    return before


def kinds_of_tokens(base: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Text alone, said to models that ask for it in training because of their images."""
    takes = inspect.signature(base.forward).parameters
    return {
        key: torch.zeros_like(tokens)
        for key in ("token_type_ids", "mm_token_type_ids")
        if key in takes
    }


def stock_attention(base: Any) -> Any:
    """transformers' own attention, where ours is chosen: what its implementation gets wrong must
    show."""
    if base.config._attn_implementation != "fastft":
        return contextlib.nullcontext()
    return attention(base, "sdpa" if getattr(base, "_supports_sdpa", False) else "eager")


def _mixers(base: nn.Module) -> list[str]:
    """Classes of layers that mix tokens otherwise than by attention: convolutions over time and
    recurrences."""
    found = set()
    for module in base.modules():
        convolves = any(
            isinstance(part, nn.Conv1d) and part.kernel_size[0] > 1 for part in module.children()
        )
        decays = any(
            "time_decay" in name or "A_log" in name
            for name, _ in module.named_parameters(recurse=False)
        )
        if convolves or decays or "lstm" in type(module).__name__.lower():
            found.add(type(module).__name__)
    return sorted(found)[:3]


def _says_nothing(outputs: Tensor) -> bool:
    """Whether no output (tokens, features) is finite and different for different tokens: a head of
    zeros, NaN."""
    finite = outputs[:, outputs.isfinite().all(0)]
    return finite.numel() == 0 or bool((finite == finite[:1]).all())


def _scale(alone: list[Tensor]) -> float:
    """Root mean square of outputs; features that are never used, at -inf or at the dtype's least,
    do not count."""
    outputs = torch.cat(alone)
    size = outputs[:, outputs.isfinite().all(0)].pow(2).mean(0).sqrt()
    usual = float(size.median())
    return float((size.clamp(max=100 * usual) if usual else size).pow(2).mean().sqrt()) or 1.0


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square of the difference for each token; what is the same infinity in both does not
    differ."""
    return torch.where(a == b, 0.0, a - b).pow(2).mean(-1).sqrt()
