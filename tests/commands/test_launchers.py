"""`python -m fastft run` behind a launcher: every process trains with fastft, the first one alone
speaks and writes, and the losses are those of the script without it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]

SCRIPT = """
import json, os, sys, torch
from support.trainers import logged, quiet_arguments, tiny_llama
from transformers import Trainer

rows = [{"input_ids": row, "labels": row} for row in torch.arange(97 * 9).remainder(97).view(97, 9)]
arguments = quiet_arguments("out", max_steps=3, learning_rate=1e-2, ddp_backend="gloo")
trainer = Trainer(tiny_llama(), arguments, train_dataset=rows)
trainer.train()
rank = os.environ.get("RANK", "0")
outcome = [sys.argv[2:], arguments.world_size, logged(trainer, "loss", "grad_norm")]
with open(f"{sys.argv[1]}{rank}.json", "w") as file:
    json.dump(outcome, file)
torch.distributed.destroy_process_group()  # else gloo aborts now and then, when Python ends
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
# with --cpu it starts one process; so it is the script's arguments that say "CPU"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
ACCELERATE += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--main_process_port", "0"]
LAUNCHERS = {"torchrun": TORCHRUN, "accelerate launch": ACCELERATE}


def launched(folder, *line):
    (folder / "script.py").write_text(SCRIPT)
    tests, package = Path(__file__).parents[1], Path(__file__).parents[2]
    folders = os.pathsep.join([str(package), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": folders, "MASTER_PORT": "0"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_every_process_trains_as_without(tmp_path, launcher):
    launched(tmp_path, *launcher, "script.py", "stock", "--more")
    options = ["run", "--report", "report.json", "script.py", "fast", "--more"]
    said = launched(tmp_path, *launcher, "-m", "fastft", *options)
    for rank in range(2):
        stock, fast = (
            json.loads((tmp_path / f"{name}{rank}.json").read_text()) for name in ("stock", "fast")
        )
        assert fast[:2] == stock[:2] == [["--more"], 2]
        assert fast[2] == pytest.approx(stock[2], rel=2e-5)
    assert said.count("fastft: loss: fused") == 1
    (training,) = json.loads((tmp_path / "report.json").read_text())["trainings"]
    assert training["report"]["fused"] == 3


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no deepspeed")
def test_deepspeed_s_launcher_gives_the_script_its_rank(tmp_path):
    (tmp_path / "probe.py").write_text("import os, sys; print(sys.argv, os.environ['RANK'])")
    launch = [sys.executable, "-m", "deepspeed.launcher.launch", "--world_info"]
    launch += ["eyJsb2NhbGhvc3QiOiBbMCwgMV19"]  # {"localhost": [0, 1]}
    launch += ["--module", "--master_port", "29511", "fastft", "run", "probe.py", "--more"]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True)
    for rank in "01":
        assert f"['probe.py', '--local_rank={rank}', '--more'] {rank}\n" in done.stdout, done.stderr
