"""`python -m fastft run`: what it does with the trainings of a script, what it says, what is left
behind. Most scripts run in this process, where transformers is imported already."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from accelerate import Accelerator
from support.trainers import logged, quiet_arguments, tiny_llama

from fastft.__main__ import main as command_line
from fastft.commands import run
from fastft.integrations.plug.plug import Plugged

BEGINS = """
import sys, torch
from support.trainers import logged, quiet_arguments, tiny_llama
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

folder = sys.argv[1]
rows = [{"input_ids": row, "labels": row} for row in torch.arange(97 * 9).remainder(97).view(97, 9)]


def made(kind=Trainer, **changes):
    changes = {"max_steps": 3, "learning_rate": 1e-2, **changes}
    of = Seq2SeqTrainingArguments if kind is Seq2SeqTrainer else None
    arguments = quiet_arguments(folder, **({} if of is None else {"kind": of}), **changes)
    return kind(tiny_llama(), arguments, train_dataset=rows, eval_dataset=rows[:8])
"""
TRAININGS = {
    "a Trainer": "trainers = [made()]\ntrainers[0].train()",
    "a Seq2SeqTrainer": "trainers = [made(Seq2SeqTrainer)]\ntrainers[0].train()",
    "a train of its own": """
class Own(Trainer):
    def train(self, *args, **kwargs):
        return super().train(*args, **kwargs)

trainers = [made(Own)]
trainers[0].train()
""",
    "train called twice": "trainers = [made()]\nfor _ in range(2): trainers[0].train()",
    "evaluations before and after": "trainers = [made()]\ntrainers[0].evaluate()\n"
    "trainers[0].train()\ntrainers[0].evaluate()",
    "two Trainers": "trainers = [made(), made(weight_decay=0.1)]\nfor one in trainers: one.train()",
    "train called again after an error": """
from transformers import TrainerCallback

class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise MemoryError

trainers = [made()]
trainers[0].add_callback(Fails)
try:
    trainers[0].train()
except MemoryError:
    assert "forward" not in vars(trainers[0].model.lm_head) and "train" not in vars(trainers[0])
trainers[0].remove_callback(Fails)
trainers[0].train()
""",
}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs a source as a script in this process, and gives what its `__main__` has then.

    With options it runs under the command; with None as Python runs it.
    """
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    stock = vars(transformers.Trainer)["train"], vars(Accelerator)["prepare"]

    def runs(source, *options):
        file = tmp_path / "script.py"
        file.write_text(source)
        if options == (None,):
            run.execute(run.Script(str(file), False, [str(tmp_path)]))
        else:
            assert run.main([*options, str(file), str(tmp_path)]) == 0
        return vars(sys.modules["__main__"])

    yield runs
    assert (vars(transformers.Trainer)["train"], vars(Accelerator)["prepare"]) == stock
    # libraries that a training imports put theirs there
    assert not any(type(finder).__module__.startswith("fastft") for finder in sys.meta_path)


def test_a_half_checkpoint_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    (tmp_path / "checkpoint-3").mkdir()
    trainer = transformers.Trainer(tiny_llama(), quiet_arguments(tmp_path), train_dataset=[])
    asked = run._Run(run._parser().parse_args([]), run.Script("script.py", False, []))
    lacks = r"checkpoint-3 is not whole: trainer_state.json is missing"
    with pytest.raises(ValueError, match=lacks), asked.at_work():
        trainer.train(resume_from_checkpoint=True)
    assert Plugged.of(trainer) is None


@pytest.mark.parametrize("source", TRAININGS.values(), ids=TRAININGS)
def test_its_losses_are_those_of_stock(script, tmp_path, source):
    names = "loss", "grad_norm", "learning_rate", "eval_loss"
    stock = [logged(one, *names) for one in script(BEGINS + source, None)["trainers"]]
    found = script(BEGINS + source, "--report", str(tmp_path / "report.json"))["trainers"]
    for one, expected in zip(found, stock, strict=True):
        torch.testing.assert_close(logged(one, *names), expected, rtol=2e-5, atol=0)
        assert Plugged.of(one) is None
        assert not {"train", "evaluation_loop", "get_train_dataloader"} & set(vars(one))
        assert "forward" not in vars(one.model.lm_head)
    trainings = json.loads((tmp_path / "report.json").read_text())["trainings"]
    assert [one["trainer"] for one in trainings] == [type(one).__name__ for one in found]
    for one in trainings:
        assert one["report"] == {"fused": 3, "materialised": [], "skipped": []}
        assert one["lines"]["loss"] == "fused at lm_head"
        assert one["lines"]["optimizer"].startswith("AdamW")


@pytest.mark.parametrize("piece", ["loss", "optimizer"])
def test_only_one_piece(script, tmp_path, piece):
    options = ["--only", piece, "--report", str(tmp_path / "report.json")]
    script(BEGINS + TRAININGS["a Trainer"], *options)
    report = json.loads((tmp_path / "report.json").read_text())
    (training,) = report["trainings"]
    assert report["pieces"] == [piece]
    assert (training["report"]["fused"] > 0) == (piece == "loss")
    assert training["lines"]["optimizer"].startswith("AdamW") == (piece == "optimizer")


def test_packing_is_handed_on(script, tmp_path):
    options = ["--packing", "64", "--report", str(tmp_path / "report.json")]
    script(BEGINS + TRAININGS["a Trainer"], *options)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["packing"] == 64
    assert "64 tokens" in report["trainings"][0]["lines"]["packing"]


def test_the_report_says_what_it_is_of(script, tmp_path):
    script(BEGINS + TRAININGS["a Trainer"], f"--report={tmp_path / 'report.json'}")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["script"] == [str(tmp_path / "script.py"), str(tmp_path)]
    assert report["error"] is None
    assert report["versions"]["transformers"] == transformers.__version__


def test_another_process_than_the_first_writes_and_says_nothing(
    script, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("RANK", "1")
    script("pass", f"--report={tmp_path / 'report.json'}")
    assert not (tmp_path / "report.json").exists()
    assert capfd.readouterr() == ("", "")


def test_a_script_without_a_training_is_told_so(script, capfd):
    script("print('of the script')")
    out, err = capfd.readouterr()
    assert out == "of the script\n"
    assert err.startswith("fastft: nothing of fastft was used: this process trained no Trainer")
    assert err.count("\n") == 1
    assert "train stock" in err


def test_a_process_that_the_script_forks_trains_stock(script):
    source = """
import os
trainer = made()
child = os.fork()
if not child:
    trainer.train()
    os._exit("train" in vars(trainer))
outcome = os.waitpid(child, 0)[1]
"""
    assert script(BEGINS + source)["outcome"] == 0


PROFILED = """
import collections
from transformers import TrainerCallback

calls = collections.Counter()


def profile(frame, event, arg):
    room = frame.f_globals.get("__name__", "")
    if event == "call" and room.partition(".")[0] == "fastft":
        calls[room, frame.f_code.co_name] += 1


class Profiles(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            sys.setprofile(profile)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            sys.setprofile(None)

trainer = made(max_steps=6, gradient_accumulation_steps=2)
trainer.add_callback(Profiles)
"""
BY_HAND = """
import fastft
trainer.optimizer, _ = fastft.adamw(trainer.model, trainer.args)
trainer.add_callback(fastft.FusedLossCallback())
fastft.fuse_clipping(trainer)
"""


def test_a_step_calls_nothing_of_fastft_that_the_three_lines_do_not_call(script):
    by_hand = script(BEGINS + PROFILED + BY_HAND + "trainer.train()", None)["calls"]
    found = script(BEGINS + PROFILED + "trainer.train()")["calls"]
    assert found
    assert found - by_hand == {}


def failing(source, script, capfd, *options):
    """What stderr has when Python reports the error that leaves a script."""
    with pytest.raises(ZeroDivisionError) as caught:
        script(source, *options)
    capfd.readouterr()
    sys.excepthook(caught.type, caught.value, caught.tb)
    return capfd.readouterr().err


def test_an_error_after_a_training_has_a_line_on_how_to_leave_pieces_out(script, capfd):
    said = failing(BEGINS + TRAININGS["a Trainer"] + "\n1 / 0\n", script, capfd)
    traceback, _, line = said.partition("ZeroDivisionError: division by zero\n")
    assert "fastft" not in traceback
    assert line.count("\n") == 1
    assert "(--only loss or --only optimizer)" in line


def test_an_error_without_a_training_is_the_script_s_alone(script, capfd):
    assert "fastft" not in failing("1 / 0", script, capfd)


def test_with_one_piece_left_the_line_names_no_other(script, capfd):
    source = BEGINS + TRAININGS["a Trainer"] + "\n1 / 0\n"
    said = failing(source, script, capfd, "--only", "loss")
    assert "please report it" in said
    assert "--only" not in said


def test_a_failure_by_exit_code_has_the_line_too(script, capfd):
    with pytest.raises(SystemExit, match="3"):
        script(BEGINS + TRAININGS["a Trainer"] + "\nsys.exit(3)\n")
    assert "please report it" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a script is missing"),
        (["nowhere.py"], "there is no script 'nowhere.py'"),
        (["-m"], "a script is missing"),
        (["-m", "no_such_module"], "there is no module 'no_such_module'"),
        (["--only", "loss,speed", __file__], "there is no piece 'speed': the pieces are loss, "),
        (["--only", "", __file__], "there is no piece ''"),
        (["--only", "packing", __file__], "--only packing needs --packing N"),
        (["--only=loss", "--packing=8", __file__], "--packing 8 is left out by --only loss"),
        (["--packing", "0", __file__], "must be a number of tokens above 0, or 'collate', got '0'"),
        (["--packing", "-8", __file__], "got '-8'"),
        (["--packing", "many", __file__], "got 'many'"),
        (["--report", "no/such/folder/file", __file__], "there is no folder"),
        (["--unknown=3", __file__], "unrecognized arguments: --unknown=3"),
    ],
    ids=lambda given: " ".join(given[:-1]) if isinstance(given, list) else None,
)
def test_bad_input_is_a_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line(["run", *arguments])
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("option", ["--local_rank=1", "--local-rank=1"])
def test_a_launcher_s_rank_is_the_script_s_first_argument(tmp_path, option):
    (tmp_path / "script.py").write_text("import sys; print(sys.argv)")
    command = ["-m", "fastft", option, "run", "script.py", "--more"]
    said = subprocess.check_output([sys.executable, *command], cwd=tmp_path, text=True)
    assert said == f"['script.py', '{option}', '--more']\n"


@pytest.mark.slow
def test_transformers_is_found_when_the_script_imports_it(tmp_path):
    """In a process of its own: neither transformers nor torch is there when the script begins."""
    source = "import sys\nassert not {'torch', 'transformers'} & set(sys.modules)\n"
    (tmp_path / "script.py").write_text(source + BEGINS + TRAININGS["a Trainer"])
    command = ["-m", "fastft", "run", "--report", "report.json", "script.py", "."]
    folders = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": folders, "RANK": "0"}
    subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["trainings"][0]["report"]["fused"] == 3


def test_a_forked_process_that_comes_to_the_script_s_end_reports_nothing(tmp_path):
    source = "import os\nprint(bool(os.fork()) and os.wait()[1])"
    (tmp_path / "script.py").write_text(source)
    command = [sys.executable, "-m", "fastft", "run", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert sorted(done.stdout.split()) == ["0", "False"]
    assert done.stderr.count("fastft: nothing") == 1
