"""Where a training step's time goes on a CPU: torch's profiler, by parts of the model.

    python benchmarks/profile_step.py demo --to FOLDER
    python benchmarks/profile_step.py smollm2 --variants stock fastft --steps 3 --to FOLDER

Workloads and variants are those of whole_runs.py. Each operation belongs to the innermost module
that is running, or in backward to the one that ran when its forward operation did (autograd's
sequence numbers say so); what is left of a step is Python, Trainer and accelerate. In the same
process the model's own products are then done alone, as often and with the same shapes, by torch's
mm into memory that is there, and by fastft's kernel where it is ahead: the bare work of a step.

Writes profile_<workload>.json and .md to FOLDER.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from whole_runs import VARIANTS, WORKLOADS, Workload, described, grid, trainer_of

from fastft.foreign.models import base_model, output_embeddings
from fastft.layers import matrix_product

PARTS = ["linear layers", "attention", "norms", "rotary", "activation", "embedding"]
PARTS += ["head and loss", "model, between its layers"]
OTHERS = ["optimizer", "clipping", "batches", "Trainer, accelerate, Python"]
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "fastft::matrix_product"}


def part_of(module: nn.Module, head: nn.Module | None) -> str | None:
    """The part that a module's own operations belong to; None: that of the module around it."""
    name = type(module).__name__
    if module is head:
        return "head and loss"
    if isinstance(module, nn.Linear):
        return "linear layers"
    kinds = {
        "Norm": "norms",
        "Rotary": "rotary",
        "Attention": "attention",
        "Embedding": "embedding",
    }
    kinds |= {"SiLU": "activation", "MLP": "activation"}
    return next((part for kind, part in kinds.items() if kind in name), None)


def mark(model: nn.Module) -> None:
    """Makes the profiler know which part runs."""
    base = base_model(model)
    head = output_embeddings(base)
    for module in base.modules():
        part = part_of(module, head)
        if part is not None or module is base:
            _mark(module, part or "head and loss")  # what the model does outside of its body
    _mark(base.base_model, "model, between its layers")


def _mark(module: nn.Module, part: str) -> None:
    running: list[Any] = []

    def begin(*_: Any) -> None:
        running.append(record_function(f"part: {part}"))
        running[-1].__enter__()

    def end(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end)


class Watch(TrainerCallback):
    """Profiles the steps behind the warm ones."""

    def __init__(self, trainer: Any, warm: int) -> None:
        self.warm = warm
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.began = self.seconds = 0.0
        clip = trainer.accelerator.clip_grad_norm_

        def clipping(*args: Any, **kwargs: Any) -> Any:
            with record_function("part: clipping"):
                return clip(*args, **kwargs)

        trainer.accelerator.clip_grad_norm_ = clipping

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warm:
            self.profile.start()
            self.began = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.began
        self.profile.stop()


def seconds_by_part(events: Any) -> dict[tuple[str, str], float]:
    """(part, "forward" or "backward" or "") -> seconds, of a profile's events."""
    parts_by_number: dict[int, str] = {}
    for event in events:
        part = _part_around(event)
        if part is not None and event.sequence_nr >= 0 and not _is_backward(event):
            parts_by_number.setdefault(event.sequence_nr, part)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        if event.thread != events[0].thread and not _node(event):
            continue
        node, own = _node(event), event.self_cpu_time_total / 1e6
        if node is not None:
            seconds[parts_by_number.get(node.sequence_nr, "head and loss"), "backward"] += own
            continue
        part = _part_around(event)
        if part is not None:
            seconds[part, "" if part in OTHERS else "forward"] += own
    return seconds


def _part_around(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith("part: "):
            return str(event.name.removeprefix("part: "))
        if event.name.startswith("Optimizer.step#"):
            return "optimizer"
        if event.name.startswith("enumerate(DataLoader)#"):
            return "batches"
        event = event.cpu_parent
    return None


def _node(event: Any) -> Any:
    """The node of autograd's graph that an event of backward belongs to."""
    while event is not None:
        if _is_backward(event):
            return event
        event = event.cpu_parent
    return None


def _is_backward(event: Any) -> bool:
    return bool(event.name.startswith("autograd::engine::evaluate_function: "))


def products_alone(events: Any) -> dict[str, float]:
    """Seconds of the profile's products of matrices, done alone into memory that is there."""
    shapes = Counter(
        _shape(event) for event in events if event.name in _PRODUCTS and _shape(event) is not None
    )
    ways: dict[str, Callable[..., Any]] = {"mm": torch.mm}
    if matrix_product.is_ahead():
        ways["fastft's kernel"] = lambda a, b, out: matrix_product.PRODUCT.native(out, a, b, False)
    total = dict.fromkeys(ways, 0.0)
    for shape, count in shapes.items():
        assert shape is not None
        rows, inner, columns = shape
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        out = torch.empty(rows, columns)
        for name, way in ways.items():
            took = []
            for _ in range(5):
                began = time.perf_counter()
                way(a, b, out=out)
                took.append(time.perf_counter() - began)
            total[name] += count * statistics.median(took)
    return total


def _shape(event: Any) -> tuple[int, int, int] | None:
    shapes = [shape for shape in event.input_shapes if len(shape) == 2]
    if event.name.startswith(("aten::addmm", "fastft::")):  # a sum, or the result, comes first
        shapes = shapes[1:]
    if len(shapes) < 2:
        return None
    (rows, inner), other = shapes[:2]
    return rows, inner, other[1]


def measure(name: str, workload: Workload, steps: int, warm: int) -> dict[str, Any]:
    """Milliseconds a step, by part."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, recorder = trainer_of(VARIANTS[name], workload, warm + steps, folder)
        mark(trainer.model)
        watch = Watch(trainer, warm)
        trainer.add_callback(watch)
        trainer.train()
    events = watch.profile.events()
    seconds = seconds_by_part(events)
    rest = watch.seconds - sum(seconds.values())
    seconds["Trainer, accelerate, Python", ""] += rest
    per_step = 1e3 / steps
    return {
        "name": VARIANTS[name].name,
        "step_ms": round(per_step * watch.seconds, 1),
        "tokens": sum(recorder.run.tokens[warm : warm + steps]) // steps,
        "parts_ms": {" ".join(k).strip(): round(per_step * s, 2) for k, s in seconds.items()},
        "bare_products_ms": {
            way: round(per_step * s, 1) for way, s in products_alone(events).items()
        },
    }


def page(results: dict[str, Any]) -> str:
    runs = list(results["runs"].values())
    body = []
    for part in [*PARTS, *OTHERS]:
        for way in [""] if part in OTHERS else ["forward", "backward"]:
            key = f"{part} {way}".strip()
            found = [run["parts_ms"].get(key, 0.0) for run in runs]
            if any(found):
                shares = [
                    f"{ms:,.1f} ({ms / run['step_ms']:.0%})"
                    for ms, run in zip(found, runs, strict=True)
                ]
                body.append([key, *shares])
    body.append(["**a step**", *[f"**{run['step_ms']:,.1f}**" for run in runs]])
    for way, words in {"mm": "torch.mm", "fastft's kernel": "fastft's kernel"}.items():
        if all(way in run["bare_products_ms"] for run in runs):
            times = [f"{run['bare_products_ms'][way]:,.1f}" for run in runs]
            body.append([f"bare work: its products alone, {words}", *times])
    head = ["milliseconds a step (share)", *[run["name"] for run in runs]]
    lines = [f"# Where a step's time goes: {results['title']}", ""]
    lines += [f"`{results['command']}`, {results['date']}. {described()}", "", *grid(head, body)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=6, help="profiled (6)")
    parser.add_argument("--warm", type=int, default=4, help="steps before these (4)")
    parser.add_argument("--to", type=Path, required=True, help="the folder of the results")
    options = parser.parse_args()
    names = options.variants or ["stock", "torchs_products", "fastft"]
    context, runs = multiprocessing.get_context("forkserver"), {}
    with tempfile.TemporaryDirectory() as folder:
        workload = WORKLOADS[options.workload](Path(folder))
        for name in (each for each in names if VARIANTS[each].missing() is None):
            with ProcessPoolExecutor(1, mp_context=context) as process:
                runs[name] = process.submit(
                    measure, name, workload, options.steps, options.warm
                ).result()
    results = {
        "title": workload.title,
        "command": " ".join(["python", "benchmarks/profile_step.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine.facts(),
        "runs": runs,
    }
    options.to.mkdir(parents=True, exist_ok=True)
    name = f"profile_{options.workload}"
    (options.to / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.to / f"{name}.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
