"""AdamW checkpoints of other libraries: made by bitsandbytes and torchao themselves, or after the
sources of apex and Transformer Engine; and what each stands for.

    PYTHONPATH=.:tests python -m support.foreign_checkpoints tests/fixtures/foreign

keeps some of those of bitsandbytes, for where it is not installed (0.50.2 made those that are
there).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.adamw_steps import Shapes, clones, gradients, on_disk, start, train

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "foreign"
KEPT = ["AdamW8bit", "AdamW32bit"]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
# codes in bitsandbytes (no whole blocks) and torchao, none in either, and of two dimensions
GENUINE_SHAPES: Shapes = [(70, 73), (63,), (64, 96)]

# the first is large enough for 8-bit states in bitsandbytes, and no whole blocks
SHAPES = [(70, 73), (63,), (507,)]


def bitsandbytes_state(nested, block):
    """A state as bitsandbytes writes it, and what it stands for: code by code, in float64."""
    generator = torch.Generator().manual_seed(4)
    state, truth = {}, {}
    for index, shape in enumerate(SHAPES):
        size = torch.Size(shape).numel()
        entries, truth[index] = {}, {}
        for number, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
            if size < 4096:
                truth[index][name] = torch.rand(shape, generator=generator)
                entries["state" + number] = truth[index][name]
                continue
            codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            levels = torch.linspace(-1 if number == "1" else 0, 1, 256)
            absmax = torch.rand(-(-size // block), generator=generator)
            entries |= {"state" + number: codes, "qmap" + number: levels, "absmax" + number: absmax}
            pairs = enumerate(codes.flatten().tolist())
            values = [levels[code].double() * absmax[i // block].double() for i, code in pairs]
            truth[index][name] = torch.stack(values).float().view(shape)
        entries = {"__bnb_optimizer_quant_state__": entries} if nested else entries
        state[index] = {"step": 7, **entries}
    group = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    group |= {"alpha": 0.0, "t_alpha": None, "t_beta3": None, "params": [0, 1, 2]}
    return {"state": state, "param_groups": [group]}, truth


def mixed_precision_states():
    """fp32 masters which bf16 drops bits of, one of them a tie that bf16 rounds to even, and AdamW
    states."""
    masters = [param.detach() for param in start(SHAPES, seed=9)]
    masters[1][0] = 1 + 2**-8
    moments = [{"exp_avg": torch.rand(shape), "exp_avg_sq": torch.rand(shape)} for shape in SHAPES]
    return masters, moments


def apex_group(**more):
    usual = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    return {**usual, "bias_correction": True, **more}


def with_masters(form, masters, moments):
    """A checkpoint after five steps whose masters stand in the group or are FP16_Optimizer's, as of
    apex, or are each parameter's `master_param`, as of Transformer Engine."""
    params = list(range(len(masters)))
    stepped = {i: {**state, "step": 5} for i, state in enumerate(moments)}
    if form == "group":
        groups = [apex_group(step=5, params=params, master=masters)]
        return {"state": dict(enumerate(moments)), "param_groups": groups}
    if form == "FP16_Optimizer":
        inner = {"state": stepped, "param_groups": [apex_group(params=params)]}
        return {"loss_scaler": None, "optimizer_state_dict": inner, "fp32_from_fp16": [masters]}
    state = {i: {**stepped[i], "master_param": master} for i, master in enumerate(masters)}
    return {"state": state, "param_groups": [apex_group(params=params)]}


class Genuine(NamedTuple):
    """What an optimizer of another library saved after three steps, and its next step.

    `moments` are m and v of each parameter, as the library itself reads its codes.
    """

    saved: dict[str, Any]
    weights: list[Tensor]
    moments: list[list[Tensor]]
    gradients: list[Tensor]
    next_weights: list[Tensor]


def genuine(name: str, dtype: torch.dtype, shapes: Shapes = GENUINE_SHAPES) -> Genuine:
    """A checkpoint made by the class of this full name."""
    module, _, kind = name.rpartition(".")
    optimizer = getattr(importlib.import_module(module), kind)(start(shapes, dtype), **OPTIONS)
    # torchao compiles its step, which takes longer than all of this
    stance = torch.compiler.set_stance("force_eager")
    with stance:
        params = train(optimizer, gradients(shapes, 3))
        saved = on_disk(optimizer.state_dict())
        weights = [param.detach() for param in clones(params)]
        numbers = _of_bitsandbytes if module.startswith("bitsandbytes") else _of_torchao
        moments = [numbers(optimizer.state[param]) for param in params]
        (last,) = gradients(shapes, 1, seed=5)
        train(optimizer, [last])
    last = [grad.to(dtype) for grad in last]
    return Genuine(saved, weights, moments, last, [param.detach() for param in params])


def _of_bitsandbytes(state: dict[str, Any]) -> list[Tensor]:
    from bitsandbytes.functional import dequantize_blockwise

    return [
        dequantize_blockwise(
            state[f"state{i}"], absmax=state[f"absmax{i}"], code=state[f"qmap{i}"], blocksize=256
        )
        if state[f"state{i}"].dtype == torch.uint8
        else state[f"state{i}"].clone()
        for i in "12"
    ]


def _of_torchao(state: dict[str, Any]) -> list[Tensor]:
    pair = state["exp_avg"], state["exp_avg_sq"]
    return [(each.dequantize() if hasattr(each, "scale") else each).clone() for each in pair]


def next_weights(made: Genuine) -> list[Tensor]:
    """The fourth step from its moments, in float64."""
    beta1, beta2 = OPTIONS["betas"]
    found = []
    for weight, (m, v), grad in zip(made.weights, made.moments, made.gradients, strict=True):
        g = grad.double()
        m = (beta1 * m.double() + (1 - beta1) * g) / (1 - beta1**4)
        v = (beta2 * v.double() + (1 - beta2) * g * g) / (1 - beta2**4)
        decayed = weight.double() * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
        found.append(decayed - OPTIONS["lr"] * m / (v.sqrt() + OPTIONS["eps"]))
    return found


if __name__ == "__main__":
    for each in KEPT:
        kept = genuine(f"bitsandbytes.optim.{each}", torch.float32, [(33, 125), (63,)])
        torch.save(kept._asdict(), Path(sys.argv[1]) / f"bitsandbytes-{each}.pt")
