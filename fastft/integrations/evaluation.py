"""Trainer's evaluation loop, as the fused loss sees it."""

from __future__ import annotations

import sys
from types import FrameType

from transformers import Trainer

_LOOPS = ("prediction_step", "evaluation_loop", "evaluate", "predict")


def in_evaluation_loop() -> bool:
    """Whether a method of Trainer that evaluates runs the model right now, and no `generate` in
    between.

    No event of Trainer comes between the last callback of a step and an evaluation's first forward
    pass, and where Trainer computes the loss the model gets no labels: only the stack knows.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name == "generate":
            return False
        if name in _LOOPS and isinstance(frame.f_locals.get("self"), Trainer):
            return True
        frame = frame.f_back
    return False
