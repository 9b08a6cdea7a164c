"""Does a packed document see the one before it? Asked of a model as it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastft.foreign import models, sharding
from fastft.integrations.probe.untouched import untouched
from fastft.integrations.recorder.batches import neighbours


class _Seen(Exception):
    """The hidden states have been seen: the rest of the forward pass is not needed."""


def leak(model: Any, batch: Mapping[str, Any]) -> float | None:
    """By how much a document's hidden states change, relative to their largest, when the document
    before it is turned round.

    Args:
        model: in the wrappers that it is trained in, with whatever is attached to it.
        batch: its keyword arguments, packed.

    Returns:
        None where the model cannot be called by one process alone, or fails, or where no two
        documents lie in one row.
    """
    inner = models.unwrapped(model)
    pair = neighbours(batch)
    if pair is None or sharding.reason_not_to_run(inner) is not None:
        return None
    former, latter = pair
    turned = batch["input_ids"].clone()
    turned.view(-1)[former] = turned.view(-1)[former.flip(0)]
    try:
        before, after = (
            _hidden(inner, {**batch, "input_ids": ids}).flatten(0, 1)[latter].float()
            for ids in (batch["input_ids"], turned)
        )
    except Exception:  # a model of the user's: whatever it raises, nobody can tell
        return None
    return float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))


def _hidden(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The hidden states of the backbone, (R, T, H), or the logits of a model that has none."""
    base = models.base_model(model)
    backbone = getattr(base, "base_model", base)
    seen: list[Any] = []

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output)
        raise _Seen

    with untouched(model):
        hook = None if backbone is base else backbone.register_forward_hook(see)
        try:
            seen.append(model(**batch))
        except _Seen:
            pass
        finally:
            if hook is not None:
                hook.remove()
    output = seen[0]
    hidden: Tensor = (
        output[0]
        if isinstance(output, tuple)
        else next(output[name] for name in ("last_hidden_state", "logits") if name in output)
    )
    return hidden
