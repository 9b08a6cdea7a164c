from __future__ import annotations

import hashlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.each_instruction_set import printed_by_each
from support.numerics import assert_no_worse

from fastft import _native
from fastft.loss.cross_entropy import CrossEntropyLoss, cross_entropy
from fastft.loss.cross_entropy_rows import ROWS

ENGINES = [
    "eager",
    pytest.param("cpp", marks=pytest.mark.skipif(bool(_native.missing("cpu")), reason="not built")),
]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 63), (63, 1), (3, 15), (63, 507), (17, 16), (5, 1000), (0, 7)]


def make(rows: int, classes: int, dtype: torch.dtype = torch.float32, ignored: float = 0.2):
    logits = (4 * torch.randn(rows, classes)).to(dtype)
    target = torch.randint(0, classes, (rows,))
    return logits, target.masked_fill(torch.rand(rows) < ignored, -100)


def loss_and_grad(function, logits, target, upstream=None, **options):
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, target, **options)
    (grad,) = torch.autograd.grad(
        loss, leaf, torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    )
    return loss.detach(), grad


def check(logits, target, impl, upstream=None, **options):
    ours = loss_and_grad(cross_entropy, logits, target, upstream, impl=impl, **options)
    # the loss of 16-bit logits is fp32: compare with torch's on fp32 copies
    statistics = torch.promote_types(logits.dtype, torch.float32)
    plain_loss, _ = loss_and_grad(
        oracle.cross_entropy, logits.to(statistics), target, upstream, **options
    )
    _, plain_grad = loss_and_grad(oracle.cross_entropy, logits, target, upstream, **options)
    truth = loss_and_grad(oracle.cross_entropy, logits.double(), target, upstream, **options)
    assert ours[0].dtype == statistics and ours[1].dtype == logits.dtype
    assert_no_worse(ours[0], plain_loss, truth[0], "loss", terms=sum(logits.shape))
    assert_no_worse(ours[1], plain_grad, truth[1], "gradient", terms=sum(logits.shape))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_matches_torch(impl, dtype, shape, reduction, poisoned_empty):
    logits, target = make(*shape, dtype)
    upstream = torch.randn(shape[0]) if reduction == "none" else torch.tensor(1.75)
    check(logits, target, impl, upstream, reduction=reduction)


# a kernel knows nothing of reductions: they are looked at once
@pytest.mark.parametrize(
    ("classes", "reduction"),
    [(1, "none"), (63, "none"), (507, "none"), (507, "sum"), (507, "mean")],
)
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", oracle.OPTIONS.values(), ids=oracle.OPTIONS)
def test_options(impl, dtype, reduction, options, classes, poisoned_empty):
    logits, target = make(33, classes, dtype)
    upstream = torch.randn(33) if reduction == "none" else None
    options = oracle.options_with_weight(options, classes)
    check(logits, target, impl, upstream, reduction=reduction, **options)


@pytest.mark.parametrize("options", oracle.OPTIONS.values(), ids=oracle.OPTIONS)
def test_float64(options):
    logits, target = make(33, 507, torch.float64)
    options = oracle.options_with_weight(options, 507)
    ours, truth = (
        loss_and_grad(f, logits, target, **options) for f in (cross_entropy, oracle.cross_entropy)
    )
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("options", oracle.OPTIONS.values(), ids=oracle.OPTIONS)
def test_num_items_divides_the_sum(impl, options):
    logits, target = make(33, 63)
    options = oracle.options_with_weight(options, 63)
    ours = loss_and_grad(cross_entropy, logits, target, impl=impl, num_items=7, **options)
    plain, truth = (
        loss_and_grad(oracle.cross_entropy, z, target, reduction="sum", **options)
        for z in (logits, logits.double())
    )
    for mine, rival, exact in zip(ours, plain, truth, strict=True):
        assert_no_worse(mine, rival / 7, exact / 7, terms=33 + 63)


@pytest.mark.parametrize("options", oracle.OPTIONS.values(), ids=oracle.OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_target_probabilities(options, reduction):
    logits, probabilities = torch.randn(2, 7, 3), torch.rand(2, 7, 3).softmax(1)
    options = oracle.options_with_weight(options, 7) | {"reduction": reduction}
    ours, expected = (
        loss_and_grad(f, logits, probabilities, **options)
        for f in (cross_entropy, oracle.soft_cross_entropy)
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.way("fp16 parameters", loss="works")
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_mean(impl, dtype):
    logits, target = make(63, 507, dtype)
    target[0] = 3
    check(logits, target, "auto" if dtype in (torch.float16, torch.float64) else impl)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize(
    ("input_shape", "target_shape"),
    [((7,), ()), ((2, 7, 3), (2, 3)), ((2, 7, 3, 2), (2, 3, 2)), ((4, 7, 1), (4, 1))],
)
def test_classes_in_dimension_1(impl, input_shape, target_shape):
    target = torch.randint(0, 7, target_shape)
    check(torch.randn(input_shape), target, impl)
    check(torch.randn(input_shape), target, impl, torch.randn(target_shape), reduction="none")


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(507, 63).T,
        lambda: torch.randn(126, 507)[::2],
        lambda: torch.randn(63, 600)[:, 5:512],
        lambda: torch.randn(1, 507).expand(63, 507),
    ],
)
def test_strided_logits(impl, view):
    logits = view()
    target = torch.randint(0, 507, (126,))[::2]
    leaf = logits.detach().requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(leaf, target, impl=impl), leaf)
    torch.testing.assert_close(grad, loss_and_grad(F.cross_entropy, logits, target)[1])


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 40])
@pytest.mark.parametrize(
    ("values", "target"),
    [
        ({0: "nan"}, 1),
        ({1: "nan"}, 1),
        ({0: "inf"}, 1),
        ({1: "inf"}, 1),
        ({0: "-inf"}, 1),
        ({1: "-inf"}, 1),
        ({4: "nan", 0: "inf"}, 1),
        (dict.fromkeys(range(40), "-inf"), 1),
    ],
)
def test_rows_that_are_not_finite(impl, dtype, width, values, target):
    logits = torch.randn(3, width).to(dtype)
    for position, value in values.items():
        if position < width:
            logits[1, position] = float(value)
    check(logits, torch.tensor([0, target, 2]), impl, torch.ones(3), reduction="none")
    ignored = cross_entropy(logits, torch.tensor([0, -100, 2]), impl=impl)
    assert torch.isfinite(ignored)


@pytest.mark.parametrize("impl", ENGINES)
def test_extreme_logits(impl):
    logits = torch.tensor(
        [[1e4, -1e4, 0.0], [88.0, 0.0, -88.0], [1e38, -1e38, 0.0], [-3e38, -3e38, -3e38]]
    )
    for target in range(3):
        check(logits, torch.full((4,), target), impl, torch.ones(4), reduction="none")


@pytest.mark.parametrize("impl", ENGINES)
def test_no_row_of_transposed_logits(impl):
    """Empty tensors count as contiguous, whatever their strides."""
    logits = torch.randn(7, 0).t().requires_grad_()
    loss = cross_entropy(logits, torch.empty(0, dtype=torch.int64), impl=impl)
    loss.backward()
    assert loss == 0 and logits.grad.shape == (0, 7)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize(
    "options", [{}, {"num_items": 0}, {"num_items": torch.tensor(0)}, {"reduction": "sum"}]
)
def test_no_row_counts(impl, rows, options):
    logits, target = torch.randn(rows, 7), torch.full((rows,), -100)
    loss, grad = loss_and_grad(cross_entropy, logits, target, impl=impl, **options)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("impl", ENGINES)
def test_deterministic_whatever_the_threads(impl):
    logits, target = make(63, 1000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = loss_and_grad(cross_entropy, logits, target, impl=impl)
        torch.set_num_threads(2)
        two = loss_and_grad(cross_entropy, logits, target, impl=impl)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))


PROBE = """
import hashlib, torch
from fastft.loss.cross_entropy import cross_entropy
from fastft.optim.grad_norm import grad_norm
torch.manual_seed(0)
digest = hashlib.sha256()
# Inf, and NaNs of other signs and payloads, two of them in a row where there is room
odd = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, -0x2ABCDF, 0x7FA12345], dtype=torch.int32)
for dtype in (torch.float32, torch.bfloat16):
    for classes in (1, 15, 16, 507, 1000):
        logits = (9 * torch.randn(33, classes)).to(dtype)
        logits[5:10, 0] = logits[6:11, classes // 2] = odd.view(torch.float32).to(dtype)
        norms = [grad_norm([row.clone()], "cpp") for row in logits]
        logits.requires_grad_()
        loss = cross_entropy(logits, torch.randint(0, classes, (33,)), reduction="none", impl="cpp")
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        for tensor in (loss.detach(), grad.float(), torch.stack(norms)):
            assert tensor.isnan().any()
            digest.update(tensor.where(tensor == tensor, torch.nan).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.skipif(bool(_native.missing("cpu")), reason="not built")
def test_every_instruction_set_gives_the_same_bits():
    """But for the sign and the payload of a NaN."""
    digests = printed_by_each(PROBE)
    assert len(digests["baseline"]) == len(hashlib.sha256().hexdigest())
    assert len(set(digests.values())) == 1, digests


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    classes=st.integers(1, 70),
    offset=st.sampled_from([0.0, -1e3, 1e3]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_any_shape_and_ignore_pattern(rows, classes, offset, spread, seed, data):
    torch.manual_seed(seed)
    logits = offset + spread * torch.randn(rows, classes)
    target = torch.tensor(
        data.draw(st.lists(st.integers(-1, classes - 1), min_size=rows, max_size=rows)),
        dtype=torch.int64,
    )
    for impl in ("eager", "auto"):
        check(logits, target, impl, torch.randn(rows), reduction="none", ignore_index=-1)


def operator_arguments(
    rows=7, classes=33, dtype=torch.float32, weight=True, upstream=3, statistics=True
):
    logits, target = make(rows, classes, dtype)
    weights, upstreams = [torch.rand(classes)] if weight else [], list(torch.randn(upstream, rows))
    outputs = [torch.empty(rows), torch.empty(rows, dtype=torch.bool)] if statistics else []
    results = torch.empty(rows), torch.empty(rows), outputs, [torch.empty_like(logits)]
    return [logits, target, weights, upstreams, *results, -100, 0.1, 0.02, 4.0, 0.5]


def test_operator_contract():
    torch.library.opcheck(ROWS.native, tuple(operator_arguments()))
    torch.library.opcheck(
        ROWS.native,
        tuple(operator_arguments(dtype=torch.bfloat16, weight=False, upstream=0, statistics=False)),
    )
    arguments = operator_arguments(upstream=1)
    arguments[6] = [torch.empty(7, 2, dtype=torch.float64)]
    torch.library.opcheck(ROWS.native, tuple([*arguments[:7], [], *arguments[8:]]))


def row_truth(logits, target, weight, upstream, options):
    """lse, entropy, is_top1 and the gradient of everything, in float64."""
    leaf = logits.double().requires_grad_()
    names = ("ignore_index", "label_smoothing", "z_loss", "softcap", "logit_scale")
    named = dict(zip(names, options, strict=True))
    losses = oracle.cross_entropy(leaf, target, weight=weight, reduction="none", **named)
    capped = {name: named[name] for name in ("softcap", "logit_scale")}
    _, entropy, lse, is_top1 = oracle.log_probs(leaf, target, **capped)
    (gradient,) = torch.autograd.grad((losses, lse, entropy), leaf, [u.double() for u in upstream])
    return losses.detach(), lse.detach(), entropy.detach(), is_top1, gradient


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("classes", [1, 16, 507])
def test_operator_writes_every_output(impl, in_place, classes):
    logits, target, weight, upstream, losses, lse, statistics, grad, *options = operator_arguments(
        9, classes
    )
    target[2] = -100
    truth = row_truth(logits, target, weight[0], upstream, options)
    output = logits if in_place else grad[0].fill_(torch.nan)
    row_kernel = ROWS.implementation(impl, logits.device)
    row_kernel(logits, target, weight, upstream, losses, lse, statistics, [output], *options)
    for actual, exact in zip(
        (losses, lse, statistics[0], output), (*truth[:3], truth[4]), strict=True
    ):
        torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=2e-6)
    assert torch.equal(statistics[1], truth[3]) and not output[2].any() and losses[2] == lse[2] == 0


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 63, 4097])
def test_sums_of_forward_change_no_bit_of_the_gradient(impl, dtype, classes):
    logits, target, weight, upstream, losses, lse, _, grad, *options = operator_arguments(
        5, classes, dtype, upstream=1, statistics=False
    )
    logits[1, 0], target[2] = torch.inf, -100
    row_kernel = ROWS.implementation(impl, logits.device)
    row_kernel(logits, target, weight, upstream, losses, lse, [], grad, *options)
    sums, again = torch.full((5, 2), torch.nan, dtype=torch.float64), torch.empty_like(logits)
    known, kept = torch.empty(5), torch.empty(5)
    row_kernel(logits, target, weight, [], known, kept, [sums], [], *options)
    assert torch.equal(known.nan_to_num(), losses.nan_to_num())
    row_kernel(logits, target, weight, upstream, known, kept, [sums], [again], *options)
    assert torch.equal(again.nan_to_num(), grad[0].nan_to_num())
    if impl == "cpp":  # they are taken: other sums are another gradient
        row_kernel(logits, target, weight, upstream, known, kept, [2 * sums + 1], [again], *options)
        assert not torch.equal(again.nan_to_num(), grad[0].nan_to_num())
        with pytest.raises(RuntimeError, match="sums must be a contiguous vector of 10"):
            row_kernel(logits, target, weight, [], known, kept, [sums.float()], [], *options)


@pytest.mark.parametrize("impl", ["auto", "eager"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_a_graph_that_is_kept_has_its_gradient_again(impl, dtype):
    logits = torch.randn(5, 63, dtype=dtype, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([3, 62, -100, 0, 9]), impl=impl)
    first, again = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("softcap", [0.0, 1.0])
@pytest.mark.parametrize("target", [3, 40, 506])
def test_of_equal_classes_the_first_is_the_top_one(impl, softcap, target):
    logits = torch.randn(3, 507)
    logits[:, target] = 1e4
    logits[1, target - 2] = logits[2, (target + 1) % 507] = 1e4
    statistics = [torch.empty(3), torch.empty(3, dtype=torch.bool)]
    row_kernel = ROWS.implementation(impl, logits.device)
    outputs = torch.empty(3), torch.empty(3), statistics, []
    options = (-100, 0.0, 0.0, softcap, 1.0)
    row_kernel(logits, torch.full((3,), target), [], [], *outputs, *options)
    assert statistics[1].tolist() == [True, False, target != 506]


@pytest.mark.parametrize("impl", ENGINES)
def test_entropy_where_a_class_is_impossible(impl):
    logits = torch.randn(4, 40)
    logits[:, ::3] = -torch.inf
    arguments = operator_arguments(4, 40, weight=False)
    arguments[0], arguments[1], arguments[8:] = (
        logits,
        torch.tensor([1, 2, 0, -100]),
        (-100, 0.0, 0.0, 0.0, 1.0),
    )
    ROWS.implementation(impl, logits.device)(*arguments)
    _, entropy, lse, _ = oracle.log_probs(logits.double(), arguments[1])
    torch.testing.assert_close(arguments[6][0].double(), entropy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(arguments[5].double(), lse, rtol=1e-6, atol=1e-6)
    assert arguments[4][2] == torch.inf and arguments[7][0].isfinite().all()


@pytest.mark.parametrize("impl", ENGINES)
def test_a_long_row_is_summed_without_losing_digits(impl):
    logits = torch.randn(2, 300_000)
    check(logits, torch.tensor([7, 299_999]), impl, reduction="sum", label_smoothing=0.3)


def test_a_target_that_nobody_checked_poisons_its_row():
    """On a device nobody looks at the targets: the row must not look right."""
    arguments = operator_arguments(4, 9)
    arguments[1] = torch.tensor([0, 9, -1, -100])
    ROWS.reference(*arguments)
    assert arguments[4].isnan().tolist() == [False, True, True, False]
    assert arguments[7][0].isnan().all(1).tolist() == [False, True, True, False]


@pytest.mark.skipif(bool(_native.missing("cpu")), reason="not built")
@pytest.mark.parametrize(
    ("position", "replacement", "message"),
    [
        (0, torch.randn(7, 33, dtype=torch.float64), "float32 or bfloat16"),
        (0, torch.randn(33, 7).T, "contiguous"),
        (1, torch.full((7,), 33), r"target\[0\] is 33, not in \[0, 33\)"),
        (1, torch.zeros(6, dtype=torch.int64), "target must be a contiguous vector of 7"),
        (2, [torch.ones(32)], "weight must be a contiguous vector of 33"),
        (3, [torch.ones(6)], "upstream must be a contiguous vector of 7"),
        (3, list(torch.ones(2, 7)), "upstream holds 0, 1 or 3"),
        (4, torch.empty(7, dtype=torch.float64), "losses must be"),
        (6, [torch.empty(7)], "sums are kept on a CPU, and have no entropy"),
        (6, [torch.empty(7)] * 3, "statistics holds 0, 1 or 2"),
        (6, [torch.empty(7), torch.empty(7)], "is_top1 must be"),
        (7, [torch.empty(7, 32)], "grad must have the shape and dtype of logits"),
    ],
)
def test_kernel_refuses(position, replacement, message):
    arguments = operator_arguments()
    arguments[position] = replacement
    with pytest.raises(RuntimeError, match=message):
        ROWS.native(*arguments)


GOOD = {"input": torch.randn(4, 7), "target": torch.tensor([0, 6, -100, 3])}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": torch.tensor([0, 7, 1, 1])}, ValueError, r"target\[1\] is 7.*\[0, 7\)"),
        ({"target": torch.tensor([0, 1, -1, 1])}, ValueError, r"target\[2\] is -1"),
        ({"target": torch.tensor([0, 1, 1])}, ValueError, r"\(4, 7\).*\(3,\)"),
        ({"target": torch.zeros(4, dtype=torch.bool)}, TypeError, "target.*bool"),
        ({"target": torch.zeros(4)}, ValueError, r"probabilities.*\(4, 7\).*\(4,\)"),
        ({"input": torch.zeros(4, 7, dtype=torch.int64)}, TypeError, "input.*int64"),
        ({"input": torch.zeros(4, 0)}, ValueError, "at least one class"),
        ({"input": torch.tensor(1.0)}, ValueError, "input must have at least one class"),
        ({"reduction": "average"}, ValueError, "'average'"),
        ({"impl": "fast"}, ValueError, "'fast'"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda'"),
        (
            {"input": torch.zeros(4, 7, dtype=torch.float16), "impl": "cpp"},
            RuntimeError,
            "impl='cpp'",
        ),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items.*'sum'"),
        ({"num_items": -3}, ValueError, "num_items.*-3"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing.*1.1"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing.*nan"),
        ({"z_loss": -1.0}, ValueError, "z_loss.*-1.0"),
        ({"softcap": 0.0}, ValueError, "softcap.*0.0"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale.*inf"),
        ({"weight": torch.ones(6)}, ValueError, r"weight.*\(7,\).*\(6,\)"),
        ({"weight": torch.ones(7, dtype=torch.int64)}, TypeError, "weight.*int64"),
        ({"weight": torch.ones(7, device="meta")}, ValueError, "weight is on meta"),
        ({"target": torch.rand(4, 6)}, ValueError, r"probabilities.*\(4, 7\).*\(4, 6\)"),
        ({"target": torch.rand(4, 7).requires_grad_()}, ValueError, "must not require a gradient"),
        ({"target": torch.rand(4, 7), "impl": "cpp"}, RuntimeError, "impl='cpp'.*probabilities"),
        ({"target": torch.rand(4, 7), "impl": "fast"}, ValueError, "'fast'"),
        ({"num_items": torch.ones(2)}, ValueError, r"num_items.*\(2,\)"),
        (
            {"num_items": float("nan")},
            ValueError,
            "num_items must be finite and not negative, got nan",
        ),
        ({"num_items": torch.tensor(float("nan"))}, ValueError, "num_items must be finite"),
        (
            {"num_items": torch.tensor(-4)},
            ValueError,
            "num_items must be finite and not negative, got -4",
        ),
        ({"num_items": "8"}, TypeError, "num_items must be a number or a tensor of one, got str"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
        ({"ignore_index": -(2**70)}, ValueError, "ignore_index must fit into int64"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
        ({"weight": [1.0] * 7}, TypeError, "weight must be a torch.Tensor, got list"),
        (
            {"input": torch.zeros(4, 7).numpy()},
            TypeError,
            "input must be a torch.Tensor, got ndarray",
        ),
        ({"target": [0, 1, 1, 1]}, TypeError, "target must be a torch.Tensor, got list"),
        (
            {"input": torch.ones(4, 7).to_sparse()},
            TypeError,
            "input must be a dense tensor, got the layout torch.sparse_coo",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    arguments = GOOD | arguments
    with pytest.raises(error, match=message):
        cross_entropy(arguments.pop("input"), arguments.pop("target"), **arguments)


def test_targets_of_a_device_are_checked_on_demand(monkeypatch):
    target = torch.tensor([9], device="meta")
    cross_entropy_on_meta = lambda: cross_entropy(torch.ones(1, 7, device="meta"), target)  # noqa: E731
    cross_entropy_on_meta()
    monkeypatch.setenv("FASTFT_CHECK_TARGETS", "1")
    # it looks: a meta tensor has no values to show
    with pytest.raises((RuntimeError, NotImplementedError)):
        cross_entropy_on_meta()


def test_module_knows_every_option():
    logits, target = make(33, 63)
    options = oracle.options_with_weight(oracle.OPTIONS["all"], 63)
    loss = CrossEntropyLoss(**options)
    expected = oracle.cross_entropy(logits, target, reduction="sum", **options) / 5
    torch.testing.assert_close(loss(logits, target, num_items=5), expected)
    assert set(loss.state_dict()) == {"weight"}
    with pytest.raises(ValueError, match="label_smoothing"):
        CrossEntropyLoss(label_smoothing=-1.0)


def test_module():
    logits, target = make(63, 507)
    loss = CrossEntropyLoss(ignore_index=3, reduction="sum")
    expected = torch.nn.CrossEntropyLoss(ignore_index=3, reduction="sum")
    torch.testing.assert_close(
        loss(logits, target.clamp_min(0)), expected(logits, target.clamp_min(0))
    )
    assert "ignore_index=3" in repr(loss)
    with pytest.raises(ValueError, match="reduction"):
        CrossEntropyLoss(reduction="median")
