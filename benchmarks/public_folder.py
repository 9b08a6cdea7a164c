"""What public training scripts ask a hub for, made here: tiny models, data sets and metrics.

Models have random weights. Their vocabulary is learnt, and every data set is cut, from the
docstrings of Python's standard library: nothing is downloaded. A script that wants
`bert-base-cased` or `nyu-mll/glue` finds a folder of this name in its working directory, which
`from_pretrained` and `load_dataset` take for what it is; metrics lie in the cache of `evaluate`.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from datasets import ClassLabel, Dataset, Sequence

VOCABULARY = 8192
SPECIAL = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "<|im_start|>",
    "<|im_end|>",
)
NAMES = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
TOKENS = {name: SPECIAL.index(token) for name, token in NAMES.items()}
# how the tokenizer of a model frames one text, and two; of all other models not at all
FRAMES = {
    "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "t5": ("$A </s>", "$A </s> $B:1 </s>:1"),
    "bart": ("$A </s>", "$A </s> $B:1 </s>:1"),
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SEQ2SEQ = {"decoder_start_token_id": TOKENS["pad_token"]}
BART_WIDTHS = {
    f"{part}_{what}": size
    for part in ("encoder", "decoder")
    for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-llama": ("LlamaForCausalLM", WIDTHS | {"num_key_value_heads": 2}),
    "HuggingFaceTB/SmolLM-360M": ("LlamaForCausalLM", WIDTHS | {"num_key_value_heads": 2}),
    "tiny-qwen2": (
        "Qwen2ForCausalLM",
        WIDTHS | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "tiny-gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "bert-base-cased": ("BertForMaskedLM", WIDTHS),
    "t5-base": (
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4} | SEQ2SEQ,
    ),
    "facebook/bart-base": (
        "BartForConditionalGeneration",
        {"d_model": 64, "forced_eos_token_id": TOKENS["eos_token"]} | BART_WIDTHS | SEQ2SEQ,
    ),
}

METRICS = ("accuracy", "f1", "glue", "rouge", "sacrebleu", "seqeval", "squad", "xnli")
METRIC = '''"""Stands in for a metric of the hub: it loads, and says how many are equal."""

import datasets
import evaluate


class Metric(evaluate.Metric):
    def _info(self):
        each = {name: datasets.Value("int64") for name in ("predictions", "references")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(each))

    def _compute(self, predictions, references):
        equal = sum(a == b for a, b in zip(predictions, references))
        return {"accuracy": equal / max(1, len(predictions))}
'''


def sentences() -> list[str]:
    """Sentences of 4 to 60 words in the docstrings of the standard library, each once."""

    def found() -> Iterator[str]:
        for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="ignore"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = " ".join((ast.get_docstring(node) or "").split())
                    yield from re.split(r"(?<=[.!?]) ", text)

    return list(dict.fromkeys(line for line in found() if 4 <= len(line.split()) <= 60))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def text(a: str, b: str, at: int) -> dict[str, Any]:
    return {"text": f"{a} {b}"}


def labelled(a: str, b: str, at: int) -> dict[str, Any]:
    return {"sentence": a, "label": ("negative", "positive")[at % 2]}


def paraphrase(a: str, b: str, at: int) -> dict[str, Any]:
    return {"sentence1": a, "sentence2": b, "label": at % 2, "idx": at}


def inference(a: str, b: str, at: int) -> dict[str, Any]:
    return {"premise": a, "hypothesis": b, "label": at % 3}


def tagged(a: str, b: str, at: int) -> dict[str, Any]:
    words = a.split()
    return {"tokens": words, "ner_tags": [len(word) % 3 for word in words]}


def question(a: str, b: str, at: int) -> dict[str, Any]:
    answer = {"text": [b], "answer_start": [len(a) + 1]}
    return {
        "id": str(at),
        "title": "",
        "context": f"{a} {b}",
        "question": " ".join(b.split()[:4]) + "?",
        "answers": answer,
    }


def summary(a: str, b: str, at: int) -> dict[str, Any]:
    return {"text": f"{a} {b}", "summary": b}


def translation(a: str, b: str, at: int) -> dict[str, Any]:
    return {"translation": {"en": a, "ro": b}}


def choice(a: str, b: str, at: int) -> dict[str, Any]:
    words = b.split()
    endings = {f"ending{i}": " ".join(words[i:] + words[:i]) for i in range(4)}
    return {"sent1": a, "sent2": words[0], **endings, "label": at % 4}


def conversation(a: str, b: str, at: int) -> dict[str, Any]:
    return {"messages": [turn("user", a), turn("assistant", b)]}


def preference(a: str, b: str, at: int) -> dict[str, Any]:
    asked, wrong = turn("user", a), " ".join(reversed(b.split()))
    return {
        "chosen": [asked, turn("assistant", b)],
        "rejected": [asked, turn("assistant", wrong)],
    }


def judged(a: str, b: str, at: int) -> dict[str, Any]:
    return {
        "prompt": [turn("user", a)],
        "completion": [turn("assistant", b)],
        "label": at % 2 == 0,
    }


def prompt(a: str, b: str, at: int) -> dict[str, Any]:
    return {"prompt": [turn("user", a)], "solution": str(at)}


def instruction(a: str, b: str, at: int) -> dict[str, Any]:
    return {"instruction": a, "input": "", "output": b}


def asked(a: str, b: str, at: int) -> dict[str, Any]:
    return {"query": a, "response": b}


# A name that ends in .json is a file of JSON lines, any other a folder with a file for a split, as
# `load_dataset(name)` or, for "folder:configuration", `load_dataset(folder, configuration)` asks.
DATA: dict[str, Callable[[str, str, int], dict[str, Any]]] = {
    "text.json": text,
    "labelled.json": labelled,
    "summary.json": summary,
    "translation.json": translation,
    "choice.json": choice,
    "Salesforce/wikitext:wikitext-2-v1": text,
    "nyu-mll/glue:mrpc": paraphrase,
    "glue:mrpc": paraphrase,
    "xnli:en": inference,
    "tagged": tagged,
    "squad": question,
    "trl-lib/Capybara": conversation,
    "trl-lib/ultrafeedback_binarized": preference,
    "trl-lib/kto-mix-14k": judged,
    "prompts": prompt,
    "timdettmers/openassistant-guanaco": text,
    "yahma/alpaca-cleaned": instruction,
    "meta-math/MetaMathQA": asked,
}
LABELS = {
    "nyu-mll/glue:mrpc": ("label", ClassLabel(names=["not_equivalent", "equivalent"])),
    "glue:mrpc": ("label", ClassLabel(names=["not_equivalent", "equivalent"])),
    "xnli:en": ("label", ClassLabel(names=["entailment", "neutral", "contradiction"])),
    "tagged": ("ner_tags", Sequence(ClassLabel(names=["O", "B-WORD", "I-WORD"]))),
}
SPLITS = {"train": 500, "validation": 24, "test": 24}


class PublicFolder:
    """The working directory of public scripts. `provide` makes in it what one of them loads."""

    def __init__(self, path: Path):
        self.path = path
        self.lines = sentences()
        (path / "nltk_data" / "tokenizers" / "punkt").mkdir(parents=True)  # asked for, not read
        for metric in METRICS:
            self._write_metric(metric)

    @property
    def environment(self) -> dict[str, str]:
        """What a script's process needs, beside this working directory, to stay offline."""
        return {
            "HF_HOME": str(self.path / "cache"),
            "NLTK_DATA": str(self.path / "nltk_data"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "WANDB_DISABLED": "true",
        }

    def provide(self, name: str) -> None:
        """Make the model or the data set of this name, if it is not here yet."""
        if name in MODELS:
            self._make_model(name)
        else:
            self._make_data(name)

    def _make_model(self, name: str) -> None:
        where = self.path / name
        if where.exists():
            return
        of, options = MODELS[name]
        made = getattr(transformers, of)
        ids = {f"{token}_id": TOKENS[token] for token in ("pad_token", "bos_token", "eos_token")}
        torch.manual_seed(0)
        model = made(made.config_class(vocab_size=VOCABULARY, **ids, **options))
        model.save_pretrained(where)
        frames = FRAMES.get(model.config.model_type, ("$A", "$A $B:1"))
        self._tokenizer(*frames).save_pretrained(where)

    def _tokenizer(self, single: str, pair: str) -> transformers.PreTrainedTokenizerFast:
        backend = tokenizers.Tokenizer.from_str(self._learnt)
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=single,
            pair=pair,
            special_tokens=[(token, SPECIAL.index(token)) for token in SPECIAL],
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, model_max_length=512, chat_template=CHAT, **NAMES
        )

    @cached_property
    def _learnt(self) -> str:
        """A byte-level BPE of all sentences, as JSON."""
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(self.lines, trainer)
        return tokenizer.to_str()

    def _make_data(self, name: str) -> None:
        folder, _, configuration = name.partition(":")
        where = self.path / folder
        if where.exists():
            return
        where.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            self._rows(name, "train").to_json(where)
            return
        for split in SPLITS:
            self._rows(name, split).to_parquet(where / configuration / f"{split}.parquet")
        if configuration:
            files = "".join(
                f"  - split: {split}\n    path: {configuration}/{split}.parquet\n"
                for split in SPLITS
            )
            head = f"configs:\n- config_name: {configuration}\n  data_files:\n{files}"
            (where / "README.md").write_text(f"---\n{head}---\n")

    def _rows(self, name: str, split: str) -> Dataset:
        first = list(SPLITS).index(split) * 1000
        pairs = ((self.lines[i], self.lines[i + 1]) for i in range(first, first + SPLITS[split]))
        rows = Dataset.from_list([DATA[name](a, b, at) for at, (a, b) in enumerate(pairs)])
        return rows.cast_column(*LABELS[name]) if name in LABELS else rows

    def _write_metric(self, name: str) -> None:
        modules = self.path / "cache" / "modules" / "evaluate_modules" / "metrics"
        where = modules / f"evaluate-metric--{name}" / f"{0:064}" / f"{name}.py"
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(METRIC)
