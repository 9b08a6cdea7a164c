"""LoRA over bases that bitsandbytes and torchao keep in few bits, on a CPU: the losses of stock,
fused where the head is plain or of 4 bits, and a sentence where it is another."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support.trainers import logged, quiet_arguments, tiny_llama
from support.watch import Watch
from torch import nn
from transformers import LlamaForCausalLM, Trainer

import fastft
from fastft.loss import head_sweep

peft = pytest.importorskip("peft")

V, STEPS = 192, 3
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "pad_token_id": 0}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small Llama, to be loaded in few bits."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(V, **SIZES).save_pretrained(folder)
    return folder


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def torchao(name, **options):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, name)(**options))


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BASES = {
    "nf4": lambda: bitsandbytes(**NF4, bnb_4bit_compute_dtype=torch.float32),
    "nf4, quantised twice": lambda: bitsandbytes(
        **NF4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    ),
    "int8": lambda: bitsandbytes(load_in_8bit=True),
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
}
ROWS = {
    "nf4": "QLoRA nf4 (bitsandbytes)",
    "nf4, quantised twice": "QLoRA nf4 (bitsandbytes)",
    "int8": "LLM.int8 (bitsandbytes)",
    "torchao int8": "torchao int8 weight-only",
    "torchao int4": "torchao int4 and float8 weight-only",
    "torchao float8": "torchao int4 and float8 weight-only",
}


def int4(model):
    """Trainer refuses what transformers itself loads in 4 bits of torchao, and not this."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        model.requires_grad_(False),
        quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
    )
    return model


def loaded(saved, name, **options):
    """The base in few bits, with an adapter whose numbers are not 0."""
    if name == "torchao int4":
        model = int4(LlamaForCausalLM.from_pretrained(saved, dtype=torch.float32))
    else:
        model = LlamaForCausalLM.from_pretrained(
            saved, quantization_config=BASES[name](), dtype=torch.float32
        )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **options})).train()


def rows(count=12, length=20):
    ids = torch.randint(3, V, (count, length), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(model, folder, ours, adamw=None, **changes):
    steps = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    args = quiet_arguments(folder, **{**steps, "seed": 3, **changes})
    callbacks = [fastft.FusedLossCallback()] if ours else []
    optimizers = fastft.adamw(model, args, **(adamw or {})) if ours else (None, None)
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=callbacks, optimizers=optimizers)
    trainer.train()
    return trainer, callbacks[0].report if ours else None


def cases():
    for name in ROWS:
        way = pytest.mark.way(ROWS[name], loss="exact", optimizer="exact")
        yield pytest.param(name, marks=way)


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=str)
@pytest.mark.parametrize("name", cases())
def test_lora_over_a_base_of_few_bits_is_trained_as_stock(name, target, saved, tmp_path):
    losses, weights = [], []
    for ours in (False, True):
        model = loaded(saved, name, target_modules=target)
        trainer, report = trained(model, tmp_path, ours)
        losses.append(logged(trainer, "loss", "grad_norm"))
        weights.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    assert losses[1] == pytest.approx(losses[0], rel=2e-6) and len(losses[0]) == 2 * STEPS
    assert (report.fused, report.materialised, report.skipped) == (STEPS, [], [])
    for key, value in weights[0].items():
        assert value.any()
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao int8"])
def test_checkpointing_and_autocast_over_a_base_of_few_bits(name, saved, tmp_path):
    options = {"gradient_checkpointing": True, "bf16": True}
    losses = []
    for ours in (False, True):
        trainer, report = trained(loaded(saved, name), tmp_path, ours, **options)
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert report.fused == STEPS and not report.materialised and not report.skipped


@pytest.mark.parametrize(
    "options", [{"moments": "8bit"}, {"moments": "bf16"}, {"rounding": "stochastic"}], ids=str
)
def test_small_moments_over_a_base_of_4_bits(options, saved, tmp_path):
    """Adapters of bf16 too: what the optimizer keeps of them changes the losses by little."""
    losses = []
    for ours in (False, True):
        model = loaded(saved, "nf4")
        if "rounding" in options:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        trainer, _ = trained(model, tmp_path, ours, adamw=options)
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def four_bit(head, **options):
    """bitsandbytes' layer of a head's weight."""
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(
        head.in_features, head.out_features, bias=False, quant_type="nf4", **options
    )
    weight = bnb.nn.Params4bit(head.weight.data.float(), requires_grad=False, quant_type="nf4")
    made.weight = weight
    return made.to("cpu")


def eight_bit(head):
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(head.in_features, head.out_features, bias=False)
    made.weight = bnb.nn.Int8Params(head.weight.data.clone(), requires_grad=False)
    return made.to("cpu")


def of_torchao(head):
    quantization = pytest.importorskip("torchao.quantization")
    inside = nn.Sequential(copy.deepcopy(head)).requires_grad_(False)
    quantization.quantize_(inside, quantization.Int8WeightOnlyConfig())
    return inside[0]


def with_head(make, dtype=torch.float32, target=("q_proj",), quantised=True):
    base = tiny_llama(V, **SIZES).to(dtype)
    base.lm_head = make(base.lm_head)
    base.is_loaded_in_4bit = quantised
    torch.manual_seed(1)
    config = peft.LoraConfig(**{**LORA, "target_modules": list(target)}, init_lora_weights=False)
    return peft.get_peft_model(base, config).train()


HEADS = {
    "fp32": lambda: with_head(four_bit),
    "bf16": lambda: with_head(four_bit, torch.bfloat16),
    "bf16, computed in fp32": lambda: with_head(
        lambda head: four_bit(head, compute_dtype=torch.float32), torch.bfloat16
    ),
    "fp32, computed in bf16": lambda: with_head(
        lambda head: four_bit(head, compute_dtype=torch.bfloat16)
    ),
    "LoRA on it": lambda: with_head(four_bit, target=["lm_head"]),
    "LoRA on it, bf16": lambda: with_head(four_bit, torch.bfloat16, target=["lm_head"]),
}


@pytest.mark.way("a 4-bit head (bitsandbytes)", loss="exact")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_4_bits_is_fused(name, autocast, monkeypatch):
    monkeypatch.setitem(head_sweep._LIMITS, "cpu", (0, 16, 1 << 31, 0))
    ids = torch.randint(3, V, (4, 60), generator=torch.Generator().manual_seed(6))
    results = []
    for ours in (False, True):
        model = HEADS[name]()
        context = fastft.fused_loss(model) if ours else contextlib.nullcontext()
        with context as report, Watch() as watch:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), found))
    (stock, expected), (fused, actual) = results
    rounding = 1e-6 if name in ("fp32", "LoRA on it") and not autocast else 1e-2
    torch.testing.assert_close(fused.float(), stock.float(), rtol=rounding, atol=0)
    assert actual.keys() == expected.keys() and expected
    for key, truth in expected.items():
        scale = float(truth.abs().max())
        torch.testing.assert_close(actual[key], truth, rtol=0, atol=10 * rounding * scale)
    assert (report.fused, report.materialised, report.skipped) == (1, [], [])
    assert watch.elements <= ids.numel() * SIZES["intermediate_size"] < ids.numel() * V


OTHER_HEADS = {
    "LLM.int8": (eight_bit, "Linear8bitLt", "an 8-bit head (bitsandbytes)"),
    "torchao": (of_torchao, "Int8Tensor", "a head quantised by torchao"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.way(row, loss="stock", optimizer="exact"))
        for name, (_, _, row) in OTHER_HEADS.items()
    ],
)
def test_a_head_of_8_bits_stays_stock_and_the_report_says_so(name, tmp_path):
    make, sentence, _ = OTHER_HEADS[name]
    losses = []
    for ours in (False, True):
        trainer, report = trained(with_head(make, quantised=False), tmp_path, ours)
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)
    assert not report.fused and len(report.skipped) == 1 and sentence in report.skipped[0]


@pytest.mark.way("torchao QAT", loss="works", optimizer="works")
def test_quantisation_aware_training_is_that_of_stock(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    """Rounding to 4 bits makes a step of a difference in the last bit of a weight."""
    losses = []
    for ours in (False, True):
        model = tiny_llama(V, **SIZES)
        fake = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)
        quantization.quantize_(
            model,
            qat.QATConfig(weight_config=fake, step="prepare"),
            filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
        )
        trainer, report = trained(model, tmp_path, ours)
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    assert (report.fused, report.materialised, report.skipped) == (STEPS, [], [])
