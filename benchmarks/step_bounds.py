"""Where a training step's time would go on a GPU: CALCULATED from counts, nothing is timed.

    python benchmarks/step_bounds.py --to benchmarks/results

A Llama 3.2 1B in fp32 weights under bf16 autocast and eight documents of 128 to 1024 tokens, as
`benchmarks/training.py` trains it on a GPU, run by shapes alone (torch's meta device). Each part
takes at least its floating-point operations at the data sheet's rate, or the bytes of its operands
and results at the bandwidth of a copy, whichever is more. Products are counted as torch's
flop_counter does; bytes are those of every operation that is no view, each once. Attention is flash
attention's: causal pairs, 7/2 of the forward pass's products in all. AdamW's bytes are those that
its compiled kernel moves (kernels.json). Launches, caches and what overlaps are left out.

Writes step_bounds.md to the folder of --to.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from whole_runs import grid

ROOT = Path(__file__).resolve().parent.parent
FLOPS, BANDWIDTH = 989.4e12, 4.3e12  # an H200's: bf16, dense; a copy, as kernel_table.py has it
HIDDEN, INNER, LAYERS, HEADS, KEYS, CLASSES = 2048, 8192, 16, 32, 8, 128_256
LENGTHS = [128 + 128 * i for i in range(8)]
_PRODUCTS = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}


class Counts(TorchDispatchMode):
    """FLOPs of products, and bytes of all else."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.bytes = 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if str(func) in _PRODUCTS:
            self.flops += 2.0 * args[-2].numel() * args[-1].shape[-1]
        elif not func.is_view:
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def _no_attention(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return query.transpose(1, 2), None


def of_layers(rows: int, tokens: int) -> Counts:
    """Of all layers without attention's own products, forward and backward: what two layers cost
    more than one."""
    AttentionInterface.register("no_attention", _no_attention)
    found = []
    for layers in (1, 2):
        config = LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KEYS,
            vocab_size=64,
            attn_implementation="no_attention",
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
            ids = torch.zeros(rows, tokens, dtype=torch.int64)
            with Counts() as counts:
                model.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
        found.append(counts)
    whole = Counts()
    whole.flops = LAYERS * (found[1].flops - found[0].flops)
    whole.bytes = LAYERS * (found[1].bytes - found[0].bytes)
    return whole


def parts(ours: bool) -> dict[str, tuple[float, float]]:
    """(FLOPs, bytes) of a step, by part."""
    longest, lengths = max(LENGTHS), LENGTHS if ours else [max(LENGTHS)] * len(LENGTHS)
    tokens = sum(lengths)
    layers = of_layers(1, tokens) if ours else of_layers(len(LENGTHS), longest)
    attention = 3.5 * LAYERS * sum(4.0 * n * (n + 1) / 2 * HIDDEN for n in lengths)
    head = 6.0 * tokens * HIDDEN * CLASSES
    logits = float(tokens) * CLASSES
    weights = LAYERS * (2 * HIDDEN * HIDDEN * (1 + KEYS / HEADS) + 3 * HIDDEN * INNER)
    weights += HIDDEN * CLASSES
    kernel = json.loads((ROOT / "benchmarks/results/kernels.json").read_text())["kernels"]
    adamw = kernel["cuda, AdamW, fp32, moments fp32, sm_90"]
    # eager: bf16 to fp32, log-softmax, its gradient of two operands, back to bf16, read again
    of_loss = 6 + 8 + 12 + 6
    of_ours = 6.08  # the row kernel's, in kernels.md: read twice, written once
    return {
        "linear layers": (layers.flops, 0.0),
        "attention": (attention, 0.0),
        "norms, rotary, activations, residuals": (0.0, layers.bytes),
        "head: its products": (head, 0.0),
        "head: rows of the loss": (0.0, logits * (of_ours if ours else of_loss)),
        "casts of weights and gradients": (0.0, weights * (6 + 6)),
        "clipping": (0.0, weights * (4 if ours else 12)),
        "AdamW": (0.0, weights * (adamw["read"] + adamw["written"] if ours else 28)),
    }


def page() -> str:
    stock, ours = parts(False), parts(True)
    body, totals = [], [0.0, 0.0]
    for part in stock:
        row = [part]
        for index, (flops, moved) in enumerate((stock[part], ours[part])):
            seconds = max(flops / FLOPS, moved / BANDWIDTH)
            totals[index] += seconds
            row.append(f"{1e3 * seconds:,.1f}")
        why = f"{stock[part][0] / 1e12:,.1f} TFLOP" if stock[part][0] else ""
        other = f"{ours[part][0] / 1e12:,.1f}" if ours[part][0] else ""
        why, other = (
            (why, other)
            if why
            else (f"{stock[part][1] / 1e9:,.1f} GB", f"{ours[part][1] / 1e9:,.1f}")
        )
        body.append([*row, f"{why}; {other}"])
    body.append(["**all**", *[f"**{1e3 * seconds:,.1f}**" for seconds in totals], ""])
    head = ["part", "stock, ms at least", "fastft, ms at least", "of stock; of fastft"]
    lines = ["# A step on an H200, calculated", "", "Nothing here was timed:"]
    lines += [f"`{' '.join(['python', 'benchmarks/step_bounds.py', *sys.argv[1:]])}` counts. A"]
    lines += [f"Llama 3.2 1B, fp32 under bf16 autocast, documents of {LENGTHS[0]} to {LENGTHS[-1]}"]
    lines += [f"tokens; stock pads them to {len(LENGTHS)} rows, "]
    lines[-1] += f"{1 - sum(LENGTHS) / (len(LENGTHS) * max(LENGTHS)):.0%} padding. {FLOPS / 1e12}"
    lines += ["TFLOP/s and 4.3 TB/s are what each part could have at most.", ""]
    return "\n".join([*lines, *grid(head, body)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, required=True, help="the folder of the page")
    (parser.parse_args().to / "step_bounds.md").write_text(page())


if __name__ == "__main__":
    main()
