"""Folders of exact fp32 weights: what is loaded is what was saved, to the bit, or it raises and
changes nothing; whatever ends a save, the earlier weights or the new ones load.

Shards, tied and frozen weights, dtypes, NaN and Inf; saves over earlier ones that stop at any call
of the file system; damaged bytes, dtypes, names, shards and indices.
"""

from __future__ import annotations

import contextlib
import json
import pkgutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import safetensors.torch
import torch
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor, nn

import fastft

EXAMPLES = 60
INDEX = "model.safetensors.index.json"
# what save_fp32 does to a folder, and what may go wrong there
CALLS = ("os.replace", "os.fsync", "safetensors.torch.save_file", "pathlib.Path.unlink")
FAILURES: dict[str, BaseException] = {
    "full disk": OSError(28, "No space left on device"),
    "Ctrl-C": KeyboardInterrupt(),
}
DAMAGES = ("bytes", "cut", "gone", "dtype", "shape", "unknown", "other file", "outside", "twice")
DAMAGES += ("no map", "no index")
DTYPES = ("float32", "bfloat16")
# the 16 high bits of weights: Inf of both signs, NaNs with sign and payload
ODD = (0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFC1)


class Case(NamedTuple):
    dtype: str
    rounding: str
    steps: int
    saved_steps: int  # of the earlier save
    odd: list[tuple[int, int]]  # of the weights that are saved: which, and what it becomes
    shard: int  # bytes
    earlier_shard: int
    offload: str | None
    stop: tuple[str, int, str] | None  # which call of which name ends the second save, and how
    damage: list[tuple[str, int]]


CASES = st.builds(
    Case,
    dtype=st.sampled_from(DTYPES),
    rounding=st.sampled_from(["exact", "exact", "kahan", "stochastic"]),
    steps=st.integers(0, 2),
    saved_steps=st.integers(0, 2),
    odd=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(ODD)), max_size=3),
    shard=st.sampled_from([10**9, 2000, 1000]),
    earlier_shard=st.sampled_from([10**9, 2000, 1000]),
    offload=st.sampled_from([None, "states"]),
    stop=st.none()
    | st.tuples(st.sampled_from(CALLS), st.integers(0, 9), st.sampled_from(sorted(FAILURES))),
    damage=st.lists(st.tuples(st.sampled_from(DAMAGES), st.integers(0, 10**6)), max_size=2),
)


class Model(nn.Module):
    """Tied and frozen weights, and buffers whose numbers fp32 does not hold."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 8)
        self.inner = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.head = nn.Linear(8, 30, bias=False)
        self.to(dtype)
        self.head.weight = self.embed.weight
        self.inner[1].weight.requires_grad_(False)
        self.register_buffer("count", torch.tensor([2**24 + 1, 2**53 + 1]))
        self.register_buffer("third", torch.tensor([1 / 3], dtype=torch.float64))
        self.register_buffer("spectrum", torch.tensor([1 + 2j, 3 - 1j]))
        self.register_buffer("mask", torch.tensor([True, False]))


class Life(NamedTuple):
    model: Model
    optimizer: fastft.AdamW

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for param in self.model.parameters():
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        self.optimizer.step()

    def bits(self) -> dict[str, Tensor]:
        """All that it holds, as bytes."""
        states = self.optimizer.state_dict()["state"]
        held = dict(self.model.state_dict())
        held |= {f"{key} {name}": states[key][name] for key in states for name in states[key]}
        return {name: _bytes(torch.as_tensor(value)) for name, value in held.items()}


def _life(case: Case, steps: int) -> Life:
    model = Model(getattr(torch, case.dtype))
    options = {"rounding": case.rounding} if case.dtype == "bfloat16" else {}
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = fastft.AdamW(trained, lr=0.01, seed=1, offload=case.offload, **options)
    life = Life(model, optimizer)
    for number in range(steps):
        life.step(number)
    return life


def _spoil(model: Model, odd: list[tuple[int, int]]) -> None:
    params = list(model.parameters())
    for number, bits in odd:
        weight = params[number % len(params)].detach()
        # the half of a number that bf16 has lies behind the other
        each = weight.itemsize // 2
        halves = weight.view(torch.int16).flatten()[each - 1 :: each]
        halves[number % len(halves)] = bits - 2**16 * (bits >= 2**15)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).clone()


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check(case: Case) -> None:
    # the disk need not be waited for: nobody pulls the plug
    with tempfile.TemporaryDirectory() as name, mock.patch("os.fsync"):
        folder = Path(name)
        earlier, life = _life(case, case.saved_steps), _life(case, case.saved_steps + case.steps)
        fastft.save_fp32(*earlier, folder, max_shard_size=case.earlier_shard)
        candidates = [_read(folder)]
        _spoil(life.model, case.odd)
        before = life.bits()
        with _stopped(case.stop) as stopped:
            fastft.save_fp32(*life, folder, max_shard_size=case.shard)
        assert _same(life.bits(), before), "saving has changed what is trained"
        saved = _read(folder)
        if not stopped:
            _check_saved(saved, life)
            _check_no_rest(folder)
        else:
            fastft.save_fp32(*life, folder / "whole", max_shard_size=case.shard)
            candidates.append(_read(folder / "whole"))
            assert any(_same(saved, other) for other in candidates), "neither the old nor the new"
        _check_loading(case, folder, saved)
        for what, number in case.damage:
            _damage(folder, what, number)
        _check_damaged(case, folder, saved)


@contextlib.contextmanager
def _stopped(stop: tuple[str, int, str] | None) -> Iterator[list[str]]:
    """Lets a call of the file system fail; the list has it if it came."""
    came: list[str] = []
    if stop is None:
        yield came
        return
    name, left, why = stop
    original, calls = pkgutil.resolve_name(name), [left]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] -= 1
        if calls[0] >= 0:
            return original(*args, **kwargs)
        came.append(name)
        raise FAILURES[why]

    with mock.patch(name, failing), contextlib.suppress(OSError, KeyboardInterrupt):
        yield came


def _read(folder: Path) -> dict[str, Tensor]:
    """What a program that knows nothing of fastft reads there."""
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    else:
        file = safetensors.torch.load_file(folder / "model.safetensors")
        return {name: _bytes(value) for name, value in file.items()}
    files = {file: safetensors.torch.load_file(folder / file) for file in set(weight_map.values())}
    return {name: _bytes(files[file][name]) for name, file in weight_map.items()}


def _check_saved(saved: dict[str, Tensor], life: Life) -> None:
    """Rounded to the model's dtype they are its weights; what fp32 does not hold is as it was."""
    for name, value in life.model.state_dict().items():
        if name not in saved:
            assert name in ("head.weight", "embed.weight"), f"{name} is missing"
        elif value.dtype in (torch.bfloat16, torch.float32):
            master = saved[name].view(torch.float32).view(value.shape)
            # of a tie the compensation of Kahan's sum may be on either side; it makes NaNs quiet
            kahan = life.optimizer.rounding == "kahan"
            odd = ~value.isfinite()
            assert torch.allclose(master[odd], value[odd].float(), equal_nan=True)
            assert kahan or torch.equal(_bytes(master[odd]), _bytes(value[odd].float()))
            value, master = value[~odd], master[~odd]
            off = (master.to(value.dtype) - value).abs().max()
            limit = 2.0**-7 * value.abs().max() if kahan else 0.0
            assert off <= limit, f"{name} has another master"
        else:
            assert torch.equal(saved[name], _bytes(value)), f"{name} has changed"


def _check_no_rest(folder: Path) -> None:
    index = folder / INDEX
    named = {"model.safetensors"}
    if index.exists():
        named = {INDEX, *json.loads(index.read_text())["weight_map"].values()}
    assert {file.name for file in folder.iterdir()} == named, "files are left over"


def _check_loading(case: Case, folder: Path, saved: dict[str, Tensor]) -> None:
    """Another model of the same dtype, and one in fp32, saves what it has loaded."""
    for dtype in {case.dtype, "float32"}:
        loaded = _life(case._replace(dtype=dtype), 1)
        with torch.no_grad():
            loaded.model.count.zero_()
        fastft.load_fp32(*loaded, folder)
        exact = dtype == "float32" or case.rounding == "exact"
        if exact:
            fastft.save_fp32(*loaded, folder / dtype)
            frozen = "inner.1.weight"  # of which a bf16 model keeps no remainder
            again = _read(folder / dtype)
            assert again.keys() == saved.keys()
            for name in saved.keys() - {frozen}:
                assert torch.equal(again[name], saved[name]), f"{name} is not what was saved"
        loaded.step(5)


def _damage(folder: Path, what: str, number: int) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return
    file, index = files[number % len(files)], folder / INDEX
    if what in ("bytes", "cut", "gone"):
        content = bytearray(file.read_bytes())
        if what == "bytes" and content:
            content[number % len(content)] ^= 1 + number % 255
        file.write_bytes(content[: number % (len(content) + 1)] if what == "cut" else content)
        if what == "gone":
            file.unlink()
        return
    if what in INDICES:
        if index.exists():
            INDICES[what](index, file, number)
        return
    with contextlib.suppress(SafetensorError):
        tensors = safetensors.torch.load_file(file)
        name = sorted(tensors)[number % len(tensors)]
        tensors |= TENSORS[what](tensors, name, number)
        safetensors.torch.save_file(tensors, file)


TENSORS: dict[str, Callable[[dict[str, Tensor], str, int], dict[str, Tensor]]] = {
    "dtype": lambda tensors, name, number: {
        name: tensors[name].to((torch.float64, torch.int64, torch.float16)[number % 3])
    },
    "shape": lambda tensors, name, number: {name: tensors[name].flatten()[:1]},
    "unknown": lambda tensors, name, number: {"unknown": tensors[name].clone()},
}


def _in_map(index: Path, change: Callable[[dict[str, str]], None]) -> None:
    try:
        content = json.loads(index.read_text())
    except ValueError:  # other damage has emptied it
        return
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        change(content["weight_map"])
        index.write_text(json.dumps(content))


def _twice(index: Path, file: Path, number: int) -> None:
    """A tensor that the map has elsewhere is in this file too, with other numbers."""

    def change(weight_map: dict[str, str]) -> None:
        tensors = safetensors.torch.load_file(file)
        others = sorted(name for name in weight_map if name not in tensors)
        if others:
            place = index.parent / weight_map[others[0]]
            other = safetensors.torch.load_file(place)[others[0]]
            safetensors.torch.save_file({**tensors, others[0]: torch.zeros_like(other)}, file)

    with contextlib.suppress(SafetensorError, FileNotFoundError, TypeError):
        _in_map(index, change)


def _outside(index: Path, file: Path, number: int) -> None:
    """The map names a file of another folder, which is there."""
    other = index.parent / "elsewhere"
    other.mkdir(exist_ok=True)
    if file.exists():
        (other / file.name).write_bytes(file.read_bytes())

    def change(weight_map: dict[str, str]) -> None:
        for name, of in list(weight_map.items()):
            if of == file.name:
                weight_map[name] = f"{('elsewhere', other)[number % 2]}/{file.name}"

    _in_map(index, change)


def _other_file(index: Path, file: Path, number: int) -> None:
    def change(weight_map: dict[str, str]) -> None:
        weight_map[sorted(weight_map)[number % len(weight_map)]] = file.name

    _in_map(index, change)


def _no_map(index: Path, file: Path, number: int) -> None:
    contents = ("{}", "[]", '{"weight_map": [1]}', "", '{"weight_map": {"a": 1}}')
    index.write_text(contents[number % len(contents)])


INDICES: dict[str, Callable[[Path, Path, int], None]] = {
    "other file": _other_file,
    "outside": _outside,
    "twice": _twice,
    "no map": _no_map,
    "no index": lambda index, file, number: index.unlink(),
}


def _check_damaged(case: Case, folder: Path, saved: dict[str, Tensor]) -> None:
    """It raises, and nothing has changed; or all of it is loaded, and each number is the file's."""
    loaded = _life(case._replace(dtype="float32"), 1)
    before = loaded.bits()
    try:
        fastft.load_fp32(*loaded, folder)
    except (ValueError, FileNotFoundError, SafetensorError) as error:
        assert str(error), "an error says nothing"
        assert _same(loaded.bits(), before), "half of it is loaded"
    else:
        _check_taken(folder, loaded)
    loaded.step(6)


def _check_taken(folder: Path, loaded: Life) -> None:
    index = folder / INDEX
    if index.exists():
        files = json.loads(index.read_text())["weight_map"].values()
        assert all(Path(file).name == file for file in files), "a file outside of the folder"
    files_have = _read(folder)
    for name, value in loaded.model.state_dict().items():
        tied = {"head.weight": "embed.weight", "embed.weight": "head.weight"}.get(name, name)
        found = files_have.get(name, files_have.get(tied))
        assert found is not None, f"{name} is in no file"
        if found.numel() == value.numel() * value.element_size():
            if value.dtype == torch.bool:  # true by any byte but 0
                found = (found != 0).to(found.dtype)
            assert torch.equal(_bytes(value), found), f"{name} is not the file's"
