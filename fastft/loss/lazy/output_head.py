"""Finding a model's output head and letting it return lazy logits.

A head is patched only if it is a plain `nn.Linear`, or bitsandbytes' of 4 bits: an attribute
`forward` on that one instance, and on the layer that PEFT may have put around it. No parameter,
buffer, hook or class is added, so that state dicts keep their keys; a copy or a pickle of the model
has stock heads. Where a tensor-parallel plan runs the head, the attribute may stand in the place of
the plan's, which is put back. Heads otherwise quantised, offloaded, kernelised or custom ones are
left alone.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastft.foreign.compiling import is_exporting
from fastft.foreign.heads import (
    HeadPlan,
    casts_head_to_fp32,
    fused_head,
    head_plan,
    is_4bit,
    is_adapter,
    operands_of_4bit,
)
from fastft.foreign.models import base_model, output_embeddings
from fastft.foreign.objects import put_attributes
from fastft.foreign.sharding import has_sharded_parts, sharding_library
from fastft.foreign.tensors import is_dtensor
from fastft.loss.dtensor_head import sharded_head
from fastft.loss.lazy.adapters import AdaptedForward
from fastft.loss.lazy.evaluation import Evaluation, Held
from fastft.loss.lazy.fused_head import FusedHeadForward
from fastft.loss.lazy.logits import lazy_linear
from fastft.loss.lazy.report import Report
from fastft.loss.lazy.sharding import Sharding
from fastft.loss.vocab_parallel import Shard
from fastft.stack import callers


class _Asked(NamedTuple):
    """What somebody around the model's forward pass makes of its logits, in any mode of the model.

    `report`: where that is counted. `fp32`: whether the head's products are those of fp32 copies.
    """

    report: Report
    fp32: bool


class LazyForward:
    """The `forward` of an attached head: lazy in training, and in an `Evaluation`.

    In training it is lazy where gradients are recorded, where `reads` says that a loss reads logits
    without them, and in any mode while it is `asked`. It copies and pickles as the method that the
    module's class has, so that a copy of the model is a stock one.

    A `plan` spreads the head's classes over processes, which all have the same hidden states: these
    and the classes of this process are what the lazy logits then hold.
    """

    def __init__(
        self,
        head: nn.Linear,
        around: list[nn.Module],
        sharding: Sharding | None,
        plan: HeadPlan | None,
        report: Report,
        evaluation: Evaluation | None,
        reads: Callable[[], bool],
        held: Held | None,
    ) -> None:
        self.head = head
        self.around = around
        self.sharding = sharding
        self.plan = plan
        self.planned: Callable[..., Any] | None = head.__dict__.get("forward") if plan else None
        self.report = report
        self.evaluation = evaluation
        self.reads, self.held = reads, held
        self.adapted: list[AdaptedForward] = []
        self._asked: _Asked | None = None
        self._outside_compiled = torch.compiler.disable(self._forward)
        own = vars(head).get("forward")
        self._own = own if casts_head_to_fp32(own) else None
        self._restore = put_attributes(head, forward=self)

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`nn.Linear.forward`: lazy logits or stock ones."""
        if is_exporting():  # a graph that is kept has no place for us
            return self._real(input, *args, **kwargs)
        return self._outside_compiled(input, *args, **kwargs)

    def _forward(
        self,
        input: Tensor,
        *args: Any,
        fastft_task: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        head = self.head
        # entered again by Linear.inside_head, so that a sharded weight is gathered
        if fastft_task is not None:
            return self._handed(fastft_task(*self._operands(input)[:3]))
        make = None if args or kwargs else self.maker(input)
        if make is None:
            return self._real(input, *args, **kwargs)
        if is_4bit(head):  # its 4 bits are not autocast's affair
            with torch.autocast(input.device.type, enabled=False):
                return make(*operands_of_4bit(head, input)).to(input.dtype)
        x, weight, bias, shard = self._operands(input)
        return self._handed(make(x, weight, bias, head, shard))

    def _operands(self, input: Any) -> tuple[Tensor, Tensor, Tensor | None, Shard | None]:
        """What this process has of the input and of the head, and which classes these are."""
        if self.plan is None:
            return input, self.head.weight, self.head.bias, None
        return sharded_head(self.plan.replicated(input), self.head.weight, self.head.bias)

    def _handed(self, output: Any) -> Any:
        return output if self.plan is None else self.plan.returned(output)

    def _real(self, *args: Any, **kwargs: Any) -> Any:
        """Real logits."""
        own = self._own or self.planned
        if own is not None:
            return own(*args, **kwargs)
        return type(self.head).forward(self.head, *args, **kwargs)

    def maker(self, input: Tensor) -> Callable[..., Tensor] | None:
        """What makes lazy logits in this forward pass, of an input, a weight, a bias, the head that
        can be entered again for them, and the classes that the weight has; None where logits are to
        be real, and the report gets why."""
        is_meant, evaluation = self._purpose()
        report, asked = self.report if evaluation is None else evaluation.report, self._asked
        report = report if asked is None else asked.report
        if not is_meant or not self._can_be_lazy(input, evaluation, report):
            return None
        check = None if self.sharding is None else self.sharding.permission()

        def make(
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            head: Any = None,
            shard: Shard | None = None,
        ) -> Tensor:
            # processes that compute logits together do not forget them at the same time
            alone = evaluation is None and shard is None
            held = self.held if alone and weight.requires_grad else None
            rest = report, head, check, evaluation, held, shard
            if asked is None or not asked.fp32:
                return lazy_linear(x, weight, bias, *rest)
            wide = None if bias is None else bias.float()
            with torch.autocast(x.device.type, enabled=False):
                return lazy_linear(x.float(), weight.float(), wide, *rest)

        return make

    @contextlib.contextmanager
    def asked(self, report: Report, fp32: bool) -> Iterator[None]:
        """Within, the logits are lazy in any mode: whoever enters this is around the model's
        forward pass, and returns what it makes of them."""
        with contextlib.ExitStack() as stack:
            if self.sharding is not None:
                stack.enter_context(self.sharding.loss_inside())
            stack.callback(setattr, self, "_asked", self._asked)
            self._asked = _Asked(report, fp32)
            yield

    def _purpose(self) -> tuple[bool, Evaluation | None]:
        """Whether this is a forward pass of a training, or of an evaluation inside one, and of
        which."""
        # TRL's own forward of a head in fp32 is left as it is but for those who ask for fp32
        if self._asked is not None or self._own is not None:
            return self._asked is not None, None
        if torch.is_grad_enabled():
            return self.head.training, None
        evaluation = None if self.head.training else self.evaluation
        if evaluation is not None and evaluation.in_loop():
            return True, evaluation
        return self.reads(), None

    def _can_be_lazy(self, input: Tensor, evaluation: Evaluation | None, report: Report) -> bool:
        # somebody records the operations, to run them without us
        if torch.jit.is_tracing() or get_proxy_mode() is not None:
            return False
        is_placed = self.plan is not None and is_dtensor(input)
        if not (is_placed or type(input) in (Tensor, nn.Parameter)) or input.dim() < 2:
            return False
        is_any = torch.is_autocast_enabled(input.device.type) or is_4bit(self.head)
        if input.dtype != self.head.weight.dtype and not is_any:
            return False  # torch says what is wrong
        reason = self._reason_against_weight(evaluation) or self.reason_now(evaluation)
        if reason is not None:
            report.note_skipped(reason)
        return reason is None

    def _reason_against_weight(self, evaluation: Evaluation | None) -> str | None:
        weight: Any = self.head.weight
        if self.plan is None or not is_dtensor(weight):
            if type(weight) in (Tensor, nn.Parameter) or is_4bit(self.head):
                return None
            return f"the weight of the output head is a {type(weight).__name__}"
        if evaluation is not None:
            return "the output head is tensor-parallel"
        if weight.device_mesh.ndim > 1 or not weight.placements[0].is_shard(0):
            return f"the weight of the output head has the placements {weight.placements}"
        return None

    def reason_now(self, evaluation: Evaluation | None = None) -> str | None:
        """What forbids lazy logits in this forward pass alone."""
        # its logits are read after the forward pass, when the shards are gone
        sharding, everywhere = self.sharding, torch.nn.modules.module
        if evaluation is not None or not torch.is_grad_enabled():
            if sharding is not None and self._asked is None:
                return f"the output head is sharded by {sharding.library}"
            return None if sharding is None else sharding.reason_now()
        hooks = [everywhere._global_backward_hooks, everywhere._global_backward_pre_hooks]
        hooks += [part for m in self.around for part in (m._backward_hooks, m._backward_pre_hooks)]
        if any(hooks):
            return "a module backward hook watches the gradient of the logits"
        return None if sharding is None else sharding.reason_now()

    def remove(self) -> None:
        """Takes the head back to stock, if it is still ours."""
        self._restore()
        if self.sharding is not None:
            self.sharding.remove()
        for adapted in self.adapted:
            adapted.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        # a plan's function has no copy: torch gives a copy of the model the very same
        stock = self.head if self.planned is None else types.SimpleNamespace(forward=self.planned)
        return getattr, (stock, "forward")


class Attachment:
    """The heads of `model` that return lazy logits until `remove()`.

    They do so in training and, if it is given, in `evaluation`, and where TRL asks a model with its
    fused head for log-probabilities. A head that another attachment holds is taken from it: after
    an exception nobody else may be there to end that one.

    Args:
        references: other models whose logits the same loss reads, a teacher for example.
        reads: whether the forward pass that runs now, without gradients, is one whose logits a loss
            reads: of a reference, or of `model` itself without its adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluation: Evaluation | None = None,
        references: Iterable[nn.Module] = (),
        reads: Callable[[], bool] = lambda: False,
    ) -> None:
        self.report = Report()
        self.evaluation = evaluation
        self.heads: list[nn.Linear] = []
        self._reads, self._held = reads, Held()
        self._forwards: list[LazyForward] = []
        self.fused_heads: list[FusedHeadForward] = []
        self._hook: Any = None
        if isinstance(model, nn.DataParallel):
            self.report.skipped.append(
                "DataParallel: its replicas would call the head of the first device"
            )
            return
        for head in find_heads(model):
            if self._attach(model, head, self._held):
                self.heads.append(head)
        if not self.heads and not self.report.skipped:
            self.report.skipped.append(_why_no_head(model))
        if not self.heads:
            return
        self._answer_for(model)
        for other in references:
            for head in find_heads(other):
                if all(forward.head is not head for forward in self._forwards):
                    self._attach(other, head, None)  # which no step changes
            self._answer_for(other)
        held = self._held  # not the attachment, nor through it the model
        self._hook = register_optimizer_step_pre_hook(lambda *_: held.settle())

    def _answer_for(self, model: nn.Module) -> None:
        """Takes the place of TRL's fused head, where `model` has one and a head of ours."""
        base, heads = base_model(model), find_heads(model)
        former, known = vars(base).get("forward"), fused_head(base)
        if isinstance(former, FusedHeadForward):
            former.remove()
        ours = [one for one in self._forwards if any(one.head is head for head in heads)]
        # nobody has all classes of a head that a plan spreads
        if known is not None and ours and all(one.plan is None for one in ours):
            one = FusedHeadForward(base, known, ours, self.report, self.evaluation)
            self.fused_heads.append(one)

    def _attach(self, model: nn.Module, head: nn.Linear, held: Held | None) -> bool:
        stale = head.__dict__.get("forward")
        if isinstance(stale, LazyForward):
            stale.remove()
            stale.report.skipped.append("another fused loss has taken the output head")
        plan = head_plan(head)
        reason = _reason_against(head, plan)
        around = [m for m in model.modules() if any(part is head for part in m.modules())]
        library = sharding_library(head, around) if reason is None else None
        if reason is None and library is None and plan is None and is_dtensor(head.weight):
            reason = _UNKNOWN_PLAN
        if reason is not None:
            self.report.skipped.append(reason)
            return False
        sharding = None if library is None else Sharding(library, head, base_model(model))
        forward = LazyForward(
            head, around, sharding, plan, self.report, self.evaluation, self._reads, held
        )
        forward.adapted = [
            AdaptedForward(layer, forward)
            for layer in around
            if is_adapter(layer)
            and "forward" not in layer.__dict__
            and not has_sharded_parts(layer)
            and plan is None  # their products would need all classes
        ]
        self._forwards.append(forward)
        return True

    def remove(self) -> None:
        """Takes the heads back to stock. Harmless when called twice."""
        self._held.settle()
        if self.evaluation is not None:
            self.evaluation.settle()
        for head in self.fused_heads:
            head.remove()
        if self._hook is not None:
            self._hook.remove()
        for forward in self._forwards:
            forward.remove()
        self.heads, self._forwards = [], []


def find_heads(model: nn.Module) -> list[nn.Linear]:
    """The linear modules that make the model's logits, looked up inside PEFT wrappers.

    They are the output embeddings which the model, or else a model inside it, calls so. A language
    model, or a module of one's own, that names none has as its head the last linear layer, if that
    makes a vocabulary of something else; it is not looked for inside other models, whose layers may
    be as wide. A classifier has none.
    """
    base = base_model(model)
    named = _output_embeddings(base)
    if named:
        return [part for head in named for part in _linear_parts(head)]
    return _last_layer(base) if expects_head(model) else []


def expects_head(model: nn.Module) -> bool:
    """Whether `model` should have an output head: a classifier, for example, should not."""
    base = base_model(model)
    is_language_model = any(_LANGUAGE_MODEL.search(kind.__name__) for kind in type(base).__mro__)
    says_nothing = not hasattr(base, "get_output_embeddings")
    return is_language_model or says_nothing or bool(_output_embeddings(base))


_LANGUAGE_MODEL = re.compile(
    "CausalLM|MaskedLM|LMHead|ConditionalGeneration|MTModel|Text2Text|EncoderDecoderModel"
)


def _output_embeddings(base: nn.Module) -> list[nn.Module]:
    """The output embeddings that the model names, or else those of the models inside it."""
    own = output_embeddings(base)
    heads = map(output_embeddings, base.modules()) if own is None else [own]
    return list(dict.fromkeys(head for head in heads if head is not None))


def _last_layer(base: nn.Module) -> list[nn.Linear]:
    config: Any = getattr(base, "config", None)
    sizes = {getattr(config, "vocab_size", None)}
    if hasattr(config, "get_text_config"):
        sizes.add(getattr(config.get_text_config(), "vocab_size", None))
    parts = list(base.modules())
    models = [m for m in parts if m is not base and hasattr(m, "get_output_embeddings")]
    inside = {id(part) for model in models for part in model.modules()}
    layers = [m for m in parts if isinstance(m, nn.Linear) and id(m) not in inside]
    return [layer for layer in layers[-1:] if layer.out_features in sizes - {layer.in_features}]


def _why_no_head(model: nn.Module) -> str:
    name = type(base_model(model)).__name__
    if not expects_head(model):
        return f"{name} has no output head over a vocabulary, so that there is nothing to fuse"
    return (
        f"{name} has no output head that could be found: a plain torch.nn.Linear that "
        f"get_output_embeddings() returns, or the last linear layer, with config.vocab_size outputs"
    )


def _linear_parts(module: nn.Module) -> list[nn.Linear]:
    inside: Any = module
    if type(module).__name__ == "ModulesToSaveWrapper":
        parts = [*inside.modules_to_save.values(), inside.original_module]
    elif type(module).__name__ == "TrainableTokensWrapper":
        parts = [inside.token_adapter]
    elif is_adapter(module):
        parts = [inside.base_layer]
    else:
        return [module] if isinstance(module, nn.Linear) else []
    return [linear for part in parts for linear in _linear_parts(part)]


_UNKNOWN_PLAN = (
    "the output head is tensor-parallel, and its plan is neither transformers' "
    "colwise_gather_output nor torch's ColwiseParallel(output_layouts=Replicate())"
)


def _reason_against(head: nn.Linear, plan: HeadPlan | None) -> str | None:
    """Why this head must keep its own forward; None if it is a plain linear layer."""
    if type(head).forward is not nn.Linear.forward and not is_4bit(head):
        return f"the output head is a {type(head).__name__}, not a plain torch.nn.Linear"
    if any(_is_computed(head, name) for name in ("weight", "bias")):
        return (
            f"the output head is a {type(head).__name__} that computes its weight or bias each "
            f"time it is read (by torch.nn.utils.parametrize, or a property)"
        )
    own = None if plan is not None else head.__dict__.get("forward")
    if casts_head_to_fp32(own):
        return None
    is_stock = isinstance(own, types.MethodType) and own.__func__ is nn.Linear.forward
    if own is not None and not (is_stock and own.__self__ is head):
        return "the output head's forward is patched by somebody else"
    return None


def _is_computed(head: nn.Linear, name: str) -> bool:
    """Whether reading the attribute runs code, which may draw random numbers or change buffers."""
    return hasattr(type(head), name) or not (name in head._parameters or name in head.__dict__)


def is_recomputed_or_generating() -> bool:
    """Whether the forward pass that runs now is one of `generate`, or inside the forward pass of an
    autograd Function: a checkpoint, which gives its outputs a history of its own."""
    return any(
        frame.f_code.co_name == "generate"
        or (frame.f_code.co_name == "forward" and frame.f_code.co_varnames[:1] == ("ctx",))
        for frame in callers()
    )


@contextlib.contextmanager
def fused_loss(model: nn.Module, *references: nn.Module) -> Iterator[Report]:
    """While the context is open, `model` computes its training losses without logits.

    The output head returns lazy logits in training mode; any loss which the model, or the loop,
    computes of them by `torch.nn.functional.cross_entropy`, `nll_loss`, `log_softmax` and `gather`,
    ... is fused, and so are the log-probabilities that TRL's trainers ask for; any other use
    computes real logits and is still right. Evaluation, and forward passes without gradients, are
    stock, except those of `references` and what TRL asks for.

    Args:
        model: any model with an output head that is a plain `torch.nn.Linear` (PEFT wrappers
            included). Where there is none, or under DataParallel, the model is left as it is and
            the report's `skipped` says why. Of a tensor-parallel head all processes must use the
            logits alike.
        references: models whose logits the loss reads without gradients: a teacher, or `model`
            itself with its adapters switched off. Their forward passes without gradients are lazy
            too, outside `generate`.

    Yields:
        `Report`: `fused`, `materialised`, `skipped`, growing as the loop runs.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: from the loop, when logits are read after an optimizer step has changed the
            head's weight, when the gradient of logits is asked for (`register_hook`, `retain_grad`,
            `torch.autograd.grad`) after their loss was computed, or when logits of a sharded head
            are used after the forward pass that computed their loss.
    """
    for name, module in (("model", model), *(("a reference", other) for other in references)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    reads = (lambda: not is_recomputed_or_generating()) if references else (lambda: False)
    attachment = Attachment(model, references=references, reads=reads)
    try:
        yield attachment.report
    finally:
        attachment.remove()
