"""Records a training into a `Trace` while it runs, and changes nothing of it.

Between two optimizer steps nothing is read that a device would have to be waited for: batches and
losses are kept, and looked at around the step, where the clock stands still.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastft.commands.trace import Micro, Step, Trace
from fastft.foreign import compiling, engines, models, objects
from fastft.integrations.recorder.batches import Reading, described, shift_of
from fastft.integrations.recorder.costs import Costs
from fastft.integrations.recorder.leak import leak
from fastft.integrations.recorder.weights import Weights, random_states, torch_states

_COMPUTE = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass
class _Pass:
    """One forward and backward pass: what went in, what came out, where the head's input got a
    gradient."""

    batch: Any
    states: list[Tensor]
    loss: Tensor | None = None
    drew: bool = False
    learning: list[Tensor] = field(default_factory=list)


class Recorder:
    """Fills `trace` with a training's first steps.

    Args:
        trace: what is filled; its `variant` is the caller's.
        steps: how many optimizer steps there are to be.
        done: is called once, when these are recorded or the training has ended before.

    Attributes:
        plugged: what `plug` has returned, for its lines and reports; None in stock.
    """

    def __init__(self, trace: Trace, steps: int, done: Callable[[], None]) -> None:
        self.trace, self.steps, self.plugged = trace, steps, None
        self._done, self._hooks = done, contextlib.ExitStack()
        self._passes: list[_Pass] = []
        self._current: _Pass | None = None
        self._grad_norm: Any = None
        self._packed: Any = None
        self._costs: Costs | None = None

    def begin(self, trainer: str, model: Any, optimizer: Any, accelerator: Any) -> None:
        """A training begins, maybe once more, after Trainer has found a smaller batch size."""
        self.close()
        trace, base = self.trace, models.base_model(model)
        self._model, self._reading = model, Reading.of(base)
        self._weights = Weights(model, optimizer)
        trace.trainer, trace.model = trainer, type(base).__name__
        trace.optimizer = type(self._weights.optimizer).__name__
        trace.parameters = self._weights.names
        trace.weight_decay = self._weights.of_groups("weight_decay")
        trace.projection0 = self._weights.projections()
        trace.dtype = trace.compute_dtype = _commonest_dtype(self._weights.params)
        if getattr(accelerator, "native_amp", False):
            trace.compute_dtype = _COMPUTE.get(accelerator.mixed_precision, trace.dtype)
        trace.rank, trace.world = accelerator.process_index, accelerator.num_processes
        trace.steps = []
        self._watch_head(model)
        self._watch_clipping(accelerator)
        if self._weights.kept_apart:  # the step is a part of the backward pass there
            self._weights.remember()
        self._seconds, self._costs = 0.0, Costs()

    @property
    def _clock(self) -> Costs:
        assert self._costs is not None, "begin() comes first"
        return self._costs

    def pass_begins(self, batch: Any) -> None:
        """A forward pass of the training begins."""
        kept = dict(batch) if isinstance(batch, Mapping) else batch
        self._current = _Pass(kept, torch_states())
        self._passes.append(self._current)

    def pass_ends(self, loss: Tensor) -> None:
        """Its backward pass is through; `loss` is what it adds to that of its step."""
        if self._current is not None:
            self._current.loss = loss.detach()
            states = zip(torch_states(), self._current.states, strict=True)
            self._current.drew = not all(torch.equal(after, before) for after, before in states)
            self._current = None

    def step_begins(self) -> None:
        """The gradients are what the optimizer is going to use."""
        with self._clock.stopped(self._weights.held):
            passes, self._passes = self._passes, []
            micro = [self._micro(one) for one in passes]
            self._step = Step(
                loss=sum(one.loss for one in micro),
                micro=micro,
                learning_rate=[float(g["lr"]) for g in self._weights.optimizer.param_groups],
                gradients=self._weights.gradients(),
                drew=any(one.drew for one in passes),
            )
            self._step.grad_norm = self._norm_of(self._step.gradients)
            if not self._weights.kept_apart:
                self._weights.remember()

    def step_ends(self) -> None:
        """The optimizer has taken its step."""
        with self._clock.stopped(self._weights.held):
            step = self._step
            step.moved, step.moments = self._weights.moved(), self._weights.moments()
            step.projection, step.weights = self._weights.projections(), self._weights.bits()
            if self._weights.kept_apart:
                self._weights.remember()

    def closes(self) -> bool:
        """Nothing more belongs to the step; returns whether it was the last."""
        with self._clock.stopped(self._weights.held):
            self._step.random = random_states()
            self._step.seconds = self._clock.seconds - self._seconds
            self._seconds = self._clock.seconds
            self.trace.steps.append(self._step)
        last = len(self.trace.steps) == self.steps
        if last:
            self.finish("steps")
        return last

    def finish(self, ended: str) -> None:
        """The training is over, for the recorder at least."""
        self.complete()
        self.trace.ended = ended
        self._done()

    def complete(self) -> None:
        """Takes the recorder off, and says what can be said of the training as a whole."""
        self.close()
        trace, costs = self.trace, self._costs
        if costs is None:
            return
        trace.peak_device, trace.peak_process = costs.peak_device, costs.peak_process
        trace.peak_kind = costs.kind
        if self.plugged is not None:
            trace.lines = dict(self.plugged.lines)
            report = self.plugged.report
            trace.fused, trace.skipped = report.fused, list(report.skipped)
            trace.materialised = list(report.materialised)
        trace.leak = None if self._packed is None else leak(self._model, self._packed)

    def close(self) -> None:
        """Takes every hook off again."""
        self._hooks.close()
        self._passes, self._current = [], None

    def hook(self, remove: Callable[[], Any]) -> None:
        """Has `close` call this."""
        self._hooks.callback(remove)

    def put(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        """Gives an object another method until `close`, unless somebody has put one over it."""
        self.hook(objects.put_attributes(owner, **{name: method}))

    def _norm_of(self, gradients: list[float]) -> float | None:
        """That of all gradients, as clipping has found it; without clipping, by their own."""
        norm, self._grad_norm = self._grad_norm, None
        if norm is not None:
            return float(norm)
        known = [gradient for gradient in gradients if not math.isnan(gradient)]
        return math.hypot(*known) if known else None

    def _micro(self, one: _Pass) -> Micro:
        loss = float("nan") if one.loss is None else float(one.loss)
        micro = described(one.batch, loss, self._reading)
        if len(one.learning) == 1:
            learning = one.learning[0].cpu()
            micro.learning = int(learning.sum())
            micro.shift = shift_of(learning, one.batch)
        if micro.packed:
            self._packed = one.batch
        return micro

    def _watch_head(self, model: Any) -> None:
        """Has the passes see which rows of the output head's input get a gradient."""
        head = models.output_embeddings(models.base_model(model))
        if head is None or compiling.is_compiled(model):
            return

        def watch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            one, hidden = self._current, inputs[0] if inputs else None
            if one is None or not isinstance(hidden, Tensor) or not hidden.requires_grad:
                return

            def see(gradient: Tensor) -> None:
                largest = torch.linalg.vector_norm(gradient.detach(), float("inf"), dim=-1)
                one.learning.append(largest != 0)

            hidden.register_hook(see)

        self.hook(head.register_forward_pre_hook(watch).remove)

    def _watch_clipping(self, accelerator: Any) -> None:
        """Keeps the norm that clipping finds."""
        stock = accelerator.clip_grad_norm_

        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
            self._grad_norm = stock(*args, **kwargs)
            return self._grad_norm

        self.put(accelerator, "clip_grad_norm_", clip_grad_norm_)


class RecorderCallback(TrainerCallback):
    """Tells a `Recorder` where a Trainer is; has to be the last of its callbacks.

    Nothing is evaluated or saved in the steps that are recorded, and training stops behind them.
    """

    def __init__(self, trainer: Trainer, recorder: Recorder) -> None:
        self.trainer, self.recorder = trainer, recorder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to record."""
        name = type(self.trainer).__name__
        self.recorder.begin(name, kwargs["model"], kwargs["optimizer"], self.trainer.accelerator)
        trainer, stock = self.trainer, self.trainer.training_step

        def training_step(model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            self.recorder.pass_begins(inputs)
            loss = stock(model, inputs, *rest, **options)
            self.recorder.pass_ends(loss)
            return loss

        self.recorder.put(trainer, "training_step", training_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at the gradients."""
        self.recorder.step_begins()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at the weights."""
        self.recorder.step_ends()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the step, and the training behind the last."""
        control.should_evaluate = control.should_save = False
        if self.recorder.closes():
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves evaluations and checkpoints out."""
        control.should_evaluate = control.should_save = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The training was shorter than what was to be recorded."""
        if len(self.recorder.trace.steps) < self.recorder.steps:
            self.recorder.finish("script")


class RecordedLoop:
    """Tells a `Recorder` where a loop is that was written around an `Accelerator`.

    A pass begins where the prepared model is called in training and ends with
    `accelerator.backward`; a step is the optimizer's own.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._model: Any = None
        self._optimizer: Any = None

    def prepared(self, accelerator: Any, things: tuple[Any, ...]) -> None:
        """Takes what `accelerator.prepare` returns; begins with the first model and optimizer."""
        if self._model is not None and self._optimizer is not None:
            return
        for thing in things:
            if isinstance(thing, nn.Module) and self._model is None:
                self._model = thing
            elif isinstance(thing, torch.optim.Optimizer) and self._optimizer is None:
                self._optimizer = thing
        if self._model is not None and self._optimizer is not None:
            self._begin(accelerator)

    def _begin(self, accelerator: Any) -> None:
        recorder, model = self.recorder, self._model
        recorder.begin("Accelerator", model, self._optimizer, accelerator)

        def forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and torch.is_grad_enabled():
                recorder.pass_begins(kwargs or (args[0] if args else None))

        stock = accelerator.backward

        def backward(loss: Tensor, **options: Any) -> None:
            stock(loss, **options)
            recorder.pass_ends(loss.detach() / accelerator.gradient_accumulation_steps)

        recorder.put(accelerator, "backward", backward)
        recorder.hook(model.register_forward_pre_hook(forward, with_kwargs=True).remove)
        optimizer = engines.inner_optimizer(self._optimizer)
        before = optimizer.register_step_pre_hook(lambda *_: recorder.step_begins())
        recorder.hook(before.remove)
        recorder.hook(optimizer.register_step_post_hook(lambda *_: self._step_ends()).remove)

    def _step_ends(self) -> None:
        self.recorder.step_ends()
        self.recorder.closes()


def record(trainer: Trainer, recorder: Recorder) -> None:
    """Has `recorder` see the training that `trainer` is about to begin."""
    trainer.add_callback(RecorderCallback(trainer, recorder))


def models_of(things: tuple[Any, ...]) -> list[nn.Module]:
    """The models among what `accelerator.prepare` is given."""
    return [thing for thing in things if isinstance(thing, nn.Module)]


def _commonest_dtype(params: list[Tensor]) -> str:
    elements: dict[torch.dtype, int] = {}
    for param in params:
        elements[param.dtype] = elements.get(param.dtype, 0) + param.numel()
    return str(max(elements, key=elements.__getitem__)).removeprefix("torch.") if elements else ""
