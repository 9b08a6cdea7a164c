"""Lazy logits against dense ones: values and gradients of x, W and b for every kind of use; what must stay lazy, does."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastft.loss import expressions
from fastft.loss.lazy_logits import LazyLogits, Report, lazy_linear
from fastft.loss.output_head import Attachment, fused_loss

B, S, V, H = 2, 9, 53, 16
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


def retained(z):
    z.retain_grad()
    loss = z.logsumexp(-1).sum()
    (g,) = torch.autograd.grad(loss, z, retain_graph=True) if not isinstance(z, LazyLogits) else (None,)
    return loss


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
    "ce module smoothed": lambda z: nn.CrossEntropyLoss(label_smoothing=0.1)(z.view(-1, V), IGNORED.view(-1)),
    "ce int32": lambda z: F.cross_entropy(z.view(-1, V), TARGET.view(-1).to(torch.uint8)),
    "ce keywords": lambda z: F.cross_entropy(input=z.view(-1, V), target=TARGET.view(-1)),
    "ce softcap": lambda z: F.cross_entropy((torch.tanh(z / 5) * 5).view(-1, V), TARGET.view(-1)),
    "ce scale": lambda z: F.cross_entropy((z * 0.3).float().view(-1, V), TARGET.view(-1)),
    "ce tensor scale": lambda z: F.cross_entropy((z / torch.tensor(2.0)).view(-1, V), TARGET.view(-1)),
    "ce mask": lambda z: F.cross_entropy(z[MASK], TARGET[MASK]),
    "ce nested": lambda z: F.cross_entropy(z.view(-1, V).float()[MASK.view(-1)], TARGET[MASK]),
    "ce row": lambda z: F.cross_entropy((z + ROW).view(-1, V), TARGET.view(-1)),
    "ce row of batch": lambda z: F.cross_entropy((z + ROW.view(1, 1, V)).view(-1, V), TARGET.view(-1)),
    "ce float64": lambda z: F.cross_entropy(z.double().view(-1, V), TARGET.view(-1)),
    "ce all slice": lambda z: F.cross_entropy(z[..., :V].view(-1, V), TARGET.view(-1)),
    "nll": lambda z: F.nll_loss(F.log_softmax(z, -1).view(-1, V), IGNORED.view(-1)),
    "nll none": lambda z: F.nll_loss(z.log_softmax(-1).view(-1, V), TARGET.view(-1), reduction="none").pow(2).sum(),
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
    "in place same object": lambda z: z.clone().mul_(2).logsumexp(-1).sum(),
    "no grad then grad": without_history,
    "checkpoint": lambda z: checkpoint(lambda q: q.logsumexp(-1).sum(), z, use_reentrant=False),
    "trained bias": lambda z: (z + BIAS).logsumexp(-1).pow(2).sum(),
}
MATERIALISED = {
    "same object in place": same_object_in_place,
    "alias in place": alias_in_place,
    "part in place": part_in_place,
    "copy before in place": copy_before_in_place,
    "item set": item_set,
    "in place by tokens": lambda z: (z * 1).mul_(NOISE).sum(),
    "hook": hooked,
    "hook after view": hooked_view,
    "read before": read_before,
    "function": lambda z: DoubledGradient.apply(z).sum(),
    "function after softcap": lambda z: DoubledGradient.apply(torch.tanh(z / 5) * 5).sum(),
    "ce transposed": lambda z: F.cross_entropy(z.transpose(1, 2), TARGET),
    "ce weights": lambda z: F.cross_entropy(z.view(-1, V), TARGET.view(-1), weight=ROW),
    "ce soft": lambda z: F.cross_entropy(z.view(-1, V), NOISE.view(-1, V).softmax(-1)),
    "ce cut": lambda z: F.cross_entropy(z[..., :40].reshape(-1, 40), TARGET.clamp(max=39).view(-1)),
    "ce trained scale": lambda z: F.cross_entropy((z * SCALE).view(-1, V), TARGET.view(-1)),
    "token scale": lambda z: (z * TOKEN_SCALE).logsumexp(-1).sum(),
    "where": lambda z: torch.where(ROW < 5, z, torch.tensor(-1e9)).logsumexp(-1).sum(),
    "masked_fill": lambda z: z.masked_fill(ROW > 4.9, -1e9).logsumexp(-1).sum(),
    "z minus lse": lambda z: (z - z.logsumexp(-1, keepdim=True)).gather(-1, TARGET.unsqueeze(-1)).sum(),
    "kl": lambda z: F.kl_div(F.log_softmax(z, -1), NOISE.softmax(-1), reduction="batchmean"),
    "kl to detached": lambda z: F.kl_div(z.log_softmax(-1), (z.detach() * 0.5).softmax(-1), reduction="sum"),
    "mse": lambda z: F.mse_loss(z, NOISE),
    "topk": lambda z: z.topk(5, -1).values.sum(),
    "max": lambda z: z.max(-1).values.sum(),
    "sum all": lambda z: z.sum(),
    "sum of rows": lambda z: z.sum((0, 1)).pow(2).sum(),
    "lse of rows": lambda z: z.logsumexp(0).sum(),
    "norm": lambda z: z.norm(),
    "cat": lambda z: torch.cat([z, z * 2]).logsumexp(-1).sum(),
    "split vocabulary": lambda z: z.split(20, -1)[1].sum(),
    "index vocabulary": lambda z: z[..., INDEX].sum() + z[0, 1, 2] + z[..., -1].sum(),
    "take_along": lambda z: torch.take_along_dim(z, TARGET.unsqueeze(-1), -1).sum(),
    "matmul": lambda z: (z.softmax(-1) @ ROW.unsqueeze(-1)).sum(),
    "einsum": lambda z: torch.einsum("bsv,v->bs", z, ROW).sum(),
    "linear": lambda z: F.linear(z, torch.ones(3, V)).pow(2).sum(),
    "layer_norm": lambda z: F.layer_norm(z, (V,)).pow(3).sum(),
    "roll": lambda z: z.roll(1, 1).logsumexp(-1).pow(2).sum(),
    "expand": lambda z: z[:, :, None].expand(-1, -1, 2, -1).logsumexp(-1).sum(),
    "vmap": lambda z: torch.vmap(lambda row: row.logsumexp(-1))(z.reshape(-1, V)).sum(),
    "pad": lambda z: F.pad(z, (0, 1)).logsumexp(-1).sum(),
    "isnan": lambda z: z.isnan().float().sum() + z.sum(),
    "checkpoint reentrant": lambda z: checkpoint(lambda q: q.logsumexp(-1).sum() * 1, z, use_reentrant=True),
}
BIAS = torch.linspace(-1, 1, V).requires_grad_()
SCALE = torch.tensor(1.3, requires_grad=True)


def run(use, lazy: bool, dtype=torch.float32):
    """The value and the gradients of x, W, b and of what the use itself trains."""
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((B, S, H), (V, H), (V,)))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    BIAS.grad = SCALE.grad = None
    report = Report()
    hidden = x * 1.0
    z = lazy_linear(hidden, weight, bias, report) if lazy else F.linear(hidden, weight, bias)
    value = use(z)
    value.double().backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (*leaves, BIAS, SCALE)]
    return value.detach(), grads, report


@pytest.mark.parametrize("name", [*LAZY, *MATERIALISED])
def test_as_dense(name, monkeypatch):
    monkeypatch.setattr(expressions, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(expressions, "MIN_CHUNK_ROWS", 4)
    use = LAZY.get(name) or MATERIALISED[name]
    (expected, expected_grads, _), (actual, grads, report) = run(use, False), run(use, True)
    assert actual.dtype == expected.dtype and type(actual) is Tensor
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for what, mine, theirs in zip(("x", "W", "b", "BIAS", "SCALE"), grads, expected_grads, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(
            mine, theirs, rtol=1e-5, atol=2e-6 * max(scale, 1), msg=lambda m, w=what: f"{w}: {m}"
        )
    assert bool(report.materialised) == (name in MATERIALISED), report
