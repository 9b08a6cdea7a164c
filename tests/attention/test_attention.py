"""`attn_implementation="fastft"` on transformers' models, against unpacked stock runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.numerics import assert_no_worse, terms_of
from support.packed_models import (
    MODELS,
    build,
    ends,
    packed,
    packed_pairs,
    sequences,
    through,
    unpacked,
)
from support.versions import checkpoint_activations
from torch import Tensor, nn

import fastft
from fastft.attention.attention import fastft_attention
from fastft.attention.segments import keep_segments

transformers = pytest.importorskip("transformers")

LENGTHS = (11, 7, 13)
DECODER_LENGTHS = (5, 9, 17)


def assert_exact(name: str, tokens: Sequence[Tensor], ours: tuple[Tensor, Tensor]) -> None:
    """Logits and gradients are no worse than the stock model's in float32."""
    runs = [unpacked(name, tokens, dtype) for dtype in (torch.float32, torch.float64)]
    terms = terms_of(build(name, "eager"), sum(map(len, tokens)))
    for what, actual, plain, truth in zip(("logits", "gradients"), ours, *runs, strict=True):
        assert_no_worse(actual, plain, truth, f"{name} {what}", terms=terms)


@pytest.mark.parametrize("hooked", [True, False], ids=["hooked", "keywords"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "t5"])
def test_packed_is_as_unpacked(name: str, hooked: bool) -> None:
    """With the configuration's default of a cache, and whether or not the model's code hands the
    boundaries on."""
    tokens, model = sequences(LENGTHS), build(name, "fastft")
    if hooked:
        keep_segments(model)
    logits = model(**packed(tokens, MODELS[name].position_ids_start)).logits[0]
    assert_exact(name, tokens, through(model, logits))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "llama4", "modernbert"])
def test_rows_and_padding(name: str) -> None:
    """Two rows of three segments, the last of which is padding."""
    tokens, model = sequences((9, 12, 13, 8)), build(name, "fastft")
    keep_segments(model)
    padding = torch.zeros(4, dtype=torch.long)
    batch = packed([*tokens[:2], padding, *tokens[2:], padding], rows=2)
    rows = model(**batch).logits
    logits = torch.cat([rows[0, :9], rows[0, 9:21], rows[1, :13], rows[1, 13:21]])
    assert_exact(name, tokens, through(model, logits))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "opt", "distilbert"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    tokens, model = sequences(LENGTHS), build(name, "fastft", **_without_dropout(name)).train()
    checkpoint_activations(model, use_reentrant=reentrant)
    keep_segments(model)
    with fastft.packed_attention(model):
        assert_exact(name, tokens, through(model, model(**packed(tokens)).logits[0]))


def _without_dropout(name: str) -> dict[str, float]:
    return {"dropout": 0.0, "attention_dropout": 0.0} if name == "distilbert" else {}


class _Forgetful(nn.Module):
    """Two attention layers under gradient checkpointing whose code hands nothing on."""

    is_causal = True

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.reentrant = reentrant

    def _attend(self, x: Tensor, layer: nn.Module) -> Tensor:
        q, k, v = layer(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + fastft_attention(self, q, k, v)[0].flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(
                self._attend, x, layer, use_reentrant=self.reentrant
            )
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_after_another_forward(reentrant: bool) -> None:
    """Backward of the first of two forwards finds the boundaries of the first."""
    x = torch.randn(1, 12, 8, requires_grad=True)
    boundaries = [{"cu_seq_lens_q": ends(lengths)} for lengths in ((5, 7), (1, 8, 3))]

    def run(together: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = _Forgetful(reentrant)
        keep_segments(model)
        if together:
            losses = [model(x, **batch).square().sum() for batch in boundaries]
            with torch.no_grad():
                model(x)  # an evaluation in between
            return [grad for loss in losses for grad in _gradients(loss, model)]
        return [
            grad
            for batch in boundaries
            for grad in _gradients(model(x, **batch).square().sum(), model)
        ]

    for together, apart in zip(run(True), run(False), strict=True):
        assert torch.equal(together, apart)


def _gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "checkpointing", [None, False, True], ids=["stored", "recomputed", "reentrant"]
)
def test_encoder_decoder(checkpointing: bool | None) -> None:
    sources, targets = sequences(LENGTHS), sequences(DECODER_LENGTHS, seed=5)

    def stock(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model = build("t5", "eager", dtype)
        pairs = zip(sources, targets, strict=True)
        outputs = [
            model(input_ids=source[None], decoder_input_ids=target[None])
            for source, target in pairs
        ]
        return through(model, torch.cat([output.logits[0] for output in outputs]))

    model = build("t5", "fastft", dropout_rate=0.0)
    if checkpointing is not None:
        checkpoint_activations(model.train(), use_reentrant=checkpointing)
    with fastft.packed_attention(model):
        ours = through(model, model(**packed_pairs(sources, targets)).logits[0])
    runs = [stock(dtype) for dtype in (torch.float32, torch.float64)]
    for what, actual, plain, truth in zip(("logits", "gradients"), ours, *runs, strict=True):
        assert_no_worse(actual, plain, truth, f"t5 {what}", terms=terms_of(model, sum(LENGTHS)))


def test_encoder_decoder_of_equal_lengths() -> None:
    """Where lengths cannot tell self-attention from cross-attention."""
    sources, targets = sequences((4, 9)), sequences((9, 4), seed=5)
    model = build("t5", "fastft")
    with fastft.packed_attention(model), torch.no_grad():
        logits = model(**packed_pairs(sources, targets)).logits[0]
    stock = build("t5", "eager")
    pairs = zip(sources, targets, strict=True)
    truth = torch.cat(
        [stock(input_ids=s[None], decoder_input_ids=t[None]).logits[0] for s, t in pairs]
    ).detach()
    torch.testing.assert_close(logits, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert", "gemma2"])
def test_dropout_is_deterministic(name: str) -> None:
    """The same seed, the same bits, with gradient checkpointing too; another seed, other
    numbers."""
    tokens = sequences(LENGTHS)
    sizes = {"attention_probs_dropout_prob": 0.5} if name == "bert" else {"attention_dropout": 0.5}

    def run(seed: int, checkpointing: bool) -> tuple[Tensor, Tensor]:
        model = build(name, "fastft", **sizes).train()
        if checkpointing:
            checkpoint_activations(model, use_reentrant=False)
        torch.manual_seed(seed)
        return through(model, model(**packed(tokens), use_cache=False).logits[0])

    first, again, other = run(7, False), run(7, True), run(8, False)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    assert not torch.allclose(first[0], other[0])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma2", "gpt_oss", "llama4", "modernbert", "bert"]
)
def test_padded_batches_are_as_stock(name: str, side: str) -> None:
    """A batch that is not packed, after one that was."""
    model, stock = build(name, "fastft"), build(name, "eager")
    keep_segments(model)
    model(**packed(sequences(LENGTHS), MODELS[name].position_ids_start))
    rows = [
        torch.nn.functional.pad(
            part, (0, 13 - len(part)) if side == "right" else (13 - len(part), 0)
        )
        for part in sequences(LENGTHS)
    ]
    ids = torch.stack(rows)
    with torch.no_grad():
        ours, truth = (
            each(input_ids=ids, attention_mask=(ids > 0).long()).logits for each in (model, stock)
        )
    torch.testing.assert_close(ours[ids > 0], truth[ids > 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "t5"])
def test_generation(name: str) -> None:
    ids = torch.stack(sequences((9, 9)))
    model, stock = build(name, "fastft"), build(name, "eager")
    keep_segments(model)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    options |= {"min_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    ours, truth = (each.generate(ids, **options) for each in (model, stock))
    assert torch.equal(ours.sequences, truth.sequences)
    for one, two in zip(ours.logits, truth.logits, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_positions_alone() -> None:
    """A batch of DataCollatorWithFlattening's default keys is as with transformers' sdpa, right or
    wrong."""
    tokens = sequences(LENGTHS)
    batch = {
        key: value for key, value in packed(tokens).items() if key in ("input_ids", "position_ids")
    }
    for name in ("llama", "mistral", "llama4"):
        model, stock = build(name, "fastft"), build(name, "sdpa")
        ours = through(model, model(**batch, use_cache=False).logits[0])
        for mine, theirs in zip(
            ours, through(stock, stock(**batch, use_cache=False).logits[0]), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        if name != "llama4":
            assert_exact(name, tokens, ours)


def test_explicit_mask_is_cut_to_segments() -> None:
    """A mask of tokens that see each other both ways, as images have, over a packed batch."""
    tokens, model, stock = sequences(LENGTHS), build("llama", "fastft"), build("llama", "sdpa")
    lower = torch.ones(31, 31).tril().bool()
    lower[2:5, 2:5] = True  # an image in the first sequence
    lower[12:15, 12:15] = True  # and in the second
    with torch.no_grad():
        ours = model(**packed(tokens), attention_mask=lower[None, None]).logits[0]
        parts = zip(tokens, (0, 11, 18), strict=True)
        truth = torch.cat(
            [
                stock(
                    input_ids=part[None],
                    attention_mask=lower[None, None, at : at + len(part), at : at + len(part)],
                ).logits[0]
                for part, at in parts
            ]
        )
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    not hasattr(transformers.masking_utils, "blockwise_overlay"),
    reason="this transformers has no blocks",
)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("hooked", [True, False], ids=["hooked", "positions"])
def test_blocks_that_see_each_other_both_ways_get_a_mask(hooked: bool, window: int | None) -> None:
    """transformers 5.24 composes masks with `blockwise_overlay`; nothing that stands for a mask
    knows these."""
    lengths, layer = (6, 5, 8), nn.Module()
    blocks = torch.full((1, 19), -1)
    blocks[0, 1:4], blocks[0, 8:10], blocks[0, 13:17] = 0, 1, 2  # inside a sequence each
    masks = transformers.masking_utils
    make = masks.create_causal_mask if window is None else masks.create_sliding_window_causal_mask
    config = build("mistral" if window else "llama", "fastft").config
    config.sliding_window = window
    batch = packed(sequences(lengths))
    options: dict[str, Any] = {
        "position_ids": None if hooked else batch["position_ids"],
        "block_sequence_ids": blocks,
    }
    x = torch.randn(1, 19, 32)
    known = pytest.MonkeyPatch()
    known.setattr("fastft.attention.attention.segments_under_way", lambda: hooked or None)
    mask = make(config, x, None, **options, **{_CACHE: None})
    known.undo()
    assert isinstance(mask, Tensor) and mask.shape[-2:] == (19, 19)
    q, k, v = torch.randn(3, 1, 2, 19, 8)
    ours = fastft_attention(
        layer, q, k, v, mask, cu_seq_lens_q=batch["cu_seq_lens_q"], sliding_window=window
    )[0]
    at = torch.arange(19)
    seen = at[:, None] >= at
    if window is not None:
        seen &= at[:, None] - at < window
    seen |= (blocks[0][:, None] == blocks[0]) & (blocks[0] >= 0)
    seen &= batch["seq_idx"][0][:, None] == batch["seq_idx"][0]
    truth = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(ours, truth.transpose(1, 2), rtol=1e-5, atol=1e-5)


_CACHE = (
    "cache"
    if "cache"
    in inspect.signature(inspect.unwrap(transformers.masking_utils.create_causal_mask)).parameters
    else "past_key_values"
)


def test_autocast() -> None:
    tokens, model, stock = sequences(LENGTHS), build("llama", "fastft"), build("llama", "sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        ours = through(model, model(**packed(tokens)).logits[0].float())
        plain = through(
            stock, torch.cat([stock(input_ids=part[None]).logits[0] for part in tokens]).float()
        )
    truth = unpacked("llama", tokens, torch.float64)
    for one, other, exact in zip(ours, plain, truth, strict=True):
        assert_no_worse(one, other, exact, terms=terms_of(model, sum(LENGTHS)))


def _call(module: Any = None, tokens: int = 6, keys: int = 6, **kwargs: Any) -> Callable[[], Any]:
    def call() -> Any:
        q, k = torch.randn(1, 2, tokens, 8), torch.randn(1, 2, keys, 8)
        return fastft_attention(module or nn.Module(), q, k, k, **kwargs)

    return call


class _WithSinks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (_call(alibi=torch.ones(2)), NotImplementedError, "alibi"),
        (_call(indices=torch.ones(2)), NotImplementedError, "indices"),
        (_call(some_bias=torch.ones(1, 2, 6, 6)), NotImplementedError, "some_bias"),
        (_call(output_attentions=True), NotImplementedError, "output_attentions"),
        (_call(_WithSinks()), NotImplementedError, "sinks"),
        (_call(keys=9, cu_seq_lens_q=ends((2, 4))), NotImplementedError, "prefix tuning"),
        (_call(cu_seq_lens_q=ends((2, 3))), ValueError, "rise from 0 to 6"),
        (_call(cu_seq_lens_q=torch.tensor([0, 4, 2, 6])), ValueError, "rise from 0 to 6"),
        (_call(cu_seq_lens_q=torch.tensor([1, 6])), ValueError, "rise from 0 to 6"),
        (_call(cu_seq_lens_q=[0, 6]), ValueError, "cu_seq_lens_q must be an integer tensor"),
        (
            _call(cu_seq_lens_q=torch.tensor([0.0, 6.0])),
            ValueError,
            "cu_seq_lens_q must be an integer tensor",
        ),
        (
            _call(cu_seq_lens_q=ends((2, 4)), cu_seq_lens_k=ends((6,))),
            ValueError,
            "2 segments, cu_seq_lens_k has 1",
        ),
        (
            _call(cu_seq_lens_q=ends((6,)), decoder_cu_seq_lens=ends((2, 4))),
            ValueError,
            "decoder_cu_seq_lens has 2",
        ),
    ],
)
def test_bad_calls(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_chunks_and_padding_are_refused() -> None:
    tokens, model = sequences(LENGTHS), build("llama4", "fastft")
    with pytest.raises(NotImplementedError, match="chunked"):
        model(**packed(tokens), attention_mask=torch.ones(1, 31, dtype=torch.long))
