"""A model left as it was by the probe, and the two modes that the probe runs it in."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch
from torch import nn

SMALL = 2**20  # elements of a buffer that is worth a copy; larger ones are quantised weights


class RandomStates:
    """The random states of Python, NumPy, torch and the model's GPUs when this is made."""

    def __init__(self, model: nn.Module) -> None:
        self.devices = [
            *{parameter.device for parameter in model.parameters() if parameter.is_cuda}
        ]
        self.torch = (
            torch.get_rng_state(),
            [torch.cuda.get_rng_state(device) for device in self.devices],
        )
        self.numpy = sys.modules.get("numpy")
        self.others = (
            random.getstate(),
            None if self.numpy is None else self.numpy.random.get_state(),
        )

    def rewind(self) -> None:
        """Goes back to these."""
        torch.set_rng_state(self.torch[0])
        for device, state in zip(self.devices, self.torch[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.others[0])
        if self.numpy is not None:
            self.numpy.random.set_state(self.others[1])


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[RandomStates]:
    """Evaluation mode without gradients; afterwards modes, buffers, random states and what is
    trained are what they were (a forward of PEFT's X-LoRA before 0.21 thaws its adapters)."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.numel() <= SMALL]
    states = RandomStates(model)
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield states
    finally:
        for module, training in modes:
            module.training = training
        for parameter, trains in trained:
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        states.rewind()


@contextlib.contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Puts all modules but dropout in training mode, and at the end in evaluation mode."""
    try:
        for module in model.modules():
            module.training = "dropout" not in type(module).__name__.lower()
        yield
    finally:
        for module in model.modules():
            module.training = False
