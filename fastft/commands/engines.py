"""`python -m fastft`: versions, devices, the engine that `impl="auto"` takes for each operation,
and why."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

import fastft
from fastft import _native
from fastft.ops import ENGINES, OPERATORS, Operation, triton_missing

_COMPANIONS = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "triton",
    "liger-kernel",
    "bitsandbytes",
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    found = {kind: getattr(torch, kind).device_count() for kind in ENGINES["triton"].devices}
    return [
        torch.device("cpu"),
        *(torch.device(kind, i) for kind, count in found.items() for i in range(count)),
    ]


def _device_name(device: torch.device) -> str:
    if device.type != "cpu":
        return str(getattr(torch, device.type).get_device_name(device))
    return (
        f"{platform.machine()}, kernels for {_native.cpu_isa() or 'none'}, "
        f"{torch.get_num_threads()} threads"
    )


def _choice(operation: Operation, device: torch.device, *what: Any) -> str:
    """The engine of a call, and what there is to say of those that could compute on such a
    device."""
    chosen = operation.resolve("auto", device, *what)
    others = [e for e in operation.engines if e != chosen and operation.table[e].serves(device)]
    listed = "; ".join(
        f"{engine}: {operation.suits(engine, device, *what) or 'available'}" for engine in others
    )
    return f"{chosen}  ({listed})" if listed else chosen


def main() -> int:
    """Prints the report; never fails because something is missing."""
    fastft._import_rooms()
    print(f"fastft {fastft.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{package} {_version(package)}" for package in _COMPANIONS))
    for kind in ("cpu", "cuda"):
        print(f"libfastft_{kind}: {_native.missing(kind) or 'loaded'}")
    chosen_from = {
        name: operation for name, operation in sorted(OPERATORS.items()) if operation.engines
    }
    kernels = ", ".join(
        name for name, operation in chosen_from.items() if "triton" in operation.engines
    )
    print(f"triton kernels: {triton_missing() or kernels}")
    for device in _devices():
        print(f"\n{device} ({_device_name(device)})")
        for name, operation in chosen_from.items():
            print(f"  {name:<26} {_choice(operation, device)}")
            for case, what in operation.samples.items():
                if operation.resolve("auto", device, *what) != operation.resolve("auto", device):
                    print(f"    {case:<24} {_choice(operation, device, *what)}")
    return 0
