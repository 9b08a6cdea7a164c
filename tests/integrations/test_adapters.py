"""Trainings with every method of PEFT: the losses of stock, what is trained moves, the same files,
merged and resumed as stock; packed where that is exact, and refused where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.trainers import logged, quiet_arguments
from transformers import Trainer

import fastft

peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402
from support.adapters import LAYERS, OTHERS, PROMPTS, V, adapted, config  # noqa: E402

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
QUICK = ("LoRA", "DoRA", "IA3", "VeRA", "trainable tokens", "prompt tuning")
STEPS = 4


def methods(names, **cells):
    """The names as cases that prove cells of the table, most of them slow."""
    for name in names:
        way = pytest.mark.way(ROWS.get(name, "other methods of PEFT"), **cells)
        yield pytest.param(name, marks=[way] if name in QUICK else [way, pytest.mark.slow])


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


def chosen(name):
    found = config(name)
    if found is None:
        pytest.skip(f"PEFT {peft.__version__} does not have it")
    return found


@pytest.mark.parametrize(
    "name", methods([*LAYERS, *OTHERS, *PROMPTS], loss="exact", optimizer="exact")
)
def test_a_training_with_a_method_of_peft_is_that_of_stock(name, tmp_path):
    models, trainers = [], []
    for ours in (False, True):
        model = adapted(chosen(name))
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
    resumed = trainer_of(adapted(chosen(name)), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-2"))
    assert logged(resumed)[-2:] == logged(fused)[-2:]
    same_afterwards(name, *models, tmp_path)


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


def same_afterwards(name, stock, ours, folder):
    """Raises unless the trained adapter loads, and merges where stock's does."""
    trained = logits_of(ours)
    torch.testing.assert_close(trained, logits_of(stock), rtol=1e-3, atol=1e-3)
    again = adapted(chosen(name))
    again.load_adapter(folder / "True" / f"checkpoint-{STEPS}", "default")
    torch.testing.assert_close(logits_of(again), trained, rtol=1e-5, atol=1e-5)
    if name not in PROMPTS:
        merged = [logits_of(model.merge_and_unload()) for model in (stock, ours)]
        torch.testing.assert_close(merged[1], merged[0], rtol=1e-3, atol=1e-3)
