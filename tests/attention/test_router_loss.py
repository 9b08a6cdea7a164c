"""Padding stays out of a router's loss: packed rows against transformers' padded batches with their
attention mask."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.numerics import assert_no_worse
from support.trainers import Curve, quiet_arguments
from support.versions import checkpoint_activations
from transformers import Trainer

import fastft
from fastft.attention.segments import keep_segments
from fastft.integrations.probe.check_packing import find_leak
from fastft.integrations.probe.rows import Batches

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
SIZES |= {"output_router_logits": True, "router_aux_loss_coef": 0.5}
MODELS = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4}),
    "granitemoe": ("GraniteMoeForCausalLM", {"num_local_experts": 4}),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 4, "head_dim": 8}),
}
PADDED = ({"pad_to_multiple_of": 64}, {"rows": 2}, {"rows": 3, "pad_to_multiple_of": 32})
LENGTHS = (9, 14, 5, 20, 11)


def made(name="mixtral", attention="fastft", **changes):
    kind, sizes = MODELS[name]
    config = getattr(transformers, kind).config_class(**{**SIZES, **sizes, **changes})
    # the only one in float64
    options = {"attn_implementation": attention, "experts_implementation": "eager"}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def examples():
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def padded(features):
    """transformers' batch: a row for each example, and a mask."""
    longest = max(len(feature["input_ids"]) for feature in features)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for feature in features:
        rest = longest - len(feature["input_ids"])
        batch["input_ids"].append(feature["input_ids"] + [0] * rest)
        batch["labels"].append(feature["labels"] + [-100] * rest)
        batch["attention_mask"].append([1] * (longest - rest) + [0] * rest)
    return {key: torch.tensor(rows) for key, rows in batch.items()}


def through(model, batch):
    """The router's loss, and the gradients of the whole loss in one vector."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = [
        parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None
    ]
    return output.aux_loss.detach()[None], torch.cat(gradients)


@pytest.mark.parametrize("options", PADDED, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_router_loss_and_gradients_of_padded_rows(name, options):
    model, stock, features = made(name), made(name, "eager"), examples()
    try:
        plain = through(stock, padded(features))
    except (
        AttributeError
    ) as error:  # Granite's experts hand on no router logits in transformers 5.17
        pytest.skip(f"stock has no router loss: {error}")
    truth = through(copy.deepcopy(stock).double(), padded(features))
    with fastft.packed_attention(model):
        ours = through(model, fastft.PackingCollator(**options)(features))
    for what, actual, expected, exact in zip(
        ("loss", "gradients"), ours, plain, truth, strict=True
    ):
        assert_no_worse(actual, expected, exact, what)


@pytest.mark.parametrize("wrapped", ["checkpointed", "lora", "asked"])
def test_router_loss_of_a_model_that_is(wrapped):
    model, batch = (
        made(output_router_logits=wrapped != "asked"),
        fastft.PackingCollator(rows=2)(examples()),
    )
    expected = through(made(attention="eager"), padded(examples()))[0]
    if wrapped == "checkpointed":
        checkpoint_activations(model.train(), use_reentrant=False)
    if wrapped == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    if wrapped == "asked":
        batch["output_router_logits"] = True
    with fastft.packed_attention(model):
        torch.testing.assert_close(through(model, batch)[0], expected)


def test_padding_lengths_are_said_where_there_is_padding():
    features = examples()
    assert "padding_lengths" not in fastft.PackingCollator()(features)
    for options in PADDED:
        batch = fastft.PackingCollator(**options)(features)
        real = [int((row != 0).sum()) for row in batch["input_ids"]]  # no example has a 0
        assert batch["padding_lengths"].dtype == torch.int32
        assert batch["padding_lengths"].tolist() == [
            batch["input_ids"].shape[1] - count for count in real
        ]
        flat = fastft.PackingCollator(**options, expand_on_device=True)(features).to("cpu")
        assert torch.equal(flat["padding_lengths"], batch["padding_lengths"])


def test_a_model_whose_router_counts_padding_is_found():
    """Without the hooks nobody tells it."""
    model = made()
    assert find_leak(model) is None
    assert (
        "padding at the end of a row changes its aux_loss"
        in find_leak(model, Batches(padded=True)).what
    )
    assert "packed_attention" in find_leak(model, Batches(padded=True)).way_out
    with fastft.packed_attention(model):
        assert find_leak(model, Batches(padded=True)) is None


def hooks_of(model):
    return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


def test_a_model_that_is_refused_has_no_hooks_afterwards():
    model = made()
    handles = [keep_segments(layer) for layer in model.model.layers]
    before = hooks_of(model)
    with pytest.raises(ValueError, match="one by one"), fastft.packed_attention(model):
        pass
    assert hooks_of(model) == before and model.config.use_cache
    for handle in handles:
        handle.remove()


def test_hooks_and_mask_are_gone_afterwards():
    model = made()
    model(**fastft.PackingCollator()(examples()))  # transformers' own hooks stay
    before = hooks_of(model)
    with fastft.packed_attention(model):
        model(**fastft.PackingCollator(rows=2)(examples()))
    assert hooks_of(model) == before


def trained(folder, attention, collator, *callbacks):
    curve, model = Curve(), made(attention=attention)
    trainer = Trainer(
        model,
        quiet_arguments(folder, max_steps=3),
        train_dataset=examples(),
        data_collator=collator,
        callbacks=[curve, *callbacks],
    )
    trainer.train()
    return torch.tensor(curve.losses)


def test_losses_of_trainer_with_padding_in_the_rows(tmp_path):
    stock = trained(tmp_path, "sdpa", padded)
    for options in PADDED:
        # runs the first batch twice inside one call
        callback = fastft.FusedLossCallback(verify=True)
        ours = trained(tmp_path, "fastft", fastft.PackingCollator(**options), callback)
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=0)
