"""The examples run, and call nothing that torch, transformers or accelerate will take away."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from support.trainers import llama_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PYTHON, TORCHRUN = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone"]


class Run(NamedTuple):
    """A program's word at its end, what makes it short, what starts it, and the library that it
    needs beside transformers, whose own warnings are none of ours."""

    said: str
    arguments: tuple[str, ...] = ()
    launcher: list[str] = PYTHON
    library: str | None = None


RUNS = {
    "accelerate_loop.py": Run("fused losses: 16"),
    "classification.py": Run("accuracy: 0."),
    "deepspeed_zero.py": Run(
        "fused losses: 10", launcher=[*TORCHRUN, "--nproc-per-node=1"], library="deepspeed"
    ),
    "dpo.py": Run("AdamW, clipping inside", library="trl"),
    "finetune.py": Run(
        "tokens/s",
        ("--steps", "2", "--batch-size", "2", "--max-tokens", "64", "--output", "demo"),
    ),
    "fsdp2.py": Run("fused losses: 10", launcher=[*TORCHRUN, "--nproc-per-node=2"]),
    "lora.py": Run("fused losses: 10", library="peft"),
    "offload.py": Run("overlap: the same bits"),
    "quickstart.py": Run("fused losses: 40"),
    "ray_train.py": Run("last loss: ", library="ray"),
}
QUICK = ("accelerate_loop.py",)


def test_every_example_is_run() -> None:
    assert set(RUNS) == {
        path.name
        for path in EXAMPLES.glob("*.py")
        if re.search(rf"(python|torchrun .*) examples/{path.name}", path.read_text())
    }


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in RUNS]
)
def test_an_example_runs_without_a_warning_of_what_will_go(name: str, tmp_path: Path) -> None:
    if RUNS[name].library is not None:
        pytest.importorskip(RUNS[name].library)
    assert RUNS[name].said in _printed(name, RUNS[name].arguments, tmp_path)


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n".join(code))
    shutil.copy(EXAMPLES / "stdlib_text.py", tmp_path)
    assert len(code) > 4
    printed = _printed(str(tmp_path / "cells.py"), (), tmp_path)
    assert "fastft: loss: fused at lm_head" in printed and "equal: True" in printed


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


def _printed(name: str, arguments: Iterable[str], folder: Path) -> str:
    """What an example prints, in a process where a warning of what will go is an error, but for
    those of other libraries."""
    run = RUNS.get(name, Run(""))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if run.library is None:
        environment["PYTHONWARNINGS"] = ",".join(
            ["error::FutureWarning", "error::DeprecationWarning", *_OF_OTHERS]
        )
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    )
    # DeepSpeed compiles with the ninja beside this Python
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment["PATH"] = os.pathsep.join(paths)
    command = [*run.launcher, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# torchao's, which transformers imports where it is installed
_OF_OTHERS = (
    "ignore:invalid escape:DeprecationWarning",
    "ignore:`torch.jit:DeprecationWarning",
)
