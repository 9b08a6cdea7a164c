"""Damaged state dicts and files of weights: each loads whole, or raises and changes nothing."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn

import fastft

EXAMPLES = 60
# of a step, of a learning rate and of tensors alike
ODD: dict[str, Any] = {
    "gone": None,
    "None": None,
    "text": "x",
    "minus": -5.0,
    "half": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "list": [1, 2],
    "empty": torch.empty(0),
    "scalar": torch.tensor(3.0),
    "shorter": torch.ones(2, 3),
    "turned": torch.ones(130, 3),
    "int64": torch.ones(3, 130, dtype=torch.int64),
    "int8": torch.ones(3, 130, dtype=torch.int8),
    "uint8": torch.ones(3, 130, dtype=torch.uint8),
    "float64": torch.ones(3, 130, dtype=torch.float64),
    "complex": torch.ones(3, 130, dtype=torch.complex64),
    "meta": torch.ones(3, 130, device="meta"),
    "scales": torch.ones(3, 2),
    "huge": torch.full((3, 130), 3e38),
}
# without these a state means nothing
NEEDED = ("step", "exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
ENTRIES = ("step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "remainder")
ENTRIES += ("master_param", "kahan", "max_exp_avg_sq", "lr", "betas", "moments", "seed", "params")


class Case(NamedTuple):
    moments: str
    dtype: str
    offload: str | None
    damage: list[tuple[str, str]]  # entry, what it becomes
    bytes: list[tuple[float, int]]  # place in the file of weights, the byte there
    length: float  # what is left of the file


CASES = st.builds(
    Case,
    moments=st.sampled_from(["fp32", "bf16", "8bit", "4bit"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    offload=st.sampled_from([None, "states"]),
    damage=st.lists(
        st.tuples(st.sampled_from(ENTRIES), st.just("gone") | st.sampled_from(sorted(ODD))),
        min_size=1,
        max_size=3,
    ),
    bytes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    length=st.just(1.0) | st.floats(0, 1),
)


def check(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check_state_dict(case)
        _check_weights(case)


def _trained(case: Case) -> tuple[nn.Linear, fastft.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(130, 3).to(getattr(torch, case.dtype))
    optimizer = fastft.AdamW(model.parameters(), moments=case.moments, offload=case.offload)
    _step(model, optimizer)
    return model, optimizer


def _step(model: nn.Linear, optimizer: fastft.AdamW) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return same and (a.is_meta or torch.equal(_bytes(a), _bytes(b)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b or (a != a and b != b)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)  # NaN is itself


def _check_state_dict(case: Case) -> None:
    model, optimizer = _trained(case)
    damaged = copy.deepcopy(optimizer.state_dict())
    for entry, what in case.damage:
        of_group = entry in damaged["param_groups"][0]
        held = damaged["param_groups"][0] if of_group else damaged["state"][0]
        if what == "gone":
            held.pop(entry, None)
        else:
            held[entry] = ODD[what]
    before = copy.deepcopy((optimizer.state_dict(), list(model.parameters())))
    given = copy.deepcopy(damaged)
    try:
        optimizer.load_state_dict(damaged)
    except (ValueError, TypeError) as error:
        assert str(error), "an error says nothing"
        # without an error the optimizer goes on with these tensors, as torch's do
        assert _same(given, damaged), "what was given has been changed"
        after = optimizer.state_dict(), list(model.parameters())
        assert _same(before[0], after[0]), "an error has left something behind"
        assert _same([p.detach() for p in before[1]], [p.detach() for p in after[1]])
    else:
        needed = NEEDED + (SCALES if case.moments in ("8bit", "4bit") else ())
        lost = [name for name in needed if name not in given["state"][0]]
        assert not lost, f"a state without its {', '.join(lost)} is loaded"
    _step(model, optimizer)


def _check_weights(case: Case) -> None:
    model, optimizer = _trained(case)
    with tempfile.TemporaryDirectory() as folder:
        fastft.save_fp32(model, optimizer, folder)
        (file,) = Path(folder).glob("*.safetensors")
        content = bytearray(file.read_bytes())
        for place, byte in case.bytes:
            content[min(int(place * len(content)), len(content) - 1)] = byte
        file.write_bytes(content[: int(case.length * len(content))])
        before = copy.deepcopy([p.detach() for p in model.parameters()])
        try:
            fastft.load_fp32(model, optimizer, folder)
        except (ValueError, TypeError, SafetensorError):
            assert _same(before, [p.detach() for p in model.parameters()]), "half of it is loaded"
    _step(model, optimizer)
