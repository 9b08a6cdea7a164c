"""Encoder and decoder packed: the layout, what the decoder reads, and T5's loss and gradients
against separate runs."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.numerics import assert_no_worse, terms_of
from support.packed_examples import FORMS, assert_same, unpacked

import fastft
from fastft.data.collator import PackingCollator
from fastft.integrations.implementations import attention_configs

transformers = pytest.importorskip("transformers")

START, PAD = 50, 0


def pairs(encoder, decoder):
    """Examples of which the first tokens tell their number, in the encoder and in the decoder."""
    return [
        {"input_ids": [100 + i, *range(2, n + 1)], "labels": [100 + i, *range(2, m + 1)]}
        for i, (n, m) in enumerate(zip(encoder, decoder, strict=True))
    ]


def collator(**options):
    return PackingCollator(
        task="seq2seq", **{"decoder_start_token_id": START, "pad_token_id": PAD, **options}
    )


def test_keys():
    batch = collator(pad_to_multiple_of=4)(pairs([3, 2], [1, 2]))
    assert batch["input_ids"].tolist() == [[100, 2, 3, 101, 2, 0, 0, 0]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8] and batch["max_length_k"] == 3
    assert batch["labels"].tolist() == [[100, 101, 2, -100]]
    assert batch["decoder_input_ids"].tolist() == [[START, START, 101, START]]
    assert (
        batch["decoder_cu_seq_lens"].tolist() == [0, 1, 3, 4] and batch["decoder_max_length"] == 2
    )
    assert batch["decoder_cu_seq_lens"].dtype == torch.int32 and batch.counted == 3


@pytest.mark.parametrize(
    "forms", [("tuple", "tuple"), ("list", "tuple"), ("numpy", "list"), ("torch", "tuple")]
)
def test_any_form_of_labels_where_the_decoder_has_no_padding(forms):
    """A padded row of the encoder has a segment in the decoder without a token."""
    expected = collator(rows=2)(pairs([3, 1], [2, 2]))
    assert 0 in expected["decoder_cu_seq_lens"].diff().tolist()
    examples = [
        {key: FORMS[form](value) for key, value in one.items()}
        for form, one in zip(forms, pairs([3, 1], [2, 2]), strict=True)
    ]
    assert_same(collator(rows=2)(examples), expected)


def test_padding_of_the_decoder_reads_padding_of_the_encoder():
    """A full row of the encoder grows where its decoder is not full."""
    batch = collator(rows=2)(pairs([10, 8], [3, 5]))
    assert batch["input_ids"].shape == (2, 11) and batch["labels"].shape == (2, 5)
    assert batch["cu_seq_lens_q"].tolist() == [0, 10, 11, 19, 22]
    # padding of the encoder alone: nobody reads it
    assert batch["decoder_cu_seq_lens"].tolist() == [0, 3, 5, 10, 10]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.none() | st.integers(1, 8),
)
def test_segments_of_both_sides_belong_together(sizes, rows, multiple):
    examples = pairs(*zip(*sizes, strict=True))
    batch = collator(rows=rows, pad_to_multiple_of=multiple)(examples)
    texts, labels = unpacked(batch, "input_ids"), unpacked(batch, "labels", "decoder_cu_seq_lens")
    read = unpacked(batch, "decoder_input_ids", "decoder_cu_seq_lens")
    assert len(texts) == len(labels)
    by_number = {example["input_ids"][0]: example for example in examples}
    for text, label, tokens in zip(texts, labels, read, strict=True):
        example = by_number.pop(text[0], None)
        if example is None:  # padding: whatever decodes it has something to read
            assert set(text) == {PAD} and set(label) <= {-100} and len(text) > 0
            continue
        assert text == example["input_ids"] and label == example["labels"]
        assert tokens == [START, *label[:-1]]
    assert not by_number
    width, height = batch["labels"].shape[1], batch["labels"].shape[0]
    assert batch["input_ids"].shape[0] == height == min(rows, len(sizes))
    assert all(row * width in batch["decoder_cu_seq_lens"] for row in range(height))


def test_what_the_decoder_reads_is_transformers_shift():
    config = transformers.T5Config(
        vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    config.decoder_start_token_id, config.pad_token_id = START, PAD
    model = transformers.T5ForConditionalGeneration(config)
    labels = [5, -100, 6, 7, -100]
    batch = collator()([{"input_ids": [1], "labels": labels}])
    expected = model.prepare_decoder_input_ids_from_labels(torch.tensor([labels]))
    assert torch.equal(batch["decoder_input_ids"], expected)


def test_given_decoder_input_ids_and_masks():
    example = {
        "input_ids": [1, 2],
        "attention_mask": [1, 0],
        "labels": [3, 4, -100],
        "decoder_attention_mask": [1, 1, 0],
    }
    given = [{**example, "decoder_input_ids": [7, 8, 9]}]
    batch = collator(decoder_start_token_id=None)(given)
    assert batch["input_ids"].tolist() == [[1]] and batch["labels"].tolist() == [[3, 4]]
    assert batch["decoder_input_ids"].tolist() == [[7, 8]] and "decoder_attention_mask" not in batch
    del given[0]["labels"]
    without = collator()(given)
    assert (
        "labels" not in without
        and without["decoder_input_ids"].tolist() == [[7, 8]]
        and without.counted is None
    )


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ({"input_ids": [1]}, {}, r"task 'seq2seq' needs labels, the examples have \['input_ids'\]"),
        ({"input_ids": [1], "labels": []}, {}, "example 0 has no tokens: labels is empty"),
        (
            {"input_ids": [1], "labels": [1]},
            {"decoder_start_token_id": None},
            "needs decoder_start_token_id",
        ),
        (
            {"input_ids": [1], "labels": [1, 2], "decoder_input_ids": [1]},
            {},
            "has length 1, its labels 2",
        ),
        (
            {"input_ids": [1], "labels": [1], "decoder_attention_mask": [0]},
            {},
            "its decoder_attention_mask is all zeros",
        ),
        ({"input_ids": [1], "labels": [1.5]}, {}, "labels must be integers, got torch.float32"),
    ],
)
def test_bad_input(example, options, message):
    with pytest.raises(ValueError, match=message):
        collator(**options)([example])


def test_masks_need_a_decoder():
    with pytest.raises(ValueError, match="batch must be one of task 'seq2seq', got the keys"):
        fastft.seq2seq_masks(PackingCollator()([{"input_ids": [1]}]))


def separately(model, examples, dtype):
    """Loss over all tokens and gradients of the stock model, an example at a time."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation("eager")
    total = sum(len(example["labels"]) for example in examples)
    loss = sum(
        model(
            input_ids=torch.tensor([example["input_ids"]]), labels=torch.tensor([example["labels"]])
        ).loss
        * (len(example["labels"]) / total)
        for example in examples
    )
    loss.backward()
    return loss, torch.cat([param.grad.flatten() for param in model.parameters()])


def boundaries(model, batch):
    # set_attn_implementation of older versions leaves an encoder's copy alone
    for config in attention_configs(model):
        config._attn_implementation = "fastft"
    with fastft.packed_attention(model):
        return model(**batch).loss


def masks(model, batch):
    encoder, decoder, cross = fastft.seq2seq_masks(batch)
    states = model.get_encoder()(batch["input_ids"], attention_mask=encoder)
    tokens = {key: batch[key] for key in ("decoder_input_ids", "labels")}
    return model(
        encoder_outputs=states, attention_mask=cross, decoder_attention_mask=decoder, **tokens
    ).loss


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("way", [boundaries, masks])
def test_t5_equals_separate_runs(way, rows):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=120,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        initializer_factor=0.3,
    )
    config.decoder_start_token_id, config.pad_token_id = PAD, PAD
    model = transformers.T5ForConditionalGeneration(config).eval()
    examples = pairs([5, 9, 1, 4], [3, 1, 6, 4])
    batch = collator(rows=rows, pad_to_multiple_of=8, decoder_start_token_id=PAD)(examples)
    plain, truth = (separately(model, examples, dtype) for dtype in (torch.float32, torch.float64))
    loss = way(model, batch)
    loss.backward()
    grads = torch.cat([param.grad.flatten() for param in model.parameters()])
    terms = terms_of(model, batch["input_ids"].numel())
    assert_no_worse(loss, plain[0], truth[0], "loss", terms=terms)
    assert_no_worse(grads, plain[1], truth[1], "gradients", terms=terms)
