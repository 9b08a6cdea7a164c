"""PEFT adapters on and around the output head: loss and gradients as stock, and which of them are
fused."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
from support.numerics import assert_no_worse
from support.trainers import logged, quiet_arguments, tiny_llama
from transformers import Trainer

from fastft.integrations.fused_loss import FusedLossCallback
from fastft.loss.lazy.output_head import fused_loss

peft = pytest.importorskip("peft")

V = 211
LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "init_lora_weights": False}
HEAD = {**LORA, "target_modules": ["lm_head"]}


def lora(model_options=None, **options):
    return lambda: adapted(peft.LoraConfig(**{**LORA, **options}), **(model_options or {}))


def adapted(config, **changes):
    return peft.get_peft_model(tiny_llama(V, pad_token_id=0, **changes), config).train()


def two_adapters():
    model = adapted(peft.LoraConfig(**HEAD))
    model.add_adapter("second", peft.LoraConfig(**{**HEAD, "r": 2}))
    model.base_model.set_adapter(["default", "second"])
    return model.train()


TIED = {"tie_word_embeddings": True}
# newer versions warn without it
TYING = (
    {"ensure_weight_tying": True}
    if "ensure_weight_tying" in inspect.signature(peft.LoraConfig).parameters
    else {}
)
FUSED = {
    "attention": lora(target_modules=["q_proj", "v_proj"]),
    "attention tied": lora(TIED, target_modules=["q_proj", "v_proj"]),
    "attention dropout": lora(target_modules=["q_proj", "v_proj"], lora_dropout=0.3),
    "head": lora(target_modules=["lm_head"]),
    "head dropout": lora(target_modules=["lm_head"], lora_dropout=0.3),
    "head bias": lora(target_modules=["lm_head", "q_proj"], lora_bias=True),
    "head rank stabilised": lora(target_modules=["lm_head"], use_rslora=True),
    "head tied": lora(TIED, target_modules=["lm_head", "q_proj"]),
    "head and embedding": lora(target_modules=["lm_head", "embed_tokens"]),
    "head, two adapters": two_adapters,
    "modules_to_save": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "modules_to_save both": lora(
        target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
    ),
    "modules_to_save tied": lora(
        TIED, target_modules=["q_proj"], modules_to_save=["embed_tokens"], **TYING
    ),
    "all-linear": lora(target_modules="all-linear"),
    "every linear layer": lora(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "lm_head"]
    ),
    "prompt tuning": lambda: adapted(
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
    "DoRA on the head": lora(target_modules=["lm_head"], use_dora=True),
    "IA3 on the head": lambda: adapted(
        peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["lm_head"],
            feedforward_modules=[],
            init_ia3_weights=False,
        )
    ),
}


def loss_and_gradients(model, autocast):
    torch.manual_seed(6)
    ids = torch.randint(3, V, (2, 20))
    labels = ids.masked_fill(torch.rand(2, 20) < 0.3, -100)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
def test_adapters_are_trained_as_stock(name, dtype):
    model = FUSED[name]()
    stock, expected = loss_and_gradients(model, dtype == torch.bfloat16)
    with fused_loss(model) as report:
        fused, actual = loss_and_gradients(model, dtype == torch.bfloat16)
    rounding = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(fused, stock, rtol=rounding, atol=rounding)
    assert actual.keys() == expected.keys() and expected
    for key, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            actual[key], gradient, rtol=0, atol=20 * rounding * scale, msg=lambda m, k=key: k + m
        )
    assert (report.fused, report.materialised, report.skipped) == (1, [], []), report


def half(*configs, **options):
    """A bf16 model with an adapter of each config; PEFT keeps adapters in fp32 unless told
    otherwise."""
    base = tiny_llama(V, pad_token_id=0).to(torch.bfloat16)
    first, *others = configs
    model = peft.get_peft_model(base, peft.LoraConfig(**{**HEAD, **first}), **options)
    for index, config in enumerate(others):
        model.add_adapter(str(index), peft.LoraConfig(**{**HEAD, **config}), **options)
    model.base_model.set_adapter(["default", *map(str, range(len(others)))])
    return model.train()


NARROW = {"autocast_adapter_dtype": False}
HALF = {
    "fp32 adapter": lambda: half({}),
    "fp32 adapter, scaled by no power of two": lambda: half({"lora_alpha": 7, "r": 3}),
    "fp32 adapter, dropout": lambda: half({"lora_dropout": 0.3}),
    "fp32 adapter, bias": lambda: half({"lora_bias": True}),
    "fp32 adapter, rank stabilised": lambda: half({"use_rslora": True}),
    "fp32 adapter, DoRA": lambda: half({"use_dora": True}),
    "fp32 adapter, DoRA, dropout": lambda: half({"use_dora": True, "lora_dropout": 0.3}),
    "fp32 adapter, everywhere": lambda: half({"target_modules": "all-linear"}),
    "fp32 adapters": lambda: half({}, {"r": 2, "lora_alpha": 5}),
    "bf16 adapter": lambda: half({}, **NARROW),
}
if "autocast_adapter_dtype" in inspect.signature(peft.PeftModel.add_adapter).parameters:
    HALF["bf16 adapters"] = lambda: half({}, {"r": 2, "lora_alpha": 5}, **NARROW)


def losses_and_gradients(model, autocast):
    """Of each token, because a single number may be right by luck."""
    torch.manual_seed(6)
    ids = torch.randint(3, V, (2, 20))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1), reduction="none"
    )
    losses.mean().backward()
    return {
        "losses": losses.detach(),
        **{n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    }


@pytest.mark.way("LoRA in fp32 on a bf16 head", loss="works")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", HALF)
def test_lora_on_the_head_of_a_bf16_model_is_fused_and_no_worse_than_stock(name, autocast):
    results = []
    for kind in ("fused", "stock", "truth"):
        model = HALF[name]()
        context = fused_loss(model) if kind == "fused" else contextlib.nullcontext()
        with context as report:
            results.append(
                losses_and_gradients(
                    *((model.double(), False) if kind == "truth" else (model, autocast))
                )
            )
        if kind == "fused":
            assert report.fused == 1 and not report.materialised and not report.skipped, report
    actual, expected, exact = results
    assert actual.keys() == expected.keys() == exact.keys()
    for key, result in actual.items():
        assert result.dtype == expected[key].dtype and result.any()
        assert_no_worse(result, expected[key], exact[key], key)


class FSDPModule(torch.nn.Linear):
    """What FSDP2 makes of a layer that is a unit of its own, as PEFT's policy has it for FSDP1."""


def test_an_adapter_whose_parts_are_sharded_one_by_one_computes_its_own_products():
    model = adapted(peft.LoraConfig(**HEAD))
    stock, expected = loss_and_gradients(model, False)
    head = model.get_base_model().lm_head
    head.lora_B["default"].__class__ = FSDPModule
    with fused_loss(model) as report:
        fused, actual = loss_and_gradients(model, False)
        assert "forward" not in vars(head)
    torch.testing.assert_close(fused, stock, rtol=1e-6, atol=0)
    for key, gradient in expected.items():
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(actual[key], gradient, rtol=0, atol=atol)
    assert (report.fused, report.materialised) == (1, [])


@pytest.mark.way("LoRA on the head", loss="exact")
def test_trainer_with_lora_on_the_head_is_stock(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, V, (8, 16))]
    results = []
    for callbacks in ([], [FusedLossCallback()]):
        model = adapted(peft.LoraConfig(**HEAD, lora_dropout=0.1))
        batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        arguments = quiet_arguments(tmp_path, max_steps=4, **batches, seed=1)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        results.append(logged(trainer))
    assert results[1] == pytest.approx(results[0], rel=1e-6) and len(results[0]) == 4
    assert callbacks[0].report.fused == 8 and not callbacks[0].report.materialised
    assert "forward" not in model.get_base_model().lm_head.base_layer.__dict__
