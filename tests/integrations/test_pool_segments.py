"""Sequence classification on packed batches: loss and gradients are those of one example at a time
in stock models."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy
import pytest
import torch
from support.numerics import assert_no_worse, terms_of
from support.pooled_models import LABELS, MODELS, V, classifier, labelled_examples
from support.trainers import logged, quiet_arguments

import fastft
from fastft.integrations.pool_segments import is_pooled

transformers = pytest.importorskip("transformers")


def block_mask(batch: dict, causal: bool) -> torch.Tensor:
    """True where stock attention may look: (R, 1, T, T)."""
    same = batch["seq_idx"][:, None, :, None] == batch["seq_idx"][:, None, None, :]
    return same.tril() if causal else same


def packed(model: torch.nn.Module, batch: dict) -> Any:
    """The model's output for the batch; stock attention keeps examples apart by a mask that the
    base model gets."""
    causal = type(model).__name__.startswith(("Llama", "GPT2"))
    mask = block_mask(batch, causal)
    base = getattr(getattr(model, "get_base_model", lambda: model)(), "base_model", None)
    handle = base.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
    )
    keys = ("input_ids", "position_ids", "labels", "label_segments", "cu_seq_lens_q")
    try:
        return model(**{key: batch[key] for key in keys if key in batch})
    finally:
        handle.remove()


def one_by_one(model: torch.nn.Module, batch: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits with their mean loss, and gradients, from the stock model, an example at a time, in
    the batch's order."""
    model, losses, logits = copy.deepcopy(model).to(dtype), [], []
    bounds = batch["cu_seq_lens_q"].tolist()
    for segment, label in zip(batch["label_segments"].tolist(), batch["labels"], strict=True):
        ids = batch["input_ids"].view(-1)[bounds[segment] : bounds[segment + 1]]
        label = label.to(dtype) if label.is_floating_point() else label
        out = model(input_ids=ids[None], labels=label[None])
        losses.append(out.loss)
        logits.append(out.logits)
    loss = torch.stack(losses).mean()
    loss.backward()
    return results(model, torch.cat(logits), loss)


def results(model: torch.nn.Module, logits: torch.Tensor, loss: torch.Tensor) -> list[torch.Tensor]:
    """Logits with the loss, and all gradients."""
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    return [
        torch.cat([logits.flatten(), loss[None]]),
        torch.cat([grad.flatten() for grad in grads]),
    ]


# transformers refuses several rows where there is no padding token
@pytest.mark.parametrize(
    ("name", "rows"),
    [(n, r) for n in MODELS for r in (1, 2) if (n, r) != ("llama without padding", 2)],
)
@pytest.mark.parametrize("labels", LABELS)
def test_equals_one_example_at_a_time(name: str, labels: str, rows: int) -> None:
    model = classifier(name, labels)
    collator = fastft.PackingCollator(
        task="sequence_classification",
        rows=rows,
        pad_to_multiple_of=8,
        position_ids_start=2 * (name == "roberta"),
    )
    batch = collator(labelled_examples(labels))
    plain, truth = (one_by_one(model, batch, dtype) for dtype in (torch.float32, torch.float64))
    with fastft.pool_segments(model):
        out = packed(model, batch)
    out.loss.backward()
    for actual, rival, exact in zip(
        results(model, out.logits, out.loss), plain, truth, strict=True
    ):
        assert_no_worse(actual, rival, exact, terms=terms_of(model, batch["input_ids"].numel()))


def test_without_labels_and_unpacked_batches() -> None:
    model = classifier("bert")
    unpacked = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    stock = model(**unpacked).logits
    collator = fastft.PackingCollator(task="sequence_classification")
    batch = collator([{"input_ids": row} for row in unpacked["input_ids"].tolist()])
    assert "labels" not in batch
    with fastft.pool_segments(model):
        assert torch.equal(model(**unpacked).logits, stock)
        out = packed(model, batch)
        assert out.loss is None
        torch.testing.assert_close(out.logits, stock)
    assert torch.equal(model(**unpacked).logits, stock)
    assert not model._forward_pre_hooks and not model.bert.pooler._forward_pre_hooks


def test_peft_and_training_mode_are_left_alone() -> None:
    peft = pytest.importorskip("peft")
    model = classifier("bert")
    collator = fastft.PackingCollator(task="sequence_classification")
    batch = collator(labelled_examples("classes"))
    with fastft.pool_segments(model):
        expected = packed(model, batch)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2))
    if "self.model.forward" in inspect.getsource(peft.tuners.tuners_utils.BaseTuner.forward):
        with pytest.raises(ValueError, match="past its hooks"):
            fastft.pool_segments(adapted)
        return
    adapted.train()
    model.bert.encoder.eval()
    flags = [module.training for module in adapted.modules()]
    with fastft.pool_segments(adapted):
        assert [module.training for module in adapted.modules()] == flags
        adapted.eval()
        out = packed(adapted, batch)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss)


def test_models_that_pool_otherwise_are_refused() -> None:
    config = transformers.XLNetConfig(
        vocab_size=V, d_model=16, n_layer=1, n_head=2, d_inner=16, summary_type="mean"
    )
    for model, message in (
        (classifier("bert").bert, "BertModel is no transformers model for sequence classification"),
        (torch.nn.Linear(2, 2), "Linear is no transformers model"),
        (
            transformers.XLNetForSequenceClassification(config),
            "XLNetForSequenceClassification is no transformers model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fastft.pool_segments(model)
        assert not model._forward_pre_hooks
    model = classifier("bert")
    pooler = model.bert.pooler
    pooler.forward = lambda hidden_states: torch.tanh(pooler.dense(hidden_states.mean(1)))
    with pytest.raises(ValueError, match="BertForSequenceClassification pools its tokens in a way"):
        fastft.pool_segments(model)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        fastft.pool_segments("bert")


def test_a_batch_without_boundaries_is_named() -> None:
    model = classifier("bert")
    with (
        fastft.pool_segments(model),
        pytest.raises(ValueError, match="label_segments but no cu_seq_lens_q"),
    ):
        model(input_ids=torch.tensor([[5, 6]]), label_segments=torch.tensor([0]))


def trained(tmp_path: Any, name: str, how: str, labels: str) -> list[float]:
    """The losses of training and evaluation, and metrics of predictions: padded by transformers,
    packed by a collator with a callback, or by `plug`, with AdamW."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers.set_seed(1)
    model = classifier(name, labels)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    data = labelled_examples(labels) * 3
    if how == "a callback":
        collator: Any = fastft.PackingCollator(task="sequence_classification")
    else:
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0}, unk_token="[PAD]"))
        collator = transformers.DataCollatorWithPadding(
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="[PAD]", padding_side="right"
            )
        )
        data = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in data]
    training = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 5}
    arguments = quiet_arguments(tmp_path, **training, **batches, **evaluation)
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator,
        # what labels predictions have is seen where each weighs otherwise
        compute_metrics=lambda p: {
            "weighed": float((p.predictions.sum(-1) * numpy.arange(len(p.label_ids))).sum()),
            "labels": float(numpy.square(p.predictions.sum(-1) - p.label_ids.sum(-1)).sum()),
        },
        callbacks=[fastft.PackingCallback()],
    )
    if how == "plug":
        line = fastft.plug(trainer, packing="collate").lines["optimizer"]
        assert line.startswith("AdamW"), line
    trainer.train()
    assert not is_pooled(model)
    return logged(trainer, "loss", "eval_loss", "eval_weighed", "eval_labels")


def _ways(name: str, labels: str, how: str) -> list[Any]:
    columns = {"loss": "no vocabulary", "packing": "exact"}
    columns |= {"optimizer": "exact"} if how == "plug" else {}
    titles = ["sequence classification" + (" on decoders" if name == "llama" else "")]
    titles += ["reward models"] if (name, labels) == ("llama", "regression") else []
    return [pytest.mark.way(title, **columns) for title in titles]


@pytest.mark.parametrize(
    ("name", "labels", "how"),
    [
        pytest.param(*case, marks=_ways(*case))
        for case in [
            *((name, "classes", "a callback") for name in ("bert", "distilbert", "llama")),
            *(("modernbert mean", "classes", "a callback"), ("llama", "several", "a callback")),
            *(("llama", "classes", "plug"), ("llama", "regression", "plug")),
        ]
    ],
)
def test_trainer_packed_is_trainer_padded(name: str, labels: str, how: str, tmp_path: Any) -> None:
    """Nobody calls pool_segments."""
    padded = trained(tmp_path, name, "padding", labels)
    assert len(padded) == 6
    assert trained(tmp_path, name, how, labels) == pytest.approx(padded, rel=1e-5, abs=1e-6)


def test_a_copy_of_the_model_pools_too() -> None:
    """As a Trainer's best model or a teacher is made; the copy's batches do not reach the model."""
    model = classifier("bert")
    batch = fastft.PackingCollator(task="sequence_classification")(labelled_examples("classes"))
    with fastft.pool_segments(model):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            expected = packed(twin, batch)
            ours = packed(model, batch)
            assert torch.equal(ours.logits, expected.logits) and torch.equal(
                ours.loss, expected.loss
            )
