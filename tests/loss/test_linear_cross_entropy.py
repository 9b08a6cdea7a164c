from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.device_mode import DeviceMode
from support.head_problems import check_fp32_weights_under_autocast, check_the_factor_of_the_mean
from support.numerics import assert_no_worse
from support.watch import Watch
from torch.utils.checkpoint import checkpoint

from fastft import _native
from fastft.loss import head_gemms
from fastft.loss import head_sweep as room
from fastft.loss.head_sweep import chunk_rows
from fastft.loss.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from fastft.loss.linear_rows import HEAD

ENGINES = [
    "eager",
    pytest.param("cpp", marks=pytest.mark.skipif(bool(_native.missing("cpu")), reason="not built")),
]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 1), (1, 63, 507), (63, 1, 15), (63, 33, 507), (130, 16, 1)]  # rows, H, V


@pytest.fixture
def small_workspace(monkeypatch):
    """Room for 8 rows of 507 fp32 logits: every larger test runs in several chunks."""
    monkeypatch.setitem(room._LIMITS, "cpu", (8 * 507 * 4, 1, 1 << 31, 0))


def make(rows, hidden, classes, dtype=torch.float32, ignored=0.2, bias=True):
    x, weight = torch.randn(rows, hidden).to(dtype), torch.randn(classes, hidden).to(dtype)
    target = torch.randint(0, classes, (rows,)).masked_fill(torch.rand(rows) < ignored, -100)
    return x, weight, torch.randn(classes).to(dtype) if bias else None, target


def plain_linear_cross_entropy(x, head, target, *, linear_bias=None, upcast=False, **options):
    logits = F.linear(x, head, linear_bias)
    return oracle.cross_entropy(logits.float() if upcast else logits, target, **options)


def loss_and_grads(
    function, x, head, bias, target, upstream=None, needs=(True, True, True), **options
):
    leaves = [
        None if t is None else t.detach().clone().requires_grad_(n)
        for t, n in zip((x, head, bias), needs, strict=True)
    ]
    loss = function(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return [loss.detach(), *(torch.autograd.grad(loss, wanted, upstream) if wanted else ())]


def check(x, head, bias, target, impl="auto", upstream=None, needs=(True, True, True), **options):
    upcast = x.dtype in (torch.bfloat16, torch.float16)
    plan = {name: options.pop(name) for name in ("chunk_rows",) if name in options}
    ours = loss_and_grads(
        linear_cross_entropy, x, head, bias, target, upstream, needs, impl=impl, **plan, **options
    )
    plain = loss_and_grads(
        plain_linear_cross_entropy, x, head, bias, target, upstream, needs, upcast=upcast, **options
    )
    exact = (None if t is None else t.double() for t in (x, head, bias))
    truth = loss_and_grads(plain_linear_cross_entropy, *exact, target, upstream, needs, **options)
    terms = sum(x.shape) + len(head)
    for name, *results in zip(
        ("loss", "first gradient", "second gradient", "third gradient"),
        ours,
        plain,
        truth,
        strict=False,
    ):
        assert results[0].dtype == results[1].dtype
        assert_no_worse(*results, name, terms=terms)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_matches_torch(impl, dtype, shape, reduction, small_workspace, poisoned_empty):
    upstream = torch.randn(shape[0]) if reduction == "none" else torch.tensor(1.75)
    check(*make(*shape, dtype), impl, upstream, reduction=reduction)


# in fp32 the mean of each option is a goal; test_device_losses.py has the eager engine
@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "mean")],
)
@pytest.mark.parametrize("options", oracle.OPTIONS.values(), ids=oracle.OPTIONS)
def test_options(dtype, reduction, options, small_workspace, poisoned_empty):
    upstream = torch.randn(63) if reduction == "none" else None
    options = oracle.options_with_weight(options, 507) | {"reduction": reduction}
    check(*make(63, 16, 507, dtype), upstream=upstream, **options)


@pytest.mark.parametrize("options", oracle.OPTIONS.values(), ids=oracle.OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_target_probabilities(options, reduction, small_workspace):
    x, weight, bias, _ = make(6, 5, 7)
    options = oracle.options_with_weight(options, 7) | {"reduction": reduction}
    probabilities = torch.rand(2, 3, 7).softmax(-1)

    def plain(x, head, target, *, linear_bias, **options):
        logits = F.linear(x, head, linear_bias).view(6, 7)
        loss = oracle.soft_cross_entropy(logits, target.view(6, 7), **options)
        return loss.view(2, 3) if reduction == "none" else loss

    ours, expected = (
        loss_and_grads(f, x.view(2, 3, 5), weight, bias, probabilities, **options)
        for f in (linear_cross_entropy, plain)
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("chunks", ["one", "many"])
def test_mean(dtype, bias, ignored, chunks, request):
    if chunks == "many":
        request.getfixturevalue("small_workspace")
    check(*make(63, 33, 507, dtype, ignored, bias))


def test_float64(small_workspace):
    operands = make(63, 33, 507, torch.float64)
    ours, plain = (
        loss_and_grads(f, *operands) for f in (linear_cross_entropy, plain_linear_cross_entropy)
    )
    torch.testing.assert_close(ours, plain)


# which gradients are needed, reduction -> products in forward, in backward
PLANS = [
    ((True, True, True), "mean", 3, 0),
    ((True, False, False), "mean", 2, 0),
    ((False, True, False), "sum", 2, 0),
    ((False, False, True), "sum", 1, 0),
    ((False, False, False), "mean", 1, 0),
    ((True, False, False), "none", 2, 0),
    ((True, True, False), "none", 1, 3),
    ((False, True, True), "none", 1, 2),
    ((False, False, True), "none", 1, 1),
    ((False, False, False), "none", 1, 0),
]


@pytest.mark.parametrize(("needs", "reduction", "forward", "backward"), PLANS)
@pytest.mark.parametrize("ignored", [0, 21])
def test_plans_compute_only_what_is_needed(
    needs, reduction, forward, backward, ignored, small_workspace
):
    x, weight, bias, target = make(63, 33, 507, ignored=0.0)
    target[:ignored] = -100
    upstream = torch.randn(63) if reduction == "none" else None
    check(x, weight, bias, target, upstream=upstream, needs=needs, reduction=reduction)
    unit = 2 * (63 - ignored) * 33 * 507
    leaves = [
        tensor.requires_grad_(need) for tensor, need in zip((x, weight, bias), needs, strict=True)
    ]
    with Watch() as watch:
        loss = linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction
        ).sum()
    assert watch.flops == forward * unit
    with Watch() as watch:
        if any(needs):
            loss.backward()
    assert watch.flops == backward * unit
    assert [leaf.grad is not None for leaf in leaves] == list(needs)


def test_no_gradient_is_computed_without_grad_mode():
    x, weight, bias, target = (
        t.requires_grad_() if t.is_floating_point() else t for t in make(63, 33, 507, ignored=0)
    )
    with torch.no_grad(), Watch() as watch:
        linear_cross_entropy(x, weight, target, linear_bias=bias)
    assert watch.flops == 2 * 63 * 33 * 507


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize(
    "options", [{}, {"num_items": 0}, {"num_items": torch.tensor(0)}, {"reduction": "sum"}]
)
def test_no_row_counts(impl, rows, options, poisoned_empty):
    x, weight, bias, target = make(rows, 9, 15, ignored=1.1)
    results = loss_and_grads(linear_cross_entropy, x, weight, bias, target, impl=impl, **options)
    assert len(results) == 4 and all(
        torch.equal(result, torch.zeros_like(result)) for result in results
    )


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_sum_of_no_row_over_no_items_has_zero_gradients_as_in_torch(impl, accumulate):
    """What Trainer computes for a step without a label."""
    x, weight, bias, target = make(5, 9, 15, ignored=1.1)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    loss = linear_cross_entropy(
        x,
        weight,
        target,
        linear_bias=bias,
        reduction="sum",
        impl=impl,
        accumulate_weight_grad=accumulate,
    )
    (loss / torch.tensor(0)).backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


def test_a_row_that_is_not_finite_poisons_only_what_it_touches():
    x, weight, _, target = make(9, 5, 15, ignored=0.0)
    x[4, 2] = float("nan")
    losses, d_input, _ = loss_and_grads(
        linear_cross_entropy, x, weight, None, target, reduction="none"
    )
    assert losses.isnan().nonzero().tolist() == [[4]] and d_input.isnan().any(
        1
    ).nonzero().tolist() == [[4]]
    target[4] = -100
    for result in loss_and_grads(linear_cross_entropy, x, weight, None, target, reduction="sum"):
        assert result.isfinite().all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_leading_dimensions_and_int32_targets(shape, reduction):
    x, weight = torch.randn(*shape, 9), torch.randn(15, 9)
    target = torch.randint(0, 15, shape, dtype=torch.int32)
    loss = linear_cross_entropy(x, weight, target, reduction=reduction, ignore_index=20)
    logits, flat = F.linear(x, weight).reshape(-1, 15), target.long().reshape(-1)
    expected = F.cross_entropy(logits, flat, reduction=reduction)
    torch.testing.assert_close(loss, expected.view(shape) if reduction == "none" else expected)


@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_strided_operands(ignored, small_workspace):
    x, weight = torch.randn(33, 126).T[::2], torch.randn(33, 1014)[:, ::2].T
    target = make(126, 1, 507, ignored=ignored)[3][::2]
    check(x, weight, torch.randn(1014)[::2], target)
    check(x, weight, None, target, upstream=torch.randn(2, 63).T[:, 0], reduction="none")


def test_gradient_checkpointing():
    x, weight, _, target = make(63, 33, 507)
    plain = loss_and_grads(linear_cross_entropy, x, weight, None, target)

    def checkpointed(x, weight, target, *, linear_bias):
        return checkpoint(
            lambda x: linear_cross_entropy(2 * x, weight, target), x / 2, use_reentrant=False
        )

    assert all(map(torch.equal, loss_and_grads(checkpointed, x, weight, None, target), plain))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_never_holds_the_logits(impl, dtype, reduction, small_workspace):
    rows, hidden, classes = 300, 4, 507
    operands = make(rows, hidden, classes, dtype)
    with Watch() as watch:
        loss_and_grads(linear_cross_entropy, *operands, impl=impl, reduction=reduction)
    assert watch.elements <= max(8 * classes * 4 // dtype.itemsize, rows * hidden, classes * hidden)


@pytest.mark.parametrize(
    ("device", "count", "classes", "dtype", "expected"),
    [
        ("cpu", 1024, 16384, torch.float32, 512),
        ("cpu", 1025, 16384, torch.float32, 342),
        ("cpu", 8192, 128256, torch.float32, 256),
        ("cpu", 3, 10**9, torch.float32, 3),
        ("cpu", 0, 507, torch.float32, 0),
        ("cuda", 8192, 128256, torch.bfloat16, 2048),
        ("cuda", 8192, 256000, torch.bfloat16, 1024),
        ("cuda", 100000, 1000, torch.bfloat16, 4000),
    ],
)
def test_chunk_rows_fill_the_workspace_evenly(device, count, classes, dtype, expected):
    assert chunk_rows(count, classes, dtype, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("device", "classes", "hidden", "dtype", "expected"),
    [
        ("cuda", 128256, 4096, torch.bfloat16, 4096),  # two chunks, where 512 MiB made four
        ("cuda", 128256, 2048, torch.bfloat16, 2048),
        ("cuda", 256000, 2304, torch.bfloat16, 2048),
        ("cuda", 128256, 16384, torch.bfloat16, 4096),
        ("cuda", 50257, 768, torch.float32, 2048),
        ("cpu", 128256, 4096, torch.float32, 512),
        ("cpu", 49152, 576, torch.float32, 512),
        ("cpu", 50257, 300, torch.float32, 293),  # 28 chunks of at most 300
        ("cpu", 50257, 64, torch.float32, 256),
        ("cpu", 8192, 512, torch.float32, 1024),  # whose 32 MiB hold more
    ],
)
def test_chunk_rows_grow_with_the_weight_gradient(device, classes, hidden, dtype, expected):
    """As much workspace as the gradient takes, which every chunk reads and writes."""
    assert chunk_rows(8192, classes, dtype, torch.device(device), hidden) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 63, 1000])
def test_chunk_rows_can_be_given(rows, dtype):
    check(*make(63, 33, 507, dtype), chunk_rows=rows)


@pytest.mark.parametrize(("chunks", "narrow"), [(1, True), (4, True), (5, False), (64, False)])
def test_a_16_bit_weight_gradient_is_summed_in_16_bits_over_few_chunks_only(
    chunks, narrow, monkeypatch
):
    """Both sides of the rule stay within twice torch's error; torch makes one product."""
    monkeypatch.setattr(room, "is_emulated", lambda *_: False)
    monkeypatch.setattr(head_gemms, "is_emulated", lambda *_: False)
    operands = make(64 * chunks, 8, 63, torch.bfloat16)
    call = room.HeadCall(
        (True,) * 3, True, False, torch.bfloat16, "auto", 64, -1, room.RowOptions()
    )
    assert (call.weight_sum_dtype(64 * chunks, operands[1]) == torch.bfloat16) == narrow
    assert call.weight_sum_dtype(64 * chunks, operands[1].float()) == torch.float32
    check(*operands, chunk_rows=64)


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_products_by_slabs_of_the_weight(
    emulated, reduction, monkeypatch, small_workspace, poisoned_empty
):
    """What a processor without 16-bit matrix units does, and one that has them."""
    for module in (room, head_gemms):
        monkeypatch.setattr(
            module, "is_emulated", lambda dtype, _: emulated and dtype == torch.bfloat16
        )
    monkeypatch.setattr(head_gemms, "_SLAB_BYTES", 4 * 33 * 100)
    upstream = torch.randn(63) if reduction == "none" else None
    check(*make(63, 33, 507, torch.bfloat16), upstream=upstream, reduction=reduction)


@pytest.mark.parametrize("bound", [50, 63, 100])
def test_a_bound_of_the_counted_rows_changes_nothing(bound):
    operands = make(63, 33, 507, ignored=0.0)
    operands[3][50:] = -100
    plain, bounded = (
        loss_and_grads(linear_cross_entropy, *operands, max_counted=b) for b in (None, bound)
    )
    assert all(map(torch.equal, plain, bounded))
    with pytest.raises(ValueError, match="max_counted is 49, but 50 rows count"):
        linear_cross_entropy(*operands[:2], operands[3], max_counted=49)


def test_rows_of_a_device_are_taken_out_without_looking():
    target = torch.tensor([-100, 3, -100, 5, 6, -100])
    with DeviceMode(refuse=True):
        rows = room.CountedRows.of(target, -100, 4)
    assert rows.positions.tolist()[:3] == [1, 3, 4] and len(rows.positions) == 4


@pytest.mark.parametrize("options", oracle.OPTIONS.values(), ids=oracle.OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_to_one_graph(options, reduction):
    x, weight, bias, target = make(63, 33, 507)
    options = oracle.options_with_weight(options, 507)
    torch._dynamo.reset()  # each set of options is a graph of its own
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    eager, ours = (
        loss_and_grads(f, x, weight, bias, target, reduction=reduction, **options)
        for f in (linear_cross_entropy, compiled)
    )
    assert all(map(torch.equal, eager, ours))


def test_a_number_of_items_that_changes_stays_in_the_graph():
    x, weight, _, target = make(9, 4, 7)

    def loss(items):
        return linear_cross_entropy(x, weight, target, num_items=items)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for items in (7, 8.5, 9, 3.25):
        torch.testing.assert_close(compiled(items), loss(items))


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_operator_contract(summed, frozen):
    x, weight, bias, target = make(9, 5, 15)
    needs = (True, not frozen, not frozen) if summed or frozen else (False,) * 3
    call = room.HeadCall(
        needs, summed, not summed and not frozen, torch.float32, "auto", 4, -1, room.RowOptions()
    )
    leaves = x.requires_grad_(), weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)
    torch.library.opcheck(HEAD.native, (*leaves, target, torch.rand(15), [], None, *call.flat()))


@settings(max_examples=40, deadline=None)
@given(
    hidden=st.integers(1, 9),
    classes=st.integers(1, 40),
    targets=st.lists(st.integers(-1, 39), max_size=30),
    budget=st.integers(1, 2000),
    reduction=st.sampled_from(["none", "sum"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_chunking_and_ignore_pattern(hidden, classes, targets, budget, reduction, seed):
    torch.manual_seed(seed)
    x, weight, bias, _ = make(len(targets), hidden, classes)
    target = torch.tensor([min(t, classes - 1) for t in targets], dtype=torch.int64)
    upstream = torch.randn(len(targets)) if reduction == "none" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(room._LIMITS, "cpu", (budget, 1, 1 << 31, 0))
        for impl in ("eager", "auto"):
            check(x, weight, bias, target, impl, upstream, reduction=reduction, ignore_index=-1)


GOOD = {
    "input": torch.randn(4, 9),
    "linear_weight": torch.randn(7, 9),
    "target": torch.tensor([0, 6, -100, 3]),
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": torch.tensor([0, 7, 1, 1])}, ValueError, r"target\[1\] is 7.*\[0, 7\)"),
        (
            {"input": torch.ones(2, 2, 9), "target": torch.tensor([[0, 1], [-1, 1]])},
            ValueError,
            r"target\[1, 0\] is -1",
        ),
        ({"target": torch.tensor([0, 1, 1])}, ValueError, r"\(3,\).*\(4,\)"),
        ({"target": torch.zeros(4, dtype=torch.bool)}, TypeError, "target.*bool"),
        ({"target": torch.zeros(4)}, ValueError, r"probabilities.*\(4, 7\).*\(4,\)"),
        ({"target": torch.rand(4, 7).requires_grad_()}, ValueError, "must not require a gradient"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing.*-0.1"),
        ({"softcap": -1.0}, ValueError, "softcap.*-1.0"),
        ({"weight": torch.ones(9)}, ValueError, r"weight.*\(7,\).*\(9,\)"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows.*0"),
        ({"max_counted": -1}, ValueError, "max_counted.*-1"),
        ({"input": torch.tensor(1.0)}, ValueError, "input must be"),
        ({"input": torch.zeros(4, 9, dtype=torch.int64)}, TypeError, "input.*int64"),
        ({"linear_weight": torch.randn(7, 8)}, ValueError, r"linear_weight.*\(7, 8\).*\(4, 9\)"),
        ({"linear_weight": torch.randn(7)}, ValueError, r"linear_weight.*\(7,\)"),
        ({"linear_weight": torch.randn(0, 9)}, ValueError, r"linear_weight.*\(0, 9\)"),
        (
            {"linear_weight": torch.randn(7, 9).bfloat16()},
            TypeError,
            "linear_weight.*bfloat16.*float32",
        ),
        (
            {"linear_weight": torch.randn(7, 9, device="meta")},
            ValueError,
            "linear_weight is on meta",
        ),
        ({"linear_bias": torch.randn(9)}, ValueError, r"linear_bias.*\(9,\).*\(7, 9\)"),
        ({"linear_bias": torch.randn(7).double()}, TypeError, "linear_bias.*float64"),
        ({"reduction": "average"}, ValueError, "'average'"),
        ({"impl": "fast"}, ValueError, "'fast'"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda'"),
        ({"impl": 3}, ValueError, "impl must be one of 'auto'.*, got 3"),
        ({"chunk_rows": 1.5}, ValueError, "chunk_rows must be an integer.* or None, got 1.5"),
        ({"chunk_rows": 2**63}, ValueError, "chunk_rows must be an integer.* or None, got 9223"),
        ({"max_counted": "8"}, ValueError, "max_counted must be an integer.* or None, got '8'"),
        ({"max_counted": 2**63}, ValueError, "max_counted must be an integer.* or None, got 9223"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index must fit into int64, got 9223"),
        ({"num_items": 3, "reduction": "none"}, ValueError, "num_items.*'none'"),
        ({"num_items": -3}, ValueError, "num_items.*-3"),
        ({"num_items": torch.tensor(float("inf"))}, ValueError, "num_items must be finite"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
        ({"weight": [1.0] * 7}, TypeError, "weight must be a torch.Tensor, got list"),
        (
            {"input": torch.randn(4, 9).numpy()},
            TypeError,
            "input must be a torch.Tensor, got ndarray",
        ),
        ({"linear_weight": [[1.0]]}, TypeError, "linear_weight must be a torch.Tensor, got list"),
        ({"linear_bias": [1.0] * 7}, TypeError, "linear_bias must be a torch.Tensor, got list"),
        ({"target": [0, 1, 1, 1]}, TypeError, "target must be a torch.Tensor, got list"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(GOOD | arguments))


def test_module():
    loss = LinearCrossEntropyLoss(9, 7, bias=True, ignore_index=3)
    expected = F.cross_entropy(
        loss.linear(GOOD["input"]), GOOD["target"].clamp_min(0), ignore_index=3
    )
    torch.testing.assert_close(loss(GOOD["input"], GOOD["target"].clamp_min(0)), expected)
    assert set(loss.state_dict()) == {"linear.weight", "linear.bias"} and "ignore_index=3" in repr(
        loss
    )
    with pytest.raises(ValueError, match="reduction"):
        LinearCrossEntropyLoss(9, 7, reduction="median")


@pytest.mark.parametrize("chunk_rows", [None, 1000])
def test_a_mean_scales_gradients_by_what_is_not_rounded(chunk_rows):
    """On a GPU: test_gpu.py."""
    check_the_factor_of_the_mean(torch.bfloat16, chunk_rows, "cpu")


@pytest.mark.parametrize("chunk_rows", [64, 500])
def test_fp32_weights_under_autocast(chunk_rows):
    """On a GPU: test_gpu.py."""
    check_fp32_weights_under_autocast(chunk_rows, "cpu")
