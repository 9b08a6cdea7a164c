"""`attn_implementation="fastft"` is known from `import fastft` on, whichever of the two libraries
comes first."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from fastft.attention import registration

MODEL = """
from transformers import AutoModelForCausalLM, LlamaConfig
sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16)
sizes |= dict(num_hidden_layers=1, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), attn_implementation="fastft")
model.save_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="fastft")
# a configuration that names it
named = LlamaConfig.from_pretrained(folder, attn_implementation="fastft")
assert AutoModelForCausalLM.from_config(named).config._attn_implementation == "fastft"
"""
LOADED = """
import inspect, transformers.modeling_utils as models
from importlib.machinery import SourceFileLoader
assert "fastft" in models.AttentionInterface()
assert "class PreTrainedModel" in inspect.getsource(models)
assert type(models.__loader__) is type(models.__spec__.loader) is SourceFileLoader
assert not any(type(finder).__module__.startswith("fastft") for finder in sys.meta_path)
"""


def test_the_name_is_known_before_anything_of_ours_is_made(tmp_path):
    script = (
        f"import sys, fastft\nassert 'transformers' not in sys.modules\nfolder = "
        f"{str(tmp_path)!r}\n{MODEL}{LOADED}"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def forgotten(monkeypatch):
    for interface in (AttentionInterface, AttentionMaskInterface):
        others = {
            name: function
            for name, function in interface._global_mapping.items()
            if name != "fastft"
        }
        monkeypatch.setattr(interface, "_global_mapping", others)


def test_at_once_where_the_models_are_there_already(forgotten):
    registration.register_with_transformers()
    assert (
        "fastft" in AttentionInterface._global_mapping
        and "fastft" in AttentionMaskInterface._global_mapping
    )


def test_what_goes_wrong_is_not_an_error_of_the_import(forgotten, monkeypatch):
    def fails():
        raise RuntimeError("another transformers")

    monkeypatch.setattr("fastft.attention.attention.register_attention", fails)
    registration.register_with_transformers()
