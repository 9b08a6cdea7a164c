"""Runs the cases of a test module in several processes that talk through gloo: spawned once, all
cases in each."""

from __future__ import annotations

import importlib
import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from filelock import FileLock


def _work(rank, world, module, folder):
    torch.set_num_threads(1)
    rendezvous = {"init_method": f"file://{folder}/rendezvous", "timeout": timedelta(minutes=5)}
    dist.init_process_group("gloo", rank=rank, world_size=world, **rendezvous)
    outcomes = {}
    for name, case in importlib.import_module(module).CASES.items():
        torch.manual_seed(0)
        try:
            case()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
            break  # the others wait for this process, or are ahead of it
    torch.save(outcomes, f"{folder}/{rank}")
    dist.barrier() if all(text == "" for text in outcomes.values()) else None
    dist.destroy_process_group()


def run(module: str, world: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Of every case, what went wrong on each process ("": nothing), or that it was not reached.

    The cases run once, whichever of pytest's workers comes first.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{module} {world}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            torch.multiprocessing.spawn(_work, (world, module, str(folder)), nprocs=world)
    outcomes = [torch.load(folder / str(rank)) for rank in range(world)]
    cases = importlib.import_module(module).CASES
    return {name: [outcome.get(name, "not reached") for outcome in outcomes] for name in cases}
