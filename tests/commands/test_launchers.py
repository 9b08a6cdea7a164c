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
import torch
import torch.distributed as dist
from support.peers import free_port

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
# on a busy machine gloo's threads end a process that has left its group, stock's too
ABORTED = "terminate called without an active exception"
LAUNCHERS = {"torchrun": TORCHRUN, "accelerate launch": ACCELERATE}


def launched(folder, *line, **variables):
    tests, package = Path(__file__).parents[1], Path(__file__).parents[2]
    folders = os.pathsep.join([str(package), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": folders, "MASTER_PORT": "0", **variables}
    # DeepSpeed compiles with the ninja beside this Python
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    for _ in range(3):
        done = subprocess.run(
            line, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
        )
        if done.returncode == 0 or ABORTED not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(
            line, id=name, marks=pytest.mark.way(f"`{name}`", loss="exact", optimizer="exact")
        )
        for name, line in LAUNCHERS.items()
    ],
)
def test_every_process_trains_as_without(tmp_path, launcher):
    train_as_without(tmp_path, launcher)


def train_as_without(folder, launcher, **variables):
    """Runs the script on two processes without and with fastft, and compares what each has
    logged."""
    (folder / "script.py").write_text(SCRIPT)
    launched(folder, *launcher, "script.py", "stock", "--more", **variables)
    options = ["run", "--report", "report.json", "script.py", "fast", "--more"]
    said = launched(folder, *launcher, "-m", "fastft", *options, **variables)
    for rank in range(2):
        stock, fast = (
            json.loads((folder / f"{name}{rank}.json").read_text()) for name in ("stock", "fast")
        )
        assert fast[:2] == stock[:2] == [["--more"], 2]
        assert fast[2] == pytest.approx(stock[2], rel=2e-5)
    assert said.count("fastft: loss: fused") == 1 and "have not been joined" not in said
    (training,) = json.loads((folder / "report.json").read_text())["trainings"]
    assert training["report"]["fused"] == 3


# starts processes as Open MPI's does, on this machine: accelerate launches several for CPUs with it
MPIRUN = f"""#!{sys.executable}
import os, subprocess, sys

if "--version" in sys.argv:
    sys.exit(print("mpirun (Open MPI) 5.0"))
count, line = sys.argv[sys.argv.index("-n") + 1], sys.argv[sys.argv.index("--bind-to") + 2 :]
started = []
for rank in map(str, range(int(count))):
    size = {{f"OMPI_COMM_WORLD_{{name}}": count for name in ("SIZE", "LOCAL_SIZE")}}
    place = {{f"OMPI_COMM_WORLD_{{name}}": rank for name in ("RANK", "LOCAL_RANK")}}
    started.append(subprocess.Popen(line, env={{**os.environ, **size, **place}}))
sys.exit(max(abs(process.wait()) for process in started))
"""


@pytest.mark.way("`accelerate launch`", loss="exact", optimizer="exact")
def test_processes_on_cpus_as_a_configuration_of_accelerate_has_them(tmp_path):
    config = {
        **ANY_CONFIG,
        "distributed_type": "MULTI_CPU",
        "use_cpu": True,
        "mpirun_config": {"mpirun_hostfile": "hosts", "mpirun_ccl": "1"},
        "main_process_port": free_port(),
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    mpirun = tmp_path / "programs" / "mpirun"
    mpirun.parent.mkdir()
    mpirun.write_text(MPIRUN)
    mpirun.chmod(0o755)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config.yaml"]
    path = os.pathsep.join([str(mpirun.parent), os.environ["PATH"]])
    train_as_without(tmp_path, launch, PATH=path)


ALONE = {
    "Trainer": """
import torch
from support.trainers import quiet_arguments, tiny_llama
from transformers import Trainer

rows = [{"input_ids": row, "labels": row} for row in torch.arange(97 * 9).remainder(97).view(97, 9)]
arguments = quiet_arguments("out", max_steps=1, use_cpu=False)
trainer = Trainer(tiny_llama(), arguments, train_dataset=rows)
trainer.train()
assert arguments.world_size == 1
""",
    "Accelerator": """
import torch
from accelerate import Accelerator
from support.trainers import tiny_llama

model = tiny_llama()
accelerator = Accelerator()
accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
assert accelerator.num_processes == 1
""",
}


@pytest.mark.skipif(
    torch.accelerator.is_available(), reason="a GPU, for which processes are joined"
)
@pytest.mark.parametrize("kind", ALONE)
def test_processes_that_nobody_has_joined_are_told_once(tmp_path, kind):
    (tmp_path / "script.py").write_text(ALONE[kind])
    said = launched(tmp_path, *TORCHRUN, "-m", "fastft", "run", "script.py")
    assert said.count("A launcher has started 2 processes (WORLD_SIZE)") == 1


# what `accelerate config` writes, by the engine that it names
ANY_CONFIG = {
    "compute_environment": "LOCAL_MACHINE",
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "main_process_port": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "use_cpu": False,
}
FSDP = {
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "fsdp_cpu_ram_efficient_loading": False,
    "fsdp_sync_module_states": False,
}
CONFIGS = {
    "MULTI_GPU": {"distributed_type": "MULTI_GPU"},
    "FSDP1": {
        "distributed_type": "FSDP",
        "fsdp_config": {**FSDP, "fsdp_version": 1, "fsdp_sharding_strategy": "FULL_SHARD"},
    },
    "FSDP2": {
        "distributed_type": "FSDP",
        "fsdp_config": {**FSDP, "fsdp_version": 2, "fsdp_reshard_after_forward": True},
    },
    "ZeRO-3": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "zero_stage": 3,
            "gradient_accumulation_steps": 1,
            "offload_optimizer_device": "none",
            "offload_param_device": "none",
            "zero3_init_flag": True,
            "zero3_save_16bit_model": True,
        },
    },
}
# ENGINE is one of tests/support/engines.py, or what the launcher has said
UNDER_AN_ENGINE = """
import json, os, sys, torch
from support import engines
from support.trainers import logged, quiet_arguments
from transformers import Trainer

engines.real_engines()
given = os.environ["ENGINE"]
how = {"use_cpu": True, "ddp_backend": "gloo"} if given == "DDP" else {"use_cpu": False}
if given.startswith("ZeRO"):
    how["deepspeed"] = engines.deepspeed(given)
arguments = quiet_arguments("out", max_steps=3, per_device_train_batch_size=2, **how)
trainer = Trainer(engines.model(given), arguments, train_dataset=engines.examples())
trainer.train()
parameter = next(trainer.model_wrapped.parameters())
inner = trainer.optimizer
while hasattr(inner, "optimizer"):
    inner = inner.optimizer
classes = [type(trainer.model_wrapped).__name__, type(parameter).__name__, type(inner).__module__]
outcome = [classes, arguments.world_size, logged(trainer, "loss", "grad_norm")]
with open(f"{sys.argv[-1]}{os.environ['RANK']}.json", "w") as file:
    json.dump(outcome, file)
torch.distributed.destroy_process_group()
"""
SEEN = {"MULTI_GPU": "DistributedDataParallel", "FSDP1": "FullyShardedDataParallel"}
SEEN |= {"FSDP2": "FSDPLlamaForCausalLM", "ZeRO-3": "DeepSpeedEngine"}


def trained_under(folder, engine, stock, fast):
    """Runs both command lines, and compares what all processes have logged."""
    (folder / "script.py").write_text(UNDER_AN_ENGINE)
    environment = {"ENGINE": engine, "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    launched(folder, *stock, "stock", **environment)
    said = launched(folder, *fast, "fast", **environment)
    assert said.count("fastft: loss: fused") == 1, said
    for rank in range(2):
        of_stock, of_fast = (
            json.loads((folder / f"{name}{rank}.json").read_text()) for name in ("stock", "fast")
        )
        assert of_fast[1] == of_stock[1] == 2
        assert of_fast[0][:2] == of_stock[0][:2]
        assert of_stock[0][2].startswith("torch.optim")
        assert of_fast[0][2] == "fastft.optim.adamw"
        assert of_fast[2] == pytest.approx(of_stock[2], rel=2e-5) and len(of_fast[2]) == 6
    return of_fast[0][0]


@pytest.mark.way("`accelerate launch`", loss="exact", optimizer="exact")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_accelerate_launch(tmp_path, name):
    if name.startswith("ZeRO"):
        pytest.importorskip("deepspeed")
    (tmp_path / "config.yaml").write_text(json.dumps({**ANY_CONFIG, **CONFIGS[name]}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config.yaml"]
    stock = [*launch, "script.py"]
    fast = [*launch, "-m", "fastft", "run", "script.py"]
    engine = "DDP" if name == "MULTI_GPU" else "of the launcher"
    assert trained_under(tmp_path, engine, stock, fast) == SEEN[name]


def deepspeed_launcher(port):
    launch = [sys.executable, "-m", "deepspeed.launcher.launch", "--world_info"]
    launch += ["eyJsb2NhbGhvc3QiOiBbMCwgMV19"]  # {"localhost": [0, 1]}
    return [*launch, "--master_port", str(port)]


@pytest.mark.way("`deepspeed` launcher", loss="exact", optimizer="exact")
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no deepspeed")
def test_deepspeed_s_launcher_trains_a_script_that_fastft_runs(tmp_path):
    stock = [*deepspeed_launcher(29513), "script.py"]
    fast = [*deepspeed_launcher(29515), "--module", "fastft", "run", "script.py"]
    assert trained_under(tmp_path, "ZeRO-2", stock, fast) == "DeepSpeedEngine"


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no deepspeed")
def test_deepspeed_s_launcher_gives_the_script_its_rank(tmp_path):
    (tmp_path / "probe.py").write_text("import os, sys; print(sys.argv, os.environ['RANK'])")
    launch = [*deepspeed_launcher(29511), "--module", "fastft", "run", "probe.py", "--more"]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True)
    for rank in "01":
        assert f"['probe.py', '--local_rank={rank}', '--more'] {rank}\n" in done.stdout, done.stderr
