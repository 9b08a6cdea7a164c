"""Trainer with FusedLossCallback against stock Trainer, and what it says where it cannot fuse."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch
import transformers
from support.fused_trainings import (
    LEARNING_RATE,
    STEPS,
    V,
    arguments,
    assert_stock,
    examples,
    llama,
    per_token_loss,
    train,
)
from support.numerics import assert_no_worse
from support.trainers import logged
from support.versions import CHECKPOINTING
from torch import nn
from transformers import Trainer, TrainerCallback

from fastft.integrations import fused_loss as fused_loss_module
from fastft.integrations.fused_loss import FusedLossCallback
from fastft.loss.lazy import losses as lazy_losses
from fastft.loss.lazy.logits import LazyLogits
from fastft.loss.lazy.output_head import fused_loss

TRAINERS = {
    "plain": ({}, {}, {}),
    "smoothing": ({"label_smoothing_factor": 0.1}, {}, {}),
    "loss function": ({}, {"compute_loss_func": per_token_loss}, {}),
    "checkpointing": ({CHECKPOINTING: True}, {}, {}),
    "tied": ({}, {}, {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_ten_steps_in_fp32_are_stock(name, tmp_path):
    changes, options, config = TRAINERS[name]
    stock, expected, _ = train(tmp_path, llama(**config), trainer_options=options, **changes)
    callback = FusedLossCallback()
    model = llama(**config)
    fused, actual, _ = train(tmp_path, model, [callback], options, **changes)
    assert callback.report.fused >= 2 * STEPS and not callback.report.materialised, callback.report
    assert len(fused.losses) == STEPS
    assert fused.losses == pytest.approx(stock.losses, rel=1e-6)
    assert fused.norms == pytest.approx(stock.norms, rel=1e-5)
    # AdamW divides by the gradient's size: where that is next to nothing, rounding shows
    for key in expected:
        apart = (actual[key] - expected[key]).abs()
        assert (
            apart.max() <= 0.02 * STEPS * LEARNING_RATE
            and apart.norm() <= 3e-5 * expected[key].norm()
        ), key
    assert_stock(model)


def test_ten_steps_in_bf16_are_no_further_from_fp32_than_stock(tmp_path):
    curves = {"losses": ([], [], []), "norms": ([], [], [])}
    for seed in range(3):  # of which one alone may be lucky
        truth, _, _ = train(tmp_path, llama().double(), seed=seed)
        stock, _, _ = train(tmp_path, bf16=True, seed=seed)
        callback = FusedLossCallback()
        fused, _, _ = train(tmp_path, callbacks=[callback], bf16=True, seed=seed)
        report = callback.report
        assert report.fused == 2 * STEPS and not report.materialised, report
        for what, found in curves.items():
            for curve, of_run in zip(found, (fused, stock, truth), strict=True):
                curve += getattr(of_run, what)
    for what, found in curves.items():
        assert_no_worse(*(torch.tensor(curve, dtype=torch.float64) for curve in found), what)


def test_evaluation_saving_and_copies_in_the_middle(tmp_path):
    class Middle(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                self.during = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
                self.attached = "forward" in model.lm_head.__dict__
                self.at_copy = {key: value.clone() for key, value in model.state_dict().items()}

    middle, callback, model = Middle(), FusedLossCallback(), llama()
    kept = model.state_dict().keys()
    options = {
        "eval_dataset": examples(6),
        "compute_metrics": lambda p: {
            "accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())
        },
    }
    changes = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 5}
    _, _, stock = train(tmp_path / "stock", trainer_options=options, **changes)
    _, _, fused = train(tmp_path / "fused", model, [callback, middle], options, **changes)
    evaluations = [logged(trainer, "eval_loss") for trainer in (stock, fused)]
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-5) and len(evaluations[0]) >= 2
    assert not callback.report.materialised and middle.attached
    assert model.state_dict().keys() == kept
    for twin in middle.during:
        assert twin.state_dict().keys() == kept and "fastft" not in repr(twin)
        assert (
            twin.lm_head.forward.__func__ is nn.Linear.forward
            and twin.lm_head.forward.__self__ is twin.lm_head
        )
        twin.train()
        assert type(twin(torch.tensor([[1, 2, 3]])).logits) is torch.Tensor
        for key, value in twin.state_dict().items():
            assert torch.equal(value, middle.at_copy[key])
        with fused_loss(twin) as report:  # a copy can be fused again
            twin(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
        assert report.fused == 1
    copy.deepcopy(model), pickle.dumps(model)
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "fused" / "checkpoint-10")
    for key, value in model.state_dict().items():
        assert torch.equal(saved.state_dict()[key], value)
    assert_stock(model)


def test_an_exception_leaves_the_model_to_restore(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model, callback = llama(), FusedLossCallback(verify=True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model, [callback, Stop()])
    callback.restore()
    callback.restore()
    assert_stock(model)
    with pytest.raises(ZeroDivisionError), fused_loss(model):
        raise ZeroDivisionError
    assert_stock(model)


def test_training_twice_attaches_once(tmp_path):
    model, callback = llama(), FusedLossCallback()
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=1), train_dataset=examples(), callbacks=[callback]
    )
    for _ in range(2):
        trainer.train()
        assert callback.report.fused == 2
    assert_stock(model)


@pytest.mark.parametrize("bf16", [False, True])
def test_verify_accepts_what_is_right(bf16, tmp_path):
    model = llama(attention_dropout=0.1)
    stock, _, _ = train(tmp_path, llama(attention_dropout=0.1), max_steps=2, bf16=bf16)
    fused, _, _ = train(tmp_path, model, [FusedLossCallback(verify=True)], max_steps=2, bf16=bf16)
    assert fused.losses == pytest.approx(stock.losses, rel=1e-2 if bf16 else 1e-5)
    assert_stock(model)


def test_verify_raises_on_a_wrong_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(
        lazy_losses, "_fused", lambda layer, *_, **__: layer.terms[0][0].sum() * 0 + 1.5
    )
    with pytest.raises(
        RuntimeError, match=r"the fused loss of the first batch is .* the stock loss"
    ):
        train(tmp_path, callbacks=[FusedLossCallback(verify=True)])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda model: setattr(
                model.lm_head, "forward", lambda x: nn.functional.linear(x, model.lm_head.weight)
            ),
            "patched by somebody else",
        ),
        (
            lambda model: setattr(
                model,
                "lm_head",
                type("Quantised", (nn.Linear,), {"forward": lambda s, x: x @ s.weight.T})(
                    model.lm_head.in_features, V, bias=False
                ),
            ),
            "a Quantised, not a plain",
        ),
        (lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head)), "no output head"),
    ],
)
def test_what_cannot_be_fused_is_said(spoil, reason, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(fused_loss_module.logger, "warning", warnings.append)
    model, callback = llama(), FusedLossCallback()
    spoil(model)
    train(tmp_path, model, [callback], max_steps=1)
    assert callback.report.fused == 0 and reason in callback.report.skipped[0]
    assert len(warnings) == 1 and reason in warnings[0]


def said_at_each_level(monkeypatch):
    said = {"warning": [], "info": []}
    for level, messages in said.items():
        monkeypatch.setattr(fused_loss_module.logger, level, messages.append)
    return said


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_has_nothing_to_fuse_and_is_no_reason_to_warn(labels, tmp_path, monkeypatch):
    said = said_at_each_level(monkeypatch)
    model = llama(kind=transformers.LlamaForSequenceClassification, num_labels=labels)
    rows = [
        {"input_ids": row["input_ids"], "labels": float(i % 2) if labels == 1 else i % 3}
        for i, row in enumerate(examples(8))
    ]
    callback = FusedLossCallback()
    Trainer(
        model, arguments(tmp_path, max_steps=1), train_dataset=rows, callbacks=[callback]
    ).train()
    assert not said["warning"] and len(said["info"]) == 1
    assert "LlamaForSequenceClassification has no output head over a vocabulary" in said["info"][0]
    assert callback.report.skipped and not callback.report.fused


def replaced(module, body):
    """A forward whose code belongs to another package, on the instance as TRL and Liger set it."""
    space = {"__name__": module, "torch": torch}
    exec(f"def forward(self, input_ids, labels=None, **kwargs):\n    {body}", space)
    return space["forward"]


LOSS = (
    "hidden = self.model(input_ids).last_hidden_state; return {'loss': (hidden * "
    "self.lm_head.weight[0]).sum()}"
)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("trl.trainer.utils", "TRL computes the loss by a fused head of its own"),
        pytest.param(
            "liger_kernel.transformers.model.llama",
            "nothing called the output head: Liger computes the loss",
            marks=pytest.mark.way("Liger", loss="stock"),
        ),
        (
            "modeling_mine",
            "another fused loss must be at work, TRL's (SFTTrainer), Liger's (use_liger_kernel)",
        ),
    ],
)
def test_who_else_computes_the_loss_is_named_and_what_to_do(
    module, words, mixed, tmp_path, monkeypatch
):
    said, model = said_at_each_level(monkeypatch), llama()
    model.forward = types.MethodType(replaced(module, LOSS), model)
    train(tmp_path, model, [FusedLossCallback()], max_steps=1, bf16=mixed)
    assert (
        len(said["warning"]) == 1
        and words in said["warning"][0]
        and "FusedLossCallback" in said["warning"][0]
    )


@pytest.mark.way("DataParallel", loss="stock")
def test_data_parallel_is_left_alone():
    with fused_loss(nn.DataParallel(llama())) as report:
        assert "DataParallel" in report.skipped[0]


def test_the_output_of_a_fused_model():
    """`tests/integrations/test_architectures.py` compares the gradients."""
    model = llama().train()
    ids = torch.randint(3, V, (2, 20))
    stock = model(input_ids=ids, labels=ids)
    with fused_loss(model) as report:
        fused = model(input_ids=ids, labels=ids)
        assert report.fused == 1 and not report.materialised and not report.skipped, report
        assert isinstance(fused.logits, LazyLogits) and type(fused.loss) is torch.Tensor
        assert fused.loss.dtype == torch.float32
        torch.testing.assert_close(fused.logits.detach(), stock.logits.detach())
        assert len(report.materialised) == 1
    assert_stock(model)
