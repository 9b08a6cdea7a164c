"""TRL's fused head, and the same calls answered by fastft, by turns in one process.

    python benchmarks/trl_head.py
    python benchmarks/trl_head.py --outputs DPO --counted 0.5 --dtype bfloat16

A step is `model(..., labels=labels, fused_lm_head=True)` and the backward pass of the sum of its
log-probabilities, through a model that is a norm and an output head. Prints medians, and the peak
of what is allocated above the model, gradients (V, H) included.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from compare import DEVICE, timed
from errors import peaks_mib
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

import fastft

# what each trainer asks for
OUTPUTS = {
    "SFT": ("log_probs", "entropy", "is_top1"),
    "DPO": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "WPO": ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"),
    "KTO": ("log_probs", "entropy", "mean_logits"),
    "GRPO": ("log_probs", "entropy"),
    "reference": ("log_probs",),
}


def head_alone(hidden: int, classes: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A language model without layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "vocab_size": classes, "num_hidden_layers": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, intermediate_size=8))
    return model.to(DEVICE, dtype).train()


def steps(options: argparse.Namespace) -> tuple[Callable[[], Any], Callable[[], Any], Any]:
    """A step by TRL, one by fastft, and the model."""
    dtype = getattr(torch, options.dtype)
    model = head_alone(options.hidden, options.classes, dtype)
    add_fused_lm_head(model, outputs=OUTPUTS[options.outputs])
    x = torch.randn(1, options.rows + 1, options.hidden, device=DEVICE, dtype=dtype)
    labels = torch.randint(0, options.classes, (1, options.rows + 1), device=DEVICE)
    labels[torch.rand(labels.shape, device=DEVICE) >= options.counted] = -100
    trains = options.outputs != "reference"

    def trl() -> torch.Tensor:
        model.zero_grad()
        with torch.set_grad_enabled(trains):
            total = model(inputs_embeds=x, labels=labels, fused_lm_head=True).log_probs.sum()
        if trains:
            total.backward()
        return total.detach()

    def ours() -> torch.Tensor:
        with fastft.fused_loss(model) as report:
            total = trl()
        assert report.fused == 1, report
        return total

    return trl, ours, model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, size in (("rows", 4096), ("hidden", 512), ("classes", 65536), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--counted", type=float, default=1.0, help="the share of labels")
    parser.add_argument("--outputs", choices=OUTPUTS, default="GRPO")
    options = parser.parse_args()
    trl, ours, model = steps(options)
    values = [float(trl()), float(ours())]  # and the first touches
    took: dict[str, list[float]] = {"TRL": [], "fastft": []}
    for _ in range(options.rounds):
        took["TRL"].append(timed(trl).seconds)
        took["fastft"].append(timed(ours).seconds)
    medians = {name: statistics.median(seconds) for name, seconds in took.items()}
    peaks = peaks_mib({"TRL": trl, "fastft": ours}, *model.parameters())
    print(
        f"{options.outputs}: T={options.rows} ({options.counted:.0%} of them counted), "
        f"H={options.hidden}, V={options.classes}, {options.dtype}, {DEVICE}, "
        f"{torch.get_num_threads()} threads, {options.rounds} rounds by turns"
    )
    print("| | ms | peak MiB | sum of log-probabilities |\n|---|---|---|---|")
    for (name, seconds), value in zip(medians.items(), values, strict=True):
        print(f"| {name} | {1e3 * seconds:,.0f} | {peaks[name]:,.1f} | {value:.7g} |")
    faster, less = medians["TRL"] / medians["fastft"], 1 - peaks["fastft"] / peaks["TRL"]
    print(f"fastft is {faster:.2f} times as fast, with {less:.0%} less memory at the peak")


if __name__ == "__main__":
    main()
