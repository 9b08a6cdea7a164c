"""Tensors without memory: a training runs by shapes alone, on a model of any size.

Whatever holds floating-point numbers, and whatever is computed from it, is a plain tensor on the
CPU whose storage points into one region of addresses that is never written to. An operation on such
tensors runs on the meta device, which says what its results look like. Integers and masks of which
the numbers are known are computed in earnest, so that code which looks at token ids, labels or
padding decides as it will in the training. The classes, devices and strides of all tensors are
those of a real training; only a look at a number finds 1.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fastft.live_memory import LiveMemory, tensors_in
from fastft.loss.head_gemms import imagined_products
from fastft.loss.head_sweep import HeadCall, chunk_rows

_REGION = 1 << 42  # bytes of addresses: more than any one tensor takes
_KNOWN = 1 << 20  # numbers of a tensor of integers that are computed in earnest
_NORESERVE = {"linux": 0x4000, "darwin": 0x40}
_LOOKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)


class UnknownNumbers(RuntimeError):
    """An operation whose result depends on numbers that are not there."""


class Unallocated(LiveMemory):
    """Counts live memory of operations that are not carried out, while it is entered.

    Args:
        classes: as of `LiveMemory`.
        device: "cpu" or "cuda": of which a fused loss takes the size of its workspace, and the
            dtypes of its products.

    Raises:
        OSError: the system has no such region of addresses.
        UnknownNumbers: from an operation whose shape depends on numbers, or that torch's meta
            device does not know.
    """

    def __init__(self, classes: int = 0, device: str = "cpu") -> None:
        super().__init__(classes)
        self.imagined = torch.device(device)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE.get(sys.platform, 0)
        self._region = mmap.mmap(-1, _REGION, flags=flags)
        self._unknown: set[int] = set()  # storages of integers that were never computed

    def _free(self, key: int) -> None:
        self._unknown.discard(key)
        super()._free(key)

    def _is_unknown(self, tensor: Tensor) -> bool:
        inexact = tensor.is_floating_point() or tensor.is_complex()
        return inexact or tensor.untyped_storage()._cdata in self._unknown

    def _run_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with imagined_products(self.imagined.type):
            return super()._run_head(self._of_head(args), kwargs)

    def _of_head(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a head's operator with the chunks of the imagined device."""
        call = HeadCall.of(*args[7:])
        if self.imagined.type == "cpu" or call.chunk_rows:
            return args
        input, weight = args[:2]
        hidden = weight.shape[1] if call.needs[1] else 0
        rows = chunk_rows(len(input), len(weight), call.dtype, self.imagined, hidden)
        return *args[:7], *call._replace(chunk_rows=rows).flat()

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        schema, given = func._schema, list(tensors_in((args, kwargs)))
        if str(kwargs.get("device")) == "meta" or any(tensor.is_meta for tensor in given):
            return func(*args, **kwargs)
        unknown = any(map(self._is_unknown, given))
        if func in _LOOKS and unknown:
            return _one(args[0].dtype)
        if not schema.is_mutable and (_shares(schema) or not _makes_tensors(schema)):
            return func(*args, **kwargs)
        try:
            results = _SHAPES.get(func, func)(*_on_meta(args), **_on_meta(kwargs))
        except (NotImplementedError, RuntimeError, ValueError) as error:
            if not unknown:
                return func(*args, **kwargs)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UnknownNumbers(f"{func} cannot be run by shapes: {reason}") from error
        made = list(tensors_in(results))
        if not unknown and not any(map(_is_inexact_or_large, made)):
            return func(*args, **kwargs)
        return self._handed_back(schema, results, args, kwargs)

    def _handed_back(
        self, schema: Any, results: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the operation returns: arguments that it wrote to, and tensors without memory."""
        written = {}
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                written[frozenset(argument.alias_info.before_set)] = value
                for tensor in tensors_in(value):
                    self._see(tensor)
                    self._unknown.add(tensor.untyped_storage()._cdata)
        several = len(schema.returns) > 1
        returns = zip(schema.returns, results if several else (results,), strict=False)
        values = []
        for returned, value in returns:  # none of an operation that only writes
            alias = returned.alias_info
            is_argument = alias is not None and alias.is_write
            values.append(
                written[frozenset(alias.before_set)] if is_argument else self._unallocated(value)
            )
        return tuple(values) if several else values[0] if values else None

    def _unallocated(self, value: Any) -> Any:
        """Tensors without memory that look like those of `value`, which are on the meta device."""
        if isinstance(value, list | tuple):
            return type(value)(map(self._unallocated, value))
        if not isinstance(value, Tensor):
            return value
        size, stride = value.shape, value.stride()
        count = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if not value.numel():
            return torch.empty_strided(size, stride, dtype=value.dtype)
        if count * value.itemsize > _REGION:
            raise UnknownNumbers(f"a tensor of {count * value.itemsize / 2**40:.0f} TiB")
        result = torch.frombuffer(self._region, dtype=value.dtype, count=count)
        result = result.as_strided(size, stride)
        self._see(result)
        self._unknown.add(result.untyped_storage()._cdata)
        return result


class FlashAttention(TorchFunctionMode):
    """Attention with dropout as on a GPU, whose fused kernels draw it themselves: a CPU's do not,
    and hold all scores instead."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Any = (), bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """What products of groups look like: torch's meta device takes bf16 alone, a CPU fp32 too."""
    shape = a.shape[-2], b.shape[-1]
    if a.dim() == b.dim():
        groups = len(offs) if a.dim() == 2 else len(a)
        return a.new_empty(groups, *shape, dtype=out_dtype or a.dtype)
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


_SHAPES = {torch.ops.aten._grouped_mm.default: _grouped_mm}


def _one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _shares(schema: Any) -> bool:
    """Whether the results are views, which need no numbers."""
    return any(returned.alias_info is not None for returned in schema.returns)


def _makes_tensors(schema: Any) -> bool:
    return any("Tensor" in str(returned.type) for returned in schema.returns)


def _is_inexact_or_large(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.numel() > _KNOWN


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, list | tuple):
        return type(value)(map(_on_meta, value))
    if isinstance(value, dict):
        return {
            key: _on_meta(part)
            for key, part in value.items()
            if key not in ("generator", "pin_memory")
        }
    return value
