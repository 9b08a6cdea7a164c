"""Trainer with FusedLossCallback against stock Trainer, and `fused_loss` on models of several kinds."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from fastft.integrations.fused_loss import FusedLossCallback
from fastft.loss.lazy_logits import LazyLogits
from fastft.loss.output_head import LazyForward, fused_loss
from numerics import assert_no_worse

V = 997
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
SMALL |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**SMALL, "num_key_value_heads": 2}
STEPS = 10


def llama(**changes):
    set_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes}))


def examples(count=40, length=24):
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(3, V, (count, length), generator=generator)
    labels = rows.clone()
    for index in range(count):
        labels[index, : index % 9] = -100
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": l} for ids, l in zip(rows, labels, strict=True)]


class Curve(TrainerCallback):
    def __init__(self):
        self.losses, self.norms = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(float(logs["grad_norm"]))


def arguments(tmp_path, **changes):
    options = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    options |= {"learning_rate": 1e-3, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    options |= {"optim": "adamw_torch", "seed": 11}
    return TrainingArguments(str(tmp_path), **{**options, **changes})


def train(tmp_path, model=None, callbacks=(), trainer_options=None, **changes):
    """The curve and the final parameters."""
    model = model or llama()
    curve = Curve()
    trainer = Trainer(
        model, arguments(tmp_path, **changes), train_dataset=examples(), callbacks=[curve, *callbacks], **(trainer_options or {})
    )
    trainer.train()
    return curve, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, trainer


def assert_stock(model):
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__ and isinstance(module.__dict__["forward"], LazyForward)]
    assert "forward" not in model.get_output_embeddings().__dict__ and "_loss_function" not in model.__dict__
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not [key for module in model.modules() for key in module.__dict__ if "fastft" in key]


def per_token_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.reshape(-1, V), labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch


TRAINERS = {
    "plain": ({}, {}, {}),
    "smoothing": ({"label_smoothing_factor": 0.1}, {}, {}),
    "loss function": ({}, {"compute_loss_func": per_token_loss}, {}),
    "checkpointing": ({"gradient_checkpointing": True}, {}, {}),
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
    assert fused.losses == pytest.approx(stock.losses, rel=1e-5)
    assert fused.norms == pytest.approx(stock.norms, rel=1e-4)
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    assert_stock(model)


def test_ten_steps_in_bf16_are_no_further_from_fp32_than_stock(tmp_path):
    truth, _, _ = train(tmp_path, llama().double())
    stock, _, _ = train(tmp_path, bf16=True)
    callback = FusedLossCallback()
    fused, _, _ = train(tmp_path, callbacks=[callback], bf16=True)
    assert callback.report.fused == 2 * STEPS and not callback.report.materialised, callback.report
    for what in ("losses", "norms"):
        curves = [torch.tensor(getattr(curve, what), dtype=torch.float64) for curve in (fused, stock, truth)]
        print(what, [(c - curves[2]).abs().max().item() for c in curves])
        assert_no_worse(curves[0].bfloat16() if False else curves[0], curves[1], curves[2], what)
