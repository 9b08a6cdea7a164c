"""The bytes of each tier: what stays on the device, what lies on the host.

    offload        weights   gradients           states    staging
    None           device    device              device
    "states"       device    device              host      device
    "gradients"    device    host, some a while  host      device
    "overlap"      device    host, some a while  host      device

Only shapes and dtypes are looked at, so that parameters on the meta device are as good as real
ones; of a DTensor this process's part counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from fastft.foreign.tensors import local
from fastft.optim.adamw_state import bytes_of_state

TIERS = (None, "states", "gradients", "overlap")
OF_GRADIENTS = TIERS[2:]  # with these, gradients lie on the host
IN_FLIGHT = 2**28  # bytes of gradients on their way to the host, beside the one just made
BUFFER = 64 * 2**20


class TierBytes(NamedTuple):
    """What a training holds beside activations.

    Attributes:
        weights: on the device, as all up to `staging`.
        gradients: at the end of backward; of a tier that gives them away, those that are still on
            their way then.
        states: moments and what `rounding` keeps.
        staging: the buffers that states, and gradients, of the host stream through.
        host_states, host_gradients: on the host, page-locked where the device copies by itself.
    """

    weights: int
    gradients: int
    states: int
    staging: int
    host_states: int
    host_gradients: int

    @property
    def device(self) -> int:
        """On the device at most."""
        return self.weights + self.gradients + self.states + self.staging

    @property
    def host(self) -> int:
        """On the host."""
        return self.host_states + self.host_gradients


def bytes_of(
    groups: Iterable[dict[str, Any]],
    rounding: str,
    offload: str | None,
    release_gradients: bool = False,
) -> TierBytes:
    """The bytes of parameter groups in a tier.

    Args:
        groups: as of an optimizer: `params`, of any device, `moments` and `amsgrad`.
        rounding: of the optimizer.
        offload: one of `TIERS`.
        release_gradients: whether backward uses gradients up.
    """
    every = [(param, group) for group in groups for param in group["params"]]
    sizes = [local(param).nbytes for param, _ in every]
    states = sum(bytes_of_state(param, group, rounding) for param, group in every)
    whole, largest = sum(sizes), max(sizes, default=0)
    if release_gradients:
        gradients = largest
    elif offload in OF_GRADIENTS:
        gradients = min(whole, largest + IN_FLIGHT)
    else:
        gradients = whole
    return TierBytes(
        weights=whole,
        gradients=gradients,
        states=0 if offload else states,
        staging=2 * BUFFER if offload else 0,
        host_states=states if offload else 0,
        host_gradients=whole if offload in OF_GRADIENTS and not release_gradients else 0,
    )
