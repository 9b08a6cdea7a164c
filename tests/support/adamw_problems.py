"""Training with AdamW in every way of keeping values, for tests that compare engines bit by bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

import fastft
from fastft.optim.moment_blocks import LONG
from fastft.optim.moment_codes import CODES
from support.adamw_modes import Mode
from support.adamw_steps import assert_same_bits

SIZES = (1, 3, 63, 507, 4097, 0, *[5] * 11, 1040)


class Training:
    """An optimizer over two groups, the second with amsgrad where that may be, on the CPU's random
    numbers whatever the device. With moments that are codes, which are for rows and long
    vectors, a parameter has four rows, or three, or one, or stays a vector if it is long.

    `offset`: every tensor begins so many elements after a multiple of 16 bytes.
    """

    def __init__(
        self,
        mode: Mode,
        impl: str,
        *,
        sizes: tuple[int, ...] = SIZES,
        device: str = "cpu",
        offset: int = 0,
        **options: Any,
    ) -> None:
        self.generator, self.mode, self.offset = torch.Generator().manual_seed(0), mode, offset
        self.params = [Parameter(self.random(size).to(device)) for size in sizes]
        if offset:
            self.params = [Parameter(_shifted(param.detach(), offset)) for param in self.params]
        half = len(sizes) // 2
        groups = [
            {"params": self.params[:half], "weight_decay": 0.1},
            {"params": self.params[half:], "lr": 3e-3, "betas": (0.4, 0.99), "maximize": True},
        ]
        groups[1]["amsgrad"] = mode.moments not in CODES
        options = {**mode.options, **options}
        self.optimizer = fastft.AdamW(groups, impl=impl, seed=2**40 + 5, **options)

    def random(self, size: int) -> Tensor:
        scale = 10 ** (torch.rand(size, generator=self.generator) * 6 - 4)
        values = (torch.randn(size, generator=self.generator) * scale).to(self.mode.dtype)
        rows = next(rows for rows in (4, 3, 1) if size % rows == 0)
        vector = self.mode.moments not in CODES or size == 0 or (rows == 1 and size >= LONG)
        return values if vector else values.view(rows, -1)

    def step(self, steps: int = 1) -> Training:
        for _ in range(steps):
            for param in self.params:
                grad = self.random(param.numel()).to(param.device)
                param.grad = _shifted(grad, self.offset) if self.offset else grad
            self.optimizer.step()
        return self

    def values(self) -> list[Tensor]:
        """Parameters and states, on the CPU."""
        states = [
            entry
            for param in self.params
            for _, entry in sorted(self.optimizer.state[param].items())
        ]
        return [tensor.detach().cpu().clone() for tensor in (*self.params, *states)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes them
    pages = np.zeros(shape, np.uint8 if dtype.itemsize == 1 else np.int16)
    return torch.from_numpy(pages).view(dtype)


class Past(NamedTuple):
    """An update of a tensor with more than 2^31 elements, zeros but for the last, and of these
    alone.

    Both are arguments of `adamw_`; nobody has written most pages of the large one, which take no
    memory on a CPU.
    """

    whole: tuple[Any, ...]
    end: tuple[Any, ...]

    def assert_same_ends(self) -> None:
        for tensors, others in zip(self.whole[:6], self.end[:6], strict=True):
            ends = [
                [
                    tensor.reshape(-1)[-other.numel() :].cpu()
                    for tensor, other in zip(tensors, others, strict=True)
                ]
            ]
            assert_same_bits(*ends, [other.reshape(-1) for other in others])


def past_two_to_the_31(moments: str, device: str = "cpu") -> Past:
    """Of a bf16 parameter, rounded stochastically, with bf16 moments or codes."""
    code, bf16 = CODES.get(moments), torch.bfloat16
    shape, last = ((2**24 + 1, 128), 1) if code else ((2**31 + 70,), 70)  # and its last entries
    forms = list(code.forms(shape).values()) if code else [(bf16, shape)] * 2
    whole = [_zeros(of, dtype, device) for dtype, of in [(bf16, shape)] * 2 + forms[:2]]
    scales = [torch.zeros(of, device=device) for _, of in forms[2:]]
    generator = torch.Generator().manual_seed(0)
    for tensor in whole[:2] if code else whole:
        tensor[-last:] = torch.rand(tensor[-last:].shape, generator=generator).to(tensor)
    end = [tensor[-last:].cpu().clone() for tensor in whole]
    ends_scales = [scale[-last:].cpu().clone() for scale in scales]
    hyper = torch.tensor([[0.99, 0.1, 0.999, 0.001, -0.01, 0.03, 1e-8, 1.0, 1.0]])

    def arguments(tensors: list[Tensor], scales: list[Tensor], first: int) -> tuple[Any, ...]:
        table = torch.tensor([[0, 3, 0, first]])  # stochastic
        return (
            *([tensor] for tensor in tensors),
            [],
            scales,
            table,
            hyper,
            torch.ones((), device=tensors[0].device),
            5,
        )

    return Past(arguments(whole, scales, 0), arguments(end, ends_scales, 2**31))


def _shifted(tensor: Tensor, offset: int) -> Tensor:
    return torch.cat([tensor.new_zeros(offset), tensor.view(-1)])[offset:].view(tensor.shape)
