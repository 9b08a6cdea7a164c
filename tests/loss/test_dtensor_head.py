from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import processes
from support.numerics import assert_no_worse
from torch import nn

import fastft

ROWS, HIDDEN, CLASSES = 63, 16, 507  # no even number of classes: the shards differ


class Model(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.body, self.head = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, CLASSES, bias=bias)

    def forward(self, x):
        return self.body(x)

    def logits(self, x):
        return self.head(self.body(x))


def sharded(bias, classes_forward):
    """A model of which every part is an FSDP2 unit that reshards; the same weights each time."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    model = Model(bias)
    for part in (model.body, model.head):
        fully_shard(part, reshard_after_forward=True)
    fully_shard(model)
    if classes_forward:
        model.forward = model.logits
    return model


def data():
    """Of this process alone."""
    torch.manual_seed(100 + dist.get_rank())
    return torch.randn(ROWS, HIDDEN), torch.randint(0, CLASSES, (ROWS,)).masked_fill(
        torch.rand(ROWS) < 0.2, -100
    )


def gradients(model):
    assert all(p.grad.placements == p.placements for p in model.parameters())
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def truth(bias, loss):
    """The mean over the processes of the gradients of each one's data."""
    torch.manual_seed(1)
    model = Model(bias).double()
    x, target = data()
    loss(model, x.double(), target).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    return {name: p.grad / dist.get_world_size() for name, p in model.named_parameters()}


def check_fsdp2(loss, bias, micro_batches=1):
    """`loss(model, hidden states, target, weight, bias)` with the sharded head against the head's
    own forward."""
    stock, model = sharded(bias, True), sharded(bias, False)
    x, target = data()
    for _ in range(micro_batches):
        plain_loss(stock(x), target).backward()
        value = loss(model(x), model.head.weight, model.head.bias, target)
        value.backward()
    torch.testing.assert_close(value, plain_loss(stock(x), target))
    expected = truth(
        bias, lambda model, x, target: micro_batches * plain_loss(model.logits(x), target)
    )
    plain = gradients(stock)
    for name, gradient in gradients(model).items():
        assert_no_worse(gradient, plain[name], expected[name], name, terms=ROWS + HIDDEN + CLASSES)


def plain_loss(logits, target):
    return F.cross_entropy(logits, target)


def mean(x, weight, bias, target):
    return fastft.linear_cross_entropy(x, weight, target, linear_bias=bias)


def rows(x, weight, bias, target):
    return fastft.linear_cross_entropy(
        x, weight, target, linear_bias=bias, reduction="none"
    ).sum() / ((target != -100).sum())


def log_probs(x, weight, bias, target):
    values = fastft.linear_log_probs(x, weight, target, linear_bias=bias).log_probs
    return -values.sum() / (target != -100).sum()


def token_loss(x, weight, bias, target):
    total = fastft.linear_token_loss(
        x, weight, target, lambda token: -token.log_probs, linear_bias=bias
    )
    return total / (target != -100).sum()


def mesh():
    return torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))


def check_tensor_parallel(replicated_input, reduction, bias):
    """The same data everywhere; the head sharded by classes, which stays so where the input is a
    DTensor, although the shards are of two sizes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(2)
    x, target = torch.randn(3, 7, HIDDEN), torch.randint(-1, CLASSES, (3, 7))
    whole = [x, torch.randn(CLASSES, HIDDEN), torch.randn(CLASSES) if bias else None]
    parts = [None if t is None else distribute_tensor(t, mesh(), [Shard(0)]) for t in whole]
    parts[0] = distribute_tensor(x, mesh(), [Replicate()]) if replicated_input else x.clone()
    options = {"reduction": reduction, "ignore_index": -1}
    results = []
    for operands in (parts, whole, [None if t is None else t.double() for t in whole]):
        leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
        loss = fastft.linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], **options
        )
        loss.sum().backward()
        found = [leaf.grad for leaf in leaves if leaf is not None]
        assert all(
            hasattr(g, "placements") == hasattr(t, "placements")
            for g, t in zip(found, leaves, strict=False)
        )
        results.append(
            [loss.detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in found)]
        )
    for ours, plain, exact in zip(*results, strict=True):
        assert type(ours) is torch.Tensor
        assert_no_worse(ours, plain, exact, terms=21 + HIDDEN + CLASSES)


def check_nothing_is_gathered():
    """A head whose input is a DTensor stays in its shards."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def refuse(*args):
        raise AssertionError("gathered")

    x, weight = distribute_tensor(torch.randn(5, 3), mesh(), [Replicate()]), torch.randn(8, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.tensor.DTensor, "full_tensor", refuse)
        fastft.linear_cross_entropy(
            x, distribute_tensor(weight, mesh(), [Shard(0)]), torch.arange(5)
        )


def check_hybrid_mesh():
    """Replicated over one dimension and sharded over the other, as HSDP has it: the mean over
    both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    grid = init_device_mesh(
        "cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard")
    )
    x, target = data()
    torch.manual_seed(3)
    whole = torch.randn(CLASSES, HIDDEN)
    weight = distribute_tensor(whole, grid, [Replicate(), Shard(0)]).requires_grad_()
    fastft.linear_cross_entropy(x, weight, target).backward()
    exact = whole.requires_grad_()
    F.cross_entropy(F.linear(x, exact), target).backward()
    dist.all_reduce(exact.grad)
    torch.testing.assert_close(weight.grad.full_tensor(), exact.grad / dist.get_world_size())


def check_bad_input():
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    x, weight, target = torch.randn(6, 4), torch.randn(8, 4), torch.arange(6)
    shard, copy = (
        distribute_tensor(weight, mesh(), [placement]) for placement in (Shard(0), Replicate())
    )
    replicated, rows = (
        distribute_tensor(x, mesh(), [placement]) for placement in (Replicate(), Shard(0))
    )
    few = distribute_tensor(torch.randn(1, 4), mesh(), [Shard(0)])
    partial_sum = torch.distributed.tensor.DTensor.from_local(weight, mesh(), [Partial()])
    wrong = [
        (
            (x, shard, target),
            {"group": dist.group.WORLD},
            TypeError,
            "group goes with plain tensors.*to_local",
        ),
        (
            (x, weight, distribute_tensor(target, mesh(), [Replicate()])),
            {},
            TypeError,
            "target is a DTensor",
        ),
        (
            (replicated, weight, target),
            {},
            TypeError,
            "linear_weight must be a DTensor as input is",
        ),
        ((replicated, copy, target), {}, TypeError, "linear_weight has placements.*redistribute"),
        ((rows, shard, target), {}, TypeError, "input has placements.*redistribute"),
        (
            (x, partial_sum, target),
            {},
            TypeError,
            "linear_weight is a DTensor with placements.*redistribute",
        ),
        (
            (replicated, few, target),
            {},
            ValueError,
            "linear_weight has 1 classes for 2 processes, so that one has none",
        ),
    ]
    for operands, options, error, message in wrong:
        with pytest.raises(error, match=message):
            fastft.linear_cross_entropy(*operands, **options)
    with pytest.raises(TypeError, match="input must not be a DTensor"):
        fastft.linear_log_probs(replicated, shard, target)


CASES = {
    **{
        f"fsdp2_{f.__name__}": partial(check_fsdp2, f, False)
        for f in (mean, rows, log_probs, token_loss)
    },
    "fsdp2_bias": partial(check_fsdp2, mean, True),
    "fsdp2_micro_batches": partial(check_fsdp2, mean, False, 2),
    **{
        f"tensor_parallel_{kind}_{reduction}_{'bias' if bias else 'plain'}": partial(
            check_tensor_parallel, kind == "dtensor", reduction, bias
        )
        for kind in ("dtensor", "plain_input")
        for reduction in ("none", "mean")
        for bias in (False, True)
    },
    "nothing_is_gathered": check_nothing_is_gathered,
    "hybrid_mesh": check_hybrid_mesh,
    "bad_input": check_bad_input,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return processes.run(__name__, 2, tmp_path_factory)


@pytest.mark.parametrize("case", CASES)
def test_heads_that_are_dtensors(outcomes, case):
    assert not any(outcomes[case]), "\n".join(outcomes[case])
