"""One optimizer step against torch's fused AdamW, alone and with clipping, and on a GPU bitsandbytes and torchao.

The limit reads and writes as many bytes in place. bitsandbytes' CPU library brings OpenMP threads of its own, which
spin between the runs and slow everybody else's down: it cannot alternate with others in one process there.
"""

from __future__ import annotations

import pytest
import torch
from compare import compare, rival

from fastft.optim.adamw import AdamW
from fastft.optim.grad_norm import grad_norm

FP32, BF16 = torch.float32, torch.bfloat16
MIXED = [((1024, 256), FP32), ((256,), FP32), ((63, 507), FP32), ((512, 128), BF16)]
CASES = {
    "50M_fp32": [((50_000_000,), FP32)],
    "50M_bf16": [((50_000_000,), BF16)],
    "400_mixed": MIXED * 100,
    "1000x256_fp32": [((256,), FP32)] * 1000,
}
BYTES = {FP32: 28, BF16: 26}  # of ours, per element; torch's bf16 moments move 14
# of a bf16 parameter: bytes per element moved and resident, the gradient included
MODES = {
    "exact": ({}, 26, 14),
    "kahan": ({"rounding": "kahan"}, 26, 14),
    "stochastic": ({"rounding": "stochastic"}, 22, 12),
    "exact_bf16_moments": ({"moments": "bf16"}, 18, 10),
    "stochastic_bf16_moments": ({"rounding": "stochastic", "moments": "bf16"}, 14, 8),
}


def optimizer(cls, shapes, device, **options):
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape, dtype in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    made = cls(params, **options)
    made.step()
    return made


def in_place(bytes_moved, device):
    floats = torch.ones(bytes_moved // 8, device=device)
    return lambda: floats.mul_(1.0)


@pytest.mark.parametrize("case", CASES)
def test_adamw(benchmark, device, case):
    shapes = CASES[case]
    ours = optimizer(AdamW, shapes, device)
    rivals = {"torch fused": optimizer(torch.optim.AdamW, shapes, device, fused=True).step}
    if device == "cuda" and (bitsandbytes := rival("bitsandbytes")):
        rivals["bitsandbytes 32-bit"] = optimizer(bitsandbytes.optim.AdamW32bit, shapes, device).step
    if device == "cuda" and (torchao := rival("torchao.optim")):
        rivals["torchao 8-bit"] = optimizer(torchao.AdamW8bit, shapes, device).step
    bytes_moved = sum(p.numel() * BYTES[p.dtype] for p in ours.param_groups[0]["params"])
    compare(benchmark, ours.step, rivals, bytes_moved=bytes_moved, limit=in_place(bytes_moved, device))


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
    compare(benchmark, ours.step, rivals, bytes_moved=bytes_moved, limit=in_place(bytes_moved, device))


@pytest.mark.parametrize("mode", MODES)
def test_adamw_bf16_modes(benchmark, device, mode):
    options, moved, resident = MODES[mode]
    shapes = [((20_000_000,), BF16)]
    ours = optimizer(AdamW, shapes, device, seed=0, **options)
    (param,), (state,) = ours.param_groups[0]["params"], ours.state.values()
    kept = [param, param.grad, *(value for value in state.values() if value.shape == param.shape)]
    assert sum(tensor.element_size() for tensor in kept) == resident
    benchmark.extra_info["bytes_resident_per_element"] = resident
    rivals = {"torch fused": optimizer(torch.optim.AdamW, shapes, device, fused=True).step}
    bytes_moved = moved * param.numel()
    compare(benchmark, ours.step, rivals, bytes_moved=bytes_moved, limit=in_place(bytes_moved, device))


@pytest.mark.parametrize("case", ["50M_fp32", "50M_bf16", "1000x256_fp32"])
def test_grad_norm(benchmark, device, case):
    grads = [torch.randn(shape, device=device).to(dtype) for shape, dtype in CASES[case]]
    rivals = {"torch.nn.utils.get_total_norm": lambda: torch.nn.utils.get_total_norm(grads)}
    bytes_moved = sum(grad.numel() * grad.element_size() for grad in grads)
    compare(benchmark, lambda: grad_norm(grads), rivals, bytes_moved=bytes_moved)
