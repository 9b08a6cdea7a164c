"""TRL's fused head, answered from the model's own logits: DPO, KTO, GRPO, RLOO, SFT.

`trl.trainer.utils.add_fused_lm_head` gives a model a `forward` which, called with
`fused_lm_head=True`, returns log-probabilities and entropies of the labels instead of logits. It
runs the backbone and multiplies by `lm_head.weight` itself, a tile at a time, so that it must know
from the configuration what the model does to its logits, and knows nothing of an adapter there.

    TRL's        backbone, then chunks of  softcap(scale * x W^T) / temperature  by its own formula
    here         the model's whole forward with lazy logits, then  log_probs(logits / temperature)

A `FusedHeadForward` stands in front of that forward. Whatever does not ask for the fused head goes
through to it. What is asked of a reference model, of adapters that are switched off, without
gradients or in evaluation mode is answered in the same way.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastft.foreign.heads import FusedHead
from fastft.foreign.objects import put_attributes
from fastft.loss.lazy.evaluation import Evaluation
from fastft.loss.lazy.expressions import scale_and_softcap
from fastft.loss.lazy.logits import LazyLogits
from fastft.loss.lazy.report import Report
from fastft.loss.lazy.token_log_probs import IGNORED, token_log_probs

if TYPE_CHECKING:
    from fastft.loss.lazy.output_head import LazyForward


class FusedHeadForward:
    """The `forward` of `model`, in front of TRL's, until `remove()`.

    A copy of it is a copy of TRL's.

    Args:
        model: the one with the fused head, without wrappers.
        head: what TRL has told it.
        forwards: of the parts of its output head.
        report: where answers are counted.
        evaluation: those that are answered in an evaluation are counted in its report.

    Attributes:
        difference: how TRL's formula is not the model's, in words; None where it is, or where
            nothing was asked yet.
    """

    def __init__(
        self,
        model: nn.Module,
        head: FusedHead,
        forwards: Sequence[LazyForward],
        report: Report,
        evaluation: Evaluation | None,
    ) -> None:
        self.difference: str | None = None
        self._model, self._head, self._forwards = model, head, tuple(forwards)
        self._report, self._evaluation = report, evaluation
        self._stock = model.forward
        # `generate`, Trainer and PEFT look at the signature
        functools.update_wrapper(self, self._stock)
        # the model's own forward is compiled all the same
        self._answer = torch.compiler.disable(self._answer_outside, recursive=False)
        self._read = torch.compiler.disable(self._read_logits)
        self._restore = put_attributes(model, forward=self)

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        """What the model returns, or a `FusedCausalLMOutput`."""
        if not fused_lm_head:
            return self._stock(*args, **kwargs)
        if not self._forwards:
            return self._stock(*args, fused_lm_head=True, **kwargs)
        return self._answer(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._stock, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model, "forward")

    def remove(self) -> None:
        """Gives the model TRL's back; somebody's wrapper around this one then finds that."""
        self._forwards = ()
        self._restore()

    def _answer_outside(self, *args: Any, **kwargs: Any) -> Any:
        head, evaluation = self._head, self._evaluation
        evaluated = evaluation is not None and not torch.is_grad_enabled() and evaluation.in_loop()
        report = evaluation.report if evaluation is not None and evaluated else self._report
        with contextlib.ExitStack() as stack:
            for forward in self._forwards:
                stack.enter_context(forward.asked(report, head.cast_lm_head_to_fp32))
            reasons = [forward.reason_now() for forward in self._forwards]
            for reason in filter(None, reasons):
                report.note_skipped(reason)
            answer = None if any(reasons) else self._answered(report, *args, **kwargs)
        return self._stock(*args, fused_lm_head=True, **kwargs) if answer is None else answer

    def _answered(
        self,
        report: Report,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The answer; None where the model does not compute all that TRL does."""
        outputs = self._stock(*args, **{**kwargs, "use_cache": False})
        aux_loss = getattr(outputs, "aux_loss", None)
        if aux_loss is None and self._routes(kwargs):
            return None
        found = self._read(report, outputs.logits, labels, shift_labels)
        counted = found["label_mask"]
        items = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -found["log_probs"].sum() / items
        if aux_loss is not None:
            loss = loss + getattr(self._text_config, "router_aux_loss_coef", 0.0) * aux_loss
        return self._head.output(loss=loss, aux_loss=aux_loss, **found)

    def _read_logits(
        self,
        report: Report,
        logits: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
    ) -> dict[str, Tensor]:
        """What TRL asks for of each label, and which labels there are."""
        if self.difference is None:
            self.difference = self._difference(logits)
        if shift_labels is None:
            assert labels is not None
            logits, shift_labels = logits[:, :-1], labels[:, 1:]
        labels = shift_labels.to(logits.device)
        if self._head.temperature != 1.0:
            logits = logits / self._head.temperature
        report.fused += isinstance(logits, LazyLogits) and logits.is_lazy
        counted, names = labels != IGNORED, {"log_probs", *self._head.outputs}
        tokens = token_log_probs(
            logits,
            labels,
            # TRL's head waits for the device to count them, too
            max_counted=None if labels.device.type == "cpu" else int(counted.sum()),
            mean_logits="mean_logits" in names,
            log_sum_sq_probs="log_sum_sq_probs" in names,
        )
        return {name: getattr(tokens, name) for name in names} | {"label_mask": counted}

    @property
    def _text_config(self) -> Any:
        config: Any = self._model.config
        return config.get_text_config()

    def _routes(self, kwargs: dict[str, Any]) -> bool:
        """Whether the loss of a router is asked for."""
        given = kwargs.get("output_router_logits")
        told = getattr(self._text_config, "output_router_logits", False)
        return bool(told if given is None else given)

    def _difference(self, logits: Tensor) -> str | None:
        if not isinstance(logits, LazyLogits) or not logits.is_lazy:
            return None
        if not logits.recorded.is_single or len(logits.recorded.head.terms) > 1:
            return "it reads the weight of the output head alone, which has an adapter"
        found, head = scale_and_softcap(logits.expression), self._head
        if found is None:
            return "it does not do to the logits what the model's code does"
        theirs, ours = (head.logit_scale, head.softcap or 0.0), (found.scale, found.softcap or 0.0)
        if all(map(_alike, theirs, ours)):
            return None
        return (
            f"it reads a scale of {theirs[0]:g} and a softcap of {theirs[1]:g} in the "
            f"configuration, the model's code has {ours[0]:g} and {ours[1]:g}"
        )


_alike = functools.partial(math.isclose, rel_tol=1e-6)
