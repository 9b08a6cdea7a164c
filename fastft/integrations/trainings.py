"""Where trainings begin in a program that knows nothing of fastft: `Trainer.train`, and
`Accelerator.prepare`.

Both methods are wrapped in their class while a context is open, and are stock again behind it.
Neither library is imported for that: where the program imports it, its method is wrapped then.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastft.on_import import when_imported
from fastft.stack import callers

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer

_Method = Callable[..., Any]
_LOOP = "_inner_training_loop"


@contextlib.contextmanager
def at_train(
    apply: Callable[[Trainer, str | bool | None], None],
    ended: Callable[[Trainer, BaseException | None], None] | None = None,
) -> Iterator[None]:
    """While the context is open, `apply` gets every Trainer whose `train()` is called, and the
    `resume_from_checkpoint` of the call.

    It does before stock `train` begins, at each call; a subclass with a `train` of its own counts
    when it calls that of Trainer. Processes which this one has forked train stock.

    Args:
        apply: what it raises, `train()` raises.
        ended: gets the Trainer when its `train()` is over, and the exception that leaves it if one
            does.
    """

    def wrap(stock: _Method) -> _Method:
        @functools.wraps(stock)
        def train(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
            if not here():
                return stock(trainer, *args, **kwargs)
            apply(trainer, args[0] if args else kwargs.get("resume_from_checkpoint"))
            error: BaseException | None = None
            try:
                return stock(trainer, *args, **kwargs)
            except BaseException as raised:
                error = raised
                raise
            finally:
                if ended is not None:
                    ended(trainer, error)

        return train

    with _wrapped("transformers.trainer", "Trainer", "train", wrap) as here:
        yield


@contextlib.contextmanager
def at_prepare(
    before: Callable[[Accelerator, tuple[Any, ...]], None],
    after: Callable[[Accelerator, tuple[Any, ...]], None],
) -> Iterator[None]:
    """While the context is open, `Accelerator.prepare` hands over what it gets and what it returns.

    What a Trainer prepares for itself is not handed over.

    Args:
        before: gets the accelerator and the objects as the program gave them.
        after: gets the accelerator and the prepared objects, in the same order.
    """

    def wrap(stock: _Method) -> _Method:
        @functools.wraps(stock)
        def prepare(accelerator: Accelerator, *args: Any, **kwargs: Any) -> Any:
            if not here() or _a_trainer_calls():
                return stock(accelerator, *args, **kwargs)
            before(accelerator, args)
            prepared = stock(accelerator, *args, **kwargs)
            after(accelerator, prepared if len(args) > 1 else (prepared,))
            return prepared

        return prepare

    with _wrapped("accelerate.accelerator", "Accelerator", "prepare", wrap) as here:
        yield


@contextlib.contextmanager
def _wrapped(
    module: str, owner: str, name: str, wrap: Callable[[_Method], _Method]
) -> Iterator[Callable[[], bool]]:
    """A method of a class of another library, wrapped from the import of its module on.

    Yields what tells the wrapper whether it is to do anything: somebody may have kept it, or have
    wrapped it once more, when the context is closed; and a forked process has inherited it.
    """
    process: int | None = os.getpid()
    undo = contextlib.ExitStack()

    def put(found: ModuleType) -> None:
        kind = getattr(found, owner)
        stock = vars(kind)[name]
        wrapper = wrap(stock)
        setattr(kind, name, wrapper)

        @undo.callback
        def take_off() -> None:
            if vars(kind).get(name) is wrapper:
                setattr(kind, name, stock)

    with undo:
        undo.callback(when_imported(module, put))
        try:
            yield lambda: os.getpid() == process
        finally:
            process = None


def _a_trainer_calls() -> bool:
    """Whether the code of Trainer is being executed."""
    return any(frame.f_globals.get("__name__") == "transformers.trainer" for frame in callers())


def current_trainer() -> Any:
    """The Trainer whose training loop calls, of which its callbacks are not told; None without."""
    for frame in callers():
        trainer = frame.f_locals.get("self") if frame.f_code.co_name == _LOOP else None
        if trainer is not None and hasattr(trainer, "accelerator"):
            return trainer
    return None
