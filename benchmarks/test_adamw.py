"""One optimizer step against torch's fused AdamW, and on a GPU bitsandbytes and torchao.

The limit reads and writes as many bytes in place. bitsandbytes' CPU library brings OpenMP threads of its own, which
spin between the runs and slow everybody else's down: it cannot alternate with others in one process there.
"""

from __future__ import annotations

import pytest
import torch
from compare import compare, rival

from fastft.optim.adamw import AdamW

FP32, BF16 = torch.float32, torch.bfloat16
MIXED = [((1024, 256), FP32), ((256,), FP32), ((63, 507), FP32), ((512, 128), BF16)]
CASES = {
    "50M_fp32": [((50_000_000,), FP32)],
    "50M_bf16": [((50_000_000,), BF16)],
    "400_mixed": MIXED * 100,
    "1000x256_fp32": [((256,), FP32)] * 1000,
}
BYTES = {FP32: 28, BF16: 26}  # of ours, per element; torch's bf16 moments move 14


@pytest.mark.parametrize("case", CASES)
def test_adamw(benchmark, device, case):
    def optimizer(cls, **options):
        params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape, dtype in CASES[case]]
        for param in params:
            param.grad = torch.randn_like(param)
        made = cls(params, **options)
        made.step()
        return made

    ours = optimizer(AdamW)
    rivals = {"torch fused": optimizer(torch.optim.AdamW, fused=True).step}
    if device == "cuda" and (bitsandbytes := rival("bitsandbytes")):
        rivals["bitsandbytes 32-bit"] = optimizer(bitsandbytes.optim.AdamW32bit).step
    if device == "cuda" and (torchao := rival("torchao.optim")):
        rivals["torchao 8-bit"] = optimizer(torchao.AdamW8bit).step
    bytes_moved = sum(p.numel() * BYTES[p.dtype] for p in ours.param_groups[0]["params"])
    floats = torch.ones(bytes_moved // 8, device=device)
    compare(benchmark, ours.step, rivals, bytes_moved=bytes_moved, limit=lambda: floats.mul_(1.0))
