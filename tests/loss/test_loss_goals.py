"""What the losses promise, one test for each promise: first the features, then where rivals are
wrong and ours is not.

Vocabulary-parallel heads and heads sharded by FSDP or ZeRO need several processes: their tests are
elsewhere.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.numerics import assert_no_worse
from support.watch import Watch
from torch import nn

import fastft
from fastft import _native
from fastft.loss import head_sweep
from fastft.loss.cross_entropy_rows import ROWS
from fastft.loss.lazy.logits import lazy_linear
from fastft.loss.lazy.report import Report

ENGINES = [
    "eager",
    pytest.param("cpp", marks=pytest.mark.skipif(bool(_native.missing("cpu")), reason="not built")),
]
T, H, V = 63, 16, 507
CHUNK = 16  # rows: every loss here takes four chunks


def make(rows=T, hidden=H, classes=V, ignored=0.2, bias=False):
    x, head = torch.randn(rows, hidden), torch.randn(classes, hidden)
    target = torch.randint(0, classes, (rows,)).masked_fill(torch.rand(rows) < ignored, -100)
    return [x, head, torch.randn(classes) if bias else None], target


def eager(x, head, bias, target, **options):
    """The loss of plain torch over all the logits; 16-bit logits are taken to fp32, as transformers
    does."""
    logits = F.linear(x, head, bias)
    return oracle.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), target, **options
    )


def fused(x, head, bias, target, **options):
    return fastft.linear_cross_entropy(
        x, head, target, linear_bias=bias, **{"chunk_rows": CHUNK} | options
    )


def evaluate(function, operands, dtype=None, upstream=None, frozen=()):
    """The result of `function(*operands)` in `dtype` (their own by default), and the gradients of
    all operands but the frozen ones."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(i not in frozen)
        for i, t in enumerate(operands)
    ]
    result = function(*leaves)
    upstream = torch.ones_like(result) if upstream is None else upstream.to(result.dtype)
    return [
        result.detach(),
        *torch.autograd.grad(
            result, [t for t in leaves if t is not None and t.requires_grad], upstream
        ),
    ]


def check(ours, plain, operands, dtype=torch.float32, upstream=None, frozen=()):
    """Values and gradients of `ours` against `plain` in `dtype` and in float64."""
    runs = [(ours, dtype), (plain, dtype), (plain, torch.float64)]
    results = [evaluate(function, operands, cast, upstream, frozen) for function, cast in runs]
    for i, values in enumerate(zip(*results, strict=True)):
        assert_no_worse(*values, f"gradient {i}" if i else "loss", terms=terms_of(operands))


def terms_of(operands):
    """Rows, features and classes that a gradient sums over."""
    return sum(operands[0].shape) + len(operands[1])


def check_option(upstream=None, operands=None, **options):
    operands, target = operands or make()
    check(
        lambda *t: fused(*t, target, **options),
        lambda *t: eager(*t, target, **options),
        operands,
        upstream=upstream,
    )


def flops_of(step):
    with Watch() as watch:
        step()
    return watch.flops


def parameters(operands, frozen=()):
    return [
        None if t is None else t.clone().requires_grad_(i not in frozen)
        for i, t in enumerate(operands)
    ]


# --- features


def test_fused_linear():
    operands, target = make()
    with Watch() as watch:
        fused(*parameters(operands), target).backward()
    assert watch.elements == max(CHUNK * V, H * V)  # of T x V there is no trace
    check_option(operands=(operands, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_of_32_megabytes(dtype):
    """Beside the gradients, at a head of 16384 classes; the logits of these rows take 64 MiB in
    fp32."""
    operands, target = make(rows=1024, hidden=32, classes=16384, ignored=0)
    x, head = (t.to(dtype).requires_grad_() for t in operands[:2])
    fastft.linear_cross_entropy(x, head, target).backward()
    x.grad = head.grad = None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        fastft.linear_cross_entropy(x, head, target).backward()
    changes = [
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    gradients = 2 * 4 * (x.numel() + head.numel())  # as sums in fp32, and rounded
    assert 8 << 20 < max(itertools.accumulate(changes)) <= (32 << 20) + gradients


def test_flops_trainable_head():
    operands, target = make(ignored=0)
    x, head, _ = parameters(operands)
    assert flops_of(lambda: fused(x, head, None, target).backward()) == 6 * T * H * V


def test_flops_frozen_head():
    operands, target = make(ignored=0)
    x, head, _ = parameters(operands, frozen=(1,))
    assert flops_of(lambda: fused(x, head, None, target).backward()) == 4 * T * H * V
    upstream = torch.randn(T)
    assert (
        flops_of(lambda: fused(x, head, None, target, reduction="none").backward(upstream))
        == 4 * T * H * V
    )
    run = dict(operands=operands, upstream=upstream, frozen=(1,))
    check(
        lambda *t: fused(*t, target, reduction="none"),
        lambda *t: eager(*t, target, reduction="none"),
        **run,
    )


def test_skips_gemms_of_ignored_rows():
    operands, target = make(ignored=0)
    target[torch.randperm(T)[:40]] = -100
    leaves = parameters(operands)
    assert flops_of(lambda: fused(*leaves, target).backward()) == 6 * (T - 40) * H * V
    losses = fused(*leaves, target, reduction="none")
    # and of the logits made again
    assert flops_of(lambda: losses.sum().backward()) == 6 * (T - 40) * H * V


def test_ignore_index():
    operands, target = make(ignored=0)
    target[::3] = V + 7
    check_option(operands=(operands, target), ignore_index=V + 7)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing(smoothing):
    check_option(label_smoothing=smoothing)


def test_z_loss():
    check_option(z_loss=0.05)


def test_softcap():
    check_option(softcap=2.5)


def test_logit_scale():
    check_option(logit_scale=0.25)
    check_option(logit_scale=4.0, softcap=3.0)  # the scale comes first


def test_class_weights():
    weight = torch.rand(V)
    check_option(weight=weight)
    check_option(weight=weight, label_smoothing=0.2, z_loss=0.01)


def test_per_token_weights_and_upstream_gradients():
    operands, target = make(bias=True)
    token_weights = torch.rand(T) / T
    check(
        lambda *t: (fused(*t, target, reduction="none") * token_weights.to(t[0].dtype)).sum(),
        lambda *t: (eager(*t, target, reduction="none") * token_weights.to(t[0].dtype)).sum(),
        operands,
    )
    check_option(upstream=torch.randn(T), operands=(operands, target), reduction="none")


def dft(token):
    return -token.log_probs * token.log_probs.detach().exp()


def test_closed_form_token_loss_in_6thv():
    operands, target = make(ignored=0)
    x, head, _ = parameters(operands)
    with Watch() as watch:
        fastft.linear_token_loss(x, head, target, dft, chunk_rows=CHUNK).backward()
    assert watch.flops == 6 * T * H * V and watch.elements == max(CHUNK * V, H * V)
    with Watch() as watch:  # whose logits are made again
        log_probs((x, head), target).log_probs.sum().backward()
    assert watch.flops == 8 * T * H * V and watch.elements == max(CHUNK * V, H * V)

    def plain(x, head, _):
        log_p = F.linear(x, head).log_softmax(1).gather(1, target[:, None])
        return -(log_p * log_p.detach().exp()).sum()

    check(
        lambda x, head, _: fastft.linear_token_loss(x, head, target, dft, chunk_rows=CHUNK),
        plain,
        operands,
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_none_sum_mean(reduction):
    check_option(
        upstream=torch.rand(T) if reduction == "none" else torch.tensor(1.75), reduction=reduction
    )


@pytest.mark.parametrize("items", [37, 37.0, torch.tensor(37), torch.tensor([37.0])])
def test_num_items_in_batch_replaces_the_count(items):
    operands, target = make()
    plain = lambda *t: eager(*t, target, reduction="sum") / 37  # noqa: E731
    check(lambda *t: fused(*t, target, num_items=items), plain, operands)
    of_logits = lambda x, head, _: fastft.cross_entropy(x @ head.T, target, num_items=items)  # noqa: E731
    check(of_logits, plain, operands)


def test_bias():
    check_option(operands=make(bias=True))


def log_probs(operands, target, **options):
    return fastft.linear_log_probs(operands[0], operands[1], target, chunk_rows=CHUNK, **options)


def plain_log_probs(operands, target):
    return oracle.log_probs(F.linear(operands[0], operands[1]), target)


@pytest.mark.parametrize(("name", "place"), [("log_probs", 0), ("entropy", 1)])
def test_log_probs_and_entropy_of_each_token(name, place):
    operands, target = make()
    check(
        lambda *t: getattr(log_probs(t, target), name),
        lambda *t: plain_log_probs(t, target)[place],
        operands,
        upstream=torch.randn(T),
    )


def test_token_accuracy():
    operands, target = make()
    best = F.linear(*operands[:2]).argmax(1)
    target = torch.where((torch.arange(T) % 2 == 0) & (target >= 0), best, target)
    is_top1 = log_probs(parameters(operands), target).is_top1
    assert torch.equal(is_top1, best == target) and T // 3 < is_top1.sum() < T
    assert not is_top1.requires_grad


def test_returns_lse():
    operands, target = make()
    ours, plain = (lambda *t: log_probs(t, target).lse), lambda *t: plain_log_probs(t, target)[2]
    check(ours, plain, operands, upstream=torch.randn(T))


def test_prob_targets():
    operands, _ = make(bias=True)
    target, options = torch.rand(T, V).softmax(1), {"label_smoothing": 0.1, "z_loss": 0.01}
    plain = lambda *t: oracle.soft_cross_entropy(F.linear(*t), target, **options)  # noqa: E731
    check(lambda *t: fused(*t, target, **options), plain, operands)


def test_lora_on_lm_head(monkeypatch):
    """PEFT's head, base(x) + scale * B(A(x)), is one linear layer: the gradients of A and B, and no
    logits."""
    monkeypatch.setitem(head_sweep._LIMITS, "cpu", (0, CHUNK, 1 << 31, 0))
    (x, head, _), target = make()
    operands, report = [x, head, torch.randn(4, H), torch.randn(V, 4)], Report()

    def step(x, head, down, up, lazy=True):
        linear = (lambda x, weight: lazy_linear(x, weight, None, report)) if lazy else F.linear
        return F.cross_entropy(linear(x, head) + linear(x @ down.T, up) * 0.5, target)

    for frozen in ((1,), ()):
        check(step, lambda *t: step(*t, lazy=False), operands, frozen=frozen)
    with Watch() as watch:
        step(*parameters(operands)).backward()
    assert report.fused == 3 and not report.materialised and watch.elements < T * V


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_head_only_training(reduction):
    """Liger gives such a head no gradient."""
    operands, target = make(bias=True)
    ours, plain = (partial(f, target=target, reduction=reduction) for f in (fused, eager))
    check(ours, plain, operands, frozen=(0,))
    x, head, _ = parameters(operands, frozen=(0,))
    ours(x, head, None).sum().backward()
    assert x.grad is None and head.grad.any()


FUNCTIONS = {
    "linear_cross_entropy": lambda x, head, target: fused(x, head, None, target),
    "linear_cross_entropy of each token": lambda x, head, target: fused(
        x, head, None, target, reduction="none"
    ).sum(),
    "cross_entropy": lambda x, head, target: fastft.cross_entropy(x @ head.T, target),
    "linear_log_probs": lambda x, head, target: sum(log_probs((x, head), target)[:3]).sum(),
    "linear_token_loss": lambda x, head, target: fastft.linear_token_loss(x, head, target, dft),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_retain_graph(name):
    """Liger's second gradient is twice the first."""
    operands, target = make()
    x, head, _ = parameters(operands)
    loss = FUNCTIONS[name](x, head, target) * 2.0
    first, second = (torch.autograd.grad(loss, (x, head), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second)) and first[1].any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_double_backward_is_a_clear_error(name):
    operands, target = make()
    x, head, _ = parameters(operands)
    function = name.partition(" of ")[0].replace("linear_log_probs", "linear_cross_entropy")
    with pytest.raises(RuntimeError, match=f"{function} cannot be differentiated twice"):
        torch.autograd.grad(FUNCTIONS[name](x, head, target), x, create_graph=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_never_mutated(name):
    operands, target = make()
    x, head, _ = parameters(operands)
    before = [t.detach().clone() for t in (x, head, target)]
    FUNCTIONS[name](x, head, target).backward()
    assert all(
        torch.equal(t, b) and t._version == 0
        for t, b in zip((x, head, target), before, strict=True)
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_deterministic(name):
    operands, target = make(rows=300)
    one, two = (
        evaluate(lambda x, head: FUNCTIONS[name](x, head, target), operands[:2], torch.float32)
        for _ in range(2)
    )
    assert all(map(torch.equal, one, two))


def test_torch_compile_no_graph_break():
    operands, target = make()
    torch._dynamo.reset()

    def training_loss(x, head, _):
        hidden = torch.tanh(x)
        token = fastft.linear_log_probs(hidden, head, target)
        return (
            fastft.linear_cross_entropy(hidden, head, target, z_loss=0.01)
            - 0.1 * token.entropy.mean()
        )

    # a graph break would raise
    compiled = torch.compile(training_loss, fullgraph=True, backend="aot_eager")
    one, two = (
        evaluate(function, operands, torch.float32) for function in (training_loss, compiled)
    )
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("max_counted", [None, 60])
def test_no_host_sync(reduction, max_counted, monkeypatch):
    """Of tensors without numbers, as far from the host as a GPU's: whoever waits for one fails."""
    # it does not know their device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    x, head = (
        torch.empty(n, H, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in (T, V)
    )
    target = torch.zeros(T, dtype=torch.int64, device="meta")
    items, weight = torch.ones((), device="meta"), torch.ones(V, device="meta")
    options = {"num_items": items} if reduction == "mean" else {"weight": weight}
    with Watch() as watch:
        losses = fused(
            x,
            head,
            None,
            target,
            reduction=reduction,
            max_counted=max_counted,
            impl="eager",
            **options,
        )
        losses.sum().backward()
    rows = max_counted or T
    assert watch.flops == (6 if reduction == "mean" else 8) * rows * H * V and head.grad.shape == (
        V,
        H,
    )
    with pytest.raises(RuntimeError):
        losses.sum().item()  # as this does


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(hidden, reduction):
    operands, target = make(bias=True)
    operands[0], options = operands[0].to(hidden), {"target": target, "reduction": reduction}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = (evaluate(partial(f, **options), operands) for f in (fused, eager))
    truth = evaluate(partial(eager, **options), operands, torch.float64)
    for mine, rival, exact in zip(ours, plain, truth, strict=True):
        assert mine.dtype == rival.dtype
        assert_no_worse(mine, rival, exact, terms=terms_of(operands))
    rounded = [t.bfloat16() for t in operands]
    assert torch.equal(ours[0], fused(*rounded, **options))


def test_fp16_grad_scaler_safe():
    """A scale above the largest fp16 number meets the gradients last, in fp32."""
    operands, target = make(ignored=0)
    operands = [operands[0] / 64, operands[1] / 64, None]
    scale = torch.tensor(2.0**17)
    ours, plain = (
        evaluate(partial(f, target=target, reduction="sum"), operands, torch.float16, scale)
        for f in (fused, eager)
    )
    truth = evaluate(lambda *t: eager(*t, target, reduction="sum"), operands, torch.float64, scale)
    assert not plain[2].isfinite().all()  # dlogits, -0.998 * 2^17, are beyond fp16 for torch
    for mine, exact in zip(ours, truth, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(
            mine.double(), exact, rtol=4e-3, atol=4e-3 * exact.abs().max().item()
        )
    # a mean's 1 / items comes last as well: dlogits of 1e-9 would all be 0 in fp16
    options, scale = {"num_items": 10**9}, torch.tensor(2.0**26)
    ours, truth = (
        evaluate(lambda *t: fused(*t, target, **options), operands, d, scale)[2]
        for d in (torch.float16, torch.float64)
    )
    torch.testing.assert_close(
        ours.double(), truth, rtol=4e-3, atol=1e-3 * truth.abs().max().item()
    )


@pytest.mark.skipif(bool(_native.missing("cpu")), reason="not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_path(dtype):
    assert ROWS.resolve("auto", torch.device("cpu")) == "cpp"
    operands, target = make(bias=True)
    check(
        lambda *t: fused(*t, target, impl="cpp" if t[0].dtype == dtype else "auto"),
        lambda *t: eager(*t, target),
        operands,
        dtype,
    )


def test_int32_targets():
    operands, target = make()
    for name, function in FUNCTIONS.items():
        wide, narrow = (
            evaluate(lambda x, h, t=t, f=function: f(x, h, t), operands[:2], torch.float32)
            for t in (target, target.int())
        )
        assert all(map(torch.equal, wide, narrow)), name


def test_more_than_2_31_logits():
    """2^32 of them by rows, of which a few count; and rows that lie 2^30 elements apart."""
    rows, classes = 1 << 17, (1 << 15) + 1
    x, head = torch.randn(rows, 1), torch.randn(classes, 1)
    target = torch.full((rows,), -100)
    counted = torch.tensor([0, 1 << 16, rows - 2, rows - 1])
    target[counted] = torch.tensor([classes - 1, 0, 17, classes - 1])
    ours = evaluate(
        lambda x, head: fastft.linear_cross_entropy(x, head, target), [x, head], torch.float32
    )
    few = lambda x, head: eager(x[counted], head, None, target[counted])  # noqa: E731
    for values in zip(
        ours, *(evaluate(few, [x, head], d) for d in (torch.float32, torch.float64)), strict=True
    ):
        assert_no_worse(*values, terms=classes)
    stride = (1 << 30) + 1
    logits = (
        torch.empty(2 * stride + 7, dtype=torch.bfloat16)
        .as_strided((3, 7), (stride, 1))
        .copy_(torch.randn(3, 7))
    )
    assert logits.data_ptr() % 2 == 0 and logits[2].storage_offset() > 2**31
    target = torch.tensor([1, 6, 3])
    losses = fastft.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), target, reduction="none"))


def test_fp32_loss_sum():
    """Thousands of bf16 losses: a bf16 sum would stop growing at 256 times the size of one."""
    operands, target = make(rows=4096, classes=63)
    check(
        lambda *t: fused(*t, target, reduction="sum"),
        lambda *t: eager(*t, target, reduction="sum"),
        operands,
        torch.bfloat16,
    )


def test_fp32_weight_gradient_accumulation():
    """Of a bf16 head, over 256 chunks, against one sum in bf16."""
    operands, target = make(rows=4096, classes=63)
    operands = [operands[0].bfloat16(), operands[1].bfloat16(), None]
    ours, plain, truth = (
        evaluate(partial(f, target=target, reduction="sum"), operands, d)[2]
        for f, d in ((fused, torch.bfloat16), (eager, torch.bfloat16), (eager, torch.float64))
    )
    assert_no_worse(ours, plain, truth, terms=terms_of(operands))
    in_bf16 = torch.zeros_like(ours)
    for rows in torch.arange(4096).split(CHUNK):
        chunk = lambda x, head, _, rows=rows: eager(x, head, None, target[rows], reduction="sum")  # noqa: E731
        in_bf16 += evaluate(chunk, [operands[0][rows], *operands[1:]], torch.bfloat16)[2]
    assert (ours.double() - truth).norm() < (in_bf16.double() - truth).norm() / 4


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_ignored_batch(name):
    operands, target = make(ignored=1.1)
    for result in evaluate(
        lambda x, head: FUNCTIONS[name](x, head, target), operands[:2], torch.float32
    ):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("margin", [25.0, 80.0])
def test_collapse_safe(margin, impl):
    """A confident row keeps its loss and gradients: softmax - 1 would be 0 in fp32."""
    logits, target = torch.zeros(1, 9), torch.tensor([4])
    logits[0, 4] = margin
    others = 8 * torch.exp(torch.tensor(-margin, dtype=torch.float64))
    slope = -others / (1 + others)
    of_logits = lambda z: fastft.cross_entropy(z, target, impl=impl)  # noqa: E731
    linear = lambda x, head: fastft.linear_cross_entropy(x, head, target, impl=impl)  # noqa: E731
    loss, gradient = evaluate(of_logits, [logits])
    same_loss, d_input, d_head = evaluate(linear, [logits, torch.eye(9)])
    for found, truth in (
        (loss, others.log1p()),
        (same_loss, others.log1p()),
        (gradient[0, 4], slope),
        (d_input[0, 4], slope),
        (d_head[4, 4], margin * slope),
    ):
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulate_into_weight_grad(dtype):
    operands, target = make(bias=True)
    results = []
    for function, cast, options in (
        (fused, dtype, {"accumulate_weight_grad": True}),
        (eager, dtype, {}),
        (eager, torch.float64, {}),
    ):
        x, head, bias = leaves = [t.to(cast, copy=True).requires_grad_() for t in operands]
        function(x, head, bias, target, **options).backward()
        first = head.grad
        (3 * function(x, head, bias, target, **options)).backward()
        assert head.grad is first
        results.append([leaf.grad for leaf in leaves])
    for values in zip(*results, strict=True):
        assert_no_worse(*values, terms=terms_of(operands))


def test_accumulating_into_weight_grad_is_heard_by_ddp(tmp_path):
    """DDP waits for the weight's node in the graph, and complains at the next step if it never
    ran."""

    def steps():
        head = nn.Linear(H, V, bias=False)
        head.forward = lambda x, target: fastft.linear_cross_entropy(
            x, head.weight, target, accumulate_weight_grad=True
        )
        wrapped = nn.parallel.DistributedDataParallel(head)
        operands, target = make()
        for _ in range(2):
            wrapped(operands[0], target).backward()
        expected = eager(operands[0], head.weight, None, target)
        (gradient,) = torch.autograd.grad(expected, head.weight)
        torch.testing.assert_close(head.weight.grad, 2 * gradient)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        steps()
    finally:
        # DDP first: as the last owner of the group it would wait for gloo's threads with the GIL,
        # for which they may wait to let go of a reduction
        gc.collect()
        torch.distributed.destroy_process_group()


def hooked():
    head = torch.randn(V, H, requires_grad=True)
    head.register_post_accumulate_grad_hook(lambda weight: None)
    return head


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (lambda: torch.randn(V, H, requires_grad=True) * 2, {}, "must be a leaf"),
        (lambda: torch.randn(V, H), {}, "must be a leaf that requires a gradient"),
        (hooked, {}, "hooks"),
        (lambda: torch.randn(V, H, requires_grad=True), {"reduction": "none"}, "reduction"),
        (
            lambda: torch.randn(V, H, requires_grad=True),
            {"group": object()},
            "spread over the processes",
        ),
    ],
)
def test_accumulating_into_weight_grad_is_refused_where_it_would_go_unseen(head, options, message):
    operands, target = make()
    with pytest.raises(
        ValueError, match=f"accumulate_weight_grad=True is not possible: .*{message}"
    ):
        fused(operands[0], head(), None, target, accumulate_weight_grad=True, **options)


def test_no_per_model_patches():
    """A model that nobody has seen: its loss is fused, its gradients are torch's, no class or
    module is changed."""

    class Stranger(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.decoder = nn.Embedding(V, H), nn.Linear(H, V)
            self.config = types.SimpleNamespace(vocab_size=V)

        def forward(self, ids, labels):
            logits = self.decoder(self.inner(ids).tanh()) / 0.7
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model, ids = Stranger(), torch.randint(0, V, (3, 21))
    classes = [dict(vars(kind)) for kind in (Stranger, nn.Linear, F.cross_entropy)]
    with fastft.fused_loss(model) as report:
        loss = model(ids, ids)
        ours = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    assert report.fused == 1 and not report.materialised and "forward" not in vars(model.decoder)
    assert classes == [dict(vars(kind)) for kind in (Stranger, nn.Linear, F.cross_entropy)]
    results = [ours]
    for dtype in (torch.float32, torch.float64):
        loss = model.to(dtype)(ids, ids)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for values in zip(*results, strict=True):
        assert_no_worse(*(value.detach() for value in values), terms=ids.numel() + H + V)


# --- where rivals are wrong; what torch does is asserted for the version in which it was seen

AS_SEEN = torch.__version__.startswith("2.13.")
chunked_torch = pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyOptions"), reason="torch has no chunked loss"
)


def torch_chunked(x, head, target, **options):
    return F.linear_cross_entropy(
        x, head, target, options=nn.LinearCrossEntropyOptions(), **options
    )


@chunked_torch
def test_right_where_torch_chunked_sums_bf16_losses_in_bf16():
    operands, target = make(rows=1024, classes=1024, ignored=0)
    x, head = (t.bfloat16() for t in operands[:2])
    logits = F.linear(x.double(), head.double())
    truth = F.cross_entropy(logits, target)
    # a processor with bf16 units rounds each logit to bf16, by 2^-9 of it at most; of the mean over
    # the rows the standard deviation is less than that of the labels' logits, by the root of the
    # rows
    rounding = 4 * 2**-9 * logits.pow(2).mean().sqrt() / len(x) ** 0.5
    assert abs(fastft.linear_cross_entropy(x, head, target) - truth) <= rounding
    if AS_SEEN:
        assert abs(torch_chunked(x, head, target) - truth) > 20 * rounding


@chunked_torch
def test_right_where_torch_chunked_makes_nan_of_an_ignored_batch():
    operands, target = make(ignored=1.1)
    ours = evaluate(
        lambda x, head: fastft.linear_cross_entropy(x, head, target), operands[:2], torch.float32
    )
    assert not any(result.any() for result in ours)
    if AS_SEEN:
        theirs = evaluate(
            lambda x, head: torch_chunked(x, head, target, ignore_index=-100),
            operands[:2],
            torch.float32,
        )
        assert all(result.isnan().all() for result in theirs)


@chunked_torch
def test_right_where_torch_chunked_ignores_autocast():
    operands, target = make(ignored=0)
    x, head, _ = operands
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fastft.linear_cross_entropy(x, head, target), torch_chunked(x, head, target)
    in_bf16 = fastft.linear_cross_entropy(x.bfloat16(), head.bfloat16(), target)
    in_fp32 = fastft.linear_cross_entropy(x, head, target)
    assert ours == in_bf16 != in_fp32
    if AS_SEEN:
        torch.testing.assert_close(theirs, in_fp32, rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_right_where_liger_zeroes_the_logits_of_ignored_rows(training):
    operands, target = make(ignored=0.5)
    logits = F.linear(*operands[:2])
    before = logits.clone()
    loss = fastft.cross_entropy(logits.requires_grad_(training), target)
    if training:
        loss.backward()
    assert torch.equal(logits, before) and logits._version == 0 and before[target == -100].any()


def test_right_where_liger_has_an_accuracy_of_nan():
    operands, target = make(ignored=1.1)
    tokens = fastft.linear_log_probs(operands[0], operands[1], target)
    assert not any(result.any() for result in tokens[:4])  # NaN would count as true


def test_right_where_torch_trl_and_liger_lose_a_confident_row():
    logits, target = torch.zeros(1, 3), torch.tensor([1])
    logits[0, 1] = 25.0
    z = logits.clone().requires_grad_()
    stock = F.cross_entropy(z, target)
    assert stock == 0 and torch.autograd.grad(stock, z)[0][0, 1] == 0
    loss = fastft.cross_entropy(z, target)
    tokens = fastft.linear_log_probs(logits, torch.eye(3), target)
    for value in (loss.detach(), -tokens.log_probs[0], -torch.autograd.grad(loss, z)[0][0, 1]):
        torch.testing.assert_close(value.item(), 2 * 1.3887943864964021e-11, rtol=1e-6, atol=0)


@pytest.mark.parametrize("hidden", [128, 300])
def test_right_where_cce_counts_the_bias_once_a_block(hidden):
    operands, target = make(hidden=hidden, bias=True)
    operands = [operands[0] / hidden**0.5, operands[1], 5 * operands[2]]
    check_option(operands=(operands, target))
