"""Checkpoints of commit a25eaea (4-bit moments: of efcc782) load with the bits that they had there,
and train on as they did there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import old_checkpoints
from support.adamw_modes import MODES
from support.adamw_steps import ENGINES
from support.old_checkpoints import (
    AFTER,
    BEFORE,
    FOLDER,
    FOLDER_4BIT,
    LONG,
    Model,
    bytes_of,
    digests,
    folder_of,
    optimizer_of,
    start,
    step,
)
from torch.nn import Parameter

import fastft
from fastft.optim import moment_blocks, moment_codes
from fastft.optim.adamw_update import load_value


def read(name: str, folder: Path = FOLDER) -> Any:
    return torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("mode", MODES)
def test_the_next_steps_have_the_bits_of_then(mode: str, impl: str) -> None:
    file = read(f"{mode}.pt", folder_of(MODES[mode]))
    params = [Parameter(weight) for weight in file["weights"]]
    optimizer = optimizer_of(params, MODES[mode], impl=impl)  # the seed is the checkpoint's
    optimizer.load_state_dict(file["optimizer"])
    for number, expected in enumerate(file["expected"], BEFORE):
        step(optimizer, number)
        assert torch.equal(torch.cat([bytes_of(param.detach()) for param in params]), expected), (
            number
        )
    assert digests(optimizer) == file["digests"]
    assert len(file["expected"]) == AFTER


@pytest.mark.parametrize("mode", MODES)
def test_every_entry_keeps_its_bits(mode: str) -> None:
    file = read(f"{mode}.pt", folder_of(MODES[mode]))
    optimizer = optimizer_of(start(MODES[mode]), MODES[mode], seed=1)
    optimizer.load_state_dict(file["optimizer"])
    loaded = optimizer.state_dict()
    for group, then in zip(loaded["param_groups"], file["optimizer"]["param_groups"], strict=True):
        assert then.items() <= group.items()
    for key, then in file["optimizer"]["state"].items():
        assert loaded["state"][key].keys() == then.keys()
        for name, value in then.items():
            now = loaded["state"][key][name]
            assert now.dtype == value.dtype and torch.equal(bytes_of(now), bytes_of(value)), (
                key,
                name,
            )


def test_fp32_moments_of_a_long_vector_become_8_bit_ones() -> None:
    """Weights, counts and remainders have the bits of then; the moments are the nearest codes of
    what they were."""
    file = read("exact-8bit-long.pt")
    params = [Parameter(weight) for weight in file["weights"]]
    optimizer = optimizer_of(params, MODES["exact-8bit"])
    optimizer.load_state_dict(file["optimizer"])
    then, state = file["optimizer"]["state"][0], optimizer.state[params[0]]
    assert then["exp_avg"].shape == LONG[0] and then["exp_avg"].dtype == torch.float32
    assert (
        torch.equal(params[0], read("exact-8bit-long.pt")["weights"][0]) and state["step"] == BEFORE
    )
    assert torch.equal(state["remainder"], then["remainder"].view(torch.int16))
    m, v = moment_codes.dequantise(*(state[name] for name in moment_blocks.ENTRIES))
    torch.testing.assert_close(
        m, then["exp_avg"], rtol=0.02, atol=float(then["exp_avg"].abs().max()) * 1e-3
    )
    torch.testing.assert_close(v, then["exp_avg_sq"], rtol=0.04, atol=0.0)
    step(optimizer, BEFORE)


@pytest.mark.parametrize("folder", ["save_fp32", "save_fp32_sharded"])
def test_fp32_weights_have_the_bits_of_then(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    file, model = read("model.pt"), Model()
    for param in model.parameters():
        param.data.zero_()
    optimizer = fastft.AdamW(model.trained(), lr=1e-2)
    optimizer.load_state_dict(file["optimizer"])
    for state in optimizer.state.values():
        for name in {"remainder"} & state.keys():
            state[name].zero_()
    fastft.load_fp32(model, optimizer, FOLDER / folder)
    assert_equal(model.state_dict(), file["weights"])
    for i, param in enumerate(model.trained()):
        then = file["optimizer"]["state"][i]
        if "remainder" in then:
            kept = then["remainder"].view(torch.int16)
            assert torch.equal(optimizer.state[param]["remainder"], kept)
            master = load_value(param.detach(), optimizer.state[param]["remainder"])
            assert torch.equal(master, load_value(param.detach(), kept))
    fastft.save_fp32(model, optimizer, tmp_path)
    assert_equal(weights_in(tmp_path), weights_in(FOLDER / folder))
    step(optimizer, BEFORE)
    assert_equal(model.state_dict(), file["expected"])


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def assert_equal(now: dict[str, torch.Tensor], then: dict[str, torch.Tensor]) -> None:
    assert now.keys() == then.keys()
    for name, value in then.items():
        assert now[name].dtype == value.dtype and torch.equal(now[name], value), name


def test_the_table_of_modes_has_a_file_each() -> None:
    of_4bit = {name for name, mode in MODES.items() if mode.moments == "4bit"}
    others = {*MODES} - of_4bit | {"exact-8bit-long", "model"}
    assert {file.stem for file in FOLDER.glob("*.pt")} == others
    assert {file.stem for file in FOLDER_4BIT.glob("*.pt")} == of_4bit
    assert old_checkpoints.FOLDER.name == "checkpoints_a25eaea"
