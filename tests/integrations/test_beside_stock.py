"""What stock Trainer does worse than fastft, as docs/troubleshooting.md tells it."""

import pytest
import torch
from support.trainers import logged, quiet_arguments
from torch.nn import functional as F

import fastft

transformers = pytest.importorskip("transformers")

EXAMPLES = [{"input_ids": list(range(3, 8 + number % 4))} for number in range(8)]


def padded(features):
    longest = max(len(feature["input_ids"]) for feature in features)
    rows = [feature["input_ids"] for feature in features]
    filled = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    values = {"input_ids": rows, "labels": rows, "attention_mask": [[1] * len(row) for row in rows]}
    return {
        key: torch.tensor([row + [filled[key]] * (longest - len(row)) for row in values[key]])
        for key in values
    }


def first_loss(model, collator, folder):
    args = quiet_arguments(folder, max_steps=1, per_device_train_batch_size=8, learning_rate=0.0)
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=EXAMPLES, data_collator=collator
    )
    trainer.train()
    return logged(trainer)[0]


def test_gpt2_counts_the_first_label_of_each_row_in_stock_alone(tmp_path):
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **no_dropout))
    batch = padded(EXAMPLES)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    true_mean = float(
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    )
    labels = sum(len(example["input_ids"]) for example in EXAMPLES)
    stock, ours = (
        first_loss(model, padded, tmp_path),
        first_loss(model, fastft.PackingCollator(), tmp_path),
    )
    assert ours == pytest.approx(true_mean, rel=1e-5)
    assert stock in (
        pytest.approx(true_mean * (labels - len(EXAMPLES)) / labels, rel=1e-5),
        pytest.approx(true_mean, rel=1e-5),  # a later transformers may have mended it
    )


def test_an_end_token_that_pads_is_learnt():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2}, "a"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>"
    )
    rows = [{"input_ids": [1, 2, 0]}, {"input_ids": [2, 0]}]
    stock = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)(
        [dict(row) for row in rows]
    )
    assert 0 not in stock["labels"]
    assert fastft.PackingCollator()(rows)["labels"].tolist() == [[-100, 2, 0, -100, 0]]
