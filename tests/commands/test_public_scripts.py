"""The table of `make compare-public`: what scripts need is made, and every outcome is told."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("tokenizers")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_what_a_script_needs_can_be_made_and_its_name_is_its_own():
    from public_folder import DATA, MODELS
    from public_scripts import REPOSITORIES, SCRIPTS

    names = [script.name for script in SCRIPTS]
    assert len(names) == len(set(names))
    for script in SCRIPTS:
        assert script.path.partition("/")[0] in REPOSITORIES
        assert set(script.needs) <= MODELS.keys() | DATA.keys(), script.name


@pytest.mark.slow
def test_models_and_data_are_loaded_by_the_names_of_the_hub(tmp_path, monkeypatch):
    from datasets import load_dataset
    from public_folder import VOCABULARY, PublicFolder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = PublicFolder(tmp_path)
    for name in ("tiny-llama", "nyu-mll/glue:mrpc", "text.json"):
        folder.provide(name)
    monkeypatch.chdir(tmp_path)
    glue = load_dataset("nyu-mll/glue", "mrpc", cache_dir=str(tmp_path / "cache"))
    assert set(glue) == {"train", "validation", "test"}
    assert glue["train"].features["label"].num_classes == 2
    tokenizer = AutoTokenizer.from_pretrained("tiny-llama")
    model = AutoModelForCausalLM.from_pretrained("tiny-llama")
    ids = tokenizer(glue["train"][0]["sentence1"], return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape == (*ids.shape, VOCABULARY)
    assert tokenizer.decode(ids[0]) == glue["train"][0]["sentence1"]
    assert all(json.loads(line)["text"] for line in Path("text.json").read_text().splitlines())
    assert torch.isfinite(model(ids, labels=ids).loss)


def test_equal_different_and_refused_scripts_are_told(tmp_path):
    import compare_public
    from public_scripts import SCRIPTS

    common = {"repository": "trl", "revision": "0123456789abcdef", "jobs": 1}
    compared = {
        "model": "LlamaForCausalLM",
        "lines": {
            "loss": "fused at lm_head",
            "optimizer": "left alone: SGD",
            "packing": "off: packing=None",
        },
        "speedup": {"value": 1.5, "low": 1.4, "high": 1.6},
        "peak": 0.5,
        "steps": 20,
        "versions": {"torch": "2.13.0"},
        "machine": {"processor": "a", "cores": 2, "threads": 1},
    }
    entries = [
        common | compared | {"path": "examples/a.py", "outcome": "equal", "sentence": ""},
        common | compared | {"path": "b.py", "outcome": "different", "sentence": "loss: off"},
        common | {"path": "c.py", "outcome": "could not run", "sentence": "it fails"},
    ]
    page = "\n".join(compare_public.page(entries))
    assert "**3 scripts: 1 equal, 1 different, 1 could not run.**" in page
    row = "| `a.py` | LlamaForCausalLM | equal | fused at lm_head | left alone | off |"
    assert f"{row} 1.50x (1.40 to 1.60) | 0.50x |" in page
    assert "* b.py: loss: off" in page
    assert "* a.py, b.py: optimizer left alone: SGD" in page
    assert (
        "| `c.py` | - | could not run | - | - | - | - | - |" in page and "* c.py: it fails" in page
    )
    missing = compare_public.compare(SCRIPTS[0], tmp_path, None, [])
    assert missing["outcome"] == "not there" and missing["revision"] == "no clone"


def test_the_sentence_is_that_of_compare_and_else_the_last_line():
    from compare_public import sentence

    assert sentence("x\nfastft compare: the script fails\nmore\n") == "the script fails"
    assert sentence("Traceback\nKeyError: 1\n") == "KeyError: 1"
    assert sentence("") == "nothing was said"
