"""What only a GPU can show: that kernels launch, agree with the CPU, follow the current stream, and train."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse

import fastft
from fastft.ops import OPERATORS

pytestmark = pytest.mark.gpu

SIZES = [1, 3, 63, 507, 16_384, 16_385, 1_000_003, *[4097] * 80]  # more tensors than one launch carries


def trained(device: str, dtype: torch.dtype, impl: str, steps: int = 5) -> list[torch.Tensor]:
    """Parameters and states after some steps, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    draw = [[torch.randn(size, generator=generator) for size in SIZES] for _ in range(steps + 1)]
    params = [torch.nn.Parameter(value.to(device, dtype)) for value in draw[0]]
    half = len(params) // 2
    groups = [{"params": params[:half], "weight_decay": 0.1}, {"params": params[half:], "lr": 3e-3}]
    optimizer = fastft.AdamW(groups, impl=impl)
    for grads in draw[1:]:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(device, dtype)
        optimizer.step()
    states = [value for param in params for key, value in sorted(optimizer.state[param].items()) if key != "step"]
    return [tensor.detach().cpu() for tensor in [*params, *states]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_has_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    for ours, expected in zip(trained("cuda", dtype, "cuda"), trained("cpu", dtype, "cpp"), strict=True):
        assert torch.equal(ours, expected)


def test_adamw_follows_the_current_stream() -> None:
    stream, expected = torch.cuda.Stream(), trained("cuda", torch.float32, "cuda")
    with torch.cuda.stream(stream):
        actual = trained("cuda", torch.float32, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_unaligned_parameters() -> None:
    """Views that start in the middle of a vector must take the scalar path."""
    results = []
    for device, impl in (("cuda", "cuda"), ("cpu", "cpp")):
        torch.manual_seed(0)
        storage, grads = torch.randn(1001).to(device), torch.randn(1001).to(device)
        param = torch.nn.Parameter(storage[1:])
        param.grad = grads[1:]
        fastft.AdamW([param], impl=impl).step()
        results.append(param.detach().cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 63, 507])
def test_linear_cross_entropy(dtype: torch.dtype, rows: int) -> None:
    x, weight = torch.randn(rows, 64, device="cuda", dtype=dtype), torch.randn(1003, 64, device="cuda", dtype=dtype)
    target = torch.randint(0, 1003, (rows,), device="cuda")
    target[::7] = -100

    def run(loss, kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(kind).requires_grad_() for tensor in (x, weight)]
        value = loss(*leaves, target, reduction="sum")
        return [value, *torch.autograd.grad(value, leaves)]

    def plain(hidden_states, head, labels, reduction):
        return F.cross_entropy(
            F.linear(hidden_states, head).float().to(hidden_states.dtype), labels, reduction=reduction
        )

    ours, same_dtype = run(fastft.linear_cross_entropy, dtype), run(plain, dtype)
    for actual, rival, truth in zip(ours, same_dtype, run(plain, torch.float64), strict=True):
        assert_no_worse(actual, rival, truth)


def test_a_training_step_is_stocks() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=1003, **shape)).cuda()
    batch = fastft.PackingCollator()([{"input_ids": list(range(i, i + 40))} for i in (1, 50, 300)])
    batch = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(param.grad.clone() for param in model.parameters())]

    stock = step()
    with fastft.fused_loss(model) as report:
        fused = step()
    assert report.fused == 1 and not report.materialised
    for actual, expected in zip(fused, stock, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_auto_takes_the_cuda_kernel() -> None:
    assert OPERATORS["adamw_"].resolve("auto", torch.device("cuda", 0)) == "cuda"
