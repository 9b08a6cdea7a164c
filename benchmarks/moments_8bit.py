"""The experiment behind the codes of `moments="8bit"`: prints the table of docs/adamw.md.

    python benchmarks/moments_8bit.py         the codes, a few minutes on one core
    python benchmarks/moments_8bit.py tune    fp32 against 8-bit moments, about a minute

A code is a sorted list of values from 0 (or the smallest) to 1, here looked up; rounding is
stochastic or to nearest. Four streams of gradients: (a) independent normal; (b) likewise, one
element in 128 a thousand times larger; (c) as (a) until all shrink by 30; (d) likewise times 1e-7.
moments_4bit.py runs the same experiments.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastft.optim.adamw import AdamW
from fastft.optim.moment_codes import dequantise

ELEMENTS, BETA1, BETA2, EPS = 8192, 0.9, 0.999, 1e-8
Rounder = Callable[[Tensor], Tensor]
MomentsRounder = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
OptimizerMaker = Callable[[Iterator[Tensor], float], AdamW]  # of parameters and learning rate


def own_levels() -> tuple[Tensor, Tensor]:
    """What the codes of fastft stand for, ascending: those of m from 0 on, and all of v."""
    m, v = torch.arange(256).clamp(max=127).to(torch.int8), torch.arange(256).to(torch.uint8)
    one = torch.ones(1, 2)
    levels_m, levels_v = dequantise(m.view(1, -1), v.view(1, -1), one, one)
    return levels_m[0, :128], levels_v[0]


def power(exponent: float) -> Tensor:
    return (torch.arange(128) / 127.0) ** exponent


def octaves(per_octave: int) -> Tensor:
    code = torch.arange(256)
    value = 2.0 ** (code // per_octave) * (1 + code % per_octave / per_octave)
    return value / value[-1]


def logarithmic(over: int) -> Tensor:
    return 2.0 ** (-over * (1 - torch.arange(256) / 255.0))


def rounder(levels: Tensor, stochastic: bool = True, block: int = 128) -> Rounder:
    generator = torch.Generator().manual_seed(0)

    def rounded(value: Tensor) -> Tensor:
        blocks = value.view(-1, block)
        scale = blocks.abs().amax(1, keepdim=True)
        x = blocks.abs() / scale.masked_fill(scale == 0, 1.0)
        low = (torch.searchsorted(levels, x, right=True) - 1).clamp(0, len(levels) - 2)
        fraction = (x - levels[low]) / (levels[low + 1] - levels[low])
        threshold = torch.rand(x.shape, generator=generator) if stochastic else 0.5
        return (levels[low + (fraction > threshold)] * scale * blocks.sign()).view_as(value)

    return rounded


def gradients(stream: str, step: int) -> Tensor:
    grad = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(step))
    if stream == "outlier":
        grad[::128] *= 1000
    return grad * {"drop": 1.0 if step <= 200 else 1 / 30, "tiny": 1e-7}.get(stream, 1.0)


def apart(round_m: Rounder, round_v: Rounder) -> MomentsRounder:
    return lambda m, v: (round_m(m), round_v(v))


def simulate(stream: str, steps: int, rounded: MomentsRounder) -> tuple[float, float, float]:
    """Relative to fp32: the error of the last 50 updates, the largest |update|, the mean of v."""
    m, v, true_m, true_v = (torch.zeros(ELEMENTS) for _ in range(4))
    squares, true_squares, largest, true_largest = 0.0, 0.0, 0.0, 0.0
    for step in range(1, steps + 1):
        grad = gradients(stream, step)
        correction1, correction2 = 1 - BETA1**step, (1 - BETA2**step) ** 0.5
        updates = []
        for first, second in ((m, v), (true_m, true_v)):
            first.lerp_(grad, 1 - BETA1)
            second.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
            updates.append(first / correction1 / (second.sqrt() / correction2 + EPS))
        update, true = updates
        m, v = rounded(m, v)
        largest, true_largest = (
            max(largest, update.abs().max().item()),
            max(true_largest, true.abs().max().item()),
        )
        if step > steps - 50:
            squares += (update - true).square().sum().item()
            true_squares += true.square().sum().item()
    return (squares / true_squares) ** 0.5, largest / true_largest, (v / true_v).mean().item()


def print_streams(cases: dict[str, MomentsRounder]) -> None:
    print(f"{'':32} (a) error   v | (b) error largest   v | (c) error   v | (d) error largest")
    for name, rounded in cases.items():
        iid, outlier, drop, tiny = (
            simulate(stream, steps, rounded)
            for stream, steps in (("iid", 300), ("outlier", 200), ("drop", 500), ("tiny", 200))
        )
        print(
            f"{name:32} {iid[0]:9.3f} {iid[2]:5.2f} | {outlier[0]:7.3f} {outlier[1]:8.2f} "
            f"{outlier[2]:6.2f} "
            f"| {drop[0]:7.3f} {drop[2]:5.2f} | {tiny[0]:7.3f} {tiny[1]:8.2f}",
            flush=True,
        )


def print_codes() -> None:
    own_m, own_v = own_levels()
    exact, m = (lambda value: value), rounder(own_m)
    cases: dict[str, tuple[Rounder, Rounder]] = {"ours": (m, rounder(own_v))}
    cases |= {
        f"ours, blocks of {size}": (rounder(own_m, block=size), rounder(own_v, block=size))
        for size in (64, 256)
    }
    cases |= {"ours, to nearest": (rounder(own_m, False), rounder(own_v, False))}
    cases |= {
        f"m ^{exponent} alone": (rounder(power(exponent)), exact) for exponent in (1, 2, 3, 4, 5)
    }
    cases |= {f"v {count} to an octave": (m, rounder(octaves(count))) for count in (8, 10, 14, 16)}
    cases |= {
        f"v log over {count} octaves": (m, rounder(logarithmic(count))) for count in (20, 24, 32)
    }
    zero = torch.cat([torch.zeros(1), logarithmic(20)[1:]])
    cases |= {"v log over 20, with a zero": (m, rounder(zero))}
    print_streams({name: apart(*rounders) for name, rounders in cases.items()})


def tune(
    optimizer_of: OptimizerMaker,
    dtype: torch.dtype,
    steps: int,
    start: dict[str, Tensor] | None,
    order: int = 0,
) -> tuple[float, dict, AdamW]:
    """Trains a small Llama on bytes of the standard library; the loss on unseen text, the weights
    and the optimizer.

    Without `start` it begins at random, on other modules than with it. Each `order` takes other
    places of the text.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    files = sorted(
        Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py" if start is None else "[g-z]*.py")
    )
    text = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    heldout, text = text[:32768].view(-1, 128), text[32768:]
    torch.manual_seed(0)
    size = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **size))
    if start is not None:
        model.load_state_dict(start)
    model.to(dtype)
    optimizer = optimizer_of(model.parameters(), 1e-3 if start is None else 3e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for step in range(steps):
        generator = torch.Generator().manual_seed(order * steps + step)
        places = torch.randint(len(text) - 128, (8,), generator=generator)
        batch = torch.stack([text[place : place + 128] for place in places.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() for part in heldout.split(32)]
    return sum(losses) / len(losses), model.state_dict(), optimizer


def keeping(moments: str, seed: int = 0) -> OptimizerMaker:
    return lambda params, lr: AdamW(params, lr=lr, moments=moments, seed=seed)


def tuned_start() -> dict[str, Tensor]:
    """The weights from which the fine-tunes begin."""
    return tune(keeping("fp32"), torch.float32, 400, None)[1]


def print_tune() -> None:
    start = tuned_start()
    results: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        true = tune(keeping("fp32"), dtype, 300, start)[0]
        results[f"{dtype} fp32"] = true
        for moments in ("bf16", "8bit"):
            for seed in range(2):
                loss = tune(keeping(moments, seed), dtype, 300, start)[0]
                results[f"{dtype} {moments} seed {seed}"] = loss
                print(
                    f"{dtype} {moments} seed {seed}: {loss:.4f}, fp32 {true:.4f}, "
                    f"{100 * (loss / true - 1):+.3f} %"
                )
    print(json.dumps(results))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("codes", "tune"), default="codes")
    torch.set_num_threads(1)
    {"codes": print_codes, "tune": print_tune}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
