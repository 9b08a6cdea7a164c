"""Real text that every machine has: the functions of Python's own standard library, as prompt and
completion.

The prompt is a function's signature and docstring, the completion its body; the labels of the
prompt are masked. The tokenizer is a byte-level BPE trained on the same sources in a few seconds.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"
IGNORED = -100
_SKIPPED = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}


def sources() -> list[str]:
    """The texts of the standard library's modules, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts)
    )
    return [path.read_text(errors="ignore") for path in paths]


def functions(source: str) -> Iterator[tuple[str, str]]:
    """Yields (signature and docstring, body) of each documented function of a module."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            docstring_end = node.body[0].end_lineno
            yield (
                "".join(lines[node.lineno - 1 : docstring_end]),
                "".join(lines[docstring_end : node.end_lineno]),
            )


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def load(
    vocab_size: int, max_tokens: int
) -> tuple[PreTrainedTokenizerFast, list[dict[str, list[int]]]]:
    """The tokenizer and all examples, cut to `max_tokens` tokens, which have a label left."""
    texts = sources()
    tokenizer = train_tokenizer(texts, vocab_size)
    prompts, completions = zip(*(pair for text in texts for pair in functions(text)), strict=True)
    examples = []
    for prompt, completion in zip(
        *(tokenizer(list(part))["input_ids"] for part in (prompts, completions)), strict=True
    ):
        input_ids = [*prompt, *completion, tokenizer.eos_token_id][:max_tokens]
        labels = [IGNORED] * len(prompt) + input_ids[len(prompt) :]
        if len(labels) == len(input_ids):  # else the cut left the prompt alone
            examples.append({"input_ids": input_ids, "labels": labels})
    return tokenizer, examples
