"""`save_fp32` over an earlier save, interrupted at every step; indices and files which somebody
else has made."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fastft

safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("huggingface_hub")

SIZES = {"one file": "5GB", "three files": 40, "four files": 24}
PAIRS = [("one file", "one file"), ("one file", "three files"), ("three files", "one file")]
PAIRS += [("three files", "three files"), ("three files", "four files")]
STEPS = [(os, "replace"), (os, "unlink"), (os, "fsync"), (safetensors_torch, "save_file")]


class Weights(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        for name, size in (("a", 6), ("b", 4), ("c", 6), ("d", 5)):
            setattr(self, name, Parameter(torch.full((size,), value)))


def save(folder: Path, value: float, max_shard_size: Any) -> None:
    model = Weights(value)
    fastft.save_fp32(model, fastft.AdamW(model.parameters()), folder, max_shard_size=max_shard_size)


def load(folder: Path) -> set[float]:
    """The distinct values of all weights in the folder."""
    model = Weights(0.0)
    fastft.load_fp32(model, fastft.AdamW(model.parameters()), folder)
    return {value for param in model.parameters() for value in param.tolist()}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def interrupted(
    patch: pytest.MonkeyPatch,
    number: int,
    end: Callable[[], None],
    *,
    after: bool = False,
    once: bool = False,
) -> list[int]:
    """From the `number`-th change of a file on, `end` is called before it, or after it; files are
    then half written."""
    count = [0]

    def replaced(module: Any, name: str) -> None:
        original = getattr(module, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] - 1 < number or (once and count[0] - 1 > number):
                return original(*args, **kwargs)
            if name == "save_file":
                original(*args, **kwargs)
                Path(args[1]).write_bytes(Path(args[1]).read_bytes()[:-9])
            elif after:
                original(*args, **kwargs)
            return end()

        patch.setattr(module, name, step)

    for module, name in STEPS:
        replaced(module, name)
    return count


def steps_of(tmp_path: Path, before: str, now: str) -> int:
    folder = tmp_path / "counted"
    save(folder, 1.0, SIZES[before])
    with pytest.MonkeyPatch.context() as patch:
        count = interrupted(patch, 1000, lambda: None)
        save(folder, 2.0, SIZES[now])
    assert load(folder) == {2.0}
    return count[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("before", "now"), PAIRS)
def test_killed_at_any_step_the_old_or_the_new_save_is_whole(
    before: str, now: str, tmp_path: Path
) -> None:
    found = set()
    for number in range(steps_of(tmp_path, before, now)):
        folder = tmp_path / str(number)
        save(folder, 1.0, SIZES[before])
        child = os.fork()
        if child == 0:
            try:
                interrupted(
                    pytest.MonkeyPatch(), number, lambda: os.kill(os.getpid(), signal.SIGKILL)
                )
                save(folder, 2.0, SIZES[now])
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        values = load(folder)
        assert values in ({1.0}, {2.0}), (number, sorted(os.listdir(folder)))
        found |= values
        save(folder, 3.0, SIZES[now])  # over what was left
        assert load(folder) == {3.0}
        assert not [file for file in os.listdir(folder) if file.endswith(".part")]
        index = folder / "model.safetensors.index.json"
        names = (
            set(json.loads(index.read_text())["weight_map"].values())
            if index.exists()
            else {"model.safetensors"}
        )
        assert {file.name for file in folder.glob("*.safetensors")} == names
    assert found >= {1.0}


@pytest.mark.parametrize(("before", "now"), PAIRS)
def test_out_of_disk_at_any_step_the_old_or_the_new_save_is_whole(
    before: str, now: str, tmp_path: Path
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    for number in range(steps_of(tmp_path, before, now)):
        folder = tmp_path / str(number)
        save(folder, 1.0, SIZES[before])
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
            interrupted(patch, number, full, after=True)
            save(folder, 2.0, SIZES[now])
        assert load(folder) in ({1.0}, {2.0}), (number, sorted(os.listdir(folder)))


def test_what_an_interrupted_first_save_leaves_is_no_save(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 2, stop, once=True)
        save(tmp_path, 1.0, 40)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["../elsewhere/model.safetensors", "/etc/passwd", "a\\b", "..", "", 5, None]
)
def test_an_index_that_leaves_its_folder_is_refused(name: Any, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere", 2.0, "5GB")
    save(tmp_path / "here", 1.0, 40)
    index = tmp_path / "here" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must name files of its own folder, names"):
        load(tmp_path / "here")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": []}}']
)
def test_an_index_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    save(tmp_path, 1.0, 40)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        load(tmp_path)


def test_of_a_key_in_two_files_the_index_decides(tmp_path: Path) -> None:
    save(tmp_path, 1.0, 24)
    for file in sorted(tmp_path.glob("*.safetensors")):
        tensors = safetensors_torch.load_file(file)
        others = {name: torch.full((6,), 9.0) for name in "ac" if name not in tensors}
        safetensors_torch.save_file({**tensors, **others, "unnamed": torch.ones(2)}, file)
    assert load(tmp_path) == {1.0}


def test_an_index_that_names_a_file_without_the_tensor_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1.0, 24)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = content["weight_map"]["d"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names tensors that their files lack: a "):
        load(tmp_path)


EXACT = {  # buffers that fp32 does not hold
    "int64": torch.tensor([2**53 + 1, -(2**62) - 1, 2**24 + 1]),
    "float64": torch.tensor([1.0 + 2.0**-50, 1e300], dtype=torch.float64),
    "complex64": torch.tensor([1.0 + 2.0j]),
    "bool": torch.tensor([True, False]),
    "uint8": torch.tensor([255, 0], dtype=torch.uint8),
    "int32": torch.tensor(2**31 - 1, dtype=torch.int32),
}


class Buffers(torch.nn.Module):
    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        self.weight = Parameter(torch.ones(3).bfloat16())
        for name, value in buffers.items():
            self.register_buffer(name + "_buffer", value)


def test_buffers_that_fp32_does_not_hold_come_back_as_they_were(tmp_path: Path) -> None:
    model = Buffers(**EXACT)
    fastft.save_fp32(model, fastft.AdamW([model.weight]), tmp_path)
    again = Buffers(**{name: torch.zeros_like(value) for name, value in EXACT.items()})
    fastft.load_fp32(again, fastft.AdamW([again.weight]), tmp_path)
    for name, value in EXACT.items():
        loaded = getattr(again, name + "_buffer")
        assert loaded.dtype == value.dtype and torch.equal(loaded, value), name


@pytest.mark.parametrize("saved", [*EXACT, "float32"])
@pytest.mark.parametrize("wanted", [*EXACT, "float32", "bfloat16"])
def test_a_dtype_that_would_lose_something_is_refused(
    saved: str, wanted: str, tmp_path: Path
) -> None:
    if saved == wanted or (saved, wanted) == ("float32", "bfloat16"):
        return
    values = {"float32": torch.ones(2), "bfloat16": torch.ones(2).bfloat16(), **EXACT}
    model = Buffers(x=values[saved].reshape(-1)[:1])
    fastft.save_fp32(model, fastft.AdamW([model.weight]), tmp_path)
    again = Buffers(x=torch.zeros_like(values[wanted].reshape(-1)[:1]))
    again.weight.data.fill_(5.0)
    with pytest.raises(
        ValueError, match=f"x_buffer is torch.{saved} in .* and torch.{wanted} in the model"
    ):
        fastft.load_fp32(again, fastft.AdamW([again.weight]), tmp_path)
    assert torch.equal(again.weight, torch.full((3,), 5.0).bfloat16()) and not again.x_buffer.any()
