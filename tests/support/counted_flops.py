"""FLOPs as torch's own counter has them: of real passes over one document at a time."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def all_counted(model: Any) -> Any:
    """`model` with eager attention and eager experts: torch's counter knows neither sdpa's kernel
    for a CPU nor grouped products."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    for config in configs.values():
        for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if hasattr(config, name):
                setattr(config, name, "eager")
    return model


def alone(model: nn.Module, tokens: Sequence[int], outputs: Sequence[int] | None) -> dict[str, Any]:
    """A batch of one document; labels are its tokens where there is no decoder beside it."""
    ids = torch.tensor([tokens])
    labels = ids if outputs is None else torch.tensor([outputs])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    accepted = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return {key: value for key, value in batch.items() if takes_any or key in accepted}


def counted_flops(model: nn.Module, **batch: Tensor) -> int:
    """FLOPs of a forward and a backward pass, counted while they run."""
    with FlopCounterMode(display=False) as counter:
        output = model(**batch)
        (output["loss"] if "loss" in output else output["logits"].sum()).backward()
    model.zero_grad()
    return counter.get_total_flops()
