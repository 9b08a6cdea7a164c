"""benchmarks/results/packing.md: the page of what the packing matrix found."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from support.architectures.packing import (
    BATCHES,
    EXACT,
    LEAK,
    MASK,
    OFF,
    OURS,
    RAISES,
    REFUSED,
    STOCK,
    best,
)
from support.architectures.packing_models import PACKED, UNPACKED

_COLUMNS = (*BATCHES, "check_packing", "in Trainer")
_MEANING = {
    OURS: 'exact with `attn_implementation="fastft"`',
    STOCK: "exact with transformers' eager or sdpa attention, and the keys of `PackingCollator`",
    MASK: "attention code of its own: exact with the mask of T x T that the callbacks bring",
    REFUSED: "the callbacks and `check_packing` raise: train on padded batches",
}
_HEAD = f"""# Packed sequences against the same sequences alone

Three sequences in one row, and two such rows, against the model run on one sequence after another:
outputs of every token and gradients of all parameters, fp32, random models with shrunken configs.

* {EXACT}: outputs and gradients are those of the sequences alone.
* **{LEAK}**: other tokens in the first sequence move the outputs of later ones. Silent in
  transformers.
* **{OFF}**: no sequence sees another, but outputs or gradients are not those of the sequences
  alone.
* {RAISES}: the model's forward raises.

Columns: what transformers makes of a batch of `input_ids` and `position_ids` without a cache (its
flattening collator in its Trainer), with the cache that most configs turn on, with a 2-D mask of
ones; of all keys of `fastft.PackingCollator`, and of two such rows. Then what
`fastft.check_packing` says of the model, and what becomes of it in Trainer with
`fastft.PackingCallback` or `FusedLossCallback`. Flash attention needs a GPU and is not in this
table."""


def written(recorded: dict[str, dict[str, Any]]) -> str:
    """The page: the survey's models by attention implementation, then the others by what is best
    for each."""
    found = {case: value["rows"] for case, value in recorded.items()}
    swept = {case for case, value in recorded.items() if value["swept"]}
    lines = [
        *_HEAD.split("\n"),
        "",
        "`make sweep`, or `pytest tests/integrations/test_packing_matrix.py --packing-matrix FILE` "
        f"for the first table alone: transformers {transformers.__version__}, "
        f"torch {torch.__version__.split('+')[0]}, on a CPU, without causal-conv1d, mamba-ssm and "
        "flash-linear-attention.",
        "",
        "| best | classes | meaning |",
        "|---|---|---|",
    ]
    kinds = [best(rows) for rows in found.values()]
    lines += [f"| {kind} | {kinds.count(kind)} | {meaning} |" for kind, meaning in _MEANING.items()]
    lines += [
        "",
        f"| class | attention | {' | '.join(_COLUMNS)} |",
        "|---|---|" + "---|" * len(_COLUMNS),
    ]
    for case in (str(case) for case in (*PACKED, *UNPACKED) if str(case) in found):
        for implementation, row in found[case].items():
            cells = (_cell(row.get(column, "")) for column in _COLUMNS)
            lines.append(f"| {case.split('-')[-1]} | {implementation} | {' | '.join(cells)} |")
    if swept:
        lines += [
            "",
            "## Every other language model",
            "",
            "| mapping | class | best | all keys, as transformers has it | why not |",
        ]
        lines += ["|---|---|---|---|---|"]
    for case in sorted(swept):
        rows = found[case]
        stock = ", ".join(
            f"{name} {_cell(row['all keys'])}" for name, row in rows.items() if name != "fastft"
        )
        why = next(iter(rows.values())).get("why", "") if best(rows) == REFUSED else ""
        why = why.partition(". ")[0].replace("|", "\\|")
        lines.append(
            f"| {case.partition('-')[0]} | {case.split('-')[-1]} | {best(rows)} | {stock} | {why} |"
        )
    return "\n".join(lines) + "\n"


def _cell(outcome: str) -> str:
    return f"**{outcome}**" if outcome in (LEAK, OFF) else outcome
