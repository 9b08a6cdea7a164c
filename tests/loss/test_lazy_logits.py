"""Lazy logits against dense ones: values and gradients for every kind of use; what must stay lazy,
does."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.numerics import assert_no_worse
from support.watch import Watch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastft.loss import head_sweep
from fastft.loss.head_gemms import HeadTerm
from fastft.loss.lazy import losses as lazy_losses
from fastft.loss.lazy.expressions import LOGITS, Recorded, scale_and_softcap
from fastft.loss.lazy.logits import LazyLogits, lazy_linear
from fastft.loss.lazy.output_head import fused_loss
from fastft.loss.lazy.report import Report
from fastft.loss.lazy.sources import Linear, Source, over_rows

B, S, V, H = 2, 9, 53, 16
VOCAB = 20_000  # so large that 1024 rows are more than any workspace
TARGET = (torch.arange(B * S).reshape(B, S) * 7) % V
IGNORED = TARGET.masked_fill(torch.arange(S) < 3, -100)
MASK = TARGET % 3 != 0
INDEX = torch.tensor([3, 1, 7])
NOISE = torch.linspace(-1, 1, B * S * V).reshape(B, S, V)
TOKEN_SCALE = torch.linspace(0.5, 2, B * S).reshape(B, S, 1)
ROW = torch.arange(V) * 0.1


class DoubledGradient(torch.autograd.Function):
    """A stranger's function: never heard of torch functions."""

    @staticmethod
    def forward(ctx, z):
        return z.exp().sum(-1)

    @staticmethod
    def backward(ctx, g):
        return 2 * g.unsqueeze(-1).expand(*g.shape, V).contiguous()


def alias_in_place(z):
    view = z.view(-1, V)
    view /= 2.0
    return z.logsumexp(-1).sum() + view.logsumexp(-1).pow(2).sum()


def part_in_place(z):
    part = z[:, 2:5]
    part *= 3.0
    return z.logsumexp(-1).sum()


def copy_before_in_place(z):
    kept = z[:, :-1].contiguous()
    z *= 2.0
    return kept.logsumexp(-1).sum() + z.logsumexp(-1).pow(2).sum()


def item_set(z):
    z[..., 3] = -5.0
    return z.logsumexp(-1).sum()


def same_object_in_place(z):
    other = z
    z /= 2.0
    return other.log_softmax(-1)[..., 3].sum()


def hooked(z):
    z.register_hook(lambda g: g * 2)
    return F.cross_entropy(z.view(-1, V), TARGET.view(-1))


def hooked_view(z):
    rows = z.view(-1, V)
    z.register_hook(lambda g: g * 2)
    return F.cross_entropy(rows, TARGET.view(-1))


def without_history(z):
    with torch.no_grad():
        fixed = z * 0.5
    return (z.logsumexp(-1) * fixed.logsumexp(-1)).sum()


def read_before(z):
    with torch.no_grad():
        z.sort(-1)
    return z.logsumexp(-1).sum()


def smoother(z):
    """transformers' LabelSmoother."""
    log_probs = -F.log_softmax(z[..., :-1, :].contiguous(), dim=-1)
    labels = IGNORED[..., 1:].contiguous().unsqueeze(-1)
    padding = labels.eq(-100)
    nll = log_probs.gather(dim=-1, index=labels.clamp(min=0)).masked_fill(padding, 0.0)
    smoothed = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32).masked_fill(padding, 0.0)
    return 0.9 * nll.sum() + 0.1 * smoothed.sum() / V


def together(z):
    return torch.cat([z[:1], z[1:]])


LAZY = {
    "ce": lambda z: F.cross_entropy(z.view(-1, V), TARGET.view(-1)),
    "ce ignore": lambda z: F.cross_entropy(z.float().view(-1, V), IGNORED.view(-1)),
    "ce sum": lambda z: F.cross_entropy(z.view(-1, V), IGNORED.view(-1), reduction="sum") / 7,
    "ce none": lambda z: (
        F.cross_entropy(z.view(-1, V), TARGET.view(-1), reduction="none") * torch.arange(B * S)
    ).sum(),
    "ce shifted": lambda z: F.cross_entropy(z[:, :-1].reshape(-1, V), TARGET[:, 1:].reshape(-1)),
    "ce shifted contiguous": lambda z: F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, V), TARGET[:, 1:].reshape(-1)
    ),
    "ce module smoothed": lambda z: nn.CrossEntropyLoss(label_smoothing=0.1)(
        z.view(-1, V), IGNORED.view(-1)
    ),
    "ce int32": lambda z: F.cross_entropy(z.view(-1, V), TARGET.view(-1).to(torch.uint8)),
    "ce keywords": lambda z: F.cross_entropy(input=z.view(-1, V), target=TARGET.view(-1)),
    "ce softcap": lambda z: F.cross_entropy((torch.tanh(z / 5) * 5).view(-1, V), TARGET.view(-1)),
    "ce scale": lambda z: F.cross_entropy((z * 0.3).float().view(-1, V), TARGET.view(-1)),
    "ce tensor scale": lambda z: F.cross_entropy(
        (z / torch.tensor(2.0)).view(-1, V), TARGET.view(-1)
    ),
    "ce mask": lambda z: F.cross_entropy(z[MASK], TARGET[MASK]),
    "ce nested": lambda z: F.cross_entropy(z.view(-1, V).float()[MASK.view(-1)], TARGET[MASK]),
    "ce weights": lambda z: F.cross_entropy(z.view(-1, V), IGNORED.view(-1), weight=ROW),
    "ce weights smoothed": lambda z: F.cross_entropy(
        z.view(-1, V), IGNORED.view(-1), ROW, label_smoothing=0.1
    ),
    "ce weights sum": lambda z: F.cross_entropy(
        (z / 3.0).view(-1, V), TARGET.view(-1), ROW, reduction="sum"
    ),
    "ce weights of an expression": lambda z: F.cross_entropy(
        z.exp().view(-1, V), IGNORED.view(-1), weight=ROW
    ),
    "nll weights": lambda z: F.nll_loss(
        F.log_softmax(z, -1).view(-1, V), IGNORED.view(-1), weight=ROW
    ),
    "nll of an expression": lambda z: F.nll_loss(
        F.log_softmax(-z, -1).view(-1, V), IGNORED.view(-1), weight=ROW
    ),
    "ce smoothed none": lambda z: (
        F.cross_entropy(z.view(-1, V), IGNORED.view(-1), reduction="none", label_smoothing=0.3)
        * torch.arange(B * S)
    ).sum(),
    "ce scaled softcap": lambda z: F.cross_entropy(
        (2 * torch.tanh(z.float() * 0.3 / 4) * 5).view(-1, V), IGNORED.view(-1), label_smoothing=0.1
    ),
    "ce softcap twice": lambda z: F.cross_entropy(
        torch.tanh(torch.tanh(z) * 2).view(-1, V), TARGET.view(-1)
    ),
    "ce softcap upside down": lambda z: F.cross_entropy(
        (torch.tanh(z) * -3.0).view(-1, V), TARGET.view(-1)
    ),
    "ce reciprocal": lambda z: F.cross_entropy((3.0 / (z * z + 1.0)).view(-1, V), TARGET.view(-1)),
    "ce shifted softcap": lambda z: F.cross_entropy(
        (torch.tanh(z + 1.0) * 3.0).view(-1, V), TARGET.view(-1)
    ),
    "ce soft": lambda z: F.cross_entropy(z.view(-1, V), NOISE.view(-1, V).softmax(-1)),
    "ce soft smoothed": lambda z: F.cross_entropy(
        (torch.tanh(z / 5) * 5).view(-1, V),
        NOISE.view(-1, V).softmax(-1),
        ROW,
        label_smoothing=0.2,
        reduction="sum",
    ),
    "ce row": lambda z: F.cross_entropy((z + ROW).view(-1, V), TARGET.view(-1)),
    "ce row of batch": lambda z: F.cross_entropy(
        (z + ROW.view(1, 1, V)).view(-1, V), TARGET.view(-1)
    ),
    "ce float64": lambda z: F.cross_entropy(z.double().view(-1, V), TARGET.view(-1)),
    "ce all slice": lambda z: F.cross_entropy(z[..., :V].view(-1, V), TARGET.view(-1)),
    "nll": lambda z: F.nll_loss(F.log_softmax(z, -1).view(-1, V), IGNORED.view(-1)),
    "nll none": lambda z: (
        F.nll_loss(z.log_softmax(-1).view(-1, V), TARGET.view(-1), reduction="none").pow(2).sum()
    ),
    "label smoother": smoother,
    "lse": lambda z: z.logsumexp(-1).pow(2).mean(),
    "lse tuple": lambda z: torch.logsumexp(z, dim=(-1,)).sum(),
    "lse keepdim": lambda z: (z.logsumexp(-1, keepdim=True) ** 2).sum(),
    "softmax": lambda z: (z.softmax(-1) ** 2).sum(-1).mean(),
    "entropy": lambda z: (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "gather": lambda z: z.gather(-1, TARGET.unsqueeze(-1)).sum(),
    "gather few": lambda z: (z.gather(2, INDEX.expand(B, S, 3)) * INDEX).sum(),
    "argmax": lambda z: z.argmax(-1).float().sum() + z.sum(-1).sum(),
    "amax": lambda z: z.amax(-1).sum(),
    "max": lambda z: (
        (z.max(-1).values ** 2).sum() + torch.max(z * 2, dim=2, keepdim=True)[1].float().sum()
    ),
    "topk": lambda z: (
        (z.topk(5).values ** 2).sum() + torch.topk(z, 3, -1, largest=False).indices.float().sum()
    ),
    "mean": lambda z: z.mean(-1, keepdim=True).pow(2).sum(),
    "clone": lambda z: z.clone().logsumexp(-1).sum(),
    "negative": lambda z: (-z).logsumexp(-1).sum(),
    "reflected": lambda z: ((1 - z) * 2).logsumexp(-1).sum(),
    "torch.mul number": lambda z: torch.mul(torch.tensor(2.0), z).logsumexp(-1).sum(),
    "power": lambda z: (z**2).logsumexp(-1).sum(),
    "sum of two": lambda z: (z + z * 2).logsumexp(-1).sum(),
    "product of two": lambda z: (z * z).logsumexp(-1).sum(),
    "clamp": lambda z: z.clamp(-1, 1).logsumexp(-1).sum(),
    "half way": lambda z: z.to(torch.bfloat16).float().logsumexp(-1).sum(),
    "to like": lambda z: z.type_as(ROW).to(ROW).logsumexp(-1).sum(),
    "index int": lambda z: z[0].logsumexp(-1).sum(),
    "index tensor": lambda z: z[:, INDEX].logsumexp(-1).sum(),
    "index two": lambda z: z[torch.arange(B), torch.tensor([2, 5])].logsumexp(-1).sum(),
    "index none": lambda z: z[:, None].logsumexp(-1).sum(),
    "index last": lambda z: z[:, -1, :].logsumexp(-1).sum(),
    "index step": lambda z: z[:, ::2].logsumexp(-1).sum(),
    "iterate": lambda z: sum(row.logsumexp(-1).sum() for row in z),
    "chunk": lambda z: sum(c.logsumexp(-1).pow(2).sum() for c in z.chunk(2, 1)),
    "split": lambda z: sum(c.logsumexp(-1).sum() for c in z.split([4, 5], dim=1)),
    "unbind": lambda z: sum(c.log_softmax(-1).gather(-1, TARGET[:, :1]).sum() for c in z.unbind(1)),
    "index_select": lambda z: z.index_select(1, INDEX).logsumexp(-1).sum(),
    "select narrow": lambda z: z.narrow(1, 2, 4).select(0, 1).logsumexp(-1).sum(),
    "squeeze": lambda z: z[:1].squeeze(0).unsqueeze(1).logsumexp(-1).sum(),
    "flatten": lambda z: z.flatten(0, 1).logsumexp(-1).sum(),
    "transpose": lambda z: (z.transpose(0, 1).logsumexp(-1) * torch.arange(B)).sum(),
    "permute": lambda z: (z.permute(1, 0, 2).logsumexp(-1) * torch.arange(B)).sum(),
    "in place": lambda z: F.cross_entropy((z * 1).div_(2.0).view(-1, V), TARGET.view(-1)),
    "in place by tokens": lambda z: (z * 1).mul_(NOISE).logsumexp(-1).sum(),
    "in place, two layers": lambda z: (z * 1).add_(z * SCALE).logsumexp(-1).sum(),
    "in place same object": lambda z: z.clone().mul_(2).logsumexp(-1).sum(),
    "no grad then grad": without_history,
    "checkpoint": lambda z: checkpoint(lambda q: q.logsumexp(-1).sum(), z, use_reentrant=False),
    "trained bias": lambda z: (z + BIAS).logsumexp(-1).pow(2).sum(),
    "ce trained scale": lambda z: F.cross_entropy((z * SCALE).view(-1, V), TARGET.view(-1)),
    "ce trained row": lambda z: F.cross_entropy((BIAS * z).view(-1, V), TARGET.view(-1)),
    "trained row, some tokens": lambda z: (z * BIAS)[:, 1:].reshape(-1, V).logsumexp(-1).sum(),
    "trained row, one token": lambda z: (z * BIAS)[0, 1][None].logsumexp(-1).sum(),
    "trained row, tokens together": lambda z: together(z * BIAS).logsumexp(-1).sum(),
    "trained rows of two sums": lambda z: (
        (z + (BIAS - 1)[None] * z + BIAS * (z * 2) * SCALE).logsumexp(-1).square().sum()
    ),
    "trained row in place": lambda z: (z * 1).mul_(BIAS).add_(z).logsumexp(-1).sum(),
    "token scale": lambda z: (z * TOKEN_SCALE).logsumexp(-1).sum(),
    "where": lambda z: torch.where(ROW < 5, z, torch.tensor(-1e9)).logsumexp(-1).sum(),
    "masked_fill": lambda z: z.masked_fill(ROW > 4.9, -1e9).logsumexp(-1).sum(),
    "z minus lse": lambda z: (
        (z - z.logsumexp(-1, keepdim=True)).gather(-1, TARGET.unsqueeze(-1)).sum()
    ),
    "kl": lambda z: F.kl_div(F.log_softmax(z, -1), NOISE.softmax(-1), reduction="batchmean"),
    "mse": lambda z: F.mse_loss(z, NOISE),
    "sum all": lambda z: z.sum(),
    "take_along": lambda z: torch.take_along_dim(z, TARGET.unsqueeze(-1), -1).sum(),
    "isnan": lambda z: z.isnan().float().sum() + z.sum(),
}
MATERIALISED = {
    "same object in place": same_object_in_place,
    "alias in place": alias_in_place,
    "part in place": part_in_place,
    "copy before in place": copy_before_in_place,
    "item set": item_set,
    "hook": hooked,
    "hook after view": hooked_view,
    "read before": read_before,
    "function": lambda z: DoubledGradient.apply(z).sum(),
    "function of a trained row": lambda z: DoubledGradient.apply(z * BIAS).square().sum(),
    "two trained rows, tokens together": lambda z: torch.cat([z * BIAS, z * BIAS]).square().sum(),
    "function after softcap": lambda z: DoubledGradient.apply(torch.tanh(z / 5) * 5).sum(),
    "ce transposed": lambda z: F.cross_entropy(z.transpose(1, 2), TARGET),
    "ce soft of an expression": lambda z: F.cross_entropy(
        z.exp().view(-1, V), NOISE.view(-1, V).softmax(-1)
    ),
    "ce cut": lambda z: F.cross_entropy(z[..., :40].reshape(-1, 40), TARGET.clamp(max=39).view(-1)),
    "kl to detached": lambda z: F.kl_div(
        z.log_softmax(-1), (z.detach() * 0.5).softmax(-1), reduction="sum"
    ),
    "max of rows": lambda z: z.max(1).values.sum() + z.max(),
    "topk of rows": lambda z: z.topk(2, 1).values.sum(),
    "sum of rows": lambda z: z.sum((0, 1)).pow(2).sum(),
    "lse of rows": lambda z: z.logsumexp(0).sum(),
    "norm": lambda z: z.norm(),
    "cat": lambda z: torch.cat([z, z * 2]).logsumexp(-1).sum(),
    "split vocabulary": lambda z: z.split(20, -1)[1].sum(),
    "index vocabulary": lambda z: z[..., INDEX].sum() + z[0, 1, 2] + z[..., -1].sum(),
    "matmul": lambda z: (z.softmax(-1) @ ROW.unsqueeze(-1)).sum(),
    "einsum": lambda z: torch.einsum("bsv,v->bs", z, ROW).sum(),
    "linear": lambda z: F.linear(z, torch.ones(3, V)).pow(2).sum(),
    "layer_norm": lambda z: F.layer_norm(z, (V,)).pow(3).sum(),
    "roll": lambda z: z.roll(1, 1).logsumexp(-1).pow(2).sum(),
    "expand": lambda z: z[:, :, None].expand(-1, -1, 2, -1).logsumexp(-1).sum(),
    "vmap": lambda z: torch.vmap(lambda row: row.logsumexp(-1))(z.reshape(-1, V)).sum(),
    "pad": lambda z: F.pad(z, (0, 1)).logsumexp(-1).sum(),
    "checkpoint reentrant": lambda z: checkpoint(
        lambda q: q.logsumexp(-1).sum() * 1, z, use_reentrant=True
    ),
}
BIAS = torch.linspace(-1, 1, V).requires_grad_()
SCALE = torch.tensor(1.3, requires_grad=True)


def run(use, lazy: bool, dtype=torch.float32):
    """The value and the gradients of x, W, b and of what the use itself trains."""
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((B, S, H), (V, H), (V,))
    )
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    BIAS.grad = SCALE.grad = None
    report = Report()
    hidden = x * 1.0
    z = lazy_linear(hidden, weight, bias, report) if lazy else F.linear(hidden, weight, bias)
    value = use(z)
    value.double().backward()
    grads = [
        torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for leaf in (*leaves, BIAS, SCALE)
    ]
    return value.detach(), grads, report


def small_chunks(monkeypatch, rows):
    monkeypatch.setitem(head_sweep._LIMITS, "cpu", (0, rows, 1 << 31, 0))


@pytest.mark.parametrize("name", [*LAZY, *MATERIALISED])
def test_as_dense(name, monkeypatch):
    small_chunks(monkeypatch, 4)
    use = LAZY.get(name) or MATERIALISED[name]
    (expected, expected_grads, _), (actual, grads, report) = run(use, False), run(use, True)
    assert actual.dtype == expected.dtype and type(actual) is Tensor
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for what, mine, theirs in zip(
        ("x", "W", "b", "BIAS", "SCALE"), grads, expected_grads, strict=True
    ):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(
            mine, theirs, rtol=1e-5, atol=2e-6 * max(scale, 1), msg=lambda m, w=what: f"{w}: {m}"
        )
    assert bool(report.materialised) == (name in MATERIALISED), report


def lazy_example(dtype=torch.float32):
    x, weight = (
        torch.randn(B, S, H, dtype=dtype).requires_grad_(),
        torch.randn(V, H, dtype=dtype).requires_grad_(),
    )
    report = Report()
    return lazy_linear(x, weight, None, report), x, weight, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "use",
    [
        lambda z, t: F.cross_entropy(z.float().view(-1, VOCAB), t),
        lambda z, t: F.cross_entropy(
            (torch.tanh(z / 5) * 5).float().view(-1, VOCAB), t, label_smoothing=0.1
        ),
        lambda z, t: F.log_softmax(z.float(), -1).view(-1, VOCAB).gather(-1, t[:, None]).sum(),
    ],
)
def test_nothing_as_large_as_the_logits_is_made(use, dtype, monkeypatch):
    small_chunks(monkeypatch, 256)
    rows = 1024
    x = torch.randn(2, rows // 2, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, 8, dtype=dtype, requires_grad=True)
    with Watch() as seen:
        use(lazy_linear(x, weight, None, Report()), torch.randint(0, VOCAB, (rows,))).backward()
    assert 0 < seen.elements <= rows * VOCAB // 2


@pytest.mark.parametrize(
    "recorded",
    [LOGITS, Recorded(torch.exp, (LOGITS,), {}, (False, torch.bfloat16))],
    ids=["logits", "exp"],
)
def test_the_logits_of_a_chunk_are_gone_before_the_next(recorded, monkeypatch):
    """Also where garbage is collected late."""
    small_chunks(monkeypatch, 2)
    made = []

    def watched(z):
        assert not [reference for reference in made if reference() is not None]
        made.append(weakref.ref(z))
        return z.amax(-1)

    x, weight = torch.randn(8, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    gc.disable()
    try:
        over_rows(Source((Linear.of((x, weight, None)),)), recorded, watched).sum().backward()
    finally:
        gc.enable()
    assert len(made) == 4 + 4


def test_looks_like_the_dense_tensor():
    z, x, weight, report = lazy_example()
    dense = F.linear(x, weight)
    for mine, theirs in (
        (z, dense),
        (z[:, 1:], dense[:, 1:]),
        (z.transpose(0, 1), dense.transpose(0, 1)),
    ):
        assert (mine.shape, mine.stride(), mine.dtype, mine.device) == (
            theirs.shape,
            theirs.stride(),
            theirs.dtype,
            theirs.device,
        )
        assert (
            mine.requires_grad
            and mine.is_contiguous() == theirs.is_contiguous()
            and len(mine) == len(theirs)
        )
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        z[:, 1:].view(-1, V)
    assert "LazyLogits" in repr(z) and not z.is_leaf and not report.materialised
    torch.testing.assert_close(torch.tensor(z.detach().tolist()), dense.detach())
    torch.testing.assert_close(pickle.loads(pickle.dumps(z)), dense)
    torch.testing.assert_close(copy.deepcopy(z.detach()), dense.detach())


def test_the_report_names_the_line():
    z, *_, report = lazy_example()
    z.sort(-1)
    z.sort(-1)
    assert len(report.materialised) == 1 and report.materialised[0].startswith("sort at ")
    assert "test_lazy_logits.py:" in report.materialised[0]


def test_reading_after_the_weight_changed_raises():
    for read in (
        lambda z: z.sum(),
        lambda z: z.logsumexp(-1),
        lambda z: F.cross_entropy(z[0], TARGET[0]),
    ):
        z, _, weight, _ = lazy_example()
        with torch.no_grad():
            weight.add_(1.0)
        with pytest.raises(RuntimeError, match="read after the output head's weight was changed"):
            read(z)


@pytest.mark.parametrize("classes", [1, 7])
def test_a_negative_step_is_torchs_error(classes):
    logits = lazy_linear(torch.randn(5, 4), torch.randn(classes, 4), None, Report())
    with pytest.raises(ValueError, match="step must be greater than zero"):
        logits[:, ::-1]


def test_reading_after_the_hidden_states_changed_raises():
    hidden = torch.randn(B, S, H)
    z = lazy_linear(hidden, torch.randn(V, H), None, Report())
    hidden.mul_(2.0)
    with pytest.raises(RuntimeError, match="or its input"):
        z[:, 1:].logsumexp(-1)


def test_a_retained_gradient_is_there():
    z, x, weight, _ = lazy_example()
    z.retain_grad()
    F.cross_entropy(z.view(-1, V), TARGET.view(-1)).backward()
    dense = F.linear(x.detach(), weight.detach()).requires_grad_()
    F.cross_entropy(dense.view(-1, V), TARGET.view(-1)).backward()
    torch.testing.assert_close(z.grad, dense.grad)


@pytest.mark.parametrize(
    "watch",
    [
        lambda z, loss: z.retain_grad(),
        lambda z, loss: z.register_hook(print),
        lambda z, loss: z.view(-1, V).register_hook(print),
        lambda z, loss: torch.autograd.graph.register_multi_grad_hook([z], print),
        lambda z, loss: torch.autograd.grad(loss, z),
        lambda z, loss: torch.autograd.grad(loss, [z], allow_unused=True),
    ],
)
def test_a_hook_that_would_never_run_raises(watch):
    z, *_ = lazy_example()
    loss = F.cross_entropy(z.float().view(-1, V), TARGET.view(-1))
    with pytest.raises(RuntimeError, match="would never see a gradient"):
        watch(z, loss)


@pytest.mark.parametrize(
    "watch",
    [
        lambda z, seen: z.register_hook(seen.append),
        lambda z, seen: torch.autograd.graph.register_multi_grad_hook(
            [z], lambda grads: seen.append(grads[0])
        ),
        lambda z, seen: z.grad_fn.register_prehook(lambda grads: seen.append(grads[0])),
    ],
)
def test_who_watches_before_the_loss_sees_the_gradient(watch):
    z, x, weight, _ = lazy_example()
    with torch.no_grad():
        z.argmax(-1), z.detach()
    seen = []
    watch(z, seen)
    F.cross_entropy(z.float().view(-1, V), TARGET.view(-1)).backward()
    dense = F.linear(x.detach(), weight.detach()).requires_grad_()
    F.cross_entropy(dense.view(-1, V), TARGET.view(-1)).backward()
    torch.testing.assert_close(seen, [dense.grad])


@pytest.mark.parametrize("register", [lambda m, hook: m.register_full_backward_hook(hook), None])
@pytest.mark.parametrize("watched", ["head", "model"])
def test_a_module_backward_hook_keeps_the_logits_real(watched, register):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.head = None, nn.Linear(H, V)

        def get_output_embeddings(self):
            return self.head

        def forward(self, x):
            return self.head(x)

    model, seen, x = Model(), [], torch.randn(B, S, H, requires_grad=True)

    def hook(module, grad_input, grad_output):
        if module is (model.head if watched == "head" else model):
            seen.append(grad_output[0].abs().sum())

    register = register or (
        lambda module, hook: nn.modules.module.register_module_full_backward_hook(hook)
    )
    handle = register(model.head if watched == "head" else model, hook)
    try:
        with fused_loss(model) as report:
            F.cross_entropy(model(x).view(-1, V), TARGET.view(-1)).backward()
    finally:
        handle.remove()
    assert len(seen) == 1 and seen[0] > 0 and "backward hook watches" in report.skipped[0]


def test_every_label_ignored_costs_nothing():
    for use in (lambda z: z, lambda z: torch.tanh(z)):
        z, x, weight, _ = lazy_example()
        loss = F.cross_entropy(use(z).view(-1, V), torch.full((B * S,), -100))
        loss.backward()
        assert loss == 0 and not x.grad.any() and not weight.grad.any()


def test_no_row_at_all():
    z, x, weight, _ = lazy_example()
    loss = z[:, :0].logsumexp(-1).sum() + F.cross_entropy(
        torch.tanh(z)[z.new_zeros(B, S).bool()], TARGET[:0, 0], reduction="sum"
    )
    loss.backward()
    assert loss == 0 and not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("of_logits", [torch.tanh, torch.clone])
def test_a_sum_of_no_row_over_no_items_has_zero_gradients_as_in_torch(of_logits):
    """What Trainer computes for a step without a label."""
    z, x, weight, _ = lazy_example()
    rows = of_logits(z).flatten(0, -2)
    target = torch.full(rows.shape[:1], -100)
    (F.cross_entropy(rows, target, reduction="sum") / torch.tensor(0)).backward()
    assert not x.grad.any() and not weight.grad.any()


def test_a_bias_of_more_bits_than_the_logits():
    use = LAZY["trained bias"]
    truth, dense, lazy = (
        run(use, kind, dtype)
        for kind, dtype in ((0, torch.float64), (0, torch.bfloat16), (1, torch.bfloat16))
    )
    assert (
        lazy[0].dtype == dense[0].dtype == torch.float32
        and lazy[2].fused == 1
        and not lazy[2].materialised
    )
    for what, mine, theirs, exact in zip(
        ("x", "W", "b", "BIAS"), lazy[1], dense[1], truth[1], strict=False
    ):
        assert_no_worse(mine, theirs, exact.double(), what, terms=B * S + H + V)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_obeyed(inside, dtype):
    values = []
    for kind in ("truth", "dense", "lazy"):
        torch.manual_seed(0)
        x, weight = torch.randn(B, S, H), torch.randn(V, H)
        x, weight = (
            t.double().requires_grad_() if kind == "truth" else t.requires_grad_()
            for t in (x, weight)
        )
        with torch.autocast("cpu", dtype, enabled=kind != "truth"):
            z = lazy_linear(x, weight, None, Report()) if kind == "lazy" else F.linear(x, weight)
            z = torch.tanh(z / 5) * 5
            losses = (
                F.cross_entropy(z.view(-1, V), TARGET.view(-1), reduction="none")
                if inside
                else None
            )
        wide = z.double() if kind == "truth" else z.float()
        if losses is None:
            losses = F.cross_entropy(wide.view(-1, V), TARGET.view(-1), reduction="none")
        losses.mean().backward()
        values.append((z.dtype, losses.dtype, losses.detach(), x.grad, weight.grad))
    truth, dense, lazy = values
    assert lazy[:2] == dense[:2] == (dtype, torch.float32)
    for what, mine, theirs, exact in zip(
        ("losses", "dx", "dW"), lazy[2:], dense[2:], truth[2:], strict=True
    ):
        assert_no_worse(mine, theirs, exact, what, terms=B * S + H + V)


def test_the_loss_is_an_ordinary_tensor_and_its_graph_can_be_kept():
    z, x, _, _ = lazy_example(torch.bfloat16)
    loss = F.cross_entropy(torch.tanh(z).float().view(-1, V), TARGET.view(-1))
    assert type(loss) is Tensor and loss.dtype == torch.float32
    loss *= 2
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * first, rtol=0, atol=0)


def test_a_freed_weight_is_gathered_by_the_head():
    """FSDP2 and ZeRO-3: a head that is a unit of its own holds its weight only inside its
    forward."""
    head = nn.Linear(H, V, bias=False)
    full, gradient = head.weight.detach().clone(), []

    class Holder(nn.Module):
        def forward(self, input, fastft_task=None):
            gathered = full.clone().requires_grad_()
            gathered.register_hook(gradient.append)
            if fastft_task is not None:
                return fastft_task(input, gathered, None)
            logits = lazy_linear(input, gathered, None, Report(), self)
            gathered.untyped_storage().resize_(0)
            return logits

    x = torch.randn(B, S, H, requires_grad=True)
    loss = F.cross_entropy(Holder()(x).view(-1, V), TARGET.view(-1))
    loss.backward()
    expected = F.cross_entropy(F.linear(x.detach(), full).view(-1, V), TARGET.view(-1))
    torch.testing.assert_close(loss, expected)
    assert len(gradient) == 1 and x.grad.any()


def test_second_derivatives_are_refused() -> None:
    """A gradient of the gradient would silently miss the head's part."""
    x = torch.randn(5, 8, requires_grad=True)
    head = torch.nn.Linear(8, 11)
    logits = lazy_linear(x, head.weight, head.bias, Report())
    loss = F.cross_entropy(torch.tanh(logits), torch.arange(5))
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, x, create_graph=True)


def all_statistics(z):
    """What a loss, an accuracy and a z-loss ask for."""
    rows = z.view(-1, V)
    loss = F.cross_entropy(rows, TARGET.view(-1))
    right = (z.argmax(-1) == TARGET).float().mean()
    with torch.no_grad():
        perplexity = rows.logsumexp(-1, keepdim=True).mean()
        right = right + rows.detach().argmax(-1).float().mean()
    return loss + right + perplexity + z.argmax(dim=2).float().mean()


def lse_again(z):
    """Kept without a history, then asked for with one."""
    best = z.argmax(-1)
    best += 1  # a copy: what is kept does not change
    total = (
        z.argmax(-1).float().sum()
        + z.logsumexp(-1).pow(2).sum()
        + z.clone().view(-1, V).logsumexp(-1).sum()
    )
    with torch.no_grad():
        fixed = z.detach().logsumexp(-1).sum()
    return total + fixed


def lse_after_a_change_in_place(z):
    z = z * 1.0
    with torch.no_grad():
        before = z.logsumexp(-1)
    z.mul_(-1.0)
    return (before + z.logsumexp(-1) * z.argmax(-1)).sum()


# the loss of the row kernel, forward + backward
HEAD_PASSES = {all_statistics: 1 + 1, lse_again: 1 + 2, lse_after_a_change_in_place: 2 + 1}


@pytest.mark.parametrize("use", HEAD_PASSES)
def test_lse_and_argmax_are_computed_once(use, monkeypatch):
    passes, make = [], HeadTerm.add_logits

    def counted(*args, **options):
        passes.append(1)
        make(*args, **options)

    monkeypatch.setattr(HeadTerm, "add_logits", counted)
    (expected, expected_grads, _), (actual, grads, report) = run(use, False), run(use, True)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-5, atol=1e-5 * max(theirs.abs().max().item(), 1)
        )
    assert len(passes) == HEAD_PASSES[use] and not report.materialised


KNOWN = {
    "logits": (lambda z: z, (1.0, None)),
    "cast": (lambda z: z.float(), (1.0, None)),
    "scale": (lambda z: z * 0.25, (0.25, None)),
    "scale from the left": (lambda z: 3 * z, (3.0, None)),
    "quotient": (lambda z: z.float() / 8, (0.125, None)),
    "softcap": (lambda z: torch.tanh(z / 30.0) * 30.0, (1.0, 30.0)),
    "scaled softcap": (lambda z: 4.0 * (z * 0.5 / 2.0).tanh().float(), (1.0, 4.0)),
    "in place": (lambda z: (z * 1.0).mul_(0.5), (0.5, None)),
}
UNKNOWN = {
    "negative": lambda z: z * -1.0,
    "shifted": lambda z: z + 1.0,
    "reciprocal": lambda z: 1.0 / z,
    "two tanh": lambda z: z.tanh().tanh(),
    "of the logits twice": lambda z: z * z.tanh(),
    "rounding": lambda z: torch.div(z, 2.0, rounding_mode="floor"),
    "row": lambda z: z * ROW,
}


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_only_a_scale_and_a_softcap_go_to_the_kernel(name):
    z, *_ = lazy_example(torch.bfloat16)
    change, expected = KNOWN.get(name) or (UNKNOWN[name], None)
    result = change(z)
    found = (
        scale_and_softcap(result.expression)
        if isinstance(result, LazyLogits) and result.is_lazy
        else None
    )
    assert (None if found is None else found[:2]) == expected


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("ce shifted contiguous", True),
        ("ce softcap", True),
        ("ce scaled softcap", True),
        ("ce module smoothed", True),
        ("ce weights smoothed", True),
        ("nll weights", True),
        ("nll of an expression", False),
        ("ce softcap twice", False),
        ("ce row", False),
        ("ce float64", False),
        ("label smoother", False),
    ],
)
def test_which_losses_reach_the_kernel(name, kernel, monkeypatch):
    calls, fused = [], lazy_losses._fused
    monkeypatch.setattr(
        lazy_losses, "_fused", lambda *args, **options: calls.append(1) or fused(*args, **options)
    )
    run(LAZY[name], True)
    assert bool(calls) == kernel


def used_before_and_after_a_change(change):
    """A function that torch functions do not see has the gradient of what it was given."""

    def use(z):
        z = z * 1.0
        before = DoubledGradient.apply(z)
        change(z)
        return before.sum() + z.logsumexp(-1).sum() + DoubledGradient.apply(z.clone()).sum()

    return use


def operand_changed_after(z):
    row = ROW.clone()
    shifted = z + row
    row.fill_(100.0)
    return shifted.logsumexp(-1).sum()


def result_given(z):
    result = torch.empty(B, S)
    torch.logsumexp(z.detach(), -1, out=result)
    return (z.logsumexp(-1) * result).sum()


LATER = {
    "function before a change in place": used_before_and_after_a_change(lambda z: z.mul_(0.5)),
    "function before a mask in place": used_before_and_after_a_change(
        lambda z: z.masked_fill_(ROW > 4.9, 0.0)
    ),
    "operand": operand_changed_after,
    "out=": result_given,
}


@pytest.mark.parametrize("name", LATER)
def test_what_happens_later_changes_nothing_that_was_computed(name):
    (expected, expected_grads, _), (actual, grads, _) = (
        run(LATER[name], False),
        run(LATER[name], True),
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-5, atol=1e-5 * max(theirs.abs().max().item(), 1)
        )


def test_targets_that_change_before_backward_are_noticed_as_torch_does():
    for lazy in (False, True):
        z, x, weight, _ = lazy_example()
        target = TARGET.view(-1).clone()
        losses = F.cross_entropy(
            (z if lazy else F.linear(x, weight)).exp().view(-1, V), target, reduction="none"
        )
        target.fill_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses.sum().backward()


DTYPES_OF_LOSSES = {
    "probabilities of fp32": lambda z: F.cross_entropy(z, torch.full((B * S, V), 1 / V)),
    "probabilities of fp64": lambda z: F.cross_entropy(
        z, torch.full((B * S, V), 1 / V, dtype=torch.float64)
    ),
    "probabilities of bf16": lambda z: F.cross_entropy(
        z, torch.full((B * S, V), 1 / V, dtype=torch.bfloat16)
    ),
    "probabilities of fp32, weights": lambda z: F.cross_entropy(
        z, torch.full((B * S, V), 1 / V), ROW.to(z.dtype)
    ),
    "classes": lambda z: F.cross_entropy(z, TARGET.view(-1)),
    "classes, rows": lambda z: F.cross_entropy(
        z, TARGET.view(-1), reduction="none", label_smoothing=0.1
    ),
    "nll": lambda z: F.nll_loss(z.log_softmax(-1), TARGET.view(-1)),
    "nll in fp32": lambda z: F.nll_loss(F.log_softmax(z, -1, dtype=torch.float32), TARGET.view(-1)),
    "kl": lambda z: F.kl_div(z.log_softmax(-1), torch.full((B * S, V), 1 / V), reduction="sum"),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, torch.full((B * S, V), 0.5)),
    "mse": lambda z: F.mse_loss(z, torch.zeros(B * S, V)),
    "weights of another dtype": lambda z: F.cross_entropy(z, TARGET.view(-1), ROW.double()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", DTYPES_OF_LOSSES)
def test_losses_have_the_dtypes_of_torch(name, autocast, dtype):
    found = []
    for lazy in (False, True):
        z, x, weight, _ = lazy_example(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rows = (z if lazy else F.linear(x, weight)).view(-1, V)
            try:
                loss = DTYPES_OF_LOSSES[name](rows)
                loss.sum().backward()  # what torch refuses here, a fused loss refuses before
            except RuntimeError:
                found.append(RuntimeError)
            else:
                found.append((loss.dtype, loss.shape))
    assert found[0] == found[1]
