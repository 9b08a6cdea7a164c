"""`estimate` and `doctor` run no code of a model's folder, whatever is answered on stdin."""

import io
import json
import os
import subprocess
import sys

import pytest

from fastft.commands import doctor, estimate
from fastft.integrations.configuration import load_config

CODE = "own.Model"  # a class in own.py of the folder
COMMANDS = {"doctor": doctor.main, "estimate": estimate.main}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
OF_ITS_OWN = {"model_type": "own", "auto_map": {"AutoConfig": CODE, "AutoModelForCausalLM": CODE}}


@pytest.fixture
def folder(tmp_path):
    """A folder with code in it, which leaves a file where it runs."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    return place


def answered(command, folder, monkeypatch):
    """What a command returns where somebody says yes to every question."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    code = COMMANDS[command]([str(folder)])
    assert not (folder.parent / "ran").exists(), "code of the folder was run"
    return code


def nested(folder):
    """transformers makes the inner model by its own call of `from_config`."""
    inner = {"model_type": "trocr", "_name_or_path": str(folder), "name_or_path": str(folder)}
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": inner | {"auto_map": {"AutoModel": CODE}},
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_process_that_is_told_yes_runs_no_code(command, folder):
    (folder / "config.json").write_text(json.dumps(OF_ITS_OWN))
    done = subprocess.run(
        [sys.executable, "-m", "fastft", command, str(folder)],
        input="y\n" * 10,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules")},
    )
    assert not (folder.parent / "ran").exists()
    assert done.returncode == 2
    assert "Do you wish" not in done.stdout
    *_, said = done.stderr.strip().splitlines()
    assert said.startswith(f"fastft {command}: ")
    assert "'own' is no model of transformers: its code lies beside its configuration" in said


NO_MODEL = "is neither a language model nor a classifier"
NAMED = {  # what a configuration names code with, and what each command says of it
    "part": (nested, {"doctor": "Unrecognized configuration class", "estimate": NO_MODEL}),
    "head": (
        lambda folder: {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": CODE}},
        {"doctor": "Unrecognized configuration class", "estimate": NO_MODEL},
    ),
    "kernel": (
        lambda folder: LLAMA | {"attn_implementation": "some/kernel"},
        dict.fromkeys(COMMANDS, "its attn_implementation must be one of transformers', got 'some"),
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("named", NAMED)
def test_code_that_a_configuration_names_is_not_run(command, named, folder, capsys, monkeypatch):
    config, said = NAMED[named]
    (folder / "config.json").write_text(json.dumps(config(folder)))
    assert answered(command, folder, monkeypatch) == 2
    assert said[command] in capsys.readouterr().err


def test_code_of_a_tokenizer_is_not_run(folder, capsys, monkeypatch):
    config = LLAMA | {"model_type": "bloom", "architectures": ["BloomForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, CODE]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    assert answered("doctor", folder, monkeypatch) == 2
    assert "contains custom code which must be executed" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_of_a_model_that_transformers_has_its_own_class_is_taken(
    command, folder, capsys, monkeypatch
):
    """Neither the folder's, nor a function of transformers that the configuration names."""
    config = LLAMA | {"architectures": ["pipeline"], "auto_map": OF_ITS_OWN["auto_map"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert answered(command, folder, monkeypatch) == 0
    said = {"doctor": "Model LlamaForCausalLM", "estimate": "peak of evaluation"}[command]
    assert said in capsys.readouterr().out


def test_no_part_of_a_configuration_names_code(folder):
    (folder / "config.json").write_text(json.dumps(nested(folder)))
    assert "auto_map" not in load_config(str(folder)).to_json_string()
