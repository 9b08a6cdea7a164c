"""Trainings in which something raises: in which way of training, where, and what is left then.

A course is the life of a Trainer: made, given a way of training, trained, evaluated, asked for
predictions. It tells each place that it comes by to a function, and what that raises is the fault.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback

import fastft
from fastft.foreign.objects import with_attributes
from support.plugged import examples, llama, tokenizer
from support.trainers import logged, quiet_arguments

STEPS = 4
# whatever this version of transformers tells callbacks
EVENTS = sorted(name for name in dir(TrainerCallback) if name.startswith("on_"))
Reached = Callable[[str], None]


class Way(NamedTuple):
    """A way of training: what is done to a Trainer, returning what takes it off."""

    attach: Callable[[Trainer], Callable[[], None]]
    dtype: torch.dtype = torch.float32
    collator: Any = None


def _plug(**options: Any) -> Callable[[Trainer], Callable[[], None]]:
    return lambda trainer: fastft.plug(trainer, **options).restore


def _callback(kind: Any) -> Callable[[Trainer], Callable[[], None]]:
    def attach(trainer: Trainer) -> Callable[[], None]:
        callback = kind()
        trainer.add_callback(callback)
        return callback.restore

    return attach


BF16 = torch.bfloat16
WAYS = {
    "plug": Way(_plug()),
    "padding left out": Way(_plug(packing="collate")),
    "packs": Way(_plug(packing=40)),
    "linear layers": Way(_plug(linear=True)),
    "moments of 8 bits": Way(_plug(moments="8bit", seed=3), BF16),
    "states on the host": Way(_plug(offload="states"), BF16),
    "gradients on the host": Way(_plug(offload="gradients"), BF16),
    "overlapped steps": Way(_plug(offload="overlap"), BF16),
    "fused loss": Way(_callback(fastft.FusedLossCallback)),
    "packing": Way(_callback(fastft.PackingCallback), collator=fastft.PackingCollator),
    "throughput": Way(_callback(fastft.ThroughputCallback)),
}


class _Rows(list):
    """Examples that tell when one is read."""

    reached: Reached

    def __getitem__(self, index: Any) -> Any:
        self.reached("dataset")
        return super().__getitem__(index)


class _Saving(Trainer):
    """Tells when it has saved its model, in the middle of a checkpoint."""

    reached: Reached

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        super().save_model(*args, **kwargs)
        self.reached("save")


class Course:
    """A Trainer's life.

    Args:
        folder: of its checkpoints.
        way: a key of `WAYS`.
        model: of `made(way)`, with the weights that it had when it was made.
        reached: called with the name of each place that the course comes by.
        first: whether the callback that tells of events comes before those of fastft.

    Attributes:
        weights: those behind each step of the optimizer, the model's own first.
        stock: what is the model's and the Trainer's before anything is done to it.
    """

    def __init__(
        self,
        folder: Any,
        way: str,
        model: Any,
        reached: Reached = lambda place: None,
        first: bool = False,
    ) -> None:
        self.folder, self.way, self.model, self.first = folder, WAYS[way], model, first
        self._reached, self._told = reached, set[str]()
        self.trainer: Any = None
        self.detach: Callable[[], Any] = lambda: None
        self.weights = [_copied(model)]
        self.stock = traces(model), threading.active_count()

    def run(self) -> Course:
        """Raises what `reached` raises."""
        with contextlib.ExitStack() as stack:
            self._plant(stack)
            told = TrainerCallback()
            for event in EVENTS:
                setattr(told, event, lambda *_, event=event, **__: self.reached(event))
            self.trainer = self._made([told] if self.first else [])
            self.detach = self.way.attach(self.trainer)
            if not self.first:
                self.trainer.add_callback(told)
                self.reached("on_init_end")
            self.trainer.train()
            self.trainer.evaluate()
            self.trainer.predict(examples()[:3])
            for event in set(EVENTS) - self._told:  # what needs a hub, or a Trainer to come
                told_of = self.trainer.args, self.trainer.state, self.trainer.control
                self.trainer.callback_handler.call_event(event, *told_of)
        return self

    def reached(self, place: str) -> None:
        """The course comes by."""
        self._told.add(place)
        self._reached(place)

    def _made(self, callbacks: list[TrainerCallback]) -> Trainer:
        rows = _Rows(examples())
        steps = {f"{what}_strategy": "steps" for what in ("eval", "save")}
        steps |= {f"{what}_steps": 2 for what in ("eval", "save")}
        batches = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        arguments = quiet_arguments(
            self.folder, max_steps=STEPS, learning_rate=1e-2, seed=7, **batches, **steps
        )
        collator = self.way.collator or (
            lambda: DataCollatorForLanguageModeling(tokenizer(), mlm=False)
        )
        rows.reached = _Saving.reached = self.reached
        return _Saving(
            self.model,
            arguments,
            train_dataset=rows,
            eval_dataset=examples(seed=2)[:6],
            data_collator=collator(),
            compute_metrics=self._metrics,
            callbacks=callbacks,
        )

    def _metrics(self, predicted: Any) -> dict[str, float]:
        self.reached("metrics")
        return {}

    def _plant(self, stack: contextlib.ExitStack) -> None:
        layer, reached = self.model.model.layers[0], self.reached
        weight = layer.self_attn.q_proj.weight

        def forward(*_: Any) -> None:
            training = torch.is_grad_enabled()
            reached("forward" if training else "forward without gradients")

        def inside(*_: Any) -> None:
            if torch.is_grad_enabled():
                reached("inside the forward")

        for handle in (
            layer.register_forward_pre_hook(forward),
            layer.mlp.register_forward_hook(inside),
            weight.register_hook(lambda gradient: reached("backward")),
            register_optimizer_step_pre_hook(lambda *_: reached("before the step")),
            register_optimizer_step_post_hook(self._stepped),
        ):
            stack.callback(handle.remove)
        for kind, method, place in (
            (lr_scheduler.LRScheduler, "step", "scheduler"),
            (fastft.PackingCollator, "__call__", "collator"),
            (DataCollatorForLanguageModeling, "torch_call", "collator"),
        ):
            stack.enter_context(_told_first(kind, method, lambda place=place: reached(place)))

    def _stepped(self, *_: Any) -> None:
        self.weights.append(_copied(self.model))
        self.reached("behind the step")


def _told_first(kind: type, method: str, tell: Callable[[], None]) -> Any:
    stock = getattr(kind, method)

    def telling(*args: Any, **kwargs: Any) -> Any:
        tell()
        return stock(*args, **kwargs)

    return with_attributes(kind, **{method: telling})


def frozen_objects() -> Iterator[None]:
    """For a fixture: accelerate collects garbage before each training, which takes four fifths of a
    small one's time."""
    gc.freeze()
    yield
    gc.unfreeze()


def made(way: str) -> Any:
    """The model of a way of training."""
    return llama().to(WAYS[way].dtype)


def _copied(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def traces(model: Any) -> list[Any]:
    """Whatever anybody but accelerate leaves on a model: attributes, hooks, classes, attention."""
    of_modules = [
        (
            type(module),
            sorted(vars(module).keys() - {"_is_accelerate_prepared"}),
            [len(value) for name, value in vars(module).items() if name.endswith("_hooks")],
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for module in model.modules()
    ]
    of_parameters = [(type(one), len(one._backward_hooks or ())) for one in model.parameters()]
    return [*of_modules, *of_parameters]


def outcome(course: Course) -> tuple[Any, ...]:
    """What a course has logged, and the weights behind its steps."""
    names = ("loss", "grad_norm", "learning_rate", "eval_loss")
    return logged(course.trainer, *names), course.weights
