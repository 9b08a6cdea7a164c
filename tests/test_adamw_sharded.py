"""FSDP2: the same bits as without sharding, random ones and the norm included."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TRAIN = """
import sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from fastft.optim.adamw import AdamW

dist.init_process_group("gloo")
mesh, results = init_device_mesh("cpu", (dist.get_world_size(),)), []
for options in ({}, {"rounding": "stochastic", "moments": "bf16", "seed": 3}, {"rounding": "kahan", "amsgrad": True}):
    for sharded in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 63), torch.nn.Linear(63, 5)).bfloat16()
        optimizer = AdamW(model.parameters(), lr=0.1, max_grad_norm=0.1, **options)
        if sharded:  # as accelerate does: the parameters change under an optimizer that exists
            fully_shard(model, mesh=mesh)
            optimizer.param_groups[0]["params"] = list(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 8).bfloat16()).float().square().mean().backward()
            optimizer.step()
        params = [param.full_tensor() if sharded else param for param in model.parameters()]
        results.append([optimizer.grad_norm, *(param.detach() for param in params)])
        if sharded:
            assert all(map(torch.equal, *results[-2:])), (options, results[-2:])
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_get_the_bits_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN],
            env={**os.environ, **address, "PYTHONPATH": paths, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
