"""TRL's fused head on two processes: the gradients of plain logits, through DDP and FSDP2."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.trainers import tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastft.loss.lazy.output_head import fused_loss

pytest.importorskip("trl", minversion="1.16")
from support.trl_trainers import put_plain_head
from trl.trainer.utils import add_fused_lm_head

PROCESSES, V = 2, 53
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}


def with_head(plain):
    model = tiny_llama(V, **SIZES)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    if plain:
        put_plain_head(model, 0.7)
    return model


def sharded(plain, head_alone):
    """The head is a unit of its own, or one of the last, which is not sharded again."""
    model = with_head(plain)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in [*model.model.layers, *([model.lm_head] if head_alone else [])]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def step(model, report=None):
    """Log-probabilities of a policy and of itself as a reference, and the gradients."""
    draw = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(3, V, (2, 12), generator=draw)
    labels = ids.masked_fill(torch.rand(2, 12, generator=draw) < 0.3, -100)
    with torch.no_grad():
        reference = model(input_ids=ids, labels=labels, fused_lm_head=True)
    policy = model(input_ids=ids, labels=labels, fused_lm_head=True)
    (policy.log_probs * (1 + policy.entropy)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in gradients]
    return [reference.log_probs, policy.log_probs.detach(), policy.entropy.detach(), *whole]


def check(make):
    expected, model = step(make(True)), make(False)
    with fused_loss(model) as report:
        actual = step(model)
    assert report.fused == 2 and not report.skipped and not report.materialised
    assert len(expected) == len(actual) > 10
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


CASES = {
    "DDP": lambda: check(lambda plain: DistributedDataParallel(with_head(plain))),
    "FSDP2": lambda: check(lambda plain: sharded(plain, head_alone=False)),
    "FSDP2, the head alone": lambda: check(lambda plain: sharded(plain, head_alone=True)),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return processes.run(__name__, PROCESSES, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_on_two_processes(outcomes, name):
    assert outcomes[name] == [""] * PROCESSES
