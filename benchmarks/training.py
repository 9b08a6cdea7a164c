"""One training with Trainer on random documents: stock, with Liger, with fastft. The losses must be
the same.

python benchmarks/training.py --variant stock|liger|fastft [--ledger FILE]

On a GPU a Llama 3.2 1B from random weights, in fp32 under bf16 autocast as Trainer's `bf16=True`
has it, 8 documents a step; on a CPU a tiny one in fp32. Prints a line of JSON: each step's loss,
tokens a second from the fourth step on, and the peak of memory that the device has allocated (on a
CPU, that the process has held). Who has FILE finds it there too, as case `training[<variant>]` of
part `train`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import fastft

VARIANTS = ("stock", "fastft", "liger")
GPU = torch.cuda.is_available()
BATCH, WARM, PAD = 8, 3, 0
STEPS, LONGEST = (16, 1024) if GPU else (6, 48)
# of a step's loss: bf16 autocast rounds at 4e-3, and differences grow
TOLERANCE = 2e-2 if GPU else 1e-4


def documents() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(LONGEST // 8, LONGEST + 1, (BATCH * STEPS,), generator=generator)
    vocabulary = _config().vocab_size
    # tokens follow a pattern, so that there is something to learn
    texts = [
        (torch.arange(n) * 7 + 11 * i) % (vocabulary // 4) + 1
        for i, n in enumerate(lengths.tolist())
    ]
    return [{"input_ids": text.tolist(), "labels": text.tolist()} for text in texts]


def _config() -> LlamaConfig:
    if not GPU:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        return LlamaConfig(vocab_size=1003, max_position_embeddings=LONGEST, **sizes)
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    }
    sizes |= {"num_key_value_heads": 8, "max_position_embeddings": LONGEST, "vocab_size": 128_256}
    return LlamaConfig(tie_word_embeddings=True, **sizes)


def padded(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """The batch of stock Trainer, one document a row."""
    longest = max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), longest)
    batch = {"input_ids": torch.full(shape, PAD), "labels": torch.full(shape, -100)}
    batch["attention_mask"] = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        for key, tensor in batch.items():
            tensor[row, :length] = 1 if key == "attention_mask" else torch.tensor(example[key])
    return batch


class Recorder(TrainerCallback):
    """Each step's loss, and the time from the end of the last warm step to the end of training."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.began = self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM:
            self.began = self._now()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = self._now() - self.began

    def _now(self) -> float:
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter()


class Counting:
    """Counts the tokens of each batch that it collates."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.tokens = collator, list[int]()

    def __call__(self, examples: list[dict[str, list[int]]]) -> Any:
        self.tokens.append(sum(len(example["input_ids"]) for example in examples))
        return self.collator(examples)


def train(variant: str) -> dict[str, Any]:
    """Losses, tokens a second and peak MiB."""
    ours = variant == "fastft"
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            bf16=GPU,
            use_cpu=not GPU,
            use_liger_kernel=variant == "liger",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        set_seed(0)
        with torch.device("cuda" if GPU else "cpu"):
            model = LlamaForCausalLM(_config())
        if ours:
            model.set_attn_implementation("fastft")
        recorder, collator = Recorder(), Counting(fastft.PackingCollator() if ours else padded)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=documents(),
            data_collator=collator,
            optimizers=fastft.adamw(model, args) if ours else (None, None),
            callbacks=[recorder, *([fastft.FusedLossCallback()] if ours else [])],
        )
        trainer.train()
    peak = (
        torch.cuda.max_memory_allocated()
        if GPU
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    tokens = sum(collator.tokens[WARM:STEPS])
    return {
        "losses": recorder.losses,
        "tokens_per_second": round(tokens / recorder.seconds, 1),
        "peak_mib": round(peak / 2**20, 1),
    }


def missing(variant: str) -> str | None:
    """Why a variant cannot be trained here."""
    if variant == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not importable"
    return None


def disagreement(losses: list[float], stock: list[float]) -> str:
    """Where losses are not stock's; "" if they are."""
    if len(losses) != len(stock):
        return f"{len(losses)} losses, stock has {len(stock)}"
    off = [abs(mine - theirs) / abs(theirs) for mine, theirs in zip(losses, stock, strict=True)]
    worst = max(range(len(off)), key=off.__getitem__)
    if off[worst] <= TOLERANCE:
        return ""
    return f"the loss of step {worst + 1} is {losses[worst]:.6g}, stock's {stock[worst]:.6g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--ledger", type=Path, help="a file that lines of JSON are appended to")
    options = parser.parse_args()
    case = f"training[{options.variant}]"
    ledger = Ledger(options.ledger) if options.ledger else None
    stock = ledger.cases("train").get("training[stock]", {}).get("found") if ledger else None
    if ledger:
        ledger.append(part="train", case=case, outcome="begun")
    began, reason = time.monotonic(), missing(options.variant)
    found = {} if reason else train(options.variant)
    print(json.dumps(found or {"skipped": reason}))
    wrong = disagreement(found["losses"], stock["losses"]) if stock and found else ""
    if ledger:
        outcome = "skipped" if reason else "failed" if wrong else "passed"
        said = {"said": reason or wrong} if reason or wrong else {}
        ledger.append(
            part="train",
            case=case,
            outcome=outcome,
            seconds=round(time.monotonic() - began, 1),
            found=found,
            **said,
        )
    if wrong:
        raise SystemExit(wrong)


if __name__ == "__main__":
    main()
