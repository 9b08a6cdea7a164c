"""Page-locked memory of exactly the size asked for, which goes back to the system with its tensor.

torch's allocator for pinned memory rounds each size up to a power of two, so that 70 GB become up
to 128, and keeps what it is given back. Here ordinary pages are registered with the driver, and
unregistered before they are unmapped, once the device is done with its copies. No other memory
shares them, and processes that a DataLoader forks do not get them: at a fork the kernel would copy
what is locked. Where the system has huge pages for who asks, there are fewer to fill and to lock.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import weakref
from functools import partial

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU of this process


_alive: weakref.WeakSet[_Pages] = weakref.WeakSet()
_of_parent: list[_Pages] = []
if hasattr(os, "register_at_fork"):
    # what a forked process has mapped in their place is not to be unmapped with them
    os.register_at_fork(after_in_child=lambda: _of_parent.extend(_alive))


class _Pages(mmap.mmap):
    """Anonymous pages, registered with CUDA as long as they live."""

    _address: int | None = None

    def lock(self, address: int, device: torch.device) -> int:
        """Registers them; returns CUDA's error, 0 for none."""
        runtime = torch.cuda.cudart()
        with torch.cuda.device(device):  # or another one, which nobody uses, would get a context
            error = int(runtime.cudaHostRegister(address, len(self), _PORTABLE))
        if error == 0:
            # at the end of the process the module may be gone before this object
            self._address, self._unregister = address, runtime.cudaHostUnregister
            self._wait = partial(torch.cuda.synchronize, device)
            self._owner, self._process = os.getpid(), os.getpid
        return error

    def __del__(self) -> None:
        if self._address is not None and self._process() == self._owner:
            try:
                self._wait()
            except Exception:  # CUDA is gone, or has failed: it copies nothing any more
                return
            self._unregister(self._address)


def memory(size: int, device: torch.device) -> Tensor:
    """Page-locked memory, for copies of a GPU: uint8, (size,).

    Raises:
        RuntimeError: the driver does not lock so much.
    """
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    pages = _Pages(-1, size, **private)
    if hasattr(mmap, "MADV_DONTFORK"):
        pages.madvise(mmap.MADV_DONTFORK)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    _alive.add(pages)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)  # which keeps the pages
    error = pages.lock(tensor.data_ptr(), device)
    if error:
        raise RuntimeError(
            f"the driver does not page-lock {size} more bytes of host memory for what is offloaded "
            f"(cudaHostRegister: error {error}). Is there a limit (a container's, half of the "
            'memory under WSL)? moments="8bit" and "4bit" need less'
        )
    return tensor
