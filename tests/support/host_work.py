"""How many operations of torch a call dispatches: on a GPU each costs the host microseconds, and most a launch.

    dispatched(lambda: model(**batch).loss.backward())      # Counter({"aten.mul.Tensor": 12, ...})

Views are counted too: they launch nothing, but cost the host as much. An operator of fastft's that an engine computes
is one operation; one that is made of others counts as these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fastft import ops


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = ops.OPERATORS.get(func.overloadpacket.__name__) if func.namespace == "fastft" else None
        if operator is not None and not operator.engines:
            with self:
                return operator.reference(*args, **(kwargs or {}))
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def dispatched(call: Callable[[], Any]) -> Counter[str]:
    """The operations that `call()` dispatches, forward and backward, by name."""
    with _Counting() as counting:
        call()
    return counting.counts
