"""One optimizer step against torch's fused AdamW, alone and with clipping, and on a GPU
bitsandbytes and torchao.

The bare work reads as many bytes of gradients, and reads and writes the others in place. The
models' sets of parameters are those of models.py, whole on a GPU with 80 GB. bitsandbytes' CPU
library brings OpenMP threads of its own, which spin between the runs and slow everybody else's
down: there, two processes alternate, of which one stands still.
"""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import subprocess
import sys

import models
import pytest
import torch
import turns
from compare import DEVICE, compare, keep, rival
from support.adamw_modes import MODES
from support.numerics import assert_no_worse

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


ENDS = 2048  # elements at both ends of a tensor that are checked


def optimizer(cls, shapes, device, **options):
    params = [
        torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape, dtype in shapes
    ]
    for param in params:
        param.grad = torch.randn_like(param)
    made = cls(params, **options)
    made.step()
    return made


def shrunk(shapes, small):
    """Where nothing is timed: of the same kinds, with few elements."""
    if not small:
        return shapes
    limits = {1: (4097,), 2: (63, 256), 3: (3, 63, 32)}
    return [(tuple(map(min, shape, limits[len(shape)])), dtype) for shape, dtype in shapes[:40]]


def ends(tensor):
    flat = tensor.detach().flatten()
    return torch.cat([flat[:ENDS], flat[ENDS:][-ENDS:]]).double()


def checking(shapes, device, *, share=0.0, **options):
    """The check of a case: where weights that were 0 are after three steps, at the ends of every
    tensor, against torch's AdamW in float64. `share`: of the way that they may be off where moments
    are rounded; else the tests' tolerance holds."""

    def check():
        torch.manual_seed(0)
        params = [
            torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            for shape, dtype in shapes
        ]
        for param in params:
            param.grad = torch.randn_like(param)
        ours = AdamW(params, lr=0.1, **options)
        doubles = [torch.nn.Parameter(ends(param)) for param in params]
        scale = 1.0
        if limit := options.get("max_grad_norm"):
            squares = sum(float(param.grad.double().square().sum()) for param in params)
            scale = min(1.0, limit / (squares**0.5 + 1e-6))
        for param, double in zip(params, doubles, strict=True):
            double.grad = ends(param.grad) * scale
        truth = torch.optim.AdamW(doubles, lr=0.1)
        for _ in range(3):
            ours.step()
            truth.step()
        for param, double in zip(params, doubles, strict=True):
            mine, exact = ends(param), double.detach()
            if share:
                off = float((mine - exact).norm() / exact.norm())
                assert off < share, f"off by {off:.2g} of the way of {tuple(param.shape)}"
            else:
                assert_no_worse(mine.to(param.dtype), exact.to(param.dtype), exact, terms=100)

    return check


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


def bare_work(bytes_moved, of_gradients, device):
    """Reads so many bytes of gradients, and reads and writes the others in place."""
    kept = torch.ones((bytes_moved - of_gradients) // 8, device=device)
    grads = torch.ones(of_gradients // 4, device=device)
    return lambda: (kept.mul_(1.0), grads.sum())


def alone(benchmark, shapes, device):
    ours = optimizer(AdamW, shapes, device)
    rivals = {"torch fused": optimizer(torch.optim.AdamW, shapes, device, fused=True).step}
    if device == "cuda" and (bitsandbytes := rival("bitsandbytes")):
        rivals["bitsandbytes 32-bit"] = optimizer(
            bitsandbytes.optim.AdamW32bit, shapes, device
        ).step
    if device == "cuda" and (torchao := rival("torchao.optim")):
        rivals["torchao 8-bit"] = optimizer(torchao.AdamW8bit, shapes, device).step
    params = ours.param_groups[0]["params"]
    bytes_moved = sum(p.numel() * BYTES[p.dtype] for p in params)
    compare(
        benchmark,
        ours.step,
        rivals,
        check=checking(shapes, device),
        bytes_moved=bytes_moved,
        bare=bare_work(bytes_moved, sum(p.nbytes for p in params), device),
    )


def clipped(benchmark, shapes, device):
    """As Trainer steps: the norm of all gradients, clipping, the update."""
    ours = optimizer(AdamW, shapes, device, max_grad_norm=1.0)
    stock = optimizer(torch.optim.AdamW, shapes, device, fused=True)
    params = stock.param_groups[0]["params"]

    def clip_and_step():
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        stock.step()

    of_norm = sum(p.nbytes for p in params)
    bytes_moved = sum(p.numel() * BYTES[p.dtype] for p in params) + of_norm
    compare(
        benchmark,
        ours.step,
        {"torch clip_grad_norm_ + fused": clip_and_step},
        check=checking(shapes, device, max_grad_norm=1.0),
        bytes_moved=bytes_moved,
        bare=bare_work(bytes_moved, 2 * of_norm, device),
    )


@pytest.mark.parametrize("case", CASES)
def test_adamw(benchmark, device, small, case):
    alone(benchmark, shrunk(CASES[case], small), device)


@pytest.mark.parametrize("case", CASES)
def test_adamw_clipped(benchmark, device, small, case):
    clipped(benchmark, shrunk(CASES[case], small), device)


# model, rank of LoRA, dtype; on two cores as many blocks as hold 136 M parameters
TRAINED = {
    "smollm2-135m-full-fp32": ("smollm2-135m", None, FP32),
    "qwen3-0.6b-full-bf16": ("qwen3-0.6b", None, BF16),
    "gemma-2-2b-full-bf16": ("gemma-2-2b", None, BF16),
    "qwen3-0.6b-lora-fp32": ("qwen3-0.6b", 16, FP32),
    "gpt-oss-20b-lora-fp32": ("gpt-oss-20b", 16, FP32),
    "llama-3-8b-lora-fp32": ("llama-3-8b", 16, FP32),
}
ELEMENTS = 2_600_000_000 if DEVICE == "cuda" else 136_000_000


@pytest.mark.parametrize("trained", TRAINED)
def test_adamw_of_model(benchmark, device, small, trained):
    """Clipped, as Trainer does."""
    name, rank, dtype = TRAINED[trained]
    parameters = models.parameters(name, rank, ELEMENTS)
    benchmark.extra_info["shape"] = f"{parameters.told}, {len(parameters.shapes)} tensors"
    clipped(benchmark, shrunk([(shape, dtype) for shape in parameters.shapes], small), device)


@pytest.mark.parametrize("mode", TIMED)
def test_adamw_bf16_modes(benchmark, device, small, mode):
    kept_as = TIMED[mode]
    # rows of whole blocks of codes
    shapes = [((63, 256) if small else (2000, 10240), BF16)]
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
    others = {"fp32": (), "4bit": ("fp32", "8bit")}.get(kept_as.moments, ("fp32",))
    for moments in others:
        rivals[f"ours, {moments} moments"] = optimizer(
            AdamW, shapes, device, seed=0, rounding=kept_as.rounding, moments=moments
        ).step
    bytes_moved = int(kept_as.moved * param.numel())
    compare(
        benchmark,
        ours.step,
        rivals,
        check=checking(
            shapes,
            device,
            seed=0,
            share=0.5 if kept_as.moments == "4bit" else 0.2,
            **kept_as.options,
        ),
        bytes_moved=bytes_moved,
        bare=bare_work(bytes_moved, param.nbytes, device),
    )


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("millions", [50, 500])
def test_adamw_offloaded(benchmark, device, small, millions, dtype):
    """States on the host against states beside the weights: on a CPU what the pieces cost, on a GPU
    the bus. 500 M parameters twice need 16 GB."""
    if device == "cpu" and millions == 500:
        pytest.skip("on a CPU the states lie where they lay: 50 million tell as much")
    shapes = shrunk([((millions * 20, 6250), dtype)] * 8, small)
    ours = optimizer(AdamW, shapes, device, offload="states")
    rivals = {"resident": optimizer(AdamW, shapes, device).step}
    bytes_moved = sum(p.numel() * BYTES[p.dtype] for p in ours.param_groups[0]["params"])
    check = checking(shapes, device, offload="states")
    compare(benchmark, ours.step, rivals, check=check, bytes_moved=bytes_moved)


STEPS = """
import statistics, sys, time, torch
import {module}
generator = torch.Generator().manual_seed(0)
param = torch.nn.Parameter(torch.randn({rows}, 2048, generator=generator).to(torch.{dtype}))
param.grad = torch.randn({rows}, 2048, generator=generator).to(torch.{dtype})
optimizer = {made}([param]{options})
optimizer.step()
for _ in sys.stdin:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    print(statistics.median(times), flush=True)
"""


@contextlib.contextmanager
def stepping(code):
    """A function that returns the median of seven steps of a process, which stands still between:
    its threads would spin."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:

        def sample():
            process.send_signal(signal.SIGCONT)
            process.stdin.write("\n")
            seconds = float(process.stdout.readline())
            process.send_signal(signal.SIGSTOP)
            return seconds

        try:
            yield sample
        finally:
            process.kill()


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU they alternate in one process")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_8bit(benchmark, small, dtype):
    """4 M elements with 8-bit moments, a process of each, by turns."""
    if importlib.util.find_spec("bitsandbytes") is None:  # its import would start its threads
        pytest.skip("bitsandbytes is not installed")
    rows = 64 if small else 2000
    checking([((rows, 2048), getattr(torch, dtype))], "cpu", share=0.2, moments="8bit", seed=0)()
    codes = [
        STEPS.format(module=module, made=made, options=options, dtype=dtype, rows=rows)
        for module, made, options in [
            ("fastft", "fastft.AdamW", ", moments='8bit'"),
            ("bitsandbytes", "bitsandbytes.optim.AdamW8bit", ""),
        ]
    ]
    with stepping(codes[0]) as ours, stepping(codes[1]) as theirs:
        benchmark.pedantic(ours)
        if not small:
            runs = {"ours": ours, "bitsandbytes": theirs}
            keep(benchmark.extra_info, {"bitsandbytes": turns.by_turns(runs, seconds=1.5)})
            print(f"\n{benchmark.name}: {benchmark.extra_info}")


@pytest.mark.parametrize("case", ["50M_fp32", "50M_bf16", "1000x256_fp32"])
def test_grad_norm(benchmark, device, small, case):
    shapes = shrunk(CASES[case], small)
    grads = [torch.randn(shape, device=device).to(dtype) for shape, dtype in shapes]

    def check():
        exact = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt()
        assert_no_worse(grad_norm(grads).float(), exact.float(), exact, terms=len(grads))

    compare(
        benchmark,
        lambda: grad_norm(grads),
        {"torch.nn.utils.get_total_norm": lambda: torch.nn.utils.get_total_norm(grads)},
        check=check,
        bytes_moved=sum(grad.nbytes for grad in grads),
    )
