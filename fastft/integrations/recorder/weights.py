"""Numbers of weights, gradients and moments by which two runs are compared without keeping them.

All of it is of this process's part, where a tensor is sharded, in plain torch, and reads only.
"""

from __future__ import annotations

import functools
import math
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastft.foreign import engines, models, tensors
from fastft.integrations.recorder.batches import digest
from fastft.optim.adamw import AdamW
from fastft.optim.adamw_update import load_value
from fastft.optim.moment_blocks import ENTRIES
from fastft.optim.moment_codes import dequantise, entries_of
from fastft.optim.offload.absent import AbsentGradient
from fastft.optim.weight_bits import residue_of

_WIDTH = 1 << 14  # of a row of signs
_PART = _WIDTH << 8  # elements that are looked at in double precision at a time
_MOMENTS = ("exp_avg", "momentum_buffer")


class Weights:
    """The trainable parameters of a model, and what its optimizer holds for them.

    Args:
        model: in whatever wraps it.
        optimizer: likewise.

    Attributes:
        names: of the parameters, as the unwrapped model calls them.
        kept_apart: whether an engine trains flat copies of the parameters, in its backward pass;
            gradients and moments are its own then.
        held: bytes of the copies that lie on the host now.
    """

    def __init__(self, model: Any, optimizer: Any) -> None:
        self._model = models.unwrapped(model)
        self.names = [n for n, p in self._model.named_parameters() if p.requires_grad]
        self.optimizer = engines.inner_optimizer(optimizer)
        self.kept_apart = engines.of_deepspeed(optimizer)
        self.held = 0
        self._before: list[tuple[Tensor, ...]] = []

    @property
    def params(self) -> list[Any]:
        """The parameters that the model computes with now; the optimizer may hold others."""
        now = dict(self._model.named_parameters())
        return [now[name] for name in self.names]

    def of_groups(self, name: str) -> list[float]:
        """A value of the optimizer's groups for each parameter; NaN where none has it."""
        values = {
            id(param): float(group.get(name, math.nan))
            for group in self.optimizer.param_groups
            for param in group["params"]
        }
        return [values.get(id(param), math.nan) for param in self.params]

    @torch.no_grad()
    def remember(self) -> None:
        """Keeps the weights on the host until `moved`."""
        self._before = [
            tuple(part.to("cpu", copy=True) for part in self._parts(param)) for param in self.params
        ]
        self.held = sum(_size(part) for parts in self._before for part in parts)

    @torch.no_grad()
    def moved(self) -> list[float]:
        """The norm of each weight's change since `remember`, which is forgotten."""
        norms = []
        for param, before in zip(self.params, self._before, strict=True):
            parts = (part.to(_local(param).device) for part in before)
            norms.append(_norm(self._value(param) - _value_of(*parts)))
        self._before, self.held = [], 0
        return _numbers(norms)

    @torch.no_grad()
    def projections(self) -> list[float]:
        """A fixed projection of each weight, with the bits that the optimizer keeps beside it."""
        return _numbers([_projection(self._value(param)) for param in self.params])

    @torch.no_grad()
    def bits(self) -> str:
        """A digest of the weights as the model holds them."""
        sums = [_sum_of_bits(_local(param)) for param in self.params]
        shadows = _numbers([_projection(_local(param)) for param in self.params])
        return digest([repr(_whole(sums)).encode(), repr(shadows).encode()])

    @torch.no_grad()
    def gradients(self) -> list[float]:
        """The norm of each gradient as the next step uses it; NaN without one."""
        if self.kept_apart:
            return []
        factor = self._factor()
        return _numbers(
            [None if param.grad is None else factor * _norm(param.grad) for param in self.params]
        )

    @torch.no_grad()
    def moments(self) -> list[float] | None:
        """The norm of each running average of the gradient; None where the optimizer has none."""
        if self.kept_apart:
            return None
        norms = [_moment(self.optimizer.state.get(param, {})) for param in self.params]
        return None if all(norm is None for norm in norms) else _numbers(norms)

    def _factor(self) -> Tensor | float:
        """What our step is going to multiply the gradients by, in place of a clipping before."""
        if not isinstance(self.optimizer, AdamW):
            return 1.0
        held = (param for group in self.optimizer.param_groups for param in group["params"])
        grads = [param.grad for param in held if param.grad is not None]
        factor = self.optimizer._grad_factor(grads, self.optimizer._clipping)
        return 1.0 if factor is None else factor

    def _value(self, param: Any) -> Tensor:
        """The fp32 value of a weight."""
        return _value_of(*self._parts(param))

    def _parts(self, param: Any) -> tuple[Tensor, ...]:
        """What a weight is kept in: the model's tensor, and what the optimizer keeps beside it."""
        state = {} if self.kept_apart else self.optimizer.state.get(param, {})
        residue = residue_of(state)
        return (_local(param), *(() if residue is None else (tensors.local(residue),)))


def _value_of(weight: Tensor, residue: Tensor | None = None) -> Tensor:
    if residue is not None:
        return load_value(weight, residue)
    return weight if weight.dtype == torch.float64 else weight.float()


def _local(param: Any) -> Tensor:
    # ZeRO-3 leaves an empty tensor where a weight was, and its part under this name
    part: Tensor = tensors.local(getattr(param, "ds_tensor", param).detach())
    return part


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _norm(tensor: Any) -> Tensor:
    """In double precision: torch's own norm of millions of fp32 numbers on a CPU is off by 1e-4."""
    tensor = tensors.local(tensor)
    if isinstance(tensor, AbsentGradient):
        return tensor.sums.sum().sqrt()
    flat = tensor.coalesce().values() if tensor.is_sparse else tensor
    squares = [part.square().sum() for part in _parts(flat)]
    return torch.stack(squares).sum().sqrt()


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in double precision, some at a time."""
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    return (part.to(dtype) for part in tensor.reshape(-1).split(_PART))


def _moment(state: dict[str, Any]) -> Tensor | None:
    name = next((name for name in _MOMENTS if isinstance(state.get(name), Tensor)), None)
    if name is None:
        return None
    if all(entry in state for entry in ENTRIES):
        return _norm(dequantise(*entries_of(state))[0])
    moment = tensors.local(state[name])
    # codes of another library, which has the table for them
    return _norm(moment) if moment.is_floating_point() else None


def _projection(value: Tensor) -> Tensor:
    """The scalar product with random signs, of a norm near that of `value`.

    The signs are the outer product of two rows of signs, which depend on the number of elements
    alone.
    """
    rows: list[Tensor] = []
    for part in _parts(value):
        signs = _signs(_WIDTH, 0, part.device, part.dtype)
        whole = part.numel() // _WIDTH * _WIDTH
        rows.append(part[:whole].view(-1, _WIDTH) @ signs)
        rows.append((part[whole:] @ signs[: part.numel() - whole])[None])
    sums = torch.cat(rows)
    return sums @ _signs(sums.numel(), 1, sums.device, sums.dtype)


@functools.lru_cache(maxsize=64)
def _signs(count: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)  # of its own: the training's is left alone
    return (torch.randint(2, (count,), generator=generator) * 2 - 1).to(device, dtype)


def _sum_of_bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()]).sum(dtype=torch.int64)


def _numbers(values: Iterable[Tensor | None]) -> list[float]:
    """As Python's numbers, with one wait for each device; NaN for None."""
    values = list(values)
    present = [value for value in values if value is not None]
    found = iter(_whole([value.double() for value in present]))
    return [math.nan if value is None else next(found) for value in values]


def _whole(scalars: list[Tensor]) -> list[Any]:
    if len({scalar.device for scalar in scalars}) == 1:
        return list(torch.stack(scalars).tolist())
    return [scalar.item() for scalar in scalars]


def torch_states() -> list[Tensor]:
    """The random states of torch, from which dropout is drawn; no device is waited for."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else ())]


def random_states() -> str:
    """A digest of the random states of Python, NumPy, torch and its CUDA devices."""
    parts = [repr(random.getstate()).encode()]
    parts += [state.numpy().tobytes() for state in torch_states()]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        parts += [name.encode(), keys.tobytes(), repr(rest).encode()]
    return digest(parts)
