"""Step counts on the device, for `capturable=True`: what depends on them is computed there.

A CUDA graph replays kernels, not Python: the counts, and whatever of the hyper-parameters depends
on them or on a learning rate on the device, must be read and written by kernels. Numbers go there
by value, so that nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastft.optim.adamw_update import ADAMW
from fastft.optim.groups import hyper_columns


def counted_there(device: torch.device, groups: list[dict[str, Any]]) -> bool:
    """Tells whether parameters on `device` are counted there: if one group is capturable."""
    return device.type != "cpu" and any(group["capturable"] for group in groups)


def all_counted_there(grads: Sequence[Tensor], groups: list[dict[str, Any]]) -> bool:
    """Tells whether the device itself sees to it that a skipped step does nothing."""
    return all(counted_there(grad.device, groups) for grad in grads)


def is_capturing() -> bool:
    """Tells whether a CUDA graph records what this thread launches, in place of its being done."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_capture(grads: Sequence[Tensor], groups: list[dict[str, Any]], impl: str) -> None:
    """Raises where a graph's replays would repeat the count and rate of its capture."""
    if not all_counted_there(grads, groups):
        raise RuntimeError(
            "a CUDA graph captures AdamW.step(), and its replays would repeat this step's "
            "count and learning rate: pass capturable=True, with all parameters on a GPU, or "
            "leave step() out of the graph"
        )
    for device in {grad.device for grad in grads}:
        engine = ADAMW.resolve(impl, device)
        if engine != "cuda":
            reason = ADAMW.unavailable("cuda", device) or f"impl={impl!r} was asked for"
            raise RuntimeError(
                "a CUDA graph captures AdamW.step(), which of AdamW's engines only 'cuda' "
                f"allows, and here {engine!r} computes ({reason}): make that engine available, "
                "or leave step() out of the graph"
            )


def _captured(device: torch.device) -> bool:
    return device.type == "cuda" and is_capturing()


class DeviceCounts:
    """The counts of a plan's parameters on one device.

    A graph that has captured a step counts here at every replay: the memory is never given back
    then.

    Args:
        device: where they live.
        steps: the steps done by each parameter.
        rows: (group, steps done) of each row of the hyper table.
    """

    in_graphs: ClassVar[set[DeviceCounts]] = set()

    def __init__(
        self, device: torch.device, steps: list[float], rows: list[tuple[int, float]]
    ) -> None:
        self.device = device
        self.steps = torch.tensor(steps, dtype=torch.float32, device=device)
        self._groups = [group for group, _ in rows]
        self._of_rows = torch.tensor([step for _, step in rows], dtype=torch.float64, device=device)
        self._advance = torch.ones((), dtype=torch.float64, device=device)
        self._columns: dict[str, tuple[list[float], Tensor]] = {}

    def hyper(self, groups: list[dict[str, Any]], found_inf: Tensor | None) -> Tensor:
        """The operator's hyper table of the next step; its last column is 0 if that is skipped."""
        if _captured(self.device):
            self.in_graphs.add(self)
        chosen = [groups[index] for index in self._groups]
        lr, decay, eps = (
            self._column(name, [group[name] for group in chosen])
            for name in ("lr", "weight_decay", "eps")
        )
        beta1, beta2 = (
            self._column(f"beta{i}", [group["betas"][i] for group in chosen]) for i in (0, 1)
        )
        sign = self._column("sign", [-1.0 if group["maximize"] else 1.0 for group in chosen])
        if found_inf is not None:
            self._advance = (found_inf.to(self.device) == 0).double().reshape(())
        else:
            self._advance = torch.ones((), dtype=torch.float64, device=self.device)
        step = self._of_rows + 1
        columns = hyper_columns(lr, decay, eps, beta1, beta2, sign, step)
        return torch.stack([*columns, step * self._advance], 1).float()

    def count(self) -> None:
        """Counts the step of which `hyper` was the last table, unless it was skipped."""
        self.steps.add_(self._advance.float())
        self._of_rows.add_(self._advance)

    def _column(self, name: str, values: list[float | Tensor]) -> Tensor:
        """One number a row, float64; numbers of the host are sent when they change."""
        there = [isinstance(value, Tensor) and value.device.type != "cpu" for value in values]
        numbers = [
            0.0 if on_device else float(value)
            for value, on_device in zip(values, there, strict=True)
        ]
        if not any(there) and name in self._columns and self._columns[name][0] == numbers:
            return self._columns[name][1]
        cells = [
            value.to(self.device, torch.float64).reshape(())
            if isinstance(value, Tensor) and on_device
            else torch.full((), number, dtype=torch.float64, device=self.device)
            for value, number, on_device in zip(values, numbers, there, strict=True)
        ]
        column = torch.stack(cells)
        if not _captured(self.device):  # else nothing is in it before a replay
            self._columns[name] = numbers, column
        return column
