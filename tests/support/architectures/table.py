"""The table of `make sweep`: a pytest plugin that gathers the outcomes of all workers and writes
them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from support.architectures.models import MAPPINGS, Case, all_cases
from support.architectures.outcome import (
    FUSED,
    INERT,
    KINDS,
    MATERIALISED,
    NONDETERMINISTIC,
    NOT_RUN,
    WRONG,
    Outcome,
)

_MEANING = {
    FUSED: "loss and all gradients are those of stock, and no logits were made",
    MATERIALISED: "the same, but something asked for real logits",
    INERT: "stock: the model has no plain linear head, or does not call it",
    NONDETERMINISTIC: "two runs of stock differ, so that nothing can be said",
    NOT_RUN: "stock cannot be built or trained here with a shrunken config",
    WRONG: "loss, a gradient or `outputs.logits` differ",
}


class Table:
    """Hears of every test, in whichever worker it ran, and writes the table at the end."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.outcomes: dict[str, Outcome] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "architecture":
                self.outcomes[value["case"]] = Outcome(**value["outcome"])

    def pytest_sessionfinish(self) -> None:
        died = Outcome(NOT_RUN, "its process died")
        self.path.write_text(
            written([(case, self.outcomes.get(str(case), died)) for case in all_cases()])
        )


def written(rows: list[tuple[Case, Outcome]]) -> str:
    """The page: counts, then one line for each class, what is not fused first."""
    classes = len({case.class_name for case, outcome in rows if outcome.kind == FUSED})
    lines = [
        "# The fused loss on every architecture",
        "",
        f"`make sweep`: transformers {transformers.__version__}, torch "
        f"{torch.__version__.split('+')[0]}, on a CPU.",
        "",
        "Every class that transformers lists for causal and masked language models, sequence to "
        "sequence and",
        "image-text to text (with text alone where the model allows it), with a shrunken random "
        "config: loss and all",
        "gradients under `fastft.fused_loss(model)` against stock, in fp32 (with "
        "`num_items_in_batch` as well) and in",
        "bf16 autocast. Logit scales and softcaps have non-trivial values.",
        "",
        f"{classes} distinct classes are exact and fused.",
        "",
        "| outcome | " + " | ".join(MAPPINGS) + " | sum | meaning |",
        "|---|" + "---|" * (len(MAPPINGS) + 2),
    ]
    for kind in KINDS:
        found = [case.mapping for case, outcome in rows if outcome.kind == kind]
        counts = [found.count(mapping) for mapping in MAPPINGS]
        lines.append(
            f"| {kind} | {' | '.join(map(str, counts))} | **{len(found)}** | {_MEANING[kind]} |"
        )
    lines += [
        "",
        "Errors are relative, the largest of the loss and of all gradients. fp32: fused against "
        "stock and, in",
        "brackets, what one more rounding of the logits does to stock. bf16: fused against stock "
        "fp32 and, in",
        "brackets, stock bf16 against stock fp32.",
        "",
    ]
    others = [row for row in rows if row[1].kind != FUSED]
    lines += [
        "## Not fused, and why",
        "",
        "| mapping | model type | class | outcome | why |",
        "|---|---|---|---|---|",
    ]
    for case, outcome in sorted(others, key=lambda row: (-KINDS.index(row[1].kind), row[0])):
        why = outcome.why.replace("|", "\\|")
        lines.append(
            f"| {case.mapping} | {case.model_type} | {case.class_name} | {outcome.kind} | {why} |"
        )
    lines += [
        "",
        f"## {FUSED.capitalize()}",
        "",
        "| mapping | model type | class | fp32 | bf16 | |",
        "|---|---|---|---|---|---|",
    ]
    for case, outcome in rows:
        if outcome.kind == FUSED:
            fp32, bf16 = (
                f"{outcome.fp32:.0e} ({outcome.fp32_nudged:.0e})",
                f"{outcome.bf16:.0e} ({outcome.bf16_stock:.0e})",
            )
            bf16 = bf16 if outcome.bf16 else "not run"
            lines.append(
                f"| {case.mapping} | {case.model_type} | {case.class_name} | {fp32} | {bf16} | "
                f"{outcome.why} |"
            )
    return "\n".join(lines) + "\n"
