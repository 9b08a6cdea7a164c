"""benchmarks/results/packing-images.md: the page of what was found of packed images."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from support.architectures.image_packing import (
    EXACT,
    GRADIENT,
    LEAK,
    LOSS,
    MASK,
    OFF,
    OURS,
    RAISES,
    REFUSED,
    STOCK,
    Outcome,
)

_NOT_ASKED = "not asked"
_MEANING = {
    OURS: 'exact with `attn_implementation="fastft"`, which the callbacks switch to',
    STOCK: "exact with transformers' own attention",
    MASK: "exact with the mask of T x T that the callbacks bring",
    REFUSED: "the callbacks and `check_packing` raise: train on padded batches",
    _NOT_ASKED: "no small model, or no example for its tower, can be made here",
}
_HEAD = f"""# Packed images and text against the same examples alone

Three examples with images of their own sizes in one row, the first of which ends with an image and
the second begins with one, against the model as transformers has it, fed with one example after
another: its own loss and the gradients of all parameters, fp32, random models with shrunken
configs, for every class that transformers lists for image-text-to-text.

* as it is: the batch of `fastft.PackingCollator(task="image_text_to_text", model=model)` with
  transformers' own attention. **{LEAK}**: other pixels and tokens in the first example move the
  outputs of later ones; **{OFF}**: no example sees another, but loss or gradients are others;
  {RAISES}: the model's forward raises.
* in Trainer: with `fastft.PackingCallback` or `FusedLossCallback`. {EXACT} is a loss within
  {LOSS:.0e} and gradients within {GRADIENT:.0e} of theirs alone, and no later example that moves.
* axes: of the positions. More than one (mRoPE) are made by the model's own `get_rope_index`.

`make sweep`, or `pytest -m "sweep or not sweep" tests/integrations/test_image_packing.py
--image-packing FILE`:"""


def written(recorded: dict[str, dict[str, Any]]) -> str:
    """The page: counts, then a line for each class, by what becomes of it."""
    found = {case: Outcome(**value["outcome"]) for case, value in recorded.items()}
    lines = [
        _HEAD,
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, on a "
        "CPU, without causal-conv1d and flash-linear-attention.",
        "",
        "| in Trainer | classes | meaning |",
        "|---|---|---|",
    ]
    for kind, meaning in _MEANING.items():
        classes = {case.split("-")[-1] for case, outcome in found.items() if outcome.best == kind}
        lines.append(f"| {kind} | {len(classes)} | {meaning} |")
    lines += [
        "",
        "| class | images | axes | as it is | in Trainer | loss | gradients | why not |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = list(_MEANING)
    rows = sorted(found.items(), key=lambda one: (order.index(one[1].best), one[0]))
    # a class may stand for several model types: the first is what becomes of it
    classes = dict(reversed([(case.split("-")[-1], outcome) for case, outcome in rows]))
    for name, outcome in reversed(classes.items()):
        exact = outcome.best in (OURS, STOCK, MASK)
        errors = (f"{outcome.loss:.0e}", f"{outcome.gradient:.0e}") if exact else ("", "")
        as_it_is = (
            f"**{outcome.as_it_is}**" if outcome.as_it_is in (LEAK, OFF) else outcome.as_it_is
        )
        why = outcome.why.replace("|", "\\|")
        lines.append(
            f"| {name} | {outcome.inputs} | {outcome.axes or ''} | {as_it_is} | "
            f"{outcome.best} | {errors[0]} | {errors[1]} | {why} |"
        )
    return "\n".join(lines) + "\n"


def not_asked(why: str) -> Outcome:
    """The line of a class of which nothing is known."""
    return Outcome("", 0, "", _NOT_ASKED, why=why)
