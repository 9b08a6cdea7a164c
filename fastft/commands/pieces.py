"""The pieces of fastft by name, as commands are given them. Imports nothing of theirs."""

from __future__ import annotations

import argparse

PIECES = ("loss", "optimizer", "packing")


def pieces_of(text: str) -> tuple[str, ...]:
    """Names with commas between, or "each" for all: a type of argparse's."""
    if text == "each":
        return PIECES
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in PIECES:
            raise argparse.ArgumentTypeError(
                f"there is no piece {name!r}: the pieces are {', '.join(PIECES)}, or each for all"
            )
    return names


def packing_of(text: str) -> int | str:
    """A number of tokens, or "collate": a type of argparse's."""
    if text == "collate":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"must be a number of tokens above 0, or 'collate', got {text!r}"
        )
    return int(text)
