"""The origin of an optimizer: what the user asked for, to be compared with what trains.

Trainer drops an optimizer (DeepSpeed), makes one later than the user thinks (`adamw_spec`), or
trains a model that has changed since its optimizer was made; all of it without a word. `adamw`,
`adamw_spec` and `plug` leave an `Origin` behind, and `fastft.integrations.optimizer_check` reads
it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import nn

# made by adamw(model): Trainer under DeepSpeed lets go of the optimizer, so that only the model is
# left to be asked
of_models: weakref.WeakKeyDictionary[nn.Module, Origin] = weakref.WeakKeyDictionary()
of_specs: weakref.WeakSet[Origin] = weakref.WeakSet()


class Origin:
    """A call of `adamw`, `adamw_spec` or `plug`.

    Attributes:
        way: the function's name.
        args: the TrainingArguments it was given, or None.
        given: the keywords that the user gave.
        model: the model that the optimizer was made from, weakly, or None.
        trained: whether an optimizer of this origin has taken a step.
    """

    def __init__(
        self, way: str, args: Any, given: dict[str, Any], model: nn.Module | None = None
    ) -> None:
        self.way, self.args, self.given = way, args, given
        self.model = None if model is None else weakref.ref(model)
        self.trained = False

    @property
    def by_trainer(self) -> bool:
        """Whether Trainer makes the optimizer and its groups, with the weight decay of its args."""
        return self.way != "adamw"

    def grouped(self, params: Iterable[Any]) -> Iterable[Any]:
        """What the optimizer is made of, where it was to be made of `params`."""
        return params

    def training(self) -> dict[str, Any]:
        """What is known of the training: `model`, `args`, and its `batch`, as
        `fastft.optim.offload.choice.choose` takes them."""
        model = None if self.model is None else self.model()
        return {"model": model, "args": self.args, "batch": None}

    def remember(self) -> None:
        """Lets train begin find this, also where the optimizer is gone by then."""
        model = None if self.model is None else self.model()
        if model is not None:
            of_models[model] = self
        elif self.by_trainer:
            of_specs.add(self)

    def is_made(self) -> None:
        """An optimizer of this origin exists. Without `args` nothing tells for which Trainer, but
        DeepSpeed, which keeps Trainer from making one, has not dropped it."""
        if self.args is None:
            self.forget()

    def forget(self) -> None:
        """Train begin no longer looks for an optimizer of this origin."""
        of_specs.discard(self)


class Keywords(MutableMapping[str, Any]):
    """The keywords of an AdamW: what the user gave, and else what `args` say when they are read.

    Trainer unpacks them when it makes the optimizer, which is after `hyperparameter_search` has
    changed `args`. Setting an item makes it one that the user gave.
    """

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._now()

    def __repr__(self) -> str:
        return repr(self._public())

    def __eq__(self, other: object) -> bool:
        return self._public() == (other._public() if isinstance(other, Keywords) else other)

    def __getitem__(self, name: str) -> Any:
        return self._now()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._origin.given[name] = value

    def __delitem__(self, name: str) -> None:
        del self._origin.given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def _now(self) -> dict[str, Any]:
        of_args = {} if self._origin.args is None else hyper_parameters(self._origin.args)
        return {**of_args, **self._origin.given, "_origin": self._origin}

    def _public(self) -> dict[str, Any]:
        return {name: value for name, value in self._now().items() if name != "_origin"}


def hyper_parameters(args: Any) -> dict[str, Any]:
    """AdamW's lr, betas, eps and weight_decay as a TrainingArguments has them.

    Raises:
        TypeError: `args` is no TrainingArguments.
    """
    try:
        return {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
        }
    except AttributeError as error:
        raise TypeError(
            f"args must be a transformers.TrainingArguments, got {type(args).__name__} ({error})"
        ) from None
