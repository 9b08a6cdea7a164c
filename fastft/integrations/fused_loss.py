"""The fused loss for `transformers.Trainer`: `callbacks=[FusedLossCallback()]`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from fastft.checks import boolean
from fastft.data.batch import known_count
from fastft.foreign.compiling import is_compiled
from fastft.foreign.engines import engine_of
from fastft.foreign.models import unwrapped, whose_forward
from fastft.integrations.freed_memory import keep_freed_memory
from fastft.integrations.gated_units import use_own_units
from fastft.integrations.linear_products import reason_against, use_own_layers
from fastft.integrations.norms import use_own_norms
from fastft.integrations.packing import PackingCallback
from fastft.integrations.run_record import record_run
from fastft.loss.counted_labels import give_counted_labels
from fastft.loss.lazy.evaluation import Evaluation
from fastft.loss.lazy.output_head import (
    Attachment,
    expects_head,
    is_recomputed_or_generating,
)
from fastft.loss.lazy.report import Report
from fastft.stack import callers

# below "transformers", so that its verbosity rules
logger = logging.get_logger(f"transformers.{__name__}")

_MANY_BYTES = 1 << 30
_STEPPING = ("training_step", "compute_loss")
_EVALUATING = ("prediction_step", "evaluation_loop", "evaluate", "predict")
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class FusedLossCallback(PackingCallback):
    """Computes a model's loss without ever holding logits, from train begin to train end.

    A loss that reads the logits of the Trainer's other models too (`teacher_model`, `ref_model`),
    or of the model without its adapters, holds none of theirs: in a training step forward passes
    without gradients are lazy as well.

    So are evaluations inside `train()`. There `preprocess_logits_for_metrics` gets lazy
    logits: argmax, top-k and log-probabilities are computed chunk by chunk. Metrics that want
    logits get plain ones, as in stock. `generate`, exports, and `evaluate` and `predict` outside
    `train()` are stock.

    Args:
        verify: compute the loss of the first batch by the model's own loss as well, and raise
            `RuntimeError` if the two differ by more than rounding explains. Costs one more forward
            pass. Needs a model that returns its own loss.
        on_leak: where batches come from a `PackingCollator`, the callback does what
            `fastft.PackingCallback` does: `"error"` raises if the model does not keep packed
            sequences apart, in a training or in an evaluation outside of one; `"warn"` says so and
            goes on.
        attention: False leaves the attention implementation alone, which the callback else switches
            for packed batches, as `fastft.PackingCallback` does.
        linear: whether the model's linear layers compute their fp32 products on a CPU by fastft's
            kernel. None (default): where it is faster, because MKL, which torch takes for them,
            leaves AVX-512 unused (on processors that are not Intel's). The order of sums is another
            one then, their error is not. True: the same, and anywhere else a warning says why not.
            False: never.
        swiglu: whether gated units, `down_proj(silu(gate_proj(x)) * up_proj(x))`, are computed on a
            CPU in one pass that keeps no silu for backward, where they are large enough, and a
            plain `down_proj` makes its input again instead of keeping it; False: never.
        rms_norm: whether root mean square norms are computed on a CPU in one pass that keeps
            nothing normalised for backward, where they are large enough, and trained linear layers
            make their result again instead of keeping it; False: never.

    Attributes:
        report: `fused`, how many losses were fused; `materialised`, the places (file:line) which
            asked for real logits; `skipped`, why the model was left as it is. Of the latest
            training.
        evaluation: the same of the evaluations inside it, where `fused` counts all that was
            computed chunk by chunk.
        linear_layers: how many have had one of fastft's products in the latest training.
        gated_units, norms: how many have had that pass in it.
        switched: as in `fastft.PackingCallback`.

    Under FSDP and ZeRO-3 the loss is fused where the model computes it from its `labels`; with
    label smoothing or a `compute_loss_func` it stays stock, and `report.skipped` says so.
    TRL's trainers ask the model's fused head for log-probabilities: those are answered too, for a
    reference model as well, in training and in evaluations inside it. DataParallel, and models
    whose loss others compute (Liger, TRL's distillation), are left alone, and a warning says so; so
    are classifiers, which have no vocabulary to save, without a warning.

    Trainer's last log of a training has the numbers of `report` and the share of padding, as
    `fastft/fused` and others (docs/throughput.md).

    On a CPU malloc keeps what a step frees until train end (docs/environment.md).

    An exception out of `train()` leaves the model attached, because Trainer then calls no callback:
    `restore()` takes it off, and so does the next training of the model that has this callback, a
    new one or a `PackingCallback`.

    Raises:
        ValueError: from `train()`, before anything is trained, where an optimizer of fastft's does
            not hold what is trainable, is not the one that trains, or was made with other values
            than `args` have (docs/adamw.md); another `on_leak`.
        TypeError: `linear`, `swiglu`, `rms_norm` or `attention` is no bool.
        PackingLeakError: from `train()`, as of `fastft.PackingCallback`.
    """

    def __init__(
        self,
        verify: bool = False,
        on_leak: str = "error",
        attention: bool = True,
        linear: bool | None = None,
        swiglu: bool = True,
        rms_norm: bool = True,
    ) -> None:
        super().__init__(on_leak, attention)
        self.swiglu, self.rms_norm = boolean("swiglu", swiglu), boolean("rms_norm", rms_norm)
        if linear is not None and not isinstance(linear, bool):
            raise TypeError(f"linear must be True, False or None, got {linear!r}")
        self.verify, self.linear = verify, linear
        # of layers; None where none may have one
        self._own_products: set[int] | None = None
        self._own_norms: set[int] | None = None
        self._own_units: set[int] = set()
        self.report, self.evaluation = Report(), Report()
        self._attachment: Attachment | None = None
        self._trainer_name = ""
        self._steps = _Steps()
        self._said, self._said_places, self._said_size = False, 0, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches, after `restore()`: auto_find_batch_size begins again without an end."""
        # first: the probe sees the model without us
        collator = self._begin(args, state, **kwargs)
        model = kwargs["model"]
        self._said, self._said_places, self._said_size = False, 0, False
        evaluation = Evaluation(_in_evaluation_loop)
        self.evaluation = evaluation.report
        self._own_units, self._own_products, self._own_norms = set(), None, None
        self._kept.callback(record_run(model, args))
        if args.n_gpu > 1:
            self.report = Report(
                skipped=["DataParallel: its replicas would call the head of the first device"]
            )
            return
        self._trainer_name = type(_trainer()).__name__
        self._attachment = Attachment(model, evaluation, _other_models(), self._steps)
        self._kept.callback(self._attachment.remove)
        self._use_own_layers(model, args)
        if collator is not None:
            self._kept.callback(give_counted_labels(model, known_count))
        self.report = self._attachment.report
        if args.torch_compile and self._attachment.heads:
            _keep_loss_uncompiled(unwrapped(model), self._kept)
        if self.verify and self._attachment.heads:
            self._verify_first_batch(model)
        keep_freed_memory(model, self._kept)

    def _use_own_layers(self, model: nn.Module, args: TrainingArguments) -> None:
        compiled = args.torch_compile or is_compiled(model)
        engine = "torch.compile" if compiled else engine_of(args)
        if self.swiglu and engine is None:
            self._own_units = use_own_units(model, self._kept)
        if self.rms_norm and engine is None:
            self._own_norms = use_own_norms(model, self._kept)
        why = None if self.linear is False else reason_against(model, engine)
        products = why is None and self.linear is not False
        own = use_own_layers(model, self._kept, products, self._own_norms is not None)
        self._own_products = own if products else None
        if self.linear and why is not None:
            logger.warning(f"fastft: linear=True does nothing: {why}")

    @property
    def linear_layers(self) -> int:
        """How many have had one of fastft's products in the latest training."""
        return len(self._own_products or ())

    @property
    def gated_units(self) -> int:
        """How many have been computed by fastft's kernel in the latest training."""
        return len(self._own_units)

    @property
    def norms(self) -> int:
        """The same of root mean square norms."""
        return len(self._own_norms or ())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says after the first step what became of the loss, and later of each new place that asks
        for real logits."""
        places = self.report.materialised[self._said_places :]
        self._said_places += len(places)
        if places:
            logger.warning(
                f"fastft: real logits were asked for by {', '.join(places)}: right, but without "
                "the saving"
            )
        if not self._said:
            self._said = True
            self._say_outcome(kwargs["model"])
            self._say_own_layers()

    def _say_own_layers(self) -> None:
        """Says after the first step how many layers had fastft's kernels: until then nobody knows
        how large these are."""
        for count, what in ((self.gated_units, "gated unit"), (self.norms, "norm")):
            if count:
                said = f"{what} is" if count == 1 else f"{what}s are"
                logger.info(f"fastft: {count} {said} computed in one pass")
        if self.linear_layers:
            logger.info(f"fastft: {self.linear_layers} linear layers multiply by fastft's kernel")
        elif self.linear and self._own_products is not None:
            logger.warning(f"fastft: linear=True did nothing in the first step: {_NO_PRODUCT}")

    def _say_outcome(self, model: nn.Module) -> None:
        """Says after the first step what became of the loss."""
        if self.report.fused:
            logger.info(
                f"fastft: the loss is fused ({self.report.fused} evaluations in the first step)"
            )
            heads = [] if self._attachment is None else self._attachment.fused_heads
            differences = dict.fromkeys(head.difference for head in heads)
            for difference in filter(None, differences):
                logger.warning(f"fastft: {_OTHER_HEAD.format(difference)}")
            return
        # a classifier has nothing to fuse
        say = logger.warning if expects_head(model) else logger.info
        why = self.why_not_fused(model)
        unknown = not (self.report.skipped or self.report.materialised)
        advice = f". {_who_computes_it(model, self._trainer_name)[1]}" if unknown else ""
        say(f"fastft: no loss was fused in the first step: {why}{advice}")

    def why_not_fused(self, model: nn.Module) -> str:
        """Why no loss was fused in a training of `model` that has taken a step, in words."""
        if self.report.skipped:
            return "; ".join(self.report.skipped)
        if self.report.materialised:
            return "something asked for real logits before the loss"
        return _who_computes_it(model, self._trainer_name)[0]

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Makes plain tensors of the logits that metrics want, and says once how large they are:
        from a gigabyte on.

        Says once, too, where several ranks would count examples of packed rows twice; refuses
        packed rows that nothing keeps apart.
        """
        size = self._settle()
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
        held = (
            1
            if args.batch_eval_metrics or not has_length(eval_dataloader)
            else len(eval_dataloader)
        )
        if size * held * args.world_size >= _MANY_BYTES and not self._said_size:
            self._said_size = True
            logger.warning(
                f"fastft: the metrics get real logits, {size / 2**20:,.0f} MiB for each batch of "
                f"the evaluation ({', '.join(self.evaluation.materialised)}). Where argmax, top-k "
                "or log-probabilities are enough, give Trainer a preprocess_logits_for_metrics: "
                "it makes them without the logits."
            )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves nothing lazy to what comes after an evaluation or a prediction."""
        super().on_evaluate(args, state, control, **kwargs)
        self._settle()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves no logits of an evaluation that could not be computed when the weights have
        changed."""
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self._settle()

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module, args: TrainingArguments) -> Iterator[None]:
        """Makes an evaluation loop of Trainer's outside `train()` like those inside it, as
        `fastft.plug` does.

        Nothing happens inside a training, with DataParallel, and where a model is not yet sharded.
        """
        if self._attachment is not None or args.n_gpu > 1:
            yield
            return
        evaluation = Evaluation(_in_evaluation_loop)
        self.evaluation = evaluation.report
        self._attachment = attachment = Attachment(model, evaluation, _other_models())
        with contextlib.ExitStack() as stack:
            stack.callback(attachment.remove)
            if args.torch_compile and attachment.heads:
                _keep_loss_uncompiled(unwrapped(model), stack)
            try:
                yield
            finally:
                if self._attachment is attachment:
                    self._attachment = None

    def _settle(self) -> int:
        evaluation = None if self._attachment is None else self._attachment.evaluation
        return 0 if evaluation is None else evaluation.take_built()

    def restore(self) -> None:
        """Takes the model back to stock. Harmless when called twice."""
        super().restore()
        self._attachment = None

    def _verify_first_batch(self, model: nn.Module) -> None:
        stock: list[torch.Tensor | None] = []
        steps = self._steps  # and not this callback, which the model would keep alive

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not stock and module.training:
                steps.verifies = True
                try:
                    with torch.no_grad(), torch.random.fork_rng():
                        stock.append(_loss_of(module.forward(*args, **kwargs)))
                finally:
                    steps.verifies = False

        def after(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if not stock:
                return
            hooks.close()
            _compare(stock[0], _loss_of(output), _working_dtype(module))

        hooks = self._kept.enter_context(contextlib.ExitStack())
        hooks.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(after, with_kwargs=True).remove)


_OTHER_HEAD = (
    "the log-probabilities are those of the model's own logits. TRL's fused head alone would give "
    "others: {}. Where it has computed a reference before the training (precompute_ref_log_probs), "
    "leave that option out"
)


_NO_PRODUCT = (
    "no linear layer had a plain fp32 product with enough rows; under autocast, and while a mode "
    "of torch's watches operations, the products are torch's too"
)


def _in_evaluation_loop() -> bool:
    """Whether a method of Trainer that evaluates runs the model right now, and no `generate` in
    between.

    No event of Trainer comes between the last callback of a step and an evaluation's first forward
    pass, and where Trainer computes the loss the model gets no labels: only the stack knows.
    """
    for frame in callers():
        name = frame.f_code.co_name
        if name == "generate":
            return False
        if name in _EVALUATING and isinstance(frame.f_locals.get("self"), Trainer):
            return True
    return False


class _Steps:
    """Tells whether a step of a Trainer runs the model right now, for the logits of that pass
    alone; never while the stock model verifies."""

    verifies = False

    def __call__(self) -> bool:
        return not (self.verifies or is_recomputed_or_generating()) and any(
            isinstance(frame.f_locals.get("self"), Trainer)
            for frame in callers()
            if frame.f_code.co_name in _STEPPING
        )


def _trainer() -> Any:
    """The Trainer that is about to train or evaluate."""
    for frame in callers():
        if frame.f_code.co_name in ("_inner_training_loop", *_EVALUATING):
            trainer = frame.f_locals.get("self")
            if isinstance(trainer, Trainer):
                return trainer
    return None


def _other_models() -> list[nn.Module]:
    """The models of the Trainer that is about to train or evaluate, but the one it trains."""
    trainer = _trainer()
    own = (getattr(trainer, "model", None), getattr(trainer, "model_wrapped", None))
    values = () if trainer is None else vars(trainer).values()
    others = (value for value in values if isinstance(value, nn.Module))
    return [other for other in others if all(other is not one for one in own)]


def _who_computes_it(model: nn.Module, trainer: str) -> tuple[str, str]:
    """Says why no head was asked for logits, and what to do."""
    packages = whose_forward(model)
    if "Distillation" in trainer:
        return (
            f"nothing called the output head: {trainer} reads the weights of both models' heads "
            "itself",
            "Leave FusedLossCallback out (fastft's AdamW works there)",
        )
    if "trl" in packages:
        return (
            "nothing called the output head: TRL computes the loss by a fused head of its own, "
            "which is none that this version of fastft knows",
            "Leave FusedLossCallback out (fastft's AdamW and packing work there), or use TRL 1.16",
        )
    if "liger_kernel" in packages:
        return (
            "nothing called the output head: Liger computes the loss",
            "Leave FusedLossCallback out, or use_liger_kernel",
        )
    return (
        "nothing called the output head: another fused loss must be at work, TRL's (SFTTrainer), "
        "Liger's (use_liger_kernel) or one in the model's code",
        "Leave that, or FusedLossCallback, out",
    )


def _keep_loss_uncompiled(model: Any, stack: contextlib.ExitStack) -> None:
    """One graph break at the loss function instead of one at each operation on lazy logits."""
    if hasattr(type(model), "loss_function") and "_loss_function" not in model.__dict__:
        model.loss_function = torch.compiler.disable(model.loss_function)
        stack.callback(model.__dict__.pop, "_loss_function", None)


def _loss_of(output: Any) -> torch.Tensor | None:
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return loss.detach() if isinstance(loss, torch.Tensor) else None


def _working_dtype(model: nn.Module) -> torch.dtype:
    """The least precise dtype at work."""
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    dtypes = {parameter.dtype}
    if torch.is_autocast_enabled(parameter.device.type):
        dtypes.add(torch.get_autocast_dtype(parameter.device.type))
    # accelerate's mixed precision runs inside forward
    if getattr(model, "_original_forward", None) is not None:
        dtypes.add(torch.bfloat16)
    return max(dtypes, key=lambda dtype: _TOLERANCE.get(dtype, 5e-2))


def _compare(stock: torch.Tensor | None, fused: torch.Tensor | None, dtype: torch.dtype) -> None:
    if stock is None or fused is None:
        logger.warning(
            "fastft: verify=True found nothing to compare: the model returned no loss of its own"
        )
        return
    expected, actual = float(stock), float(fused)
    if abs(expected - actual) > _TOLERANCE.get(dtype, 5e-2) * max(1.0, abs(expected)):
        raise RuntimeError(
            f"fastft: the fused loss of the first batch is {actual:.8g}, the stock loss "
            f"{expected:.8g}. Please report this model; train it without FusedLossCallback."
        )
