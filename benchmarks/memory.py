"""Peak memory of one Trainer, stock or with the fused loss, as a process (test_memory.py).

python benchmarks/memory.py --measure step --variant fused

A one-layer Llama with H=512 and V=128256 (tied embeddings), in fp32 on the CPU: one training step
over T=4096 tokens with Trainer's own AdamW, and an evaluation inside `train()` over as many tokens,
for its loss alone and with the accuracy of the tokens (`preprocess_logits_for_metrics` takes the
argmax). Counted is what the process holds at its peak above what it held before `train()`: the
model (262 MB) is in neither, gradients and optimizer states are in both steps. Prints a line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

T, H, V = 4096, 512, 128256
VARIANTS = ("stock", "fused")
# a training step; an evaluation for its loss, and with the accuracy
MEASURES = ("step", "loss", "metrics")


def memory(what: str) -> int:
    """KiB that this process holds (VmRSS), or held at its peak (VmHWM)."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)
    )
    return int(line.split()[1])


def measure(what: str, variant: str, tokens: int, classes: int) -> dict:
    """Runs in a fresh process: memory that was freed once comes back without being counted."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    import fastft

    torch.manual_seed(0)
    sizes = {
        "hidden_size": H,
        "intermediate_size": 2 * H,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=classes, max_position_embeddings=tokens, tie_word_embeddings=True, **sizes
        )
    )
    ids = torch.randint(0, classes, (tokens,))
    callback = fastft.FusedLossCallback()
    found: dict = {}

    def note(loss: float) -> None:
        found.update(peak_mib=round((memory("VmHWM") - before) / 1024, 1), loss=loss)

    class AtEvaluation(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            note(metrics["eval_loss"])

    def accuracy(prediction) -> dict:
        return {
            "accuracy": float(
                (prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean()
            )
        }

    evaluating = what != "step"
    # evaluated before the first step, whose own peak is not looked at
    length = 8 if evaluating else tokens
    with tempfile.TemporaryDirectory() as folder:
        quiet = {
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
        }
        quiet |= {
            "use_cpu": True,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
        }
        trainer = Trainer(
            model=model,
            args=TrainingArguments(folder, max_steps=1, eval_on_start=evaluating, **quiet),
            train_dataset=[{"input_ids": ids[:length], "labels": ids[:length]}],
            eval_dataset=[{"input_ids": ids, "labels": ids}],
            callbacks=[AtEvaluation(), *([callback] if variant == "fused" else [])],
            compute_metrics=accuracy if what == "metrics" else None,
            preprocess_logits_for_metrics=(lambda logits, labels: logits.argmax(-1))
            if what == "metrics"
            else None,
        )
        # the peak of making the model and of imports does not count
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        trainer.train()
    if not evaluating:
        note(trainer.state.log_history[0]["loss"])
    if variant == "fused":
        report = callback.evaluation if evaluating else callback.report
        assert report.fused == 1 + (what == "metrics") and not report.materialised, report
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", choices=MEASURES, default="step", help="what is run")
    parser.add_argument("--variant", choices=VARIANTS, default="fused", help="by whom")
    parser.add_argument("--tokens", type=int, default=T)
    parser.add_argument("--classes", type=int, default=V)
    options = parser.parse_args()
    found = measure(options.measure, options.variant, options.tokens, options.classes)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
