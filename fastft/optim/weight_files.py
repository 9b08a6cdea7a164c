"""A folder of safetensors files, as `save_pretrained` writes them, that survives a crash.

It leaves the old files or the new ones. New files are written aside, into a folder of their own,
made durable, and then take their places; the one rename that makes them count comes last, and only
then what they replace is removed. Between two saves of several shards the shards' names differ,
because the index of the earlier save still counts while they arrive. A save that fails removes its
files; one that is killed leaves them to the next, with whatever names safetensors has given them in
the folder aside.

What counts: the files that `model.safetensors.index.json` names; without an index
`model.safetensors`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model(-\d+)?(-\d{5}-of-\d{5})\.safetensors")
_ASIDE = "save_fp32.part"  # a folder


class Header(NamedTuple):
    """The place and form of a saved tensor; `dtype` under safetensors' name.

    `step`: how many the optimizer had taken; None in files of others.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    step: int | None


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Makes the folder, and one aside that is gone in the end, as is one that was there.

    Raises:
        OSError: what keeps files from being written there, with its number.
    """
    from safetensors import SafetensorError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_aside(folder)
        (folder / _ASIDE).mkdir()
        yield
    except (OSError, SafetensorError) as error:
        text = f"the weights could not be written to {folder} ({error}); earlier ones are whole"
        number = _number(error)
        raise (OSError(number, text) if number else OSError(text)) from error
    finally:
        _remove_aside(folder)


def write_aside(folder: Path, file: str, tensors: Mapping[str, Tensor], step: int) -> None:
    """Writes, with the optimizer's step, what `publish` will put into the place of `file`."""
    from safetensors.torch import save_file

    aside = folder / _ASIDE / file
    save_file(dict(tensors), aside, metadata={"format": "pt", "step": str(step)})
    _sync(aside)


def publish(folder: Path, weight_map: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
    """Makes the files written aside those that count, and removes earlier ones.

    Args:
        folder: where they are.
        weight_map: the file of each tensor; one file is called `SINGLE`.
        metadata: of the index of several.
    """
    files = sorted(set(weight_map.values()))
    single = files == [SINGLE]
    final = {SINGLE: SINGLE} if single else _free_names(folder, files)
    try:
        for file in files:
            os.replace(folder / _ASIDE / file, folder / final[file])
        _sync(folder)
        if single:
            # with an earlier save's index its shards count until here
            (folder / INDEX).unlink(missing_ok=True)
        else:
            index = {
                "metadata": dict(metadata),
                "weight_map": {name: final[file] for name, file in weight_map.items()},
            }
            aside = folder / _ASIDE / INDEX
            aside.write_text(json.dumps(index, indent=2) + "\n")
            _sync(aside)
            os.replace(aside, folder / INDEX)
        _sync(folder)
    finally:
        # the earlier files, or if something has failed the new ones
        _remove_those_that_do_not_count(folder)


def read_headers(folder: Path) -> dict[str, Header]:
    """Reads the place and form of each saved tensor that counts.

    Raises:
        FileNotFoundError: there are no weights, or a file which the index names is missing.
        ValueError: an index that is none, names a file outside the folder, or one which lacks a
            tensor.
    """
    weight_map = _weight_map(folder)
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    if absent := [name for name in names if not (folder / name).exists()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, which save_fp32 writes")
    headers = {}
    for file in names:
        with opened(folder / file) as weights:
            step = (weights.metadata() or {}).get("step", "")
            saved = int(step) if step.isdecimal() else None
            for name in weights.keys():
                if weight_map is None or weight_map.get(name) == file:
                    part = weights.get_slice(name)
                    form = tuple(part.get_shape()), part.get_dtype()
                    headers[name] = Header(folder / file, *form, saved)
    if absent := [
        f"{name} ({file})" for name, file in (weight_map or {}).items() if name not in headers
    ]:
        raise ValueError(
            f"{folder / INDEX} names tensors that their files lack: {', '.join(absent)}"
        )
    return headers


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Opens a safetensors file.

    Raises:
        ValueError: it is none, or not all of one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        weights = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no whole safetensors file ({error}): it was cut off, or damaged; take "
            "another save"
        ) from error
    with weights as content:
        yield content


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The file of each tensor as the index has it; None without an index."""
    index = folder / INDEX
    if not index.exists():
        return None
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} has no weight_map from tensors to files ({type(error).__name__}: {error})"
        ) from None
    for file in files:
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise ValueError(f"{index} must name files of its own folder, names {file!r}")
    return dict(weight_map)


def _free_names(folder: Path, files: list[str]) -> dict[str, str]:
    """A name for each shard that no file in the folder has: its own, or one with a number."""
    final, number = {file: file for file in files}, 1
    while any((folder / name).exists() for name in final.values()):
        number += 1
        final = {file: _SHARD.sub(rf"model-{number}\2.safetensors", file) for file in files}
    return final


def _remove_those_that_do_not_count(folder: Path) -> None:
    try:
        weight_map = _weight_map(folder)
    except ValueError:
        return  # somebody else's index, and a failed save
    count = {SINGLE} if weight_map is None else set(weight_map.values())
    for file in list(folder.iterdir()):
        if (file.name == SINGLE or _SHARD.fullmatch(file.name)) and file.name not in count:
            file.unlink(missing_ok=True)


def _remove_aside(folder: Path) -> None:
    shutil.rmtree(folder / _ASIDE, ignore_errors=True)


def _number(error: Exception) -> int | None:
    """The system's number of an error, which Rust has in its words alone."""
    found = re.search(r"os error (\d+)", str(error))
    return error.errno if isinstance(error, OSError) else found and int(found[1])


def _sync(path: Path) -> None:
    """Makes a file's content, or a folder's names, outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
