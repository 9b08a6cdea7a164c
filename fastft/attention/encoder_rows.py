"""States of an encoder that has run a row for each example, end to end for a packed decoder.

Encoders of speech take windows of a fixed length, or convolve over a whole row: their inputs stay
a batch of examples, (E, L). Where the decoder's tokens are packed, example e is segment e of it,
and its states are segment e of the keys:

    (E, S, H), mask (E, S)    ->    (R, K, H), the states that the mask shows, one after another

R is what the decoder's code has for rows of keys; it says nothing here. Attention takes rows of
queries and rows of keys end to end, so that segments of keys may cross the R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.data.host_boundaries import note


def lay_end_to_end(states: Tensor, mask: Tensor | None, rows: int) -> tuple[Tensor, Tensor, int]:
    """Lays the encoder's states end to end.

    Args:
        states: (E, S, H).
        mask: (E, S), 0 where a state is padding; None: all are read. On a GPU the host waits for
            it.
        rows: R, those of the decoder.

    Returns:
        The states, (R, K, H), with zeros behind the last; where those of an example begin, int32
        (E + 1,), on their device; how many the longest has.

    Raises:
        ValueError: `mask` is of another shape; it shows nothing of an example.
    """
    examples, length, _ = states.shape
    if mask is None:
        flat, ends = states.flatten(0, 1), [length * count for count in range(examples + 1)]
        longest = length
    else:
        if mask.shape != states.shape[:2]:
            raise ValueError(
                f"the encoder's mask must be {tuple(states.shape[:2])} for a packed decoder, got "
                f"{tuple(mask.shape)}"
            )
        shown = mask.bool()
        flat, lengths = states[shown], shown.sum(1)
        ends = [0, *lengths.cumsum(0).tolist()]
        longest = int(lengths.max())
        if 0 in (counts := lengths.tolist()):
            raise ValueError(f"the encoder's mask hides all of example {counts.index(0)}")
    boundaries = torch.tensor(ends, dtype=torch.int32, device=states.device)
    note(boundaries, ends)
    padded = F.pad(flat, (0, 0, 0, -len(flat) % rows))
    return padded.view(rows, -1, states.shape[2]), boundaries, longest


def flattened(tensor: Tensor, tokens: int) -> Tensor:
    """The rows of queries or keys (R, H, T, D) end to end, (1, H, tokens, D)."""
    return tensor.transpose(1, 2).flatten(0, 1)[None, :tokens].transpose(1, 2)
