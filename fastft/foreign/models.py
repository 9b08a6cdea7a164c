"""Models of others: what wraps them, whose forward they have, where they compute."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fastft.foreign.objects import class_names
from fastft.foreign.tensors import is_dtensor

_LIBRARIES = {
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "deepspeed",
    "bitsandbytes",
    "fastft",
}
_DATA_PARALLEL = {"DataParallel", "DistributedDataParallel"}
_WRAPPERS = {*_DATA_PARALLEL, "FullyShardedDataParallel", "DeepSpeedEngine", "OptimizedModule"}


def unwrapped(model: Any) -> Any:
    """The model inside DDP, DataParallel, FSDP1, DeepSpeed and torch.compile, in any nesting;
    PEFT's wrapper stays."""
    while class_names(model) & _WRAPPERS:
        children = model._modules
        name = next(
            (name for name in ("_orig_mod", "_fsdp_wrapped_module", "module") if name in children),
            None,
        )
        if name is None:
            return model
        model = children[name]
    return model


def without_checkpointing(module: Any) -> Any:
    """The module inside `unwrapped`'s wrappers and torch's checkpoint_wrapper, in any nesting."""
    while True:
        module = unwrapped(module)
        inner = getattr(module, "_modules", {}).get("_checkpoint_wrapped_module")
        if inner is None:
            return module
        module = inner


def is_config(thing: object) -> bool:
    """Whether `thing` is a configuration of a transformers model."""
    return "PreTrainedConfig" in class_names(thing)


def base_model(model: Any) -> Any:
    """The model that the user's framework defines, inside `unwrapped`'s wrappers and PEFT's."""
    while True:
        inner = unwrapped(model)
        get_base = getattr(type(inner), "get_base_model", None)
        inner = inner if get_base is None else get_base(inner)
        if inner is model:
            return model
        model = inner


def output_embeddings(model: Any) -> nn.Module | None:
    """What `model` itself calls its output embeddings; None where it has none, or does not say."""
    # transformers' models without a head raise, others have no such method
    with contextlib.suppress(AttributeError, NotImplementedError):
        head = model.get_output_embeddings()
        return head if isinstance(head, nn.Module) else None
    return None


def prompt_learning(model: Any) -> str | None:
    """How PEFT puts virtual tokens before each row of a batch, in words; None where it does not."""
    # no PEFT, or several adapters at a time
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        config = unwrapped(model).active_peft_config
        if config.is_prompt_learning:
            kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
            return f"PEFT's {'p-tuning' if kind == 'p_tuning' else kind.replace('_', ' ')}"
    return None


def modules_with_hooks(model: nn.Module) -> list[str]:
    """Names of the modules with forward hooks that none of the libraries put there; "" is the model
    itself."""
    everywhere = [
        torch.nn.modules.module._global_forward_hooks,
        torch.nn.modules.module._global_forward_pre_hooks,
    ]
    found = ["every module"] if any(_not_of_libraries(hooks) for hooks in everywhere) else []
    for name, module in model.named_modules():
        if _not_of_libraries(module._forward_hooks) or _not_of_libraries(module._forward_pre_hooks):
            found.append(name or type(module).__name__)
    return found


def _not_of_libraries(hooks: Mapping[int, Any]) -> bool:
    for hook in hooks.values():
        while isinstance(hook, functools.partial):
            hook = hook.func
        module = getattr(hook, "__module__", None) or type(hook).__module__
        if str(module).partition(".")[0] not in _LIBRARIES:
            return True
    return False


def whose_forward(model: Any) -> set[str]:
    """The packages that have replaced or wrapped the forward of `model`'s class, and that of its
    class itself."""
    base = base_model(model)
    forwards = (vars(base).get("forward"), type(base).forward)
    functions = (function for forward in forwards for function in wrapped_functions(forward))
    names = (getattr(function, "__globals__", {}).get("__name__", "") for function in functions)
    return {name.partition(".")[0] for name in names}


def wrapped_functions(forward: Any) -> Iterator[Any]:
    """The function of a method, the one that it wraps, and so on inwards."""
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        yield function
        forward = getattr(function, "__wrapped__", None)


def class_without_sharding(module: nn.Module) -> Any:
    """The class of a module as it was before FSDP2 gave it one that derives from it."""
    return next(
        kind
        for kind in type(module).__mro__
        if "FSDPModule" not in {base.__name__ for base in kind.__mro__}
    )


def class_name(model: Any) -> str:
    """The name of a model's class, inside `unwrapped`'s wrappers, and before FSDP2."""
    return str(class_without_sharding(unwrapped(model)).__name__)


def computing_device(model: nn.Module) -> torch.device:
    """Where a model computes, also where its weights are sharded; the CPU for one on the meta
    device."""
    parameter: Any = next(model.parameters(), None)
    if parameter is None or parameter.is_meta:
        return torch.device("cpu")
    if is_dtensor(parameter):  # CPU offload has its shards elsewhere
        return torch.device(parameter.device_mesh.device_type)
    device: torch.device = parameter.device
    return device
