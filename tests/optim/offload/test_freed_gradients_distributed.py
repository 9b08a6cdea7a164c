"""Gradients that backward frees, on two processes with gloo; and under DDP of one."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from support import freed_gradients, processes
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return processes.run("support.freed_gradients", 2, tmp_path_factory)


WAYS = {
    "FSDP2, clipped": pytest.mark.way("FSDP2, gradients on the host", optimizer="exact"),
    "FSDP2, accumulation": pytest.mark.way("FSDP2, gradients on the host", optimizer="exact"),
    "DDP": pytest.mark.way("DDP, gradients on the host", optimizer="refused"),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=WAYS.get(case, ())) for case in freed_gradients.CASES],
)
def test_two_processes(case, outcomes):
    assert outcomes[case] == ["", ""], "\n".join(outcomes[case])


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/here")
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("options", [{"offload": "gradients"}, {"release_gradients": True}])
def test_ddp_of_one_process(one_process, options, views):
    def wrap(module):
        return DistributedDataParallel(module, gradient_as_bucket_view=views)

    freed_gradients.refused("DistributedDataParallel", wrap, **options)
