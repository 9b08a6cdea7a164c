"""The CUDA library's own launchers on a machine without a GPU: their launches run as PTX on CPU
tensors.

Object files of csrc/cuda (host code as in the library, the PTX of each kernel beside them) are
linked with fake_runtime.cpp. Every tensor is memory of device 0, but for the arguments that live on
the host and for what `Gpu.place` puts elsewhere. FASTFT_HOST_FLAGS has more flags for the host's
code: sanitizers.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastft
from support.ptx.checks import Extent, Fault, GlobalMemory
from support.ptx.compiled import ROOT, compiled
from support.ptx.executor import Options, run_launch
from support.ptx.lanes import Launch
from support.ptx.parser import Kernel, Module

fastft._import_rooms()  # they define the operators
HOST = -1
OPERATORS = (
    "adamw_",
    "adamw_bind",
    "adamw_bound_",
    "grad_norm_squared_",
    "grad_square_sums_",
    "grad_norm_total_",
    "cross_entropy_rows",
    "packed_boundaries",
    "scale_gradients_",
)
CAPABILITIES = (80, 90)
# bytes of a block (opt-in), of a processor
_SHARED = {80: (166_912, 167_936), 90: (232_448, 233_472)}
_NAMESPACE = "fastft_ptx"
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *(
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_uint * 6),
        ctypes.c_size_t,
        ctypes.c_uint64,
        ctypes.c_int,
    ),
    ctypes.POINTER(ctypes.c_void_p),
)
_MEMORY = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int)


def missing() -> str | None:
    """Why the CUDA kernels cannot be run as PTX here; None if they can."""
    absent = [tool for tool in ("g++", "cc", "c++filt") if shutil.which(tool) is None]
    absent += [] if _nvcc() else ["nvcc"]
    return f"no {', '.join(absent)}" if absent else None


@functools.cache
def _nvcc() -> str | None:
    """Where setup.py would find it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.path.join(home, "bin")] if home else [None, "/usr/local/cuda/bin"]
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def build(sources: Sequence[Path]) -> tuple[Path, list[Path]]:
    """Compiles .cu files, with the flags of setup.py, to a library with the fake runtime.

    A process builds once, whatever becomes of the files meanwhile.

    Returns:
        The library, and the folders with the PTX of each file.
    """
    return _build(tuple(sources))


@functools.cache
def _build(sources: tuple[Path, ...]) -> tuple[Path, list[Path]]:
    include, runtime = ROOT / "csrc" / "include", Path(__file__).with_name("fake_runtime.cpp")
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        f"-I{include}",
        f"-I{_cuda_include()}",
        *_host_flags(),
    ]
    folders = [_objects(source) for source in sources]
    objects = [
        str(folder / f"{source.stem}.o") for folder, source in zip(folders, sources, strict=True)
    ]
    link = ["g++", *flags, "-shared", "-Wl,-Bsymbolic", str(runtime), *objects, "-Wl,-z,defs"]
    torch_libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
    command = [*link, torch_libraries, "-ltorch_cpu", "-ldl", "-o", "libfake.so"]
    folder = compiled(
        f"linked-{sources[0].stem}", [runtime, *_headers(), *map(Path, objects)], [command]
    )
    return folder / "libfake.so", folders


def _objects(source: Path) -> Path:
    """The folder with the object file of a .cu file and its PTX for each capability."""
    targets = [f"-gencode=arch=compute_{chip},code=compute_{chip}" for chip in CAPABILITIES]
    includes = [f"-I{ROOT / 'csrc' / folder}" for folder in ("include", "cuda")]
    nvcc = [str(_nvcc()), *_nvcc_flags(), "-lineinfo", *targets, "--keep", *includes]
    nvcc += [f"-Xcompiler={flag}" for flag in _host_flags()]
    commands = [
        [*nvcc, "-c", str(source), "-o", f"{source.stem}.o"],
        ["find", ".", "-name", "*.ii", "-delete"],
    ]
    return compiled(source.stem, [source, *_headers()], commands)


def _host_flags() -> list[str]:
    return shlex.split(os.environ.get("FASTFT_HOST_FLAGS", ""))


def _headers() -> list[Path]:
    folders = (ROOT / "csrc" / folder for folder in ("include", "cuda"))
    return sorted(path for folder in folders for path in folder.glob("*.*h"))  # .h and .cuh


def _nvcc_flags() -> list[str]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "NVCCFLAGS":
            return list(eval(ast.unparse(statement.value)))
    raise LookupError("setup.py has no NVCCFLAGS")


def _cuda_include() -> str:
    """The folder of cuda_runtime.h."""
    dry = [str(_nvcc()), "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"]
    printed = subprocess.run(dry, capture_output=True, text=True).stderr
    folders = re.findall(r'"?-I([^\s"]+)"?', printed)
    return next(folder for folder in folders if (Path(folder) / "cuda_runtime.h").exists())


@functools.cache
def module_of(folder: Path, capability: int) -> Module:
    """The PTX of a .cu file; its kernels have their names in the object file."""
    (path,) = folder.glob(f"*.compute_{capability}.ptx")
    return Module(path.read_text())


@functools.cache
def readable(name: str) -> str:
    """`rows_kernel<__nv_bfloat16, true>` of the mangled name."""
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip() or name
    plain = plain.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r"\([^()]*\)$", "", plain)


def extent_of(tensor: Tensor, name: str) -> Extent | None:
    """The memory of a tensor; the gaps between the rows of a matrix are not its own."""
    if not tensor.numel():
        return None
    spans = [
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    item = tensor.element_size()
    begin, end = tensor.data_ptr(), tensor.data_ptr() + (sum(spans) + 1) * item
    if (
        tensor.dim() == 2
        and tensor.stride(1) == 1
        and tensor.stride(0) > tensor.shape[1]
        and len(tensor) > 1
    ):
        return Extent(begin, end, name, tensor.stride(0) * item, tensor.shape[1] * item)
    return Extent(begin, end, name)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


class Gpu:
    """The devices of `cuda_operators`: what they hold and what has been launched on them.

    Attributes:
        ops: the operators, with the schemas of `torch.ops.fastft`.
        library: the loaded library, for what Python calls through ctypes.
        launches: every launch so far.
        host_arguments: names of the arguments that are memory of the host, which no kernel may
            touch.
    """

    def __init__(
        self, library: ctypes.CDLL, folders: Sequence[Path], capability: int, options: Options
    ) -> None:
        self.library, self._modules = library, [module_of(folder, capability) for folder in folders]
        self.ops = getattr(torch.ops, _NAMESPACE)
        self.capability, self.options = capability, options
        self.edited: dict[str, Kernel] = {}
        self.launches: list[Launch] = []
        self.host_arguments = {"table", "hyper"}
        self.fault: BaseException | None = None  # of the last launch that went wrong
        self._capturing = False
        self._arguments: list[tuple[str, Tensor]] = []
        self._bound: dict[int, list[tuple[str, Tensor]]] = {}
        self._placed: dict[int, tuple[Tensor, int]] = {}
        self._allocated: dict[int, tuple[Extent, int]] = {}
        self._fresh: dict[int, Extent] = {}
        self._callbacks = _LAUNCH(self._on_launch), _MEMORY(self._on_memory)
        self.library.fake_begin(*self._callbacks, *_SHARED[capability])

    @property
    def waits(self) -> Counter[str]:
        """Calls of the runtime that wait for the device, counted by name."""
        self.library.fake_waits.restype = ctypes.c_char_p
        return Counter(self.library.fake_waits().decode().split())

    @property
    def capturing(self) -> bool:
        """What cudaStreamIsCapturing says."""
        return self._capturing

    @capturing.setter
    def capturing(self, value: bool) -> None:
        self._capturing = value
        self.library.fake_capturing(int(value))

    @property
    def held(self) -> int:
        """Pieces of device memory that launchers have taken and not given back."""
        return len(self._allocated)

    def use_stream(self, number: int, device: int = 0) -> None:
        """Makes stream `number` (0 for the default one) the current stream of a device."""
        self.library.fake_stream(device, ctypes.c_uint64(number))

    def place(self, tensor: Tensor, device: int) -> Tensor:
        """Says that a tensor is memory of another device than 0, or of the HOST."""
        extent = extent_of(tensor, "")
        if extent is not None:
            self._placed[extent.begin] = tensor, device
            self.library.fake_place(
                ctypes.c_uint64(extent.begin), ctypes.c_uint64(extent.end), device
            )
        return tensor

    def fresh(self, tensor: Tensor) -> Tensor:
        """Says that nobody has written a tensor yet: reading it before a kernel has is a Fault."""
        extent = extent_of(tensor, f"fresh memory {tuple(tensor.shape)}")
        if extent is not None:
            extent.written = np.zeros(extent.end - extent.begin, bool)
            self._fresh[extent.begin] = extent
        return tensor

    def edit(self, kernel: str, change: Callable[[str], str]) -> None:
        """Changes the PTX of one kernel, to plant a fault."""
        for module in self._modules:
            for name in module:
                if readable(name) == kernel:
                    self.edited[name] = module.edited(name, change)
                    return
        raise LookupError(f"no kernel is called {kernel}")

    def _kernel(self, name: str) -> Kernel:
        return self.edited.get(name) or next(
            module[name] for module in self._modules if name in module
        )

    def release(self, bound: int) -> None:
        """As AdamW does with a binding that it needs no longer."""
        self.library.fastft_adamw_release(ctypes.c_int64(bound))

    def call(self, name: str, native: Any, *arguments: Any) -> Any:
        """Runs an operator; a Fault of its launches comes out as it is, a refusal as
        RuntimeError."""
        schema = native._schema.arguments
        named = zip((argument.name for argument in schema), arguments, strict=True)
        self._arguments = [(name, tensor) for name, value in named for tensor in tensors_in(value)]
        hosts = [tensor for name, tensor in self._arguments if name in self.host_arguments]
        for tensor in hosts:
            self.place(tensor, HOST)
        self._arguments += self._bound.get(arguments[-1], []) if name == "adamw_bound_" else []
        self.fault = None
        try:
            result = native(*arguments)
        except RuntimeError:
            if self.fault is not None:
                raise self.fault from None
            raise
        finally:
            for tensor in hosts:
                self._placed.pop(tensor.data_ptr(), None)
                self.library.fake_unplace(ctypes.c_uint64(tensor.data_ptr()))
        if name == "adamw_bind":
            self._bound[result] = self._arguments
        return result

    def _on_memory(self, begin: int, bytes_: int, device: int) -> None:
        if bytes_ == 0:
            self._allocated.pop(begin, None)
            return
        extent = Extent(begin, begin + bytes_, "memory of the launcher")
        extent.written = np.zeros(bytes_, bool)
        self._allocated[begin] = extent, device

    def _on_launch(
        self, name: bytes, shape: Any, shared: int, stream: int, device: int, arguments: Any
    ) -> int:
        try:
            self._launch(name.decode(), list(shape.contents), shared, stream, device, arguments)
        except BaseException as error:
            self.fault = self.fault or error
            return 1
        return 0

    def _launch(
        self, name: str, shape: list[int], shared: int, stream: int, device: int, arguments: Any
    ) -> None:
        kernel, threads = self._kernel(name), shape[3]
        parameters = bytearray(kernel.parameter_bytes)
        for value, (offset, size) in zip(arguments, kernel.parameters.values(), strict=False):
            parameters[offset : offset + size] = ctypes.string_at(value, size)
        bytes_ = max([kernel.static_shared, *kernel.shared.values()]) + shared
        launch = Launch(
            readable(name), tuple(shape[:3]), threads, bytes_, (stream & 0xFFFFFFFF) // 16, device
        )
        self.launches.append(launch)
        if (
            shape[4:] != [1, 1]
            or threads > kernel.max_threads
            or bytes_ > _SHARED[self.capability][0]
        ):
            raise Fault("launch refused", f"{launch}; at most {kernel.max_threads} threads").at(
                launch.kernel, None
            )
        run_launch(kernel, launch, bytes(parameters), self._memory(device), self.options)

    def _memory(self, device: int) -> GlobalMemory:
        extents = list(self._allocated.values())
        for name, tensor in self._arguments:
            extent = extent_of(tensor, f"{name} {tuple(tensor.shape)}")
            if extent is not None and extent.begin not in self._fresh:
                extents.append((extent, self._place_of(extent)))
        extents += [(extent, self._place_of(extent)) for extent in self._fresh.values()]
        own = [extent for extent, place in extents if place == device]
        other = [
            replace(extent, name=f"{extent.name} of {_named(place)}")
            for extent, place in extents
            if place != device
        ]
        return GlobalMemory(own, other, self.options.checks)

    def _place_of(self, extent: Extent) -> int:
        return self._placed.get(extent.begin, (None, 0))[1]


def _named(place: int) -> str:
    return "the host" if place == HOST else f"device {place}"


_active: list[Gpu] = []


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


@functools.cache
def _operators_of(path: Path) -> ctypes.CDLL:
    """The library, its operators registered: `fastft_ptx_native` are its own, `fastft_ptx` go by
    the active Gpu."""
    library = _loaded(path)
    definitions = [
        torch.library.Library(name, "DEF") for name in (f"{_NAMESPACE}_native", _NAMESPACE)
    ]
    for name in OPERATORS:
        schema = str(getattr(torch.ops.fastft, name).default._schema).partition("::")[2]
        for definition in definitions:
            definition.define(schema)
    if library.fake_register(f"{_NAMESPACE}_native".encode(), b"CPU"):
        raise RuntimeError("the CUDA library's operators could not be registered")
    for name in OPERATORS:
        native = getattr(getattr(torch.ops, f"{_NAMESPACE}_native"), name).default
        definitions[1].impl(name, functools.partial(_call_active, name, native), "CPU")
    library.definitions = definitions  # a definition lives as long as its Library
    return library


def _call_active(name: str, native: Any, *arguments: Any) -> Any:
    if not _active:
        raise RuntimeError(f"{name}: a launch outside of cuda_operators")
    return _active[-1].call(name, native, *arguments)


@contextlib.contextmanager
def cuda_operators(
    capability: int, *, sources: Sequence[Path] = (), **options: Any
) -> Iterator[Gpu]:
    """The CUDA library on devices that are not there.

    Args:
        capability: 80 or 90.
        sources: other .cu files in the library's place, which have no operators.
        options: those of `Options`.
    """
    path, folders = build(sources or sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    library = _loaded(path) if sources else _operators_of(path)
    gpu = Gpu(library, folders, capability, Options(**options))
    _active.append(gpu)
    try:
        yield gpu
    finally:
        _active.remove(gpu)
        gpu.library.fake_begin(_LAUNCH(), _MEMORY(), 0, 0)
