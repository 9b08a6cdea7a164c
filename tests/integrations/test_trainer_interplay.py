"""FusedLossCallback beside what else Trainer can do, step by step as stock; and beside others who
patch the model."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.fused_trainings import (
    V,
    arguments,
    assert_stock,
    examples,
    llama,
    per_token_loss,
    train,
)
from support.trainers import logged
from support.watch import Watch
from torch import nn
from transformers import Trainer

from fastft.integrations import fused_loss as fused_loss_module
from fastft.integrations.fused_loss import FusedLossCallback
from fastft.loss.lazy.output_head import fused_loss

STEPS = 4


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(fused_loss_module.logger, "warning", said.append)
    return said


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def logits_accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def best_tokens(logits, labels):
    return logits.argmax(-1)


EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}
FEATURES = {
    "compute_metrics": (EVALUATION, {"compute_metrics": logits_accuracy}),
    "preprocess_logits_for_metrics": (
        EVALUATION,
        {"compute_metrics": accuracy, "preprocess_logits_for_metrics": best_tokens},
    ),
    "prediction_loss_only": ({**EVALUATION, "prediction_loss_only": True}, {}),
    "eval_on_start": ({**EVALUATION, "eval_on_start": True}, {"compute_metrics": logits_accuracy}),
    "evaluation with smoothing": ({**EVALUATION, "label_smoothing_factor": 0.1}, {}),
    "neftune": ({"neftune_noise_alpha": 5.0}, {}),
    "accumulation of four": (
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
        {},
    ),
    "no clipping": ({"max_grad_norm": 0.0}, {}),
}


def metrics(trainer):
    return [
        {
            key: value
            for key, value in entry.items()
            if key in ("loss", "eval_loss", "eval_accuracy", "grad_norm")
        }
        for entry in trainer.state.log_history
    ]


def compare(tmp_path, changes, options=None, make=llama, only_fused=None):
    """The callback and the trainer of a run that equals the stock one; `only_fused`: changes of the
    fused run alone."""
    options = {"eval_dataset": examples(6), **(options or {})}
    _, _, stock = train(tmp_path, make(), (), options, max_steps=STEPS, **changes)
    callback, model = FusedLossCallback(), make()
    changes = changes | (only_fused or {})
    _, _, fused = train(tmp_path, model, [callback], options, max_steps=STEPS, **changes)
    expected, actual = metrics(stock), metrics(fused)
    assert len(actual) == len(expected) >= STEPS
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5)
    assert (
        callback.report.fused and not callback.report.materialised and not callback.report.skipped
    ), callback.report
    assert_stock(model)
    return callback, fused


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_of_trainer_is_stock(name, tmp_path):
    changes, options = FEATURES[name]
    compare(tmp_path, changes, options)


def test_a_micro_batch_without_labels(tmp_path):
    rows = examples(16)
    for row in rows[::3]:
        row["labels"] = torch.full_like(row["labels"], -100)
    losses = []
    for callbacks in ([], [FusedLossCallback()]):
        options = arguments(
            tmp_path, max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=4
        )
        trainer = Trainer(llama(), options, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == STEPS


def test_a_smaller_batch_is_found_after_running_out_of_memory(tmp_path):
    def cramped():
        model = llama()

        def before(module, args):
            if len(args[0]) > 2:
                raise RuntimeError("CUDA out of memory.")

        model.model.embed_tokens.register_forward_pre_hook(before)
        return model

    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    finding = {"auto_find_batch_size": True, "per_device_train_batch_size": 3}
    callback, trainer = compare(tmp_path, changes, make=cramped, only_fused=finding)
    assert trainer._train_batch_size == 2 and callback.report.fused == STEPS


def test_compiled(tmp_path):
    """With label smoothing; without it: `test_evaluation.py`.

    A compiled model's labels are not shifted by Trainer's label smoother: stock is compiled, too.
    """
    torch._dynamo.reset()
    compiling = {"torch_compile": True, "torch_compile_backend": "eager"}
    compare(tmp_path, {"label_smoothing_factor": 0.1, **compiling})


@pytest.mark.way("resuming", loss="exact")
def test_training_goes_on_from_a_checkpoint(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    _, fused = compare(tmp_path, {**saving, "load_best_model_at_end": True})
    kept = {name: parameter.clone() for name, parameter in fused.model.named_parameters()}
    model = llama()
    options = arguments(tmp_path, max_steps=STEPS, **saving, load_best_model_at_end=True)
    trainer = Trainer(
        model,
        options,
        train_dataset=examples(),
        eval_dataset=examples(6),
        callbacks=[FusedLossCallback()],
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, kept[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"label_smoothing_factor": 0.1}], ids=str)
def test_no_tensor_as_large_as_the_logits_in_a_whole_trainer_step(changes, tmp_path):
    vocabulary, rows, length = 20_000, 4, 256
    tokens = torch.randint(3, vocabulary, (rows, length))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    callback = FusedLossCallback()
    options = arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        **changes,
    )
    small = {"hidden_size": 16, "intermediate_size": 16}
    model = llama(vocab_size=vocabulary, max_position_embeddings=length, **small)
    trainer = Trainer(model, options, train_dataset=data, callbacks=[callback])
    with Watch() as seen:
        trainer.train()
    assert callback.report.fused and not callback.report.materialised
    assert vocabulary < seen.elements < rows * length * vocabulary


def test_accelerate_converts_lazy_logits_without_numbers(tmp_path):
    """Its mixed precision casts every output of 16 bits to fp32; a loss function then gets
    these."""
    seen = []

    def loss_of(outputs, labels, num_items_in_batch=None):
        seen.append((type(outputs.logits).__name__, outputs.logits.dtype))
        return per_token_loss(outputs, labels, num_items_in_batch)

    callback = FusedLossCallback()
    train(
        tmp_path,
        callbacks=[callback],
        trainer_options={"compute_loss_func": loss_of},
        max_steps=1,
        bf16=True,
    )
    assert set(seen) == {("LazyLogits", torch.float32)} and not callback.report.materialised


def test_each_place_that_asks_for_real_logits_is_said_once(tmp_path, warnings):
    def loss_of(outputs, labels, num_items_in_batch=None):
        late = len(seen) >= 4
        seen.append(outputs.logits.sort(-1).values if late else None)
        return per_token_loss(outputs, labels, num_items_in_batch)

    seen, callback = [], FusedLossCallback()
    train(
        tmp_path, callbacks=[callback], trainer_options={"compute_loss_func": loss_of}, max_steps=4
    )
    assert callback.report.fused == 4 and len(callback.report.materialised) == 1
    assert (
        len(warnings) == 1
        and "sort at " in warnings[0]
        and "test_trainer_interplay.py:" in warnings[0]
    )


# --- beside others who patch the model


class Bypassed(transformers.LlamaForCausalLM):
    """Unsloth's way: the model's forward computes the loss from the head's weight."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = nn.functional.linear(hidden[:, :-1], self.lm_head.weight)
        loss = nn.functional.cross_entropy(logits.reshape(-1, V), labels[:, 1:].reshape(-1))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss)


def bypassed():
    model = llama()
    model.__class__ = Bypassed
    return model


def liger():
    """Liger's forward; its Triton loss in torch, as there is no GPU."""
    loss_utils = pytest.importorskip("liger_kernel.transformers.model.llama")

    def loss_in_torch(
        hidden_states, lm_head_weight, labels, hidden_size, num_items_in_batch=None, **kwargs
    ):
        labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
        logits = hidden_states.reshape(-1, hidden_size) @ lm_head_weight.T
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    model = llama()
    kind = type("LigerLlama", (transformers.LlamaForCausalLM,), {"forward": loss_utils.lce_forward})
    model.__class__ = kind
    return model, loss_utils, loss_in_torch


def assert_inert(tmp_path, make, warnings):
    stock, _, _ = train(tmp_path, make(), max_steps=STEPS)
    callback, model = FusedLossCallback(), make()
    fused, _, _ = train(tmp_path, model, [callback], max_steps=STEPS)
    assert (
        fused.losses == stock.losses and fused.norms == stock.norms and len(stock.losses) == STEPS
    )
    assert callback.report.fused == 0 and not callback.report.materialised
    assert len(warnings) == 1 and "nothing called the output head" in warnings[0]
    assert_stock(model)


def test_inert_beside_a_forward_that_bypasses_the_head(tmp_path, warnings):
    assert_inert(tmp_path, bypassed, warnings)


def test_inert_beside_liger(tmp_path, warnings, monkeypatch):
    _, module, loss = liger()
    monkeypatch.setattr(module, "LigerForCausalLMLoss", loss)
    assert_inert(tmp_path, lambda: liger()[0], warnings)


def test_a_second_fused_loss_takes_the_head_and_the_first_says_so():
    model = llama()
    with fused_loss(model) as first, fused_loss(model) as second:
        ids = torch.arange(8)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        assert (first.fused, second.fused) == (
            0,
            1,
        ) and "another fused loss has taken" in first.skipped[0]
    assert_stock(model)
