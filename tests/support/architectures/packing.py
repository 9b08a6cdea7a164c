"""Packed against alone: one model, its outputs for each token and the gradients of all its
parameters.

The oracle is the model itself, as transformers has it, fed with one sequence after another. The
loss is the sum of all outputs times fixed random numbers, so that its gradient is the sum of the
sequences' gradients.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fastft
from fastft.integrations.implementations import attention_configs
from support.architectures.models import Case, build, takes_any
from support.architectures.shrink import IMAGE_TOKEN, VOCABULARY

EXACT, LEAK, OFF, RAISES = "exact", "LEAK", "off", "raises"  # what becomes of a packed batch
# what keeps a model's sequences apart
STOCK, OURS, MASK, REFUSED = "stock", "fastft", "block mask", "refused"
# longer than the windows and chunks of shrunken models: 16
LENGTHS, TARGETS = (23, 17, 37), (11, 19, 7)
# of fp32, relative to the root mean square of outputs or to the norm of a gradient
TOLERANCE = 2e-4


@dataclass
class Run:
    """Outputs (tokens, features) of all sequences one after another, and gradients by parameter."""

    outputs: Tensor
    gradients: dict[str, Tensor]


class Sequences:
    """Random tokens for one model, and what it makes of each sequence alone."""

    def __init__(self, model: nn.Module, start: int = 0) -> None:
        self.model, self.start = model, start
        self.crossed = bool(getattr(model.config, "is_encoder_decoder", False))
        sizes = [
            getattr(part, "vocab_size", None)
            for part in (model.config, model.config.get_text_config())
        ]
        self.most = (
            min(size for size in (*sizes, VOCABULARY) if size) - (VOCABULARY - IMAGE_TOKEN) - 6
        )
        self.tokens, self.targets = self._random(LENGTHS, 0), self._random(TARGETS, 1)
        self.other = self._random(LENGTHS, 2)[0]
        self.alone = self._run(self._each())

    def _random(self, lengths: tuple[int, ...], seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(5, self.most, (n,), generator=generator) for n in lengths]

    def _each(self) -> Iterator[dict[str, Any]]:
        for tokens, targets in zip(self.tokens, self.targets, strict=True):
            yield {
                "input_ids": tokens[None],
                **({"decoder_input_ids": targets[None]} if self.crossed else {}),
            }

    def _run(self, batches: Any) -> Run:
        """The batches one after another; the output features of all their tokens, in order."""
        outputs = torch.cat([self._outputs(batch).flatten(0, 1) for batch in batches])
        generator = torch.Generator().manual_seed(4)
        weights = torch.randn(
            (sum(TARGETS if self.crossed else LENGTHS), outputs.shape[1]), generator=generator
        )
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        loss = (outputs * weights.repeat(len(outputs) // len(weights), 1)).sum()
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return Run(
            outputs.detach(), {n: g for n, g in zip(named, found, strict=True) if g is not None}
        )

    def _outputs(self, batch: dict[str, Any]) -> Tensor:
        output = self.model(**batch)
        value = output["logits"] if isinstance(output, dict) else output[0]
        return (
            value
            if value.ndim == 3
            else value.view(batch["input_ids"].shape[0], -1, value.shape[-1])
        )

    def packed(self, first: Tensor | None = None) -> dict[str, Any]:
        """The batch of `fastft.PackingCollator`, without labels; `first` instead of the first
        sequence."""
        tokens = [self.tokens[0] if first is None else first, *self.tokens[1:]]
        collate = fastft.PackingCollator(position_ids_start=self.start)
        batch, targets = (
            collate([{"input_ids": ids} for ids in parts]) for parts in (tokens, self.targets)
        )
        del batch["labels"]
        if self.crossed:
            del batch["position_ids"], batch["seq_idx"]
            batch |= {
                "decoder_input_ids": targets["input_ids"],
                "decoder_cu_seq_lens": targets["cu_seq_lens_q"],
                "decoder_max_length": targets["max_length_q"],
            }
        return batch

    def outcome(self, change: Any) -> tuple[str, str]:
        """What becomes of the packed batch after `change`, and why."""
        try:
            with torch.no_grad():
                packed, moved = (
                    self._outputs(change(self.packed(first))).flatten(0, 1)
                    for first in (None, self.other)
                )
        except Exception as error:
            return RAISES, f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        rows = len(packed) // len(self.alone.outputs)
        scale = float(self.alone.outputs.pow(2).mean().sqrt())
        first = (TARGETS if self.crossed else LENGTHS)[0]
        leak = float((moved - packed)[first : len(self.alone.outputs)].abs().max()) / scale
        error = float((packed - self.alone.outputs.repeat(rows, 1)).abs().max()) / scale
        if leak > TOLERANCE:
            return LEAK, f"moves by {leak:.0e}"
        if not error <= TOLERANCE:
            return OFF, f"outputs off by {error:.0e}"
        name, error = self._worst_gradient(self._run([change(self.packed())]).gradients, rows)
        return (
            (EXACT, "")
            if error <= 5 * TOLERANCE
            else (OFF, f"gradient of {name} off by {error:.0e}")
        )

    def _worst_gradient(self, gradients: dict[str, Tensor], rows: int) -> tuple[str, float]:
        truth = self.alone.gradients
        least = (
            1e-2 * max((float(gradient.norm()) for gradient in truth.values()), default=0.0) + 1e-30
        )
        errors = {name: float("inf") for name in truth.keys() ^ gradients.keys()}
        for name in truth.keys() & gradients.keys():
            difference = float((gradients[name] / rows - truth[name]).norm())
            errors[name] = difference / max(float(truth[name].norm()), least)
        return max(errors.items(), key=lambda item: item[1])


def accepted(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """What the model's forward takes of the batch."""
    names = inspect.signature(model.forward).parameters
    return (
        batch if takes_any(model) else {key: value for key, value in batch.items() if key in names}
    )


def positions_alone(batch: dict[str, Any]) -> dict[str, Any]:
    """What transformers' flattening collator gives."""
    return {key: batch[key] for key in ("input_ids", "position_ids", "use_cache") if key in batch}


def with_cache(batch: dict[str, Any]) -> dict[str, Any]:
    return {**positions_alone(batch), "use_cache": True}


def with_mask(batch: dict[str, Any]) -> dict[str, Any]:
    return {**positions_alone(batch), "attention_mask": torch.ones_like(batch["input_ids"])}


def two_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """The same row twice."""
    rows = ("input_ids", "decoder_input_ids", "position_ids", "seq_idx")
    boundaries = ("cu_seq_lens_q", "cu_seq_lens_k", "decoder_cu_seq_lens")
    twice = {key: torch.cat([batch[key]] * 2) for key in rows if key in batch}
    longer = {
        key: torch.cat([batch[key], batch[key][1:] + batch[key][-1]])
        for key in boundaries
        if key in batch
    }
    return {**batch, **twice, **longer}


def train_begin(model: nn.Module, start: int) -> fastft.PackingCallback:
    """The callback after what Trainer does with it."""
    callback = fastft.PackingCallback()
    loader = SimpleNamespace(collate_fn=fastft.PackingCollator(position_ids_start=start))
    callback.on_train_begin(
        SimpleNamespace(n_gpu=1, torch_compile=False),
        None,
        None,
        model=model,
        train_dataloader=loader,
    )
    return callback


BATCHES = {
    "positions": positions_alone,
    "and a cache": with_cache,
    "and a 2-D mask": with_mask,
    "all keys": lambda batch: batch,
    "two rows": two_rows,
}


def examine(case: Case, start: int | None = None, whole: bool = True) -> dict[str, dict[str, str]]:
    """For each attention implementation that the model takes: what becomes of each of BATCHES as
    transformers runs it, what `check_packing` says, and the outcome in Trainer. `start` None: what
    `check_packing` proposes. Not `whole`: the batch of all keys alone, with the model's default
    implementation and with ours."""
    model: Any = build(case).eval()
    start = _first_position(model) if start is None else start
    sequences, rows = Sequences(model, start), {}
    for implementation in (
        ("eager", "sdpa", "fastft") if whole else (model.config._attn_implementation, "fastft")
    ):
        if not _takes(model, implementation):
            continue
        fits = ("all keys", "two rows") if sequences.crossed else tuple(BATCHES)
        changes = {name: BATCHES[name] for name in (fits if whole else ("all keys",))}
        row = {
            name: sequences.outcome(lambda batch, change=change: accepted(model, change(batch)))[0]
            for name, change in changes.items()
        }
        try:
            fastft.check_packing(model, position_ids_start=start)
            row["check_packing"] = "passes"
        except fastft.PackingLeakError as leak:
            row["check_packing"] = "raises"
            row["why"] = str(leak).partition(": ")[2]
        assert row["all keys"] == EXACT or row["check_packing"] == "raises", (
            "a silent leak",
            implementation,
            row,
        )
        rows[implementation] = {**row, "in Trainer": _in_trainer(model, sequences, start)}
    return rows


def best(rows: dict[str, dict[str, str]]) -> str:
    """What a user of the model is to choose."""
    results = {name: row["in Trainer"] for name, row in rows.items()}
    if results.get("fastft") == EXACT:
        return OURS
    if EXACT in results.values():
        return STOCK
    return MASK if MASK in results.values() else REFUSED


def _takes(model: Any, implementation: str) -> bool:
    """Whether the model has this attention implementation, which it then has, in an encoder's own
    config too."""
    try:
        model.set_attn_implementation(implementation)
    except ValueError:
        return False
    if model.config._attn_implementation != implementation:
        return False
    for config in attention_configs(model):
        config._attn_implementation = implementation
    return True


def _first_position(model: nn.Module) -> int:
    try:
        fastft.check_packing(model)
    except fastft.PackingLeakError as leak:
        found = re.search(r"position_ids_start=(\d+)", str(leak))
        return int(found[1]) if found else 0
    return 0


def _in_trainer(model: Any, sequences: Sequences, start: int) -> str:
    """The outcome of training with the callback; REFUSED if it raised."""
    try:
        callback = train_begin(model, start)
    except fastft.PackingLeakError:
        return REFUSED
    try:
        masked = model.config._attn_implementation == "fastft_block_mask"
        outcome = sequences.outcome(two_rows)
    finally:
        callback.restore()
    assert outcome == (EXACT, ""), ("a silent leak in Trainer", outcome)
    return MASK if masked else EXACT
