"""Checks of arguments at the door, for what rooms of several wings ask alike."""

from __future__ import annotations

import math
import operator
from typing import Any


def integer(
    name: str,
    value: Any,
    what: str = "a positive integer",
    *,
    least: float = 1,
    below: float = math.inf,
) -> int:
    """Turns `value` into a Python integer: one already, or of numpy or torch, but no bool.

    Args:
        name: of the argument.
        value: what came.
        what: what is needed, for the message.
        least: the smallest integer that will do.
        below: the smallest that is too large.

    Raises:
        ValueError: `value` is no such integer.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number < below:
        raise ValueError(f"{name} must be {what}, got {value!r}")
    return number


def optional_integer(name: str, value: Any, **limits: Any) -> int | None:
    """Turns `value` into a Python integer as `integer` does; None stays."""
    return None if value is None else integer(name, value, "a positive integer or None", **limits)
