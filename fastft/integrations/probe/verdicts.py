"""The packing probe's verdicts: each model is asked once in a process, as long as nothing changes
that a verdict depends on."""

from __future__ import annotations

import contextlib
import types
from typing import Any

from torch import nn
from transformers.utils import logging

from fastft.attention.segments import keeps_segments, packed_attention
from fastft.foreign.models import base_model, class_name, modules_with_hooks
from fastft.foreign.sharding import reason_not_to_run
from fastft.integrations import own_forward
from fastft.integrations.implementations import attention_configs
from fastft.integrations.probe.check_packing import Verdict, judge
from fastft.integrations.probe.rows import Batches

# below "transformers", so that its verbosity rules
logger = logging.get_logger(f"transformers.{__name__}")

_verdicts: dict[Any, Verdict] = {}


def verdict_of(
    model: nn.Module, batches: Batches, args: Any, *, as_it_is: bool = False, switch: bool = False
) -> Verdict:
    """Probes a model that keeps sequences apart; `as_it_is`: by its own means, if at all."""
    hooked, elsewhere = modules_with_hooks(model), reason_not_to_run(model)
    name = class_name(base_model(model))
    if elsewhere is not None:
        logger.info(
            f"fastft: {elsewhere}: in its place the packing probe asks a small model of the class "
            f"and configuration of {name}, with random weights"
        )
    if hooked:
        names = ", ".join(hooked[:5]) + (" and others" if len(hooked) > 5 else "")
        logger.warning(
            f"fastft: the packing probe asks a twin of {name} ({elsewhere}), without the forward "
            f"hooks of {names}"
            if elsewhere is not None
            else f"fastft: the packing probe runs {name} on batches of its own, which the forward "
            f"hooks of {names} see too"
        )
    key = (_key(model, batches, args), as_it_is, as_it_is and keeps_segments(model), switch)
    if key not in _verdicts or hooked:
        with contextlib.nullcontext() if as_it_is else packed_attention(model):
            _verdicts[key] = judge(model, batches, switch=switch)
    return _verdicts[key]


def _key(model: nn.Module, batches: Batches, args: Any) -> Any:
    """Gathers all that a verdict may depend on, but weights and the code of hooks."""
    adapters = getattr(model, "peft_config", {})
    return (
        batches,
        tuple(
            (name, type(module), _attributes(module))
            for name, module in model.named_modules(remove_duplicate=False)
        ),
        tuple(
            (str(vars(config)), config._attn_implementation) for config in attention_configs(model)
        ),
        frozenset((parameter.dtype, parameter.device.type) for parameter in model.parameters()),
        str(adapters) + str(getattr(model, "active_adapter", None)),
        (getattr(args, "bf16", None), getattr(args, "fp16", None)),
    )


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    """Plain attributes of a module, which may be changed after it was made, and functions that were
    put on it, but for those of our own layers, which compute the same."""
    plain = [
        (name, value)
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, bool | int | float | str | None)
    ]
    functions = [
        (name, id(value))
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType) and value.__module__ != own_forward.__name__
    ]
    return (*plain, *functions)
