"""`plug`, `restore`, callbacks and `fused_loss` at random moments of a Trainer's life, beside a
stock Trainer that goes through the same: trainings, evaluations, exceptions from any event, new
Trainers of the same model.

Losses, evaluations and predictions are those of stock but for rounding; after each event a plugged
model that nobody trains is a stock one; when all is taken off, a training has stock's losses and
weights to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from support.plugged import trainer_of
from support.trainers import logged
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

import fastft
from fastft.integrations.plug.plug import Plugged

EXAMPLES = 16
TASKS = ("causal", "causal, labels of its own", "masked", "classes")
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "no clipping": {"max_grad_norm": 0.0},
    "evaluations": {"eval_strategy": "steps", "eval_steps": 1},
    "checkpoints": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
}
PLUGS: tuple[dict[str, Any], ...] = (
    {},
    {"packing": "collate"},
    {"optimizer": False},
    {"loss": False, "packing": "collate"},
    {"linear": True},
    {"offload": "states"},
)
STOPS = tuple(sorted(name for name in dir(TrainerCallback) if name.startswith("on_")))
EVENTS = ("plug", "plug", "train", "train", "broken", "broken", "restore", "callback", "trainer")
EVENTS += ("remove", "evaluate", "predict", "context", "copy", "cell", "cell", "cell")
ROUNDING = {"rtol": 5e-4, "atol": 1e-4}


class Case(NamedTuple):
    task: str
    setting: str
    events: list[tuple[str, int]]


CASES = st.builds(
    Case,
    task=st.sampled_from(TASKS),
    setting=st.sampled_from(sorted(SETTINGS)),
    events=st.lists(
        st.tuples(st.sampled_from(EVENTS), st.integers(0, 1000)), min_size=1, max_size=7
    ),
)


class Stop(Exception):
    """What ends a training."""


class _Stopper(TrainerCallback):
    """Raises at the first or second time of an event."""

    def __init__(self, number: int) -> None:
        self.event, self.left = STOPS[number % len(STOPS)], number // len(STOPS) % 2
        self.error = (Stop, KeyboardInterrupt)[number // 100 % 2]
        setattr(self, self.event, self._stop)

    def _stop(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


class _Life:
    """A Trainer and its model, which take one event after another; `stock`: nothing of fastft."""

    def __init__(self, case: Case, folder: str, stock: bool) -> None:
        self.case, self.folder, self.stock = case, folder, stock
        self.trainer = _trainer(case, folder)
        self.model: Any = self.trainer.model
        self.callbacks: list[Any] = []  # loose ones, also of earlier Trainers
        self.plugs: list[Plugged] = []

    def take(self, event: str, number: int) -> Any:
        set_seed(number)
        return getattr(self, f"_{event}")(number)

    def _train(self, number: int) -> list[float]:
        self.trainer.args.max_steps = 1 + number % 3
        self.trainer.train()
        return logged(self.trainer, "loss") + logged(self.trainer, "eval_loss")

    def _broken(self, number: int) -> str:
        """How the training, or what has the event, ended: not every event comes in each."""
        stopper = _Stopper(number)
        self.trainer.add_callback(stopper)
        try:
            self._train(number)
            if stopper.event == "on_predict":
                self._predict(number)
            elif stopper.event == "on_init_end":
                _trainer(self.case, self.folder, self.model, [stopper])
        except (Stop, KeyboardInterrupt) as error:
            return type(error).__name__
        finally:
            self.trainer.remove_callback(stopper)
        return "to the end"

    def _cell(self, number: int) -> str:
        """A notebook's cell, which is run again and again: a Trainer, what is given to it, and a
        training that may be stopped."""
        self._trainer(0)
        (self._plug, self._callback, self._evaluate)[number % 3](number // 3)
        if number // 3 % 2:
            return self._broken(number // 6)
        self._train(number // 6)
        return "to the end"

    def _evaluate(self, _: int) -> float:
        return float(self.trainer.evaluate()["eval_loss"])

    def _predict(self, _: int) -> Any:
        predictions = self.trainer.predict(self.trainer.eval_dataset).predictions
        return torch.as_tensor(predictions[0] if isinstance(predictions, tuple) else predictions)

    def _trainer(self, _: int) -> None:
        """A new one, as in a notebook whose cell is run again: nobody has restored the old one."""
        self.trainer = _trainer(self.case, self.folder, self.model)

    def _context(self, number: int) -> list[torch.Tensor]:
        """A step by hand, which an exception may end."""
        batch = self.trainer.data_collator([dict(row) for row in self.trainer.train_dataset[:3]])
        around = contextlib.nullcontext() if self.stock else fastft.fused_loss(self.model)
        with contextlib.suppress(Stop), around:
            self.model.train()
            loss = self.model(**{key: torch.as_tensor(value) for key, value in batch.items()}).loss
            gradients = torch.autograd.grad(loss, list(self.model.parameters()), allow_unused=True)
            if number % 2:
                raise Stop
        return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]

    def _copy(self, _: int) -> list[Any]:
        """A copy of the model is a stock one, whatever is on the model."""
        return _traces(copy.deepcopy(self.model))

    def _plug(self, number: int) -> None:
        options = dict(PLUGS[number % len(PLUGS)])
        # options for an optimizer, or a callback, that is there already are refused
        if self.trainer.optimizer is not None:
            options.pop("offload", None)
        if self.callbacks:
            options.pop("linear", None)
        if not self.stock and Plugged.of(self.trainer) is None:
            self.plugs.append(fastft.plug(self.trainer, **options))

    def _restore(self, number: int) -> None:
        if self.plugs:
            self.plugs[number % len(self.plugs)].restore()

    def _callback(self, _: int) -> None:
        """A loose callback of the loss, for trainings without `plug`."""
        if not self.stock and Plugged.of(self.trainer) is None:
            self.callbacks.append(fastft.FusedLossCallback())
            self.trainer.add_callback(self.callbacks[-1])

    def _remove(self, number: int) -> None:
        if self.callbacks:
            callback = self.callbacks.pop(number % len(self.callbacks))
            callback.restore()
            handler = self.trainer.callback_handler
            handler.callbacks = [each for each in handler.callbacks if each is not callback]

    def is_clean(self, before: bool, ended: bool) -> bool:
        """Whether nothing may be on the model behind a training: what a loose callback has left
        there when an exception came, the next training takes off that has a callback."""
        callbacks = self.trainer.callback_handler.callbacks
        if not any(isinstance(each, fastft.PackingCallback) for each in callbacks):
            return before
        return ended or Plugged.of(self.trainer) is not None

    def take_off(self) -> None:
        for plug in reversed(self.plugs):
            plug.restore()
        while self.callbacks:
            self._remove(0)


def _trainer(
    case: Case,
    folder: str,
    model: nn.Module | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    changes = {"learning_rate": 1e-3, "max_steps": 2, **SETTINGS[case.setting]}
    options = {"callbacks": [*callbacks]}
    trainer = trainer_of(folder, case.task, model=model, options=options, **changes)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _traces(model: nn.Module) -> list[Any]:
    """What may be left on a model: attributes of its modules, hooks, its attention."""
    left: list[Any] = [getattr(model.config, "_attn_implementation", None)]
    for name, module in model.named_modules():
        hooks = {
            key: len(value)
            for key, value in vars(module).items()
            if key.endswith("_hooks") and value
        }
        left.append((name, sorted(vars(module)), hooks, module.training))
    return left


def check(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder, _quietly():
        stock, ours = (_Life(case, f"{folder}/{stock}", stock) for stock in (True, False))
        before = copy.deepcopy(ours.model.state_dict())
        clean = True
        for event, number in case.events:
            expected, found = (life.take(event, number) for life in (stock, ours))
            if clean or event != "copy":
                _assert_same(found, expected, event)
            if event in ("train", "broken", "cell"):
                clean = ours.is_clean(clean, event == "train" or found == "to the end")
            clean |= event == "remove" and not ours.callbacks
            if clean:
                assert _traces(ours.model) == _traces(stock.model), f"left on the model: {event}"
        ours.take_off()
        _check_stock(case, folder, stock, ours, before)


def _assert_same(found: Any, expected: Any, event: str) -> None:
    if event in ("broken", "copy", "cell"):
        assert found == expected, f"{event}: {found}, stock {expected}"
    elif expected is not None:
        pairs = zip(_tensors(found), _tensors(expected), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, **ROUNDING, msg=lambda m: f"{event}: {m}")


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, list) else [value]
    return [torch.as_tensor(each, dtype=torch.float32) for each in values]


def _check_stock(
    case: Case, folder: str, stock: _Life, ours: _Life, before: dict[str, torch.Tensor]
) -> None:
    """What is left is a stock Trainer, and a stock model that trains as a new one does."""
    assert _traces(ours.model) == _traces(stock.model), "something is left on the model"
    mine, theirs = ours.trainer, stock.trainer
    assert vars(mine).keys() == vars(theirs).keys(), "something is left on the Trainer"
    assert vars(mine.accelerator).keys() == vars(theirs.accelerator).keys()
    kinds = ([type(each) for each in of.callback_handler.callbacks] for of in (mine, theirs))
    assert next(kinds) == next(kinds), "a callback is left"
    assert mine.train.__func__ is Trainer.train  # type: ignore[attr-defined]
    ours.model.load_state_dict(before)
    trainer = _trainer(case, folder, ours.model)
    losses, weights = _trained(trainer)
    expected, expected_weights = _of_stock(case.task, case.setting)
    assert losses == expected, "it does not train as stock"
    others = [name for name in weights if not torch.equal(weights[name], expected_weights[name])]
    assert not others, f"trained weights are not stock's: {others}"


@functools.cache
def _of_stock(task: str, setting: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What a new model's training comes to."""
    with tempfile.TemporaryDirectory() as folder:
        return _trained(_trainer(Case(task, setting, []), folder))


def _trained(trainer: Trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What was logged, and the weights."""
    set_seed(0)
    trainer.train()
    return logged(trainer, "loss", "grad_norm"), copy.deepcopy(trainer.model.state_dict())


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the lines that fastft and Trainer say, and quickly: accelerate collects garbage at
    each train begin, and what was there before is none."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    gc.freeze()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.unfreeze()
        logging.disable(level)
