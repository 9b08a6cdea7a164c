"""The figures of a whole training reach the loggers once, whichever callbacks are there."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.fused_trainings import examples, llama, per_token_loss
from support.speech_models import PAD, START, speech_model, spoken_examples
from support.trainers import logged, quiet_arguments
from transformers import Trainer, TrainerCallback

import fastft

KEYS = {"fastft/fused", "fastft/materialised", "fastft/skipped", "fastft/padding_share"}


class Reporter(TrainerCallback):
    """Stands where those of `report_to` stand."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def padded(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of 24 places, of which example i of the batch has i less."""
    rows = [dict(one) for one in batch]
    for index, row in enumerate(rows):
        for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            row[key] = row[key].clone()
            row[key][len(row[key]) - index :] = fill
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def trainer_of(folder: Any, callbacks: list[Any], **changes: Any) -> Trainer:
    arguments = {"max_steps": 3, "per_device_train_batch_size": 3, "logging_steps": 2}
    return Trainer(
        llama(),
        quiet_arguments(folder, **{**arguments, **changes.pop("args", {})}),
        train_dataset=examples(),
        data_collator=changes.pop("data_collator", padded),
        callbacks=callbacks,
        **changes,
    )


def records(reporter: Reporter) -> list[dict[str, Any]]:
    return [one for one in reporter.seen if any(key.startswith("fastft/") for key in one)]


SETS: dict[str, Any] = {
    "loss": lambda: [fastft.FusedLossCallback()],
    "loss and throughput": lambda: [fastft.FusedLossCallback(), fastft.ThroughputCallback()],
    "throughput and loss": lambda: [fastft.ThroughputCallback(), fastft.FusedLossCallback()],
    "throughput": lambda: [fastft.ThroughputCallback(flops=False)],
}


@pytest.mark.parametrize("callbacks", SETS)
def test_one_record_a_run_in_the_last_log(callbacks: str, tmp_path: Any) -> None:
    reporter = Reporter()
    trainer = trainer_of(tmp_path, [reporter, *SETS[callbacks]()])
    metrics = trainer.train().metrics
    (record,) = records(reporter)
    keys = {key for key in record if key.startswith("fastft/")}
    assert keys == (KEYS if "loss" in callbacks else {"fastft/padding_share"})
    assert record is not None and "train_runtime" in record
    assert record["fastft/padding_share"] == pytest.approx(1 / 24)  # 0, 1 and 2 of 24 places
    if "loss" in callbacks:
        assert [record[f"fastft/{key}"] for key in ("fused", "materialised", "skipped")] == [
            3,
            0,
            0,
        ]
    kept = [one for one in trainer.state.log_history if one.keys() & KEYS]
    assert len(kept) == 1 and {key: kept[0][key] for key in keys} == {
        key: metrics[key] for key in keys
    }
    assert not trainer.model._forward_pre_hooks
    names = [type(one).__name__ for one in trainer.callback_handler.callbacks]
    assert "RunRecord" not in names


class Copies(TrainerCallback):
    """Copies the model in a training, as an average of weights does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))


def test_a_copy_of_the_model_counts_for_nobody(tmp_path: Any) -> None:
    reporter, copies = Reporter(), Copies()
    trainer_of(tmp_path, [reporter, copies, fastft.PackingCallback(), SETS["loss"]()[0]]).train()
    (record,) = records(reporter)
    assert record["fastft/padding_share"] == pytest.approx(1 / 24)
    for one in copies.copies:
        one(**padded(examples(count=3)))


def test_a_second_training_counts_anew(tmp_path: Any) -> None:
    reporter = Reporter()
    trainer = trainer_of(tmp_path, [reporter, fastft.FusedLossCallback()])
    trainer.train()
    trainer.train()
    assert [one["fastft/fused"] for one in records(reporter)] == [3, 3]


def test_a_plugged_trainer_has_one_record_of_packed_batches(tmp_path: Any) -> None:
    reporter = Reporter()
    trainer = trainer_of(tmp_path, [reporter])
    fastft.plug(trainer, packing="collate")
    trainer.train()
    (record,) = records(reporter)
    assert record["fastft/padding_share"] == 0 and record["fastft/fused"] == 3


def test_what_sounds_say_is_counted(tmp_path: Any) -> None:
    reporter = Reporter()
    collator = fastft.PackingCollator(
        task="speech_seq2seq", decoder_start_token_id=START, pad_token_id=PAD, row_tokens=40
    )
    Trainer(
        speech_model("whisper"),
        quiet_arguments(tmp_path, max_steps=1, per_device_train_batch_size=6),
        train_dataset=spoken_examples("whisper"),
        data_collator=collator,
        callbacks=[reporter, fastft.PackingCallback()],
    ).train()
    (record,) = records(reporter)
    assert record["fastft/padding_share"] == 0 and "fastft/fused" not in record


def asking_for_logits(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A loss of which a part is fused, and a part none that a rule knows."""
    asked = outputs.logits.cumsum(-1).mean()
    return per_token_loss(outputs, labels, num_items_in_batch) + 1e-3 * asked


def logged_to(folder: Any, logger: str) -> None:
    """Trains plugged and with a logger, and asserts that losses are those of stock."""
    losses = []
    for report_to in ("none", logger):
        trainer = trainer_of(
            folder,
            [] if report_to == "none" else [fastft.ThroughputCallback(flops=False)],
            args={"report_to": report_to, "run_name": "one", "optim": "adamw_torch"},
            compute_loss_func=asking_for_logits,
        )
        if report_to == logger:
            assert fastft.plug(trainer).lines["optimizer"].startswith("AdamW")
        trainer.train()
        losses.append(logged(trainer, "loss", "train_loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.way("TensorBoard", loss="exact", optimizer="exact")
def test_tensorboard_has_the_record_and_the_places(tmp_path: Any, monkeypatch: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    logged_to(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for key in KEYS:
        (scalar,) = events.Scalars(f"train/{key}")
        assert scalar.step == 3
    assert events.Scalars("train/fastft/materialised")[0].value == 1
    (text,) = events.Tensors("fastft/materialised_places/text_summary")
    assert b"test_run_record.py" in text.tensor_proto.string_val[0]


@pytest.mark.slow
@pytest.mark.way("W&B", loss="exact", optimizer="exact")
def test_wandb_has_the_record_and_the_places(tmp_path: Any, monkeypatch: Any) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged_to(tmp_path, "wandb")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert {f"train/{key}" for key in KEYS} <= summary.keys()
    assert summary["train/fastft/materialised"] == 1
    assert "test_run_record.py" in summary["fastft/materialised_places"]


@pytest.mark.slow
@pytest.mark.way("MLflow", loss="exact", optimizer="exact")
def test_mlflow_has_the_record_and_the_places(tmp_path: Any, monkeypatch: Any) -> None:
    mlflow = pytest.importorskip("mlflow")
    store = (tmp_path / "runs").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(store)
    logged_to(tmp_path, "mlflow")
    (run,) = mlflow.MlflowClient(store).search_runs(["0"])
    assert KEYS <= run.data.metrics.keys()
    assert run.data.metrics["fastft/materialised"] == 1
    assert "test_run_record.py" in run.data.tags["fastft/materialised_places"]
    history = mlflow.MlflowClient(store).get_metric_history(run.info.run_id, "fastft/fused")
    assert [one.step for one in history] == [3]
