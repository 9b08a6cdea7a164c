"""Trainings with every method of PEFT, in the body and on the output head: the losses of stock,
what is trained moves, the same files, merged and resumed as stock; packed where that is exact, and
refused where it is not."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from support.trainers import logged, quiet_arguments, tiny_llama
from support.watch import Watch
from transformers import Trainer

import fastft
from fastft.loss import head_sweep

peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402
from support.adapters import (  # noqa: E402
    BODY,
    DENSE_ON_HEAD,
    HEAD,
    LAYERS,
    OTHERS,
    PROMPTS,
    WIDE_ON_HEAD,
    V,
    adapted,
    config,
)

# those of which the table has a row; "other methods of PEFT" are the rest
ROWS = {
    "LoRA, dropout": "LoRA",
    "LoRA, every linear layer": "LoRA",
    "DoRA, dropout": "DoRA",
    "modules_to_save, head": "`modules_to_save`",
    "modules_to_save, head and embedding": "`modules_to_save`",
    "target_parameters": "`target_parameters`",
    "LoRA and trainable tokens": "trainable tokens",
    **{name: name for name in ("LoRA", "rsLoRA", "PiSSA", "DoRA", "IA3", "LoHa", "OFT", "VeRA")},
    **{name: name for name in ("trainable tokens", "LoRA with biases", *PROMPTS)},
}
QUICK = ("LoRA", "DoRA", "trainable tokens", "prompt tuning")
STEPS = 4
# PEFT does not merge Lily, nor BEFT into a layer without a bias
UNMERGED = tuple(getattr(peft, n) for n in ("LilyConfig", "BeftConfig") if hasattr(peft, n))


def row_of(name, target):
    """The row of the table that a method proves."""
    if target is BODY:
        return ROWS.get(name, "other methods of PEFT")
    if name in DENSE_ON_HEAD:
        return "RoAd, DeLoRA, FRoD on the head"
    known = ROWS.get(name) in ("LoRA", "DoRA", "IA3")
    return f"{ROWS[name] if known else 'other methods'} on the head"


def methods(names, target=BODY, quick=QUICK, **cells):
    """The names as cases that prove cells of the table, most of them slow."""
    for name in names:
        way = pytest.mark.way(row_of(name, target), **cells)
        marks = [way] if name in quick else [way, pytest.mark.slow]
        yield pytest.param(
            name, target, marks=marks, id=f"{name}{'' if target is BODY else ', head'}"
        )


def documents(count=16):
    rng = np.random.default_rng(4)
    return [
        {"input_ids": row, "labels": [-100] * 2 + row[2:]}
        for row in (rng.integers(3, V, rng.integers(6, 20)).tolist() for _ in range(count))
    ]


def padded(rows):
    """A batch of documents, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name, filling):
        return torch.tensor([r[name] + [filling] * (longest - len(r[name])) for r in rows])

    mask = [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
    ids, labels = column("input_ids", 0), column("labels", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.tensor(mask)}


def trainer_of(model, folder, ours=True, collator=padded, callbacks=None, **changes):
    """A Trainer of a model with an adapter, stock or with fastft's loss and AdamW."""
    batches = {"per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": 1e-2}
    args = quiet_arguments(folder, **{**batches, "seed": 7, "weight_decay": 0.1, **changes})
    options = {"optimizers": fastft.adamw(model, args)} if ours else {"optimizers": (None, None)}
    own = [fastft.FusedLossCallback()] if ours else []
    return Trainer(
        model,
        args,
        train_dataset=documents(),
        data_collator=collator,
        callbacks=own if callbacks is None else callbacks,
        **options,
    )


def report_of(trainer):
    return next(
        c.report
        for c in trainer.callback_handler.callbacks
        if isinstance(c, fastft.FusedLossCallback)
    )


def logits_of(model):
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def chosen(name, target=BODY):
    found = config(name, target)
    if found is None:
        pytest.skip(f"PEFT {peft.__version__} does not have it")
    return found


TRAININGS = [
    *methods([*LAYERS, *OTHERS, *PROMPTS], loss="exact", optimizer="exact"),
    *methods(["LoRA", "DoRA", "IA3"], HEAD, ["DoRA"], loss="exact", optimizer="exact"),
]


# PEFT's own, of prefix tuning
@pytest.mark.filterwarnings("ignore:`past_key_values:FutureWarning")
@pytest.mark.parametrize(("name", "target"), TRAININGS)
def test_a_training_with_a_method_of_peft_is_that_of_stock(name, target, tmp_path):
    models, trainers = [], []
    for ours in (False, True):
        model = adapted(chosen(name, target))
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        saves = {"save_strategy": "steps", "save_steps": 2}
        trainer = trainer_of(model, tmp_path / str(ours), ours, **saves)
        trainer.train()
        moved = {
            key for key, value in model.named_parameters() if not torch.equal(value, before[key])
        }
        assert moved == {key for key, value in model.named_parameters() if value.requires_grad}
        models.append(model)
        trainers.append(trainer)
    stock, fused = trainers
    assert len(logged(fused)) == STEPS
    assert logged(fused, "loss", "grad_norm") == pytest.approx(
        logged(stock, "loss", "grad_norm"), rel=2e-6
    )
    report = report_of(fused)
    assert (report.fused, report.materialised, report.skipped) == (STEPS, [], [])
    same_files(tmp_path)
    if name == "p-tuning":
        return  # PEFT saves what its encoder makes, and not the encoder: nothing to go on from
    resumed = trainer_of(adapted(chosen(name, target)), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-2"))
    assert logged(resumed)[-2:] == logged(fused)[-2:]
    same_afterwards(*models, adapted(chosen(name, target)), tmp_path)


def same_files(folder):
    """Raises unless both trainings have saved the same adapter."""
    names, weights = [], []
    for kind in ("False", "True"):
        checkpoint = folder / kind / f"checkpoint-{STEPS}"
        names.append(sorted(path.name for path in checkpoint.iterdir()))
        weights.append(load_file(checkpoint / "adapter_model.safetensors"))
    stock, ours = weights
    assert names[0] == names[1] and stock.keys() == ours.keys()
    for key, value in stock.items():
        assert ours[key].dtype == value.dtype
        torch.testing.assert_close(
            ours[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: k + m
        )


def same_afterwards(stock, ours, again, folder):
    """Raises unless the trained adapter loads, and merges where stock's does."""
    trained = logits_of(ours)
    torch.testing.assert_close(trained, logits_of(stock), rtol=1e-3, atol=1e-3)
    again.load_adapter(folder / "True" / f"checkpoint-{STEPS}", "default")
    torch.testing.assert_close(logits_of(again), trained, rtol=1e-5, atol=1e-5)
    if hasattr(ours.base_model, "merge_and_unload") and not isinstance(
        next(iter(ours.peft_config.values())), UNMERGED
    ):
        merged = [logits_of(model.merge_and_unload()) for model in (stock, ours)]
        torch.testing.assert_close(merged[1], merged[0], rtol=1e-3, atol=1e-3)


def packs(model, folder):
    return trainer_of(model, folder, collator=fastft.PackingCollator())


@pytest.mark.parametrize(
    ("name", "target"),
    # dropout drops, and PVeRA draws, other elements of a packed batch
    methods(
        [n for n in (*LAYERS, *OTHERS) if "dropout" not in n and n not in ("PVeRA", "Lily")],
        quick=["LoRA"],
        packing="exact",
    ),
)
def test_packed_documents_have_the_losses_of_padded_ones(name, target, tmp_path):
    padding = trainer_of(adapted(chosen(name, target)), tmp_path)
    padding.train()
    packing = packs(adapted(chosen(name, target)), tmp_path)
    packing.train()
    assert logged(packing) == pytest.approx(logged(padding), rel=5e-6)
    report = report_of(packing)
    assert (report.fused, report.materialised, report.skipped) == (STEPS, [], [])


@pytest.mark.parametrize(("name", "target"), methods(PROMPTS, packing="refused"))
def test_virtual_tokens_before_packed_documents_are_refused(name, target, tmp_path):
    model = adapted(chosen(name, target))
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    with pytest.raises(fastft.PackingLeakError, match=f"PEFT's {name}"):
        packs(model, tmp_path).train()
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())


def mixture(folder):
    """X-LoRA: two adapters of a base, mixed token by token by a classifier, which is trained. It
    runs the base once without gradients before each forward pass."""
    places = {}
    for name in ("0", "1"):  # PEFT looks its scales up by these
        adapted(config("LoRA"), seed=int(name), noise=0.05).save_pretrained(folder / name)
        places[name] = str(folder / name)
    base = tiny_llama(V, pad_token_id=0, use_cache=False)
    torch.manual_seed(3)
    options = {"hidden_size": base.config.hidden_size, "xlora_depth": 1, "adapters": places}
    return peft.get_peft_model(base, peft.XLoraConfig(task_type="CAUSAL_LM", **options))


@pytest.mark.way("several adapters", loss="exact", optimizer="exact")
def test_a_plugged_mixture_of_adapters_has_the_losses_of_stock(tmp_path):
    models = [mixture(tmp_path) for _ in range(2)]
    trainers = [trainer_of(model, tmp_path, ours=False, callbacks=[]) for model in models]
    plug = fastft.plug(trainers[1], packing="collate")
    for trainer in trainers:
        trainer.train()
    stock, ours = (logged(trainer, "loss", "grad_norm") for trainer in trainers)
    assert ours == pytest.approx(stock, rel=2e-6) and len(ours) == 2 * STEPS
    assert plug.report.fused == STEPS and not plug.report.materialised
    assert plug.lines["optimizer"].startswith("AdamW")
    held = {id(one) for group in trainers[1].optimizer.param_groups for one in group["params"]}
    moved = [name for name, value in models[1].named_parameters() if id(value) in held]
    assert moved and all("internal_xlora_classifier" in name for name in moved)


ON_HEAD = [
    *methods([n for n in LAYERS if n not in DENSE_ON_HEAD], HEAD, ["DoRA", "HRA"], loss="exact"),
    *methods(DENSE_ON_HEAD, HEAD, ["RoAd"], loss="stock"),
]


@pytest.mark.parametrize(("name", "target"), ON_HEAD)
def test_a_method_on_the_head_has_the_gradients_of_stock_and_no_logits(name, target, monkeypatch):
    monkeypatch.setitem(head_sweep._LIMITS, "cpu", (0, 16, 1 << 31, 0))
    ids = torch.randint(3, V, (4, 60), generator=torch.Generator().manual_seed(6))
    results = []
    for ours in (False, True):
        model = adapted(chosen(name, target), noise=0.05)
        torch.manual_seed(3)
        context = fastft.fused_loss(model) if ours else contextlib.nullcontext()
        with context as report, Watch() as watch:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    (stock, expected), (fused, actual) = results
    torch.testing.assert_close(fused, stock, rtol=1e-6, atol=0)
    for gradient, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=0, atol=1e-5 * float(truth.abs().max()))
    assert not report.skipped and bool(report.materialised) == (name in DENSE_ON_HEAD)
    assert report.fused == 1 or name in DENSE_ON_HEAD
    if name not in DENSE_ON_HEAD + WIDE_ON_HEAD:
        assert watch.elements < ids.numel() * V / 2
    assert not any("forward" in vars(module) for module in model.modules())
