"""Hand-written losses on lazy logits, of one head and of two: each row of the table in
docs/loss.md, and what no table says."""

from __future__ import annotations

import gc
import math
import re
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.numerics import assert_no_worse
from support.watch import Watch
from torch import nn

from fastft.loss import head_sweep
from fastft.loss.lazy.evaluation import Held
from fastft.loss.lazy.logits import LazyLogits, lazy_linear
from fastft.loss.lazy.output_head import fused_loss
from fastft.loss.lazy.report import Report

B, S, V, H = 2, 16, 1024, 8
CHUNK = 4
DOCS = Path(__file__).parents[2] / "docs" / "loss.md"
ROWS = re.findall(r"(?m)^\| `(.+)` \| ([\d.]+) \| ([\d.]+) \| (\w+) \|$", DOCS.read_text())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(head_sweep._LIMITS, "cpu", (0, CHUNK, 1 << 31, 0))


def operands(dtype=torch.float32, hidden=H):
    """Hidden states and a head."""
    draw = torch.Generator().manual_seed(hidden)
    x, weight = (
        torch.randn(*shape, generator=draw).to(dtype) for shape in ((B, S, hidden), (V, hidden))
    )
    return x.requires_grad_(), weight.requires_grad_()


def names(lazy, dtype=torch.float32, report=None):
    """What the expressions of the table are made of, and the leaves."""
    leaves, theirs = operands(dtype), operands(dtype, 2 * H if dtype is torch.float64 else H)
    report, held, draw = report or Report(), Held(), torch.Generator().manual_seed(7)
    if lazy:
        z = lazy_linear(*leaves, None, report, held=held)
        with torch.no_grad():
            t = lazy_linear(*theirs, None, report)
    else:
        z = F.linear(*leaves)
        with torch.no_grad():
            t = F.linear(*theirs)
    given = {
        "y": torch.randint(0, V, (B, S), generator=draw),
        "m": torch.arange(B * S).view(B, S) % 2 == 0,
        "p": torch.randn(B, S, V, generator=draw).softmax(-1).to(dtype),
        "c": torch.rand(B, S, 1, generator=draw).to(dtype) + 0.5,
    }
    return {"z": z, "t": t, "V": V, "torch": torch, "F": F, **given}, leaves


def value_and_gradients(composition, lazy, dtype=torch.float32):
    given, leaves = names(lazy, dtype)
    value = eval(composition, given)  # of our own page
    return value, torch.autograd.grad(value.sum(), leaves)


@pytest.mark.parametrize(("composition", "forward", "backward", "memory"), ROWS)
@pytest.mark.way("a loss of one's own over logits", loss="exact")
def test_the_table_says_what_a_composition_costs(composition, forward, backward, memory):
    expected, expected_gradients = value_and_gradients(composition, lazy=False)
    report, product = Report(), 2 * B * S * H * V
    given, leaves = names(lazy=True, report=report)
    with Watch() as seen:
        value = eval(composition, given)
        forward_flops, seen.flops = seen.flops, 0
        gradients = torch.autograd.grad(value.sum(), leaves)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    counted = forward_flops / product, seen.flops / product
    assert counted == pytest.approx((float(forward), float(backward)), abs=0.01)
    assert bool(report.materialised) == (memory == "built")
    least, most = {
        "hidden": (0, V * H),
        "chunks": (CHUNK * V, 4 * CHUNK * V),
        "built": (B * S * V, 1 << 40),
    }[memory]
    assert least <= seen.elements <= most


def test_the_table_is_read():
    assert len(ROWS) > 35


DIVERGENCES = [row[0] for row in ROWS if "t." in row[0] and row[3] == "chunks"]


@pytest.mark.parametrize("composition", DIVERGENCES)
def test_a_teacher_of_another_width(composition):
    """In float64, in which a wrong factor would show."""
    (expected, truths), (value, gradients) = (
        value_and_gradients(composition, lazy, torch.float64) for lazy in (False, True)
    )
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients, truths, rtol=1e-9, atol=1e-9)


# a cosine builds logits, a divergence does not: their gradients come together in the hidden states
BUILT_TOO = {
    "inside": "F.cosine_similarity({kl}, {other}, dim=-1)",
    "beside": "{kl}.sum(-1) + F.cosine_similarity(z, {other}, dim=-1)",
    "times": "{kl}.sum(-1) * F.cosine_similarity({other}, z, dim=-1)",
}


# The divergence of a distribution from itself is rounding, which a cosine divides by a norm of at
# least 1e-8: of that nothing is left in fp32, in stock either.
NOTHING = ("inside", "z.softmax(-1)", False)
JOINED = [
    (place, other, log_target)
    for place in BUILT_TOO
    for other in ("p", "t.softmax(-1)", "z.detach().softmax(-1)", "z.softmax(-1)")
    for log_target in (False, True)
    if (place, other, log_target) != NOTHING
]


@pytest.mark.parametrize(("place", "other", "log_target"), JOINED)
def test_a_divergence_and_a_cosine_differ_from_stock_by_rounding_alone(place, other, log_target):
    """In float64 by nothing else, and in fp32 by no more than stock's own."""
    kl = f"F.kl_div(z.log_softmax(-1), {other}, reduction='none', log_target={log_target})"
    composition = BUILT_TOO[place].format(kl=kl, other=other)
    expected, truths = value_and_gradients(composition, False, torch.float64)
    value, gradients = value_and_gradients(composition, True, torch.float64)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients, truths, rtol=1e-11, atol=1e-11)
    # of its hidden states the teacher has others in fp32
    if "t." not in other:
        ours, stock = (value_and_gradients(composition, lazy)[1] for lazy in (True, False))
        for what, mine, theirs, truth in zip(("dx", "dW"), ours, stock, truths, strict=True):
            assert_no_worse(mine, theirs, truth, what, terms=B * S + H + V)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("composition", DIVERGENCES[:2])
def test_a_divergence_in_16_bits(composition, dtype):
    found = [
        value_and_gradients(composition, *kind)
        for kind in ((True, dtype), (False, dtype), (False, torch.float32))
    ]
    ours, stock, exact = ([value, *gradients] for value, gradients in found)
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in stock]
    for what, mine, theirs in zip(("dx", "dW"), ours[1:], stock[1:], strict=True):
        truth = exact[1 if what == "dx" else 2].double()
        assert_no_worse(mine, theirs, truth, what, terms=B * S + H + V)


def jsd(z, t, beta):
    student, teacher = z.log_softmax(-1), t.log_softmax(-1)
    beta = torch.tensor(beta)
    mixed = torch.stack([student + torch.log1p(-beta), teacher + torch.log(beta)])
    mixture = torch.logsumexp(mixed, dim=0)
    of_teacher, of_student = (
        F.kl_div(mixture, one, reduction="none", log_target=True) for one in (teacher, student)
    )
    return (beta * of_teacher + (1 - beta) * of_student).sum()


@pytest.mark.parametrize("trained", [False, True])
def test_both_heads_get_their_gradients_if_both_are_trained(trained):
    results = []
    for lazy in (False, True):
        leaves, report = [*operands(), *operands(hidden=5)], Report()
        x, weight, u, other = leaves
        if not trained:
            other.requires_grad_(False)
        heads = (x, weight), (u, other)
        z, t = (lazy_linear(*head, None, report) if lazy else F.linear(*head) for head in heads)
        value = jsd(z / 0.7, t / 0.7, 0.3)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(value, wanted, retain_graph=True)
        again = torch.autograd.grad(2 * value, wanted)
        torch.testing.assert_close(again, tuple(2 * gradient for gradient in first))
        results.append([value, *first])
        assert not report.materialised
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def products_of(function):
    with Watch() as seen:
        function()
    return seen.flops / (2 * B * S * H * V)


@pytest.mark.parametrize(
    "other",
    [
        lambda z: z.detach(),
        lambda z: z[:, :].detach() * 0.5,
        lambda z: z.view(B, S, V),
        lambda z: z < z.detach().mean(-1, keepdim=True),
        lambda z: z[:, :],
    ],
)
def test_logits_of_the_same_rows_are_made_once(other):
    given, leaves = names(lazy=True)
    z = given["z"]
    assert products_of(lambda: torch.where(z > 0, z, other(z)).exp().sum()) == 3
    dense = names(lazy=False)[0]["z"].detach().requires_grad_()
    expected = torch.autograd.grad(torch.where(dense > 0, dense, other(dense)).exp().sum(), dense)
    wanted = (expected[0].view(-1, V) @ leaves[1].detach()).view(B, S, H)
    (found,) = torch.autograd.grad(torch.where(z > 0, z, other(z)).exp().sum(), leaves[:1])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


TRAINED = {
    "a number": lambda z, one: (z * one[0, 0, 0]).logsumexp(-1),
    "a column": lambda z, one: (z * one[:, :, :1]).logsumexp(-1),
    "a column for all rows": lambda z, one: (z * one[:1, :, :1]).softmax(-1).square().sum(-1),
    "as many as logits": lambda z, one: (z + one).logsumexp(-1),
    "a part of a larger one": lambda z, one: (z[:, 1:] - one[:, :-1]).logsumexp(-1),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_tensor_gets_its_gradient(name):
    results = []
    for lazy in (False, True):
        report = Report()
        leaves = operands()
        z = lazy_linear(*leaves, None, report) if lazy else F.linear(*leaves)
        one = torch.linspace(0.5, 1.5, B * S * V).view(B, S, V).requires_grad_()
        value = TRAINED[name](z, one)
        results.append([value, *torch.autograd.grad(value.square().sum(), (*leaves, one))])
        assert not report.materialised
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-4)


COMBINED_FURTHER = {
    "not": lambda both, given: both,
    "with a column": lambda both, given: both * given["c"],
    "with as many numbers": lambda both, given: both * given["p"].clone(),
    "with the same numbers": lambda both, given: both * given["p"],
    "with other logits": lambda both, given: both * given["t"],
    "to other logits": lambda both, given: given["t"] * both,
    "without a history": lambda both, given: both.detach().exp(),
}


@pytest.mark.parametrize("further", COMBINED_FURTHER)
def test_a_tensor_that_changes_before_it_is_read_is_an_error(further):
    given, _ = names(lazy=True)
    both = given["z"] * given["p"]
    given["p"].zero_()
    with pytest.raises(RuntimeError, match="changed in place after lazy logits were combined"):
        COMBINED_FURTHER[further](both, given).sum(-1)


def test_a_column_is_as_it_was():
    given, _ = names(lazy=True)
    column = given["c"].clone()
    both = given["z"] * column
    column.zero_()
    dense = names(lazy=False)[0]
    torch.testing.assert_close(both.logsumexp(-1), (dense["z"] * dense["c"]).logsumexp(-1))


def test_a_divergence_cannot_be_differentiated_twice():
    given, leaves = names(lazy=True)
    value = (given["z"].log_softmax(-1) * given["t"].softmax(-1)).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(value, leaves, create_graph=True)


OTHERS = {
    "a stack that is read": lambda z, t: torch.stack([z, t])[1].sum() + z.sum(),
    "a stack of three dimensions": lambda z, t: torch.stack([z, t], 1).logsumexp(1).sum(),
    "two heads, one after the other": lambda z, t: torch.cat([z, t]).logsumexp(-1).sum(),
    "two shapes": lambda z, t: (z[:, :1] * t).sum(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_two_heads_cannot_do_lazily_is_right(name):
    (value, gradients), (expected, truths) = (
        (
            lambda given, leaves: (
                v := OTHERS[name](given["z"], given["t"]),
                torch.autograd.grad(v, leaves),
            )
        )(*names(lazy))
        for lazy in (True, False)
    )
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients, truths, rtol=1e-5, atol=1e-4)


class Model(nn.Module):
    def __init__(self, hidden, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(H, hidden), nn.Linear(hidden, V)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.way("a loss of one's own over logits", loss="exact")
def test_a_loop_with_a_teacher_has_no_logits():
    curves, x = [], torch.randn(B, S, H)
    for fused in (False, True):
        student, teacher = Model(8, 0), Model(12, 1).eval()
        optimizer, losses = torch.optim.SGD(student.parameters(), 0.1), []
        watched = Watch()
        with fused_loss(student, teacher) if fused else watched, watched:
            for _ in range(3):
                z = student(x)
                with torch.no_grad():
                    t = teacher(x)
                assert isinstance(t, LazyLogits) == fused
                loss = jsd(z, t, 0.5) / B
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        curves.append(losses)
        assert (watched.elements >= B * S * V) == (not fused)
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    assert "forward" not in vars(teacher.head)


def test_nothing_is_kept_from_step_to_step():
    student, teacher, x = Model(8, 0), Model(12, 1).eval(), torch.randn(B, S, H)
    optimizer, held = torch.optim.SGD(student.parameters(), 0.01), []

    def step():
        z = student(x)
        with torch.no_grad():
            t = teacher(x)
        kept = z.detach()
        loss = jsd(z, t, 0.5) + z.logsumexp(-1).sum() - z.max(-1).values.sum() + kept.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return [weakref.ref(one) for one in (z, t, kept)]

    gc.collect()
    gc.disable()  # nor in a cycle
    try:
        with fused_loss(student, teacher):
            for number in range(20):
                assert not any(reference() is not None for reference in step())
                if number in (2, 19):
                    held.append(
                        sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
                    )
    finally:
        gc.enable()
    assert held[0] == held[1]


def test_a_teacher_that_is_none_is_refused():
    with (
        pytest.raises(TypeError, match="a reference must be a"),
        fused_loss(Model(8, 0), "teacher"),
    ):
        pass


def test_a_detached_copy_that_is_kept_has_its_numbers_before_the_step():
    student, x = Model(8, 0), torch.randn(B, S, H)
    optimizer = torch.optim.SGD(student.parameters(), 0.5)
    with fused_loss(student) as report:
        logits = student(x)
        kept, expected = logits.detach(), F.linear(student.body(x), *student.head.parameters())
        assert isinstance(kept, LazyLogits) and kept.is_lazy and not kept.requires_grad
        logits.logsumexp(-1).sum().backward()
        assert not report.materialised
        optimizer.step()
    assert type(kept) is torch.Tensor
    torch.testing.assert_close(kept, expected.detach())
    assert report.materialised[0].startswith("logits that were kept")


# a rank, a filter of the k best, ... compare logits with one of themselves
SELECTIONS = {
    "rank of the label": "(z > z.gather(-1, y[..., None])).sum(-1)",
    "rank in probabilities": "(z.softmax(-1) > z.softmax(-1).gather(-1, y[..., None])).sum(-1)",
    "rank of scaled logits": "(lambda s: (s > s.gather(-1, y[..., None])).sum(-1))(z / c)",
    "rank in a detached copy": "(z > z.detach().gather(-1, y[..., None])[..., 0, None]).sum(-1)",
    "how many are best": "(z == z.amax(-1, keepdim=True)).sum(-1)",
    "how many are best, expanded": "(z >= z.max(-1).values[..., None].expand_as(z)).sum(-1)",
    "how many are worst": "(z <= z.min(-1, keepdim=True).values).sum(-1)",
    "distance to the best": "((z - z.detach().amax(-1, keepdim=True)) == 0).sum(-1)",
    "one position": "(z[0, 0] > z[0, 0].gather(-1, y[0, :1])).sum(-1)",
    "the five best": "z.masked_fill(z < z.topk(5).values[..., -1:], -1e9).logsumexp(-1)",
    "the five best, with a teacher": (
        "(z.masked_fill(z < z.topk(5).values[..., -1, None], -1e9).softmax(-1) * t).sum(-1)"
    ),
    "the best after a change in place": (
        "(lambda best: (z.mul_(2.0) > best).sum(-1))(z.max(-1, True).values)"
    ),
    "the best, changed in place": (
        "(lambda best: (best.mul_(0.5), (z > best).sum(-1))[1])(z.max(-1, True).values.detach())"
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("chunk", [1, 3, CHUNK])
def test_a_number_that_was_picked_is_equal_to_itself(name, chunk, monkeypatch):
    """A product of other rows rounds differently."""
    monkeypatch.setitem(head_sweep._LIMITS, "cpu", (0, chunk, 1 << 31, 0))
    results, gradients = [], []
    for lazy in (False, True):
        report = Report()
        given, leaves = names(lazy, torch.float64, report)
        result = eval(SELECTIONS[name], given)
        assert not report.materialised
        results.append(result)
        if result.requires_grad:
            gradients.append(torch.autograd.grad(result.sum(), leaves))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, B, S, V), (B, 1, S, 1)])
def test_a_tensor_of_more_dimensions_than_the_logits(shape):
    """The result has them too, and is none of these rows."""
    more = torch.linspace(0.5, 1.0, math.prod(shape)).view(shape)
    expected, actual = ((names(lazy)[0]["z"] * more).logsumexp(-1) for lazy in (False, True))
    torch.testing.assert_close(actual, expected)


SHAPES = {
    "zeros_like": "z + torch.zeros_like(z)",
    "ones_like, transposed": "z.transpose(0, 1) + torch.ones_like(z.transpose(0, 1))",
    "full_like": "torch.where(m[..., None], z, torch.full_like(z, -3.0))",
    "expand_as": "z.masked_fill(m[..., None].expand_as(z), 0.0)",
    "view_as": "z * p.flatten().view_as(z)",
    "reshape_as": "z * p.flatten().reshape_as(z)",
    "to": "z * m[..., None].to(z)",
    "type_as": "z * m[..., None].type_as(z)",
}


@pytest.mark.parametrize("name", SHAPES)
def test_who_asks_for_the_shape_alone_gets_no_logits(name):
    results = []
    for lazy in (False, True):
        report = Report()
        given, _ = names(lazy, torch.float64, report)
        results.append(eval(SHAPES[name], given).logsumexp(-1))
        assert not report.materialised or "transposed" in name
    torch.testing.assert_close(*results)
