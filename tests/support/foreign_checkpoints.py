"""AdamW checkpoints of bitsandbytes, apex and Transformer Engine, and what each stands for."""

from __future__ import annotations

import torch

from support.adamw_steps import start

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
