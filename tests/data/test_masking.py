"""Masked language modelling: the draws of transformers' collator, on packed batches."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from support.packed_examples import make, unpacked
from torch.utils.data import DataLoader

from fastft.data.collator import PackingCollator

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

MASK, CLS, SEP, PAD, WORDS = 1, 2, 3, 0, 400


@pytest.fixture(scope="module")
def tokenizer():
    special = {"[PAD]": PAD, "[MASK]": MASK, "[CLS]": CLS, "[SEP]": SEP}
    words = special | {f"w{index}": index for index in range(4, WORDS)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    names = dict(zip(("pad_token", "mask_token", "cls_token", "sep_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)


def sentences(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": [
                CLS,
                *torch.randint(4, WORDS, (size - 2,), generator=generator).tolist(),
                SEP,
            ]
        }
        for size in sizes
    ]


def with_special(examples):
    return [
        {**e, "special_tokens_mask": [int(token < 4) for token in e["input_ids"]]} for e in examples
    ]


@pytest.mark.parametrize(
    "prepare", [lambda examples: examples, with_special], ids=["tokenizer", "special_tokens_mask"]
)
@pytest.mark.parametrize("probability", [0.15, 0.0, 1.0])
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize(("count", "rows"), [(1, 1), (6, 1), (6, 3)])
def test_masks_are_those_of_transformers(tokenizer, prepare, probability, seed, count, rows):
    """Equally long examples have no padding there: both see the same tokens in the same order."""
    examples = prepare(sentences([40] * count))
    theirs = transformers.DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=probability, seed=seed
    )
    ours = PackingCollator(
        task="masked_lm",
        tokenizer=tokenizer,
        mlm_probability=probability,
        seed=seed,
        rows=rows,
        pad_token_id=PAD,
    )
    for step in range(2):
        torch.manual_seed(step)
        expected = theirs([dict(example) for example in examples])
        torch.manual_seed(step)
        batch = ours(examples)
        if rows == 1:
            for key in ("input_ids", "labels"):
                assert batch[key].flatten().tolist() == expected[key].flatten().tolist()
        else:  # the examples lie in another order
            assert batch["labels"].shape == (3, 80)
        assert (
            batch.counted == int((batch["labels"] != -100).sum())
            and "special_tokens_mask" not in batch
        )
        assert (batch.counted > 0) == (probability > 0)


def test_shares_and_what_is_never_masked(tokenizer):
    examples = sentences([500] * 40 + [17])
    collator = PackingCollator(
        task="masked_lm", tokenizer=tokenizer, seed=1, pad_to_multiple_of=64, pad_token_id=PAD
    )
    batch = collator(examples)
    truth = torch.tensor([token for example in examples for token in example["input_ids"]])
    tokens = batch["input_ids"][0, : truth.numel()]
    labels = batch["labels"][0, : truth.numel()]
    counted = labels != -100
    words = truth > 3
    assert torch.equal(labels[counted], truth[counted]) and not counted[~words].any()
    assert torch.equal(tokens[~counted], truth[~counted])
    assert set(batch["labels"][0, truth.numel() :].tolist()) == {-100}
    assert set(batch["input_ids"][0, truth.numel() :].tolist()) == {PAD}
    masked, kept = tokens[counted] == MASK, tokens[counted] == truth[counted]
    shares = [counted[words].float().mean(), masked.float().mean(), kept.float().mean()]
    for share, expected in zip(shares, (0.15, 0.8, 0.1), strict=True):
        assert abs(share - expected) < 0.03  # 3000 draws: four standard deviations
    assert (tokens[counted][~masked & ~kept] < WORDS).all()


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_tokens_that_attention_mask_takes_out_are_not_drawn_for(tokenizer, form):
    kinds = {"numpy": lambda x: torch.tensor(x).numpy(), "torch": torch.tensor}
    examples = [{**e, "attention_mask": [1] * 9 + [0] * 3} for e in sentences([12, 12])]
    examples = [{key: kinds[form](value) for key, value in e.items()} for e in examples]
    shorter = [{"input_ids": e["input_ids"][:9]} for e in examples]
    collators = [PackingCollator(task="masked_lm", tokenizer=tokenizer, seed=3) for _ in range(2)]
    batches = [
        collator(features)
        for collator, features in zip(collators, (examples, shorter), strict=True)
    ]
    for key in ("input_ids", "labels", "cu_seq_lens_q"):
        assert torch.equal(batches[0][key], batches[1][key])


def test_the_seed_decides(tokenizer):
    def labels(collator, calls=2):
        return torch.stack([collator(sentences([90]))["labels"] for _ in range(calls)])

    def collator(seed):
        return PackingCollator(task="masked_lm", tokenizer=tokenizer, seed=seed)

    first = labels(collator(5))
    assert torch.equal(labels(collator(np.int64(5))), first)
    assert torch.equal(labels(collator(5)), first) and not torch.equal(first[0], first[1])
    assert not torch.equal(labels(collator(6)), first)
    assert torch.equal(labels(pickle.loads(pickle.dumps(collator(5)))), first)


def test_one_that_is_made_anew_draws_from_the_beginning_as_transformers(tokenizer):
    """A run that resumes has other masks than it would have had."""
    examples = sentences([90])

    def draws(made, calls):
        return [made([dict(one) for one in examples])["labels"].flatten() for _ in range(calls)]

    def ours():
        return PackingCollator(task="masked_lm", tokenizer=tokenizer, seed=5)

    def theirs():
        return transformers.DataCollatorForLanguageModeling(tokenizer, seed=5)

    for collator in (ours, theirs):
        whole = draws(collator(), 4)
        resumed = draws(collator(), 2)
        assert all(map(torch.equal, resumed, whole[:2]))
        assert not any(map(torch.equal, resumed, whole[2:]))


def test_workers_draw_masks_of_their_own(tokenizer):
    collator = PackingCollator(task="masked_lm", tokenizer=tokenizer, seed=5)
    here = collator(sentences([90]))["labels"]
    loader = DataLoader(sentences([90]) * 2, batch_size=1, collate_fn=collator, num_workers=2)
    first, second = (batch["labels"] for batch in loader)
    assert torch.equal(first, here) and not torch.equal(first, second)


def test_without_a_tokenizer_the_examples_are_masked_already():
    batch = PackingCollator(task="masked_lm")(make([2, 3], labels=50))
    assert unpacked(batch, "labels") == [[50, 51], [50, 51, 52]]
    with pytest.raises(
        ValueError, match="task 'masked_lm' needs tokenizer, or examples that have labels already"
    ):
        PackingCollator(task="masked_lm")(make([2, 3]))


def test_bad_arguments(tokenizer):
    with pytest.raises(ValueError, match=r"mlm_probability must be from 0 to 1, got 1\.5"):
        PackingCollator(task="masked_lm", tokenizer=tokenizer, mlm_probability=1.5)
    with pytest.raises(ValueError, match=r"mlm_probability must be from 0 to 1, got '0\.15'"):
        PackingCollator(task="masked_lm", tokenizer=tokenizer, mlm_probability="0.15")
    with pytest.raises(ValueError, match="tokenizer must have a mask token, str has none"):
        PackingCollator(task="masked_lm", tokenizer="bert")
