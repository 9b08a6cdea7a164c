"""Which tier of AdamW's `offload` for which model and card: the tables of docs/memory.md.

python benchmarks/tiers.py            # writes them; some minutes, no GPU, next to no memory

Models are written out by their dimensions. Bytes of weights, gradients, states and buffers are
those of fastft/optim/offload/tiers.py, activations those of `python -m fastft estimate`, and times
of a bus are bytes over its rate: all of it is calculated.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from fastft.integrations.estimated_training import Memory, Training, measure
from fastft.optim.factory import with_fp32_moments
from fastft.optim.moment_codes import CODES
from fastft.optim.offload import tiers
from fastft.unallocated import Unallocated

PAGE = Path(__file__).resolve().parents[1] / "docs" / "memory.md"
TOKENS = 4096
MOMENTS = ("fp32", "8bit", "4bit")
CARDS = (8, 16, 24, 40, 48, 80)  # GiB
BESIDE = 1 << 30  # bytes of a card that no tensor has, as `estimate` assumes
BUS = {"PCIe 4": 25e9, "PCIe 5": 50e9}  # bytes a second and direction, of 32e9 and 64e9
WORDS = {None: "none", "states": '"states"', "gradients": '"gradients"', "overlap": '"overlap"'}
_LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
_OF_MODEL: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "SmolLM2-1.7B": (
        LlamaConfig,
        {
            "vocab_size": 49_152,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "Llama-3.1-8B": (
        LlamaConfig,
        {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen3-14B": (
        Qwen3Config,
        {
            "vocab_size": 151_936,
            "hidden_size": 5120,
            "intermediate_size": 17_408,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "tie_word_embeddings": False,
        },
    ),
    "Llama-3.1-70B": (
        LlamaConfig,
        {
            **_LLAMA,
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "tie_word_embeddings": False,
        },
    ),
}
ALONE = ("SmolLM2-1.7B", "Llama-3.1-8B", "Qwen3-14B")
SHARDED, PROCESSES = "Llama-3.1-70B", 8


@cache
def config_of(name: str) -> PreTrainedConfig:
    """A model's configuration, by its dimensions."""
    kind, sizes = _OF_MODEL[name]
    config = kind(**sizes)
    config.architectures = [f"{kind.__name__.removesuffix('Config')}ForCausalLM"]
    return config


@cache
def _model(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config_of(name), dtype=torch.bfloat16
        )
    return model


def size(name: str, moments: str, offload: str | None, processes: int = 1) -> tiers.TierBytes:
    """A model's bytes in a tier, or those of one of so many processes of FSDP2, which cut each
    parameter along its first dimension."""
    model = _model(name)
    groups: list[dict[str, Any]] = [{"params": [*model.parameters()]}]
    groups = with_fp32_moments(groups, model) if moments in CODES else groups
    groups = [
        {
            "amsgrad": False,
            "moments": moments,
            **group,
            "params": [param[: -(-len(param) // processes)] for param in group["params"]],
        }
        for group in groups
    ]
    return tiers.bytes_of(groups, "exact", offload)


def parameters(name: str) -> int:
    return sum(param.numel() for param in _model(name).parameters())


def tier_rows() -> Iterator[str]:
    """Weights, gradients, states and buffers of each model in each tier."""
    yield (
        '| model, parameters | moments | none: device | `"states"`: device | host | '
        '`"gradients"`, `"overlap"`: device | host |'
    )
    yield "|---|---|---|---|---|---|---|"
    for name in ALONE:
        for moments in MOMENTS:
            none, states, gradients = (
                size(name, moments, tier) for tier in (None, "states", "gradients")
            )
            cells = [f"{name}, {parameters(name) / 1e9:.2f}e9", moments, _gib(none.device)]
            cells += [_gib(states.device), _gib(states.host)]
            yield _row(*cells, _gib(gradients.device), _gib(gradients.host))


def sharded_rows() -> Iterator[str]:
    """The same of one process of FSDP2, with what it gathers."""
    yield (
        "| moments | tier | shard on each GPU | with two gathered layers | host of each GPU | "
        "host of the machine |"
    )
    yield "|---|---|---|---|---|---|"
    for moments in MOMENTS:
        for tier in (None, "states", "gradients"):
            shard = size(SHARDED, moments, tier, PROCESSES)
            whole = shard.device + gathered(SHARDED)
            cells = [moments, f"`{WORDS[tier]}`", _gib(shard.device), _gib(whole)]
            yield _row(*cells, _gib(shard.host), _gib(PROCESSES * shard.host))


def gathered(name: str) -> int:
    """Bytes of two layers in bf16, the one that computes and the next one, and of the gradients of
    one; or of the embeddings and the head, which are one unit."""
    model: Any = _model(name)
    layer = sum(param.nbytes for param in model.model.layers[0].parameters())
    rest = sum(param.nbytes for param in model.parameters()) - len(model.model.layers) * layer
    return int(rest + 3 * layer)


def cost_rows() -> Iterator[str]:
    """What the bus adds to a step where nothing hides it."""
    yield "| model | moments | tier | GB in, GB out | PCIe 4 | PCIe 5 |"
    yield "|---|---|---|---|---|---|"
    for name in ALONE:
        for moments in MOMENTS:
            for tier in ("states", "gradients"):
                moved = size(name, moments, tier)
                into, out = moved.host, moved.host_states
                seconds = [f"{max(into, out) / rate:.2f} s" for rate in BUS.values()]
                bytes_ = f"{into / 1e9:.1f}, {out / 1e9:.1f}"
                yield _row(name, moments, f"`{WORDS[tier]}`", bytes_, *seconds)


@cache
def peak(name: str, moments: str, offload: str | None) -> Memory:
    """By `estimate`: a row of `TOKENS` tokens, checkpointing, all pieces of fastft."""
    training = Training(
        config_of(name),
        tokens=TOKENS,
        dtype="bf16",
        checkpointing=True,
        moments=moments,
        offload=offload,
    )
    pieces = frozenset(("loss", "optimizer", "packing"))
    return measure(training, pieces, Unallocated(device="cuda"))


def peak_rows() -> Iterator[str]:
    """The peak of a step in each tier."""
    yield '| model | moments | none | `"states"` | `"gradients"`, `"overlap"` |'
    yield "|---|---|---|---|---|"
    for name in ALONE:
        for moments in MOMENTS:
            found = [peak(name, moments, tier).bytes for tier in (None, "states", "gradients")]
            yield _row(name, moments, *map(_gib, found))


def card_rows() -> Iterator[str]:
    """The first tier that fits each card, and what it takes of the host."""
    yield _row("model", "moments", *(f"{card} GB" for card in CARDS))
    yield "|---|---|" + "---|" * len(CARDS)
    for name in ALONE:
        for moments in MOMENTS:
            yield _row(name, moments, *(_fitting(name, moments, card) for card in CARDS))


def _fitting(name: str, moments: str, card: int) -> str:
    for tier in (None, "states", "gradients"):
        memory = peak(name, moments, tier)
        if memory.bytes + BESIDE <= card << 30:
            return f"`{WORDS[tier]}`" + (f", {memory.host / 2**30:.0f}" if memory.host else "")
    return "no"


TABLES = {
    "tiers": tier_rows,
    "cost": cost_rows,
    "sharded": sharded_rows,
    "peaks": peak_rows,
    "cards": card_rows,
}


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    text = PAGE.read_text()
    for name, rows in TABLES.items():
        table = "\n".join(rows())
        print(table, flush=True)
        begin, old = table_of(text, name)
        text = text[:begin] + table + text[begin + len(old) :]
    PAGE.write_text(text)


def table_of(text: str, name: str) -> tuple[int, str]:
    """Where the page has a table, and the table."""
    found = re.search(f"<!-- benchmarks/tiers.py: {name} -->\n\n(.*?)\n*<!-- end -->", text, re.S)
    if found is None:
        raise ValueError(f"{PAGE} has no place for the table {name!r}")
    return found.start(1), found[1]


if __name__ == "__main__":
    main()
