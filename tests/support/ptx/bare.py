"""Runs a few lines of PTX over tensors, for tests of the machine itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from support.ptx.checks import GlobalMemory
from support.ptx.cuda import extent_of
from support.ptx.executor import Options, run_launch
from support.ptx.lanes import Launch
from support.ptx.parser import Module

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry planted(.param .u64 a, .param .u64 b)
{
  .reg .pred %p<9>;
  .reg .b16 %h<9>;
  .reg .b32 %r<20>;
  .reg .f32 %f<9>;
  .reg .f64 %e<9>;
  .reg .b64 %d<9>;
  ld.param.u64 %d1, [a];
  ld.param.u64 %d2, [b];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  mul.wide.u32 %d3, %r1, 4;
  add.s64 %d4, %d1, %d3;
  shl.b32 %r3, %r1, 2;
  mov.u32 %r4, memory;
  add.s32 %r5, %r4, %r3;
"""


def execute(
    body: str, *tensors: Tensor, threads: int = 32, blocks: int = 1, shared: int = 0, **options: Any
) -> Launch:
    """Runs `body`.

    In it %r1 is the thread and %r2 the block, %d1 and %d2 are where the first two tensors lie, %d4
    is the thread's 4 bytes of the first one and %r5 those of the shared `memory`.
    """
    (kernel,) = Module(f"{HEAD}{body}\nret;\n}}").values()
    launch = Launch("planted", (blocks, 1, 1), threads, shared)
    extents = [extent_of(tensor, f"tensor {i}") for i, tensor in enumerate(tensors)]
    pointers = [tensor.data_ptr() for tensor in (*tensors, *tensors)][:2] or [0, 0]
    parameters = b"".join(pointer.to_bytes(8, "little") for pointer in pointers)
    run_launch(kernel, launch, parameters, GlobalMemory(filter(None, extents)), Options(**options))
    return launch
