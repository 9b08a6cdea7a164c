"""Row-wise expressions: what lazy logits are of the logits of their heads.

    z      = f_k(... f_1(logits, logits', operands))      a tree of `Recorded`: casts, softcap, ...
    result = g(z, rows)                                   a sum over rows, or one result per row

Every function works on each row alone, so that a tree is evaluated for some rows as for all. Whose
logits they are, and which operands, is in `sources`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

AutocastState: TypeAlias = tuple[bool, torch.dtype]


class Recorded(NamedTuple):
    """One function that was called; its arguments may be expressions, or lists of them."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    autocast: AutocastState


class Place(NamedTuple):
    """Where something of each row goes into an expression: the logits of a head (..., V), or an
    operand (..., C)."""

    kind: Literal["head", "operand"]
    number: int


Expression: TypeAlias = Recorded | Place
LOGITS = Place("head", 0)


def autocast_state(device_type: str) -> AutocastState:
    """Whether autocast is on, and to which dtype."""
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


def autocasting(device_type: str, state: AutocastState) -> contextlib.AbstractContextManager:
    """Autocast as it was."""
    if state == autocast_state(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=state[1], enabled=state[0], cache_enabled=False)


def evaluate(
    node: Any,
    logits: Sequence[Tensor],
    operands: Sequence[Tensor] = (),
    known: dict[int, Any] | None = None,
) -> Any:
    """The expression `node` with the logits of each head and the operands put in.

    `known`: what was evaluated already, so that nothing is that occurs twice. No closure: one that
    calls itself would keep every chunk's logits until garbage is collected.
    """
    known = {} if known is None else known
    if isinstance(node, Place):
        return (logits if node.kind == "head" else operands)[node.number]
    if type(node) is list:
        return [evaluate(part, logits, operands, known) for part in node]
    if not isinstance(node, Recorded):
        return node
    if id(node) not in known:
        arguments = [evaluate(part, logits, operands, known) for part in node.arguments]
        keywords = {
            name: evaluate(part, logits, operands, known) for name, part in node.keywords.items()
        }
        with autocasting(logits[0].device.type, node.autocast):
            known[id(node)] = node.function(*arguments, **keywords)
    return known[id(node)]


def replaced(
    node: Any, places: Mapping[Place, Expression], known: dict[int, Any] | None = None
) -> Any:
    """The expression `node` with others in its places; what occurs twice stays one."""
    known = {} if known is None else known
    if isinstance(node, Place):
        return places.get(node, node)
    if type(node) is list:
        return [replaced(part, places, known) for part in node]
    if not isinstance(node, Recorded) or all(place == of for place, of in places.items()):
        return node
    if id(node) not in known:
        known[id(node)] = node._replace(
            arguments=tuple(replaced(part, places, known) for part in node.arguments),
            keywords={name: replaced(part, places, known) for name, part in node.keywords.items()},
        )
    return known[id(node)]


def are_alike(one: Any, other: Any) -> bool:
    """Whether two expressions are the same functions of the same."""
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, Recorded):
        return (one.function, one.autocast) == (other.function, other.autocast) and are_alike(
            [*one.arguments, *one.keywords, *one.keywords.values()],
            [*other.arguments, *other.keywords, *other.keywords.values()],
        )
    if type(one) is list:
        return len(one) == len(other) and all(map(are_alike, one, other))
    return not isinstance(one, Tensor) and one == other


def parts_of(node: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Yields an expression and all that it is made of, each once."""
    seen = set() if seen is None else seen
    if id(node) in seen:
        return
    seen.add(id(node))
    yield node
    inner = [*node.arguments, *node.keywords.values()] if isinstance(node, Recorded) else node
    if type(inner) is list:
        for part in inner:
            yield from parts_of(part, seen)


class ScaleAndSoftcap(NamedTuple):
    """`scale * logits`, or `softcap * tanh(scale * logits / softcap)`, with casts to `casts` on the
    way."""

    scale: float
    softcap: float | None
    casts: set[torch.dtype]


def scale_and_softcap(expression: Expression) -> ScaleAndSoftcap | None:
    """What an expression made of positive factors, one tanh and casts comes to; None for any other
    expression."""
    before, after, casts, capped = 1.0, 1.0, set(), False
    while isinstance(expression, Recorded):
        name, arguments = expression.function.__name__, expression.arguments
        numbers = [a for a in arguments if type(a) in (int, float) and 0 < a < math.inf]
        inner = [a for a in arguments if isinstance(a, Recorded | Place)]
        if expression.keywords or len(inner) != 1:
            return None
        if expression.function is Tensor.to:
            casts.add(arguments[1])
        elif name == "tanh" and not capped:
            capped = True
        elif len(numbers) == 1 and (
            name in _PRODUCTS or (name in _QUOTIENTS and arguments[0] is inner[0])
        ):
            factor = numbers[0] if name in _PRODUCTS else 1 / numbers[0]
            before, after = (before * factor, after) if capped else (before, after * factor)
        else:
            return None
        expression = inner[0]
    return ScaleAndSoftcap(before * after, after if capped else None, casts)


_PRODUCTS = ("mul", "multiply", "__mul__", "__rmul__")
_QUOTIENTS = ("div", "divide", "true_divide", "__truediv__")
