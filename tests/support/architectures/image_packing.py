"""Image-text models, packed against alone: their own loss and the gradients of all parameters.

The oracle is the model as transformers has it, fed with one example after another as a processor
gives them; its losses weigh by their labels, as the mean over a packed batch does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import fastft
from fastft.integrations.packing import PackingCallback
from support.architectures.images import Example, model_and_examples
from support.architectures.models import Case
from support.architectures.packing import EXACT, LEAK, MASK, OFF, OURS, RAISES, REFUSED, STOCK

LOSS, GRADIENT, MOVED = 1e-6, 1e-4, 1e-6  # relative; of a leak, to the outputs' mean square

__all__ = ["EXACT", "LEAK", "MASK", "OFF", "OURS", "RAISES", "REFUSED", "STOCK", "Outcome"]


@dataclass
class Outcome:
    """A line of the table.

    Attributes:
        inputs: what an example has of its images.
        axes: of positions.
        as_it_is: what becomes of a packed batch with transformers' own attention.
        best: what keeps sequences apart in Trainer; REFUSED where nothing does.
        loss: error of the loss in Trainer.
        gradient: the largest of a parameter's gradient.
        why: it is refused.
    """

    inputs: str
    axes: int
    as_it_is: str
    best: str
    loss: float = 0.0
    gradient: float = 0.0
    why: str = ""


@dataclass
class Run:
    """Loss, logits (tokens, V) and gradients by parameter."""

    loss: float
    logits: Tensor
    gradients: dict[str, Tensor]


def _run(model: Any, batches: list[dict[str, Any]], counts: list[int]) -> Run:
    """The batches one after another, each with its share of the labels."""
    model.zero_grad(set_to_none=True)
    loss, logits = 0.0, []
    for batch, count in zip(batches, counts, strict=True):
        output = model(**batch)
        (output.loss * count / sum(counts)).backward()
        loss += float(output.loss) * count / sum(counts)
        logits.append(output.logits.detach().flatten(0, 1))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Run(loss, torch.cat(logits), gradients)


def _changed(example: Example) -> Example:
    """Other pixels, and other words before the image."""
    made = {**example, "input_ids": example["input_ids"].clone()}
    made["input_ids"][0, :3] = made["input_ids"][0, :3].flip(0) + 1
    made["pixel_values"] = example["pixel_values"].flip(-1) * 0.5
    return made


def _gradient_error(truth: Run, other: Run) -> float:
    norms = {name: float(gradient.norm()) for name, gradient in truth.gradients.items()}
    least = 1e-2 * max(norms.values())
    assert truth.gradients.keys() == other.gradients.keys()
    return max(
        float((other.gradients[name] - gradient).norm()) / max(norms[name], least)
        for name, gradient in truth.gradients.items()
    )


class Packed:
    """A model, its examples alone, and what becomes of them in one row."""

    def __init__(self, case: Case) -> None:
        self.model, self.examples = model_and_examples(case)
        counts = [int((one["labels"][0, 1:] != -100).sum()) for one in self.examples]
        self.alone = _run(self.model, self.examples, counts)
        self.collator = fastft.PackingCollator(task="image_text_to_text", model=self.model)
        for module in self.model.modules():  # of the latest batch, which is not to help the next
            if "rope_deltas" in vars(module):
                module.rope_deltas = None

    def outcome(self) -> tuple[str, float, float, str]:
        """What becomes of a packed batch, errors of loss and gradients, and why."""
        try:
            packed = _run(self.model, [dict(self.collator(self.examples))], [1])
            with torch.no_grad():
                changed = self.collator([_changed(self.examples[0]), *self.examples[1:]])
                moved = self.model(**changed).logits[0]
        except Exception as error:
            return RAISES, 0.0, 0.0, " ".join(str(error).split())[:120]
        scale = float(self.alone.logits.pow(2).mean().sqrt())
        first = self.examples[0]["input_ids"].shape[1]
        if float((moved - packed.logits)[:first].abs().max()) < 1e-4 * scale:
            raise AssertionError("the first example does not look at what was changed in it")
        leak = float((moved - packed.logits)[first:].abs().max()) / scale
        loss = abs(packed.loss - self.alone.loss) / abs(self.alone.loss)
        gradient = _gradient_error(self.alone, packed)
        if leak > 10 * MOVED:
            return LEAK, loss, gradient, f"other examples move by {leak:.0e}"
        exact = loss <= LOSS and gradient <= GRADIENT
        return (EXACT if exact else OFF), loss, gradient, ""


def train_begin(packed: Packed) -> PackingCallback:
    """The callback after what Trainer does with it."""
    callback = PackingCallback()
    loader = SimpleNamespace(collate_fn=packed.collator, dataset=packed.examples)
    args = SimpleNamespace(n_gpu=1, torch_compile=False)
    callback.on_train_begin(args, None, None, model=packed.model, train_dataloader=loader)
    return callback


def examine(case: Case) -> Outcome:
    """Compares one class, and asserts that no wrong outcome is silent."""
    packed = Packed(case)
    images = [key for key in packed.examples[0] if re.match("pixel|image", key)]
    positions = packed.collator.positions
    as_it_is, *_, raised = packed.outcome()
    made = Outcome(", ".join(images), positions.axes if positions else 1, as_it_is, REFUSED)
    try:
        fastft.check_packing(packed.model, examples=packed.examples)
    except (fastft.PackingLeakError, ValueError) as error:
        made.why = str(error).partition(": ")[2].partition(". ")[0]
    else:
        assert as_it_is == EXACT, ("check_packing passes a model that is not exact", made, raised)
    try:
        callback = train_begin(packed)
    except (fastft.PackingLeakError, ValueError):
        return made
    try:
        masked = packed.model.config._attn_implementation == "fastft_block_mask"
        kind, made.loss, made.gradient, why = packed.outcome()
    finally:
        callback.restore()
    assert kind == EXACT, ("a silent fault in Trainer", made, kind, why)
    made.best, made.why = MASK if masked else OURS if callback.switched else STOCK, ""
    return made
