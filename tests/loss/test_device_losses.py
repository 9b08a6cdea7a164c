"""The losses where tensors are a device's: in `DeviceMode`, so that what only a GPU would do wrong
shows here."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import oracle
from support.device_mode import DeviceMode
from support.numerics import assert_no_common_factor, assert_no_worse
from support.ptx.engines import ENGINES, operator

import fastft
from fastft.loss import head_gemms, head_sweep, row_functions
from fastft.loss.scale_gradients import SCALE

ROWS, HIDDEN, CLASSES = 8100, 32, 63  # 1 / 8100 is rounded by 0.38 % in bf16, by 0.036 % in fp16
HALVES = [torch.bfloat16, torch.float16]


def make(dtype=torch.float32, rows=ROWS, hidden=HIDDEN, classes=CLASSES, ignored=0.0):
    """Hidden states and head, and targets: on the device inside the mode."""
    x, head = torch.randn(rows, hidden).to(dtype), torch.randn(classes, hidden).to(dtype)
    target = torch.randint(0, classes, (rows,)).masked_fill(torch.rand(rows) < ignored, -100)
    return x.requires_grad_(), head.requires_grad_(), target


def truth_of(x, head, target, **options):
    """Gradients of the mean in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, head)]
    oracle.cross_entropy(leaves[0] @ leaves[1].T, target, **options).backward()
    return [leaf.grad for leaf in leaves]


# a CPU reads scalars in fp32 in most operations, which is no reason to leave it out
ANYWHERE = pytest.mark.parametrize(
    "place", [DeviceMode, contextlib.nullcontext], ids=["device", "cpu"]
)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Model(torch.nn.Module):
    """A head whose loss our kernel does not know: a shift of the logits changes no loss, but it is
    no softcap."""

    def __init__(self, head):
        super().__init__()
        self.head = torch.nn.Linear(HIDDEN, CLASSES, bias=False, device="meta")
        self.head.weight = torch.nn.Parameter(head)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x, target):
        return F.cross_entropy(self.head(x).float() - 1.0, target)


WAYS = {
    "plain": lambda x, head, y: fastft.linear_cross_entropy(x, head, y),
    "num_items": lambda x, head, y: fastft.linear_cross_entropy(x, head, y, num_items=ROWS),
    "into_grad": lambda x, head, y: fastft.linear_cross_entropy(
        x, head, y, accumulate_weight_grad=True
    ),
    "of_shards": lambda x, head, y: fastft.linear_cross_entropy(x, head, y, group=dist.group.WORLD),
    "token_loss": lambda x, head, y: (
        fastft.linear_token_loss(x, head, y, lambda t: -t.log_probs) / ROWS
    ),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("way", WAYS)
def test_the_mean_is_not_rounded_to_16_bits_before_it_meets_a_gradient(way, dtype, group):
    x, head, target = make(dtype)
    truth = truth_of(x, head, target)
    with DeviceMode():
        WAYS[way](x, head, target).backward()
    for name, leaf, exact in zip(("input", "weight"), (x, head), truth, strict=True):
        assert leaf.grad.dtype == dtype
        assert_no_common_factor(leaf.grad, exact, dtype, name)


ONE_LOSS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "num_items": {"num_items": 7.5},
    "chunks": {"chunk_rows": 20},
    "some rows": {"max_counted": 60},
}


@pytest.mark.parametrize("upstream", [1.0, 65536.0, 0.5, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("options", ONE_LOSS.values(), ids=ONE_LOSS)
def test_whatever_backward_brings_and_however_often(options, dtype, upstream):
    """The scaling in place must not meet a gradient that it has scaled already."""
    if options.get("reduction") == "sum" and upstream > 1 and dtype == torch.float16:
        pytest.skip("leaves the range of fp16")
    x, head, target = make(dtype, 63)
    target[50:] = -100
    bias = torch.randn(CLASSES).to(dtype).requires_grad_()
    leaves = x, head, bias
    with DeviceMode(refuse=True) as mode:
        loss = fastft.linear_cross_entropy(x, head, target, linear_bias=bias, **options)
        given = torch.full((), upstream, device=mode.device)
        ours = [
            torch.autograd.grad(loss, leaves, given, retain_graph=kept)
            for kept in (True, True, False)
        ]
    for again in ours[1:]:
        torch.testing.assert_close(again, ours[0], rtol=0, atol=0, equal_nan=True)
    reduction = "sum" if "num_items" in options else options.get("reduction", "mean")
    truths = []
    for kind in (dtype, torch.float64):
        wide = [leaf.detach().to(kind).requires_grad_() for leaf in leaves]
        value = plain(*wide[:2], target, wide[2], reduction=reduction) / options.get("num_items", 1)
        truths.append(torch.autograd.grad(value, wide, torch.tensor(upstream, dtype=value.dtype)))
    for result, rival, truth in zip(ours[0], *truths, strict=True):
        if upstream != upstream:
            assert result.isnan().all()
        else:
            assert_no_worse(result, rival, truth, terms=63 + HIDDEN + CLASSES)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("way", ["plain", "num_items", "into_grad", "sum"])
def test_after_a_mean_backward_has_nothing_to_scale(way, dtype, monkeypatch):
    """But in fp16, where a gradient over 8100 rows might be 0."""
    scales = []
    monkeypatch.setattr(
        head_sweep, "scale_gradients", lambda gradients, scale: scales.append(float(scale))
    )
    x, head, target = make(dtype)
    with DeviceMode():
        if way == "sum":
            loss = fastft.linear_cross_entropy(x, head, target, reduction="sum")
        else:
            loss = WAYS[way](x, head, target)
        scales.clear()
        loss.backward()
    assert set(scales) == {
        1.0 if way == "sum" or dtype != torch.float16 else float(torch.tensor(1.0) / ROWS)
    }


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_the_kernel_that_scales_in_place_of_torchs(engine, monkeypatch):
    x, head, target = make(torch.bfloat16, 63)

    def gradients(upstream):
        with DeviceMode(refuse=True) as mode:
            loss = fastft.linear_cross_entropy(x, head, target)
            return torch.autograd.grad(
                loss, (x, head), torch.full((), upstream, device=mode.device)
            )

    expected = [gradients(upstream) for upstream in (1.0, 0.3)]
    with operator(engine, SCALE.name) as (function, launches):
        monkeypatch.setattr(SCALE, "implementation", lambda impl, device, *dtypes: function)
        ours = [gradients(upstream) for upstream in (1.0, 0.3)]
    assert all(
        torch.equal(a, b)
        for pair in zip(ours, expected, strict=True)
        for a, b in zip(*pair, strict=True)
    )
    # forward's is of d_input and d_bias
    assert len(launches) == {"cuda": 4, "triton": 2 * 3}[engine.name]


@pytest.mark.parametrize("dtype", HALVES)
@ANYWHERE
def test_the_mean_of_another_loss_on_lazy_logits_is_not_rounded_either(place, dtype):
    x, head, target = make(dtype)
    truth = truth_of(x, head, target)
    model = Model(head.detach())
    with place(), fastft.fused_loss(model) as report:
        model(x, target).backward()
    assert report.fused and not report.materialised
    for leaf, exact in zip((x, model.head.weight), truth, strict=True):
        assert_no_common_factor(leaf.grad, exact, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("graph_is_kept", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@ANYWHERE
def test_what_the_loss_adds_to_a_gradient_is_scaled_in_fp32(place, dtype, graph_is_kept, wide):
    x, head, target = make(dtype)
    truth = truth_of(x, head, target)[1]
    head.grad_dtype = torch.float32 if wide else dtype
    head.grad = torch.zeros_like(head, dtype=head.grad_dtype)
    with place():
        loss = fastft.linear_cross_entropy(x, head, target, accumulate_weight_grad=True)
        loss.backward(retain_graph=graph_is_kept)
    assert_no_common_factor(head.grad, truth, dtype)


ITEMS = {"number": 7, "float": 7.5, "of the device": torch.tensor(7), "of the host": None}


@pytest.mark.parametrize("items", ITEMS)
@pytest.mark.parametrize("ignored", [0.2, 1.0])
def test_num_items_costs_no_wait(items, ignored):
    x, head, target = make(rows=63, ignored=ignored)
    with DeviceMode(refuse=True):
        given = torch.tensor(7) if ITEMS[items] is None else ITEMS[items]
        loss = fastft.linear_cross_entropy(x, head, target, num_items=given)
        of_logits = fastft.cross_entropy(x @ head.T, target, num_items=given)
        loss.backward()
    expected = F.cross_entropy(x @ head.T, target, reduction="sum") / (
        7.5 if items == "float" else 7
    )
    torch.testing.assert_close([loss, of_logits], [expected] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("known", [("mm", "addmm"), ("mm",), ()], ids=["addmm", "mm", "none"])
def test_another_loss_on_lazy_logits_has_the_chunks_and_products_of_ours(
    dtype, known, asked_again, monkeypatch
):
    monkeypatch.setattr(head_sweep, "_DEVICE_LIMITS", (1, 100, 4096, 0))
    x, head, target = make(dtype, 300)
    truth, model = truth_of(x, head, target), Model(head.detach())
    rival = [tensor.detach().clone().requires_grad_() for tensor in (x, head)]
    oracle.cross_entropy((rival[0] @ rival[1].T).float(), target).backward()
    with DeviceMode(refuse=True, out_dtype=known) as mode, fastft.fused_loss(model):
        model(x, target).backward()
    for ours, plain, exact in zip((x, model.head.weight), rival, truth, strict=True):
        assert_no_worse(ours.grad, plain.grad, exact, terms=300 + HIDDEN + CLASSES)
    added = mode.operations["addmm"] + mode.operations["addmm_"]
    probes = 0 if dtype == torch.float32 or "mm" not in known else 1
    # two chunks add to what the first has written
    assert added == (probes + 2 if dtype == torch.float32 or "addmm" in known else probes)


def test_a_chunk_of_another_loss_has_a_thousand_rows_on_a_device(monkeypatch):
    sizes = []
    heads = [[(torch.empty(8192, 8), torch.empty(512 << 8, 8), None)]]
    monkeypatch.setattr(row_functions, "sweep", lambda heads, rows, size, fill: sizes.append(size))
    with DeviceMode():
        row_functions.apply_to_rows(heads, lambda z: z.amax(-1))
    assert sizes == [1024]


@pytest.fixture
def asked_again():
    """What torch's products can do is asked once; these tests change the answer."""
    head_gemms.knows_out_dtype.cache_clear()
    yield
    head_gemms.knows_out_dtype.cache_clear()


def fp32_weights_under_autocast(rows, mode, **options):
    x, head, target = make(torch.float32, rows)
    with mode, mode.autocast(torch.bfloat16):
        mode.operations.clear()
        fastft.linear_cross_entropy(x, head, target, reduction="sum", **options).backward()
    assert head.grad.dtype == torch.float32
    rounded = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (x, head)]
    oracle.cross_entropy(rounded[0] @ rounded[1].T, target, reduction="sum").backward()
    plain = [tensor.detach().bfloat16().requires_grad_() for tensor in (x, head)]
    oracle.cross_entropy((plain[0] @ plain[1].T).float(), target, reduction="sum").backward()
    assert_no_worse(head.grad, plain[1].grad, rounded[1].grad, terms=rows + HIDDEN + CLASSES)
    return mode.operations


@pytest.mark.parametrize(
    "known", [("mm", "addmm"), ("mm",), ("addmm",), ()], ids=lambda known: "+".join(known) or "none"
)
def test_an_fp32_weight_gradient_of_several_chunks_is_right_whatever_torch_can_add(
    known, asked_again
):
    operations = fp32_weights_under_autocast(300, DeviceMode(out_dtype=known), chunk_rows=64)
    probes = 2 if "mm" in known else 1  # of the one, and of the other where it is the next question
    products = (
        {"mm": 5 * 3, "addmm": 0} if known != ("mm", "addmm") else {"mm": 5 * 2 + 1, "addmm": 4}
    )
    assert sum(operations[name] for name in ("mm", "addmm")) == sum(products.values()) + probes


def test_the_first_chunk_of_an_fp32_weight_gradient_is_one_product(asked_again, monkeypatch):
    """It was one of 4 MiB after another, and as many copies: 501 of each at 128256 x 4096."""
    monkeypatch.setattr(head_gemms, "_SLAB_BYTES", 4 * HIDDEN)
    monkeypatch.setattr(head_gemms, "_DEVICE_SLAB_BYTES", 4 * HIDDEN)
    one = fp32_weights_under_autocast(100, DeviceMode())
    assert (one["mm"], one["addmm"]) == (3 + 1, 0)
    again = fp32_weights_under_autocast(100, DeviceMode(), chunk_rows=50)
    assert (again["mm"], again["addmm"]) == (2 * 2 + 1, 1 + 1)


def test_what_a_product_fails_of_is_not_taken_for_what_torch_cannot(asked_again, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "mm", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        head_gemms.knows_out_dtype("mm", torch.bfloat16, torch.device("meta"))


def results_of(loss, x, head, bias, target, upstream, place, **options):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, head, bias)]
    with place:
        value = loss(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
        # log_probs, entropy and lse
        value = value if isinstance(value, torch.Tensor) else sum(value[:3])
        value.backward(upstream.to(value.dtype) if value.dim() else None)
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def of_logits(x, head, target, linear_bias, **options):
    return fastft.cross_entropy(F.linear(x, head, linear_bias), target, **options)


def plain(x, head, target, linear_bias, **options):
    logits = F.linear(x, head, linear_bias)
    return oracle.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **options
    )


def plain_log_probs(x, head, target, linear_bias):
    logits = F.linear(x, head, linear_bias)
    return oracle.log_probs(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)


HERE = contextlib.nullcontext()


@pytest.mark.parametrize("loss", [fastft.linear_cross_entropy, of_logits])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("options", oracle.OPTIONS.values(), ids=oracle.OPTIONS)
def test_every_option_without_a_wait(loss, dtype, reduction, options):
    x, head, target = make(dtype, 63, ignored=0.2)
    operands = x, head, torch.randn(CLASSES).to(dtype)
    options = oracle.options_with_weight(options, CLASSES) | {"reduction": reduction}
    upstream, mode = torch.randn(63), DeviceMode(refuse=True)
    plan = {"chunk_rows": 20} if loss is fastft.linear_cross_entropy else {}
    ours = results_of(loss, *operands, target, upstream, mode, **plan, **options)
    rivals = [
        results_of(plain, *(t.to(kind) for t in operands), target, upstream, HERE, **options)
        for kind in (dtype, torch.float64)
    ]
    for results in zip(ours, *rivals, strict=True):
        assert_no_worse(*results, terms=63 + HIDDEN + CLASSES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_counted", [None, 45, 60, 63])
@pytest.mark.parametrize("loss", [fastft.linear_log_probs, fastft.linear_cross_entropy])
def test_log_probabilities_and_bounds_without_a_wait(loss, max_counted, dtype):
    x, head, target = make(dtype, 63)
    target[45:] = -100
    operands = x, head, torch.randn(CLASSES).to(dtype)
    options = {"reduction": "none"} if loss is fastft.linear_cross_entropy else {}
    rival = plain if loss is fastft.linear_cross_entropy else plain_log_probs
    upstream, mode = torch.randn(63), DeviceMode(refuse=True)
    plan = {"chunk_rows": 20, "max_counted": max_counted}
    ours = results_of(loss, *operands, target, upstream, mode, **plan, **options)
    products = sum(mode.operations[name] for name in ("mm", "addmm", "addmm_"))
    assert products == 4 * -(-(max_counted or 63) // 20)
    rivals = [
        results_of(rival, *(t.to(kind) for t in operands), target, upstream, HERE, **options)
        for kind in (dtype, torch.float64)
    ]
    for results in zip(ours, *rivals, strict=True):
        assert_no_worse(*results, terms=63 + HIDDEN + CLASSES)


@pytest.mark.parametrize("frozen", ["nothing", "x", "head"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("max_counted", [62, 0])
def test_a_bound_that_is_too_low_is_seen_in_the_loss_and_its_gradients(
    frozen, reduction, max_counted
):
    # Trainer's log leaves a NaN loss out (logging_nan_inf_filter), and so would hide it
    x, head, target = make(rows=63)
    leaves = [leaf for name, leaf in (("x", x), ("head", head)) if name != frozen]
    x.requires_grad_(frozen != "x"), head.requires_grad_(frozen != "head")
    with DeviceMode(refuse=True):
        loss = fastft.linear_cross_entropy(
            x, head, target, reduction=reduction, max_counted=max_counted
        )
        loss.sum().backward()
    assert loss.isnan().all() and all(leaf.grad.isnan().any() for leaf in leaves)
