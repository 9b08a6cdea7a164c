"""The process that runs a script and records it; in this process, but for what a launcher does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from fastft.commands import recorded_script
from fastft.commands.trace import Trace

ROOT = Path(__file__).parents[2]
MODEL = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
set_seed(3)
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 97}
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
rows = [{"input_ids": torch.randint(3, 97, (9,)).tolist()} for _ in range(24)]
rows = [{**row, "labels": row["input_ids"]} for row in rows]
"""
TRAINER = """
args = TrainingArguments(sys.argv[1], use_cpu=True, push_to_hub=True, report_to="all", seed=3,
    num_train_epochs=2, per_device_train_batch_size=4, save_steps=1, eval_strategy="epoch")
Trainer(model, args, train_dataset=rows, eval_dataset=rows).train()
open("the script went on", "w").close()
"""
LOOP = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
batches = [{key: torch.tensor([row[key] for row in rows[i:i + 4]]) for key in rows[0]}
    for i in range(0, 24, 4)]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optimizer = accelerator.prepare(model, optimizer)
for batch in batches:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        model(**batch)
    model.train()
"""


class Left(BaseException):
    """The process has ended."""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Runs a script as the child would, in this process: its exit code, whether the process was
    left behind the last step, and the trace."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.chdir(tmp_path)

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)

    def run(script, *options, steps=2):
        Path("script.py").write_text(script)
        own = ["--out", "out/trace.json", "--steps", str(steps), *options]
        Path("out").mkdir(exist_ok=True)
        left, code = False, 0
        try:
            code = recorded_script.main([*own, "--", "script.py", str(tmp_path / "output")])
        except Left as end:
            left, code = True, end.args[0]
        return code, left, Trace.load("out/trace.json")

    return run


@pytest.mark.parametrize("variant", ["stock", "fast", "noise", "fp32", "loss"])
def test_a_script_ends_behind_the_last_step(child, variant):
    stock = transformers.TrainingArguments.__post_init__
    code, left, found = child(MODEL + TRAINER, "--variant", variant)
    assert (code, left, found.ended, found.error) == (0, True, "steps", None)
    assert (found.variant, found.trainer, len(found.steps)) == (variant, "Trainer", 2)
    plugged = variant in ("fast", "loss")
    assert (found.fused, bool(found.lines)) == (2 * plugged, plugged)
    assert found.versions["torch"] and found.machine["threads"]
    assert bool(found.noise) == (variant == "noise")
    # what the script was told to write is not there, nor is anything of the run beside the trace
    assert sorted(map(str, Path().rglob("*"))) == ["out", "out/trace.json", "script.py"]
    assert transformers.TrainingArguments.__post_init__ is stock


@pytest.mark.parametrize("variant", ["stock", "fast", "noise", "fp32"])
def test_a_loop_around_an_accelerator(child, variant):
    code, left, found = child(MODEL + LOOP, "--variant", variant)
    assert (code, left, found.ended, found.trainer) == (0, True, "steps", "Accelerator")
    first = found.steps[0]
    assert len(first.micro) == 2 and first.loss == pytest.approx(4.57, abs=0.1)
    assert first.grad_norm > 0.1 and first.learning_rate == [1e-3]
    assert sum(norm**2 for norm in first.gradients) ** 0.5 == pytest.approx(0.1, rel=1e-3)
    assert (first.tokens, first.supervised, first.micro[0].shift) == (72, 64, 1)
    assert found.fused == (4 if variant == "fast" else 0)


def test_a_loop_that_is_shorter(child):
    code, left, found = child(MODEL + LOOP, "--variant", "stock", steps=9)
    assert (code, left, found.ended, len(found.steps)) == (0, False, "script", 3)
    assert found.peak_kind


def test_a_script_that_trains_nothing(child):
    code, left, found = child("print('nothing')")
    assert (code, left, found.ended, found.steps) == (0, False, "script", [])


def test_a_script_that_fails(child, capsys):
    code, left, found = child("def load():\n    raise KeyError('no such file')\n\nload()\n")
    assert (code, left, found.ended) == (1, False, "error")
    assert found.error.splitlines()[-1] == "KeyError: 'no such file'"
    assert "fastft" not in found.error and "in load" in found.error
    assert "no such file" in capsys.readouterr().err


def test_a_script_that_gives_up(child):
    code, _, found = child("raise SystemExit(3)")
    assert (code, found.ended, found.error) == (3, "error", "the script ended with exit code 3")
    assert child("raise SystemExit")[2].ended == "script"


def test_a_training_that_fails_behind_its_first_step(child):
    fails = """
calls = iter([1])
model.lm_head.register_forward_pre_hook(lambda *_: next(calls) and None)
"""
    code, left, found = child(MODEL + fails + TRAINER, "--variant", "stock")
    assert (code, left, found.ended, len(found.steps)) == (1, False, "error", 1)
    assert "StopIteration" in found.error


def test_a_training_that_is_shorter_ends_the_process_too(child):
    """What comes behind it is another training, an evaluation, or a checkpoint."""
    code, left, found = child(MODEL + TRAINER, "--variant", "stock", steps=99)
    assert (code, left, found.ended, len(found.steps)) == (0, True, "script", 12)


@pytest.mark.parametrize("again", ["another Trainer", "the same Trainer"])
def test_a_training_that_the_script_tries_again(child, again):
    """A failure that the script catches is none, and the training that follows is recorded."""
    tries = """
calls = iter([1])
hook = model.lm_head.register_forward_pre_hook(lambda *_: next(calls) and None)
args = TrainingArguments(sys.argv[1], use_cpu=True, per_device_train_batch_size=4)
trainer = Trainer(model, args, train_dataset=rows)
try:
    trainer.train()
except StopIteration:
    hook.remove()
"""
    then = TRAINER if again == "another Trainer" else "trainer.train()"
    code, left, found = child(MODEL + tries + then, "--variant", "fast")
    assert (code, left, found.ended, found.error) == (0, True, "steps", None)
    assert len(found.steps) == 2 and found.fused == 2


def test_bad_input_gets_a_sentence(child, capsys):
    for options, words in (
        (["--steps", "2", "--", "no.py"], "there is no script 'no.py'"),
        (["--variant", "faster", "--", "script.py"], "invalid choice: 'faster'"),
    ):
        with pytest.raises(SystemExit) as ended:
            recorded_script.main(["--out", "trace.json", *options])
        assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_of_a_launcher(tmp_path):
    (tmp_path / "script.py").write_text(MODEL + TRAINER)
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
    command += ["fastft.commands.recorded_script", "--out", "trace.json", "--variant", "stock"]
    command += ["--steps", "2", "--", "script.py", "output"]
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ranks = [Trace.load(tmp_path / name) for name in ("trace.json", "trace.rank1.json")]
    assert [(found.rank, found.world, found.ended) for found in ranks] == [
        (0, 2, "steps"),
        (1, 2, "steps"),
    ]
    first, second = (found.steps[0] for found in ranks)
    assert first.weights == second.weights and first.batches != second.batches
    assert not (tmp_path / "output").exists() and not (tmp_path / "the script went on").exists()
