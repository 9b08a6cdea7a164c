"""Random bits for stochastic rounding: Philox4x32 (Salmon et al., 2011) in plain torch.

It has the seven rounds which that paper finds enough for every test. The bits are a function of the
seed, the step, the stream (what is rounded) and the element's index among all elements of the
optimizer, so that neither the engine nor the way in which tensors are split changes them. Elements
8k to 8k + 7 share one call, with the counter (k, k >> 32, step, stream); each takes 16 of its 128
bits, in memory order. Both moments of an element are rounded with the same 16 bits, the second one
with the two bytes swapped.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
STREAMS = {"param": 0, "moments": 1, "max_exp_avg_sq": 2}
_WORD = 0xFFFFFFFF


def random_bits(
    first: int, count: int, step: int, stream: int, seed: int, device: torch.device
) -> Tensor:
    """The bits of elements `first` to `first + count - 1`: int32, (count,), each in [0, 65535]."""
    block = torch.arange(first // 8, (first + count + 7) // 8, dtype=torch.int64, device=device)
    words = [
        block & _WORD,
        block >> 32,
        torch.full_like(block, step),
        torch.full_like(block, stream),
    ]
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        # int64 products wrap, which leaves the 64 bits of the unsigned product in place
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            ((b >> 32) & _WORD) ^ words[1] ^ key0,
            b & _WORD,
            ((a >> 32) & _WORD) ^ words[3] ^ key1,
            a & _WORD,
        ]
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, 1).flatten()[first % 8 :][:count].int()


def swap_bytes(bits: Tensor) -> Tensor:
    """Random bits of 16 bits each with their bytes swapped."""
    return (bits & 0xFF) << 8 | bits >> 8
