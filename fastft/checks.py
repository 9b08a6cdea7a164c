"""Checks of arguments at the door, for what rooms of several wings ask alike."""

from __future__ import annotations

import operator
from typing import Any


def integer(name: str, value: Any, *, least: int = 1, bits: int = 63, otherwise: str = "") -> int:
    """Turns `value` into a Python integer: one already, or of numpy or torch, but no bool.

    Args:
        name: of the argument.
        value: what came.
        least: the smallest integer that will do.
        bits: it must be below 2^bits; 63 are those of int64, which operators take.
        otherwise: what else would do, for the message.

    Raises:
        ValueError: `value` is no such integer.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number < 2**bits:
        raise ValueError(
            f"{name} must be an integer in [{least}, 2^{bits}){otherwise}, got {value!r}"
        )
    return number


def optional_integer(name: str, value: Any, **limits: int) -> int | None:
    """Turns `value` into a Python integer as `integer` does; None stays."""
    return None if value is None else integer(name, value, otherwise=" or None", **limits)


def boolean(name: str, value: Any) -> bool:
    """Returns `value`; raises TypeError where it is no bool: a text that says no counts as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value
