"""A finding of `python -m fastft doctor`, and how checks are asked for theirs.

A check is a function of one subject (the machine, a model, a training) that returns a finding, or
None where all is well. It says only what is certain: a defect that was seen, or slowness that was
counted. Whether an expert would do otherwise is no finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

SEVERITIES = ("wrong", "slow", "note")


@dataclass(frozen=True)
class Finding:
    """Something that says nothing by itself.

    Attributes:
        severity: "wrong": the training is not the one that was meant; "slow": the same training is
            to be had in less time or memory; "note": to know before it becomes one of the two.
        what: a sentence that says what is there, with its figure.
        why: a sentence that says what it does to a training.
        remedy: a sentence that says what to do.
        check: the words of the check that made it.
    """

    severity: str
    what: str
    why: str
    remedy: str
    check: str = ""


Check = Callable[[Any], Finding | None]


def examined(checks: Iterable[Check], subject: Any) -> list[Finding]:
    """The findings of all checks, in their order; a check that fails is a note itself."""
    found = []
    for check in checks:
        words = check.__name__.replace("_", " ")
        try:
            finding = check(subject)
        except Exception as error:
            finding = Finding(
                "note",
                f"This could not be checked: {type(error).__name__}: {error}",
                "Nothing is known of it.",
                "Look at it yourself (docs/doctor.md).",
            )
        if finding is not None:
            found.append(replace(finding, check=words))
    return found
