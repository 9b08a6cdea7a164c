"""Runs Triton kernels on CPU tensors, with checks and counts that a GPU does not give.

    with interpreted(order=7) as launches:
        wrapper(...)  # any Python that launches Triton kernels, with CPU tensors
    launches[0].bytes_read

Triton's own interpreter is corrected where its results differ from a GPU's in what our kernels use: bf16 is rounded to
nearest even and not cut off, Python floats arrive as fp32 and not as fp64, an fma rounds once, NaN goes through max
and min only where they say so. Every access must lie in a tensor argument or in `memory`, and no program may touch
what another one has written, or write what another one has touched. Not shown: a missing barrier inside one program,
and the GPU's approximations of exp2 and division. Nothing stays changed afterwards, so that the same process can
compile the kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
import triton.compiler.code_generator
import triton.experimental.gluon.language  # builtins are replaced, they would keep the replacements
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


class MemoryFault(AssertionError):
    """An access out of bounds, or a race between two programs."""


@dataclass
class Launch:
    """One launch: its grid and what its programs asked of memory, masks applied."""

    grid: tuple[int, ...]
    order: int | None = None
    bytes_read: int = 0
    bytes_written: int = 0
    program: int = 0
    permutation: Any = None
    tensors: list[_Extent] = field(default_factory=list)

    def touch(self, kind: str, pointers: Any, mask: Any, size: int) -> None:
        """Counts, and checks against the tensors and the other programs."""
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        if kind == "load":
            self.bytes_read += addresses.size * size
        else:
            self.bytes_written += addresses.size * size
        left = addresses
        for tensor in self.tensors:
            inside = (left >= tensor.begin) & (left + size <= tensor.end)
            if inside.any():
                tensor.touch(kind, (left[inside] - tensor.begin) // size, self.program)
                left = left[~inside]
        if left.size:
            raise MemoryFault(f"program {self.program}: {kind} of {left.size} elements outside of every argument")


class _Extent:
    """The memory of one tensor argument and, an element each, which program read and which wrote it: its number + 1."""

    def __init__(self, tensor: torch.Tensor) -> None:
        elements = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        self.begin, self.end = tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
        # zeros, because pages of those that nobody touches cost no memory
        self.readers, self.writers = np.zeros(elements, np.int32), np.zeros(elements, np.int32)

    def touch(self, kind: str, elements: Any, program: int) -> None:
        free, mine, many = 0, program + 1, -1
        if not np.isin(self.writers[elements], (free, mine)).all():
            raise MemoryFault(f"race: program {program} has a {kind} of what another program wrote")
        if kind == "load":
            self.readers[elements] = np.where(np.isin(self.readers[elements], (free, mine)), mine, many)
            return
        if not np.isin(self.readers[elements], (free, mine)).all():
            raise MemoryFault(f"race: program {program} writes what another program read")
        if np.unique(elements).size != elements.size:
            raise MemoryFault(f"race: program {program} writes an element twice in one store")
        self.writers[elements] = mine


def _extents(tensors: list[torch.Tensor]) -> list[_Extent]:
    """One for each piece of memory: of arguments that alias, the longest."""
    longest: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        known = longest.get(tensor.data_ptr())
        if tensor.numel() and (known is None or known.numel() < tensor.numel()):
            longest[tensor.data_ptr()] = tensor
    return [_Extent(tensor) for tensor in longest.values()]


_current: Launch | None = None


def _to_float(handle: Any) -> Any:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _cast(self: Any, handle: Any, dtype: Any) -> Any:
    if tl.bfloat16 not in (handle.dtype.scalar, dtype.scalar):
        return _STOCK["cast_impl"](self, handle, dtype)
    values = _to_float(handle).astype(np.float32)
    if dtype.scalar != tl.bfloat16:
        return Handle(values.astype(interpreter._get_np_dtype(dtype)), dtype.scalar)
    rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()
    return Handle(rounded.reshape(values.shape), tl.bfloat16)


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    return Handle((x.data.astype(np.float64) * y.data + z.data).astype(x.data.dtype), x.dtype.scalar)


def _set_grid_index(self: Any, x: int, y: int, z: int) -> None:
    assert _current is not None and (y, z) == (0, 0), "grids of one dimension"
    if _current.permutation is None:
        numbers = np.arange(_current.grid[0])
        shuffled = numbers if _current.order is None else np.random.default_rng(_current.order).permutation(numbers)
        _current.permutation = shuffled
    _current.program = int(_current.permutation[x])
    _STOCK["set_grid_idx"](self, _current.program, y, z)


def _masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
    assert _current is not None
    _current.touch("load", pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
    return _STOCK["create_masked_load"](self, pointers, mask, *rest, **named)


def _masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
    assert _current is not None
    _current.touch("store", pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
    return _STOCK["create_masked_store"](self, pointers, value, mask, *rest, **named)


_CORRECTED: dict[str, Callable[..., Any]] = {
    "cast_impl": _cast,
    "create_fp_to_fp": lambda self, handle, dtype, mode=None: _cast(self, handle, dtype),
    "create_fma": _fma,
    "create_maxnumf": lambda self, x, y: self.binary_op(x, y, np.fmax),
    "create_minnumf": lambda self, x, y: self.binary_op(x, y, np.fmin),
    "set_grid_idx": _set_grid_index,
    "create_masked_load": _masked_load,
    "create_masked_store": _masked_store,
}
_STOCK = {name: getattr(Builder, name) for name in _CORRECTED}


class _Language:  # stands for a function whose module sees tl and tl.core: patched once, whatever a kernel's names are
    __globals__ = {"tl": tl, "core": tl.core}  # noqa: RUF012


def _argument(value: Any, stock: Callable[[Any], Any] = interpreter._implicit_cvt) -> Any:
    if isinstance(value, float):
        return tl.tensor(Handle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    return stock(value)


def _call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    return _rewritten(self.fn)(*args, **kwargs)


_functions: dict[Any, Any] = {}


def _rewritten(function: Any) -> Any:
    if function not in _functions:
        _functions[function] = interpreter.FunctionRewriter(function).rewrite_ast()
    return _functions[function]


@contextlib.contextmanager
def _patched(kernel: JITFunction) -> Iterator[None]:
    """Triton's language means numpy in here."""
    stock_patch, undo = interpreter._patch_lang, contextlib.ExitStack()

    def replace(owner: Any, name: str, value: Any) -> None:
        undo.callback(setattr, owner, name, owner.__dict__[name])
        setattr(owner, name, value)

    def patch_language(function: Any) -> Any:
        scope = stock_patch(_Language)
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.squeeze()))
        return scope

    names = kernel.fn.__globals__
    for name, value in vars(interpreter).items():  # rewritten code looks for these in the kernel's module
        if name not in names:
            names[name] = value
            undo.callback(names.pop, name)
    for name, value in _CORRECTED.items():
        replace(Builder, name, value)
    replace(JITFunction, "__call__", _call)
    replace(interpreter, "_implicit_cvt", _argument)
    replace(interpreter, "_patch_lang", patch_language)
    undo.enter_context(triton.knobs.compilation.scope())
    triton.knobs.compilation.front_end_debugging = True  # exceptions come out as they are
    with undo, np.errstate(all="ignore"):
        yield


@contextlib.contextmanager
def interpreted(order: int | None = None, memory: Sequence[torch.Tensor] = ()) -> Iterator[list[Launch]]:
    """Interprets every launch in the block and yields their list; `order` shuffles the programs of each.

    `memory`: tensors that kernels may touch beside their arguments, because they find their addresses in a table.
    """
    launches: list[Launch] = []
    stock_run = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        global _current
        tensors = [value for value in (*args, *kwargs.values(), *memory) if isinstance(value, torch.Tensor)]
        _current = Launch(grid, order, tensors=_extents(tensors))
        launches.append(_current)
        try:
            with _patched(self):
                interpreter.GridExecutor(_rewritten(self.fn), self.arg_names, grid)(*args, **kwargs)
        finally:
            _current = None

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = stock_run
