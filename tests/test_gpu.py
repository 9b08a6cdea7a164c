"""What only a GPU can show: that kernels launch, agree with the CPU, follow the current stream, and train."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse
from support.row_problems import CASES, EVERYTHING, IGNORED, Case, check, draw, plain, run
from test_segment_attention import OPTIONS, each_segment, inputs, results, segments_of_lengths

import fastft
from fastft.data.segment_attention import segment_attention
from fastft.ops import OPERATORS

pytestmark = pytest.mark.gpu

SIZES = [1, 3, 63, 507, 16_384, 16_385, 1_000_003, *[4097] * 80]  # more tensors than one launch carries


def trained(device: str, dtype: torch.dtype, impl: str, steps: int = 5, **options) -> list[torch.Tensor]:
    """Parameters and states after some steps, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    draw = [[torch.randn(size, generator=generator) for size in SIZES] for _ in range(steps + 1)]
    params = [torch.nn.Parameter(value.to(device, dtype)) for value in draw[0]]
    half = len(params) // 2
    groups = [{"params": params[:half], "weight_decay": 0.1}, {"params": params[half:], "lr": 3e-3}]
    optimizer = fastft.AdamW(groups, impl=impl, **options)
    for grads in draw[1:]:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(device, dtype)
        optimizer.step()
    states = [value for param in params for key, value in sorted(optimizer.state[param].items()) if key != "step"]
    return [tensor.detach().cpu() for tensor in [*params, *states]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True}, {"rounding": "kahan"}, {"rounding": "stochastic", "moments": "bf16"}],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
@pytest.mark.filterwarnings("ignore:rounding=")
def test_adamw_has_the_bits_of_the_cpu(dtype: torch.dtype, options: dict[str, object]) -> None:
    ours, expected = trained("cuda", dtype, "cuda", seed=1, **options), trained("cpu", dtype, "cpp", seed=1, **options)
    assert all(map(torch.equal, ours, expected))


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


ROWS = OPERATORS["cross_entropy_rows"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda", "triton"])
def rows(request: pytest.FixtureRequest):
    """The function of one of the engines."""
    reason = ROWS.unavailable(request.param, torch.device("cuda", 0))
    if request.param == "triton" and reason is not None:
        pytest.skip(reason)
    return ROWS.implementation(request.param, torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 507, 32_000, 50_257, 151_936])
def test_cross_entropy_rows(rows, classes: int, dtype: torch.dtype) -> None:
    for case in CASES.values():
        check(rows, draw(case, 5, classes, dtype, "cuda"))


@pytest.mark.parametrize("padding", [1, 8, 24])
def test_cross_entropy_rows_at_any_distance(rows, padding: int) -> None:
    for case in (EVERYTHING, CASES["in place"]):
        check(rows, draw(case, 63, 2051, torch.bfloat16, "cuda", padding))


def test_cross_entropy_rows_repeats_its_bits(rows) -> None:
    problem = draw(EVERYTHING, 507, 50_257, torch.bfloat16, "cuda")
    first, second = run(rows, problem), run(rows, problem)
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_cross_entropy_rows_past_two_to_the_31(rows) -> None:
    near = draw(CASES["plain"], 5, 63, torch.bfloat16, "cuda")
    far = torch.empty(2**31 + 200, dtype=torch.bfloat16, device="cuda")
    check(rows, replace(near, logits=far.as_strided((5, 63), (2**29 + 8, 1)).copy_(near.logits)))


@pytest.mark.parametrize("target", [-1, 63, 2**31 - 1])
def test_a_target_out_of_range_is_nan_in_its_row(rows, target: int) -> None:
    problem = draw(EVERYTHING, 3, 63, torch.float32, "cuda")
    problem.target[0] = target
    ours = run(rows, problem)
    assert ours["losses"][0].isnan() and ours["grad"][0].isnan().all() and not ours["is_top1"][0]
    assert all(value[1:].isfinite().all() for value in ours.values())


def test_cross_entropy_rows_in_a_graph_and_without_waiting(rows) -> None:
    """One launch that a CUDA graph captures; nothing in it waits for the device."""
    problem = draw(Case(softcap=5.0), 63, 32_000, torch.bfloat16, "cuda")
    losses, lse = torch.full((2, 63), torch.nan, device="cuda")
    grad = torch.full_like(problem.logits, torch.nan)

    def compute() -> None:
        options = (IGNORED, *problem.case.floats())
        rows(problem.logits, problem.target, [], problem.upstream, losses, lse, [], [grad], *options)

    compute()  # compiles what is to be compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compute()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    other = draw(problem.case, 63, 32_000, torch.bfloat16, "cuda")
    problem.logits.copy_(other.logits)
    problem.target.copy_(other.target)
    for tensor in (losses, lse, grad):
        tensor.fill_(torch.nan)
    graph.replay()
    theirs, truth = plain(problem, torch.float32), plain(problem, torch.float64)
    for name, actual in {"losses": losses, "lse": lse, "grad": grad}.items():
        assert_no_worse(actual, theirs[name].to(actual.dtype), truth[name], name)


def test_cross_entropy_rows_follows_the_current_stream(rows) -> None:
    problem, stream = draw(EVERYTHING, 63, 32_000, torch.bfloat16, "cuda"), torch.cuda.Stream()
    expected = run(rows, problem)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = run(rows, problem)
    stream.synchronize()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 63, 507])
def test_linear_cross_entropy(dtype: torch.dtype, tokens: int) -> None:
    x, weight = torch.randn(tokens, 64, device="cuda", dtype=dtype), torch.randn(1003, 64, device="cuda", dtype=dtype)
    target = torch.randint(0, 1003, (tokens,), device="cuda")
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


def test_auto_takes_the_cuda_kernels() -> None:
    for operator in (OPERATORS["adamw_"], ROWS):
        assert operator.resolve("auto", torch.device("cuda", 0)) == "cuda"


@pytest.mark.parametrize("impl", ["flash_cuda", "blocks"])
@pytest.mark.parametrize("name", ["causal", "both_ways", "window", "chunks", "sinks", "sinks_and_window"])
def test_packed_attention(name: str, impl: str) -> None:
    """torch's own kernels and blocks of queries, against float64 on the CPU; two rows, grouped heads."""
    lengths, options = (30, 33, 63), OPTIONS[name]
    truth_call = inputs("rows", options, torch.bfloat16)
    leaves = ("query", "key", "value", "sinks")

    def moved(device: str, dtype: torch.dtype) -> dict[str, object]:
        held = {key: value for key, value in truth_call.items() if key in leaves and torch.is_tensor(value)}
        return {**options, **{key: value.detach().to(device, dtype).requires_grad_() for key, value in held.items()}}

    on_gpu = segments_of_lengths(lengths)
    ends = on_gpu.cu_seqlens_q.cuda()
    on_gpu = replace(on_gpu, cu_seqlens_q=ends, cu_seqlens_k=ends)
    ours = results(segment_attention, on_gpu, moved("cuda", torch.bfloat16), impl=impl)
    plain = results(lambda **call: each_segment(lengths, **call), None, moved("cpu", torch.bfloat16))
    truth = results(lambda **call: each_segment(lengths, **call), None, moved("cpu", torch.float64))
    for index, (actual, other, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        assert_no_worse(actual.cpu(), other, exact, f"tensor {index}")


def test_packed_attention_drops_the_same_again() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 96, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        out = segment_attention(q, k, v, segments_of_lengths((32, 64)), causal=True, dropout=0.5)
        runs.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for one, two in zip(*runs, strict=True):
        torch.testing.assert_close(one, two)
    assert not torch.allclose(runs[0][0], segment_attention(q, k, v, segments_of_lengths((32, 64)), causal=True))
