"""Runs the GPU code on a machine without a GPU: compiled PTX of the CUDA and the Triton kernels,
with checks.

with cuda_operators(90) as gpu:
    gpu.ops.cross_entropy_rows(...)  # the CUDA library's own launcher, CPU tensors
with triton_as_ptx(90) as launches:
    wrapper(...)                     # any Python that launches Triton kernels, CPU tensors

docs/gpu-code-without-a-gpu.md says what it sees and what it does not.
"""

from support.ptx.checks import Fault
from support.ptx.cuda import HOST, Gpu, cuda_operators, missing
from support.ptx.lanes import Launch

__all__ = ["HOST", "Fault", "Gpu", "Launch", "cuda_operators", "missing", "triton_as_ptx"]


def triton_as_ptx(*args, **kwargs):
    """See `triton_launches.triton_as_ptx`; imports Triton, which not every machine has."""
    from support.ptx import triton_launches

    return triton_launches.triton_as_ptx(*args, **kwargs)
