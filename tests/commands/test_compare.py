"""`python -m fastft compare`: which runs it makes, what it says, how it ends."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support.child_runs import SyntheticRuns, option, report, run_preloaded

from fastft.commands import children
from fastft.commands.compare import main

SCRIPT = """
import random, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

set_seed(0)
drawn = random.Random(0)
texts = [[drawn.randrange(3, 97) for _ in range(drawn.randint(3, 30))] for _ in range(40)]

def padded(examples):
    width = max(len(e["input_ids"]) for e in examples)
    ids = torch.tensor([e["input_ids"] + [0] * (width - len(e["input_ids"])) for e in examples])
    labels = ids.masked_fill(ids == 0, -100)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
config = LlamaConfig(vocab_size=97, num_attention_heads=4, **sizes)
model = LlamaForCausalLM(config).to(getattr(torch, sys.argv[1]))
batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
arguments = TrainingArguments("out", **batches, use_cpu=True, weight_decay=0.1)
dataset = [{"input_ids": ids} for ids in texts]
Trainer(model, arguments, train_dataset=dataset, data_collator=padded).train()
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    return "train.py"


@pytest.fixture
def synthetic(monkeypatch):
    """Synthetic runs; the picture, which takes a second, is left out."""

    def put(change=lambda made, command: None, picture=False, **options):
        runs = SyntheticRuns(change, **options)
        monkeypatch.setattr(children, "run", runs)
        if not picture:
            monkeypatch.setitem(sys.modules, "fastft.commands.compare_picture", None)
        return runs

    return put


def test_a_training_of_unequal_texts_is_equal(script, monkeypatch, capsys):
    monkeypatch.setattr(children, "run", run_preloaded)
    code = main(["--steps", "4", "--runs", "1", "--packing", "64", script, "float32"])
    said = capsys.readouterr()
    assert code == 0, said
    found = report("fastft-compare")
    assert found["equal"] and found["cause"] is None and found["steps"] == 4
    assert found["fused"] == 8 and set(found["lines"]) == {"loss", "optimizer", "packing"}
    assert found["stock"]["padding"] > 0.2 and found["fastft"]["padding"] < 0.1
    assert found["packs"]["tokens_per_second"]["value"] > 0
    assert "Equal" in said.out and "One run takes" in said.err
    text = open("fastft-compare/report.md").read()
    assert "fused at lm_head" in text and "packs of 64" in text and "one ulp on" in text
    assert sorted(os.listdir()) == ["fastft-compare", "train.py"]  # the script's own output is gone


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_processes_of_its_own(script, dtype):
    words = [sys.executable, "-m", "fastft", "compare", "--steps", "6", "--pieces", "each"]
    done = subprocess.run([*words, script, dtype], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(report("fastft-compare")["pieces"]) == {"loss", "optimizer", "packing"}


@pytest.mark.slow
def test_under_torchrun(script):
    words = [sys.executable, "-m", "fastft", "compare", "--steps", "4"]
    launch = ["--launch", "torchrun --nproc_per_node 2"]
    done = subprocess.run([*words, *launch, script, "float32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report("fastft-compare")["processes"] == 2


def test_the_runs_are_in_turns(script, synthetic):
    runs = synthetic()
    assert main([script, "--lr", "1"]) == 0
    assert runs.seen == ["stock", "fast", "fast", "stock", "noise"]
    assert [option(command, "--packing") for command in runs.commands] == [
        *(None, "collate", "collate", None, None)
    ]
    for command in runs.commands:
        assert command[command.index("--") :] == ["--", "train.py", "--lr", "1"]
    assert len(report("fastft-compare")["losses"]["stock 1"]) == 20


def test_one_run_of_each(script, synthetic):
    runs = synthetic()
    assert main(["--runs", "1", script]) == 0
    assert runs.seen == ["stock", "fast", "noise"]


def test_bf16_weights_have_a_reference_in_fp32(script, synthetic):
    runs = synthetic(dtype="bfloat16")
    assert main([script]) == 0
    assert runs.seen == ["stock", "fast", "fast", "stock", "noise", "fp32"]
    assert "loses every update" in open("fastft-compare/report.md").read()


def test_each_piece_and_packs(script, synthetic, capsys):
    runs = synthetic(picture=True)
    assert main(["--pieces", "each", "--packing", "512", "--out", "there", script]) == 0
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert os.path.exists("there/report.png") is drawn
    assert runs.seen[5:] == ["loss", "optimizer", "packing", "fast"]
    assert option(runs.commands[-1], "--packing") == "512"
    assert set(report("there")["pieces"]) == {"loss", "optimizer", "packing"}
    assert "packs of 512" in capsys.readouterr().out


def clipped_twice(made, command):
    if made.variant in ("fast", "optimizer"):
        for step in made.steps:
            step.gradients = [0.5 * value for value in step.gradients]


def test_a_difference_is_named_and_its_piece_is_found(script, synthetic, capsys):
    runs = synthetic(clipped_twice)
    assert main([script]) == 1
    assert runs.seen[5:] == ["loss", "optimizer", "packing"]  # nobody has asked for these
    said = capsys.readouterr().out
    assert "Different: clipping" in said and "comes with optimizer alone" in " ".join(said.split())
    assert report("fastft-compare")["cause"] == "clipping"


def with_dropout(made, command):
    for step in made.steps:
        step.drew = option(command, "--dropout") != "off"


def test_packed_rows_are_compared_without_dropout(script, synthetic, capsys):
    runs = synthetic(with_dropout)
    assert main([script]) == 0
    seen = [(option(one, "--variant"), option(one, "--dropout")) for one in runs.commands]
    off = [("fast", "off"), ("fast", "off"), ("stock", "off"), ("noise", "off")]
    assert seen == [("stock", None), ("stock", "off"), ("fast", None), *off]
    assert option(runs.commands[2], "--only") == "loss,optimizer"
    assert option(runs.commands[2], "--packing") is None
    assert "these runs are without dropout" in " ".join(capsys.readouterr().out.split())


def test_dropout_stays_where_nothing_is_packed(script, synthetic):
    runs = synthetic(with_dropout)
    assert main(["--only", "loss", script]) == 0
    assert runs.seen == ["stock", "fast", "fast", "stock", "noise"]
    assert not any("--dropout" in command for command in runs.commands)


def test_dropout_drawn_twice_is_found_beside_packing(script, synthetic):
    def twice(made, command):
        with_dropout(made, command)
        if made.variant == "fast" and option(command, "--dropout") != "off":
            for step in made.steps:
                step.random += " again"

    synthetic(twice)
    assert main([script]) == 1
    assert report("fastft-compare")["cause"] == "random numbers"


def test_a_model_that_draws_without_dropout_is_not_packed(script, synthetic, capsys):
    def draws(made, command):
        for step in made.steps:
            step.drew = True

    runs = synthetic(draws)
    assert main([script]) == 0
    assert runs.seen == ["stock", "stock", "fast", "fast", "stock", "noise"]
    assert option(runs.commands[2], "--only") == "loss,optimizer"
    assert "Packing is left out" in " ".join(capsys.readouterr().out.split())
    assert main(["--only", "packing", script]) == 2
    assert "packing has nothing to be compared with" in capsys.readouterr().err


def failing(*variants):
    def change(made, command):
        if made.variant in variants:
            made.steps, made.ended, made.error = [], "error", "Traceback ...\nValueError: no"

    return change


def test_a_script_that_fails_stock(script, synthetic, capsys):
    runs = synthetic(failing("stock"))
    assert main([script]) == 2
    said = capsys.readouterr().err
    assert runs.seen == ["stock"] and "fails without fastft already" in said
    assert "ValueError: no" in said and "the script's output" in said


def test_a_script_that_fails_with_fastft_alone(script, synthetic, capsys):
    runs = synthetic(failing("fast", "packing"))
    assert main([script]) == 2
    assert runs.seen == ["stock", "fast", "loss", "optimizer", "packing"]
    said = capsys.readouterr().err
    assert "trains without fastft, and fails with it" in said
    assert "The packing alone fails too: leave it out with --only loss,optimizer" in said


def test_a_script_that_trains_nothing(script, synthetic, capsys):
    synthetic(lambda made, command: made.steps.clear())
    assert main([script]) == 2
    assert "without a single optimizer step" in capsys.readouterr().err


def test_a_child_that_dies_at_once(script, synthetic, capsys):
    synthetic(lambda made, command: 137)
    assert main([script]) == 2
    assert "exit code 137" in capsys.readouterr().err


def test_a_script_without_a_seed(script, synthetic, capsys):
    def unseeded(made, command):
        for step in made.steps:
            for micro in step.micro:
                micro.targets += option(command, "--out")

    synthetic(unseeded)
    assert main([script]) == 2
    assert "set_seed" in capsys.readouterr().err


def test_without_a_yardstick_there_is_no_verdict(script, synthetic, capsys):
    synthetic(failing("noise"))
    assert main([script]) == 2
    assert "not with noise, by which its differences are judged" in capsys.readouterr().err


def test_processes_of_a_launcher_are_merged(script, synthetic, monkeypatch):
    def second_rank(made, command):
        made.rank, made.world = 1, 2
        path = option(command, "--out")
        made.save(f"{path.removesuffix('.json')}.rank1.json")
        made.rank = 0

    runs = synthetic(second_rank)
    launch = f"{sys.executable} launcher.py --nproc_per_node 2"
    assert main(["--launch", launch, script]) == 0
    assert runs.commands[0][:5] == [*launch.split(), "-m"]
    assert report("fastft-compare")["processes"] == 2


BAD = {
    "no script": ([], "a script is missing"),
    "a script that is not there": (["nowhere.py"], "there is no script 'nowhere.py'"),
    "no steps": (["--steps", "0", "train.py"], "argument --steps: a whole number from 1 on"),
    "no tokens": (["--packing", "0", "train.py"], "argument --packing: a whole number from 1 on"),
    "packs of words": (["--packing", "many", "train.py"], "argument --packing"),
    "a piece": (["--pieces", "head", "train.py"], "there is no piece 'head'"),
    "a piece of fast": (["--only", "loss,", "train.py"], "there is no piece ''"),
    "a launcher": (["--launch", "no-such-launcher -n 2", "train.py"], "there is no program"),
    "an open quote": (["--launch", "torchrun '", "train.py"], "argument --launch: No closing quot"),
    "a file": (["--out", "train.py", "train.py"], "argument --out: 'train.py' is no folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case, script, capsys):
    arguments, words = BAD[case]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and words in capsys.readouterr().err
    assert not os.path.exists("fastft-compare")


def test_a_report_that_has_no_place_is_no_verdict(script, capsys):
    below = f"{script}/below"
    assert main(["--out", below, script]) == 2
    assert f"--out: {below} cannot be a folder" in capsys.readouterr().err


def test_an_error_of_its_own_is_no_verdict(script, synthetic, monkeypatch, capsys):
    synthetic()
    monkeypatch.setattr("fastft.commands.compare.judge", lambda runs: [][0])
    assert main([script]) == 2
    said = capsys.readouterr().err
    assert "IndexError" in said and "an error of its own" in said


@pytest.mark.parametrize("size", [2**27, 2**30])
def test_a_peak_is_compared_where_it_is_more_than_what_libraries_keep(script, synthetic, size):
    def of_size(made, command):
        made.peak_process = size // 2 if option(command, "--variant") == "fast" else size

    synthetic(of_size)
    assert main([script]) == 0
    with open("fastft-compare/report.md") as file:
        (row,) = [line for line in file if line.startswith("| peak memory")]
    assert ("0.50x" in row) == (size == 2**30) and ("too small" in row) == (size == 2**27)


def test_help_names_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "1: different" in said and "--pieces" in said


# a child that has a child; both say who they are, and sleep
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(60)
"""


def gone(number):
    for _ in range(100):
        try:
            os.kill(number, 0)
            with open(f"/proc/{number}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children_and_theirs(number, tmp_path):
    log = tmp_path / "log"
    sent = threading.Event()

    def watch(seconds):
        if log.read_text().endswith("\n") and not sent.is_set():
            sent.set()
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt), children.ended_by_signals():
        children.run([sys.executable, "-S", "-c", FAMILY], log, watch)
    assert all(gone(int(one)) for one in log.read_text().split())


def test_an_interrupt_is_no_verdict(script, synthetic, capsys):
    def interrupt(made, command):
        raise KeyboardInterrupt

    synthetic(interrupt)
    assert main([script]) == 130
    assert "nothing runs any more" in capsys.readouterr().err


def test_a_child_has_no_input_and_its_output_is_kept(tmp_path):
    code = "import sys; print(repr(sys.stdin.read())); sys.exit(3)"
    assert children.run([sys.executable, "-S", "-c", code], tmp_path / "log", lambda s: None) == 3
    assert children.last_lines(tmp_path / "log") == "    ''"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59, "59 s"), (190, "3 min 10 s"), (7500, "2 h 5 min")]
)
def test_times_in_words(seconds, words):
    assert children.in_words(seconds) == words


def test_what_is_left_is_estimated_after_the_first_run(capsys):
    with children.Progress(3) as progress:
        for name in ("stock", "fastft", "noise"):
            progress.begin(name)
            progress.watch(1.0)
            progress.end(10.0)
    assert capsys.readouterr().err.splitlines() == [
        "[1/3] stock",
        "One run takes 10 s: 2 more, 20 s.",
        "[2/3] fastft, about 20 s left",
        "[3/3] noise, about 10 s left",
    ]


def test_the_bar_of_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with children.Progress(2) as progress:
        for name in ("stock", "fastft"):
            progress.begin(name)
            progress.watch(1.0)
            progress.end(10.0)
        progress.add(1)
    assert "One run takes 10 s: 1 more, 10 s." in capsys.readouterr().err


def test_without_rich_and_matplotlib(script, synthetic, monkeypatch, capsys):
    synthetic(picture=True)
    for module in [one for one in sys.modules if one.partition(".")[0] in ("rich", "matplotlib")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fastft.commands.compare_picture", raising=False)
    assert main([script]) == 0
    said = capsys.readouterr().out
    assert "**Equal.**" in said and "| tokens/s |" in said
    assert not os.path.exists("fastft-compare/report.png")
