"""CPU tensors that behave as a GPU's where torch differs, so that what a GPU would do wrong shows
without one.

    with DeviceMode() as mode:
        loss = fastft.linear_cross_entropy(x, head, y)      # x.device is cuda:0, says torch
        loss.backward()
    assert mode.waits == []

Inside, tensors are a device's: those that were made outside, those made with `device=mode.device`,
and what operations make of them. Those made without a `device` are the host's, as they are in a
script, and so are those given to `mode.host(tensor)`. The numbers stay in the CPU's memory; what
differs is this.

* `tensor.device`, `is_cuda` and `is_cpu` say "cuda": the branches of the code that no CPU takes are
  taken.
* In a pointwise operation a device's floating-point tensor without dimensions is rounded to the
  dtype of the tensors that have some. torch's CUDA kernels do so; only the host's scalars, and
  Python's numbers, are read in fp32 there.
* What a host waits for is written down in `waits`: copies from the host to the device (but from
  pinned memory, with `non_blocking`), copies back, `item`, `tolist`, `bool`, `nonzero`, boolean
  indexing, ...
* Operands of host and device together raise, as they do in torch; but not a host's scalar in a
  pointwise operation.
* `mm` and `addmm` know `out_dtype`. `autocast` works.

fastft's operators that are made of others are looked into; engines that are one kernel are run as
they are (the reference in place of one that only a GPU has). Inside Python functions of torch
itself the device is the CPU, but roundings and waits are seen.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastft import ops

DEVICE = torch.device("cuda", 0)
_HERE = Path(__file__).resolve()
_TESTS = _HERE.parents[1]
_aten = torch.ops.aten

# the operations whose result has a size, or a place, that only the numbers tell
_LOOKS_AT_NUMBERS = {
    _aten._local_scalar_dense,
    _aten.is_nonzero,
    _aten.equal,
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.bincount,
}
_READS = {torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy"}
_MAKES = {  # without an argument `device`, of the host
    getattr(torch, name)
    for name in (
        "tensor as_tensor asarray scalar_tensor empty zeros ones full arange linspace rand randn "
        "randint "
        "randperm eye empty_strided"
    ).split()
}
_TAKES_DATA = {torch.tensor, torch.as_tensor, torch.asarray}
_MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}
_PRODUCTS = {_aten.mm.dtype, _aten.mm.dtype_out, _aten.addmm.dtype, _aten.addmm.dtype_out}


class Wait(NamedTuple):
    """A place where the host waits for the device, and the function of transformers' masks, called
    there, that makes it wait."""

    what: str
    where: str
    in_mask: str = ""

    def __repr__(self) -> str:
        return f"{self.what} at {self.where}"


class DeviceMode:
    """The mode, to be entered once. `waits` and `operations` are what it has seen: the places, and
    how often each ran.

    `dispatched` has every operation of torch and of fastft's engines, and whether it was on tensors
    of the host alone.

    Args:
        refuse: raise AssertionError at the first wait, where it happens.
        out_dtype: which products take `out_dtype`; `addmm` means, to a sum that has it already.
    """

    device = DEVICE

    def __init__(self, refuse: bool = False, out_dtype: tuple[str, ...] = ("mm", "addmm")) -> None:
        self.refuse, self.out_dtype = refuse, out_dtype
        self.operations: Counter[str] = Counter()
        self.waits: list[Wait] = []
        self.dispatched: Counter[Any] = Counter()
        self._storages: dict[int, Any] = {}  # of the host; kept, so that no other gets its number
        self._pinned: set[int] = set()
        self._functions, self._dispatch = _Functions(self), _Dispatch(self)

    def __enter__(self) -> DeviceMode:
        self._entered = contextlib.ExitStack()
        self._entered.enter_context(self._dispatch)
        self._entered.enter_context(self._functions)
        self._entered.enter_context(_past_torch(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()

    def host(self, tensor: Tensor) -> Tensor:
        """`tensor`, which is the host's from now on."""
        storage = _storage(tensor)
        if storage is not None:
            self._storages[storage._cdata] = storage
        return tensor

    def is_host(self, tensor: Tensor) -> bool:
        """Whether a tensor is the host's."""
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._storages

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is the host's, and pinned."""
        return self.is_host(tensor) and _storage(tensor)._cdata in self._pinned

    @contextlib.contextmanager
    def functions(self) -> Iterator[None]:
        """Inside, Python sees the device, also where torch calls back (a layer that is run again in
        backward)."""
        seen = self._functions in _get_current_function_mode_stack()
        with contextlib.nullcontext() if seen else self._functions:
            yield

    @contextlib.contextmanager
    def autocast(self, dtype: torch.dtype) -> Iterator[None]:
        """`torch.autocast("cuda", dtype)`, which torch switches off where there is no GPU."""
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])

    def waited(self, what: str) -> None:
        """Writes a wait down."""
        wait = Wait(what, *_place())
        self.waits.append(wait)
        if self.refuse:
            raise AssertionError(f"the host waits for the device: {wait}")


@contextlib.contextmanager
def _past_torch(mode: DeviceMode) -> Iterator[None]:
    """What such modes do not see: what backward calls, tensors of subclasses, and those of given
    memory."""
    apply, make, walk = (
        BackwardCFunction.apply,
        Tensor._make_wrapper_subclass,
        torch.autograd._engine_run_backward,
    )

    def apply_inside(self: Any, *args: Any) -> Any:
        with mode.functions():
            return apply(self, *args)

    def walk_inside(*args: Any, **kwargs: Any) -> Any:
        with mode.functions():
            return walk(*args, **kwargs)

    def make_on_cpu(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **{key: _on_cpu(value) for key, value in kwargs.items()})

    def of_host(maker: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return mode.host(maker(*args, **kwargs))

    makers = {name: getattr(torch, name) for name in ("frombuffer", "from_numpy")}
    BackwardCFunction.apply, Tensor._make_wrapper_subclass = apply_inside, staticmethod(make_on_cpu)
    for name, maker in makers.items():
        setattr(torch, name, functools.partial(of_host, maker))
    torch.autograd._engine_run_backward = walk_inside
    try:
        yield
    finally:
        for name, maker in makers.items():
            setattr(torch, name, maker)
        BackwardCFunction.apply, torch.autograd._engine_run_backward = apply, walk
        del Tensor._make_wrapper_subclass  # which is that of its base class


def _storage(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        plain = type(tensor) in (Tensor, torch.nn.Parameter)
        return tensor.untyped_storage() if plain else None


def _place() -> tuple[str, str]:
    """The innermost line of fastft's, or else of a test's, that is running; the innermost function
    of transformers' masks inside it, or nothing."""
    frame, best, mask = sys._getframe(1), "?", ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        line = f"{path.name}:{frame.f_lineno}"
        if path.parts[-2:] == ("transformers", "masking_utils.py"):
            mask = mask or frame.f_code.co_name
        if "fastft" in path.parts and _TESTS not in path.parents:
            return line, mask
        if best == "?" and _TESTS in path.parents and path != _HERE:
            best = line
        frame = frame.f_back
    return best, mask


def _is_device(value: Any) -> bool:
    if isinstance(value, str):
        return value.partition(":")[0] == DEVICE.type
    return isinstance(value, torch.device) and value.type == DEVICE.type


def _on_cpu(value: Any) -> Any:
    """An argument for the CPU, which a tensor's `device` said is a GPU."""
    return torch.device("cpu") if isinstance(value, torch.device) and _is_device(value) else value


class _Functions(TorchFunctionMode):
    """What Python asks of tensors, before autograd."""

    def __init__(self, mode: DeviceMode) -> None:
        super().__init__()
        self.mode = mode
        answers: dict[Any, Callable[[Tensor], Any]] = {
            Tensor.device.__get__: lambda t: t.device if mode.is_host(t) else DEVICE,
            Tensor.is_cuda.__get__: lambda t: not mode.is_host(t),
            Tensor.is_cpu.__get__: lambda t: mode.is_host(t),
            Tensor.get_device: lambda t: -1 if mode.is_host(t) else DEVICE.index,
            Tensor.pin_memory: self._pinned,
            Tensor.is_pinned: mode.is_pinned,
        }
        self.answers = answers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kinds = [kind for kind in types if kind not in (Tensor, torch.nn.Parameter)]
        if kinds and torch._C._is_torch_function_enabled():
            with self:
                return kinds[0].__torch_function__(func, types, args, kwargs)
        if func in self.answers:
            return self.answers[func](args[0])
        if func in _MOVES:
            return self._move(func, *args, **kwargs)
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        device = kwargs.get("device")
        if _is_device(device):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if func in _READS and not self.mode.is_host(args[0]):
            self.mode.waited(_READS[func])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and not self.mode.is_host(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                self.mode.waited("a list as an index")
        if func in _TAKES_DATA and _is_device(device):
            return self._from_data(func, args, kwargs)
        result = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        if func in _MAKES and not _is_device(device) and isinstance(result, Tensor):
            given = args[0] if args else kwargs.get("data")
            if not isinstance(given, Tensor):
                self.mode.host(result)
        return result

    def _from_data(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        data = args[0] if args else kwargs["data"]
        if not isinstance(data, Tensor) or self.mode.is_host(data):
            self.mode.waited(f"torch.{func.__name__} on the device")
            return func(*args, **kwargs).clone()
        return func(*args, **kwargs)

    def _move(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`to`, `cuda` and `cpu`."""
        mode = self.mode
        other = next((value for value in args if isinstance(value, Tensor)), None)
        if func is Tensor.cuda:
            target: Any = DEVICE
        elif func is Tensor.cpu:
            target = torch.device("cpu")
        elif other is not None:
            target = torch.device("cpu") if mode.is_host(other) else DEVICE
        else:
            first = args[0] if args and isinstance(args[0], torch.device | str) else None
            target = kwargs.get("device", first)
        from_host, to_host = mode.is_host(tensor), target is not None and not _is_device(target)
        given = [
            torch.device("cpu") if isinstance(a, torch.device | str) and _is_device(a) else a
            for a in args
        ]
        named = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
        result = tensor.to(*given, **named) if func is Tensor.to else tensor
        if target is None or from_host == to_host:
            return mode.host(result) if from_host else result
        asynchronous = kwargs.get("non_blocking") or (func is Tensor.to and True in args[1:2])
        if to_host or not (asynchronous and mode.is_pinned(tensor)):
            mode.waited("a copy to the host" if to_host else "a copy to the device")
        result = result.clone() if result is tensor else result
        if to_host:
            return mode.host(result)
        mode._storages.pop(_storage(result)._cdata, None)
        return result

    def _pinned(self, tensor: Tensor) -> Tensor:
        assert self.mode.is_host(tensor), "only memory of the host can be pinned"
        result = self.mode.host(tensor.clone())
        self.mode._pinned.add(_storage(result)._cdata)
        return result


class _Dispatch(TorchDispatchMode):
    """What operations do, those of autograd too."""

    def __init__(self, mode: DeviceMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastft":
            return self._of_fastft(func, args, kwargs)
        with torch._C.DisableTorchFunction():
            tensors = [
                leaf
                for leaf in tree_leaves((args, kwargs))
                if type(leaf) in (Tensor, torch.nn.Parameter)
            ]
            of_host = [tensor for tensor in tensors if self.mode.is_host(tensor)]
            self.mode.dispatched[func, bool(tensors) and len(of_host) == len(tensors)] += 1
            self._note_waits(func, args, kwargs, tensors, of_host)
            self._refuse_mixtures(func, args, tensors, of_host)
            if torch.Tag.pointwise in func.tags:
                args, kwargs = self._with_rounded_scalars(args, kwargs)
            if len(of_host) < len(tensors):
                self.mode.operations[func.overloadpacket.__name__] += 1
            run = functools.partial(_product, self.mode.out_dtype) if func in _PRODUCTS else func
            result = run(*args, **kwargs)
            if tensors and len(of_host) == len(tensors):
                tree_map(
                    lambda leaf: self.mode.host(leaf) if isinstance(leaf, Tensor) else leaf, result
                )
            return result

    def _of_fastft(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Looks into an operator that has no engine, or none that runs here: into its reference."""
        operator = ops.OPERATORS.get(func.overloadpacket.__name__.removesuffix("_triton"))
        # None: a part of an engine
        if operator is None or (operator.engines and func is operator.native):
            self.mode.dispatched[func, False] += 1
            return func(*args, **kwargs)
        with self, self.mode.functions():
            return operator.reference(*args, **kwargs)

    def _note_waits(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], of_host: list[Tensor]
    ) -> None:
        packet = func.overloadpacket
        if packet in (_aten.copy_, _aten._copy_from) and len(of_host) == 1 and len(tensors) == 2:
            asynchronous = (
                kwargs.get("non_blocking") or True in args[2:3]
            ) and self.mode.is_pinned(of_host[0])
            if not asynchronous:
                self.mode.waited("copy_ between host and device")
        if len(of_host) == len(tensors):
            return
        if packet in _LOOKS_AT_NUMBERS:
            self.mode.waited(packet.__name__.strip("_"))
        elif func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.mode.waited("repeat_interleave without output_size")
        elif packet in (_aten.index, _aten.index_put_, _aten.index_put, _aten._index_put_impl_):
            index = [part for part in args[1] if part is not None]
            masks = any(part.dtype in (torch.bool, torch.uint8) for part in index)
            # a masked_fill
            filled = packet is not _aten.index and len(index) == 1 and args[2].numel() == 1
            if masks and not filled:
                self.mode.waited("a mask as an index")
            if any(self.mode.is_host(part) for part in index):
                self.mode.waited("an index of the host's")

    def _refuse_mixtures(
        self, func: Any, args: Any, tensors: list[Tensor], of_host: list[Tensor]
    ) -> None:
        packet = func.overloadpacket
        indexing = packet in (
            _aten.index,
            _aten.index_put_,
            _aten.index_put,
            _aten._index_put_impl_,
        )
        wide = [tensor for tensor in of_host if tensor.dim()]
        if (
            wide
            and len(of_host) < len(tensors)
            and not indexing
            and packet not in (_aten.copy_, _aten._copy_from)
        ):
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu"
            )

    def _with_rounded_scalars(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        inputs = args, {key: value for key, value in kwargs.items() if key != "out"}
        leaves = [
            leaf
            for leaf in tree_leaves(inputs)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        dtypes = [tensor.dtype for tensor in leaves if tensor.dim()]
        if not dtypes:
            return args, kwargs
        common = functools.reduce(torch.promote_types, dtypes)

        def rounded(leaf: Any) -> Any:
            scalar = isinstance(leaf, Tensor) and leaf.dim() == 0 and leaf.is_floating_point()
            return (
                leaf.to(common).to(leaf.dtype) if scalar and not self.mode.is_host(leaf) else leaf
            )

        args, named = tree_map(rounded, inputs)
        return args, {**kwargs, **named}


def _product(
    known: tuple[str, ...], *args: Any, out: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """`mm` and `addmm` with an `out_dtype`, which have no kernel on a CPU; refused in torch's words
    if not `known`."""
    *operands, out_dtype = args
    added, factors = operands[:-2], operands[-2:]
    if not added and "mm" not in known:
        raise NotImplementedError(
            "Could not run 'aten::mm.dtype_out' with arguments from the 'CUDA' backend"
        )
    if added and "addmm" not in known:
        raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
    narrow = {factor.dtype for factor in factors}
    assert out_dtype == torch.float32 and narrow < {torch.bfloat16, torch.float16}, (
        "out_dtype is for 16-bit products"
    )
    assert out is None or out.dtype == out_dtype, "out must have out_dtype"
    left, right = (factor.to(out_dtype) for factor in factors)
    wide = left @ right
    if added:
        wide = torch.add(wide * kwargs.get("alpha", 1), added[0], alpha=kwargs.get("beta", 1))
    return wide if out is None else out.copy_(wide)
