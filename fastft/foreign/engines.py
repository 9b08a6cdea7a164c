"""The engines that train: what accelerate and DeepSpeed were told, and do to an optimizer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from fastft.foreign.models import base_model
from fastft.foreign.objects import class_names


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and DeepSpeed, which keep it as
    `.optimizer`."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def is_counting_step(step: Any, stock: Callable[..., Any]) -> bool:
    """Whether a scheduler has put `step` on an optimizer, around the `stock` one of its class."""
    return hasattr(step, "_wrapped_by_lr_sched") and getattr(step, "__wrapped__", None) is stock


def is_prepared(thing: Any) -> bool:
    """Whether an Accelerator has prepared it already."""
    return bool(getattr(thing, "_is_accelerate_prepared", False))


def deepspeed_config(args: Any) -> dict[str, Any] | None:
    """DeepSpeed's configuration as a TrainingArguments has it, its own or `accelerate launch`'s;
    None without."""
    return getattr(getattr(args, "deepspeed_plugin", None), "deepspeed_config", None)


def engine_config(accelerator: Any) -> dict[str, Any]:
    """DeepSpeed's configuration as an Accelerator has it; empty where DeepSpeed does not train."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return {} if plugin is None else plugin.deepspeed_config


def engine_of(args: Any) -> str | None:
    """Which engine that takes no optimizer from outside a Trainer with `args` is going to use; None
    for none.

    `accelerate launch` says it in the environment, and accelerate obeys that beside `args`.
    """
    if (
        getattr(args, "deepspeed", None)
        or deepspeed_config(args) is not None
        or _is_set("ACCELERATE_USE_DEEPSPEED")
    ):
        return "DeepSpeed"
    return "FSDP" if getattr(args, "fsdp", None) or _is_set("ACCELERATE_USE_FSDP") else None


def _is_set(variable: str) -> bool:
    # accelerate's words
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes", "y", "on", "t")


def replaces_optimizers(config: dict[str, Any]) -> bool:
    """Whether accelerate puts DeepSpeedCPUAdam in the place of an optimizer under this
    configuration of DeepSpeed."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none" and config.get(
        "zero_force_ds_cpu_optimizer", True
    )


def optimizers_are_replaced() -> bool:
    """`replaces_optimizers` of the engine that accelerate has started in this process, if it
    has."""
    state = _state_of_accelerate()
    return (
        state is not None
        and state.distributed_type == "DEEPSPEED"
        and replaces_optimizers(state.deepspeed_plugin.deepspeed_config)
    )


def gradients_are_parts() -> bool:
    """Whether accelerate has started an engine in this process that hands an optimizer plain
    vectors, which are this process's part of all gradients: ZeRO from stage 1 on, and FSDP1."""
    state = _state_of_accelerate()
    if state is None:
        return False
    if state.distributed_type == "DEEPSPEED":
        zero = state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        return bool(zero.get("stage", 0) != 0)
    return bool(state.distributed_type == "FSDP" and state.fsdp_plugin.fsdp_version == 1)


def losses_are_scaled() -> bool:
    """Whether accelerate has started mixed precision of fp16 in this process, which scales
    losses."""
    return getattr(_state_of_accelerate(), "mixed_precision", "no") == "fp16"


def _state_of_accelerate() -> Any:
    module = sys.modules.get("accelerate.state")
    return None if module is None or not module.is_initialized() else module.AcceleratorState()


def of_deepspeed(optimizer: Any) -> bool:
    """Whether a class of DeepSpeed holds or is the optimizer: its parameters are then flat parts of
    the model's."""
    while optimizer is not None:
        if type(optimizer).__module__.partition(".")[0] == "deepspeed":
            return True
        optimizer = getattr(optimizer, "optimizer", None)
    return False


def is_deepspeed_adam(optimizer: Any) -> bool:
    """Whether it is what accelerate puts in the place of others; `adam_w_mode` says if its decay is
    decoupled."""
    return "DeepSpeedCPUAdam" in class_names(optimizer)


def same_batch_ranks(model: Any, args: Any) -> int:
    """How many processes compute the same batch together, each a part of the model: those of tensor
    parallelism, transformers', DeepSpeed's or accelerate's."""
    of_deepspeed = (deepspeed_config(args) or {}).get("tensor_parallel", {}).get("autotp_size")
    of_accelerate = getattr(_parallelism(), "tp_size", None)
    return getattr(base_model(model), "_tp_size", None) or of_deepspeed or of_accelerate or 1


def rows_are_cut() -> bool:
    """Whether accelerate cuts the rows of a batch between processes (context, sequence
    parallelism)."""
    sizes = (getattr(_parallelism(), name, None) or 1 for name in ("cp_size", "sp_size"))
    return any(size > 1 for size in sizes)


def _parallelism() -> Any:
    """accelerate's configuration of parallelism in this process; None without."""
    return getattr(_state_of_accelerate(), "parallelism_config", None)
