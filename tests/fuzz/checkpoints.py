"""Damaged state dicts and files of weights: each loads whole, or raises and changes nothing.

Whole: every entry is there afterwards as it was given, the undamaged ones to the bit.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import fastft

EXAMPLES = 100
# of a step, of a hyper-parameter and of tensors alike
ODD: dict[str, Any] = {
    "None": None,
    "text": "x",
    "True": True,
    "minus": -5.0,
    "half": 1.5,
    "large": 1e300,
    "too large": 2**2000,
    "nan": float("nan"),
    "inf": float("inf"),
    "list": [1, 2],
    "twice": [0, 0],
    "nested": [[0], [1]],
    "empty": torch.empty(0),
    "scalar": torch.tensor(3.0),
    "complex scalar": torch.tensor(1 + 2j),
    "shorter": torch.ones(2, 3),
    "turned": torch.ones(130, 3),
    "scales": torch.ones(3, 2),
}
# of the parameter's shape
SHAPED: dict[str, Callable[[torch.Size], Tensor]] = {
    **{
        name: lambda shape, name=name: torch.ones(shape, dtype=getattr(torch, name))
        for name in ("int64", "int16", "int8", "uint8", "float64", "float16", "bfloat16")
    },
    "complex": lambda shape: torch.ones(shape, dtype=torch.complex64),
    "meta": lambda shape: torch.ones(shape, device="meta"),
    "sparse": lambda shape: torch.ones(shape).to_sparse(),
    "below zero": lambda shape: -torch.ones(shape),
    "huge": lambda shape: torch.full(shape, 3e38),
    "huge float64": lambda shape: torch.full(shape, 1e39, dtype=torch.float64),
    "NaNs": lambda shape: torch.full(shape, float("nan")),
    "Infs": lambda shape: torch.full(shape, float("inf")),
}
SHAPES = (torch.Size([3, 130]), torch.Size([3]))
# without these a state means nothing
NEEDED = ("step", "exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
RESIDUES = {"exact": "remainder", "kahan": "kahan"}
OF_STATES = (*NEEDED, *SCALES, *RESIDUES.values(), "master_param", "max_exp_avg_sq")
OF_GROUPS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "capturable", "seed")
OF_GROUPS += ("moments", "params")
WHOLE = ("state", "param_groups", "weight_checksums")
# of the optimizer that is saved: the one that loads has others
SAVED = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "maximize": True}


class Case(NamedTuple):
    moments: str
    dtype: str
    rounding: str
    amsgrad: bool
    offload: str | None
    damage: list[tuple[str, int, str]]  # entry, of which parameter, what it becomes
    bytes: list[tuple[float, int]]  # place in the file of weights, the byte there
    length: float  # what is left of the file


CASES = st.builds(
    Case,
    moments=st.sampled_from(["fp32", "bf16", "8bit", "4bit"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    rounding=st.sampled_from(sorted(RESIDUES)),
    amsgrad=st.booleans(),
    offload=st.sampled_from([None, "states"]),
    damage=st.lists(
        st.tuples(
            st.sampled_from(OF_STATES) | st.sampled_from(OF_GROUPS) | st.sampled_from(WHOLE),
            st.integers(0, 1),
            st.just("gone") | st.sampled_from([*ODD, *SHAPED]),
        ),
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


def _trained(case: Case, number: int, **options: Any) -> tuple[nn.Linear, fastft.AdamW]:
    torch.manual_seed(number)
    model = nn.Linear(130, 3).to(getattr(torch, case.dtype))
    options |= {"moments": case.moments, "offload": case.offload, "rounding": case.rounding}
    optimizer = fastft.AdamW(model.parameters(), seed=number, **options)
    for _ in range(number):
        _step(model, optimizer)
    return model, optimizer


def _step(model: nn.Linear, optimizer: fastft.AdamW) -> None:
    for param in model.parameters():
        param.grad = torch.randn(param.shape).to(param.dtype)
    optimizer.step()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return same and (a.is_meta or torch.equal(_bytes(a), _bytes(b)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b or (a != a and b != b)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().to_dense().contiguous().flatten().view(torch.uint8)  # NaN is itself


def _check_state_dict(case: Case) -> None:
    amsgrad = case.amsgrad and case.moments in ("fp32", "bf16")
    _, saved = _trained(case, 2, **SAVED, amsgrad=amsgrad)
    model, optimizer = _trained(case, 3)
    damaged = copy.deepcopy(saved.state_dict())
    _damage(damaged, case)
    weights = [param.detach().clone() for param in model.parameters()]
    before, given = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(damaged)
    try:
        optimizer.load_state_dict(damaged)
    except (ValueError, TypeError) as error:
        assert str(error), "an error says nothing"
        # without an error the optimizer goes on with these tensors, as torch's do
        assert _same(given, damaged), "what was given has been changed"
        assert _same(before, optimizer.state_dict()), "an error has left something behind"
        assert _same(weights, list(model.parameters()))
    else:
        _check_group(case, given["param_groups"][0], optimizer)
        held = optimizer.state_dict()
        for place, key in enumerate(given["param_groups"][0]["params"]):
            param = list(model.parameters())[place]
            loaded, whole = held["state"].get(place, {}), dict(given["state"].get(key, {}))
            master = _check_state(case, param.shape, whole, loaded, amsgrad=_amsgrad_of(given))
            _check_weight(param, weights[place], master)
            checksum = given.get("weight_checksums", {}).get(key)
            if checksum is not None and master is None and RESIDUES[case.rounding] in loaded:
                assert held["weight_checksums"][place] == checksum, "another checksum"
    _step(model, optimizer)


def _damage(state_dict: dict[str, Any], case: Case) -> None:
    # the states last, of which there may be none then
    for entry, number, what in sorted(case.damage, key=lambda each: each[0] in WHOLE):
        group, state = state_dict["param_groups"][0], state_dict["state"][number]
        held = state_dict if entry in WHOLE else group if entry in OF_GROUPS else state
        if what == "gone":
            held.pop(entry, None)
        else:
            held[entry] = ODD[what] if what in ODD else SHAPED[what](SHAPES[number])
        if entry in WHOLE:
            return


def _amsgrad_of(given: dict[str, Any]) -> bool:
    return given["param_groups"][0].get("amsgrad", False)


def _check_group(case: Case, given: dict[str, Any], optimizer: fastft.AdamW) -> None:
    held = optimizer.state_dict()["param_groups"][0]
    for name in set(OF_GROUPS) - {"params", "moments"}:
        expected = given.get(name, optimizer.defaults[name])
        if name == "capturable" and case.offload:
            expected = False  # with which it does not go
        assert _same(expected, held[name]), f"{name} of the group is not what was given"
    assert held["moments"] == case.moments


def _check_state(
    case: Case, shape: torch.Size, given: dict[str, Any], loaded: dict[str, Any], amsgrad: bool
) -> Tensor | None:
    """Raises unless all that was given is loaded; returns the master among it."""
    if not given:
        assert not loaded
        return None
    coded = case.moments in ("8bit", "4bit") and shape == SHAPES[0]
    needed = NEEDED + (SCALES if coded else ()) + (("max_exp_avg_sq",) if amsgrad else ())
    lost = [name for name in needed if name not in given]
    assert not lost, f"a state without its {', '.join(lost)} is loaded"
    master = given.pop("master_param", None)
    if master is not None and master.dtype == torch.int16:  # TransformerEngine's remainder
        given["remainder"], master = master, None
    residue = RESIDUES[case.rounding] if case.dtype == "bfloat16" else None
    for name, value in given.items():
        if name in RESIDUES.values() and (name != residue or master is not None):
            continue
        assert _same(_as_kept(name, value, loaded[name]), loaded[name]), f"{name} is another"
    if residue and residue not in given and master is None:
        assert not loaded[residue].any(), f"{residue} out of nothing"
    return master


def _as_kept(name: str, value: Any, kept: Any) -> Any:
    if name == "step":
        return torch.tensor(float(value), dtype=torch.float32)
    return value.view(kept.dtype) if name == "remainder" else value.to(kept.dtype)


def _check_weight(param: Tensor, before: Tensor, master: Tensor | None) -> None:
    # none of the odd ones is a tie
    expected = before if master is None else master.float().to(param.dtype)
    assert _same(expected, param), "a weight is not what was given"


def _check_weights(case: Case) -> None:
    """Of files, whose numbers another program reads."""
    exact = case._replace(rounding="exact")
    model, optimizer = _trained(exact, 3)
    with tempfile.TemporaryDirectory() as folder:
        fastft.save_fp32(*_trained(exact, 2), folder)
        (file,) = Path(folder).glob("*.safetensors")
        content = bytearray(file.read_bytes())
        for place, byte in case.bytes:
            content[min(int(place * len(content)), len(content) - 1)] = byte
        file.write_bytes(content[: int(case.length * len(content))])
        before = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
        try:
            fastft.load_fp32(model, optimizer, folder)
        except (ValueError, TypeError, SafetensorError):
            after = optimizer.state_dict(), model.state_dict()
            assert _same(before, after), "half of it is loaded"
        else:
            masters = load_file(file)
            moments = before[0]["state"], optimizer.state_dict()["state"]
            for place, (name, param) in enumerate(model.named_parameters()):
                old, new = (states[place] for states in moments)
                held = _joined(param.detach(), new.get("remainder"))
                _check_master(masters[name], held, param.dtype)
                for entry in old.keys() - {"remainder"}:
                    assert _same(old[entry], new[entry]), f"{entry} has changed"
    _step(model, optimizer)


def _joined(weight: Tensor, remainder: Tensor | None) -> Tensor:
    """The bits of a weight in fp32."""
    if remainder is None:
        return weight.view(torch.int32)
    return (weight.view(torch.int16).int() << 16) + remainder.view(torch.int16).int()


def _check_master(master: Tensor, held: Tensor, dtype: torch.dtype) -> None:
    nan = master.isnan()
    if dtype == torch.bfloat16:  # whose NaN has another payload
        assert torch.equal(nan, held.view(torch.float32).isnan())
        master = master.masked_fill(nan, 0.0)
        held = held.masked_fill(nan, 0)
    assert torch.equal(master.view(torch.int32), held), "a weight is not the file's"
