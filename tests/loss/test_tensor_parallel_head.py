"""Output heads whose classes a tensor-parallel plan spreads over processes: lazy logits of each
process's own classes, against a whole head in plain torch."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import processes
from support.numerics import assert_no_worse
from torch import nn

import fastft

ROWS, HIDDEN = 21, 16
CLASSES = {"even": 96, "uneven": 211}  # of 2 and 3 processes


class Model(nn.Module):
    def __init__(self, classes, bias):
        super().__init__()
        self.body, self.head = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, classes, bias=bias)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(self.body(x))


class Tied(Model):
    """Its head has the weight of an embedding, whose output it gets."""

    def __init__(self, classes, bias):
        super().__init__(classes, bias)
        self.body = nn.Embedding(classes, HIDDEN)
        self.head.weight = self.body.weight


def mesh():
    return torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))


def of_transformers(model):
    tensor_parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    names = [f"head.{name}" for name, _ in model.head.named_parameters()]
    plan = dict.fromkeys([*names, "head"], "colwise_gather_output")
    return tensor_parallel.apply_tensor_parallelism(model, mesh(), plan)


def of_torch(model, **layouts):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    style = ColwiseParallel(**{"output_layouts": Replicate(), **layouts})
    return parallelize_module(model, mesh(), {"head": style})


PLANS = {"transformers": of_transformers, "torch": of_torch}


def tied(model):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    # an embedding's weight is cut by rows then, as the head's is
    style = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    model = of_torch(parallelize_module(model, mesh(), {"body": style}))
    assert model.body.weight.placements == model.head.weight.placements == (Shard(0),)
    model.head.weight = model.body.weight
    return model


def log_probs(logits, target):
    rows = logits.float().log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return -(rows * (target >= 0)).sum()


def entropy(logits, target):
    scaled = (logits / 0.7).log_softmax(-1)
    return (scaled.exp() * scaled).sum(-1).mean() + F.cross_entropy(
        logits.flatten(0, 1), target.flatten()
    )


def softcapped(logits, target):
    return F.cross_entropy((5 * torch.tanh(logits / 5)).flatten(0, 1), target.flatten())


def without_products(logits, target):
    """What a whole head computes without logits must not take a shard for all classes."""
    picked = logits.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    rows = logits.logsumexp(-1) - picked + logits.max(-1).values + logits.sum(-1).square()
    return rows.mean() + logits.mean()


def of_probabilities(logits, target):
    wanted = F.one_hot(target.clamp(min=0), logits.shape[-1]).to(logits.dtype).flatten(0, 1)
    return F.cross_entropy(logits.flatten(0, 1), 0.9 * wanted + 0.1 / logits.shape[-1])


def unknown(logits, target):
    """Of which no rule knows: real logits are built."""
    return logits.cumsum(-1).square().mean()


LOSSES = {
    **{
        f"cross_entropy_{name}": lambda z, t, o=options: F.cross_entropy(
            z.flatten(0, 1), t.flatten(), **o
        )
        for name, options in {
            "mean": {},
            "sum": {"reduction": "sum"},
            "smoothing": {"label_smoothing": 0.1},
        }.items()
    },
    **{f.__name__: f for f in (log_probs, entropy, softcapped, without_products)},
    **{f.__name__: f for f in (of_probabilities, unknown)},
}
MATERIALISED = {"of_probabilities", "unknown"}


def data(kind, classes):
    torch.manual_seed(2)
    rows = torch.randint(0, classes, (3, 7)) if kind is Tied else torch.randn(3, 7, HIDDEN)
    return rows, torch.randint(0, classes, (3, 7)).masked_fill(torch.rand(3, 7) < 0.2, -100)


def found(model, loss, x, target, context):
    """The loss and all gradients, whole."""
    with context as report:
        value = loss(model(x), target)
        value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}
    return {"loss": value.detach(), **whole}, report


def check(plan, loss, classes, bias=False, kind=Model):
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        made.append(kind(classes, bias))
    whole, planned = made[0], plan(made[1])
    x, target = data(kind, classes)
    ours, report = found(planned.train(), LOSSES[loss], x, target, fastft.fused_loss(planned))
    plain, _ = found(whole, LOSSES[loss], x, target, contextlib.nullcontext())
    whole.zero_grad()
    exact_x = x if kind is Tied else x.double()
    exact, _ = found(whole.double(), LOSSES[loss], exact_x, target, contextlib.nullcontext())
    assert not report.skipped and bool(report.materialised) == (loss in MATERIALISED), report
    for name, value in ours.items():
        assert_no_worse(value, plain[name], exact[name], name, terms=ROWS + HIDDEN + classes)
    for value in ours.values():  # the same on every process, to the bit
        everywhere = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, value.contiguous())
        assert all(torch.equal(other, value) for other in everywhere)


def check_two_heads(plan, teachers_plan):
    """The divergence of a student from its teacher, whose head is spread or whole."""
    results, x = [], data(Model, 211)[0]
    for spread in (False, True):
        torch.manual_seed(1)
        student, teacher = Model(211, True), Model(211, False).eval()
        if spread:
            student, teacher = plan(student), teachers_plan(teacher)
        context = fastft.fused_loss(student, teacher) if spread else contextlib.nullcontext()
        with context as report:
            z = student.train()(x)
            with torch.no_grad():
                t = teacher(x)
            mixed = torch.stack([z.log_softmax(-1), t.log_softmax(-1)]).logsumexp(0)
            loss = (t.softmax(-1) * (t - z)).sum() + mixed.sum() + z.max(-1).values.sum()
            loss.backward()
        assert report is None or not (report.materialised or report.skipped), report
        gradients = [parameter.grad for parameter in student.parameters()]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
        results.append([loss.detach(), *whole])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-4)


def check_sequence_parallel():
    """Hidden states that come cut along the sequence are put together by the plan, and their
    gradient is cut again."""
    from torch.distributed.tensor import Shard

    results = []
    for fused in (False, True):
        torch.manual_seed(1)
        model = of_torch(Model(211, False), input_layouts=Shard(1)).train()
        torch.manual_seed(2)
        world, rank = dist.get_world_size(), dist.get_rank()
        x, target = torch.randn(3, 4 * world, HIDDEN), torch.randint(0, 211, (3, 4 * world))
        part = x[:, 4 * rank : 4 * rank + 4].clone().requires_grad_()
        with fastft.fused_loss(model) if fused else contextlib.nullcontext() as report:
            loss = F.cross_entropy(model(part).flatten(0, 1), target.flatten())
            loss.backward()
        gradients = part.grad, model.head.weight.grad.full_tensor()
        results.append((loss.detach(), *gradients))
    assert report.fused == 1
    for stock, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-7)


def check_no_logits(plan):
    """Only numbers of rows are sent, and nobody holds a row of all classes."""
    from support.watch import Watch

    model = plan(Model(997, False)).train()
    x, target = data(Model, 997)
    with fastft.fused_loss(model), Watch() as watch:
        F.cross_entropy(model(x).flatten(0, 1), target.flatten()).backward()
    largest = 997 // dist.get_world_size() + 1
    assert watch.elements <= max(ROWS, HIDDEN) * largest


def check_taken_off(plan):
    """Evaluation is stock, and the plan's own forward is back at the end."""
    model = plan(Model(96, False)).train()
    before, x = dict(vars(model.head)), data(Model, 96)[0]
    expected = model(x)
    with fastft.fused_loss(model) as report:
        assert type(model(x)) is not torch.Tensor
        with torch.no_grad():
            assert type(model(x)) is torch.Tensor
        model.eval()
        assert type(model(x)) is torch.Tensor and not report.skipped
        model.train()
    assert vars(model.head).keys() == before.keys()
    assert vars(model.head).get("forward") is before.get("forward")
    torch.testing.assert_close(model(x), expected)


def check_other_plans():
    """A plan whose head returns a part of the logits is left alone, with a sentence."""
    from torch.distributed.tensor import Replicate, Shard

    for layouts in (
        {"output_layouts": Shard(-1)},
        {"output_layouts": Shard(-1), "use_local_output": False},
        {"output_layouts": Replicate(), "use_local_output": False},
    ):
        model = of_torch(Model(96, False), **layouts).train()
        with fastft.fused_loss(model) as report:
            assert "LazyLogits" not in type(model(data(Model, 96)[0])).__name__
        assert "is tensor-parallel, and its plan is neither" in report.skipped[0]


def check_log_probs():
    """`linear_log_probs` takes such a head, which it gathers."""
    model = of_torch(Model(211, False))
    x, target = data(Model, 211)
    whole = model.head.weight.full_tensor().detach().requires_grad_()
    for weight in (model.head.weight, whole):
        loss = -fastft.linear_log_probs(x, weight, target).log_probs.sum()
        loss.backward()
    torch.testing.assert_close(model.head.weight.grad.full_tensor(), whole.grad)


CASES = {
    **{
        f"{plan}_{loss}_{size}": partial(check, PLANS[plan], loss, classes)
        for plan in PLANS
        for loss in LOSSES
        for size, classes in CLASSES.items()
    },
    **{f"{plan}_bias": partial(check, PLANS[plan], "log_probs", 211, True) for plan in PLANS},
    **{
        f"tied_{loss}": partial(check, tied, loss, 211, kind=Tied)
        for loss in ("cross_entropy_mean", "log_probs")
    },
    **{
        f"{plan}_teacher_{name}": partial(check_two_heads, PLANS[plan], teachers_plan)
        for plan in PLANS
        for name, teachers_plan in {"spread": PLANS[plan], "whole": lambda model: model}.items()
    },
    "sequence_parallel": check_sequence_parallel,
    **{f"{plan}_no_logits": partial(check_no_logits, PLANS[plan]) for plan in PLANS},
    **{f"{plan}_taken_off": partial(check_taken_off, PLANS[plan]) for plan in PLANS},
    "other_plans": check_other_plans,
    "log_probs": check_log_probs,
}


@pytest.mark.way("tensor parallel", loss="exact")
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_a_head_spread_by_a_plan(case, world, tmp_path_factory):
    outcomes = processes.run(__name__, world, tmp_path_factory)
    assert not any(outcomes[case]), "\n".join(outcomes[case])
