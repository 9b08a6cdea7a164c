"""Every setting of Trainer that people train with: losses, norms, rates, evaluations and what is
logged are those of stock, with each piece plugged."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.numerics import assert_no_worse
from support.plugged import V, examples, llama, trainer_of
from support.trainers import logged
from support.versions import CHECKPOINTING
from transformers import EarlyStoppingCallback

import fastft

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}
SAVING = {**EVALUATING, "save_strategy": "steps", "save_steps": 2}
BEST = {**SAVING, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
REENTRANT = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}


def accuracy(prediction, compute_result=None):
    predicted, labels = prediction.predictions, prediction.label_ids
    same = predicted.argmax(-1)[:, :-1] == labels[:, 1:]
    return {"accuracy": float(same.mean() if compute_result is None else same.float().mean())}


def total_loss(outputs, labels, num_items_in_batch=None):
    rows = outputs.logits[:, :-1].float().reshape(-1, V)
    total = torch.nn.functional.cross_entropy(rows, labels[:, 1:].reshape(-1), reduction="sum")
    return 0.5 * total / num_items_in_batch


class Impatient(EarlyStoppingCallback):
    """Stops at the second evaluation."""

    def __init__(self):
        super().__init__(early_stopping_patience=1, early_stopping_threshold=9.0)


def schedule(name, **options):
    return {"lr_scheduler_type": name, "warmup_steps": 1, "lr_scheduler_kwargs": options}


METRICS = {"options": {"compute_metrics": accuracy}}
# of each way, changes of the arguments, and the options of Trainer
SETTINGS = {
    "gradient accumulation": [{"gradient_accumulation_steps": 2}],
    "gradient checkpointing": [{CHECKPOINTING: True}, REENTRANT],
    "label smoothing": [{"label_smoothing_factor": 0.1}],
    "`compute_loss_func`": [{"options": {"compute_loss_func": total_loss}}],
    "NEFTune": [{"neftune_noise_alpha": 5.0}],
    "group by length": [{"train_sampling_strategy": "group_by_length"}],
    "clipping: none, tight": [{"max_grad_norm": 0.0}, {"max_grad_norm": 0.1}],
    "schedules of the learning rate": [
        schedule("cosine"),
        schedule("constant"),
        schedule("warmup_stable_decay", num_decay_steps=2),
        schedule("cosine_with_min_lr", min_lr=1e-4),
        {**schedule("reduce_lr_on_plateau"), **EVALUATING},
    ],
    "evaluation and metrics": [
        {**EVALUATING, **METRICS},
        {**EVALUATING, **METRICS, "batch_eval_metrics": True},
        {**EVALUATING, **METRICS, "include_for_metrics": ["inputs", "loss"]},
        {**EVALUATING, "prediction_loss_only": True, "eval_on_start": True},
    ],
    "early stopping, the best model": [
        {**BEST, "options": {"callbacks": [Impatient]}, "max_steps": 8},
        {**BEST, "save_only_model": True},
    ],
    "workers of the loader": [{"dataloader_num_workers": 1}],
    "counted tokens, emptied caches": [
        {"include_num_input_tokens_seen": "non_padding", "torch_empty_cache_steps": 1}
    ],
    "`torch_compile`": [{**COMPILED}],
}
QUICK = ("gradient accumulation",)
OWN = ("train_runtime", "per_second", "eval_runtime", "preparation_time", "fastft/")
CASES = [
    pytest.param(
        changes,
        id=f"{way} {number}",
        marks=[
            pytest.mark.way(way, loss="exact", optimizer="exact"),
            *([] if way in QUICK else [pytest.mark.slow]),
        ],
    )
    for way, cases in SETTINGS.items()
    for number, changes in enumerate(cases)
]


def trained(folder, plugs=None, **changes):
    torch._dynamo.reset()
    trainer = trainer_of(folder, **{"max_steps": 4, **changes})
    plug = None if plugs is None else fastft.plug(trainer, **plugs)
    trainer.train()
    return trainer, plug


def history(trainer):
    """What was logged, but for the times and what fastft says of itself."""
    return [
        {name: value for name, value in entry.items() if not any(map(name.count, OWN))}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("changes", CASES)
def test_a_setting_is_logged_as_in_stock(changes, tmp_path):
    stock, _ = trained(tmp_path / "stock", **changes)
    ours, plug = trained(tmp_path / "ours", {}, **changes)
    assert plug.lines["loss"].startswith("fused") and not plug.report.materialised
    assert plug.lines["optimizer"].startswith("AdamW")
    expected, actual = history(stock), history(ours)
    assert len(logged(stock)) > 1 and len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            within = 1e-5 if name == "grad_norm" else 1e-6
            assert mine[name] == pytest.approx(value, rel=within), name
    assert ours.state.global_step == stock.state.global_step == 4
    assert ours.state.best_global_step == stock.state.best_global_step
    assert ours.state.num_input_tokens_seen == stock.state.num_input_tokens_seen


@pytest.mark.slow
@pytest.mark.way("bf16 autocast", loss="works", optimizer="works")
def test_bf16_autocast_is_no_further_from_fp64_than_stock(tmp_path):
    curves = []
    for plugs, changes in (({}, {"bf16": True}), (None, {"bf16": True}), (None, {})):
        trainer = trainer_of(tmp_path, max_steps=4, **changes)
        if not changes:
            trainer.model = trainer.model_wrapped = llama().double()
        if plugs is not None:
            fastft.plug(trainer, **plugs)
        trainer.train()
        curves.append(torch.tensor(logged(trainer), dtype=torch.float64))
    assert_no_worse(*curves, "losses")


@pytest.mark.slow
@pytest.mark.way("bf16 parameters", loss="works", optimizer="works")
def test_bf16_parameters_follow_fp32_closer_than_stock(tmp_path):
    curves = []
    for plugs, dtype in (({}, torch.bfloat16), (None, torch.bfloat16), (None, torch.float32)):
        trainer = trainer_of(tmp_path, max_steps=8)
        trainer.model = trainer.model_wrapped = llama().to(torch.bfloat16).to(dtype)
        if plugs is not None:
            plug = fastft.plug(trainer, **plugs)
        trainer.train()
        curves.append(torch.tensor(logged(trainer), dtype=torch.float64))
    assert plug.lines["optimizer"].startswith("AdamW exact bf16")
    assert_no_worse(*curves, "losses")


@pytest.mark.slow
@pytest.mark.way("`auto_find_batch_size`", loss="exact", optimizer="exact")
def test_a_batch_size_that_is_found_trains_as_stock(tmp_path):
    class Full(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            if self._train_batch_size > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    given = {"kind": Full, "auto_find_batch_size": True}
    stock, _ = trained(tmp_path, **given)
    ours, plug = trained(tmp_path, {}, **given)
    assert logged(ours) == pytest.approx(logged(stock), rel=1e-6)
    assert ours.state.train_batch_size == stock.state.train_batch_size <= 2
    assert plug.report.fused == 4 and len(examples()) == 16
