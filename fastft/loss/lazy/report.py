"""What became of a model's logits, for people to read."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastft.stack import callers


@dataclass
class Report:
    """What became of the logits of a model.

    `fused`: how many losses (and differentiable reductions over the vocabulary) were computed
        without logits.
    `materialised`: what asked for real logits, as "function at file:line", each place once.
    `skipped`: why a head, or the whole model, was left as it is.
    """

    fused: int = 0
    materialised: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def note_skipped(self, reason: str) -> None:
        """Remembers why logits are real, each reason once."""
        if reason not in self.skipped:
            self.skipped.append(reason)

    def note_materialised(self, function: str) -> None:
        """Remembers the caller of `function`."""
        place = f"{function} at {_caller()}"
        if place not in self.materialised:
            self.materialised.append(place)


def _caller() -> str:
    """Says file:line of the innermost frame of neither torch, nor this package, nor an event."""
    for frame in callers():
        module = frame.f_globals.get("__name__", "")
        is_event = module == "transformers.trainer_callback"
        if not is_event and module.split(".")[0] not in ("torch", "fastft"):
            return f"{frame.f_code.co_filename.split('site-packages/')[-1]}:{frame.f_lineno}"
    return "unknown"
