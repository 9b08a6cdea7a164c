"""Moments as codes, whichever: `exp_avg` tells by its dtype of how many bits its codes are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.foreign.tensors import is_dtensor, local, sharded_like
from fastft.optim import moments_4bit, moments_8bit
from fastft.optim.moment_blocks import (
    ENTRIES,
    NEAREST,
    SCALES,
    Entries,
    decode_v,
    encode_v,
    scale_shape,
    without_spoilt,
    write_largest,
)

Shape = torch.Size | tuple[int, ...]
Forms = dict[str, tuple[torch.dtype, torch.Size]]


class Code(NamedTuple):
    """A kind of codes.

    Attributes:
        dtype: of `exp_avg`.
        packed: how many codes of neighbours an entry of `exp_avg` has.
        shape: of `exp_avg`, from the parameter's.
        decode_m, encode_m: to fp32 first moments and back.
    """

    dtype: torch.dtype
    packed: int
    shape: Callable[[Shape], Shape]
    decode_m: Callable[[Entries, Tensor], Tensor]
    encode_m: Callable[[Tensor, Tensor, Entries, Tensor | int], None]

    def forms(self, shape: Shape) -> Forms:
        """Dtypes and shapes of the moments' entries of a parameter of this shape."""
        scale = torch.float32, torch.Size(scale_shape(shape))
        return {
            "exp_avg": (self.dtype, torch.Size(self.shape(shape))),
            "exp_avg_sq": (torch.uint8, torch.Size(shape)),
        } | dict.fromkeys(SCALES, scale)


# by what the option `moments` calls them
CODES = {
    "8bit": Code(torch.int8, 1, tuple, moments_8bit.decode_m, moments_8bit.encode_m),
    "4bit": Code(
        torch.uint8, 2, moments_4bit.codes_shape, moments_4bit.decode_m, moments_4bit.encode_m
    ),
}
_BY_DTYPE = {code.dtype: code for code in CODES.values()}


def code_of(exp_avg: Any) -> Code | None:
    """The kind of codes in a state's `exp_avg`; None where they are numbers."""
    return _BY_DTYPE.get(exp_avg.dtype) if isinstance(exp_avg, Tensor) else None


def new_entries(param: Any, moments: str, where: str | None = None) -> dict[str, Tensor]:
    """The moments of a new state: zeros in their `forms`.

    Args:
        where: the kind of device that they are made on, by default the parameter's.

    Raises:
        ValueError: `param` is a DTensor sharded on another dimension than 0, which would cut
            blocks.
    """
    if is_dtensor(param) and any(
        placement.is_shard() and not placement.is_shard(0) for placement in param.placements
    ):
        raise ValueError(
            f'moments="{moments}" needs parameters sharded on dimension 0, got {param.placements}; '
            'set moments="fp32" in the parameter group of this one'
        )

    def zeros(dtype: torch.dtype, shape: torch.Size) -> Tensor:
        if not is_dtensor(param):
            return torch.zeros(shape, dtype=dtype, device=where or param.device)
        from torch.distributed import tensor as distributed

        if where is not None and shape == param.shape:
            layout = torch.contiguous_format
            return torch.zeros_like(param, dtype=dtype, device=where, memory_format=layout)
        mesh, placements = param.device_mesh, param.placements
        made = distributed.zeros(*shape, dtype=dtype, device_mesh=mesh, placements=placements)
        if where is None:
            return made
        return sharded_like(torch.zeros_like(made.to_local(), device=where), made)

    return {name: zeros(*form) for name, form in CODES[moments].forms(param.shape).items()}


def dequantise(
    exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor, exp_avg_sq_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The fp32 moments, of the parameter's shape, of codes and scales."""
    v = decode_v(exp_avg_sq, exp_avg_sq_scale)
    state = exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale
    return _BY_DTYPE[exp_avg.dtype].decode_m(state, v), v


def quantise(
    m: Tensor,
    v: Tensor,
    state: Entries,
    m_bits: Tensor | int = NEAREST,
    v_bits: Tensor | int = NEAREST,
) -> None:
    """Writes fp32 moments into codes and scales.

    Args:
        m, v: of the parameter's shape.
        state: codes and scales, in the order of `dequantise`.
        m_bits, v_bits: random bits, int32 in [0, 65535], of the parameter's shape; by default those
            of nearest.
    """
    if m.numel() == 0:
        return
    spoilt, m, v = without_spoilt(m, v)
    encode_v(v, state[1], state[3], v_bits)
    _BY_DTYPE[state[0].dtype].encode_m(m, spoilt, state, m_bits)


def restore(m: Tensor, v: Tensor, state: Entries) -> None:
    """Writes moments to which codes had been decoded, so that the same are decoded again; others to
    their nearest codes.

    Of 4 bits the largest m / sqrt(v) may come out some last places beside the scale that it was.
    """
    quantise(m, v, state)
    codes, codes_v, scale, scale_v = state
    made, off = scale.view(torch.int32).clone(), torch.zeros_like(scale)
    fitting = torch.full_like(scale, m.numel() == 0, dtype=torch.bool)
    for places in (0, 1, -1, 2, -2):
        if fitting.all():
            break
        tried = (made + places).clamp_(min=0).view(torch.float32)
        decoded = dequantise(codes, codes_v, tried, scale_v)[0]
        write_largest(((decoded != m) & ~(decoded.isnan() & m.isnan())).float(), off)
        found = (off == 0) & ~fitting
        scale.copy_(tried.where(found, scale))
        fitting |= found


def entries_of(state: dict[str, Any]) -> Entries:
    """This process's part of the moments' entries of a state, in the order of `dequantise`."""
    m, v, scale_m, scale_v = (local(state[name]) for name in ENTRIES)
    return m, v, scale_m, scale_v
