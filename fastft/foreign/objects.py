"""Any object of others: its classes by name, and attributes that are put on it and given back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


def class_names(thing: object) -> set[str]:
    """The names of all classes that `thing` is an instance of."""
    return {base.__name__ for base in type(thing).__mro__}


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
