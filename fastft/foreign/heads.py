"""Output heads of others: adapters, 4 bits, TRL's fused head, plans of tensor parallelism."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastft.foreign.models import wrapped_functions
from fastft.foreign.objects import class_names
from fastft.foreign.tensors import is_dtensor


def is_adapter(layer: nn.Module) -> bool:
    """Whether it is a layer of one of PEFT's methods, around another layer."""
    return "BaseTunerLayer" in class_names(layer) and "base_layer" in layer._modules


def is_4bit(layer: nn.Module) -> bool:
    """Whether it is bitsandbytes' linear layer of 4 bits, in the layout that can be trained
    through: an evaluation on a CPU may have packed it anew."""
    state = getattr(layer.weight, "quant_state", None)
    return (
        type(layer).__name__ == "Linear4bit"
        and type(layer).__module__.startswith("bitsandbytes")
        and state is not None
        and not getattr(state, "packing_format_for_cpu", False)
    )


def operands_of_4bit(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What such a layer multiplies: the input, the weight of its 4 bits and the bias, in the dtype
    in which it computes."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    dtype = layer.compute_dtype or x.dtype
    dequantize = sys.modules["bitsandbytes"].functional.dequantize_4bit
    weight = dequantize(layer.weight.data, layer.weight.quant_state).to(dtype)
    return x.to(dtype), weight, None if layer.bias is None else layer.bias.to(dtype)


def casts_head_to_fp32(forward: Any) -> bool:
    """Whether `forward` is what TRL gives an output head under `cast_lm_head_to_fp32`."""
    code, space = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    is_of_trl = str(space.get("__name__", "")).startswith("trl.")
    return is_of_trl and getattr(code, "co_name", None) == "cast_forward_to_fp32"


class FusedHead(NamedTuple):
    """What TRL's `add_fused_lm_head` was told, and what it has read in the configuration.

    `temperature`, `cast_lm_head_to_fp32`, `outputs`: its arguments. `logit_scale`, `softcap`: what
    it does to the logits, before it divides them by the temperature. `output`: the class of what
    the forward returns.
    """

    temperature: float
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]
    logit_scale: float
    softcap: float | None
    output: Callable[..., Any]


def fused_head(model: Any) -> FusedHead | None:
    """TRL's fused head of `model`, a `forward` of this one instance, maybe inside accelerate's
    wrappers; None where there is none, or one of a version that we do not know."""
    names = "temperature cast_lm_head_to_fp32 outputs logit_scale final_logit_softcapping".split()
    for function in wrapped_functions(vars(model).get("forward")):
        code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
        if code is None or code.co_name != "_fused_forward":
            continue
        told = dict(zip(code.co_freevars, cells or (), strict=True))
        output = function.__globals__.get("FusedCausalLMOutput")
        if output is not None and told.keys() >= set(names):
            return FusedHead._make([*(told[name].cell_contents for name in names), output])
    return None


class HeadPlan(NamedTuple):
    """How a tensor-parallel plan runs a linear layer, so that all processes get its whole output.

    `replicated`: makes of what the layer's forward gets a DTensor that every process has whole.
    `returned`: makes of the whole output what forward has to return for it.
    """

    replicated: Callable[[Any], Any]
    returned: Callable[[Any], Any]


def head_plan(layer: nn.Linear) -> HeadPlan | None:
    """The plan of a layer whose weight is a DTensor, by transformers (`colwise_gather_output`) or
    torch (`ColwiseParallel(output_layouts=Replicate())`); None for any other."""
    if not is_dtensor(layer._parameters.get("weight")):
        return None
    own = vars(layer).get("forward")
    if getattr(own, "__module__", None) == "transformers.distributed.tensor_parallel":
        return _plan_of_transformers(layer, own)
    hooks = [*layer._forward_hooks.values()]
    if own is None and len(hooks) == 1 and hooks[0].__module__ == "torch.distributed.tensor._api":
        return _plan_of_torch(layer, hooks[0])
    return None


def _plan_of_transformers(layer: nn.Linear, forward: Any) -> HeadPlan | None:
    # a function around the layer's own forward, which knows style and mesh
    found: dict[str, Any] = {
        name: cell.cell_contents
        for name, cell in zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
    }
    inner, mesh = found.get("original_forward"), found.get("mesh")
    style: Any = found.get("self")
    if inner != types.MethodType(nn.Linear.forward, layer) or "ColwiseParallel" not in class_names(
        style
    ):
        return None
    if not (style.use_local_output and style.output_layouts.is_replicate()):
        return None

    def replicated(input: Tensor) -> Any:
        with torch.enable_grad():  # without gradients it would leave a plain tensor plain
            (placed, *_), _ = style.transform_inputs_pre_forward(layer, (input,), {}, mesh)
        return placed

    return HeadPlan(replicated, lambda output: output)


class _Whole:
    """Stands for a DTensor that every process has whole, for a hook that makes it a plain one."""

    def __init__(self, output: Any) -> None:
        from torch.distributed.tensor import Replicate

        self.placements, self._output = (Replicate(),), output

    def to_local(self) -> Any:
        return self._output


def _plan_of_torch(layer: nn.Linear, hook: Callable[..., Any]) -> HeadPlan | None:
    output = object()
    with contextlib.suppress(AttributeError):  # it wants another placement
        if hook(layer, (), _Whole(output)) is output:
            return HeadPlan(lambda placed: placed, _Whole)
    return None
