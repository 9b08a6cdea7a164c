"""What AdamW promises, one test for each promise: those that one process on a CPU can keep.

The bits of the GPU kernels in every mode, and CUDA graphs themselves, are in test_adamw_ptx.py and
test_gpu.py; DDP, FSDP2 and torch.distributed.checkpoint need two processes:
test_distributed_adamw.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import foreign_checkpoints, ptx
from support.adamw_digest import digest
from support.adamw_modes import MODES, WITH_AMSGRAD
from support.adamw_steps import (
    ENGINES,
    OPTIONS,
    assert_same,
    assert_same_bits,
    clones,
    gradients,
    needs_native,
    on_disk,
    params_of,
    snapshot,
    start,
    train,
)
from support.adamw_trainers import arguments, biased_llama, examples
from support.foreign_checkpoints import bitsandbytes_state, mixed_precision_states, with_masters
from support.numerics import assert_no_worse
from support.ptx.engines import cuda_for_cpp, require_cuda
from support.trainers import Curve
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainerCallback

import fastft
from fastft.optim import device_counts
from fastft.optim.moment_codes import CODES

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(512,), (63, 3), (1,)]
ODD = [(1,), (63,), (507,), (0,), (3, 5, 7), (), (2000,), (70, 130), (4099,)]
ALL = MODES | WITH_AMSGRAD
IN_EVERY_MODE = pytest.mark.parametrize("mode", ALL)
FOREIGN = foreign_checkpoints.SHAPES
BY_EVERY_ENGINE = pytest.mark.parametrize("impl", ENGINES)


def leaves(shapes=SHAPES, dtype=FP32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype))
        for shape in shapes
    ]


def made(mode, shapes=SHAPES, **options):
    return fastft.AdamW(
        leaves(shapes, ALL[mode].dtype), **{"lr": 1e-2, "seed": 11, **ALL[mode].options, **options}
    )


def give(optimizer, step, scale=1.0):
    """Gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = (
                (scale * torch.randn(param.shape, generator=generator)).bfloat16().to(param.dtype)
            )


def run(optimizer, first, last):
    for step in range(first, last):
        give(optimizer, step)
        optimizer.step()
    return optimizer


def everything(optimizer):
    """Parameters and states."""
    entries = [sorted(entries.items()) for entries in snapshot(optimizer)]
    return [tensor for each in entries for _, tensor in each]


def assert_same_training(left, right):
    assert_same_bits(everything(left), everything(right))


AMSGRADS = [(mode, False) for mode in MODES] + [
    (mode, True) for mode, kept in MODES.items() if kept.moments not in CODES
]


@needs_native
@pytest.mark.parametrize(("mode", "amsgrad"), AMSGRADS)
def test_every_engine_has_the_same_bits(mode, amsgrad):
    options = {"amsgrad": amsgrad, "maximize": amsgrad, "seed": 2**62 + 11}
    optimizers = [made(mode, ODD, impl=impl, **options) for impl in ("eager", "cpp")]
    for optimizer in optimizers:
        train(optimizer, gradients(ODD, 6))
    assert_same(*map(snapshot, optimizers))


@BY_EVERY_ENGINE
@pytest.mark.parametrize("options", OPTIONS)
def test_no_worse_than_torch_with_every_option(impl, options, poisoned_empty):
    grads = gradients(ODD, 12)
    if "amsgrad" in options:  # what it is for: the largest second moment is an old one
        grads = [[grad * 0.5**step for grad in row] for step, row in enumerate(grads)]
    ours = fastft.AdamW(start(ODD), impl=impl, **options)
    plain = torch.optim.AdamW(start(ODD), **options)
    truth = torch.optim.AdamW(clones(start(ODD), torch.float64), **options)
    for optimizer in (ours, plain, truth):
        train(optimizer, grads)
    for name in {"weight", "exp_avg", "exp_avg_sq"} | (
        {"max_exp_avg_sq"} & plain.state[params_of(plain)[0]].keys()
    ):
        for actual, torchs, exact in zip(*map(snapshot, (ours, plain, truth)), strict=True):
            assert_no_worse(actual[name], torchs[name], exact[name], name, terms=len(grads))


class Calls(TorchDispatchMode):
    """Counts what passes torch's dispatcher: operations, fastft's among them, elements of the
    largest new tensor."""

    def __init__(self):
        super().__init__()
        self.all = self.ours = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += 1
        self.ours += func.namespace == "fastft"
        result = func(*args, **(kwargs or {}))
        self.elements = max(
            self.elements, result.numel() if isinstance(result, torch.Tensor) else 0
        )
        return result


@needs_native
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_one_launch_a_step_for_any_number_of_tensors(max_grad_norm):
    counted = []
    for count in (3, 300):
        groups = [
            {"params": leaves([(5,)] * count)},
            {"params": leaves([(7, 3)] * count, BF16), "lr": 0.1, "betas": (0.8, 0.9)},
        ]
        optimizer = run(fastft.AdamW(groups, max_grad_norm=max_grad_norm, amsgrad=True), 0, 2)
        give(optimizer, 2)
        with Calls() as calls:
            optimizer.step()
        assert calls.ours == 1
        counted.append(calls.all)
    assert counted[0] == counted[1]


@needs_native
@IN_EVERY_MODE
def test_bytes_resident_and_moved(mode):
    resident, moved = ALL[mode].resident, ALL[mode].moved
    optimizer = run(made(mode, [(512, 512)], max_grad_norm=0.5), 0, 2)
    (param,), (state,) = optimizer.param_groups[0]["params"], optimizer.state.values()
    kept = [param, *(value for name, value in state.items() if name != "step")]
    bytes_kept = sum(tensor.numel() * tensor.element_size() for tensor in kept) / param.numel()
    assert bytes_kept + param.grad.element_size() == resident
    # kept is read and written, the gradient read
    assert 2 * bytes_kept + param.grad.element_size() == moved
    before = [tensor.data_ptr() for tensor in kept]
    with Calls() as calls:
        optimizer.step()  # takes the norm as well
    assert [tensor.data_ptr() for tensor in kept] == before
    assert calls.elements < 64  # no copy of anything


@BY_EVERY_ENGINE
@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit", "4bit"])
def test_second_moments_of_bf16_parameters_decay(moments, impl):
    param = nn.Parameter(torch.ones(32, 128, dtype=BF16))
    optimizer = fastft.AdamW([param], moments=moments, seed=4, impl=impl)

    def second():
        return optimizer.torch_state_dict()["state"][0]["exp_avg_sq"].double()

    param.grad = torch.rand(32, 128).add(0.5).bfloat16()
    optimizer.step()
    first = second()
    param.grad = torch.zeros_like(param)
    for _ in range(300):
        optimizer.step()
    # rounded to nearest, bf16 would stand still
    assert float(second().mean() / first.mean()) == pytest.approx(0.999**300, rel=0.02)
    if moments == "fp32":
        assert optimizer.state[param]["exp_avg_sq"].dtype == FP32
        torch.testing.assert_close(second(), first * 0.999**300, rtol=1e-3, atol=0)


def test_exact_fp32_master_at_two_more_bytes():
    value = torch.randn(512)
    value[:8] = torch.tensor([1e-38, -3e-39, 9.2e-41, 0.0, 1 - 2**-8, 1 + 2**-7, -2.0, 255.0])
    narrow = nn.Parameter(value.bfloat16())
    wide = nn.Parameter(narrow.detach().float())
    # elsewhere it contracts products
    torchs_bits = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    fp32 = (torch.optim.AdamW if torchs_bits else fastft.AdamW)(
        [wide], lr=1e-4, weight_decay=0.1, fused=True
    )
    ours = fastft.AdamW([narrow], lr=1e-4, weight_decay=0.1)
    carries = torch.zeros(512, dtype=torch.bool)
    for _ in range(1000):
        grad = (torch.randn(512) * 10 ** (4 * torch.rand(512) - 3)).bfloat16()
        grad[:4] = 0  # denormal weights only decay
        before = narrow.detach().clone()
        narrow.grad, wide.grad = grad, grad.float()
        ours.step()
        fp32.step()
        carries |= before != narrow
        remainder = ours.state[narrow]["remainder"]
        master = (narrow.detach().view(torch.int16).int() << 16) + remainder
        assert remainder.dtype == torch.int16 and torch.equal(
            master, wide.detach().view(torch.int32)
        )
    assert carries.float().mean() > 0.9
    halfway = (master & 0xFFFF) == 0x8000
    assert torch.equal(narrow[~halfway], wide.bfloat16()[~halfway])


def test_bf16_moments_are_right_in_the_mean():
    param = nn.Parameter(torch.zeros(4096))
    optimizer = fastft.AdamW([param], moments="bf16", seed=1)
    param.grad = torch.ones(4096)
    for _ in range(1000):
        optimizer.step()
    second = optimizer.state[param]["exp_avg_sq"]
    assert second.dtype == BF16  # rounded to nearest it stops growing at 0.34
    assert float(second.double().mean()) == pytest.approx(1 - 0.999**1000, rel=5e-3)


def randn(step, shape=(8, 512)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def updates(grads, moments):
    """Each update of weights without decay by these moments and by torch's AdamW, and our state."""
    weights = [nn.Parameter(torch.zeros_like(grads[0])) for _ in range(2)]
    options = {"lr": 1.0, "weight_decay": 0.0}
    ours = fastft.AdamW(weights[:1], moments=moments, seed=3, **options)
    optimizers = [ours, torch.optim.AdamW(weights[1:], **options)]
    for grad in grads:
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.data.zero_()
            weight.grad = grad
            optimizer.step()
        yield *(weight.detach().clone() for weight in weights), ours.state[weights[0]]


def with_outliers(step):
    """Codes with a zero would divide an outlier's neighbours by eps."""
    grad = randn(step)
    grad[:, ::128] *= 1000
    return grad


# the gradient of a step, steps, the largest error of 8 bits, the largest update relative to fp32's;
# what was measured stands in docs/adamw.md
STREAMS = {
    "iid": (randn, 300, 0.10, 1.2),
    "outlier": (with_outliers, 200, 0.25, 1.6),
    "drop": (lambda step: randn(step) * (1 if step < 200 else 1 / 30), 500, 0.10, 1.2),
    "tiny": (lambda step: randn(step) * 1e-7, 200, 0.10, 1.2),
    "tiniest": (lambda step: randn(step) * 1e-15, 100, 0.10, 1.2),
}


@pytest.mark.parametrize("moments", CODES)
@pytest.mark.parametrize("stream", STREAMS)
def test_codes_whose_second_moment_is_never_zero(stream, moments):
    gradient, steps, most, largest = STREAMS[stream]
    if moments == "4bit":  # whose error is that of m / sqrt(v), outliers or not
        most, largest = 0.42, 1.3
    every = list(updates([gradient(step) for step in range(steps)], moments))
    ours, fp32 = (torch.stack([update[i] for update in every]) for i in range(2))
    error = (ours[-50:] - fp32[-50:]).square().sum() / fp32[-50:].square().sum()
    assert error**0.5 < most and ours.abs().max() < largest * fp32.abs().max()
    state, elements = every[-1][2], every[-1][0].numel()
    assert state["exp_avg"].nbytes == elements // CODES[moments].packed
    assert state["exp_avg_sq"].nbytes == elements


@pytest.mark.parametrize("moments", CODES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (5, 129), (7, 3, 43), (2, 0), (507, 1)])
def test_any_number_of_elements_in_codes(shape, moments):
    *_, (ours, fp32, state) = updates([randn(step, shape) for step in range(50)], moments)
    columns = torch.Size(shape[1:]).numel()
    packed = torch.Size(shape) if moments == "8bit" else (shape[0], -(-columns // 2))
    assert state["exp_avg"].shape == packed and state["exp_avg_sq"].shape == torch.Size(shape)
    assert state["exp_avg_scale"].shape == (shape[0], -(-columns // 128))
    assert (ours - fp32).square().sum() <= (0.1 if moments == "8bit" else 0.2) * fp32.square().sum()


@BY_EVERY_ENGINE
def test_exact_stochastic_and_kahan_weights_move_where_nearest_stands_still(impl):
    begin, options, weights = torch.linspace(1, 1.9, 4096), {"lr": 1e-5, "weight_decay": 0.0}, {}
    begin = begin.bfloat16()
    wide = nn.Parameter(begin.float())
    optimizers = {"truth": torch.optim.AdamW([wide], **options)}
    for rounding in ("exact", "nearest", "stochastic", "kahan"):
        narrow = [nn.Parameter(begin.clone())]
        optimizers[rounding] = fastft.AdamW(narrow, rounding=rounding, seed=2, impl=impl, **options)
    for name, optimizer in optimizers.items():
        train(optimizer, [[torch.ones(4096)]] * 500)
        weights[name] = params_of(optimizer)[0].detach().float()
    truth = weights["truth"]
    assert torch.equal(weights["nearest"], begin.float())
    # where they move by more than half of a place of bf16
    assert torch.equal(weights["exact"], truth.bfloat16().float())
    assert torch.equal(weights["kahan"], truth.bfloat16().float())
    moved = float((truth - begin).mean())
    assert moved == pytest.approx(-5e-3, rel=0.05)
    assert float((weights["stochastic"] - begin).mean()) == pytest.approx(moved, rel=0.1)


@BY_EVERY_ENGINE
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_clipping_inside_the_step(dtype, impl):
    ours = fastft.AdamW(leaves(dtype=dtype), lr=1e-2, max_grad_norm=0.3, impl=impl)
    stocks = [torch.optim.AdamW(leaves(dtype=wide), lr=1e-2) for wide in (FP32, torch.float64)]
    for step in range(6):
        for optimizer in (ours, *stocks):
            give(optimizer, step, scale=0.01 if step == 4 else 1.0)
        given = [(p.grad, p.grad._version, p.grad.clone()) for p in ours.param_groups[0]["params"]]
        ours.step()
        for grad, version, copy in given:
            assert grad._version == version and torch.equal(grad, copy)
        norms = [
            torch.nn.utils.clip_grad_norm_(stock.param_groups[0]["params"], 0.3) for stock in stocks
        ]
        assert (step == 4) == (float(ours.grad_norm) < 0.3)
        assert_no_worse(
            ours.grad_norm,
            norms[0],
            norms[1],
            "norm",
            terms=sum(grad.numel() for grad, *_ in given),
        )
        for stock in stocks:
            stock.step()
    for a, b, c in zip(
        *(optimizer.param_groups[0]["params"] for optimizer in (ours, *stocks)), strict=True
    ):
        if dtype == FP32:
            assert_no_worse(a.detach(), b.detach(), c.detach(), "parameter")
        else:
            torch.testing.assert_close(a.double(), c, rtol=2**-8, atol=1e-7)


@BY_EVERY_ENGINE
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@IN_EVERY_MODE
def test_grad_scaler_inside_the_step_and_skips_reported(mode, max_grad_norm, impl):
    options = {"max_grad_norm": max_grad_norm, "impl": impl}
    plain, scaled = made(mode, **options), made(mode, **options)
    scaler, skipped = torch.amp.GradScaler("cpu", init_scale=2.0**12), []
    scaler.scale(torch.ones(()))
    for step in range(6):
        scale = scaler.get_scale()
        give(scaled, step, scale=scale)
        grad = params_of(scaled)[1].grad
        if step == 2:
            grad[7, 1] = float("inf")
        before, version = [t.clone() for t in everything(scaled)], grad._version
        scaler.step(scaled)
        scaler.update()
        assert grad._version == version  # unscaled in registers
        assert scaler.get_scale() == (scale / 2 if step == 2 else scale)
        skipped.append(scaled.step_was_skipped)
        if step == 2:
            assert_same_bits(everything(scaled), before)
        else:
            run(plain, step, step + 1)
    assert skipped == [False, False, True, False, False, False]
    assert_same_training(plain, scaled)
    if max_grad_norm:
        torch.testing.assert_close(scaled.grad_norm, plain.grad_norm)


def test_tensor_lr_changed_in_place():
    lr = torch.tensor(0.0)
    by_tensor, by_number = fastft.AdamW(leaves(), lr=lr), fastft.AdamW(leaves(), lr=0.0)
    for step in range(8):
        lr.fill_(0.1 / (1 + step))
        by_number.param_groups[0]["lr"] = float(lr)
        run(by_tensor, step, step + 1)
        run(by_number, step, step + 1)
    assert_same_training(by_tensor, by_number)
    assert by_tensor.param_groups[0]["lr"] is lr


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("impl", ["auto", "eager"])  # C++ alone takes one dtype
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_any_mix_of_dtypes_in_one_group(moments, impl):
    """Against torch's AdamW of fp32 parameters on the same gradients."""
    pairs = [(FP32, FP32), (BF16, FP32), (FP32, BF16), (BF16, BF16)]
    params = [leaves([(507,)], dtype)[0] for dtype, _ in pairs]
    wide = clones(params, FP32)
    for param, (_, grad_dtype) in zip(params, pairs, strict=True):
        param.grad_dtype = grad_dtype
    ours = fastft.AdamW(params, moments=moments, seed=4, impl=impl)
    torchs, truth = torch.optim.AdamW(wide), torch.optim.AdamW(clones(wide, torch.float64))
    for step in range(5):
        grad = randn(step, (507,)).bfloat16()
        for param, (_, grad_dtype) in zip(params, pairs, strict=True):
            param.grad = grad.to(grad_dtype)
        ours.step()
        for optimizer in (torchs, truth):
            for param in params_of(optimizer):
                param.grad = grad.to(param.dtype)
            optimizer.step()
    for mine, theirs, exact in zip(*map(snapshot, (ours, torchs, truth)), strict=True):
        assert mine["exp_avg"].dtype == (BF16 if moments == "bf16" else FP32)
        if moments == "fp32":
            assert_no_worse(mine["exp_avg"], theirs["exp_avg"], exact["exp_avg"], terms=5)
        torch.testing.assert_close(mine["weight"].float(), theirs["weight"], rtol=2**-7, atol=1e-4)


@needs_native
def test_more_than_2_31_elements_in_the_norm():
    # pages nobody wrote to take no memory; a whole step over as many would write 30 GB
    bits = np.zeros(2**31 + 70, dtype=np.int16)
    grad = torch.from_numpy(bits).view(BF16)
    grad[-1], grad[2**31 - 1], grad[0] = 2.0, 4.0, 4.0
    param = nn.Parameter(torch.zeros(1))
    optimizer = fastft.AdamW([param], impl="cpp")
    assert float(optimizer.clip_at_step([grad], 1.0)) == 6.0


class Recorder(TorchDispatchMode):
    """What a CUDA graph does: keeps operations, and does them again on the same memory without
    asking Python."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.calls:
            for old, new in zip(
                tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


@pytest.fixture(params=["cpp", "cuda, as PTX"])
def kernels(request):
    """The C++ engine, or the CUDA kernels in its place, which are captured and read
    hyper-parameters of the device."""
    if request.param == "cpp":
        yield
        return
    require_cuda()
    with ptx.cuda_operators(90) as gpu, cuda_for_cpp(gpu):
        gpu.capturing, gpu.host_arguments = True, {"table"}
        yield
        assert gpu.launches and not gpu.waits


@needs_native
@IN_EVERY_MODE
def test_capturable_as_a_graph_replays_a_step(mode, kernels, monkeypatch):
    """The CPU in the GPU's place; test_gpu.py has the same with a CUDA graph."""
    monkeypatch.setattr(device_counts, "counted_there", lambda device, groups: True)
    stepped, replayed = (made(mode, max_grad_norm=0.5, capturable=True) for _ in range(2))
    for optimizer in (stepped, replayed):
        optimizer.found_inf = torch.zeros(1)
        run(optimizer, 0, 2)
    give(replayed, 2)
    with Recorder() as graph:
        replayed.step()
    run(stepped, 2, 3)
    params = replayed.param_groups[0]["params"]
    for step in range(3, 7):
        for optimizer in (stepped, replayed):
            optimizer.found_inf.fill_(float(step == 4))
        run(stepped, step, step + 1)
        for param, other in zip(params, stepped.param_groups[0]["params"], strict=True):
            param.grad.copy_(other.grad)
        graph.replay()
    assert_same_training(replayed, stepped)
    assert {float(state["step"]) for state in replayed.state.values()} == {6.0}


@IN_EVERY_MODE
def test_a_lossless_state_dict_that_weights_only_loads(mode):
    optimizer = run(made(mode), 0, 3)
    copy = made(mode)
    with torch.no_grad():
        for param, other in zip(
            *(o.param_groups[0]["params"] for o in (copy, optimizer)), strict=True
        ):
            param.copy_(other)
    copy.load_state_dict(on_disk(optimizer.state_dict()))
    assert_same_training(copy, optimizer)
    for state, other in zip(copy.state.values(), optimizer.state.values(), strict=True):
        assert {name: t.dtype for name, t in state.items()} == {
            name: t.dtype for name, t in other.items()
        }


@IN_EVERY_MODE
def test_deterministic_and_resumed_to_the_bit(mode):
    whole, again, first = run(made(mode), 0, 8), run(made(mode), 0, 8), run(made(mode), 0, 4)
    assert_same_training(whole, again)
    resumed = made(mode)
    resumed.param_groups[0]["seed"] = 12  # the checkpoint knows better
    saved = on_disk({"optimizer": first.state_dict(), "params": first.param_groups[0]["params"]})
    with torch.no_grad():
        for param, value in zip(resumed.param_groups[0]["params"], saved["params"], strict=True):
            param.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    assert_same_training(run(resumed, 4, 8), whole)


def of_torch():
    saved = run(torch.optim.AdamW(leaves(FOREIGN), lr=0.5), 0, 9).state_dict()
    return saved, list(saved["state"].values()), None


def of_bitsandbytes(**form):
    saved, moments = bitsandbytes_state(**form)
    return saved, list(moments.values()), None


def of_apex(form):
    masters, moments = mixed_precision_states()
    return with_masters(form, masters, moments), moments, masters


# the checkpoint, the moments and the fp32 masters that it stands for; steps, a number of its group
ORIGINS = {
    "torch": (of_torch, 9, "lr", 0.5),
    "bitsandbytes": (lambda: of_bitsandbytes(nested=False, block=2048), 7, "betas", (0.8, 0.9)),
    "bitsandbytes, nested": (lambda: of_bitsandbytes(nested=True, block=256), 7, "eps", 1e-6),
    "apex": (lambda: of_apex("group"), 5, "betas", (0.9, 0.95)),
    "apex FP16_Optimizer": (lambda: of_apex("FP16_Optimizer"), 5, "lr", 0.1),
    "Transformer Engine": (lambda: of_apex("master_param"), 5, "weight_decay", 0.0),
}


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_checkpoints_of_torch_bitsandbytes_apex_and_transformer_engine(origin, dtype):
    make, count, name, value = ORIGINS[origin]
    saved, moments, masters = make()
    params = clones(masters, dtype) if masters else leaves(FOREIGN, dtype)
    ours = fastft.AdamW(params)
    ours.load_state_dict(on_disk(saved))
    for i, (param, moment) in enumerate(zip(params, moments, strict=True)):
        state = ours.state[param]
        assert state.keys() <= {"step", "exp_avg", "exp_avg_sq", "remainder"}
        assert float(state["step"]) == count and state["exp_avg"].dtype == FP32
        assert all(torch.equal(state[entry], moment[entry]) for entry in ("exp_avg", "exp_avg_sq"))
        if masters and dtype == BF16:
            high = param.detach().view(torch.int16).int() << 16
            assert torch.equal((high + state["remainder"]).view(FP32), masters[i])
        elif masters:
            assert torch.equal(param, masters[i])
    group = ours.param_groups[0]
    assert group[name] == value and not {"master", "step", "bias_correction"} & group.keys()
    run(ours, count, count + 1)


@IN_EVERY_MODE
def test_torch_continues_from_what_we_write(mode):
    ours = run(made(mode), 0, 3)
    torchs = torch.optim.AdamW(
        [nn.Parameter(p.detach().float()) for p in ours.param_groups[0]["params"]]
    )
    written = on_disk(ours.torch_state_dict())
    assert written["param_groups"][0].keys() <= torchs.param_groups[0].keys()
    torchs.load_state_dict(written)
    assert torchs.param_groups[0]["lr"] == 1e-2
    for state, own in zip(torchs.state.values(), ours.state.values(), strict=True):
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == FP32
        if own["exp_avg"].dtype.is_floating_point:
            assert torch.equal(state["exp_avg"], own["exp_avg"].float())
            assert torch.equal(state["exp_avg_sq"], own["exp_avg_sq"].float())
        ours_alone = {"remainder", "kahan", "exp_avg_scale", "exp_avg_sq_scale"}
        assert state.keys() == own.keys() - ours_alone
    run(torchs, 3, 4)
    assert all(float(state["step"]) == 4 for state in torchs.state.values())
    if mode in ("fp32-fp32", "fp32-amsgrad"):
        run(ours, 3, 4)
        for mine, theirs in zip(params_of(ours), params_of(torchs), strict=True):
            torch.testing.assert_close(mine, theirs)


class EachStep(TrainerCallback):
    """Keeps the parameters after every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append([param.detach().clone() for param in model.parameters()])


def trained(folder, way):
    """The groups of Trainer's optimizer, and the losses, norms and parameters of every step."""
    args, model, given = arguments(folder, max_grad_norm=0.1), biased_llama(), {}
    if way in ("optimizers", "clipping"):
        given = {"optimizers": fastft.adamw(model, args)}
    elif way == "spec":
        given = {"optimizer_cls_and_kwargs": fastft.adamw_spec(args)}
    curve, recorder = Curve(), EachStep()
    given["callbacks"] = [curve, recorder]
    trainer = Trainer(model=model, args=args, train_dataset=examples(), **given)
    if way == "clipping":
        fastft.fuse_clipping(trainer)
    trainer.train()
    inner = trainer.optimizer.optimizer
    assert isinstance(inner, torch.optim.AdamW if way == "stock" else fastft.AdamW)
    names = ("lr", "betas", "eps", "weight_decay", "initial_lr")
    groups = [
        [*(group[name] for name in names), [param.shape for param in group["params"]]]
        for group in inner.param_groups
    ]
    return groups, curve, recorder.steps


def test_trainer_takes_the_pair_the_spec_and_the_clipping(tmp_path):
    """Step by step as stock."""
    groups, stock, steps = trained(tmp_path, "stock")
    assert len(stock.losses) == len(steps) == 8
    for way in ("optimizers", "spec", "clipping"):
        found = trained(tmp_path, way)
        assert found[0] == groups
        assert found[1].losses == pytest.approx(stock.losses, rel=1e-5)
        assert found[1].norms == pytest.approx(stock.norms, rel=1e-5)
        for params, expected in zip(found[2], steps, strict=True):
            for param, other in zip(params, expected, strict=True):
                torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


@needs_native
def test_nothing_is_compiled_and_instruction_sets_and_threads_have_the_same_bits():
    """In processes of their own that find no compiler."""
    tests, running = Path(__file__).parents[1], []
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PATH": ""}
    environment |= {"OMP_WAIT_POLICY": "passive"}
    for isa, threads in (("baseline", 1), ("avx2", 2), ("avx512", 3), ("avx512bf16", 1)):
        command = [sys.executable, "-m", "support.adamw_digest", str(threads)]
        chosen = {**environment, "FASTFT_CPU_ISA": isa}
        running.append(subprocess.Popen(command, env=chosen, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert printed[0][0] in ("baseline", "avx2") and {each[1] for each in printed} == {digest()}
