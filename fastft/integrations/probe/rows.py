"""The rows that the packing probe asks a model with: a short one, and one beyond its limits.

A configuration has two kinds of numbers that a row may pass while none of its sequences does:
tables (positions, causal masks, biases), which code that counts along the row looks up beyond their
end, and windows or chunks, behind which attention computes otherwise. The long row passes each of
them, and its last sequence each window.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastft.integrations.probe.images import ImageExamples

LENGTHS, DECODER_LENGTHS = (11, 7, 13), (6, 9, 5)
OTHER_ROW, OTHER_DECODER_ROW = 24, 17
PADDING = 9  # tokens at the end of a padded row
LONGEST = 4096

TABLES = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"),
    *("context_length", "max_source_positions", "max_target_positions", "max_text_positions"),
)
WINDOWS = (
    *("sliding_window", "sliding_window_size", "window_size", "local_attention", "local_radius"),
    *("attention_window", "attention_window_size", "local_attention_window_len"),
    *("attention_chunk_size", "local_attn_chunk_length", "lsh_attn_chunk_length", "chunk_size"),
    *("block_size", "global_block_size", "index_topk"),
)
_OF_OTHER_INPUTS = re.compile("vision|image|video|audio|speech|rope|quantization")


@dataclass(frozen=True)
class Batches:
    """A description of the batches that the model is to be trained on.

    Attributes:
        position_ids_start: as in `PackingCollator`.
        max_tokens: of a row; None where that is not known.
        rows: whether a batch has several is what matters.
        padded: whether rows may end with padding.
        images: examples that have some; None where all are text.
    """

    position_ids_start: int = 0
    max_tokens: int | None = None
    rows: int = 1
    padded: bool = False
    images: ImageExamples | None = None


@dataclass(frozen=True)
class Limits:
    """Tables and windows of a configuration, (size, name), from 32 tokens on; what is smaller the
    short row passes."""

    tables: list[tuple[int, str]]
    windows: list[tuple[int, str]]

    def passed(self, tokens: int) -> list[tuple[int, str]]:
        """Chooses those that a row of `tokens` is longer than, the largest first, tables before
        windows of a size."""
        return sorted(
            (limit for limit in self.tables + self.windows if limit[0] < tokens),
            key=lambda one: -one[0],
        )


@dataclass
class Row:
    """Sequences that are packed into one row, each a tensor of tokens (n,).

    Attributes:
        tokens: of each sequence; of the encoder, where there is a decoder.
        targets: the decoder's tokens of each sequence.
        others: what the probe puts in place of the first sequence, and of its targets.
        compared: which sequences are looked at alone too.
        alone: their outputs (n, features), once these are known.
    """

    tokens: list[Tensor]
    targets: list[Tensor]
    others: tuple[Tensor, Tensor]
    compared: Sequence[int]
    alone: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.tokens))

    def ends(self, crossed: bool) -> list[int]:
        """The places where the outputs of each sequence begin, and the end."""
        lengths = [len(part) for part in (self.targets if crossed else self.tokens)]
        return [sum(lengths[:count]) for count in range(len(lengths) + 1)]


def short_row(base: Any) -> Row:
    """31 tokens in three sequences."""
    (tokens, other), (targets, other_targets) = (
        [random_tokens(base, lengths, seed) for seed in seeds]
        for lengths, seeds in ((LENGTHS, (0, 1)), (DECODER_LENGTHS, (2, 3)))
    )
    return Row(tokens, targets, (other[0], other_targets[0]), range(len(LENGTHS)))


def other_row(base: Any) -> Row:
    """One sequence, for a second row that is padded."""
    parts = [
        random_tokens(base, [n], seed) for n, seed in ((OTHER_ROW, 12), (OTHER_DECODER_ROW, 13))
    ]
    return Row(parts[0], parts[1], (parts[0][0], parts[1][0]), (0,))


def beside_long(row: Row) -> Row:
    """The sequences of a long row in another order, for a second row: with less padding than a
    table has places."""
    first = [parts[0][PADDING:] for parts in (row.tokens, row.targets)]
    return Row([*row.tokens[1:], first[0]], [*row.targets[1:], first[1]], row.others, ())


def long_row(base: Any, batches: Batches, total: int | None = None) -> Row | None:
    """A row of `total` tokens, by default of `long_total`; None if the short one shows as much."""
    limits = limits_of(base.config)
    total = long_total(limits, batches) if total is None else total
    if total is None or total <= sum(LENGTHS):
        return None
    lengths = _lengths(total, limits, batches.position_ids_start)
    tokens, targets = (random_tokens(base, lengths, seed) for seed in (8, 9))
    others = [random_tokens(base, lengths[:1], seed)[0] for seed in (10, 11)]
    return Row(tokens, targets, (others[0], others[1]), (1, len(lengths) - 1))


def long_total(limits: Limits, batches: Batches) -> int | None:
    """Counts the tokens of the long row.

    It has those of the longest pack, at most 4,096, where that is known; else enough to pass all
    limits below that.
    """
    if batches.max_tokens is not None:
        return min(batches.max_tokens, LONGEST)
    wanted = [size + 1 for size, _ in limits.tables if size < LONGEST]
    wanted += [min(size + size // 2 + 20, LONGEST) for size, _ in limits.windows if size < LONGEST]
    return max(wanted, default=None)


def _lengths(total: int, limits: Limits, start: int) -> list[int]:
    """A third of them first, few second, last a sequence beyond every window; none beyond a
    table."""
    most = max(min((size - start for size, _ in limits.tables), default=total), 16)
    window = max((size for size, _ in limits.windows if size < total), default=0)
    last = min(max(window + 17, 64), most, total - 18)
    first = max(11, min(total // 3, most, total - 7 - last))
    lengths, rest = [first, 7], total - first - 7 - last
    while rest > 0:
        lengths.append(min(rest, most))
        rest -= lengths[-1]
    return [*lengths, last]


def limits_of(config: Any) -> Limits:
    """Finds every size of the configuration and its parts that `TABLES` or `WINDOWS` names."""
    found = set(_sizes(config.to_dict()))
    tables, windows = (
        [(size, name) for size, name in found if name in names] for names in (TABLES, WINDOWS)
    )
    return Limits(sorted(tables), sorted(windows))


def _sizes(config: dict[Any, Any]) -> Iterator[tuple[int, str]]:
    for name, value in config.items():
        if _OF_OTHER_INPUTS.search(str(name)):
            continue
        if isinstance(value, dict):
            yield from _sizes(value)
        elif name in TABLES or name in WINDOWS:
            for size in value if isinstance(value, list | tuple) else [value]:
                if isinstance(size, int) and size > sum(LENGTHS):
                    yield size, str(name)


def random_tokens(base: Any, lengths: Sequence[int], seed: int) -> list[Tensor]:
    """Ordinary tokens: none that the configuration gives a meaning."""
    config = base.config.get_text_config()
    sizes = [getattr(part, "vocab_size", None) for part in (config, base.config)]
    size = min(
        int(given) for given in (*sizes, base.get_input_embeddings().weight.shape[0]) if given
    )
    special = special_tokens(base)
    allowed = torch.tensor([token for token in range(min(size, 32_768)) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    return [allowed[torch.randint(len(allowed), (n,), generator=generator)] for n in lengths]


def special_tokens(base: Any) -> set[int]:
    """Finds the tokens that the configuration gives a meaning."""
    return set(_special_tokens(base.config.to_dict()))


def _special_tokens(config: dict[Any, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif str(name).endswith(("_token_id", "_token_index", "_token_ids")):
            yield from (
                token
                for token in (value if isinstance(value, list) else [value])
                if isinstance(token, int)
            )
