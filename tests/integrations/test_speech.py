"""Whisper and its kind: what sounds say is packed, the sounds stay a batch; losses are those of
padded batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.speech_models import (
    MODELS,
    PAD,
    START,
    speech_model,
    spoken_examples,
)
from support.trainers import logged, quiet_arguments
from support.versions import checkpoint_activations

import fastft

transformers = pytest.importorskip("transformers")

EXACT = ("whisper", "moonshine", "cohere asr", "canary")
REFUSED = tuple(name for name in MODELS if name not in EXACT)
OPTIONS = {"decoder_start_token_id": START, "pad_token_id": PAD}


def collator(**options: Any) -> fastft.PackingCollator:
    return fastft.PackingCollator(task="speech_seq2seq", **{**OPTIONS, **options})


def padding_collator(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """As in every recipe for Whisper: the sounds stacked, the labels padded with -100."""
    labels = [torch.tensor(one["labels"]) for one in examples]
    padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return {
        "input_features": torch.stack([one["input_features"] for one in examples]),
        "labels": padded,
    }


def gradients(model: Any) -> torch.Tensor:
    flat = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
    model.zero_grad()
    return torch.cat(flat)


def in_float64(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in batch.items()
    }


def one_by_one(model: Any, examples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over all labels, in stock, an example at a time, and its gradients."""
    total, counted = 0.0, sum(len(one["labels"]) for one in examples)
    for one in examples:
        loss = model(**in_float64(collator(pad_examples=True)([one]))).loss
        (loss * len(one["labels"]) / counted).backward()
        total += loss.detach() * len(one["labels"]) / counted
    return total, gradients(model)


@pytest.mark.way("Whisper", loss="exact", optimizer="exact", packing="exact")
@pytest.mark.parametrize("row_tokens", [12, 448])
@pytest.mark.parametrize("name", EXACT)
def test_losses_and_gradients_are_those_of_each_example_alone(name: str, row_tokens: int) -> None:
    model, examples = speech_model(name).double().eval(), spoken_examples(name)
    if name == "moonshine":  # its encoder normalises over a row, padding included
        examples = [{**one, "input_values": one["input_values"][:1000]} for one in examples]
    expected, grads = one_by_one(model, examples)
    batch = in_float64(collator(row_tokens=row_tokens)(examples))
    assert len(batch["labels"]) == (3 if row_tokens == 12 else 1)
    model.set_attn_implementation("fastft")
    with fastft.packed_attention(model):
        loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0, check_dtype=False)
    assert (gradients(model) - grads).norm() <= 1e-6 * grads.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_again_in_backward_read_their_own_sounds(reentrant: bool) -> None:
    """Gradient checkpointing, with another forward in between."""
    model, grads = speech_model("whisper", "fastft").train(), []
    one, other = (collator()(spoken_examples("whisper", seed=seed)) for seed in (1, 2))
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model, use_reentrant=reentrant)
        with fastft.packed_attention(model):
            loss = model(**one).loss
            model(**other)
            loss.backward()
        grads.append(gradients(model))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.way("Whisper", packing="exact")
@pytest.mark.parametrize("name", EXACT)
def test_the_probe_finds_the_kind_exact_and_a_planted_leak(name: str) -> None:
    model = speech_model(name, "fastft")
    with fastft.packed_attention(model):
        fastft.check_packing(model)
    model.set_attn_implementation("sdpa")
    with fastft.packed_attention(model), pytest.raises(fastft.PackingLeakError, match="fastft"):
        fastft.check_packing(model)
    model.set_attn_implementation("fastft")
    layer = model.get_decoder().layers[-1]
    layer.register_forward_hook(lambda module, args, output: output + output.mean(1, keepdim=True))
    with fastft.packed_attention(model), pytest.raises(fastft.PackingLeakError, match="move the"):
        fastft.check_packing(model)


def trainer_of(tmp_path: Any, data_collator: Any, name: str = "whisper", **options: Any) -> Any:
    given = {"callbacks": [], "eval_dataset": spoken_examples(name, 5, seed=6), **options}
    arguments = {
        **{"max_steps": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        **{"learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 3, "seed": 7},
        **{"per_device_eval_batch_size": 2, "optim": "adamw_torch", **given.pop("args", {})},
    }
    return transformers.Seq2SeqTrainer(
        speech_model(name),
        quiet_arguments(tmp_path, transformers.Seq2SeqTrainingArguments, **arguments),
        train_dataset=spoken_examples(name, 14),
        data_collator=data_collator,
        **given,
    )


def curves(trainer: Any) -> list[float]:
    trainer.train()
    return logged(trainer, "loss", "grad_norm", "eval_loss")


@pytest.mark.way("Whisper", loss="exact", packing="exact")
def test_trainer_packed_is_trainer_padded(tmp_path: Any) -> None:
    """Evaluations for the loss alone are packed too, and of the same loss."""
    expected = curves(trainer_of(tmp_path, padding_collator))
    assert len(expected) == 7
    callback = fastft.FusedLossCallback()
    ours = trainer_of(tmp_path, collator(row_tokens=40), callbacks=[callback])
    assert curves(ours) == pytest.approx(expected, rel=1e-5)
    assert callback.probe == "exact" and callback.switched == "sdpa" and callback.report.fused == 5
    assert not callback.report.materialised


@pytest.mark.way("Whisper", loss="exact", optimizer="exact", packing="exact")
def test_plug_packs_the_batches_of_a_recipe_and_generates_from_padded_ones(tmp_path: Any) -> None:
    def words(prediction: Any) -> dict[str, float]:
        texts.append(prediction.predictions.tolist())
        return {}

    texts: list[Any] = []
    options = {"args": {"predict_with_generate": True}, "compute_metrics": words}
    expected = curves(trainer_of(tmp_path, padding_collator, **options))
    ours = trainer_of(tmp_path, padding_collator, **options)
    plugged = fastft.plug(ours, packing="collate")
    assert curves(ours) == pytest.approx(expected, rel=1e-5)
    assert len(texts) == 2 and texts[0] == texts[1]
    line = plugged.lines["packing"]
    assert "the same batches" in line and "probe exact" in line and "instead of" in line, line


@pytest.mark.way("Speech2Text, Moonshine streaming", packing="refused")
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_count_along_the_row_are_refused(name: str, tmp_path: Any) -> None:
    trainer = trainer_of(tmp_path, collator(), name, callbacks=[fastft.PackingCallback()])
    with pytest.raises(fastft.PackingLeakError, match=r"the outputs are off .* padded batches"):
        trainer.train()


def test_generation_from_packed_batches_is_refused(tmp_path: Any) -> None:
    options = {"args": {"predict_with_generate": True}, "callbacks": [fastft.PackingCallback()]}
    with pytest.raises(ValueError, match=r"would generate from packed batches; .*plug"):
        trainer_of(tmp_path, collator(), **options).train()


def test_attention_that_cannot_read_sounds_apart_is_refused() -> None:
    model = speech_model("whisper")
    batch = collator()(spoken_examples("whisper"))
    with (
        fastft.packed_attention(model),
        pytest.raises(ValueError, match="WhisperDecoder needs attn_implementation='fastft'"),
    ):
        model(**batch)
