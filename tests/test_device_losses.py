"""The losses where tensors are a device's: in `DeviceMode`, so that what only a GPU would do wrong shows here."""

from __future__ import annotations

import contextlib

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numerics import assert_no_common_factor
from support.device_mode import DeviceMode

import fastft

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
ANYWHERE = pytest.mark.parametrize("place", [DeviceMode, contextlib.nullcontext], ids=["device", "cpu"])


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Model(torch.nn.Module):
    """A head whose loss our kernel does not know: a shift of the logits changes no loss, but it is no softcap."""

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
    "into_grad": lambda x, head, y: fastft.linear_cross_entropy(x, head, y, accumulate_weight_grad=True),
    "of_shards": lambda x, head, y: fastft.linear_cross_entropy(x, head, y, group=dist.group.WORLD),
    "token_loss": lambda x, head, y: fastft.linear_token_loss(x, head, y, lambda t: -t.log_probs) / ROWS,
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
