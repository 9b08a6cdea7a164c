"""benchmarks/results/architectures.md: the page of `make sweep` on every language model."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from support.architectures.models import MAPPINGS, all_cases
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


def written(found: dict[str, dict[str, Any]]) -> str:
    """The page: counts, then one line for each class, what is not fused first."""
    died = {"outcome": {"kind": NOT_RUN, "why": "its process died"}}
    rows = [(case, Outcome(**found.get(str(case), died)["outcome"])) for case in all_cases()]
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
