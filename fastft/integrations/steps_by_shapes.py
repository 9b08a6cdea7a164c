"""AdamW's steps by shapes alone: the states that they make, the gradients that they give away.

The kernels of a step need no memory, and take addresses, which are not there. What remains of a
step are its tensors: states, on the device or on the host, gradients that leave the device while
backward goes on, and the buffers that all of them stream through.
"""

from __future__ import annotations

import types
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastft.live_memory import HOST, LiveMemory
from fastft.optim.adamw import AdamW
from fastft.optim.adamw_state import ready_state
from fastft.optim.offload import gradients, tiers


def run_by_shapes(
    optimizer: AdamW,
    counter: LiveMemory,
    offload: str | None,
    release_gradients: bool,
    micro_steps: int,
) -> None:
    """Lets an AdamW that keeps all on the device hold what it would hold in a tier.

    Args:
        optimizer: its `step` is replaced.
        counter: is told what is on the host.
        offload, release_gradients: of the AdamW that is asked about.
        micro_steps: of a step.
    """
    groups, rounding = optimizer.param_groups, optimizer.rounding
    staging = tiers.bytes_of(groups, rounding, offload, micro_steps=micro_steps).staging
    steps = _Steps(optimizer, counter, offload, release_gradients, staging)
    optimizer.step = types.MethodType(steps.step, optimizer)  # type: ignore[method-assign]


class _Steps:
    def __init__(
        self,
        optimizer: AdamW,
        counter: LiveMemory,
        offload: str | None,
        release_gradients: bool,
        staging: int,
    ) -> None:
        self._counter, self._offload, self._releases = counter, offload, release_gradients
        groups = optimizer.param_groups
        self._groups = {param: group for group in groups for param in group["params"]}
        self._staging_size = staging
        self._staging: Tensor | None = None
        self._of_host: dict[Tensor, Tensor] = {}  # gradients
        self._in_flight = deque[Tensor]()
        if release_gradients or offload in tiers.OF_GRADIENTS:
            for param in self._groups:
                param.register_post_accumulate_grad_hook(partial(self._take, optimizer))

    def _take(self, optimizer: AdamW, param: Tensor) -> None:
        """A gradient is there: it is used up, or goes to the host."""
        gradient, param.grad = param.grad, None
        assert gradient is not None
        self._counter.tag("gradients", [gradient])
        if self._releases:
            self._make_state(optimizer, param)
            return
        self._in_flight.append(gradient)
        flying = self._in_flight
        while len(flying) > 1 and sum(one.nbytes for one in flying) > gradients.IN_FLIGHT:
            flying.popleft()
        if param not in self._of_host:
            self._of_host[param] = torch.empty_like(gradient)
            self._counter.tag(HOST, [self._of_host[param]])

    def _make_state(self, optimizer: AdamW, param: Tensor) -> None:
        entries = ready_state(
            optimizer.state, param, self._groups[param], optimizer.rounding, False
        )
        if self._offload is not None:
            self._counter.tag(HOST, (e for e in entries.values() if isinstance(e, Tensor)))

    def step(self, optimizer: AdamW, closure: Any = None) -> None:
        """Makes the states that the first step makes."""
        self._in_flight.clear()
        optimizer._clipping = None
        for param in self._groups:
            if param.grad is not None or param in self._of_host:
                self._make_state(optimizer, param)
        if self._staging_size and self._staging is None:  # they stay
            self._staging = torch.empty(self._staging_size, dtype=torch.uint8)
            self._counter.tag("optimizer", [self._staging])
