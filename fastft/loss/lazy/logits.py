"""Lazy logits: what an output head returns in training instead of T x V numbers.

A `LazyLogits` looks like the tensor `linear(x, W, b)` to everybody (shape, strides, dtype, device,
autograd), but holds only x, W and b and the row-wise functions applied since; also of two such
heads (the divergence of a student from its teacher). Three layers keep it right:

* `__torch_function__`, above autograd: the rules of `rules` keep it lazy through views, casts,
  softcaps and scales, and evaluate losses a chunk of rows at a time.
* What no rule covers *materialises*: the real logits are computed once, with their autograd
  history, and used from then on. The `Report` says where. Slower, never wrong.
* `__torch_dispatch__`, below autograd: code that passes by torch functions
  (`autograd.Function.apply`, C++) gets the numbers too, and its dense gradient flows on to x, W and
  b, because every `LazyLogits` comes out of an autograd node.

Views of the same logits are a family with one root. Whatever needs memory that is shared (a change
in place, a hook) materialises the root; each member then is the same view of it that plain torch
would have made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastft.loss.lazy.combined import is_stacked, unstacked
from fastft.loss.lazy.evaluation import Evaluation, Held, guard
from fastft.loss.lazy.expressions import LOGITS, Expression
from fastft.loss.lazy.report import Report
from fastft.loss.lazy.rules import ANYWHERE, IN_PLACE, OTHERS, RULES, pointwise
from fastft.loss.lazy.sources import Linear, Origin, Source, over_rows
from fastft.loss.lazy.views import with_strides_of
from fastft.loss.options import refuse_second_derivative
from fastft.loss.vocab_parallel import Shard

Replay: TypeAlias = tuple[tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]], ...]


@dataclass(eq=False)
class _Memory:
    """What plain torch would keep once for logits and all views of them."""

    rewritten: bool = False


@dataclass(eq=False)
class _Recipe:
    """What a `LazyLogits` and its autograd node share."""

    source: Source
    expression: Expression
    shadow: Tensor
    report: Report
    is_copy: bool = False
    # the rows' logsumexp and argmax by autocast state, shared by logits of the same rows
    kept: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    memory: _Memory = field(default_factory=_Memory)


class _LazyNode(torch.autograd.Function):
    """Makes the wrapper; a dense gradient that arrives at it is carried on to x, W and b.

    `changed`: the wrapper that is there and has been given another expression. Whoever used it
    before has the gradient of the old one, and whoever does so from now on that of the new one.
    """

    @staticmethod
    def forward(
        ctx: Any, recipe: _Recipe, changed: LazyLogits | None, *tensors: Tensor | None
    ) -> LazyLogits:
        ctx.recipe, ctx.source, ctx.expression = recipe, recipe.source, recipe.expression
        ctx.save_for_backward(*tensors)
        # nobody's gradient (the loss went past the logits) must stay nobody's
        ctx.set_materialize_grads(False)
        if changed is not None:
            ctx.mark_dirty(changed)
            return changed
        with torch._C.DisableTorchFunctionSubclass():
            return LazyLogits._wrap(recipe)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if grad_output is None:
            return (None,) * (2 + len(saved))
        refuse_second_derivative("a function of lazy logits that torch functions do not see")
        if ctx.recipe.memory.rewritten:
            raise RuntimeError(
                "fastft: lazy logits were changed in place after a custom autograd Function used "
                "them."
            )
        ctx.recipe.report.note_materialised(
            "the backward pass of a function that torch functions do not see"
        )
        tensors = [
            tensor.detach().requires_grad_(need) if tensor is not None else None
            for tensor, need in zip(saved, needs, strict=True)
        ]
        with torch.enable_grad():
            logits = ctx.source.with_tensors(tensors).dense(ctx.expression)
        if isinstance(grad_output, LazyLogits):
            grad_output = grad_output._numbers("gradient")
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
        gradients = iter(torch.autograd.grad(logits, wanted, grad_output, allow_unused=True))
        return None, None, *(next(gradients) if need else None for need in needs)


class LazyLogits(Tensor):
    """`expression(linear(x, W, b))`, not computed yet."""

    _recipe: _Recipe
    _root: LazyLogits | None
    _replay: Replay
    _dense: Tensor | None
    _has_views: bool
    _used: bool

    @classmethod
    def _wrap(cls, recipe: _Recipe) -> LazyLogits:
        shadow = recipe.shadow
        # a tensor without memory: who asks for its shape is told, who asks for numbers is seen
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            shadow.shape,
            strides=shadow.stride(),
            dtype=shadow.dtype,
            device=recipe.source.device,
        )
        wrapper._recipe, wrapper._root, wrapper._replay, wrapper._dense = recipe, None, (), None
        wrapper._has_views = wrapper._used = False
        evaluation = recipe.source.head.origin.evaluation
        if evaluation is not None:
            evaluation.watch(wrapper)
        return wrapper

    @classmethod
    def _make(
        cls,
        source: Source,
        expression: Expression,
        shadow: Tensor,
        report: Report,
        is_copy: bool = False,
    ) -> LazyLogits:
        recipe = _Recipe(source, expression, shadow, report, is_copy)
        result = _LazyNode.apply(recipe, None, *source.tensors)
        for head in source.heads if not result.requires_grad else ():
            if head.origin.held is not None:
                head.origin.held.watch(result)
        return result

    # What the rules see.

    @property
    def recorded(self) -> Source:
        """What is below, with its history."""
        return self._recipe.source

    @property
    def expression(self) -> Expression:
        """What has been applied to it."""
        return self._recipe.expression

    @property
    def shadow(self) -> Tensor:
        """A tensor on the meta device, of the shape, strides and dtype of plain torch's."""
        return self._recipe.shadow

    @property
    def is_lazy(self) -> bool:
        """Whether no real logits exist of this tensor or of what it is a view of."""
        return self._dense is None and (self._root is None or self._root._dense is None)

    @property
    def is_evaluated(self) -> bool:
        """Whether others may read these logits after their model's forward pass: an evaluation."""
        return self.recorded.head.origin.evaluation is not None

    @property
    def source(self) -> Source:
        """What is below, without its history if gradients were not recorded here."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.recorded if self.requires_grad else self.recorded.detached()

    def checked(self) -> Source:
        """`source`, if the weights are still those that the head ran with; else RuntimeError."""
        self.recorded.check_unchanged()
        return self.source

    def over_rows(self, function: Callable[..., Tensor], *arguments: Tensor, **options: Any) -> Any:
        """`function(z, *arguments)` of these rows z, as of `apply_to_rows`."""
        return over_rows(self.checked(), self.expression, function, *arguments, **options)

    def derived(
        self,
        expression: Expression,
        shadow: Tensor,
        source: Source | None = None,
        is_copy: bool = False,
    ) -> LazyLogits:
        """Another expression (or another source) of the same rows, in memory of its own.

        `shadow` has the shape and strides that torch gives it; its dtype is that of the expression.
        `is_copy`: torch copies what the expression's last function has made.
        """
        source = source or self.source
        shadow = shadow.to(source.no_rows(expression).dtype)
        result = self._make(source, expression, shadow, self._recipe.report, is_copy)
        self._family()._used |= result.requires_grad
        return result

    def viewed(
        self,
        func: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        shadow: Tensor,
        change: Callable[[Tensor], Tensor],
        same_rows: bool = False,
    ) -> LazyLogits:
        """`func(self, *args, **kwargs)`, a view or selection of rows, as `change` of the hidden
        states.

        `shadow` is that of the result: of other memory than ours where the result is a copy.
        `same_rows`: all rows, in their order.
        """
        # the shadows share memory where torch's results would
        is_view = shadow.untyped_storage()._cdata == self.shadow.untyped_storage()._cdata
        source = self.source.with_inputs(change)
        result = self._make(
            source, self.expression, shadow, self._recipe.report, is_copy=not is_view
        )
        if same_rows:
            result._recipe.kept = self._recipe.kept
        if same_rows and shadow.shape == self.shape:
            selections = self.recorded.selections
            result._recipe.source = replace(result.recorded, selections=selections)
        family = self._family()
        # a view remembers how it was made, so that it can be made again of real logits
        if is_view:
            result._root, result._replay = family, (*self._replay, (func, args, kwargs))
            result._recipe.memory = self._recipe.memory
            family._has_views = True
        else:
            family._used |= result.requires_grad
        return result

    def evaluated(self, result: Tensor) -> None:
        """Told by a rule that `result` was computed from these logits."""
        if result.requires_grad or self.is_evaluated:
            self._recipe.report.fused += 1
        self._family()._used |= result.requires_grad

    @property
    def _is_fused(self) -> bool:
        """Whether a gradient may flow past these logits, or none flows at all."""
        return self.is_lazy and (self._family()._used or not self.requires_grad)

    def _family(self) -> LazyLogits:
        return self if self._root is None else self._root

    # Real numbers.

    def materialise(self, function: str) -> Tensor:
        """The real logits with their history, computed once; `function` is what asked for them."""
        if self._dense is None:
            # the root first: a view of real logits shares their memory
            dense = None if self._root is None else self._root.materialise(function)
            # gradients are recorded, or not, as they were when torch would have made the logits
            with (
                torch._C.DisableTorchFunctionSubclass(),
                torch.inference_mode(self.is_inference()),
                torch.set_grad_enabled(self.requires_grad),
            ):
                if dense is None:
                    dense = self._compute(function)
                for func, args, kwargs in self._replay:
                    dense = func(dense, *args, **kwargs)
            self._dense = dense
        return self._dense

    def _compute(self, function: str) -> Tensor:
        self._recipe.report.note_materialised(function)
        source = self.checked()
        dense = source.inside_heads(lambda there: there.dense(self.expression))
        if source.head.origin.evaluation is not None:
            source.head.origin.evaluation.built += dense.nbytes
        if dense.stride() != self.shadow.stride():
            return with_strides_of(self.shadow, dense)
        # who changes a copy in place must not reach what the backward pass of the last function
        # reads
        return dense.clone() if self._recipe.is_copy else dense

    def _numbers(self, function: str) -> Tensor:
        """The real logits without history, for code below autograd."""
        if not self.is_lazy:
            return self.materialise(function).detach()
        with torch.no_grad():
            return self._compute(function).detach()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        copies = aten.detach.default, aten.alias.default, aten.clone.default
        if func in copies and args[0].is_lazy:
            recipe = args[0]._recipe
            shadow = func(recipe.shadow, *args[1:], **(kwargs or {}))
            return cls._wrap(replace(recipe, shadow=shadow, kept={}, memory=_Memory()))
        args, kwargs = tree_map(
            lambda value: value._numbers(str(func)) if isinstance(value, cls) else value,
            (args, kwargs or {}),
        )
        return func(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # what needs no numbers is answered by the wrapper itself
        own = func in _ATTRIBUTES or (func in _GRADIENTS and args[0].is_lazy)
        if func == _GRAD_FN and args[0].is_lazy:
            asking = sys._getframe(1).f_globals.get("__name__", "")
            own = args[0]._is_fused or asking.startswith(_PLUMBERS)
        if own:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _HOOKS and isinstance(args[0], cls):
            return _hook(args[0], func, args, kwargs)
        if func in _LEAF_MAKERS and isinstance(args[0], cls):
            return _make_leaf(args[0], func, args, kwargs)
        if func is torch.autograd.grad and any(
            isinstance(arg, cls) and arg._is_fused for arg in tree_leaves(args[1])
        ):
            raise RuntimeError(_NO_GRADIENT.format("torch.autograd.grad"))
        result = _apply_rule(func, args, kwargs)
        if result is not NotImplemented:
            return result
        # no rule knows it: real logits from now on, and the report says who asked for them
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            name = str(getattr(getattr(func, "__self__", None), "__name__", name))
        args, kwargs = tree_map(
            lambda value: value.materialise(name) if isinstance(value, cls) else value,
            (args, kwargs),
        )
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


def _apply_rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not args and "input" in kwargs:
        kwargs = dict(kwargs)
        args = (kwargs.pop("input"),)
    if not args or kwargs.get("out") is not None:
        return NotImplemented
    lazy, *rest = args
    if isinstance(lazy, LazyLogits) and lazy.is_lazy and is_stacked(lazy):
        return unstacked(lazy, func, tuple(rest), kwargs)
    if func in ANYWHERE:
        return ANYWHERE[func](func, args, kwargs)
    if not isinstance(lazy, LazyLogits):
        return OTHERS[func](func, args, kwargs) if func in OTHERS else NotImplemented
    if func in IN_PLACE:
        return _change_in_place(lazy, func, tuple(rest), kwargs)
    if func not in RULES or not lazy.is_lazy:
        return NotImplemented
    return RULES[func](lazy, func, tuple(rest), kwargs)


def _change_in_place(
    lazy: LazyLogits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LazyLogits:
    """Rewrites the expression where nobody shares the memory; else changes real logits, which all
    views see."""
    recipe = lazy._recipe
    # where gradients are not recorded the numbers change, and not the gradient
    records = torch.is_grad_enabled() or not lazy.requires_grad
    if records and lazy.is_lazy and lazy._root is None and not lazy._has_views:
        changed = pointwise(IN_PLACE[func], (lazy, *args), kwargs)
        if isinstance(changed, LazyLogits):
            if changed.dtype != lazy.shadow.dtype:
                changed = changed.to(lazy.shadow.dtype)
            recipe.source, recipe.expression, recipe.kept = changed.recorded, changed.expression, {}
            if not changed.requires_grad:
                return lazy
            with torch._C.DisableTorchFunctionSubclass():
                return _LazyNode.apply(recipe, lazy, *changed.recorded.tensors)
    name, operands = func.__name__, (lazy, *args)
    dense = [a.materialise(name) if isinstance(a, LazyLogits) else a for a in operands]
    recipe.memory.rewritten = True
    func(*dense, **kwargs)
    return lazy


def _hook(lazy: LazyLogits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A gradient that somebody wants to see must exist: from now on the logits are real.

    The hooks of sharding libraries only wait for the moment (FSDP gathers weights before the
    backward pass; the loss has such a hook as well), so that they do not need the gradient.
    """
    hook = args[1] if len(args) > 1 else kwargs.get("hook")
    hook = getattr(hook, "func", hook)  # of a functools.partial
    if func is Tensor.register_hook and str(getattr(hook, "__module__", "")).startswith(_PLUMBERS):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if lazy._is_fused and lazy.requires_grad:
        raise RuntimeError(_NO_GRADIENT.format(func.__name__))
    return func(lazy.materialise(func.__name__), *args[1:], **kwargs)


def _make_leaf(lazy: LazyLogits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Detached logits that are to collect a gradient of their own (reentrant checkpointing): real
    ones, no history."""
    with torch._C.DisableTorchFunctionSubclass():
        if not lazy.requires_grad and not lazy.is_inference():
            lazy._dense = lazy._numbers(func.__name__)
            func(lazy._dense, *args[1:], **kwargs)
        return func(*args, **kwargs)


def _attribute(name: str) -> Any:
    return getattr(getattr(Tensor, name, None), "__get__", None)


_NO_GRADIENT = (
    "fastft: {} on logits whose loss is already fused would never see a gradient. Call it before "
    "the loss is computed, or without fastft's fused loss."
)
# they look at gradients' ways, not at gradients
_PLUMBERS = ("torch.distributed", "torch.nn.parallel", "deepspeed")
# others who ask for it may be about to watch the gradient: real logits, in time
_GRAD_FN = _attribute("grad_fn")

_GRADIENTS = {_attribute(name) for name in ("grad", "retains_grad")}
_LEAF_MAKERS = {Tensor.requires_grad.__set__, Tensor.requires_grad_}  # type: ignore[attr-defined]
_HOOKS = {Tensor.register_hook, Tensor.retain_grad}
_PROPERTIES = (
    "shape dtype device ndim requires_grad is_leaf layout names itemsize nbytes output_nr _version "
    "_base _backward_hooks is_cpu is_cuda is_meta is_mps is_mtia is_xla is_xpu is_mkldnn is_sparse "
    "is_sparse_csr is_quantized is_nested"
)
_METHODS = (
    "size dim ndimension numel nelement stride storage_offset is_floating_point is_complex "
    "is_contiguous element_size get_device __len__ __hash__ is_inference is_signed is_conj is_neg"
)
_ATTRIBUTES = {
    *map(_attribute, _PROPERTIES.split()),
    *(getattr(Tensor, name) for name in _METHODS.split()),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
} - {None}


def lazy_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    report: Report,
    head: Callable[..., Any] | None = None,
    check: Callable[[bool], None] | None = None,
    evaluation: Evaluation | None = None,
    held: Held | None = None,
    shard: Shard | None = None,
) -> LazyLogits:
    """Returns `torch.nn.functional.linear(input, weight, bias)`, lazily, as under autocast.

    Args:
        input: hidden states (..., H).
        weight: (V, H).
        bias: (V,) or None.
        report: where fusions and materialisations are counted.
        head: the module; entered again if its weight is freed when the logits are needed.
        check: called before the logits are used, with whether `head` is about to be entered; may
            raise.
        evaluation: the one that they are logits of; None: of a training.
        held: what remembers logits without a history until the weight changes.
        shard: the classes that `weight` and `bias` have, where other processes have the rest.
    """
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if evaluation is not None:
        check = guard(weight)
    classes = weight.shape[0] if shard is None else shard.classes
    origin = Origin(classes, head, check, evaluation, held, shard)
    shadow = torch.empty((*input.shape[:-1], classes), dtype=input.dtype, device="meta")
    linear = Linear.of((input, weight, bias), origin=origin)
    if not torch.is_grad_enabled():
        linear = linear.detached()
    return LazyLogits._make(Source((linear,)), LOGITS, shadow, report)
