"""What one process of `python -m fastft compare` saw of a training: `Trace`, JSON on the disk.

A trace has numbers only, none of the user's text: batches, weights and random states are digests,
and every parameter's weight is one fixed random projection.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastft.commands.pieces import PIECES

VARIANTS = ("stock", "fast", "noise", "fp32", *PIECES)


@dataclass
class Micro:
    """One forward and backward pass.

    Attributes:
        loss: what the pass adds to the loss of its optimizer step.
        inputs: a digest of the documents' tokens, whatever their order, their padding or their
            packing. In masked language modelling the tokens that the mask hides are put back.
        targets: the same of (tokens, labels); the label that causal models never predict, of a
            document's first token, is left out.
        documents: how many there are; a padded row is one, a packed row several.
        packed: whether a row holds several.
        tokens: without padding.
        supervised: labels that are not ignored (and not a causal document's first).
        padding: elements of `input_ids` beyond `tokens`.
        ignored: of `tokens`, how many have a label that is ignored. 0 where labels are not one
            for each token.
        learning: positions whose row of the output head's input got a gradient; None where no
            head was seen to get one.
        shift: by how many positions the learning rows come before the labels: 1 for a causal
            model, 0 for a masked one; None where no shift in 0, 1, 2 explains them.
    """

    loss: float
    inputs: str = ""
    targets: str = ""
    documents: int = 0
    packed: bool = False
    tokens: int = 0
    supervised: int = 0
    padding: int = 0
    ignored: int = 0
    learning: int | None = None
    shift: int | None = None


@dataclass
class Step:
    """One optimizer step.

    Lists with one number for each parameter are in the order of `Trace.parameters`, and cover this
    process's shard of it.

    Attributes:
        loss: the sum of the micro losses: what Trainer logs, before it averages over processes.
        micro: the passes that it accumulates.
        grad_norm: of all gradients, before clipping; None where it is not known.
        learning_rate: of each parameter group.
        gradients: norms of the gradients as the optimizer sees them, after every clipping; NaN
            for a parameter without one; empty where an engine keeps them to itself.
        moments: norms of the optimizer's `exp_avg` after the step, dequantised; NaN for a
            parameter without one; None for an optimizer that has none.
        moved: norms of the changes of the weights in this step, in fp32 where the optimizer keeps
            more bits of a weight than the model.
        projection: one fixed random projection of each weight after the step, from the same bits
            as `moved`: two runs that differ by d in a weight differ here by about the norm of d.
        weights: a digest of the weights after the step, as the model holds them.
        random: a digest of all random states after the step.
        drew: whether a forward or backward pass drew random numbers (dropout).
        seconds: wall time from the end of the step before, without what recording took.
    """

    loss: float
    micro: list[Micro]
    grad_norm: float | None = None
    learning_rate: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    moments: list[float] | None = None
    moved: list[float] = field(default_factory=list)
    projection: list[float] = field(default_factory=list)
    weights: str = ""
    random: str = ""
    drew: bool = False
    seconds: float = 0.0

    @property
    def micro_losses(self) -> list[float]:
        """The losses of the passes."""
        return [micro.loss for micro in self.micro]

    @property
    def batches(self) -> list[str]:
        """The digests of the passes' examples, labels included."""
        return [micro.targets for micro in self.micro]

    @property
    def tokens(self) -> int:
        """Tokens without padding, of all passes."""
        return sum(micro.tokens for micro in self.micro)

    @property
    def supervised(self) -> int:
        """Labels that are not ignored, of all passes."""
        return sum(micro.supervised for micro in self.micro)

    @property
    def padding(self) -> int:
        """Padding, of all passes."""
        return sum(micro.padding for micro in self.micro)

    @property
    def ignored(self) -> int:
        """Tokens whose label is ignored, of all passes."""
        return sum(micro.ignored for micro in self.micro)


@dataclass
class Trace:
    """One process's record of a training, up to `compare`'s last step.

    Attributes:
        variant: one of `VARIANTS`: stock; with fastft; stock with the smallest noise, or with
            fp32 weights; or the piece of fastft that alone was on.
        rank, world: which process of how many.
        versions: of Python, torch, fastft and what else was there, by package.
        machine: what it ran on: "processor", "threads", "device", ...
        trainer: the class that trained: `Trainer`, `SFTTrainer`, ..., or `Accelerator`.
        model: the model's class.
        dtype: of most of the trainable weights ("bfloat16").
        compute_dtype: that of autocast, `dtype` without it.
        parameters: names of the trainable parameters.
        weight_decay: of each parameter, as the optimizer's groups have it; NaN for one that no
            group has.
        projection0: `Step.projection` before the first step.
        optimizer: its class.
        noise: where the noise of the variant "noise" is added, and how much, in words.
        steps: the steps.
        lines: what plug did, a sentence for each piece; empty in stock.
        fused: how many losses were fused.
        materialised: places (file:line) which asked for real logits.
        skipped: why a model was left as it is.
        leak: by how much the outputs of a packed document change, relative to their largest, when
            the tokens of the document before it do; None where no packed batch was seen, or
            nobody could tell.
        peak_device: bytes of the device's allocator at most, recording left out; None on a CPU.
        peak_process: bytes of the process at most, above what it had when training began.
        peak_kind: how `peak_process` was measured, in words.
        ended: "steps", all that were asked for; "script", it trained fewer; "error".
        error: the traceback of the script's exception; or why there is nothing to record.
    """

    variant: str
    rank: int = 0
    world: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    trainer: str = ""
    model: str = ""
    dtype: str = ""
    compute_dtype: str = ""
    parameters: list[str] = field(default_factory=list)
    weight_decay: list[float] = field(default_factory=list)
    projection0: list[float] = field(default_factory=list)
    optimizer: str = ""
    noise: str = ""
    steps: list[Step] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)
    fused: int = 0
    materialised: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    leak: float | None = None
    peak_device: int | None = None
    peak_process: int = 0
    peak_kind: str = ""
    ended: str = "script"
    error: str | None = None

    def save(self, path: str | Path) -> None:
        """Writes the trace; the file is whole, and on the disk, or it is not there."""
        path = Path(path)
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        with open(aside, "w") as file:
            json.dump(dataclasses.asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Reads what `save` wrote."""
        fields: dict[str, Any] = json.loads(Path(path).read_text())
        steps = [
            Step(**{**step, "micro": [Micro(**micro) for micro in step["micro"]]})
            for step in fields.pop("steps")
        ]
        return cls(**fields, steps=steps)
