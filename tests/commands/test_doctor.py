"""`python -m fastft doctor`: the command, its exit codes, and its checks of a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.trainers import llama_config

from fastft.commands import doctor
from fastft.integrations.doctor import machine
from fastft.integrations.doctor.finding import Finding, examined
from fastft.integrations.doctor.machine import MACHINE, Machine

FINE = Machine(
    torch="2.13.0",
    gpu_build=False,
    gpu=False,
    nvidia=False,
    cores=4,
    threads=4,
    omp=None,
    emulated=False,
    compiler="gcc",
    missing={"cpu": None, "cuda": "this torch build has no CUDA"},
    triton="triton is not installed",
    versions={"torch": "2.13.0+cpu", "transformers": "5.24.0"},
)
WITH_A_GPU = replace(
    FINE, gpu_build=True, gpu=True, nvidia=True, triton=None, missing={"cpu": None, "cuda": None}
)
MACHINES = {  # of each check, a machine that makes it speak, and its severity
    "torch_without_the_gpu": (replace(FINE, nvidia=True), "slow"),
    "kernels_not_loaded": (replace(FINE, missing={"cpu": "no compiler", "cuda": None}), "slow"),
    "no_compiler_for_triton": (replace(WITH_A_GPU, compiler=None), "note"),
    "threads_and_cores": (replace(FINE, threads=64), "slow"),
    "bf16_is_emulated": (replace(FINE, emulated=True), "note"),
    "versions_never_tested": (replace(FINE, versions={"transformers": "5.2.0"}), "wrong"),
}


@pytest.mark.parametrize("check", MACHINE, ids=lambda check: check.__name__)
def test_a_machine_that_lacks_something_and_one_that_does_not(check):
    lacking, severity = MACHINES[check.__name__]
    assert check(lacking).severity == severity
    assert check(FINE) is None and check(WITH_A_GPU) is None


@pytest.mark.parametrize(
    "quiet",
    [
        replace(FINE, nvidia=True, hidden=True),
        replace(WITH_A_GPU, missing={"cpu": None, "cuda": "no nvcc"}),
        replace(WITH_A_GPU, threads=1),
        replace(FINE, cores=1, threads=1, omp="1"),
    ],
    ids=["GPUs that the user hides", "Triton in place of CUDA", "a GPU computes", "one core"],
)
def test_a_machine_that_is_as_it_should_be(quiet):
    assert examined(MACHINE, quiet) == []


def test_one_thread_of_several_cores_is_named_with_what_set_it():
    assert "OMP_NUM_THREADS=1" in machine.threads_and_cores(replace(FINE, threads=1, omp="1")).what


def test_processes_of_torchrun_share_the_cores(monkeypatch):
    monkeypatch.setattr(machine, "_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.this_machine().cores == 2


@pytest.mark.parametrize(
    "files, cores",
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({}, None),
    ],
)
def test_the_cores_of_a_container(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine._quota(tmp_path) == cores


def test_a_check_that_fails_is_a_note_and_hides_no_other():
    def broken(subject):
        raise KeyError("gone")

    def worst(subject):
        return Finding("wrong", "what", "why", "remedy")

    found = examined([broken, worst], None)
    assert [(each.severity, each.check) for each in found] == [
        ("note", "broken"),
        ("wrong", "worst"),
    ]
    assert "KeyError" in found[0].what


@pytest.mark.parametrize("severities, code", [("", 0), ("note slow", 0), ("note wrong", 1)])
def test_the_exit_code_says_whether_something_is_wrong(severities, code, capsys):
    found = [Finding(severity, "What.", "Why.", "Do it.") for severity in severities.split()]
    assert doctor.report("title", found, 3) == code
    said = capsys.readouterr().out
    assert said.count("-> Do it.") == len(found) and "3 checks: " in said
    worst_first = [line.split(":")[0] for line in said.splitlines() if line[:4].isupper()]
    assert worst_first == sorted(worst_first, key=["WRONG", "SLOW", "NOTE"].index)


def test_without_an_argument_the_machine_is_looked_at(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "this_machine", lambda: MACHINES["versions_never_tested"][0])
    assert doctor.main([]) == 1
    assert "WRONG: versions never tested\n  Too old for fastft: transformers 5.2.0" in (
        capsys.readouterr().out
    )


def test_a_model_is_looked_at_by_its_configuration(tmp_path, capsys):
    config = llama_config(dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert doctor.main([str(tmp_path)]) == 0
    assert "NOTE: weights of 16 bits" in capsys.readouterr().out


BAD = {  # of what cannot be looked at, the sentence
    "nothing.py": "there is no script 'nothing.py'",
    "-m nothing_of_this_name": "there is no module 'nothing_of_this_name'",
    "NoModelForCausalLM": "transformers has no model NoModelForCausalLM",
    "LlamaForCausalLM --lr 1": "a model has no arguments, got '--lr 1'",
    ".": "is no model that can be described: a folder with a config.json",
}


@pytest.mark.parametrize("line", BAD)
def test_what_cannot_be_looked_at_is_said_in_a_sentence(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor.main(line.split()) == 2
    assert BAD[line] in capsys.readouterr().err


ENDS = {  # how a script ends without a training, and the sentence
    "print('done')": "called no Trainer.train()",
    "raise SystemExit(3)": "ended before a Trainer trained (exit code 3)",
    "1 / 0": "failed before a Trainer trained",
}


@pytest.mark.parametrize("text", ENDS)
def test_a_script_that_trains_nothing(text, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    path = tmp_path / "script.py"
    path.write_text(text)
    assert doctor.main([str(path)]) == 2
    assert ENDS[text] in capsys.readouterr().err


# its Trainer pads with the end token, masks it, and would save whatever happens
SCRIPT = """
import sys
import torch
from support.trainers import quiet_arguments, tiny_llama
from transformers import Trainer

def collate(examples):
    ids = torch.tensor([example["input_ids"] for example in examples])
    mask = (ids != 2).long()
    mask[:, 3] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids == 2, -100)}

net = tiny_llama().bfloat16()
data = [{"input_ids": [5, 6, 7, 2, 2, 2]}] * 8
arguments = quiet_arguments(sys.argv[1], learning_rate=1e-5)
trainer = Trainer(net, arguments, data_collator=collate, train_dataset=data)
try:
    trainer.train()
finally:
    trainer.save_model()
"""


def test_a_script_is_run_up_to_its_first_training_and_no_further(tmp_path):
    script, output = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "fastft", "doctor", str(script), str(output)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    for words in ("updates that round to nothing", "end token not learnt", "padding share"):
        assert words in done.stdout
    assert not list(output.glob("*"))
