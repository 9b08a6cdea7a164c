"""Traces of a training that nobody has run: a walk of a few parameters, which rounding moves."""

import copy
import math
import random

from fastft.commands.trace import Micro, Step, Trace

NAMES = ["embed.weight", "attention.weight", "attention.bias", "norm.weight", "final_norm.weight"]
RATE, DECAY = 1e-3, 0.1


def trace(variant="stock", rounding=1e-7, steps=12, micro=2, seed=0, growth=1.3, dtype="float32"):
    """A trace whose numbers are off by relative `rounding`, drawn by `seed`, growing by step.

    `micro` is the number of batches of a step.
    """
    drawn = random.Random(f"{variant} {seed}")
    weights = [3.0, -2.0, 0.1, 5.0, 6.0]
    made = [one_step(t, micro, drawn, rounding * growth**t, weights) for t in range(steps)]
    return Trace(
        variant,
        dtype=dtype,
        compute_dtype=dtype,
        parameters=list(NAMES),
        weight_decay=[DECAY, DECAY, 0.0, 0.0, 0.0],
        projection0=[3.0, -2.0, 0.1, 5.0, 6.0],
        versions={"torch": "2"},
        machine={"processor": "none"},
        trainer="Trainer",
        model="Model",
        optimizer="AdamW",
        peak_process=2**27,
        peak_kind="process",
        steps=made,
        ended="steps",
    )


def one_step(t, micro, drawn, rounding, weights):
    """Step `t`: its truth is the same for all, rounding is `drawn`."""
    truth = random.Random(f"truth {t}")

    def rounded(value):
        return value * (1 + rounding * drawn.gauss(0, 1))

    batches = []
    for number in range(micro):
        supervised = truth.randrange(20, 40)
        name = f"{t} {number}"
        batches.append(
            Micro(
                loss=rounded(4 * math.exp(-t / 20) * truth.uniform(0.9, 1.1) / micro),
                inputs=f"inputs {name}",
                targets=f"targets {name}",
                documents=4,
                tokens=60,
                supervised=supervised,
                padding=20,
                ignored=60 - supervised,
                learning=supervised,
                shift=1,
            )
        )
    gradients = [rounded(truth.uniform(0.5, 2)) for _ in NAMES]
    moved = [rounded(RATE * truth.uniform(0.5, 2)) for _ in NAMES]
    for place, size in enumerate(moved):
        weights[place] += size * truth.choice([-1, 1]) * (1 + rounding * drawn.gauss(0, 1))
    return Step(
        loss=sum(batch.loss for batch in batches),
        micro=batches,
        grad_norm=math.hypot(*gradients),
        learning_rate=[RATE, RATE],
        gradients=gradients,
        moments=[0.1 * gradient for gradient in gradients],
        moved=moved,
        projection=list(weights),
        weights=f"{drawn.random()}" if rounding else f"{t}",
        random=f"random {t}",
        drew=False,
        seconds=0.5 * (1 + 0.05 * drawn.random()),
    )


def changed(original, change):
    """A copy of a trace after `change(step, t)` of each of its steps."""
    other = copy.deepcopy(original)
    for t, step in enumerate(other.steps):
        change(step, t)
    return other
