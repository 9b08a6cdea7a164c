"""Trainings of a Llama whose vocabulary is much wider than its hidden states, stock or with the
fused loss."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Trainer

from fastft.loss.lazy.output_head import LazyForward
from support.trainers import Curve, quiet_arguments, tiny_llama

V = 997
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# of a model of another family
SIZES = {
    **TOKENS,
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
STEPS, LEARNING_RATE = 10, 1e-3


def llama(**changes):
    return tiny_llama(**{"vocab_size": V, "seed": 3, **TOKENS, **changes})


def gemma():
    """A model whose logits have a softcap."""
    torch.manual_seed(3)
    heads = {"head_dim": 16, "num_key_value_heads": 2}
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **heads, final_logit_softcapping=3.0))


def examples(count=40, length=24):
    """Random tokens, of which up to eight at the beginning are not labels."""
    rows = torch.randint(3, V, (count, length), generator=torch.Generator().manual_seed(5))
    labels = rows.clone()
    for index in range(count):
        labels[index, : index % 9] = -100
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label}
        for ids, label in zip(rows, labels, strict=True)
    ]


def arguments(folder, **changes):
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    steps = {"max_steps": STEPS, "learning_rate": LEARNING_RATE, "optim": "adamw_torch", "seed": 11}
    return quiet_arguments(folder, **{**batches, **steps, **changes})


def train(folder, model=None, callbacks=(), trainer_options=None, **changes):
    """Trains on `examples`; the curve, the final parameters and the trainer."""
    model, curve = model or llama(), Curve()
    trainer = Trainer(
        model,
        arguments(folder, **changes),
        train_dataset=examples(),
        callbacks=[curve, *callbacks],
        **(trainer_options or {}),
    )
    trainer.train()
    return curve, {name: p.detach().clone() for name, p in model.named_parameters()}, trainer


WAYS = {
    "plain": {},
    "adapter": {},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 3},
}


def trained_as_stock(folder, way, callback):
    """Trains a model with the callback in one of these ways; raises unless losses and weights are
    stock's, or if a `forward` is left on a module."""

    def model():
        made = llama()
        if way == "adapter":
            peft = pytest.importorskip("peft")
            torch.manual_seed(1)
            made = peft.get_peft_model(made, peft.LoraConfig(target_modules="all-linear"))
        return made

    stock, weights, _ = train(folder, model(), **WAYS[way])
    trained = model()
    curve, others, _ = train(folder, trained, [callback], **WAYS[way])
    assert curve.losses == pytest.approx(stock.losses, rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-4)
    assert all("forward" not in vars(module) for module in trained.modules())


def per_token_loss(outputs, labels, num_items_in_batch=None):
    """A `compute_loss_func` of a user's own."""
    logits = outputs.logits[:, :-1].float().reshape(-1, V)
    total = nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
    return total / num_items_in_batch


def assert_stock(model):
    """Raises if anything of ours is left on the model."""
    inside = [module.__dict__ for module in model.modules()]
    assert not any(isinstance(attributes.get("forward"), LazyForward) for attributes in inside)
    assert not [key for attributes in inside for key in attributes if "fastft" in key]
    assert "forward" not in model.get_output_embeddings().__dict__
    assert "_loss_function" not in model.__dict__
    assert not model._forward_pre_hooks and not model._forward_hooks
