"""Who shards a model, and what can then not be done with it."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fastft.foreign.objects import class_names, put_attributes
from fastft.foreign.tensors import in_flat_parameter, is_dtensor


def has_sharded_parts(layer: nn.Module) -> bool:
    """Whether a library takes weights inside `layer` away again before its forward is over."""
    units = {"FSDPModule", "FullyShardedDataParallel"}
    parts = (part for part in layer.modules() if part is not layer)
    return any(class_names(part) & units for part in parts) or any(
        hasattr(parameter, "ds_id") for parameter in layer.parameters()
    )


def sharding_library(module: nn.Module, around: Iterable[nn.Module]) -> str | None:
    """What shards the weight of `module`, which the modules `around` contain; None for nobody."""
    if hasattr(module.weight, "ds_id"):
        return "ZeRO-3"
    kinds = set().union(*map(class_names, around))
    if "FSDPModule" in kinds:
        return "FSDP2"
    # what the hooks of weight_norm, spectral_norm and pruning make has parameters too: weight_g,
    # weight_orig, ...
    has_own = any(name.startswith("weight") for name in module._parameters)
    flattened = not has_own or in_flat_parameter(module.weight)
    return "FSDP1" if flattened or "FullyShardedDataParallel" in kinds else None


def shares_a_resharded_unit(module: nn.Module) -> bool:
    """Whether calling `module` again would have FSDP2 free its neighbours' weights before their
    backward pass."""
    get_state: Any = getattr(module, "_get_fsdp_state", None)
    state = None if get_state is None else get_state()
    if state is None or len(getattr(state, "_modules", (module,))) < 2:
        return False
    groups = getattr(state, "_fsdp_param_groups", None) or [
        getattr(state, "_fsdp_param_group", None)
    ]
    return any(getattr(group, "post_forward_mesh_info", group) is not None for group in groups)


def before_gathers(model: nn.Module, ask: Callable[[Iterable[Any]], Any]) -> Callable[[], None]:
    """Calls `ask` with the sharded parameters of a unit of FSDP2 each time before it gathers them.

    That is before the unit's forward, where another unit prefetches it, or by `unshard()`. The
    event that `ask` returns, or None, is what FSDP2's streams wait for.

    Returns:
        A function which takes it off again.
    """
    units: list[Any] = [one for one in model.modules() if "FSDPModule" in class_names(one)]
    states = {id(state): state for state in (unit._get_fsdp_state() for unit in units)}
    groups = [
        group
        for state in states.values()
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        if group is not None
    ]
    undo = [put_attributes(group, unshard=_asking(group, ask)) for group in groups]

    def restore() -> None:
        for one in undo:
            one()

    return restore


def _asking(group: Any, ask: Callable[[Iterable[Any]], Any]) -> Callable[..., Any]:
    stock = group.unshard

    @functools.wraps(stock)
    def unshard(*args: Any, **kwargs: Any) -> Any:
        event = ask(param.sharded_param for param in group.fsdp_params)
        if event is not None:
            # gathering has streams of its own, which wait for the model's before the root alone
            group._wait_all_gather_streams_on_event(event)
        return stock(*args, **kwargs)

    return unshard


def reason_not_to_run(model: nn.Module) -> str | None:
    """Why `model` cannot be called by one process alone with its real weights; None if it can."""
    if is_fsdp1(model):
        return "FSDP1 shards its parameters"
    for parameter in model.parameters():
        if is_dtensor(parameter) or type(parameter).__name__ == "FlatParameter":
            return "its parameters are sharded"
        if hasattr(parameter, "ds_id"):
            return "DeepSpeed ZeRO-3 shards its parameters"
        # accelerate's hooks fetch what it offloaded
        if parameter.is_meta and not hasattr(model, "hf_device_map"):
            return "its parameters are on the meta device"
    return None


def is_fsdp1(model: Any) -> bool:
    """Whether FSDP1 wraps any part of `model`."""
    return any("FullyShardedDataParallel" in class_names(module) for module in model.modules())


def is_distributed() -> bool:
    """Whether torch.distributed has been set up, if only for one process."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """How many processes there are: 1 where torch.distributed has not been set up."""
    return sys.modules["torch.distributed"].get_world_size() if is_distributed() else 1


def is_under_ddp(parameter: Any) -> bool:
    """Whether a DistributedDataParallel has the parameter, of which nothing about it tells: looks
    at all objects there are."""
    return is_distributed() and any(
        any(own is parameter for own in thing.parameters())
        for thing in gc.get_objects()
        if "DistributedDataParallel" in class_names(thing)
    )
