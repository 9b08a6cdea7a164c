"""Heads that are DTensors: FSDP2 or a parallelisation plan has spread them over a device mesh.

    the head of a plain input               W = gather(W_i)
                                            dW_i = part i of (1 / n) sum over processes of their dW
    the head of an input that is a DTensor  a shard of the classes each: `vocab_parallel`

A plain input is data of its own on every process. The gradient is what FSDP2 makes of it for its
parameters inside forward: the mean over the processes of the mesh, sharded as the parameter is.
Where all processes have the same input the mean changes nothing, so that the gradient is right for
tensor parallelism too, only dearer than it has to be.

Kept for backward: what the loss keeps, and the whole of W where it recomputes. Bytes moved: an
all-gather of (V, H) in forward, a reduce-scatter of it in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.foreign.tensors import is_dtensor
from fastft.loss.options import refuse_second_derivative
from fastft.loss.vocab_parallel import Shard


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Any) -> Tensor:
        ctx.mesh, ctx.placements = parameter.device_mesh, parameter.placements
        return parameter.detach().full_tensor()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        refuse_second_derivative("a gathered DTensor")
        # divided first, so that a sum over many processes stays within fp16
        part = DTensor.from_local(
            gradient / ctx.mesh.size(), ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False
        )
        return part.redistribute(placements=ctx.placements)


def gathered(name: str, parameter: Tensor | None) -> Tensor | None:
    """Returns the whole of a DTensor, differentiable as above; any other tensor as it is.

    All processes of its mesh must call.

    Raises:
        TypeError: it has placements that are neither `Shard` nor `Replicate`.
    """
    if parameter is None or not is_dtensor(parameter):
        return parameter
    placements = parameter.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise TypeError(
            f"{name} is a DTensor with placements {placements}: redistribute it to Shard or "
            f"Replicate"
        )
    return _Gather.apply(parameter)


def _local_of(name: str, tensor: Any, mesh: Any, dim: int | None) -> Tensor:
    """The local part of a DTensor on a mesh of one dimension, which shards `dim`; None: nothing."""
    from torch.distributed.tensor import Replicate, Shard

    needed = Replicate() if dim is None else Shard(dim)
    if not is_dtensor(tensor):
        raise TypeError(
            f"{name} must be a DTensor as input is, with placements ({needed},); or give "
            f"input.to_local()"
        )
    if tensor.device_mesh != mesh or mesh.ndim != 1 or tensor.placements != (needed,):
        raise TypeError(
            f"{name} has placements {tensor.placements} on {tensor.device_mesh}; where input is a "
            f"DTensor, {name} must have placements ({needed},) on a mesh of one dimension, that of "
            f"input: redistribute it"
        )
    return tensor.to_local()


def sharded_head(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Shard]:
    """Returns as plain tensors what this process has of an input, a DTensor that all have whole,
    and of a head that is sharded by classes on the same mesh; and which classes these are.

    No process is asked: the mesh tells, also where the last shard is smaller than the others.

    Raises:
        TypeError: they are placed in another way; says what to do.
        ValueError: there are fewer shards with a class than processes.
    """
    mesh: Any = input.device_mesh  # type: ignore[attr-defined]
    local = (
        _local_of("input", input, mesh, None),
        _local_of("linear_weight", linear_weight, mesh, 0),
        None if linear_bias is None else _local_of("linear_bias", linear_bias, mesh, 0),
    )
    classes, count = len(linear_weight), mesh.size()
    largest = -(-classes // count)  # as torch cuts
    if largest * (count - 1) >= classes:
        raise ValueError(
            f"linear_weight has {classes} classes for {count} processes, so that one has none: "
            f"shard it over fewer, or give input.to_local()"
        )
    return *local, Shard(mesh.get_group(), mesh.get_local_rank() * largest, classes)


def local_head(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Any]:
    """Returns the arguments as plain tensors, and the group which shards their classes, if any; of
    DTensors the `Shard` of this process.

    Without a DTensor among them they come back as they are.

    Raises:
        TypeError: DTensors of which it is not clear what they mean; says what to do.
    """
    if not any(map(is_dtensor, (input, linear_weight, linear_bias, target))):
        return input, linear_weight, linear_bias, target, group
    if group is not None:
        raise TypeError(
            "group goes with plain tensors, not with a DTensor: give the to_local() of each shard"
        )
    if not is_dtensor(input):
        if is_dtensor(target):
            raise TypeError(
                "target is a DTensor, input is not: give target.full_tensor() or target.to_local()"
            )
        weight = gathered("linear_weight", linear_weight)
        assert weight is not None
        return input, weight, gathered("linear_bias", linear_bias), target, None
    mesh: Any = input.device_mesh  # type: ignore[attr-defined]
    if is_dtensor(target):
        target = _local_of("target", target, mesh, None)
    x, weight, bias, shard = sharded_head(input, linear_weight, linear_bias)
    return x, weight, bias, target, shard


def whole_head(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Does as `local_head` for an operation that knows no shards: only a head may be a DTensor.

    Raises:
        TypeError: `input` or `target` is a DTensor.
    """
    if is_dtensor(input):
        raise TypeError(
            "input must not be a DTensor here: give input.to_local(), with a head that is whole or "
            "sharded"
        )
    return local_head(input, linear_weight, linear_bias, target, None)[:4]
