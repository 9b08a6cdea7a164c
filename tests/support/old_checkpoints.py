"""What a checkpoint of an earlier commit must load as, for ever: tests/fixtures/checkpoints_*.

    git worktree add a25eaea a25eaea
    cp tests/support/{old_checkpoints,adamw_modes}.py a25eaea/tests/support/
    cd a25eaea/tests; PYTHONPATH=.. python -m support.old_checkpoints ../../tests/fixtures

wrote checkpoints_a25eaea. It was run once, at a25eaea with the C++ engine, and is not to be run
again: a change which makes the files differ breaks the checkpoints that people have. Moments of 4
bits, which that commit did not know, are in checkpoints_efcc782, written likewise at that one with
`4bit` for a last argument. Values and gradients are integers over powers of two, so that no version
of torch draws others.

`<mode>.pt` has the `weights` and the `optimizer`'s state dict after two steps, and what three more
steps make of them: the bytes of the `expected` weights after each, and `digests` of the states at
the end; of a vector which a later fastft keeps in 8 bits, the weights and the state dict alone.
`save_fp32` and `save_fp32_sharded` are folders of that function, beside them the model and
optimizer in `model.pt`.
"""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fastft
from support.adamw_modes import MODES, Mode

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
FOLDER = FIXTURES / "checkpoints_a25eaea"
FOLDER_4BIT = FIXTURES / "checkpoints_efcc782"
SHAPES = [(5, 7), (63,), (), (2, 3, 5), (1,), (2, 130)]
LONG = [(4099,), (3, 5)]  # a vector which a later fastft keeps in 8 bits
BEFORE, AFTER = 2, 3  # steps


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Of either sign over eight octaves, each exact in bfloat16."""
    numbers = (torch.arange(torch.Size(shape).numel()) + 1009 * seed + 7) * 2654435761 % 2**32
    mantissa = 128 + (numbers >> 9) % 128
    signed = torch.where((numbers >> 17) % 2 == 0, mantissa, -mantissa).double()
    return (signed * 2.0 ** -((numbers >> 20) % 8 + 9)).float().view(shape)


def start(mode: Mode, shapes: list[tuple[int, ...]] = SHAPES) -> list[Parameter]:
    return [Parameter(values(shape, seed).to(mode.dtype)) for seed, shape in enumerate(shapes)]


def optimizer_of(params: list[Parameter], mode: Mode, **options: Any) -> fastft.AdamW:
    """Two groups, the second with amsgrad where that may be."""
    half = len(params) // 2
    amsgrad = mode.moments in ("fp32", "bf16")
    rest = {"lr": 3e-3, "betas": (0.4, 0.99), "maximize": True, "amsgrad": amsgrad}
    groups = [{"params": params[:half], "weight_decay": 0.1}, {"params": params[half:], **rest}]
    return fastft.AdamW(groups, **mode.options, **options)


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for i, param in enumerate(params):
        param.grad = values(tuple(param.shape), 100 * number + i).to(param.dtype)
    optimizer.step()


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def digests(optimizer: fastft.AdamW) -> list[dict[str, str]]:
    """Of each parameter's state, entry by entry."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [
        {
            name: sha256(bytes(bytes_of(value).tolist())).hexdigest()[:16]
            for name, value in optimizer.state[param].items()
        }
        for param in params
    ]


class Model(torch.nn.Module):
    """Tied weights, a frozen part, an fp32 and an fp16 tensor, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(13, 8)
        self.middle = torch.nn.Linear(8, 9)
        self.frozen = torch.nn.Linear(9, 8).requires_grad_(False)
        self.head = torch.nn.Linear(8, 13, bias=False)
        for seed, param in enumerate(self.parameters()):
            param.data = values(tuple(param.shape), 20 + seed).bfloat16()
        self.head.weight = self.embed.weight
        self.gain = Parameter(torch.ones(()))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("scales", torch.linspace(0, 1, 5).half())

    def trained(self) -> list[Parameter]:
        return [param for param in self.parameters() if param.requires_grad]


def _write(file: Path, mode: Mode, shapes: list[tuple[int, ...]]) -> None:
    params = start(mode, shapes)
    optimizer = optimizer_of(params, mode, seed=2**40 + 5, impl="cpp")
    for number in range(BEFORE):
        step(optimizer, number)
    saved = {
        "weights": [param.detach().clone() for param in params],
        "optimizer": _copied(optimizer.state_dict()),
    }
    if shapes is LONG:  # whose states a later optimizer converts
        torch.save(saved, file)
        return
    expected = []
    for number in range(BEFORE, BEFORE + AFTER):
        step(optimizer, number)
        expected.append(torch.cat([bytes_of(param.detach()) for param in params]))
    torch.save({**saved, "expected": expected, "digests": digests(optimizer)}, file)


def _copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Without shared storages, of which torch.save would write the whole."""
    state = {
        key: {name: value.clone() for name, value in entries.items()}
        for key, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _write_fp32(folder: Path) -> None:
    model = Model()
    optimizer = fastft.AdamW(model.trained(), lr=1e-2, impl="cpp")
    for number in range(BEFORE):
        step(optimizer, number)
    fastft.save_fp32(model, optimizer, folder / "save_fp32")
    fastft.save_fp32(model, optimizer, folder / "save_fp32_sharded", max_shard_size=300)
    saved = {"weights": {name: value.clone() for name, value in model.state_dict().items()}}
    saved["optimizer"] = _copied(optimizer.state_dict())
    step(optimizer, BEFORE)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({**saved, "expected": expected}, folder / "model.pt")


def folder_of(mode: Mode) -> Path:
    return FOLDER_4BIT if mode.moments == "4bit" else FOLDER


if __name__ == "__main__":
    into = Path(sys.argv[1]) / (FOLDER_4BIT if sys.argv[2:] == ["4bit"] else FOLDER).name
    into.mkdir(parents=True)
    for name, of_mode in MODES.items():
        if folder_of(of_mode).name == into.name:
            _write(into / f"{name}.pt", of_mode, SHAPES)
    if into.name == FOLDER.name:
        _write(into / "exact-8bit-long.pt", MODES["exact-8bit"], LONG)
        _write_fp32(into)
