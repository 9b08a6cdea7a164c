"""Page-locked memory of exactly the size asked for, which goes back to the system with its tensor.

torch's allocator for pinned memory rounds each size up to a power of two, so that 70 GB become up
to 128, and keeps what it is given back. Here ordinary pages are registered with the driver, and
unregistered before they are unmapped. They are the process's own: no other memory shares them.
"""

from __future__ import annotations

import mmap
import sys
import warnings

import torch
from torch import Tensor


class _Pages(mmap.mmap):
    """Anonymous pages, registered with CUDA as long as they live."""

    _address: int | None = None

    def lock(self, address: int) -> bool:
        """Registers them; returns whether that worked."""
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(address, len(self), 0)) != 0:
            return False
        # at the end of the process the module may be gone before this object
        self._address, self._unregister = address, runtime.cudaHostUnregister
        return True

    def __del__(self) -> None:
        if self._address is not None:
            self._unregister(self._address)


def memory(size: int) -> Tensor:
    """Page-locked memory: uint8, (size,). Where the driver locks no more, ordinary memory, with a
    warning: copies wait for each other there, and are as right."""
    # not shared with the processes that a DataLoader forks
    flags = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    pages = _Pages(-1, size, **flags)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)  # which keeps the pages
    if not pages.lock(tensor.data_ptr()):
        warnings.warn(
            "the driver does not page-lock more host memory: optimizer states lie in ordinary "
            "memory, and their copies are slower",
            stacklevel=2,
        )
    return tensor
