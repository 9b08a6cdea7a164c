"""Every task that Trainer trains: losses, norms, evaluations and predictions of stock, where the
model has a vocabulary and where it has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from support import plugged
from support.plugged import ENCODER, PAD, V, stock_and_plugged
from support.trainers import quiet_arguments
from transformers import Trainer

import fastft

pytestmark = pytest.mark.slow  # each is a quick test somewhere, but for its tolerance
SEQ2SEQ = {
    "kind": transformers.Seq2SeqTrainer,
    "arguments": transformers.Seq2SeqTrainingArguments,
}
DISTIL = {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": V, "dropout": 0.0}
BART = {"vocab_size": V, "d_model": 16, "pad_token_id": PAD, "dropout": 0.0}
for side in ("encoder", "decoder"):
    BART |= {f"{side}_layers": 1, f"{side}_ffn_dim": 16, f"{side}_attention_heads": 2}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def distilbert(kind):
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(**DISTIL, attention_dropout=0.0, pad_token_id=PAD)
    config.seq_classif_dropout = config.qa_dropout = 0.0
    return getattr(transformers, f"DistilBertFor{kind}")(config)


def bert(kind, **config):
    torch.manual_seed(0)
    made = transformers.BertConfig(**{**ENCODER, "num_labels": 3, **config})
    return getattr(transformers, f"BertFor{kind}")(made)


def bart():
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**BART))


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "n_embd": 16, "n_layer": 1, "n_head": 2}
    none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **none))


def vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=3))


def tokens(*shape):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(1))


def rows(**columns):
    """Sixteen examples of eight tokens, with the columns of a task."""
    ids = {"input_ids": tokens(16, 8), "attention_mask": torch.ones(16, 8, dtype=torch.long)}
    whole = {**ids, **columns}
    return [{name: column[index] for name, column in whole.items()} for index in range(16)]


CLASSES = torch.arange(16) % 3
WITHOUT_VOCABULARY = {
    "sequence classification": [
        (lambda: bert("SequenceClassification"), rows(labels=CLASSES)),
        (lambda: distilbert("SequenceClassification"), rows(labels=CLASSES % 2)),
    ],
    "regression, several labels": [
        (
            lambda: bert("SequenceClassification", num_labels=1, problem_type="regression"),
            rows(labels=torch.linspace(-1, 1, 16)),
        ),
        (
            lambda: bert("SequenceClassification", problem_type="multi_label_classification"),
            rows(labels=torch.eye(3)[CLASSES]),
        ),
    ],
    "token classification": [
        (lambda: bert("TokenClassification"), rows(labels=tokens(16, 8) % 3)),
    ],
    "question answering": [
        (
            lambda: distilbert("QuestionAnswering"),
            rows(start_positions=CLASSES, end_positions=CLASSES + 2),
        ),
    ],
    "multiple choice": [
        (
            lambda: bert("MultipleChoice"),
            rows(
                input_ids=tokens(16, 2, 8),
                attention_mask=torch.ones(16, 2, 8, dtype=torch.long),
                labels=CLASSES % 2,
            ),
        ),
    ],
    "image classification": [
        (
            vit,
            [
                {"pixel_values": torch.full((3, 8, 8), index / 16), "labels": index % 3}
                for index in range(16)
            ],
        ),
    ],
}


def run(folder, make, data, plug):
    arguments = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    args = quiet_arguments(folder, **arguments, eval_strategy="steps", eval_steps=3, seed=7)
    trainer = Trainer(make(), args, train_dataset=data, eval_dataset=data[:6])
    done = fastft.plug(trainer) if plug else None
    trainer.train()
    kept = {"loss": 1e-6, "eval_loss": 1e-6, "grad_norm": 1e-5}
    curve = [
        {
            name: pytest.approx(value, rel=kept[name])
            for name, value in entry.items()
            if name in kept
        }
        for entry in trainer.state.log_history
    ]
    return curve, trainer.state.log_history, trainer.predict(data[:6]), done


@pytest.mark.parametrize(
    ("make", "data"),
    [
        pytest.param(
            *case, marks=pytest.mark.way(way, loss="no vocabulary", optimizer="exact"), id=way
        )
        for way, cases in WITHOUT_VOCABULARY.items()
        for case in cases
    ],
)
def test_a_task_without_a_vocabulary_has_fastfts_adamw_and_stocks_losses(make, data, tmp_path):
    curve, _, expected, _ = run(tmp_path, make, data, False)
    _, history, found, done = run(tmp_path, make, data, True)
    assert len(curve) == len(history) > 3
    for wanted, entry in zip(curve, history, strict=True):
        assert {name: entry[name] for name in wanted} == wanted
    for theirs, ours in zip(leaves(expected), leaves(found), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert done.lines["loss"].startswith("left alone") and not done.report.fused
    assert done.lines["optimizer"].startswith("AdamW")


def leaves(prediction):
    whole = prediction.predictions
    return [*whole] if isinstance(whole, tuple) else [whole]


WITH_VOCABULARY = {
    "causal language models": {"Llama": ("causal", None), "GPT-2, tied": ("causal", gpt2)},
    "masked language models": {
        "BERT": ("masked", None),
        "DistilBERT, tied": ("masked", lambda: distilbert("MaskedLM")),
    },
    "T5, BART and their kind": {"T5": ("answers", None), "BART": ("answers", bart)},
}


@pytest.mark.parametrize(
    ("task", "make"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.way(way, loss="exact", optimizer="exact"))
        for way, cases in WITH_VOCABULARY.items()
        for name, case in cases.items()
    ],
)
def test_a_language_model_trains_as_stock(task, make, tmp_path, monkeypatch):
    if make is not None:
        monkeypatch.setitem(plugged.TASKS, task, (make, *plugged.TASKS[task][1:]))
    given = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    stock, ours, plug, _ = stock_and_plugged(tmp_path, task, **given)
    assert [*map(len, ours)] == [*map(len, stock)] == [3, 3, 1]
    for expected, actual, within in zip(stock, ours, (1e-6, 1e-5, 1e-6), strict=True):
        assert actual == pytest.approx(expected, rel=within)
    assert plug.report.fused == 3 and not plug.report.materialised


@pytest.mark.way("`predict_with_generate`", loss="exact", optimizer="exact")
def test_what_is_generated_in_an_evaluation_is_stocks(tmp_path):
    generated = []

    def keep(prediction):
        generated.append(prediction.predictions)
        return {}

    given = {"predict_with_generate": True, "generation_max_length": 6, "eval_strategy": "steps"}
    options = {"options": {"compute_metrics": keep}, "eval_steps": 2}
    stock, ours, plug, _ = stock_and_plugged(tmp_path, "answers", **SEQ2SEQ, **given, **options)
    assert plug.report.fused and len(generated) == 2 and (generated[0] == generated[1]).all()
    for expected, actual, within in zip(stock, ours, (1e-6, 1e-5, 1e-6), strict=True):
        assert actual == pytest.approx(expected, rel=within)


PACKED = {
    "causal language models": "causal",
    "masked language models": "masked",
    "token classification": "token classes",
    "sequence classification": "classes",
    "T5, BART and their kind": "answers",
}


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=pytest.mark.way(way, packing="exact"))
        for way, task in PACKED.items()
    ],
)
def test_packed_batches_have_the_losses_of_padded_ones(task, tmp_path):
    stock, ours, plug, _ = stock_and_plugged(tmp_path, task, plugs={"packing": "collate"})
    assert "probe exact" in plug.lines["packing"] and len(ours[0]) == 2
    for expected, actual, within in zip(stock, ours, (1e-6, 1e-5, 1e-6), strict=True):
        assert actual == pytest.approx(expected, rel=within)
