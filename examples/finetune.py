"""Fine-tunes one model with stock Trainer and with fastft, from the same seed, and shows what each
piece brings.

    python examples/finetune.py                               a small Llama on Python's own library
    python examples/finetune.py --model NAME --dataset NAME   a model and a text data set of the hub

Every run takes the same examples in the same batches, so their losses must coincide step by step.
Each runs in a process of its own, so that its peak memory is its own. The table, report.json and
report.png go to the folder of --output.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from report import plot, print_table
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import fastft

VOCABULARY = 16_384
SLOW_IMPORTS = [
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "fastft.integrations.fused_loss",
    "matplotlib.pyplot",
    "rich.progress",
]


@dataclass
class Variant:
    name: str
    loss: bool = False
    optimizer: bool = False
    packing: bool = False


VARIANTS = [
    Variant("stock Trainer"),
    Variant("fastft", loss=True, optimizer=True, packing=True),
    Variant("only the loss", loss=True),
    Variant("only AdamW", optimizer=True),
    Variant("only packing", packing=True),
]


@dataclass
class Result:
    name: str
    losses: list[float]
    seconds: float
    tokens: int
    padding: float  # share of the positions that the model computed
    peak_bytes: int  # above what the process held before it built the model

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Recorder(TrainerCallback):
    """Keeps every step's loss and draws a progress bar."""

    def __init__(self, name: str, steps: int) -> None:
        self.losses: list[float] = []
        columns = (
            TextColumn(f"{name:>14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
        )
        self.progress = Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True))
        self.task = self.progress.add_task("", total=steps, loss=float("nan"))

    def on_train_begin(self, *args, **kwargs) -> None:
        self.progress.start()
        self.start = time.perf_counter()

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.progress.update(self.task, completed=state.global_step, loss=logs["loss"])

    def on_train_end(self, *args, **kwargs) -> None:
        self.seconds = time.perf_counter() - self.start
        self.progress.stop()


class CountingCollator:
    """Counts the positions and the tokens of the batches that it passes on."""

    def __init__(self, collator) -> None:
        self.data_collator, self.tokens, self.positions = collator, 0, 0

    def __call__(self, examples):
        batch = self.data_collator(examples)
        self.tokens += sum(len(example["input_ids"]) for example in examples)
        self.positions += batch["input_ids"].numel()
        return batch


def build_model(name: str | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    shape = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=2048,
            pad_token_id=tokenizer.pad_token_id,
            **shape,
        )
    )


def load_data(
    options: argparse.Namespace,
) -> tuple[PreTrainedTokenizerBase, list[dict[str, list[int]]]]:
    if options.dataset is None:
        import stdlib_text

        return stdlib_text.load(VOCABULARY, options.max_tokens)
    from datasets import load_dataset

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_dataset(options.dataset, split=f"train[:{options.steps * options.batch_size}]")
    texts = tokenizer(
        list(rows[options.text_column]), truncation=True, max_length=options.max_tokens
    )["input_ids"]
    return tokenizer, [{"input_ids": ids, "labels": ids} for ids in texts if ids]


def train(
    variant: Variant,
    options: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    examples: list,
) -> Result:
    on_gpu = torch.cuda.is_available() and not options.cpu
    args = TrainingArguments(
        str(options.output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.steps // 10,
        optim="adamw_torch_fused",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        seed=options.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    # what every Trainer imports on its way (accelerate's engines, loggers) is none of its peak
    Trainer(nn.Linear(1, 1), args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    set_seed(options.seed)
    model = build_model(options.model, tokenizer)
    padding = DataCollatorForSeq2Seq(tokenizer)  # pads labels too; needs no encoder
    collator = CountingCollator(fastft.PackingCollator() if variant.packing else padding)
    recorder = Recorder(variant.name, options.steps)
    callbacks = [fastft.FusedLossCallback()] if variant.loss else []
    if variant.packing and not variant.loss:  # the other one does this too
        callbacks = [fastft.PackingCallback()]
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=examples,
        data_collator=collator,
        optimizers=fastft.adamw(model, args) if variant.optimizer else (None, None),
        callbacks=[recorder, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    padding_share = 1 - collator.tokens / collator.positions
    return Result(
        variant.name, recorder.losses, recorder.seconds, collator.tokens, padding_share, peak
    )


def agreement(results: list[Result], tolerance: float) -> list[dict]:
    """How far each run's losses are from stock Trainer's, as the largest relative difference of any
    step."""
    stock, rows = results[0], []
    for result in results[1:]:
        difference = max(
            abs(a - b) / abs(b) for a, b in zip(result.losses, stock.losses, strict=True)
        )
        rows.append(
            {
                "name": result.name,
                "largest_difference": difference,
                "agrees": difference <= tolerance,
            }
        )
    return rows


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        help="a causal language model of the hub or a folder; default: a small Llama, made here",
    )
    parser.add_argument(
        "--dataset",
        help="a text data set of the hub; needs --model; default: Python's standard library",
    )
    parser.add_argument(
        "--text-column", default="text", help="the column of --dataset (default: text)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=320, help="longer examples are cut (default: 320)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="examples per step (default: 8)")
    parser.add_argument(
        "--steps", type=int, default=16, help="optimizer steps of each run (default: 16)"
    )
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="do not use the GPU")
    parser.add_argument(
        "--output", type=Path, default=Path("out/demo"), help="folder (default: out/demo)"
    )
    options = parser.parse_args()
    if options.dataset and not options.model:
        parser.error("--dataset needs --model, whose tokenizer it is read with")
    if options.model and not options.dataset:
        parser.error("--model needs --dataset")
    return options


def main() -> None:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    print("Preparing the data ...", flush=True)
    tokenizer, examples = load_data(options)
    lengths = [len(example["input_ids"]) for example in examples]
    print(
        f"{len(examples)} examples, {sum(lengths)} tokens, median {statistics.median(lengths):.0f} "
        f"a piece\n",
        flush=True,
    )
    # a fork server imports once what takes seconds and holds no tensors: every run starts from the
    # same small process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    results = []
    for variant in VARIANTS:
        with ProcessPoolExecutor(1, mp_context=context) as process:
            results.append(process.submit(train, variant, options, tokenizer, examples).result())
    on_gpu = torch.cuda.is_available() and not options.cpu
    # bf16 autocast rounds at 4e-3; fp32 differences grow from 1e-7 over the steps
    tolerance = 2e-2 if on_gpu else 1e-4
    rows = agreement(results, tolerance)
    print_table(results, rows, tolerance)
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    report = {
        "device": device,
        "torch": torch.__version__,
        "fastft": fastft.__version__,
        "agreement": rows,
    }
    report["runs"] = [
        {**asdict(result), "tokens_per_second": result.tokens_per_second} for result in results
    ]
    (options.output / "report.json").write_text(json.dumps(report, indent=1))
    plot(results, options.output / "report.png", device)
    print(f"\nWritten: {options.output / 'report.json'}, {options.output / 'report.png'}")
    if not all(row["agrees"] for row in rows):
        raise SystemExit("The losses do not agree: please report this with report.json.")


if __name__ == "__main__":
    main()
