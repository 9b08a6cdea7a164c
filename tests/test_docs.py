"""README and docs tell the truth: their Python runs, their commands exist, each limit has a test."""

import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support import documentation
from support.trainers import tiny_llama
from torch import nn

import fastft

BLOCKS = documentation.python_blocks()
COMMANDS = sorted(documentation.commands())


def examples(count=12):
    return [{"input_ids": list(range(3, 8 + number % 7))} for number in range(count)]


def model_for(block):
    """A tiny model of the kind that a block is about."""
    import transformers

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    if "sequence_classification" in block:
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(**sizes, num_attention_heads=4, attn_implementation="fastft")
        )
    if "seq2seq" in block:
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, decoder_start_token_id=0)
        )
    return tiny_llama(attn_implementation="fastft")


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "word": 3}, "[UNK]"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def world(block, folder):
    """What the blocks take for granted: the names that a reader has from his own script."""
    import transformers

    fastft.register_attention()
    model = model_for(block)
    model.save_pretrained(folder / "model")
    hidden = torch.randn(14, 32, requires_grad=True)
    head, labels = nn.Linear(32, 97), torch.randint(97, (14,))
    ours = fastft.PackingCollator()
    return {
        "fastft": fastft,
        "torch": torch,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "Trainer": transformers.Trainer,
        "TrainingArguments": transformers.TrainingArguments,
        "DataLoader": torch.utils.data.DataLoader,
        "name": str(folder / "model"),
        "model": model,
        "args": transformers.TrainingArguments("out"),
        "dataset": examples(),
        "data": [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8,
        "packs": fastft.pack(examples(), max_tokens=32),
        "loader": torch.utils.data.DataLoader(fastft.pack(examples(), max_tokens=32), collate_fn=ours),
        "accelerator": SimpleNamespace(backward=torch.Tensor.backward),
        "tokenizer": tokenizer(),
        "params": list(model.parameters()),
        "hidden": hidden,
        "head": head,
        "labels": labels,
        "logits": head(hidden),
        "num_items_in_batch": torch.tensor(14),
        "policy_loss": lambda token, old_log_probs, advantages: -(token.log_probs - old_log_probs) * advantages,
        "old_log_probs": torch.randn(14),
        "advantages": torch.randn(14),
    }


@pytest.fixture
def quiet_arguments(monkeypatch):
    """`TrainingArguments` of one step that leaves nothing behind, whatever else a block asks for."""
    from transformers import TrainingArguments

    short = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_steps": 1}
    stock = TrainingArguments.__init__

    def quiet(self, *args, **kwargs):
        stock(self, *args, **{**kwargs, **short})

    monkeypatch.setattr(TrainingArguments, "__init__", quiet)


@pytest.mark.parametrize("place", BLOCKS)
def test_the_block_of_python_runs(place, tmp_path, monkeypatch, quiet_arguments):
    block = BLOCKS[place]
    if "torch.cuda" in block and not torch.cuda.is_available():
        pytest.skip("the block needs a GPU")
    monkeypatch.chdir(tmp_path)
    names = world(block, tmp_path)
    exec(compile(block, place, "exec"), names)
    if "trainer" in names and "trainer.train()" not in block:
        names["trainer"].train()


def test_every_page_has_a_block_that_runs():
    pages = {place.partition(":")[0] for place in BLOCKS}
    assert {page.name for page in documentation.PAGES if "```python" in page.read_text()} <= pages


def _marked(command):
    return pytest.param(command, marks=[pytest.mark.slow] if "benchmarks/" in command else [])


@pytest.mark.parametrize("command", map(_marked, COMMANDS))
def test_the_command_exists(command):
    """A target of make is known to it, a script takes the options, a selection of benchmarks is not empty."""
    words = shlex.split(command)
    python = {"python": [sys.executable], "pytest": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]}
    if words[0] == "make":
        line = ["make", "-n", *words[1:]]
    elif words[0] == "pytest":
        line = [*python["pytest"], *words[1:], "--collect-only", "-q"]
    elif words[0] == "pip":
        pytest.skip("what pip installs is the build's test")
    else:
        line = [*python["python"], *words[1:], *([] if words[1] == "-m" else ["--help"])]
    done = subprocess.run(line, cwd=documentation.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in (word for word in words if word.startswith("--") and words[0] == "python"):
        assert option in done.stdout
