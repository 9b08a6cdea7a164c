"""`python -m fastft`: versions, devices, the engine that `impl="auto"` takes for each operator, and why."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import fastft
from fastft import _native
from fastft.attention.attention import engines
from fastft.ops import DEVICES, OPERATORS, triton_missing

_COMPANIONS = ("torch", "transformers", "accelerate", "datasets", "triton", "liger-kernel", "bitsandbytes")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, kernels for {_native.cpu_isa() or 'none'}, {torch.get_num_threads()} threads"


def main() -> None:
    """Prints the report; never fails because something is missing."""
    print(f"fastft {fastft.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{package} {_version(package)}" for package in _COMPANIONS))
    for kind in ("cpu", "cuda"):
        print(f"libfastft_{kind}: {_native.missing(kind) or 'loaded'}")
    kernels = ", ".join(name for name, operator in sorted(OPERATORS.items()) if "triton" in operator.engines)
    print(f"triton kernels: {triton_missing() or kernels}")
    for device in _devices():
        print(f"\n{device} ({_device_name(device)})")
        for name, operator in sorted(OPERATORS.items()):
            chosen = operator.resolve("auto", device)
            others = [engine for engine in DEVICES if DEVICES[engine] == device.type and engine != chosen]
            reasons = {engine: operator.unavailable(engine, device) for engine in others}
            listed = "; ".join(f"{engine}: {reason or 'available'}" for engine, reason in reasons.items())
            print(f"  {name:<24} {chosen}{f'  ({listed})' if listed else ''}")
        print(f"  {'packed attention':<24} {engines()[device.type]}")


if __name__ == "__main__":
    main()
