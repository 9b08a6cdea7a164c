"""What AdamW promises, one test for each promise: those that one process on a CPU can keep.

The bits of the GPU kernels in every mode, and CUDA graphs themselves, are in test_adamw_ptx.py and
test_gpu.py; DDP, FSDP2 and torch.distributed.checkpoint need two processes:
test_distributed_adamw.py.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ptx
from support.numerics import assert_no_worse
from support.ptx.engines import cuda_for_cpp, require_cuda
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastft
from fastft import _native
from fastft.optim import device_counts

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(512,), (63, 3), (1,)]
needs_native = pytest.mark.skipif(_native.missing("cpu") is not None, reason="no native library")
# bytes of an element, gradient included: resident, and moved by a step without clipping
MODES = {
    "fp32": (FP32, {}, 16, 28),
    "fp32-amsgrad": (FP32, {"amsgrad": True}, 20, 36),
    "fp32-bf16_moments": (FP32, {"moments": "bf16"}, 12, 20),
    "fp32-8bit_moments": (FP32, {"moments": "8bit"}, 10.0625, 16.125),
    "exact": (BF16, {}, 14, 26),
    "exact-bf16_moments": (BF16, {"moments": "bf16"}, 10, 18),
    "exact-8bit_moments": (BF16, {"moments": "8bit"}, 8.0625, 14.125),
    "kahan": (BF16, {"rounding": "kahan"}, 14, 26),
    "kahan-bf16_moments": (BF16, {"rounding": "kahan", "moments": "bf16"}, 10, 18),
    "stochastic": (BF16, {"rounding": "stochastic"}, 12, 22),
    "stochastic-bf16_moments": (BF16, {"rounding": "stochastic", "moments": "bf16"}, 8, 14),
    "stochastic-8bit_moments": (
        BF16,
        {"rounding": "stochastic", "moments": "8bit"},
        6.0625,
        10.125,
    ),
    "nearest": (BF16, {"rounding": "nearest"}, 12, 22),
}
IN_EVERY_MODE = pytest.mark.parametrize("mode", MODES)


def leaves(shapes=SHAPES, dtype=FP32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype))
        for shape in shapes
    ]


def made(mode, shapes=SHAPES, **options):
    dtype, chosen, *_ = MODES[mode]
    return fastft.AdamW(leaves(shapes, dtype), lr=1e-2, seed=11, **chosen, **options)


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
    """Parameters and states, as integers where they hold floats: NaN and -0.0 count as what they
    are."""
    params = [param.detach() for group in optimizer.param_groups for param in group["params"]]
    found = params + [state[name] for state in optimizer.state.values() for name in sorted(state)]
    return [
        t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()]) for t in found
    ]


def assert_same_bits(left, right):
    left, right = everything(left), everything(right)
    assert len(left) == len(right) and all(map(torch.equal, left, right))


def from_disk(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@needs_native
@IN_EVERY_MODE
def test_every_engine_has_the_same_bits(mode):
    assert_same_bits(*(run(made(mode, impl=impl), 0, 5) for impl in ("eager", "cpp")))


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
def test_one_or_two_launches_a_step_for_any_number_of_tensors(max_grad_norm):
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
        assert calls.ours == (1 if max_grad_norm is None else 2)
        counted.append(calls.all)
    assert counted[0] == counted[1]


@needs_native
@IN_EVERY_MODE
def test_bytes_resident_and_moved(mode):
    resident, moved = MODES[mode][2:]
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


def test_fp32_moments_for_bf16_parameters():
    optimizer = fastft.AdamW(leaves([(512,)], BF16))
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    state = optimizer.state[param]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == FP32
    param.grad.zero_()
    for _ in range(1000):
        optimizer.step()
    torch.testing.assert_close(
        state["exp_avg_sq"], torch.full((512,), 0.25e-3 * 0.999**1000), rtol=1e-3, atol=0
    )


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


def rows(shape=(64, 128), scale=1.0):
    return [
        scale * torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for step in range(50)
    ]


def eight_bit_and_fp32(grads):
    """The last update of each of two optimizers on the same gradients, and the state of the
    first."""
    updates, states = [], []
    for moments in ("8bit", "fp32"):
        param = nn.Parameter(torch.zeros_like(grads[0]))
        optimizer = fastft.AdamW([param], lr=1.0, weight_decay=0.0, moments=moments, seed=3)
        for grad in grads:
            param.grad, before = grad, param.detach().clone()
            optimizer.step()
        updates.append(param.detach() - before)
        states.append(optimizer.state[param])
    return *updates, states[0]


def test_8_bit_states_whose_second_moment_is_never_zero():
    grads = rows()
    for grad in grads:
        grad[:, 5] *= 1000  # codes with a zero divide their neighbours' first moments by eps
    ours, fp32, state = eight_bit_and_fp32(grads)
    assert state["exp_avg"].element_size() == state["exp_avg_sq"].element_size() == 1
    assert ours.abs().max() <= 10 * fp32.abs().max()
    ours, fp32, _ = eight_bit_and_fp32(rows(scale=1e-7))
    assert (ours - fp32).square().mean() < 0.1 * fp32.square().mean()
    still, _, _ = eight_bit_and_fp32([torch.zeros(64, 128)] * 3)
    assert not still.any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (5, 129), (7, 3, 43), (2, 0), (507, 1)])
def test_any_number_of_elements_in_8_bits(shape):
    ours, fp32, state = eight_bit_and_fp32(rows(shape))
    assert state["exp_avg"].shape == torch.Size(shape) and state["exp_avg"].dtype == torch.int8
    assert state["exp_avg_scale"].shape == (shape[0], -(-torch.Size(shape[1:]).numel() // 128))
    assert (ours - fp32).square().sum() <= 0.1 * fp32.square().sum()


def test_stochastic_and_kahan_weights_move_where_nearest_stands_still():
    start, weights = torch.linspace(1, 1.9, 4096).bfloat16(), {}
    for rounding, dtype in (
        ("exact", FP32),
        ("nearest", BF16),
        ("stochastic", BF16),
        ("kahan", BF16),
    ):
        param = nn.Parameter(start.to(dtype, copy=True))
        optimizer = fastft.AdamW([param], lr=1e-5, weight_decay=0.0, rounding=rounding, seed=2)
        for _ in range(500):
            param.grad = torch.ones_like(param)
            optimizer.step()
        weights[rounding] = param.detach().float()
    truth = weights["exact"]
    assert torch.equal(weights["nearest"], start.float())
    # where they move by more than half of a place of bf16
    assert torch.equal(weights["kahan"], truth.bfloat16())
    moved = float((truth - start).mean())
    assert moved == pytest.approx(-5e-3, rel=0.05)
    assert float((weights["stochastic"] - start).mean()) == pytest.approx(moved, rel=0.1)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_clipping_inside_the_step(dtype):
    ours = fastft.AdamW(leaves(dtype=dtype), lr=1e-2, max_grad_norm=0.3)
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


@IN_EVERY_MODE
def test_grad_scaler_inside_the_step_and_skips_reported(mode):
    plain, scaled = made(mode), made(mode)
    scaler, skipped = torch.amp.GradScaler("cpu", init_scale=2.0**12), []
    scaler.scale(torch.ones(()))
    for step in range(6):
        give(scaled, step, scale=scaler.get_scale())
        grad = scaled.param_groups[0]["params"][1].grad
        if step == 2:
            grad[7, 1] = float("inf")
        before, version = [t.clone() for t in everything(scaled)], grad._version
        scaler.step(scaled)
        scaler.update()
        assert grad._version == version  # unscaled in registers
        skipped.append(scaled.step_was_skipped)
        if step == 2:
            assert all(map(torch.equal, everything(scaled), before))
        else:
            run(plain, step, step + 1)
    assert skipped == [False, False, True, False, False, False]
    assert_same_bits(plain, scaled)


def test_tensor_lr_changed_in_place():
    lr = torch.tensor(0.0)
    by_tensor, by_number = fastft.AdamW(leaves(), lr=lr), fastft.AdamW(leaves(), lr=0.0)
    for step in range(8):
        lr.fill_(0.1 / (1 + step))
        by_number.param_groups[0]["lr"] = float(lr)
        run(by_tensor, step, step + 1)
        run(by_number, step, step + 1)
    assert_same_bits(by_tensor, by_number)
    assert by_tensor.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_amsgrad_and_maximize(amsgrad, maximize):
    options = {"lr": 1e-2, "betas": (0.9, 0.9), "amsgrad": amsgrad, "maximize": maximize}
    ours, torchs = fastft.AdamW(leaves(), **options), torch.optim.AdamW(leaves(), **options)
    truth = torch.optim.AdamW(leaves(dtype=torch.float64), **options)
    for step in range(30):
        for optimizer in (ours, torchs, truth):
            # what amsgrad is for: the largest second moment is an old one
            give(optimizer, step, scale=0.5**step)
            optimizer.step()
    for a, b, c in zip(
        *(optimizer.param_groups[0]["params"] for optimizer in (ours, torchs, truth)), strict=True
    ):
        assert_no_worse(a.detach(), b.detach(), c.detach(), "parameter")
    if amsgrad:
        assert all((s["max_exp_avg_sq"] > 10 * s["exp_avg_sq"]).all() for s in ours.state.values())


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_any_mix_of_dtypes_in_one_group(moments):
    pairs = [(FP32, FP32), (BF16, FP32), (FP32, BF16), (BF16, BF16)]

    def params():
        found = [leaves([(507,)], dtype)[0] for dtype, _ in pairs]
        for param, (_, grad_dtype) in zip(found, pairs, strict=True):
            param.grad_dtype = grad_dtype
        return found

    together, alone = params(), params()
    mixed = fastft.AdamW(together, moments=moments, seed=4)
    singles = [fastft.AdamW([param], moments=moments, seed=4) for param in alone]
    for step in range(5):
        grad = torch.randn(507, generator=torch.Generator().manual_seed(step)).bfloat16()
        for param, (_, grad_dtype) in zip(together + alone, pairs * 2, strict=True):
            param.grad = grad.to(grad_dtype)
        for optimizer in (mixed, *singles):
            optimizer.step()
    if moments == "fp32":  # random bits belong to an element's place in the optimizer
        assert all(map(torch.equal, together, alone))
    for param, other in zip(together, alone, strict=True):
        torch.testing.assert_close(param, other, rtol=2**-7, atol=1e-4)
    assert {s["exp_avg"].dtype for s in mixed.state.values()} == {
        BF16 if moments == "bf16" else FP32
    }


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
    assert_same_bits(replayed, stepped)
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
    copy.load_state_dict(from_disk(optimizer.state_dict()))
    assert_same_bits(copy, optimizer)
    for state, other in zip(copy.state.values(), optimizer.state.values(), strict=True):
        assert {name: t.dtype for name, t in state.items()} == {
            name: t.dtype for name, t in other.items()
        }


@IN_EVERY_MODE
def test_deterministic_and_resumed_to_the_bit(mode):
    whole, again, first = run(made(mode), 0, 8), run(made(mode), 0, 8), run(made(mode), 0, 4)
    assert_same_bits(whole, again)
    resumed = made(mode)
    resumed.param_groups[0]["seed"] = 12  # the checkpoint knows better
    saved = from_disk({"optimizer": first.state_dict(), "params": first.param_groups[0]["params"]})
    with torch.no_grad():
        for param, value in zip(resumed.param_groups[0]["params"], saved["params"], strict=True):
            param.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    assert_same_bits(run(resumed, 4, 8), whole)


def of_bitsandbytes(param, generator):
    """One parameter's block-wise state, and its moments."""
    entries, moments = {"step": 9}, []
    for number, lowest in (("1", -1.0), ("2", 0.0)):
        codes = torch.randint(0, 256, param.shape, generator=generator, dtype=torch.uint8)
        qmap, absmax = (
            torch.linspace(lowest, 1, 256),
            torch.rand(-(-param.numel() // 256), generator=generator),
        )
        entries |= {f"state{number}": codes, f"qmap{number}": qmap, f"absmax{number}": absmax}
        scales = absmax.repeat_interleave(256)[: param.numel()].view_as(param)
        moments.append(qmap[codes.long()] * scales)
    return entries, moments


def of_apex(param, generator):
    """As bitsandbytes' above, with `step` in the group."""
    moments = [torch.rand(param.shape, generator=generator) for _ in range(2)]
    return dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True)), moments


@pytest.mark.parametrize("origin", ["torch", "bitsandbytes", "apex"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_checkpoints_of_torch_bitsandbytes_and_apex(origin, dtype):
    (param,), generator, count = leaves([(70, 73)], dtype), torch.Generator().manual_seed(6), 9
    ours = fastft.AdamW([param])
    if origin == "torch":
        saved = run(torch.optim.AdamW(leaves([(70, 73)]), lr=0.5), 0, count).state_dict()
        moments = [saved["state"][0]["exp_avg"], saved["state"][0]["exp_avg_sq"]]
    else:
        entries, moments = (of_bitsandbytes if origin == "bitsandbytes" else of_apex)(
            param, generator
        )
        group = {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
        if origin == "apex":
            group |= {"step": count, "bias_correction": True}
        saved = {"state": {0: entries}, "param_groups": [group]}
    ours.load_state_dict(from_disk(saved))
    state = ours.state[param]
    assert float(state["step"]) == count and ours.param_groups[0]["lr"] == 0.5
    assert torch.equal(state["exp_avg"], moments[0]) and torch.equal(
        state["exp_avg_sq"], moments[1]
    )
    assert state["exp_avg"].dtype == FP32
    run(ours, count, count + 1)


@IN_EVERY_MODE
def test_torch_continues_from_what_we_write(mode):
    ours = run(made(mode), 0, 3)
    torchs = torch.optim.AdamW(
        [nn.Parameter(p.detach().float()) for p in ours.param_groups[0]["params"]]
    )
    torchs.load_state_dict(from_disk(ours.torch_state_dict()))
    assert torchs.param_groups[0]["lr"] == 1e-2
    for state, own in zip(torchs.state.values(), ours.state.values(), strict=True):
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == FP32
        if own["exp_avg"].dtype.is_floating_point:
            assert torch.equal(state["exp_avg"], own["exp_avg"].float())
            assert torch.equal(state["exp_avg_sq"], own["exp_avg_sq"].float())
        assert state.keys() == own.keys() - {
            "remainder",
            "kahan",
            "exp_avg_scale",
            "exp_avg_sq_scale",
        }
    run(torchs, 3, 4)
    assert all(float(state["step"]) == 4 for state in torchs.state.values())


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x, labels):
        predicted = self.layers(x)
        return {"loss": (predicted[:, 0] - labels).square().mean(), "logits": predicted}


def test_trainer_takes_the_pair_the_spec_and_the_clipping(tmp_path):
    transformers = pytest.importorskip("transformers")
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        learning_rate=0.05,
        weight_decay=0.2,
        max_grad_norm=0.1,
        logging_steps=1,
        **quiet,
    )
    data = [{"x": x, "labels": x.sum()} for x in torch.randn(32, 6)]
    results, groups = {}, {}
    for way in ("stock", "optimizers", "spec", "clipping"):
        model, given = Regression(), {}
        if way in ("optimizers", "clipping"):
            given = {"optimizers": fastft.adamw(model, args)}
        elif way == "spec":
            given = {"optimizer_cls_and_kwargs": fastft.adamw_spec(args)}
        trainer = transformers.Trainer(model=model, args=args, train_dataset=data, **given)
        if way == "clipping":
            fastft.fuse_clipping(trainer)
        trainer.train()
        inner = trainer.optimizer.optimizer
        assert isinstance(inner, fastft.AdamW) == (way != "stock")
        groups[way] = [
            (group["weight_decay"], [tuple(p.shape) for p in group["params"]])
            for group in inner.param_groups
        ]
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        results[way] = norms, [param.detach() for param in model.parameters()]
    for way in ("optimizers", "spec", "clipping"):
        assert groups[way] == groups["stock"]
        assert (
            results[way][0] == pytest.approx(results["stock"][0], rel=1e-5)
            and len(results[way][0]) == 4
        )
        for param, stock in zip(results[way][1], results["stock"][1], strict=True):
            torch.testing.assert_close(param, stock, rtol=1e-5, atol=1e-6)


FRESH = """
import sys
from test_adamw_goals import digest, fastft
print(digest())
assert "torch.utils.cpp_extension" not in sys.modules
"""


def digest():
    """Of the bits after some steps, one optimizer in each mode."""
    hashed = hashlib.sha256()
    for mode in MODES:
        for tensor in everything(run(made(mode, impl="cpp"), 0, 3)):
            hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


@needs_native
def test_nothing_is_compiled_at_run_time_and_any_instruction_set_will_do():
    here = Path(__file__).parent
    paths = os.pathsep.join(
        [str(here), str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    # no compiler
    environment = {**os.environ, "PYTHONPATH": paths, "FASTFT_CPU_ISA": "baseline", "PATH": ""}
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH], env=environment, capture_output=True, text=True, check=False
    )
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.strip() == digest()
