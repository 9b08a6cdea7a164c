"""Sees every operation of a piece of code: how large its results are, and what its products
cost."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastft.loss.linear_rows import HEAD


class Watch(TorchDispatchMode):
    """`elements`: of the largest tensor that any operation made, views aside; `flops`: of all
    matrix products.

    It looks into fastft's own operator of a head, which a dispatch mode would see as one operation.
    """

    def __init__(self):
        super().__init__()
        self.elements = self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is HEAD.native:
            with self:
                return HEAD.reference(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        given = [
            tensor.untyped_storage()._cdata
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
            if _holds_numbers(tensor)
        ]
        for tensor in torch.utils._pytree.tree_leaves(result):
            if _holds_numbers(tensor) and tensor.untyped_storage()._cdata not in given:
                self.elements = max(self.elements, tensor.numel())
        # the registry does not know the product that adds in place
        packet = (
            torch.ops.aten.addmm if func is torch.ops.aten.addmm_.default else func.overloadpacket
        )
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


def _holds_numbers(value) -> bool:
    """A subclass may hold none; a sparse tensor has no storage of its own."""
    plain = type(value) is torch.Tensor and value.layout is torch.strided
    return plain and value.device.type != "meta"
