"""Cases on two processes, of gradients that backward frees: FSDP2 trains as the resident optimizer
does, to the bit, and what reduces gradients later is refused before a weight changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastft.foreign.tensors import local
from fastft.optim.adamw import AdamW
from fastft.optim.offload.absent import AbsentGradient


def build() -> nn.Sequential:
    """Odd sizes: neither the 7 nor the single row is a multiple of two ranks."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 1)]
    return nn.Sequential(*layers).bfloat16()


def loss_of(model: nn.Module, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return model(torch.randn(4, 5, generator=generator).bfloat16()).square().sum()


def train_sharded(micro: int, synchronized: bool = True, **options: Any) -> list[torch.Tensor]:
    """This rank's weights, states and norms; the optimizer is made before the model is sharded, and
    gets its new parameters as accelerate gives them."""
    model = build()
    optimizer = AdamW(model.parameters(), lr=1e-2, **options)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    norms = []
    for step in range(4):
        for number in range(micro):
            assert isinstance(model, FSDPModule)
            model.set_requires_gradient_sync(synchronized or number == micro - 1)
            loss_of(model, step * micro + number).backward()
        if step and (options.get("offload") or options.get("release_gradients")):
            gradients = [local(param.grad) for param in model.parameters()]
            assert all(isinstance(gradient, AbsentGradient) for gradient in gradients)
        optimizer.step()
        norms.append(optimizer.grad_norm)
        model.zero_grad()
    params = list(model.parameters())
    states = [local(entry) for p in params for entry in optimizer.state[p].values()]
    return [*(local(param.detach()) for param in params), *states, *filter(_is_there, norms)]


def _is_there(norm: Any) -> bool:
    return norm is not None


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


def fsdp2_clipped() -> None:
    clipped = {"max_grad_norm": 0.1, "moments": "8bit", "seed": 3}
    assert_same(train_sharded(1, offload="gradients", **clipped), train_sharded(1, **clipped))


def fsdp2_accumulation() -> None:
    clipped = {"max_grad_norm": 0.1}
    assert_same(train_sharded(3, offload="gradients", **clipped), train_sharded(3, **clipped))


def fsdp2_accumulation_before_the_reduction() -> None:
    clipped = {"max_grad_norm": 0.1, "synchronized": False}
    assert_same(train_sharded(3, offload="gradients", **clipped), train_sharded(3, **clipped))


def fsdp2_released() -> None:
    assert_same(train_sharded(1, release_gradients=True), train_sharded(1))


def refused(sentence: str, wrap: Any, **options: Any) -> None:
    """The first backward pass, or the step, raises, and no weight has changed."""
    module = build()
    before = [param.detach().clone() for param in module.parameters()]
    optimizer = AdamW(module.parameters(), lr=1e-2, **options)
    model = wrap(module)
    try:
        loss_of(model, 0).backward()
        optimizer.step()
    except RuntimeError as error:
        assert sentence in str(error), error
    else:
        raise AssertionError("nobody complained")
    assert_same([local(param.detach()) for param in module.parameters()], before)


def ddp_on_the_host() -> None:
    refused("under DistributedDataParallel", DistributedDataParallel, offload="gradients")


def ddp_released() -> None:
    refused("under DistributedDataParallel", DistributedDataParallel, release_gradients=True)


def alone(module: nn.Module) -> nn.Module:
    return module


def averaged_by_hand() -> None:
    refused("in several processes only FSDP2", alone, offload="gradients")


def hsdp() -> None:
    def shard(module: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        return fully_shard(module, mesh=mesh)

    model = shard(build())
    optimizer = AdamW(model.parameters(), lr=1e-2, offload="gradients")
    try:
        loss_of(model, 0).backward()
    except RuntimeError as error:
        assert "HSDP" in str(error), error
    else:
        raise AssertionError("nobody complained")
    del optimizer


CASES = {
    "FSDP2, clipped": fsdp2_clipped,
    "FSDP2, accumulation": fsdp2_accumulation,
    "FSDP2, accumulation before the reduction": fsdp2_accumulation_before_the_reduction,
    "FSDP2, released": fsdp2_released,
    "gradients averaged by hand": averaged_by_hand,
    "HSDP": hsdp,
    "DDP": ddp_on_the_host,
    "DDP, released": ddp_released,
}
