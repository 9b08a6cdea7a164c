"""What each kernel of ours costs a GPU, counted without one: the rows of
benchmarks/results/kernels.json.

A row is a kernel at a shape of a real model, compiled for a chip. Instructions and bytes are those
that its compiled PTX executes (`support.ptx`), for each element; a long row stands for many, and a
few blocks for those of a large tensor. Registers, spills and widths are read from the machine code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.optim.adamw_update import RESIDUES, Rounding
from support import segment_problems
from support.machine_code import Binary, assembled, binaries, nvcc_version
from support.ptx import Launch, cuda_operators, triton_as_ptx
from support.ptx.cuda import build, readable, tensors_in
from support.row_problems import CASES, Case, draw, run

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CHIPS, ENGINES = (80, 90), ("cuda", "triton")
CLASSES = (32_000, 50_257, 128_256, 151_936)
SHORT = {
    **{torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"},
    **{torch.int8: "8-bit", torch.uint8: "4-bit"},
}
_OPTIONS = {"plain": CASES["in place"], "all options": CASES["everything in place"]}
_APPROXIMATIONS = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "div", "tanh", "sin", "cos")


class Kernel(NamedTuple):
    """A kernel at one shape.

    Attributes:
        engine: "cuda" or "triton".
        entry: its name in the code.
        source: of csrc/cuda.
        name: what it computes, on what.
        unit: of what the row counts.
        units: how many of them the run has.
        minimum: bytes of a unit which cannot but be read, and be written.
        stated: how many units the estimate is for, and these in words; 0 for none.
        call: launches it, and perhaps others, given the engine's operators.
        again: bytes that a block reads a second time.
    """

    engine: str
    entry: str
    source: str
    name: str
    unit: str
    units: int
    minimum: tuple[float, float]
    stated: tuple[float, str]
    call: Callable[[Any], Any]
    again: int = 0

    def key(self, chip: int) -> str:
        """Of its row."""
        return f"{self.engine}, {self.name}, sm_{chip}"


@dataclass(frozen=True)
class Figures:
    """Of one kernel at one shape, for each unit or thread; JSON holds the same names.

    Attributes:
        compiler: and its version.
        instructions: executed instructions of PTX, moves not counted.
        approximations: of these, what the special function units compute.
        exact: of these, divisions and roots rounded to nearest, which are several of the machine's
            each.
        double: of these, in double precision or converting to it.
        read, written: bytes, from wherever they come.
        load_bytes, store_bytes: of an executed access to global memory, in the mean.
        loads, stores: instructions of the machine's code by their width in bits.
        registers, spills, stack: as `Binary` has them.
        shared, threads: bytes and threads of a block.
        warps: that an SM holds at once.
    """

    compiler: str
    instructions: float
    approximations: float
    exact: float
    double: float
    read: float
    written: float
    load_bytes: float
    store_bytes: float
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    threads: int = 0
    warps: int = 0


def worse(row: Figures, now: Figures) -> list[str]:
    """In which respects a kernel has become worse than its row, in words."""
    found = []
    for name, slack in (("instructions", 0.05), ("read", 0.02), ("written", 0.02)):
        old, new = getattr(row, name), getattr(now, name)
        if new > old * 1.005 + slack:
            found.append(f"{name} rose from {old:g} to {new:g}")
    for name in ("load_bytes", "store_bytes"):
        old, new = getattr(row, name), getattr(now, name)
        if new < old * 0.98:
            found.append(f"{name}, of an access in the mean, fell from {old:g} to {new:g}")
    for name in ("loads", "stores"):
        old, new = (max(map(int, getattr(figures, name)), default=0) for figures in (row, now))
        if new < old:
            found.append(f"the widest of {name} fell from {old} bits to {new}")
    for name, slack in (("registers", 4), ("spills", 0), ("stack", 0)):
        old, new = getattr(row, name), getattr(now, name)
        if new > old + slack:
            found.append(f"{name} rose from {old} to {new}")
    if now.warps < row.warps:
        found.append(f"warps of an SM fell from {row.warps} to {now.warps}")
    return found


def _rows_kernels(engine: str) -> Iterator[Kernel]:
    half, full = torch.bfloat16, torch.float32
    plain = [("plain", half, classes) for classes in CLASSES]
    plain += [("plain", torch.float16, 128_256), ("plain", full, 50_257), ("plain", full, 128_256)]
    rich = [
        ("all options", half, 50_257),
        ("all options", half, 128_256),
        ("all options", full, 128_256),
    ]
    for options, dtype, classes in plain + rich:
        case, size = _OPTIONS[options], dtype.itemsize
        yield Kernel(
            engine,
            "rows_kernel",
            "cross_entropy",
            f"cross-entropy, {options}, {SHORT[dtype]}, V={classes}",
            "logit",
            classes,
            (size, size),
            (8192.0 * classes, "8,192 rows"),
            partial(_rows, case, classes, dtype),
            again=classes * size,
        )


def _rows(case: Case, classes: int, dtype: torch.dtype, operators: Any) -> None:
    torch.manual_seed(0)
    run(operators.cross_entropy_rows, draw(case, 1, classes, dtype))


def _adamw_kernels(engine: str) -> Iterator[Kernel]:
    for rounding in Rounding:
        for moment in (torch.float32, torch.bfloat16, torch.int8, torch.uint8):
            tensors = adamw_arguments(rounding, moment, 1, 8192)
            updated = [*tensors[0], *tensors[2], *tensors[3], *tensors[5]]
            moved = sum(tensor.numel() * tensor.element_size() for tensor in updated) / 8192
            name = f"AdamW, {rounding.name.lower()}, moments {SHORT[moment]}"
            call = partial(_adamw, rounding, moment, 1, 8192)
            minimum = (moved + tensors[1][0].element_size(), moved)
            yield Kernel(
                engine,
                "adamw_kernel",
                "adamw",
                name,
                "parameter",
                8192,
                minimum,
                (1e9, "1e9 parameters"),
                call,
            )


def adamw_arguments(
    rounding: Rounding, moment: torch.dtype, count: int, elements: int
) -> tuple[Any, ...]:
    """Of `adamw_`, for `count` tensors in rows of 128 in the midst of a training."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.float32 if rounding == Rounding.FP32 else torch.bfloat16
    shape = (elements // min(elements, 128), min(elements, 128))

    def random(scale: float, dtype: torch.dtype) -> list[Tensor]:
        return [(torch.randn(shape, generator=generator) * scale).to(dtype) for _ in range(count)]

    def codes(low: int, high: int, dtype: torch.dtype) -> list[Tensor]:
        return [
            torch.randint(low, high, shape, dtype=dtype, generator=generator) for _ in range(count)
        ]

    params, grads, coded = random(0.05, kept), random(1e-3, kept), not moment.is_floating_point
    if coded:
        moments, squares = codes(-127, 128, torch.int8), codes(0, 256, torch.uint8)
        if moment == torch.uint8:  # 4 bits each, none of them NaN
            halves = [(code.view(-1, 2) % 15 - 7).view(*shape[:1], -1, 2) for code in moments]
            moments = [(half[..., 0] & 15 | half[..., 1] << 4).view(moment) for half in halves]
    else:
        moments, squares = random(1e-4, moment), [t.abs() for t in random(1e-7, moment)]
    residues: list[Tensor] = []
    for _ in range(count):
        if rounding in RESIDUES:
            residues.append(torch.zeros(shape, dtype=RESIDUES[rounding][1]))
        if coded:
            residues += [torch.full((shape[0], 1), 1e-3), torch.full((shape[0], 1), 1e-6)]
    table = torch.tensor([[0, rounding, 0, 512 * i * -(-elements // 512)] for i in range(count)])
    hyper = torch.tensor([[0.9999, 0.1, 0.999, 0.001, -1e-4, 0.03, 1e-8, 1.0, 100.0]])
    return params, grads, moments, squares, [], residues, table, hyper, torch.ones(()), 5


def _adamw(
    rounding: Rounding, moment: torch.dtype, count: int, elements: int, operators: Any
) -> None:
    operators.adamw_(*adamw_arguments(rounding, moment, count, elements))


def _norm_kernels() -> Iterator[Kernel]:
    for dtype in (torch.bfloat16, torch.float32):
        yield Kernel(
            "cuda",
            "squares_kernel",
            "grad_norm",
            f"norm of gradients, {SHORT[dtype]}",
            "element",
            65_536,
            (dtype.itemsize, 0),
            (1e9, "1e9 elements"),
            partial(_norm, [65_536], dtype),
        )
    call = partial(_norm, [1] * 380, torch.bfloat16)
    yield Kernel(
        "cuda",
        "total_kernel",
        "grad_norm",
        "norm of gradients, total",
        "block",
        380,
        (8, 0),
        (0, ""),
        call,
    )


def _norm(sizes: list[int], dtype: torch.dtype, operators: Any) -> None:
    grads = [torch.ones(size, dtype=dtype) for size in sizes]
    operators.grad_norm_squared_(torch.zeros((), dtype=torch.float64), grads)


def _boundaries_kernels(engine: str) -> Iterator[Kernel]:
    lengths = [128] * 256
    tokens, call = sum(lengths), partial(_boundaries, lengths)
    scan = ("boundaries, sums of lengths", "segment", len(lengths), (8, 4), (0, ""))
    fill = ("boundaries, tokens", "token", tokens, (8, 20), (65_536.0, "65,536 tokens"))
    yield Kernel(engine, "scan_kernel", "boundaries", *scan, call)
    yield Kernel(engine, "fill_kernel", "boundaries", *fill, call)


def _boundaries(lengths: list[int], operators: Any) -> None:
    segment_problems.run(operators.packed_boundaries, *segment_problems.draw(lengths))


def _scale_kernels(engine: str) -> Iterator[Kernel]:
    entry, stem = "_scale_kernel" if engine == "triton" else "scale_kernel", "scale_gradients"
    for dtype in (torch.bfloat16, torch.float32):
        moved, stated = (dtype.itemsize, dtype.itemsize), (128_256.0 * 4096, "128,256 x 4096")
        name, call = f"scaling of gradients, {SHORT[dtype]}", partial(_scale, dtype, 0.5)
        yield Kernel(engine, entry, stem, name, "element", 65_536, moved, stated, call)
    call = partial(_scale, torch.bfloat16, 1.0)
    name, stated = "scaling of gradients, by 1", (128_256.0 * 4096, "128,256 x 4096")
    yield Kernel(engine, entry, stem, name, "element", 65_536, (0, 0), stated, call)


def _scale(dtype: torch.dtype, scale: float, operators: Any) -> None:
    operators.scale_gradients_([torch.ones(65_536, dtype=dtype)], torch.tensor(scale))


def _upload() -> Kernel:
    call = partial(_adamw, Rounding.EXACT, torch.float32, 36, 8)
    return Kernel(
        "cuda",
        "upload_kernel",
        "adamw",
        "AdamW, upload of a table",
        "word",
        1000,
        (0, 4),
        (0, ""),
        call,
    )


def kernels(engine: str) -> list[Kernel]:
    """All rows of an engine, but for the chips."""
    found = [
        *_rows_kernels(engine),
        *_adamw_kernels(engine),
        *_boundaries_kernels(engine),
        *_scale_kernels(engine),
    ]
    return [*found, *_norm_kernels(), _upload()] if engine == "cuda" else found


@contextmanager
def operators(engine: str, chip: int) -> Iterator[tuple[Any, list[Launch]]]:
    """The operators of an engine which run as PTX, and the list of their launches."""
    if engine == "cuda":
        with cuda_operators(chip, checks=False) as gpu:
            yield gpu.ops, gpu.launches
        return
    launches: list[Launch] = []

    def run_as_ptx(function: Callable[..., None], *arguments: Any) -> None:
        with triton_as_ptx(chip, memory=list(tensors_in(arguments)), checks=False) as found:
            function(*arguments)
        launches.extend(found)

    functions = vars(triton_operators()).items()
    yield (
        SimpleNamespace(**{name: partial(run_as_ptx, function) for name, function in functions}),
        launches,
    )


def triton_operators() -> Any:
    """The functions of the Triton engines, by their operators' names."""
    from fastft.data.boundaries_triton import packed_boundaries
    from fastft.loss.cross_entropy_rows_triton import cross_entropy_rows
    from fastft.loss.scale_gradients_triton import scale_gradients_
    from fastft.optim.adamw_update_triton import adamw_

    functions = packed_boundaries, cross_entropy_rows, scale_gradients_, adamw_
    return SimpleNamespace(**{function.__name__: function for function in functions})


def count(kernel: Kernel, chip: int) -> Figures:
    """Runs a kernel as PTX and reads its machine code."""
    with operators(kernel.engine, chip) as (functions, launches):
        kernel.call(functions)
        found = [launch for launch in launches if kernel.entry in launch.kernel]
    launch = found[0]
    compiler, binary = _binary(kernel, launch, chip)
    return figures(kernel, launch, compiler, binary, chip)


def figures(kernel: Kernel, launch: Launch, compiler: str, binary: Binary, chip: int) -> Figures:
    """Of a launch and its machine code."""
    opcodes, units = launch.opcodes, kernel.units

    def executed(wanted: Callable[[list[str]], bool]) -> int:
        return sum(n for opcode, n in opcodes.items() if wanted(opcode.split(".")))

    def accesses(kind: str) -> int:
        inside = {"shared", "shared::cta", "param", "local", "const"}
        return executed(lambda parts: parts[0] == kind and not inside & set(parts))

    counted = Figures(
        compiler,
        launch.instructions / units,
        executed(lambda parts: parts[0] in _APPROXIMATIONS) / units,
        executed(lambda parts: parts[0] in ("div", "sqrt", "rcp") and "rn" in parts) / units,
        executed(lambda parts: "f64" in parts and parts[0] not in ("mov", "ld", "st")) / units,
        launch.bytes_read / units,
        launch.bytes_written / units,
        launch.bytes_read / max(accesses("ld"), 1),
        launch.bytes_written / max(accesses("st"), 1),
        _by_width(binary.loads),
        _by_width(binary.stores),
        binary.registers,
        binary.spills,
        binary.stack,
        launch.shared,
        launch.block,
        binary.warps(chip, launch.block, launch.shared),
    )
    numbers = {
        name: round(value, 3) for name, value in vars(counted).items() if isinstance(value, float)
    }
    return replace(counted, **numbers)


def _by_width(widths: Counter[int]) -> dict[str, int]:
    return {str(width): n for width, n in sorted(widths.items(), reverse=True)}


def _binary(kernel: Kernel, launch: Launch, chip: int) -> tuple[str, Binary]:
    if kernel.engine == "cuda":
        return f"nvcc {nvcc_version()}", _cuda_binaries(kernel.source, chip)[launch.kernel]
    import triton

    from support.triton_compiler import compiled_for

    with compiled_for(chip) as compiled:
        kernel.call(triton_operators())
    (code,) = [each for each in compiled if kernel.entry in each.metadata.name]
    (binary,) = binaries(code.asm["cubin"]).values()
    return f"Triton {triton.__version__}", binary


@cache
def _cuda_binaries(stem: str, chip: int) -> dict[str, Binary]:
    """The machine code of the PTX that is run, of the kernels in csrc/cuda/<stem>.cu."""
    _, folders = build(sorted((CSRC / "cuda").glob("*.cu")))
    (ptx,) = (path for folder in folders for path in folder.glob(f"{stem}.compute_{chip}.ptx"))
    with TemporaryDirectory() as folder:
        return {
            readable(name): code
            for name, code in binaries(assembled(ptx, chip, Path(folder))).items()
        }
