"""One optimizer step against torch's fused AdamW, alone and with clipping, and on a GPU
bitsandbytes and torchao.

The bare work reads and writes as many bytes in place. bitsandbytes' CPU library brings OpenMP
threads of its own, which spin between the runs and slow everybody else's down: there, processes
alternate instead of calls in one.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest
import torch
from compare import compare, rival
from support.adamw_modes import MODES

from fastft.optim.adamw import AdamW
from fastft.optim.grad_norm import grad_norm

FP32, BF16 = torch.float32, torch.bfloat16
MIXED = [((1024, 256), FP32), ((256,), FP32), ((63, 507), FP32), ((512, 128), BF16)]
LORA = [((16, 1024), BF16), ((1024, 16), BF16), ((1024,), BF16), ((63, 507), BF16)]
CASES = {
    "50M_fp32": [((50_000_000,), FP32)],
    "50M_bf16": [((50_000_000,), BF16)],
    "400_mixed": MIXED * 100,
    "400_bf16": LORA * 100,
    "1000x256_fp32": [((256,), FP32)] * 1000,
}
# of ours, moved for each element; torch's bf16 moments move 14
BYTES = {FP32: MODES["fp32-fp32"].moved, BF16: MODES["exact-fp32"].moved}
TIMED = {
    "exact": MODES["exact-fp32"],
    "kahan": MODES["kahan-fp32"],
    "stochastic": MODES["stochastic-fp32"],
    "exact_bf16_moments": MODES["exact-bf16"],
    "stochastic_bf16_moments": MODES["stochastic-bf16"],
    "exact_8bit_moments": MODES["exact-8bit"],
    "stochastic_8bit_moments": MODES["stochastic-8bit"],
    "exact_4bit_moments": MODES["exact-4bit"],
    "stochastic_4bit_moments": MODES["stochastic-4bit"],
}


def optimizer(cls, shapes, device, **options):
    params = [
        torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape, dtype in shapes
    ]
    for param in params:
        param.grad = torch.randn_like(param)
    made = cls(params, **options)
    made.step()
    return made


def strayed(cls, device, **options):
    """How far bf16 weights end from those of fp32 AdamW on the same gradients, as a share of how
    far these went.

    300 steps at lr 1e-5 over weights of 0.02; root mean squares. The rounding of the final weight
    to bf16 is in it.
    """
    start = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    ends = []
    for made, dtype, chosen in ((cls, BF16, options), (torch.optim.AdamW, FP32, {})):
        param = torch.nn.Parameter(start.to(device, dtype, copy=True))
        trained, generator = made([param], lr=1e-5, **chosen), torch.Generator().manual_seed(1)
        for _ in range(300):
            grad = torch.randn(128, 128, generator=generator) + start.float().sign()
            param.grad = grad.bfloat16().to(device, dtype)
            trained.step()
        ends.append(param.detach().float().cpu())
    off, went = ends[0] - ends[1], ends[1] - start
    return round(float(off.square().mean().sqrt() / went.square().mean().sqrt()), 4)


def in_place(bytes_moved, device):
    floats = torch.ones(bytes_moved // 8, device=device)
    return lambda: floats.mul_(1.0)


@pytest.mark.parametrize("case", CASES)
def test_adamw(benchmark, device, case):
    shapes = CASES[case]
    ours = optimizer(AdamW, shapes, device)
    rivals = {"torch fused": optimizer(torch.optim.AdamW, shapes, device, fused=True).step}
    if device == "cuda" and (bitsandbytes := rival("bitsandbytes")):
        rivals["bitsandbytes 32-bit"] = optimizer(
            bitsandbytes.optim.AdamW32bit, shapes, device
        ).step
    if device == "cuda" and (torchao := rival("torchao.optim")):
        rivals["torchao 8-bit"] = optimizer(torchao.AdamW8bit, shapes, device).step
    bytes_moved = sum(p.numel() * BYTES[p.dtype] for p in ours.param_groups[0]["params"])
    compare(
        benchmark, ours.step, rivals, bytes_moved=bytes_moved, bare=in_place(bytes_moved, device)
    )


@pytest.mark.parametrize("case", CASES)
def test_adamw_clipped(benchmark, device, case):
    """As Trainer steps: the norm of all gradients, clipping, the update."""
    shapes = CASES[case]
    ours = optimizer(AdamW, shapes, device, max_grad_norm=1.0)
    stock = optimizer(torch.optim.AdamW, shapes, device, fused=True)
    params = stock.param_groups[0]["params"]

    def clip_and_step():
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        stock.step()

    bytes_moved = sum(p.numel() * (BYTES[p.dtype] + p.element_size()) for p in params)
    rivals = {"torch clip_grad_norm_ + fused": clip_and_step}
    compare(
        benchmark, ours.step, rivals, bytes_moved=bytes_moved, bare=in_place(bytes_moved, device)
    )


@pytest.mark.parametrize("mode", TIMED)
def test_adamw_bf16_modes(benchmark, device, mode):
    kept_as = TIMED[mode]
    shapes = [((2000, 10240), BF16)]  # rows of whole blocks of 8-bit moments
    ours = optimizer(AdamW, shapes, device, seed=0, **kept_as.options)
    (param,), (state,) = ours.param_groups[0]["params"], ours.state.values()
    kept = [param, param.grad, *(value for name, value in state.items() if name != "step")]
    assert sum(tensor.nbytes for tensor in kept) == kept_as.resident * param.numel()
    benchmark.extra_info["bytes_resident_per_element"] = kept_as.resident
    benchmark.extra_info["strayed_from_fp32"] = {
        "ours": strayed(AdamW, device, seed=0, **kept_as.options),
        "torch fused": strayed(torch.optim.AdamW, device, fused=True),
    }
    rivals = {"torch fused": optimizer(torch.optim.AdamW, shapes, device, fused=True).step}
    bytes_moved = int(kept_as.moved * param.numel())
    compare(
        benchmark, ours.step, rivals, bytes_moved=bytes_moved, bare=in_place(bytes_moved, device)
    )


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("millions", [50, 500])
def test_adamw_offloaded(benchmark, device, millions, dtype):
    """States on the host against states beside the weights: on a CPU what the pieces cost, on a GPU
    the bus. 500 M parameters twice need 16 GB."""
    shapes = [((millions * 20, 6250), dtype)] * 8
    ours = optimizer(AdamW, shapes, device, offload="states")
    rivals = {"resident": optimizer(AdamW, shapes, device).step}
    bytes_moved = sum(p.numel() * BYTES[p.dtype] for p in ours.param_groups[0]["params"])
    compare(benchmark, ours.step, rivals, bytes_moved=bytes_moved)


STEPS = """
import json, sys, time, torch
import {module}
generator = torch.Generator().manual_seed(0)
param = torch.nn.Parameter(torch.randn(2000, 2048, generator=generator).to(torch.{dtype}))
param.grad = torch.randn(2000, 2048, generator=generator).to(torch.{dtype})
optimizer, times = {made}([param]{options}), []
for _ in range(8):
    start = time.perf_counter()
    optimizer.step()
    times.append(time.perf_counter() - start)
print(json.dumps(times[1:]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU they alternate in one process")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_8bit(benchmark, dtype):
    """4 M elements with 8-bit moments, in processes by turns."""
    if rival("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    times = {"ours": [], "bitsandbytes": []}

    def steps(name, module, made, options):
        code = STEPS.format(module=module, made=made, options=options, dtype=dtype)
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        times[name] += json.loads(ran.stdout)

    benchmark.pedantic(
        lambda: steps("ours", "fastft", "fastft.AdamW", ", moments='8bit'"),
        setup=lambda: steps("bitsandbytes", "bitsandbytes", "bitsandbytes.optim.AdamW8bit", ""),
        rounds=5,
    )
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    benchmark.extra_info["median_ms"] = {
        name: round(1e3 * seconds, 4) for name, seconds in medians.items()
    }
    ratio = round(medians["bitsandbytes"] / medians["ours"], 3)
    benchmark.extra_info["times_faster_than"] = {"bitsandbytes": ratio}
    print(f"\n{benchmark.name}: {benchmark.extra_info}")


@pytest.mark.parametrize("case", ["50M_fp32", "50M_bf16", "1000x256_fp32"])
def test_grad_norm(benchmark, device, case):
    grads = [torch.randn(shape, device=device).to(dtype) for shape, dtype in CASES[case]]
    rivals = {"torch.nn.utils.get_total_norm": lambda: torch.nn.utils.get_total_norm(grads)}
    bytes_moved = sum(grad.numel() * grad.element_size() for grad in grads)
    compare(benchmark, lambda: grad_norm(grads), rivals, bytes_moved=bytes_moved)
