from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.numerics import assert_no_worse

from fastft import _native
from fastft.loss.linear_log_probs import LinearLogProbs, linear_log_probs, linear_token_loss

ENGINES = [
    "eager",
    pytest.param("cpp", marks=pytest.mark.skipif(bool(_native.missing("cpu")), reason="not built")),
]
DTYPES = [torch.float32, torch.bfloat16]
LOGITS = {
    "plain": {},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 4.0, "logit_scale": 2.0},
}


def make(rows, hidden, classes, dtype=torch.float32):
    x, head, bias = (
        torch.randn(*shape).to(dtype) for shape in ((rows, hidden), (classes, hidden), (classes,))
    )
    target = torch.randint(0, classes, (rows,)).masked_fill(torch.rand(rows) < 0.2, -100)
    return x, head, bias, target


def plain_log_probs(x, head, target, *, linear_bias=None, upcast=True, **options):
    logits = F.linear(x, head, linear_bias)
    return LinearLogProbs(
        *oracle.log_probs(logits.float() if upcast else logits, target, **options)
    )


def gradients(result, leaves, upstream):
    return torch.autograd.grad(
        sum((r * u.to(r.dtype)).sum() for r, u in zip(result, upstream, strict=False)), leaves
    )


def leaves_of(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 63, 507), (63, 1, 15), (63, 33, 507)])
def test_matches_torch(impl, dtype, options, shape, poisoned_empty):
    x, head, bias, target = make(*shape, dtype)
    upstream = torch.randn(3, shape[0])
    results, grads = [], []
    for function, cast in (
        (lambda *a, **k: linear_log_probs(*a, impl=impl, chunk_rows=8, **k), dtype),
        (plain_log_probs, dtype),
        (lambda *a, **k: plain_log_probs(*a, upcast=False, **k), torch.float64),
    ):
        leaves = leaves_of(x.to(cast), head.to(cast), bias.to(cast))
        results.append(function(leaves[0], leaves[1], target, linear_bias=leaves[2], **options))
        grads.append(gradients(results[-1][:3], leaves, upstream))
    for name, *values in zip(("log_probs", "entropy", "lse"), *results, strict=False):
        assert values[0].dtype == torch.float32
        assert_no_worse(*(value.detach() for value in values), name, terms=sum(shape))
    for name, *values in zip(("d_input", "d_weight", "d_bias"), *grads, strict=True):
        assert values[0].dtype == dtype
        assert_no_worse(*values, name, terms=sum(shape))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()])
@pytest.mark.parametrize("frozen", [False, True])
def test_any_of_the_results_may_have_a_gradient(wanted, frozen):
    x, head, bias, target = make(63, 33, 507)
    upstream = torch.randn(3, 63)
    results = []
    for function in (linear_log_probs, plain_log_probs):
        leaves = leaves_of(x) if frozen else leaves_of(x, head, bias)
        operands = (leaves[0], head, bias) if frozen else leaves
        result = function(operands[0], operands[1], target, linear_bias=operands[2])
        assert all(value.requires_grad for value in result[:3])
        if wanted:
            results.append(gradients([result[i] for i in wanted], leaves, upstream))
    torch.testing.assert_close(*(results or ([], [])), rtol=1e-4, atol=1e-5)


def test_shapes_empty_batches_and_ignored_rows():
    x, head, _, _ = make(6, 5, 7)
    target = torch.tensor([[0, -100, 2], [6, -100, 1]], dtype=torch.int32)
    result = linear_log_probs(x.view(2, 3, 5), head, target)
    assert all(value.shape == (2, 3) and not value[:, 1].any() for value in result[:4])
    leaf = head.requires_grad_()
    empty = linear_log_probs(x[:0], leaf, torch.zeros(0, dtype=torch.int64))
    assert all(value.shape == (0,) for value in empty[:4])
    assert not torch.autograd.grad(empty.log_probs.sum(), leaf)[0].any()


def test_autocast_and_no_grad():
    x, head, _, target = make(63, 33, 507)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        result = linear_log_probs(x.requires_grad_(), head, target)
        plain = plain_log_probs(x, head, target)
        truth = plain_log_probs(x.double(), head.double(), target, upcast=False)
    for actual, rival, exact in zip(result[:3], plain, truth, strict=False):
        assert not actual.requires_grad and not torch.equal(actual.double(), exact)
        assert_no_worse(actual, rival, exact, terms=63 + 33 + 507)


TOKEN_LOSSES = {
    "cross_entropy": lambda token, *_: -token.log_probs,
    "dft": lambda token, *_: -token.log_probs * token.log_probs.detach().exp(),
    "ppo": lambda token, old, advantage: (
        -torch.min(
            (token.log_probs - old).exp() * advantage,
            (token.log_probs - old).exp().clamp(0.8, 1.2) * advantage,
        )
    ),
    "entropy_bonus": lambda token, *_: -token.log_probs - 0.1 * token.entropy + 1e-3 * token.lse**2,
    "constant": lambda token, *_: torch.ones_like(token.lse),
}


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("token_loss", TOKEN_LOSSES.values(), ids=TOKEN_LOSSES)
@pytest.mark.parametrize("options", LOGITS.values(), ids=LOGITS)
def test_token_losses(impl, token_loss, options):
    x, head, bias, target = make(63, 33, 507)
    rows = torch.randn(2, 63)
    old = plain_log_probs(
        x.double(), head.double(), target, linear_bias=bias.double(), upcast=False, **options
    )
    rows[0] = old.log_probs + 0.3 * rows[0]
    results = []
    for function, cast in (
        (lambda *a, **k: linear_token_loss(*a, impl=impl, chunk_rows=8, **k), torch.float32),
        (plain_token_loss, torch.float32),
        (plain_token_loss, torch.float64),
    ):
        leaves = leaves_of(x.to(cast), head.to(cast), bias.to(cast))
        loss = function(
            leaves[0],
            leaves[1],
            target,
            token_loss,
            *rows.to(cast),
            linear_bias=leaves[2],
            **options,
        )
        results.append((loss.detach(), *torch.autograd.grad(3 * loss, leaves)))
    for name, *values in zip(("loss", "d_input", "d_weight", "d_bias"), *results, strict=True):
        assert_no_worse(*values, name, terms=63 + 33 + 507)


def plain_token_loss(x, head, target, token_loss, *rows, **options):
    tokens = plain_log_probs(x, head, target, upcast=False, **options)
    values = token_loss(tokens, *rows) + 0.0 * tokens.lse
    return torch.where(target != -100, values, 0.0).sum()


GOOD = {
    "input": torch.randn(4, 9),
    "linear_weight": torch.randn(7, 9),
    "target": torch.tensor([0, 6, -100, 3]),
}


@pytest.mark.parametrize("function", [linear_log_probs, linear_token_loss])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": torch.tensor([0, 7, 1, 1])}, ValueError, r"target\[1\] is 7"),
        (
            {"target": torch.rand(4, 7)},
            ValueError,
            "target must have the shape of input without its dimension -1",
        ),
        ({"target": torch.rand(4)}, TypeError, "target.*float32"),
        ({"target": [0, 1, 1, 1]}, TypeError, "target must be a torch.Tensor, got list"),
        ({"input": [[1.0] * 9] * 4}, TypeError, "input must be a torch.Tensor, got list"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer"),
        ({"linear_weight": torch.randn(7, 8)}, ValueError, r"linear_weight.*\(7, 8\)"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows"),
        ({"max_counted": 2}, ValueError, "max_counted is 2, but 3 rows count"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda'"),
        ({"impl": "fast"}, ValueError, "'fast'"),
    ],
)
def test_bad_input(function, arguments, error, message):
    extra = {"token_loss": lambda token: token.lse} if function is linear_token_loss else {}
    with pytest.raises(error, match=message):
        function(**(GOOD | extra | arguments))


@pytest.mark.parametrize(
    ("token_loss", "rows", "message"),
    [
        (lambda token: token.lse.sum(), (), r"one loss per token, shape \(3,\), got shape \(\)"),
        (lambda token: 0.0, (), "got float"),
        (lambda token, rows: rows, (torch.ones(3),), r"arguments\[0\].*\(4,\).*\(3,\)"),
        (
            lambda token, rows: rows,
            (torch.ones(4, requires_grad=True),),
            r"arguments\[0\] requires a gradient",
        ),
    ],
)
def test_bad_token_losses(token_loss, rows, message):
    with pytest.raises(ValueError, match=message):
        linear_token_loss(GOOD["input"], GOOD["linear_weight"], GOOD["target"], token_loss, *rows)


def test_a_sum_of_no_token_over_no_items_has_zero_gradients():
    x, weight = torch.randn(5, 9, requires_grad=True), torch.randn(15, 9, requires_grad=True)
    target = torch.full((5,), -100)
    loss = linear_token_loss(x, weight, target, lambda tokens: -tokens.log_probs)
    (loss / torch.tensor(0)).backward()
    assert not x.grad.any() and not weight.grad.any()


def plain_moments(x, head, target, *, linear_bias=None, upcast=True, **options):
    logits = oracle.capped(F.linear(x, head, linear_bias), **options)
    logits = logits.float() if upcast else logits
    squares = (2 * logits.log_softmax(-1)).logsumexp(-1)
    return [torch.where(target != -100, values, 0.0) for values in (logits.mean(-1), squares)]


MOMENTS = {"mean_logits": True, "log_sum_sq_probs": True}


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("options", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 1, 15), (63, 33, 507)])
def test_mean_logits_and_how_peaked_a_token_is(impl, dtype, options, shape, poisoned_empty):
    if impl == "cpp" and dtype not in DTYPES:
        pytest.skip("the C++ kernel takes fp32 and bf16")
    x, head, bias, target = make(*shape, dtype)
    given = {"linear_bias": bias, "impl": impl, "chunk_rows": 8, **options}
    result = linear_log_probs(x, head, target, **given, **MOMENTS)
    plain = plain_moments(
        x, head, target, linear_bias=bias, upcast=dtype != torch.float64, **options
    )
    truth = plain_moments(
        *(t.double() for t in (x, head)), target, linear_bias=bias.double(), upcast=False, **options
    )
    for name, rival, exact in zip(MOMENTS, plain, truth, strict=True):
        alone = linear_log_probs(x, head, target, **given, **{name: True})
        for tokens in (result, alone):
            ours = getattr(tokens, name)
            assert not ours.requires_grad
            assert ours.dtype == torch.promote_types(dtype, torch.float32)
            assert_no_worse(ours, rival, exact, name, terms=sum(shape))
        assert all(map(torch.equal, alone[:4], result[:4])) and alone.count(None) == 1
    assert linear_log_probs(x, head, target, **given)[4:] == (None, None)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradients_do_not_depend_on_the_moments(frozen):
    x, head, bias, target = make(63, 33, 507)
    results = []
    for extra in ({}, MOMENTS):
        leaves = leaves_of(x) if frozen else leaves_of(x, head, bias)
        operands = (leaves[0], head, bias) if frozen else leaves
        tokens = linear_log_probs(
            operands[0], operands[1], target, linear_bias=operands[2], **LOGITS["softcap"], **extra
        )
        results.append(torch.autograd.grad((tokens.log_probs + tokens.entropy).sum(), leaves))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("margin", [25.0, 60.0])
def test_how_peaked_a_token_is_where_one_class_leads_by_far(margin):
    """-2 times what the others have: 1 - p rounds to 0 in fp32."""
    logits = torch.zeros(3, 9)
    logits[:, 4] = margin
    result = linear_log_probs(
        logits, torch.eye(9), torch.tensor([4, 0, -100]), log_sum_sq_probs=True
    ).log_sum_sq_probs
    exact = -2 * torch.tensor([8.0, 8.0, 0.0], dtype=torch.float64) * math.exp(-margin)
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=0.0)


def test_moments_of_nothing():
    x, head, _, _ = make(6, 5, 7)
    ignored = linear_log_probs(x, head, torch.full((6,), -100), **MOMENTS)
    assert all(value.shape == (6,) and not value.any() for value in ignored)
    empty = linear_log_probs(x[:0].view(2, 0, 5), head, torch.zeros(2, 0).long(), **MOMENTS)
    assert all(value.shape == (2, 0) for value in empty)
    x[0] = torch.nan  # hidden states of rows that are ignored say nothing
    target = torch.tensor([-100, 1, 2, 3, 4, 5])
    assert not any(v.isnan().any() for v in linear_log_probs(x, head, target, **MOMENTS))


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_under_autocast_and_compiled(name):
    x, head, _, target = make(9, 5, 15)

    def compute(x, head):
        return getattr(linear_log_probs(x, head, target, **{name: True}), name)

    compiled = torch.compile(compute, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, head), compute(x, head))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = compute(x, head)
    truth = plain_moments(x.double(), head.double(), target, upcast=False)
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result.double(), truth[list(MOMENTS).index(name)], rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_row_without_a_finite_largest_logit_is_nan(impl, value):
    x, head = torch.tensor([[1.0], [value]]), torch.ones(1, 1)
    tokens = linear_log_probs(x, head, torch.zeros(2, dtype=torch.int64), impl=impl)
    for numbers in (tokens.log_probs, tokens.entropy, tokens.lse):
        assert numbers.isnan().tolist() == [False, True]
