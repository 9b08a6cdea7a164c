"""`save_fp32` over an earlier save, with a fault at each call that changes a file; indices and
files which somebody else has made, or cut off."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import system_calls
from torch.nn import Parameter

import fastft

safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("huggingface_hub")

SIZES = {"one file": "5GB", "three files": 40, "four files": 24}
# of the earlier save and the next; the others are repetitions
PAIRS = [
    pytest.param("three files", "three files"),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in [
            ("one file", "one file"),
            ("one file", "three files"),
            ("three files", "one file"),
            ("three files", "four files"),
        ]
    ),
]


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


def files_that_count(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {"model.safetensors"}
    return {index.name, *json.loads(index.read_text())["weight_map"].values()}


def faulty_saves(tmp_path: Path, before: str, now: str, *kinds: str) -> Iterator[Any]:
    """Saves over an earlier one, each with a fault at another change of a file: the fault, how it
    ended, the folder."""
    folder = tmp_path / "weights"
    save(folder, 1.0, SIZES[before])
    shutil.copytree(folder, tmp_path / "earlier")

    def work() -> None:
        save(folder, 2.0, SIZES[now])

    for fault in system_calls.faults_of(work, folder, *kinds):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "earlier", folder)
        yield fault, system_calls.run(work, folder, fault), folder


@system_calls.needs_ptrace
@pytest.mark.parametrize(("before", "now"), PAIRS)
def test_killed_at_any_call_the_old_or_the_new_save_is_whole(
    before: str, now: str, tmp_path: Path
) -> None:
    found = set()
    for fault, ended, folder in faulty_saves(tmp_path, before, now, "before", "half", "after"):
        assert ended.killed, (fault, ended)
        values = load(folder)
        assert values in ({1.0}, {2.0}), (fault, sorted(os.listdir(folder)))
        found |= values
        save(folder, 3.0, SIZES[now])  # over what was left
        assert load(folder) == {3.0}
        assert set(os.listdir(folder)) == files_that_count(folder), fault
    assert found == {1.0, 2.0}


@system_calls.needs_ptrace
@pytest.mark.parametrize("kind", ["full", "read-only", "Ctrl-C"])
@pytest.mark.parametrize(("before", "now"), PAIRS)
def test_a_save_that_fails_at_any_call_leaves_one_whole_save_and_nothing_else(
    before: str, now: str, kind: str, tmp_path: Path
) -> None:
    words = {"full": "No space left on device", "read-only": "Read-only file system"}
    for fault, ended, folder in faulty_saves(tmp_path, before, now, kind):
        assert load(folder) in ({1.0}, {2.0}), (fault, ended)
        change = ended.changes[fault.at]
        if kind != "read-only" and change.call not in ("unlink", "unlinkat", "rmdir"):
            assert set(os.listdir(folder)) == files_that_count(folder), (fault, change)
        if kind != "Ctrl-C" and change.call in ("write", "openat", "mkdir", "fsync"):
            assert f"could not be written to {folder} (" in ended.error, (fault, ended)
            assert words[kind] in ended.error and "earlier ones are whole" in ended.error


@pytest.mark.skipif(sys.platform != "linux", reason="needs a small file system")
def test_a_full_disk_is_free_again(tmp_path: Path) -> None:
    mounted = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)]
    if subprocess.run(mounted, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no right to mount a file system")
    try:
        model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(9)])
        optimizer = fastft.AdamW(model.parameters())
        fastft.save_fp32(model, optimizer, tmp_path, max_shard_size=20_000)
        used, files = shutil.disk_usage(tmp_path).used, set(os.listdir(tmp_path))
        with pytest.raises(OSError, match="No space left") as raised:
            fastft.save_fp32(model, optimizer, tmp_path, max_shard_size=20_000)
        assert raised.value.errno == errno.ENOSPC
        assert shutil.disk_usage(tmp_path).used == used and set(os.listdir(tmp_path)) == files
        fastft.load_fp32(model, optimizer, tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("")
    with pytest.raises(ValueError, match=r"path must be a folder, and .*weights is a file"):
        save(tmp_path / "weights", 1.0, 40)
    with pytest.raises(OSError, match=r"could not be written to .* \(.*Not a directory"):
        save(tmp_path / "weights" / "below", 1.0, 40)


@system_calls.needs_ptrace
def test_what_an_interrupted_first_save_leaves_is_no_save(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    ended = system_calls.run(lambda: save(folder, 1.0, 40), folder, system_calls.Fault(8, "Ctrl-C"))
    assert "KeyboardInterrupt" in ended.error and not list(folder.iterdir())
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
@pytest.mark.parametrize("size", ["one file", "three files"])
def test_a_file_that_was_cut_off_is_named_and_nothing_is_loaded(
    size: str, length: int, tmp_path: Path
) -> None:
    save(tmp_path, 1.0, SIZES[size])
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:length])
    model = Weights(0.0)
    with pytest.raises(ValueError, match=f"{file} is no whole safetensors file .* was cut off"):
        fastft.load_fp32(model, fastft.AdamW(model.parameters()), tmp_path)
    assert not any(param.any() for param in model.parameters())


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


def test_weights_of_another_step_than_the_moments_are_told(tmp_path: Path) -> None:
    def steps(model: Weights, optimizer: fastft.AdamW, number: int) -> None:
        for _ in range(number):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()

    model = Weights(1.0)
    optimizer = fastft.AdamW(model.parameters())
    steps(model, optimizer, 2)
    fastft.save_fp32(model, optimizer, tmp_path, max_shard_size=40)
    state = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastft.load_fp32(model, optimizer, tmp_path)
    steps(model, optimizer, 1)
    with pytest.warns(UserWarning, match="step 2, and its moments here are of step 3"):
        fastft.load_fp32(model, optimizer, tmp_path)
    again = Weights(0.0)
    resumed = fastft.AdamW(again.parameters())
    resumed.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastft.load_fp32(again, resumed, tmp_path)


def test_files_of_several_saves_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1.0, 40)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    tensors = safetensors_torch.load_file(file)
    safetensors_torch.save_file(tensors, file, metadata={"format": "pt", "step": "7"})
    model = Weights(0.0)
    with pytest.raises(ValueError, match=r"are of several saves, at the steps \[0, 7\]"):
        fastft.load_fp32(model, fastft.AdamW(model.parameters()), tmp_path)
    assert not any(param.any() for param in model.parameters())


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
