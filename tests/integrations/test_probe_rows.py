"""The rows that the packing probe asks with: long enough for every limit, no sequence beyond a
table."""

from __future__ import annotations

import pytest
import torch
from support.trainers import llama_config

from fastft.integrations.probe.rows import Batches, limits_of, long_row, long_total


class Model:
    """What the rows are made for: a configuration and embeddings."""

    def __init__(self, **sizes):
        self.config = llama_config(**sizes)

    def get_input_embeddings(self):
        return torch.nn.Embedding(97, 8)


@pytest.mark.parametrize(
    ("sizes", "max_tokens", "total"),
    [
        ({"max_position_embeddings": 1024}, None, 1025),
        ({"max_position_embeddings": 4096}, None, None),  # too far out to be asked unasked
        ({"max_position_embeddings": 4096}, 8192, 4096),
        ({"max_position_embeddings": 4096}, 700, 700),
        ({"max_position_embeddings": 131072, "sliding_window": 512}, None, 788),
        ({"max_position_embeddings": 2048, "window_size": 256}, None, 2049),
        ({"max_position_embeddings": 131072, "sliding_window": 4000}, None, 4096),
        ({"max_position_embeddings": 16}, None, None),  # the short row is longer
        ({"max_position_embeddings": 131072, "attention_window": [64, 96]}, None, 164),
        ({"max_position_embeddings": 131072, "text_config": {"n_positions": 50}}, None, 51),
        ({"max_position_embeddings": 131072, "audio_config": {"n_positions": 50}}, None, None),
        ({"max_position_embeddings": 131072, "sliding_window": None}, None, None),
    ],
)
def test_how_long_the_long_row_is(sizes, max_tokens, total):
    assert long_total(limits_of(llama_config(**sizes)), Batches(max_tokens=max_tokens)) == total


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("total", [33, 64, 65, 129, 500, 4096])
@pytest.mark.parametrize("table", [40, 64, 2048, 131072])
@pytest.mark.parametrize("window", [None, 40, 300])
def test_its_sequences(total, table, window, start):
    row = long_row(
        Model(max_position_embeddings=table, sliding_window=window), Batches(start), total
    )
    lengths = [len(tokens) for tokens in row.tokens]
    assert len(row) == sum(lengths) == total and min(lengths) > 0
    assert max(lengths) <= table - start
    if window is not None and window + 36 < min(total, table):
        assert lengths[-1] > window
    assert row.others[0].shape == row.tokens[0].shape and not row.others[0].equal(row.tokens[0])
    assert [list(row.compared)] == [[1, len(lengths) - 1]]
