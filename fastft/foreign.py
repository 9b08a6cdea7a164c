"""Other people's objects: how fastft knows a wrapped model, a sharded tensor, a `datasets.Dataset`,
a private name.

Everything is asked of the object, or of `sys.modules`: no library is imported to learn that an
object is not its own. `PRIVATE_NAMES` lists every name with a leading underscore that is not ours
and that fastft leans on; a test says which of them an upgrade of torch, transformers, accelerate,
datasets or DeepSpeed has taken away.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

# "module:qualified name" and what it is for; "a|b" is one name of several versions. What no class
# has, only its instances, is looked for in the module's text.
PRIVATE_NAMES = {
    "torch:_disable_dynamo": "torch.compiler.disable without importing the compiler",
    "torch._dynamo.decorators:_dynamo_marked_constant": (
        "torch.compiler.assume_constant_result, without the compiler"
    ),
    "torch:Tensor._make_wrapper_subclass": "lazy logits are a tensor without memory",
    "torch:UntypedStorage._cdata": (
        "whether an operation on lazy logits would share their memory; which memory is live"
    ),
    "torch:_ops.OpOverload._schema": "what an operation writes to, and which results are views",
    "torch:ops.aten._local_scalar_dense": "a look at a number that is not there",
    "torch:ops.aten._grouped_mm": "experts of a model, by shapes alone",
    "torch:Tensor._version": "has somebody written to a gradient, a state or a weight since",
    "torch._C:DisableTorchFunctionSubclass": (
        "computing inside __torch_function__ without entering it again"
    ),
    "torch._C:_current_graph_task_id": (
        "is a backward pass under way, as torch.utils.checkpoint asks"
    ),
    "torch._C:_autograd._get_current_graph_task_keep_graph": "will this graph be walked again",
    "torch:ops.aten._flash_attention_forward": "attention within segments on a GPU",
    "torch:ops.aten._flash_attention_backward": "its gradients",
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu": (
        "attention within segments on a CPU"
    ),
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "its gradients",
    "torch._dynamo.eval_frame:OptimizedModule._orig_mod": "the model inside torch.compile",
    "torch.nn:Module._compiled_call_impl": "has a module been compiled in its place",
    "torch.distributed.fsdp:FullyShardedDataParallel._fsdp_wrapped_module": (
        "the model inside FSDP1"
    ),
    "torch.distributed.fsdp._flat_param:_fsdp_flattened": (
        "a weight that FSDP1 keeps in a flat parameter"
    ),
    "torch.distributed.fsdp:FSDPModule._get_fsdp_state": "which modules one FSDP2 unit gathers",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState."
    "_fsdp_param_groups|_fsdp_param_group": "does it reshard",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._modules": (
        "the modules of one FSDP2 unit"
    ),
    "torch.distributed.tensor._utils:compute_local_shape_and_global_offset": "where a shard begins",
    "torch.nn.modules.module:_global_backward_hooks": "hooks that would see the gradient of logits",
    "torch.nn.modules.module:_global_backward_pre_hooks": "likewise",
    "torch.nn:Module._backward_hooks": "likewise, of one module",
    "torch.nn:Module._backward_pre_hooks": "likewise",
    "torch.nn:Module._forward_hooks": "hooks that see the packing probe's batches",
    "torch.nn:Module._forward_pre_hooks": "likewise",
    "torch.nn.modules.module:_global_forward_hooks": "likewise, of all modules",
    "torch.nn.modules.module:_global_forward_pre_hooks": "likewise",
    "torch.nn:Module._parameters": "a weight that FSDP1 took out of its module is not in here",
    "torch.nn:Module._buffers": "what a module's twin on the meta device holds",
    "torch.nn:Module._modules": "likewise",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper:"
    "CheckpointWrapper._checkpoint_wrapped_module": "the module inside torch's checkpointing",
    "torch:Tensor._backward_hooks": "a hook on a weight forbids writing to its gradient directly",
    "torch:Tensor._post_accumulate_grad_hooks": "likewise",
    "torch.utils:_python_dispatch": "numbers of meta tensors are computed beside them",
    "torch.utils:_pytree": "lazy logits nested in arguments",
    "torch.optim.lr_scheduler:_wrapped_by_lr_sched": "has a scheduler wrapped an optimizer's step",
    "torch.optim.lr_scheduler:LRScheduler._initial_step": "wraps it without a change of rates",
    "accelerate.accelerator:_is_accelerate_prepared": "has an object been through `prepare`",
    "transformers:AttentionInterface._global_mapping": "is attn_implementation='fastft' registered",
    "transformers:PreTrainedConfig._attn_implementation": "which attention a model uses",
    "transformers:PreTrainedConfig._attn_implementation_internal": (
        "the same, set without a check of the name"
    ),
    "transformers:PreTrainedModel._from_config": "a model of the class that a configuration names",
    "transformers:PreTrainedModel._supports_sdpa": "which stock attention the probe tries",
    "transformers:PreTrainedModel._supports_flash_attn": "would flash-attn help a model",
    "transformers:PreTrainedModel._can_set_attn_implementation": (
        "does the model's code look its attention up by name"
    ),
    "transformers:PreTrainedModel._tp_size": "how many processes compute the same batch",
    "transformers.distributed.tensor_parallel:TensorParallelLayer.install_forward": (
        "the function that it leaves on a head knows the plan by the names `self`, `mesh` and "
        "`original_forward`"
    ),
    "torch.distributed.tensor:_api.distribute_module": "a head's hook that gathers its output",
    "transformers:PreTrainedConfig._experts_implementation_internal": (
        "how a model's experts are computed, set without a check of the name"
    ),
    "transformers:PreTrainedModel._loss_function": "what setting loss_function leaves on a model",
    "transformers:Trainer._train_batch_size": "how many packs a packed batch of `plug` has",
    "transformers:Trainer._loss_shifts_labels": "does it count first labels, unpredicted ones",
    "accelerate.accelerator:_original_forward": "accelerate's mixed precision runs inside forward",
    "accelerate:Accelerator._dataloaders": "which loaders it has prepared",
    "datasets:Dataset._indices": "which rows select or shuffle left, in which order",
    "trl.trainer.utils:add_fused_lm_head._fused_forward": (
        "the forward that TRL gives a model, which computes log-probabilities"
    ),
}

_Function = TypeVar("_Function", bound=Callable[..., Any])
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


def _class_names(thing: object) -> set[str]:
    """The names of all classes that `thing` is an instance of."""
    return {base.__name__ for base in type(thing).__mro__}


def constant_when_compiled(function: _Function) -> _Function:
    """A decorator: torch.compile calls `function` where it traces a call, and keeps the result as a
    constant.

    Its arguments must be constants. This is `torch.compiler.assume_constant_result`, which imports
    all of the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def put_attributes(thing: Any, **values: Any) -> Callable[[], None]:
    """Gives one object attributes of its own, which hide those of its class.

    Returns:
        A function which gives it back what it had before, but for what somebody else has put there
        since.
    """
    before = {name: vars(thing)[name] for name in values if name in vars(thing)}
    for name, value in values.items():
        setattr(thing, name, value)

    def restore() -> None:
        for name, value in values.items():
            if vars(thing).get(name) is not value:
                continue
            if name in before:
                setattr(thing, name, before[name])
            else:
                delattr(thing, name)

    return restore


@contextlib.contextmanager
def with_attributes(thing: Any, **values: Any) -> Iterator[None]:
    """`put_attributes` until the end of the context."""
    restore = put_attributes(thing, **values)
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def attributes_kept(thing: Any) -> Iterator[None]:
    """Gives an object at the end the attributes that it had, whatever it has set meanwhile."""
    before = dict(vars(thing))
    try:
        yield
    finally:
        vars(thing).clear()
        vars(thing).update(before)


@constant_when_compiled
def is_exporting() -> bool:
    """Whether torch.export traces. Dynamo, where it traces torch's own question, says yes to it up
    to torch 2.12."""
    return torch.compiler.is_exporting()


def unwrapped(model: Any) -> Any:
    """The model inside DDP, DataParallel, FSDP1, DeepSpeed and torch.compile, in any nesting;
    PEFT's wrapper stays."""
    while _class_names(model) & _WRAPPERS:
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
    return "PreTrainedConfig" in _class_names(thing)


def full_shape(tensor: Any) -> torch.Size:
    """The shape of the whole of a tensor that ZeRO-3 may have taken away; that of a DTensor is."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def base_model(model: Any) -> Any:
    """The model that the user's framework defines, inside `unwrapped`'s wrappers and PEFT's."""
    while True:
        inner = unwrapped(model)
        get_base = getattr(type(inner), "get_base_model", None)
        inner = inner if get_base is None else get_base(inner)
        if inner is model:
            return model
        model = inner


def is_adapter(layer: nn.Module) -> bool:
    """Whether it is a layer of one of PEFT's methods, around another layer."""
    return "BaseTunerLayer" in _class_names(layer) and "base_layer" in layer._modules


def has_sharded_parts(layer: nn.Module) -> bool:
    """Whether a library takes weights inside `layer` away again before its forward is over."""
    units = {"FSDPModule", "FullyShardedDataParallel"}
    parts = (part for part in layer.modules() if part is not layer)
    return any(_class_names(part) & units for part in parts) or any(
        hasattr(parameter, "ds_id") for parameter in layer.parameters()
    )


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


def output_embeddings(model: Any) -> nn.Module | None:
    """What `model` itself calls its output embeddings; None where it has none, or does not say."""
    # transformers' models without a head raise, others have no such method
    with contextlib.suppress(AttributeError, NotImplementedError):
        head = model.get_output_embeddings()
        return head if isinstance(head, nn.Module) else None
    return None


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has been called on `model` or a part of it."""
    return any(
        "OptimizedModule" in _class_names(module) or module._compiled_call_impl is not None
        for module in model.modules()
    )


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
    functions = (function for forward in forwards for function in _wrapped_functions(forward))
    names = (getattr(function, "__globals__", {}).get("__name__", "") for function in functions)
    return {name.partition(".")[0] for name in names}


def _wrapped_functions(forward: Any) -> Iterator[Any]:
    """The function of a method, the one that it wraps, and so on inwards."""
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        yield function
        forward = getattr(function, "__wrapped__", None)


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
    for function in _wrapped_functions(vars(model).get("forward")):
        code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
        if code is None or code.co_name != "_fused_forward":
            continue
        told = dict(zip(code.co_freevars, cells or (), strict=True))
        output = function.__globals__.get("FusedCausalLMOutput")
        if output is not None and told.keys() >= set(names):
            return FusedHead._make([*(told[name].cell_contents for name in names), output])
    return None


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


def write_stamp(tensor: Tensor) -> tuple[int, int] | None:
    """What changes when somebody writes to the tensor; None for one of inference mode, of which
    nothing does."""
    return None if tensor.is_inference() else (tensor._version, tensor.data_ptr())


def is_dtensor(tensor: Any) -> bool:
    """Whether it is one; torch's module of them, a second of import time, is not needed to know."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """This rank's part of a DTensor; anything else as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_gradient(gradient: Any, parameter: Any) -> Any:
    """This rank's part of a gradient, as it has one of the parameter.

    Of DTensors the two may lie otherwise: backward leaves partial sums for the weights of a norm
    under sequence parallelism, and a whole gradient for rows that do not divide evenly. All
    processes of the mesh must call.
    """
    placements = getattr(parameter, "placements", None)
    if is_dtensor(gradient) and gradient.placements != placements is not None:
        gradient = gradient.redistribute(placements=placements)
    return local(gradient)


def summed(tensor: Any) -> Any:
    """A DTensor without partial sums; anything else as it is. All processes of its mesh must
    call."""
    if not (is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements)):
        return tensor
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=whole)


def sharded_like(part: Tensor, template: Any) -> Tensor:
    """`part` itself, or where `template` is a DTensor a DTensor of its shape with `part` as this
    rank's."""
    if not is_dtensor(template):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        template.device_mesh,
        template.placements,
        shape=template.shape,
        stride=template.stride(),
    )


def placed_like(value: Tensor, template: Any) -> Tensor:
    """A whole tensor cut as the DTensor `template` is; all else as it came."""
    if not is_dtensor(template) or is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, template.device_mesh, template.placements)


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
    if inner != types.MethodType(nn.Linear.forward, layer) or "ColwiseParallel" not in _class_names(
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


def in_flat_parameter(tensor: Any) -> bool:
    """Whether this is, or is this process's part of, a parameter that FSDP1 keeps in one flat
    vector."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def shard_begin(tensor: Any) -> int:
    """Where this process's rows of a DTensor begin in the whole tensor (shards of dimension 0), in
    elements."""
    if not is_dtensor(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return sum(offset * stride for offset, stride in zip(offsets, tensor.stride(), strict=True))


def sharding_library(module: nn.Module, around: Iterable[nn.Module]) -> str | None:
    """What shards the weight of `module`, which the modules `around` contain; None for nobody."""
    if hasattr(module.weight, "ds_id"):
        return "ZeRO-3"
    kinds = set().union(*map(_class_names, around))
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


def is_dataset(dataset: Any) -> bool:
    """Whether `dataset` is a `datasets.Dataset`."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(dataset, datasets.Dataset)


def is_iterable_dataset(dataset: Any) -> bool:
    """Whether `dataset` is a `datasets.IterableDataset`."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(dataset, datasets.IterableDataset)


def chosen_rows(dataset: Any) -> Any:
    """Which rows of its table a `datasets.Dataset` has, numpy integers (N,); None: all of them, in
    order."""
    indices = dataset._indices
    return None if indices is None else indices.column(0).to_numpy()


def dispatches(loader: Any) -> bool:
    """Whether `loader` is accelerate's that reads on rank 0 and cuts every tensor of a batch
    between the ranks."""
    return "DataLoaderDispatcher" in _class_names(loader)


def active_dataloader() -> Any:
    """The loader of accelerate that is being iterated; None without one."""
    loaders = sys.modules.get("accelerate.data_loader")
    return None if loaders is None else loaders.GradientState().active_dataloader


@contextlib.contextmanager
def loaders_forgotten(accelerator: Any) -> Iterator[None]:
    """Makes an Accelerator forget at the end which loaders it has prepared in this context."""
    before = list(accelerator._dataloaders)
    try:
        yield
    finally:
        accelerator._dataloaders[:] = before


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
    return "DeepSpeedCPUAdam" in _class_names(optimizer)


def is_fsdp1(model: Any) -> bool:
    """Whether FSDP1 wraps any part of `model`."""
    return any("FullyShardedDataParallel" in _class_names(module) for module in model.modules())


def world_size() -> int:
    """How many processes there are: 1 where torch.distributed has not been set up."""
    distributed = sys.modules.get("torch.distributed")
    ready = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready and distributed is not None else 1


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


def inner_loader(loader: Any) -> Any:
    """The loader inside DeepSpeed's adapter for sequence parallelism; any other as it is."""
    return loader.dl if "UlyssesSPDataLoaderAdapter" in _class_names(loader) else loader


def _parallelism() -> Any:
    """accelerate's configuration of parallelism in this process; None without."""
    module = sys.modules.get("accelerate.state")
    if module is None or not module.is_initialized():
        return None
    return getattr(module.AcceleratorState(), "parallelism_config", None)
