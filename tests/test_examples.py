"""The examples run, and call nothing that torch, transformers or accelerate will take away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.trainers import llama_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUNS = {  # of each program, the arguments that make it short and a word that it says at its end
    "accelerate_loop.py": ([], "fused losses: 16"),
    "quickstart.py": ([], "fused losses: 40"),
    "finetune.py": (
        ["--steps", "2", "--batch-size", "2", "--max-tokens", "64", "--output", "demo"],
        "tokens/s",
    ),
}


def test_every_example_is_run() -> None:
    assert set(RUNS) == {
        path.name
        for path in EXAMPLES.glob("*.py")
        if f"python examples/{path.name}" in path.read_text()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs_without_a_warning_of_what_will_go(name: str, tmp_path: Path) -> None:
    arguments, said = RUNS[name]
    assert said in _printed(name, arguments, tmp_path)


PLAY = """# A Play

## ACT I

### SCENE I. A room.

_Enter both_

**FIRST**  
Who is there, friend?  
Speak.

**SECOND**  
I am.
"""
CHAT = "{% for m in messages %}{{ 'say ' + m.content + ' stop' }}{% endfor %}"


@pytest.mark.slow
def test_the_script_of_the_smollm2_demo_trains_on_speeches(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "say": 1, "stop": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="stop", eos_token="stop")
    fast.chat_template = CHAT
    fast.save_pretrained(tmp_path / "model")
    LlamaForCausalLM(llama_config(max_position_embeddings=512)).save_pretrained(tmp_path / "model")
    (tmp_path / "plays").mkdir()
    (tmp_path / "plays" / "play.md").write_text(PLAY.replace("I am.", "I am. " * 40))
    arguments = [str(tmp_path / "model"), "--plays", str(tmp_path / "plays"), "--max-steps", "2"]
    assert "train_loss" in _printed("smollm2.py", arguments, tmp_path)


def _printed(name: str, arguments: list[str], folder: Path) -> str:
    """What an example prints, in a process where every warning of what will go is an error."""
    environment = {**os.environ, "PYTHONWARNINGS": "error::FutureWarning,error::DeprecationWarning"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    )
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
