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

from torch import Tensor

from fastft.foreign.tensors import local
from fastft.optim.adamw_part import Row, entry_names
from fastft.optim.adamw_state import new_state, rounding_of
from fastft.optim.grad_norm import CHUNK
from fastft.optim.offload import gradients, pieces

TIERS = (None, "states", "gradients", "overlap")
OF_GRADIENTS = TIERS[2:]  # with these, gradients lie on the host
_SUM = 8  # bytes of a part of the norm
_FACTOR = 4  # bytes of what a step multiplies all gradients by


class TierBytes(NamedTuple):
    """What a training holds beside activations.

    Attributes:
        weights: on the device, as all up to `staging`.
        gradients: at most at a time.
        states: moments and what `rounding` keeps.
        staging: what states and gradients of the host stream through, and their parts of the norm.
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
    micro_steps: int = 1,
) -> TierBytes:
    """The bytes of parameter groups in a tier.

    Args:
        groups: as of an optimizer: `params`, of any device, `moments` and `amsgrad`.
        rounding: of the optimizer.
        offload: one of `TIERS`.
        release_gradients: whether backward uses gradients up.
        micro_steps: whose gradients a step adds.
    """
    every = [(param, group) for group in groups for param in group["params"]]
    params = [local(param) for param, _ in every]
    entries = [_entries(param, group, rounding) for param, group in every]
    states = sum(entry.nbytes for of_param in entries for entry in of_param)
    sizes = [param.nbytes for param in params]
    whole, largest = sum(sizes), max(sizes, default=0)
    held, staging = offload in OF_GRADIENTS, 0
    if offload is not None:
        forms = [pieces.form(*both, held) for both in zip(params, entries, strict=True)]
        staging += _FACTOR + sum(pieces.buffers(forms, pieces.cut(forms, pieces.BUFFER)))
    if held or release_gradients:
        staging += sum(_SUM * -(-param.numel() // CHUNK) for param in params)
    if held and micro_steps > 1:
        staging += 2 * gradients.STAGE * max((param.itemsize for param in params), default=0)
    # those that wait for their copy, or one that is larger, and the one that is being made
    in_flight = min(micro_steps * whole, max(gradients.IN_FLIGHT, largest) + largest)
    return TierBytes(
        weights=whole,
        gradients=largest if release_gradients else in_flight if held else whole,
        states=0 if offload else states,
        staging=staging,
        host_states=states if offload else 0,
        host_gradients=whole if held else 0,
    )


def _entries(param: Tensor, group: dict[str, Any], rounding: str) -> list[Tensor]:
    """This process's part of a state, without memory, in the operator's order."""
    state = new_state(param, group, rounding, "meta")
    row = Row(0, rounding_of(param, rounding), group["amsgrad"], 0)
    return [local(state[name]) for name in entry_names(state, row)]
