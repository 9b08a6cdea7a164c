"""Tensors of others: DTensors, FSDP1's flat parameters, what ZeRO-3 has taken away."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def full_shape(tensor: Any) -> torch.Size:
    """The shape of the whole of a tensor that ZeRO-3 may have taken away; that of a DTensor is."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def write_stamp(tensor: Tensor) -> tuple[int, int] | None:
    """What changes when somebody writes to the tensor; None for one of inference mode, of which
    nothing does."""
    return None if tensor.is_inference() else (tensor._version, tensor.data_ptr())


def is_dtensor(tensor: Any) -> bool:
    """Whether it is one; torch's module of them, a second of import time, is not needed to know."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """This rank's part of a DTensor; anything else as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_gradient(gradient: Any, parameter: Any) -> Any:
    """This rank's part of a gradient, as it has one of the parameter.

    Of DTensors the two may lie otherwise: backward leaves partial sums for the weights of a norm
    under sequence parallelism, and a whole gradient for rows that do not divide evenly. All
    processes of the mesh must call.
    """
    placements = getattr(parameter, "placements", None)
    if is_dtensor(gradient) and gradient.placements != placements is not None:
        gradient = gradient.redistribute(placements=placements)
    return local(gradient)


def summed(tensor: Any) -> Any:
    """A DTensor without partial sums; anything else as it is. All processes of its mesh must
    call."""
    if not (is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements)):
        return tensor
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=whole)


def sharded_like(part: Tensor, template: Any) -> Tensor:
    """`part` itself, or where `template` is a DTensor a DTensor of its shape with `part` as this
    rank's, wherever that lies: FSDP2's own offloading has parts on the host, of a mesh of GPUs."""
    if not is_dtensor(template):
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    form = TensorMeta(template.shape, template.stride(), part.dtype)
    spec = DTensorSpec(template.device_mesh, template.placements, tensor_meta=form)
    # `from_local` would move the part to the mesh's kind of device
    return DTensor(part, spec, requires_grad=False)


def placed_like(value: Tensor, template: Any) -> Tensor:
    """A whole tensor cut as the DTensor `template` is; all else as it came."""
    if not is_dtensor(template) or is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, template.device_mesh, template.placements)


def storage_address(tensor: Any) -> int | None:
    """Where the storage of this process's part of a tensor begins; None for a tensor that is made
    of others, or has no memory."""
    part = local(tensor)
    if type(part).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return None
    return part.untyped_storage().data_ptr() or None


def in_flat_parameter(tensor: Any) -> bool:
    """Whether this is, or is this process's part of, a parameter that FSDP1 keeps in one flat
    vector."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def shard_begin(tensor: Any) -> int:
    """Where this process's rows of a DTensor begin in the whole tensor (shards of dimension 0), in
    elements."""
    if not is_dtensor(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return sum(offset * stride for offset, stride in zip(offsets, tensor.stride(), strict=True))
