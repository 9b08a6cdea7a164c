"""Full fine-tuning of 8 billion parameters on a card of 24 GiB, against the same without a limit:
equal to the bit.

python benchmarks/offloading.py [--offload gradients] [--cap 24] [--ledger FILE]

On a GPU a Llama 3.1 8B from random weights in bf16 with exact rounding and 8-bit moments, gradient
checkpointing and clipping, rows of 2,048 tokens, two micro-steps a step, by torch's deterministic
algorithms (else the backward pass of flash attention, for one, adds in any order): with its states
and gradients on the host, where this process may have no more than so many GiB of the device; then
with all of it on the device. On a CPU a tiny one, without a limit. Prints a line of JSON: each
step's loss, seconds a step, the peak that the device has allocated, and the same of the resident
training. Who has FILE finds it there too, as case `training[8B under 24 GiB]` of part `train`; it
is skipped, with a reason, where device or host have too little for one of the two.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic
from ledger import Ledger
from training import GPU, WARM, Recorder
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, set_seed

import fastft
from fastft.optim.factory import with_fp32_moments
from fastft.optim.offload import tiers
from fastft.optim.offload.host_memory import available

STEPS, MICRO, TOKENS = (WARM + 3, 2, 2048) if GPU else (WARM + 3, 2, 32)
MOMENTS = "8bit"
_BESIDE = 8 << 30  # bytes of activations and of what the allocator cannot use, generously


def config() -> LlamaConfig:
    """Llama 3.1 8B's dimensions; on a CPU small ones that no block divides."""
    if not GPU:
        small = {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2}
        return LlamaConfig(vocab_size=507, num_attention_heads=2, **small)
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


def examples() -> list[dict[str, list[int]]]:
    """Rows that follow a pattern, so that there is something to learn."""
    vocabulary = config().vocab_size // 4
    rows = [(torch.arange(TOKENS) * 7 + 11 * i) % vocabulary + 1 for i in range(STEPS * MICRO)]
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows]


def train(offload: str | None) -> dict[str, Any]:
    """Losses, seconds a step, peak MiB, and the sums of each weight's bits."""
    new = "activation_checkpointing"  # transformers 5.24
    is_new = new in TrainingArguments.__dataclass_fields__
    checkpointing: dict[str, Any] = {new if is_new else "gradient_checkpointing": True}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=MICRO,
            learning_rate=1e-4,
            use_cpu=not GPU,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **checkpointing,
        )
        set_seed(0)
        with torch.device("cuda" if GPU else "cpu"):
            model = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)
        recorder = Recorder()
        trainer = Trainer(model=model, args=args, train_dataset=examples(), callbacks=[recorder])
        fastft.plug(trainer, moments=MOMENTS, offload=offload)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if GPU else 0
    return {
        "losses": recorder.losses,
        "seconds_a_step": round(recorder.seconds / (STEPS - WARM), 3),
        "tokens_per_second": round(TOKENS * MICRO * (STEPS - WARM) / recorder.seconds, 1),
        "peak_mib": round(peak / 2**20, 1),
        "bits": [int(weight.data.view(torch.int16).sum()) for weight in model.parameters()],
    }


def repeat_every_bit() -> None:
    """Lets torch give the same bits each time, to which two trainings are held here."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of cuBLAS's first use
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which takes time


def both(offload: str, cap: int) -> dict[str, Any]:
    """The training of a small card, and beside it the resident one of the whole."""
    if GPU:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(cap / total, 1.0))
    found = train(offload)
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {**found, "resident": train(None)}


def missing(offload: str) -> str | None:
    """Why this machine cannot train both."""
    if not GPU:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)
    plain = {"params": list(model.parameters()), "moments": MOMENTS, "amsgrad": False}
    groups = with_fp32_moments([plain], model)
    free, _ = torch.cuda.mem_get_info()
    needed = tiers.bytes_of(groups, "exact", None).device + _BESIDE
    if free < needed:
        return f"resident it needs {needed >> 30} GiB of the device, which has {free >> 30} free"
    there = available()
    needed = tiers.bytes_of(groups, "exact", offload).host + _BESIDE
    if there is not None and there < needed:
        return f"it needs {needed >> 30} GiB of the host, which has {there >> 30} available"
    return None


def disagreement(found: dict[str, Any]) -> str:
    """Where the two are not equal to the bit; "" if they are."""
    resident = found["resident"]
    for step, (loss, other) in enumerate(zip(found["losses"], resident["losses"], strict=True)):
        if loss != other:
            return f"the loss of step {step + 1} is {loss!r}, the resident one's {other!r}"
    off = sum(a != b for a, b in zip(found["bits"], resident["bits"], strict=True))
    return f"{off} of {len(found['bits'])} weights end with other bits" if off else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offload", choices=tiers.TIERS[1:], default="gradients")
    parser.add_argument("--cap", type=float, default=24, help="GiB of the device (default: 24)")
    parser.add_argument("--ledger", type=Path, help="a file that lines of JSON are appended to")
    options = parser.parse_args()
    began = time.monotonic()
    repeat_every_bit()
    line = {"part": "train", "case": f"training[8B under {options.cap:g} GiB]"}
    ledger = Ledger(options.ledger) if options.ledger else None
    if ledger:
        ledger.append(**line, outcome="begun")
    reason = missing(options.offload)
    found = {} if reason else both(options.offload, int(options.cap * 2**30))
    wrong = disagreement(found) if found else ""
    for each in (found, found.get("resident", {})):
        each.pop("bits", None)  # equal, or `wrong` says so
    print(json.dumps(found or {"skipped": reason}))
    if ledger:
        outcome = "skipped" if reason else "failed" if wrong else "passed"
        said = {"said": reason or wrong} if reason or wrong else {}
        took = round(time.monotonic() - began, 1)
        ledger.append(**line, outcome=outcome, seconds=took, found=found, **said)
    if wrong:
        raise SystemExit(wrong)


if __name__ == "__main__":
    main()
