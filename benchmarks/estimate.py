"""What `python -m fastft estimate` says, against forty trainings of small models on this CPU.

python benchmarks/estimate.py [--only N ...]

Each training is Trainer's, two steps and an evaluation. *Counted* is the peak of live tensor bytes
that a dispatch mode sees in it (fastft/live_memory.py), weights included; *estimated* is what the
same training says by shapes alone, before it (fastft/unallocated.py). *Process* is what the process
held at its peak above what it held before: it also has the memory of kernels and of the allocator,
and pages of the libraries that are used for the first time. Writes results/estimate.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import transformers
from memory import memory
from transformers import AutoConfig, PreTrainedConfig

from fastft.integrations.estimated_training import Memory, Training, measure
from fastft.live_memory import LiveMemory, Peak
from fastft.unallocated import Unallocated

RESULT = Path(__file__).resolve().parent / "results" / "estimate.md"
STOCK: tuple[str, ...] = ()
LOSS, ADAMW, PACKING = ("loss",), ("optimizer",), ("packing",)
ALL = ("loss", "optimizer", "packing")
HALF = {"rows": 4, "tokens": 256, "padding": 0.5}
BF16 = {"dtype": "bf16"}

_SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 6, "vocab_size": 8003}
_GROUPED = {"num_key_value_heads": 2}
_BART = {
    "vocab_size": 8003,
    "d_model": 192,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
}
_T5 = {"vocab_size": 8003, "d_model": 192, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 6}
# model type: class and sizes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _SIZES | _HEADS | _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", _SIZES | _HEADS | _GROUPED | {"head_dim": 32}),
    "gemma2": (
        "Gemma2ForCausalLM",
        _SIZES | _HEADS | _GROUPED | {"head_dim": 32, "sliding_window": 64},
    ),
    "mixtral": ("MixtralForCausalLM", _SIZES | _HEADS | _GROUPED | {"num_local_experts": 4}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 8003, "n_embd": 192, "n_layer": 2, "n_head": 6}),
    "bert": ("BertForMaskedLM", _SIZES | _HEADS),
    "distilbert": (
        "DistilBertForTokenClassification",
        {"vocab_size": 8003, "dim": 192, "n_layers": 2, "n_heads": 6, "hidden_dim": 512},
    ),
    "electra": ("ElectraForSequenceClassification", _SIZES | _HEADS | {"embedding_size": 64}),
    "bart": ("BartForConditionalGeneration", _BART),
    "t5": ("T5ForConditionalGeneration", _T5 | {"decoder_start_token_id": 0}),
}
RUNS: list[tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ("llama", {}, {"rows": 2, "tokens": 512}, STOCK),
    ("llama", {}, {"rows": 2, "tokens": 512}, LOSS),
    ("llama", {}, HALF, STOCK),
    ("llama", {}, HALF, LOSS),
    ("llama", {}, HALF, ADAMW),
    ("llama", {}, HALF, PACKING),
    ("llama", {}, HALF, ALL),
    ("llama", {}, HALF | {"moments": "bf16"}, ADAMW),
    ("llama", {}, HALF | {"moments": "8bit"}, ADAMW),
    ("llama", {}, HALF | BF16, STOCK),
    ("llama", {}, HALF | BF16 | {"rounding": "exact"}, ALL),
    ("llama", {}, HALF | BF16 | {"rounding": "kahan", "moments": "bf16"}, ALL),
    ("llama", {}, HALF | BF16 | {"rounding": "stochastic", "moments": "8bit"}, ALL),
    ("llama", {}, HALF | {"autocast": True}, STOCK),
    ("llama", {}, HALF | {"autocast": True}, ALL),
    ("llama", {"num_hidden_layers": 6}, {"tokens": 512}, STOCK),
    ("llama", {"num_hidden_layers": 6}, {"tokens": 512, "checkpointing": True}, STOCK),
    ("llama", {"num_hidden_layers": 6}, {"tokens": 512, "checkpointing": True}, ALL),
    ("llama", {}, HALF | {"accumulation": 2}, STOCK),
    ("llama", {}, HALF | {"accumulation": 2}, ALL),
    ("llama", {}, HALF | {"lora": 8}, STOCK),
    ("llama", {}, HALF | BF16 | {"lora": 8, "checkpointing": True}, ALL),
    ("llama", {}, HALF | {"label_smoothing": 0.1}, STOCK),
    ("llama", {}, {"rows": 2, "tokens": 512, "label_smoothing": 0.1}, LOSS),
    ("llama", {"vocab_size": 32003, "tie_word_embeddings": True}, {"tokens": 512}, STOCK),
    ("llama", {"vocab_size": 32003, "tie_word_embeddings": True}, {"tokens": 512}, LOSS),
    ("llama", {}, {"tokens": 1024, "attention": "eager"}, STOCK),
    ("llama", {}, HALF | {"optim": "adamw_torch"}, STOCK),
    ("qwen3", {}, HALF, ALL),
    ("gemma2", {}, HALF, STOCK),
    ("gemma2", {}, HALF, ALL),
    ("mixtral", {}, HALF, STOCK),
    ("mixtral", {}, HALF, ALL),
    ("gpt2", {}, HALF, STOCK),
    ("bert", {}, HALF, STOCK),
    ("bert", {}, HALF, ALL),
    ("distilbert", {}, HALF, STOCK),
    ("electra", {}, HALF, ADAMW),
    ("bart", {}, HALF, LOSS),
    ("t5", {}, HALF, ALL),
]


def config_of(kind: str, changes: dict[str, Any]) -> PreTrainedConfig:
    """A small configuration of a model type."""
    architecture, sizes = MODELS[kind]
    config: PreTrainedConfig = AutoConfig.for_model(kind, **{**sizes, "pad_token_id": 0, **changes})
    config.architectures = [architecture]
    return config


def run(number: int) -> tuple[Memory, Memory, int]:
    """One training, estimated and carried out, in a process of its own."""
    kind, changes, options, pieces = RUNS[number]
    training = Training(config_of(kind, changes), **options)
    estimated = measure(training, frozenset(pieces), Unallocated())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    counted = measure(training, frozenset(pieces), LiveMemory())
    process = 1024 * (memory("VmHWM") - before)
    return estimated, counted, process


def words(changes: dict[str, Any], options: dict[str, Any]) -> str:
    """What is particular about a run."""
    options = {"rows": 1, **options}
    shape = f"{options.pop('rows')} x {options.pop('tokens')} tokens"
    padding = options.pop("padding", 0)
    parts = [shape, *([f"{padding:.0%} padding"] if padding else [])]
    return ", ".join(
        [*parts, *(f"{name}={value}" for name, value in {**changes, **options}.items())]
    )


def _pair(estimated: Peak, counted: Peak) -> tuple[str, float]:
    off = 100 * (estimated.bytes / counted.bytes - 1)
    return f"{estimated.bytes / 2**20:.2f} | {counted.bytes / 2**20:.2f} | {off:+.2f} %", abs(off)


def _line(number: int, estimated: Memory, counted: Memory, process: int, offs: list[float]) -> str:
    """A run's row of the table; its errors go into `offs`."""
    kind, changes, options, pieces = RUNS[number]
    step, off_step = _pair(estimated.training, counted.training)
    evaluation, off_evaluation = _pair(estimated.evaluation, counted.evaluation)
    offs += [off_step, off_evaluation]
    return (
        f"| {number + 1} | {kind} | {words(changes, options)} | {' + '.join(pieces) or 'stock'} "
        f"| {step} | {process / 2**20:.0f} | {evaluation} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="+", help="numbers of runs; writes nothing")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    # what a training imports is imported once, for all that are forked
    measure(Training(config_of("llama", {}), tokens=8), frozenset(ALL), Unallocated())
    lines, offs = [], list[float]()
    fork = multiprocessing.get_context("fork")  # nothing is imported anew
    chosen = options.only or range(len(RUNS))
    with fork.Pool(options.jobs, maxtasksperchild=1) as pool:
        for number, found in zip(chosen, pool.imap(run, chosen), strict=True):
            lines.append(_line(number, *found, offs))
            print(lines[-1], flush=True)
    summary = f"Mean error {sum(offs) / len(offs):.2f} %, worst {max(offs):.2f} %."
    print(json.dumps({"mean": sum(offs) / len(offs), "worst": max(offs)}))
    if options.only is None:
        head = [
            "| | model | training | fastft | step: estimated | counted | off | process "
            "| evaluation: estimated | counted | off |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        text = "\n\n".join((__doc__ or "").split("\n\n")[2:]).strip()
        page = ["# Estimates of memory", "`python benchmarks/estimate.py`", text, f"{summary} MiB:"]
        RESULT.write_text("\n\n".join([*page, "\n".join([*head, *lines])]) + "\n")


if __name__ == "__main__":
    main()
