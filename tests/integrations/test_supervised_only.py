"""PackingCollator(supervised_only=True): logits for the tokens alone that predict a label, and the
same loss."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.fused_trainings import V, arguments, assert_stock, gemma, llama
from support.trainers import logged
from support.versions import chosen_logits
from torch import nn
from transformers import Trainer

from fastft import PackingCollator
from fastft.integrations.fused_loss import FusedLossCallback


def conversations(count=24, seed=5):
    """Tokens of which the later part, or nothing, is supervised."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        ids = torch.randint(3, V, (4 + 3 * (index % 5),), generator=generator)
        labels = ids.clone()
        labels[: (index * 7) % (len(ids) + 1)] = -100
        examples.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return examples


@chosen_logits
@pytest.mark.parametrize("padding", [None, 16])
@pytest.mark.parametrize("count", [1, 2, 24])
def test_it_keeps_the_tokens_before_a_label(count, padding):
    batch = PackingCollator(supervised_only=True, pad_to_multiple_of=padding)(conversations(count))
    plain = PackingCollator(pad_to_multiple_of=padding)(conversations(count))
    keep, following = batch.pop("logits_to_keep"), batch.pop("shift_labels")
    assert batch.keys() == plain.keys() and torch.equal(batch["labels"], plain["labels"])
    assert keep.dtype == torch.bool and keep.shape == plain["labels"].shape
    expected = nn.functional.pad(plain["labels"][0, 1:], (0, 1), value=-100)
    assert torch.equal(keep[0], expected != -100)
    assert torch.equal(following, expected[expected != -100])


MODELS = {
    "llama": llama,
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=V, n_positions=256)
    ),
    "gemma2": gemma,
}


def train(tmp_path, make, supervised_only, callbacks=(), **changes):
    torch.manual_seed(3)
    model, rows = make(), []
    head = model.get_output_embeddings()

    def count(module, args, output):
        # the probe for leaks and evaluation look at more
        if module.training and torch.is_grad_enabled():
            rows.append(args[0].numel() // head.in_features)

    handle = head.register_forward_hook(count)
    options = arguments(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        prediction_loss_only=True,
        per_device_eval_batch_size=4,
        **changes,
    )
    collator = PackingCollator(supervised_only=model if supervised_only else False)
    trainer = Trainer(
        model,
        options,
        train_dataset=conversations(),
        eval_dataset=conversations(6, seed=7),
        data_collator=collator,
        callbacks=list(callbacks),
    )
    trainer.train()
    handle.remove()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return logged(trainer, "loss", "eval_loss"), weights, sum(rows), model


@chosen_logits
@pytest.mark.parametrize(
    ("name", "fused"), [("llama", False), ("llama", True), ("gpt2", False), ("gemma2", True)]
)
def test_trainer_is_stock_on_fewer_rows(name, fused, tmp_path):
    losses, weights, rows, _ = train(tmp_path, MODELS[name], False, weight_decay=0.01, optim="sgd")
    callbacks = [FusedLossCallback()] if fused else []
    kept_losses, kept_weights, kept_rows, model = train(
        tmp_path, MODELS[name], True, callbacks, weight_decay=0.01, optim="sgd"
    )
    assert kept_losses == pytest.approx(losses, rel=1e-6) and len(losses) == 6
    assert 0 < kept_rows < 0.7 * rows
    for key, value in weights.items():
        torch.testing.assert_close(kept_weights[key], value, rtol=1e-5, atol=1e-6)
    for callback in callbacks:
        assert callback.report.fused == 8 and not callback.report.materialised
        assert_stock(model)


def test_bad_arguments_are_named(monkeypatch):
    with pytest.raises(
        ValueError, match="supervised_only must be True, False or a model, got 'yes'"
    ):
        PackingCollator(supervised_only="yes")
    monkeypatch.delattr(transformers.modeling_utils, "slice_logits_to_keep", raising=False)
    with pytest.raises(ValueError, match=r"supervised_only needs transformers >= 5\.23"):
        PackingCollator(supervised_only=True)


@chosen_logits
def test_a_model_without_chosen_logits_is_refused():
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
    )
    with pytest.raises(ValueError, match="supervised_only: BertForMaskedLM does not use"):
        PackingCollator(supervised_only=bert)
