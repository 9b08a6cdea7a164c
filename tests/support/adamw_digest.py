"""What the CPU kernels compute, as a digest: AdamW in every mode, and the norm of gradients.

    python -m support.adamw_digest THREADS

prints the instruction set and the digest.
"""

from __future__ import annotations

import hashlib
import sys

import torch

import fastft
from fastft import _native
from fastft.optim.grad_norm import grad_norm
from support.adamw_modes import MODES, WITH_AMSGRAD
from support.adamw_steps import gradients, snapshot, start, train

SHAPES = [(1,), (63,), (507,), (20_000,), (0,), (3, 5, 7), (70, 128), (300, 130)]


def digest(threads: int = 1) -> str:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's powers are others where threads share a tensor
    hashed, grads = hashlib.sha256(), gradients(SHAPES, 3)
    torch.set_num_threads(threads)
    for mode in (MODES | WITH_AMSGRAD).values():
        optimizer = fastft.AdamW(start(SHAPES, mode.dtype), impl="cpp", seed=9, **mode.options)
        train(optimizer, grads)
        found = [tensor for entries in snapshot(optimizer) for _, tensor in sorted(entries.items())]
        for tensor in [*found, grad_norm([grad.to(mode.dtype) for grad in grads[0]], "cpp")]:
            hashed.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    torch.set_num_threads(before)
    return hashed.hexdigest()


if __name__ == "__main__":
    print(_native.cpu_isa(), digest(int(sys.argv[1])))
    assert "torch.utils.cpp_extension" not in sys.modules, "something was to be compiled"
