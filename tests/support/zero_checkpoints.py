"""Two processes that train under the real DeepSpeed, and what their checkpoint stands for.

`made(folder, stage)` starts them; rank 0 leaves `truth.pt` in the folder beside DeepSpeed's own
`global_step3`: names, the fp32 weights after three steps and after a fourth, and its gradients.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
STEPS = 3


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 33), nn.Tanh(), nn.Linear(33, 5))


def made(folder: Path, stage: int) -> dict[str, Any]:
    """Trains, and lets DeepSpeed's own program write the states whole, in `whole`."""
    here = Path(__file__).resolve().parents[1]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # DeepSpeed compiles with the ninja beside this Python
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (here, here.parent)))
    two = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    _run([*two, __file__, str(folder), str(stage)], environment)
    whole = ["--input_folder", folder / f"global_step{STEPS}", "--output_folder", folder / "whole"]
    _run(["deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", *whole], environment)
    return torch.load(folder / "truth.pt", weights_only=True)


def _run(module: list[Any], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", *map(str, module)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _train(folder: Path, stage: int) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    deepspeed.init_distributed("gloo")
    trained = model()
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(trained.parameters(), **OPTIONS)
    engine, *_ = deepspeed.initialize(model=trained, optimizer=optimizer, config=config)
    draw = torch.Generator().manual_seed(engine.global_rank)
    truth: dict[str, Any] = {}
    for number in range(STEPS + 1):
        if number == STEPS:
            engine.save_checkpoint(str(folder))
            truth["weights"] = _of_all(trained, safe_get_full_fp32_param)
        engine.backward(engine(torch.randn(2, 70, generator=draw)).square().mean())
        if number == STEPS:
            truth["gradients"] = _of_all(trained, safe_get_full_grad)
        engine.step()
    truth["next"] = _of_all(trained, safe_get_full_fp32_param)
    if engine.global_rank == 0:
        torch.save(truth, folder / "truth.pt")


def _of_all(trained: nn.Module, read: Any) -> dict[str, torch.Tensor]:
    return {name: read(param).float().clone() for name, param in trained.named_parameters()}


if __name__ == "__main__":
    _train(Path(sys.argv[1]), int(sys.argv[2]))
