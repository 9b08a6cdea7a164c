"""Integers of Python's lists, read by the native library.

The library is built without Python: it is handed the addresses of four functions of the stable ABI,
and called by ctypes with Python's lock held.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import sysconfig
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastft import _native

_FUNCTIONS = ("PyList_GetItem", "PyList_Size", "PyLong_AsLongLongAndOverflow", "PyErr_Occurred")


@functools.cache
def _reader() -> Callable[[list[list[Any]], int, int], int] | None:
    """Makes the function that writes the integers of lists to an address; None where there is none.

    Python without its lock lets another thread take an item away that is being read.
    """
    loaded = _native.library("cpu")
    if (
        isinstance(loaded, str)
        or sys.implementation.name != "cpython"
        or sysconfig.get_config_var("Py_GIL_DISABLED")
    ):
        return None
    functions = [getattr(ctypes.pythonapi, name) for name in _FUNCTIONS]
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    table = (ctypes.c_void_p * len(addresses))(*addresses)
    made = ctypes.PYFUNCTYPE(
        ctypes.c_int64, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p, ctypes.c_int64
    )
    return functools.partial(made(("fastft_integers_of_lists", loaded)), table)


def can_read() -> bool:
    """Whether `integers_of_lists` can be asked."""
    return _reader() is not None


def integers_of_lists(lists: list[list[Any]]) -> Tensor | None:
    """Joins lists of integers, int64 (T,); None where something is no integer of int64."""
    reader, total = _reader(), sum(map(len, lists))
    flat = torch.empty(total, dtype=torch.int64)
    try:
        whole = reader is not None and reader(lists, flat.data_ptr(), total) == total
    except TypeError:
        return None
    return flat if whole else None
