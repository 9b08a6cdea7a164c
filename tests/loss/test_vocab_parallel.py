from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import oracle, processes
from support.numerics import assert_no_worse
from support.watch import Watch

import fastft
from fastft.loss import head_sweep, vocab_parallel

ROWS, HIDDEN = 63, 16


def make(dtype=torch.float32, ignored=0.2, rows=ROWS, shard=None):
    """Operands and targets over all classes, the same on every process; about 507 classes."""
    classes = dist.get_world_size() * (shard or 507 // dist.get_world_size())
    x, weight, bias = torch.randn(rows, HIDDEN), torch.randn(classes, HIDDEN), torch.randn(classes)
    target = torch.randint(0, classes, (rows,)).masked_fill(torch.rand(rows) < ignored, -100)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), target


def mine(whole):
    return whole.chunk(dist.get_world_size())[dist.get_rank()]


@contextmanager
def counted(collective):
    """The numbers of elements that went through a collective."""
    sizes, original = [], getattr(dist, collective)

    def counting(result, *args, **kwargs):
        sizes.append(
            sum(
                tensor.numel()
                for tensor in ([result] if isinstance(result, torch.Tensor) else result)
            )
        )
        return original(result, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, collective, counting)
        yield sizes


def leaves_of(x, head, bias, needs=(True, True, True)):
    """Of this process."""
    parts = x, mine(head), mine(bias)
    return [t.detach().clone().requires_grad_(need) for t, need in zip(parts, needs, strict=True)]


def ours(
    x, head, bias, target, *, upstream=None, needs=(True, True, True), chunk_rows=8, **options
):
    leaves = leaves_of(x, head, bias, needs)
    plan = {"linear_bias": leaves[2], "group": dist.group.WORLD, "chunk_rows": chunk_rows}
    loss = fastft.linear_cross_entropy(leaves[0], leaves[1], target, **plan, **options)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return [loss.detach(), *(torch.autograd.grad(loss, wanted, upstream) if wanted else ())]


def theirs(
    x, head, bias, target, *, upstream=None, needs=(True, True, True), exact=False, **options
):
    """Of one process, in float64 or in the dtype of the operands; the gradients of the shards are
    cut out."""
    leaves = [
        (t.double() if exact else t).detach().clone().requires_grad_() for t in (x, head, bias)
    ]
    logits = F.linear(*leaves)
    loss = oracle.cross_entropy(logits if exact else logits.float(), target, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    gradients = torch.autograd.grad(loss, leaves, upstream)
    parts = [gradients[0], *map(mine, gradients[1:])]
    return [loss.detach(), *(part for part, need in zip(parts, needs, strict=True) if need)]


def check(*operands, chunk_rows=8, **options):
    results = ours(*operands, chunk_rows=chunk_rows, **options)
    rounds = theirs(*operands, **options), theirs(*operands, exact=True, **options)
    terms = sum(operands[0].shape) + len(operands[1])
    for i, (actual, plain, truth) in enumerate(zip(results, *rounds, strict=True)):
        assert actual.dtype == plain.dtype
        assert_no_worse(actual, plain, truth, f"result {i}", terms=terms)
    everywhere = [torch.empty_like(results[0]) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, results[0])
    assert all(torch.equal(loss, results[0]) for loss in everywhere)


def check_options(options, reduction, dtype):
    operands = make(dtype)
    upstream = torch.randn(ROWS) if reduction == "none" else torch.tensor(1.75)
    check(
        *operands,
        upstream=upstream,
        reduction=reduction,
        **oracle.options_with_weight(options, len(operands[1])),
    )


def check_logits(options, reduction, dtype):
    """Logits that exist, sharded: (T, V), and (T, V, d) for a mean."""
    x, weight, bias, target = make()
    whole = F.linear(x, weight, bias).to(dtype)
    options = oracle.options_with_weight(options, len(weight)) | {"reduction": reduction}
    upstream = torch.randn(ROWS) if reduction == "none" else torch.tensor(1.75)
    results = []
    for logits in (mine(whole.T).T, whole, whole.double()):
        leaf = logits.detach().clone().requires_grad_()
        if logits is whole or logits.dtype == torch.float64:
            loss = oracle.cross_entropy(
                leaf if leaf.dtype == torch.float64 else leaf.float(), target, **options
            )
        elif reduction == "mean":
            cube = leaf.view(7, 9, -1).movedim(1, 2)
            loss = fastft.cross_entropy(cube, target.view(7, 9), group=dist.group.WORLD, **options)
        else:
            loss = fastft.cross_entropy(leaf, target, group=dist.group.WORLD, **options)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
        results.append(
            (loss.detach(), gradient if logits.shape != whole.shape else mine(gradient.T).T)
        )
    for actual, plain, truth in zip(*results, strict=True):
        assert actual.dtype == plain.dtype
        assert_no_worse(actual, plain, truth, terms=sum(whole.shape))


def check_logits_in_chunks():
    whole = torch.randn(ROWS, 40 * dist.get_world_size()).requires_grad_()
    logits = mine(whole.detach().T).T.clone().requires_grad_()
    target = torch.randint(0, whole.shape[1], (ROWS,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head_sweep._LIMITS, "cpu", (8 * 40 * 4, 1, 1 << 31, 0))
        with counted("all_reduce") as sizes:
            loss = fastft.cross_entropy(logits, target, group=dist.group.WORLD)
            (gradient,) = torch.autograd.grad(loss, logits)
    assert sizes == [8, 16] * 7 + [7, 14]  # a maximum and two sums a row; nothing in backward
    plain = F.cross_entropy(whole, target)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, mine(torch.autograd.grad(plain, whole)[0].T).T)


def check_needs(needs, reduction):
    check(
        *make(),
        upstream=torch.randn(ROWS) if reduction == "none" else None,
        needs=needs,
        reduction=reduction,
    )


def check_shape(rows, shard, chunk_rows):
    check(*make(rows=rows, shard=shard), reduction="sum", chunk_rows=chunk_rows)


def check_autocast():
    operands = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results, plain = ours(*operands), theirs(*operands)
    for actual, rounded, truth in zip(results, plain, theirs(*operands, exact=True), strict=True):
        assert actual.dtype == rounded.dtype
        assert_no_worse(actual, rounded, truth, terms=sum(operands[0].shape) + len(operands[1]))
    assert not torch.equal(results[0], ours(*operands)[0])  # it did run in bf16


def check_num_items():
    operands = make()
    results = ours(*operands, num_items=torch.tensor(7))
    rounds = (theirs(*operands, exact=exact, reduction="sum") for exact in (False, True))
    for actual, plain, truth in zip(results, *rounds, strict=True):
        assert_no_worse(actual, plain / 7, truth / 7, terms=ROWS + HIDDEN + len(operands[1]))


def check_no_row_counts(rows, reduction):
    results = ours(*make(ignored=1.1, rows=rows), reduction=reduction)
    assert len(results) == 4 and all(
        torch.equal(result, torch.zeros_like(result)) for result in results
    )


def check_confident_row(owner):
    """Its loss and gradient survive wherever the target is."""
    x, weight, _, _ = make(rows=1)
    x, weight, bias = torch.ones_like(x), torch.zeros_like(weight), torch.zeros(len(weight))
    target = torch.tensor([owner % dist.get_world_size() * len(mine(weight)) + 3])
    bias[target] = 25.0
    loss, _, _, d_bias = ours(x, weight, bias, target)
    others = (len(weight) - 1) * torch.exp(torch.tensor(-25.0, dtype=torch.float64))
    torch.testing.assert_close(loss.double(), others.log1p(), rtol=1e-6, atol=0)
    expected = torch.full(
        (len(weight),), float(others / (len(weight) - 1) / (1 + others)), dtype=torch.float64
    )
    expected[target] = -others / (1 + others)
    torch.testing.assert_close(d_bias.double(), mine(expected), rtol=1e-6, atol=0)


def check_poison(value):
    """A number on the last process that is not finite poisons its row on all of them, and no other
    row."""
    logits, target = torch.randn(ROWS, 5), torch.arange(ROWS) % 10
    if dist.get_rank() == dist.get_world_size() - 1:
        logits[4, 3] = value
    losses = fastft.cross_entropy(
        logits.requires_grad_(), target, reduction="none", group=dist.group.WORLD
    )
    (gradient,) = torch.autograd.grad(losses, logits, torch.ones_like(losses))
    assert losses.isnan().nonzero().tolist() == [[4]] and gradient.isnan().any(
        1
    ).nonzero().tolist() == [[4]]


def check_masked_classes():
    """A padding of the classes, its bias -inf, changes nothing."""
    x, weight, bias, target = make()
    real = len(weight) - len(mine(weight)) - 1  # nothing of the last process is real
    bias[real:] = -torch.inf
    target = target.clamp_max(real - 1)
    results = ours(x, weight, bias, target, softcap=None, z_loss=0.01)
    alone = [t.double().requires_grad_() for t in (x, weight[:real], bias[:real])]
    loss = oracle.cross_entropy(F.linear(*alone), target, z_loss=0.01)
    torch.testing.assert_close(results[0].double(), loss.detach(), rtol=1e-5, atol=0)
    d_input, d_weight, _ = torch.autograd.grad(loss, alone)
    torch.testing.assert_close(results[1].double(), d_input, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        results[2].double(),
        mine(F.pad(d_weight, (0, 0, 0, len(weight) - real))),
        rtol=1e-4,
        atol=1e-6,
    )


def check_autograd(reduction):
    x, weight, bias, target = make()
    leaves = leaves_of(x, weight, bias)
    before = [leaf.detach().clone() for leaf in leaves]
    plan = {"group": dist.group.WORLD, "chunk_rows": 8, "reduction": reduction}
    loss = fastft.linear_cross_entropy(
        leaves[0], leaves[1], target, linear_bias=leaves[2], **plan
    ).sum()
    first, second = (torch.autograd.grad(2 * loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(
        torch.equal(t.detach(), b) and t._version == 0 for t, b in zip(leaves, before, strict=True)
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def check_reductions(reduction, needs, forward, backward):
    """63 rows make 8 chunks of 8; each costs two all-reduces, the gradient of the input one for
    all."""
    x, weight, bias, target = make(ignored=0.0)
    leaves = leaves_of(x, weight, bias, needs)
    with counted("all_reduce") as sizes:
        plan = {"group": dist.group.WORLD, "chunk_rows": 8, "reduction": reduction}
        loss = fastft.linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], **plan
        ).sum()
        in_forward = len(sizes)
        assert sum(sizes[:16]) == 3 * ROWS  # a maximum and two sums a row
        loss.backward()
    assert (in_forward, len(sizes) - in_forward) == (forward, backward)


def check_workspace(reduction, dtype):
    rows = 300
    operands = make(dtype, rows=rows)
    shard = len(mine(operands[1]))
    with Watch() as watch:
        ours(*operands, reduction=reduction)
    assert watch.elements <= max(8 * shard, rows * HIDDEN, shard * HIDDEN)


def check_compiled():
    x, weight, _, target = make()

    def loss(x, weight):
        return 2 * fastft.linear_cross_entropy(x, weight, target, group=dist.group.WORLD)

    compiled = torch.compile(loss, backend="aot_eager")
    assert torch.equal(compiled(x, mine(weight)), loss(x, mine(weight)))


def check_uneven():
    """The processes that have the right shape raise too, and it may have gone well before."""
    x, target = torch.randn(5, 3), torch.arange(5)
    uneven = torch.randn(7 + (dist.get_rank() == 1), 3)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"group must have a linear_weight of one size.*\(7, 3\), \(8, 3\)"
        ):
            fastft.linear_cross_entropy(x, uneven, target, group=dist.group.WORLD)
        fastft.linear_cross_entropy(x, torch.randn(7, 3), target, group=dist.group.WORLD)


def check_shapes_are_compared_once_where_looking_waits(places, times):
    x, target = torch.randn(5, 4), torch.arange(5)
    with pytest.MonkeyPatch.context() as patch, counted("all_gather") as compared:
        patch.setattr(vocab_parallel, "_LOOKING_IS_FREE", places)
        vocab_parallel._EVEN.clear()
        for classes in (9, 9, 11, 9, 11):
            fastft.linear_cross_entropy(x, torch.randn(classes, 4), target, group=dist.group.WORLD)
    assert len(compared) == times


def check_bad_input():
    x, weight, _, target = make(ignored=0.0)
    classes, head = len(weight), mine(weight)
    outside = target.clone()
    outside[3] = classes
    other = dist.new_group([0])  # every process must make it; the others are not in it
    wrong = [
        ({"group": "world"}, TypeError, "group must be a torch.distributed.ProcessGroup, got str"),
        ({"impl": "cpp"}, RuntimeError, "impl='cpp'.*group"),
        ({"impl": "fast"}, ValueError, "'fast'"),
        ({"target": torch.rand(ROWS, classes)}, ValueError, "class indices.*group"),
        ({"target": outside}, ValueError, rf"target\[3\] is {classes}.*\[0, {classes}\)"),
        (
            {"weight": torch.ones(len(head))},
            ValueError,
            rf"weight.*\({classes},\).*\({len(head)},\)",
        ),
        ({"linear_bias": torch.ones(classes)}, ValueError, "linear_bias"),
        *([({"group": other}, ValueError, "group does not contain")] if dist.get_rank() else []),
    ]
    for arguments, error, message in wrong:
        given = {
            "input": x,
            "linear_weight": head,
            "target": target,
            "group": dist.group.WORLD,
        } | arguments
        with pytest.raises(error, match=message):
            fastft.linear_cross_entropy(**given)
    for group, columns, error, message in (
        ("world", 5, TypeError, "group must be"),
        (
            dist.group.WORLD,
            5 + dist.get_rank(),
            ValueError,
            "group must have a class dimension of input of one size",
        ),
    ):
        with pytest.raises(error, match=message):
            fastft.cross_entropy(torch.randn(3, columns), torch.arange(3), group=group)


F32, BF16 = torch.float32, torch.bfloat16
REDUCTIONS = ("none", "sum", "mean")
NEEDS = {
    "input": (True, False, False),
    "weight": (False, True, False),
    "bias": (False, False, True),
    "no": (False,) * 3,
}
# which the number of processes has no part in: on two of them
OPTIONS = {
    **{
        f"{name}_{reduction}": partial(check_options, options, reduction, F32)
        for name, options in oracle.OPTIONS.items()
        for reduction in ("none", "mean")
    },
    **{
        f"{name}_{reduction}_bf16": partial(check_options, oracle.OPTIONS[name], reduction, BF16)
        for name in ("plain", "weight_smoothing", "all")
        for reduction in ("none", "mean")
    },
    **{
        f"logits_{n}_{r}": partial(check_logits, o, r, F32)
        for n, o in oracle.OPTIONS.items()
        for r in ("none", "mean")
    },
    **{
        f"logits_{n}_bf16": partial(check_logits, oracle.OPTIONS[n], "sum", BF16)
        for n in ("plain", "all")
    },
}
ON_ANY_NUMBER = {
    **{
        f"everything_{r}": partial(check_options, oracle.OPTIONS["all"], r, F32) for r in REDUCTIONS
    },
    "logits_everything": partial(check_logits, oracle.OPTIONS["all"], "mean", F32),
    "logits_in_chunks": check_logits_in_chunks,
    **{
        f"{n}_alone_{r}": partial(check_needs, needs, r)
        for n, needs in NEEDS.items()
        for r in ("none", "mean")
    },
    **{
        f"shape_{s}": partial(check_shape, *s)
        for s in ((1, 1, 8), (63, 1, 5), (1, 63, None), (63, 7, None))
    },
    "autocast": check_autocast,
    "num_items": check_num_items,
    **{f"no_row_{n}_{r}": partial(check_no_row_counts, n, r) for n in (0, 5) for r in REDUCTIONS},
    **{f"confident_row_of_{owner}": partial(check_confident_row, owner) for owner in (0, 1, 2)},
    **{f"poison_{value}": partial(check_poison, value) for value in (torch.nan, torch.inf)},
    "masked_classes": check_masked_classes,
    **{f"autograd_{r}": partial(check_autograd, r) for r in ("none", "mean")},
    "reductions_mean": partial(check_reductions, "mean", (True, True, True), 17, 0),
    "reductions_mean_frozen_input": partial(check_reductions, "mean", (False, True, True), 16, 0),
    "reductions_none": partial(check_reductions, "none", (True, True, True), 16, 1),
    "reductions_none_frozen_head": partial(check_reductions, "none", (True, False, False), 17, 0),
    **{
        f"workspace_{r}_{d}": partial(check_workspace, r, d)
        for r in ("none", "mean")
        for d in (F32, BF16)
    },
    "compiled": check_compiled,
    "uneven": check_uneven,
    "compared_once": partial(check_shapes_are_compared_once_where_looking_waits, (), 2),
    "compared_at_every_call": partial(
        check_shapes_are_compared_once_where_looking_waits, ("cpu",), 5
    ),
    "bad_input": check_bad_input,
}


def on_two(case):
    """The case, which more processes leave out."""
    return lambda: case() if dist.get_world_size() == 2 else None


CASES = {**{name: on_two(case) for name, case in OPTIONS.items()}, **ON_ANY_NUMBER}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return {world: processes.run(__name__, world, tmp_path_factory) for world in (2, 3)}


@pytest.mark.parametrize("case", CASES)
def test_classes_spread_over_two_processes(outcomes, case):
    assert not any(outcomes[2][case]), "\n".join(outcomes[2][case])


@pytest.mark.parametrize("case", ON_ANY_NUMBER)
def test_classes_spread_over_three_processes(outcomes, case):
    assert not any(outcomes[3][case]), "\n".join(outcomes[3][case])
