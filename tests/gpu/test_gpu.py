"""What only a GPU can show: that kernels launch, agree with the CPU, follow the current stream, and
train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.adamw_modes import MODES, Mode
from support.adamw_problems import Training, past_two_to_the_31
from support.adamw_steps import assert_same_bits
from support.attention_problems import OPTIONS, each_segment, inputs, results, segments_of_lengths
from support.head_problems import check_fp32_weights_under_autocast, check_the_factor_of_the_mean
from support.numerics import assert_no_common_factor, assert_no_worse
from support.row_problems import CASES, EVERYTHING, IGNORED, Case, check, draw, plain, run

import fastft
from fastft.attention.segment_attention import segment_attention
from fastft.loss import head_gemms
from fastft.ops import OPERATORS
from fastft.optim.grad_norm import grad_norm

pytestmark = pytest.mark.gpu
large = pytest.mark.xdist_group("large")  # one after the other, however many processes test

ADAMW = OPERATORS["adamw_"]
MIXED = MODES["stochastic-bf16"]
SIZES = (1, 3, 63, 507, 16_384, 16_385, 1_000_003, 0, *[4097] * 80)


def needs_gib(memory: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < memory:
        pytest.skip(f"needs {memory} GiB of the GPU's memory, {free:.0f} are free")


@pytest.fixture(params=["cuda", "triton"])
def adamw_engine(request: pytest.FixtureRequest) -> str:
    reason = ADAMW.unavailable(request.param, torch.device("cuda", 0))
    if request.param == "triton" and reason is not None:
        pytest.skip(reason)
    return request.param


def clipping(engine: str) -> dict[str, float]:
    """Clipping, where the engine has a kernel for the norm."""
    return {"max_grad_norm": 1.0} if engine in OPERATORS["grad_norm_squared_"].engines else {}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_adamw_has_the_bits_of_the_cpu(adamw_engine: str, mode: Mode) -> None:
    expected = Training(mode, "cpp", sizes=SIZES).step(3).values()
    assert_same_bits(
        Training(mode, adamw_engine, sizes=SIZES, device="cuda").step(3).values(), expected
    )


@pytest.mark.parametrize("mode", [MODES["fp32-fp32"], MIXED])
def test_adamw_on_unaligned_tensors(adamw_engine: str, mode: Mode) -> None:
    expected = Training(mode, "cpp", sizes=(1003, 7), offset=1).step(2).values()
    actual = Training(mode, adamw_engine, sizes=(1003, 7), offset=1, device="cuda").step(2).values()
    assert_same_bits(actual, expected)


def test_adamw_follows_the_current_stream(adamw_engine: str) -> None:
    expected, stream = (
        Training(MIXED, adamw_engine, device="cuda").step(3).values(),
        torch.cuda.Stream(),
    )
    with torch.cuda.stream(stream):
        actual = Training(MIXED, adamw_engine, device="cuda").step(3).values()
    assert_same_bits(actual, expected)


def test_adamw_over_a_thousand_small_tensors(adamw_engine: str) -> None:
    options = {"sizes": (256,) * 1000, **clipping(adamw_engine)}
    expected = Training(MIXED, "cpp", **options).step(2).values()
    actual = Training(MIXED, adamw_engine, device="cuda", **options).step(2).values()
    assert_same_bits(actual, expected)


@large
@pytest.mark.parametrize("moments", ["bf16", "8bit", "4bit"])
def test_adamw_past_two_to_the_31(adamw_engine: str, moments: str) -> None:
    needs_gib(20)
    problem = past_two_to_the_31(moments, "cuda")
    ADAMW.native(*problem.end)
    ADAMW.implementation(adamw_engine, torch.device("cuda", 0))(*problem.whole)
    problem.assert_same_ends()


@pytest.mark.parametrize("capturable", [False, True])
def test_an_adamw_step_does_not_wait(adamw_engine: str, capturable: bool) -> None:
    options = {"capturable": capturable, **clipping(adamw_engine)}
    training = Training(MIXED, adamw_engine, device="cuda", **options).step(2)
    if capturable:
        training.optimizer.found_inf = torch.zeros(1, device="cuda")
        training.optimizer.grad_scale = torch.full((1,), 8.0, device="cuda")
        training.optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            training.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_adamw_in_a_graph(mode: Mode) -> None:
    """A replay counts, clips, reads the learning rate and found_inf; steps outside of the graph may
    lie between."""
    options = {"device": "cuda", "max_grad_norm": 0.5, "capturable": True}
    eager, captured = (Training(mode, "cuda", **options).step(2) for _ in range(2))
    for training in (eager, captured):
        for group in training.optimizer.param_groups:
            group["lr"] = torch.tensor(1e-3, device="cuda")
        training.optimizer.found_inf = torch.zeros(1, device="cuda")
        training.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    grads = [param.grad for param in captured.params]
    for i in range(6):
        for training in (eager, captured):
            training.optimizer.found_inf.fill_(float(i == 2))
            for group in training.optimizer.param_groups:
                group["lr"].fill_(1e-3 * (i + 1))
        eager.step()
        if i == 4:
            captured.step()
            continue
        for param, grad in zip(eager.params, grads, strict=True):
            grad.copy_(param.grad)
        captured.generator.set_state(eager.generator.get_state())
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured.values(), eager.values())
    assert {float(state["step"]) for state in captured.optimizer.state.values()} == {8.0}


def test_adamw_with_a_grad_scaler() -> None:
    """As on the CPU, where the host decides; a step is skipped."""
    results = []
    for device, capturable in (("cpu", False), ("cuda", False), ("cuda", True)):
        training = Training(MODES["fp32-fp32"], "auto", device=device, capturable=capturable)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0)
        for i in range(4):
            for param in training.params:
                param.grad = training.random(param.numel()).to(device) * 1024.0
            if i == 1:
                training.params[3].grad[5] = torch.inf
            scaler.scale(torch.zeros((), device=device))
            scaler.step(training.optimizer)
            assert training.optimizer.step_was_skipped == (i == 1)
            scaler.update(1024.0)
        results.append(training.values())
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_gradients(dtype: torch.dtype) -> None:
    grads = [torch.randn(size).to(dtype) for size in (*SIZES, *[3] * 300)]
    ours, truth = grad_norm([grad.cuda() for grad in grads]), torch.cat(grads).double().norm()
    assert ours.device.type == "cuda" and ours.item() == truth.float().item()
    grads[6][1_000_000] = torch.inf
    assert not grad_norm([grad.cuda() for grad in grads]).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"offload": "gradients"}, {"release_gradients": True}])
def test_gradients_that_backward_frees(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Resident, and on the host with micro-batches and clipping, or used up in backward."""
    micro, clips = (3, {"max_grad_norm": 0.5}) if "offload" in options else (1, {})
    results = []
    for given in (options, {}):
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(2, size, generator=generator) for size in SIZES]
        params = [torch.nn.Parameter(pair[0].to("cuda", dtype)) for pair in drawn]
        optimizer, norms = fastft.AdamW(params, lr=1e-2, **clips, **given), []
        for step in range(3):
            for number in range(micro):
                scale = 1.0 + step + number / 3
                factors = [(scale * pair[1]).to("cuda", dtype) for pair in drawn]
                sum((p * f).sum() for p, f in zip(params, factors, strict=True)).backward()
            if not clips:
                optimizer.clip_at_step([p.grad for p in params], torch.inf)
            optimizer.step()
            norms.append(optimizer.grad_norm.item())
            optimizer.zero_grad()
        torch.cuda.synchronize()
        results.append([*params, *(optimizer.state[p]["exp_avg"] for p in params), norms])
    (*ours, our_norms), (*stock, norms) = results
    assert our_norms == norms
    assert_same_bits([t.detach().cpu() for t in ours], [t.detach().cpu() for t in stock])


ROWS = OPERATORS["cross_entropy_rows"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda", "triton"])
def rows(request: pytest.FixtureRequest):
    """The function of one of the engines."""
    reason = ROWS.unavailable(request.param, torch.device("cuda", 0))
    if request.param == "triton" and reason is not None:
        pytest.skip(reason)
    return ROWS.implementation(request.param, torch.device("cuda", 0))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_option_of_cross_entropy_rows(rows, case: Case) -> None:
    """At a number of classes that no vector divides."""
    for dtype in DTYPES:
        check(rows, draw(case, 5, 507, dtype, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 63, 32_000, 50_257, 151_936])
def test_cross_entropy_rows(rows, classes: int, dtype: torch.dtype) -> None:
    """Few options: Triton compiles each together with each number of classes, dtype and option, for
    a second or two."""
    for case in (CASES["plain"], EVERYTHING, CASES["confident with statistics"]):
        check(rows, draw(case, 5, classes, dtype, "cuda"))


@pytest.mark.parametrize("padding", [1, 8, 24])
def test_cross_entropy_rows_at_any_distance(rows, padding: int) -> None:
    for case in (EVERYTHING, CASES["in place"]):
        check(rows, draw(case, 63, 2051, torch.bfloat16, "cuda", padding))


def test_cross_entropy_rows_repeats_its_bits(rows) -> None:
    problem = draw(EVERYTHING, 507, 50_257, torch.bfloat16, "cuda")
    first, second = run(rows, problem), run(rows, problem)
    assert all(torch.equal(second[name], value) for name, value in first.items())


@large
def test_cross_entropy_rows_past_two_to_the_31(rows) -> None:
    needs_gib(6)
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
        rows(
            problem.logits, problem.target, [], problem.upstream, losses, lse, [], [grad], *options
        )

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
        assert_no_worse(actual, theirs[name].to(actual.dtype), truth[name], name, terms=63 + 32_000)


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
    x, weight = (
        torch.randn(tokens, 64, device="cuda", dtype=dtype),
        torch.randn(1003, 64, device="cuda", dtype=dtype),
    )
    target = torch.randint(0, 1003, (tokens,), device="cuda")
    target[::7] = -100

    def run(loss, kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(kind).requires_grad_() for tensor in (x, weight)]
        value = loss(*leaves, target, reduction="sum")
        return [value, *torch.autograd.grad(value, leaves)]

    def plain(hidden_states, head, labels, reduction):
        return F.cross_entropy(
            F.linear(hidden_states, head).float().to(hidden_states.dtype),
            labels,
            reduction=reduction,
        )

    ours, same_dtype = run(fastft.linear_cross_entropy, dtype), run(plain, dtype)
    for actual, rival, truth in zip(ours, same_dtype, run(plain, torch.float64), strict=True):
        assert_no_worse(actual, rival, truth, terms=tokens + 64 + 1003)


def test_fp32_weights_where_torch_adds_to_16_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_gemms, "knows_out_dtype", lambda *_: False)
    check_fp32_weights_under_autocast(64, "cuda")


def test_this_torch_adds_to_fp32() -> None:
    """Else the fall-back is what runs: right, but slower; say so in the notes."""
    for product in ("mm", "addmm"):
        assert head_gemms.knows_out_dtype(product, torch.bfloat16, torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_loss_adds_to_a_gradient_is_scaled_in_fp32(dtype: torch.dtype) -> None:
    """1 / 8100 is off by 0.38 % in bf16."""
    x, weight = (torch.randn(n, 64, device="cuda").to(dtype).requires_grad_() for n in (8100, 1003))
    target = torch.randint(0, 1003, (8100,), device="cuda")
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    F.cross_entropy(F.linear(*exact), target).backward()
    weight.grad = torch.zeros_like(weight)
    fastft.linear_cross_entropy(x, weight, target, accumulate_weight_grad=True).backward()
    assert_no_common_factor(weight.grad, exact[1].grad, dtype)


def test_labels_of_the_host_are_refused() -> None:
    logits, target = torch.randn(5, 7, device="cuda"), torch.zeros(5, dtype=torch.int64)
    losses = torch.empty(5, device="cuda")
    with pytest.raises(ValueError, match="target is on cpu, input on cuda"):
        fastft.cross_entropy(logits, target)
    with pytest.raises(RuntimeError, match="target must be on the device of logits"):
        ROWS.native(
            logits,
            target,
            [],
            [],
            losses,
            torch.empty_like(losses),
            [],
            [],
            -100,
            0.0,
            0.0,
            0.0,
            1.0,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "chunk_rows", [None, 4096, 1000], ids=["one chunk", "few chunks", "many chunks"]
)
def test_a_mean_scales_gradients_by_what_is_not_rounded(
    dtype: torch.dtype, chunk_rows: int | None
) -> None:
    check_the_factor_of_the_mean(dtype, chunk_rows, "cuda")


@pytest.mark.parametrize("chunk_rows", [64, 500])
def test_fp32_weights_under_autocast(chunk_rows: int) -> None:
    check_fp32_weights_under_autocast(chunk_rows, "cuda")


def test_a_training_step_is_stocks() -> None:
    pytest.importorskip("transformers")
    from support.trainers import tiny_llama

    model = tiny_llama(1003, hidden_size=64, num_hidden_layers=2).cuda()
    batch = fastft.PackingCollator()([{"input_ids": list(range(i, i + 40))} for i in (1, 50, 300)])
    batch = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }

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
@pytest.mark.parametrize(
    "name", ["causal", "both_ways", "window", "chunks", "sinks", "sinks_and_window"]
)
def test_packed_attention(name: str, impl: str) -> None:
    """torch's own kernels and blocks of queries, against float64 on the CPU; two rows, grouped
    heads."""
    lengths, options = (30, 33, 63), OPTIONS[name]
    truth_call = inputs("rows", options, torch.bfloat16)
    leaves = ("query", "key", "value", "sinks")

    def moved(device: str, dtype: torch.dtype) -> dict[str, object]:
        held = {
            key: value
            for key, value in truth_call.items()
            if key in leaves and torch.is_tensor(value)
        }
        return {
            **options,
            **{
                key: value.detach().to(device, dtype).requires_grad_()
                for key, value in held.items()
            },
        }

    on_gpu = segments_of_lengths(lengths)
    ends = on_gpu.cu_seqlens_q.cuda()
    on_gpu = replace(on_gpu, cu_seqlens_q=ends, cu_seqlens_k=ends)
    ours = results(segment_attention, on_gpu, moved("cuda", torch.bfloat16), impl=impl)
    plain = results(
        lambda **call: each_segment(lengths, **call), None, moved("cpu", torch.bfloat16)
    )
    truth = results(lambda **call: each_segment(lengths, **call), None, moved("cpu", torch.float64))
    for index, (actual, other, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        assert_no_worse(actual.cpu(), other, exact, f"tensor {index}", terms=2 * sum(lengths))


def test_packed_attention_drops_the_same_again() -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, 4, 96, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        out = segment_attention(q, k, v, segments_of_lengths((32, 64)), causal=True, dropout=0.5)
        runs.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for one, two in zip(*runs, strict=True):
        torch.testing.assert_close(one, two)
    assert not torch.allclose(
        runs[0][0], segment_attention(q, k, v, segments_of_lengths((32, 64)), causal=True)
    )
