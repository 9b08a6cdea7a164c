"""Peak memory of one training step of Trainer, stock and with the fused loss, each in a process of its own.

python benchmarks/memory.py --machine cpu

A one-layer Llama with H=512 and V=128256 (tied embeddings) takes one step over T=4096 tokens in fp32 on the CPU, with
Trainer's own AdamW. Counted is what the process holds at its peak above what it held before `train()`: the model
(262 MB) is in neither, gradients and optimizer states are in both. Writes results/<machine>-memory.json and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
T, H, V = 4096, 512, 128256
VARIANTS = ("stock", "fused")


def step(variant: str) -> dict:
    """Runs in a fresh process: peak memory only grows."""
    import resource

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    import fastft

    torch.manual_seed(0)
    sizes = {"hidden_size": H, "intermediate_size": 2 * H, "num_hidden_layers": 1, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=T, tie_word_embeddings=True, **sizes))
    ids = torch.randint(0, V, (T,))
    callback = fastft.FusedLossCallback()
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
        args = TrainingArguments(folder, max_steps=1, per_device_train_batch_size=1, use_cpu=True, **quiet)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=[{"input_ids": ids, "labels": ids}],
            callbacks=[callback] if variant == "fused" else [],
        )
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if variant == "fused":
        assert callback.report.fused == 1, callback.report
    return {
        "peak_mib": round(peak / 1024, 1),
        "seconds": round(seconds, 2),
        "loss": trainer.state.log_history[0]["loss"],
    }


def run(variant: str) -> dict:
    """One variant's result."""
    command = [sys.executable, __file__, "--variant", variant]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="cpu", help="names the files in benchmarks/results/")
    parser.add_argument("--variant", choices=VARIANTS, help="runs one variant in this very process")
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(step(options.variant)))
        return
    results = {variant: run(variant) for variant in VARIANTS}
    times = round(results["stock"]["peak_mib"] / results["fused"]["peak_mib"], 2)
    stem = RESULTS / f"{options.machine}-memory"
    shape = {"T": T, "H": H, "V": V, "dtype": "float32"}
    stem.with_suffix(".json").write_text(json.dumps({**shape, **results, "times_less": times}, indent=1) + "\n")
    lines = ["| Trainer | peak above the start, MiB | seconds | loss |", "|---|---|---|---|"]
    for variant, found in results.items():
        lines.append(f"| {variant} | {found['peak_mib']:,.0f} | {found['seconds']} | {found['loss']:.6f} |")
    text = "\n".join([__doc__.split("\n\n")[2], "", *lines, "", f"The stock step takes {times} times the memory."])
    stem.with_suffix(".md").write_text(f"# Memory of a training step\n\n`python benchmarks/memory.py`\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
