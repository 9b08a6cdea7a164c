"""fastft.plug: the same losses, evaluations and predictions as stock, a line for each piece, and
nothing that stays."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from support import plugged
from support.fused_trainings import assert_stock, gemma
from support.plugged import STEPS, V, curves, examples, stock_and_plugged, tokenizer, trainer_of
from support.trainers import tiny_llama
from support.watch import Watch
from transformers import Trainer, TrainerCallback

import fastft
from fastft.commands.pieces import PIECES
from fastft.integrations.plug import plug as plug_module
from fastft.integrations.plug.plug import Plugged

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        rows = outputs.logits[:, :-1].float().reshape(-1, V)
        total = torch.nn.functional.cross_entropy(
            rows, labels[:, 1:].reshape(-1), reduction="sum", ignore_index=-100
        )
        count = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
        loss = total / count
        return (loss, outputs) if return_outputs else loss


def half_the_texts(outputs, labels, num_items_in_batch=None):
    rows = outputs.logits[:, :-1].float().reshape(-1, V)
    total = torch.nn.functional.cross_entropy(rows, labels[:, 1:].reshape(-1), reduction="sum")
    return 0.5 * total / num_items_in_batch


WAYS = {
    "as it is": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "no clipping": {"max_grad_norm": 0.0},
    "fused torch AdamW": {"optim": "adamw_torch_fused"},
    "a compiled model": {"torch_compile": True, "torch_compile_backend": "eager"},
    "checkpointing": {"activation_checkpointing": True},
    "Seq2SeqTrainer": {
        "task": "answers",
        "kind": transformers.Seq2SeqTrainer,
        "arguments": transformers.Seq2SeqTrainingArguments,
    },
    "a subclass with a loss of its own": {"kind": OwnLoss},
    "a compute_loss_func": {"options": {"compute_loss_func": half_the_texts}},
    "a classifier": {"task": "classes"},
    "sgd": {"optim": "sgd"},
}
QUICK = ("as it is", "accumulation", "a subclass with a loss of its own")
KNOWN = set(inspect.signature(transformers.TrainingArguments).parameters)


@pytest.mark.parametrize(
    "way", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in WAYS]
)
def test_a_training_has_the_losses_of_stock(tmp_path, way):
    given = {**EVALUATING, **WAYS[way]}
    if "activation_checkpointing" in given and "activation_checkpointing" not in KNOWN:
        given = {**EVALUATING, "gradient_checkpointing": True}
    stock, ours, plug, trainers = stock_and_plugged(tmp_path, **given)
    assert [*map(len, ours)] == [*map(len, stock)] and len(ours[0]) == STEPS
    for expected, actual in zip(stock, ours, strict=True):
        assert actual == pytest.approx(expected, rel=2e-5)
    left = {"a classifier": "loss", "sgd": "optimizer"}.get(way)
    for piece in ("loss", "optimizer"):
        alone = plug.lines[piece].startswith("left alone")
        assert alone == (piece == left), plug.lines
    for name, param in trainers[1].model.named_parameters():
        other = trainers[0].model.get_parameter(name)
        torch.testing.assert_close(param, other, rtol=1e-3, atol=2e-4)
    assert (plug.report.fused > 0) == (way != "a classifier")
    losses = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    assert (plug.evaluation.fused > 0) == (way != "a classifier")


def test_the_lines_say_what_is_done_before_and_after(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(plug_module.logger, "warning", said.append)
    trainer = trainer_of(tmp_path)
    plug = fastft.plug(trainer)
    assert tuple(plug.lines) == PIECES
    assert plug.lines["loss"] == "to be fused at lm_head" and not said
    trainer.train()
    assert plug.lines == {
        "loss": "fused at lm_head",
        "optimizer": "AdamW, clipping inside",
        "packing": "off: packing=None",
    }
    # what was not asked for is no news
    assert said == [line for line in str(plug).splitlines() if "off:" not in line][::-1]
    assert said[-1] == "fastft: loss: fused at lm_head"
    trainer.train()
    assert len(said) == 4


def test_other_processes_say_nothing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(plug_module.logger, "warning", said.append)
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    plug = fastft.plug(trainer)
    trainer.train()
    assert not said and plug.lines["loss"] == "fused at lm_head"


@pytest.mark.parametrize(
    "variables, warnings",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, 1),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 0),  # one process says it
        ({"WORLD_SIZE": "1", "RANK": "0"}, 0),
        ({}, 0),
    ],
)
def test_processes_of_a_launcher_that_train_alone_are_told_so(
    tmp_path, monkeypatch, variables, warnings
):
    """As on a CPU behind torchrun, without use_cpu=True."""
    said = []
    monkeypatch.setattr(plug_module.logger, "warning", said.append)
    trainer = trainer_of(tmp_path, max_steps=1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fastft.plug(trainer)
    trainer.train()
    told = [line for line in said if "have not been joined" in line]
    assert len(told) == warnings
    assert all("use_cpu=True" in line and "2 processes" in line for line in told)


def test_a_bf16_model_with_softcap_is_told_of(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.model = trainer.model_wrapped = gemma().to(torch.bfloat16)
    plug = fastft.plug(trainer)
    assert plug.lines["loss"].startswith("to be fused at lm_head, softcap ")
    trainer.train()
    assert plug.lines["loss"].startswith("fused at lm_head, softcap ")
    assert plug.lines["optimizer"] == "AdamW exact bf16, clipping inside"


def test_pieces_can_be_left_out(tmp_path):
    trainer = trainer_of(tmp_path)
    plug = fastft.plug(trainer, loss=False, optimizer=False)
    trainer.train()
    assert plug.lines["loss"] == "off: loss=False"
    assert plug.lines["optimizer"] == "off: optimizer=False"
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    assert plug.report.fused == plug.evaluation.fused == 0


@pytest.mark.parametrize("packing", [None, "collate"])
def test_restore_leaves_the_trainer_as_it_was(tmp_path, packing):
    trainer = trainer_of(tmp_path)
    before, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    accelerator = dict(vars(trainer.accelerator))
    plug = fastft.plug(trainer, packing=packing)
    assert vars(trainer) != before
    plug.restore()
    plug.restore()
    assert vars(trainer) == before and vars(trainer.accelerator) == accelerator
    assert trainer.callback_handler.callbacks == callbacks
    assert Plugged.of(trainer) is None
    assert Plugged.of(trainer) is None and trainer.train.__func__ is Trainer.train


def test_after_a_training_restore_leaves_what_stock_leaves(tmp_path):
    stock, ours = trainer_of(tmp_path), trainer_of(tmp_path)
    plug = fastft.plug(ours, packing="collate")
    stock.train()
    ours.train()
    assert "clip_grad_norm_" not in vars(ours.accelerator)
    assert_stock(ours.model)
    plug.restore()
    assert vars(ours).keys() == vars(stock).keys()
    assert ours.optimizer_cls_and_kwargs is None
    assert len(ours.callback_handler.callbacks) == len(stock.callback_handler.callbacks)


class Stop(TrainerCallback):
    """Ends the training with an exception, in an evaluation or in a step."""

    def __init__(self, error, event):
        self.error = error
        setattr(self, event, self.stop)

    def stop(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ("on_train_begin", ValueError),
        ("on_step_end", KeyboardInterrupt),
        ("on_prediction_step", KeyboardInterrupt),
    ],
)
def test_after_an_exception_the_model_is_stock_and_trains_again(tmp_path, event, error):
    trainer = trainer_of(tmp_path, "causal", **EVALUATING)
    stop = Stop(error, event)
    implementation = trainer.model.config._attn_implementation
    plug = fastft.plug(trainer, packing="collate")
    trainer.add_callback(stop)
    with pytest.raises(error):
        trainer.train()
    assert_stock(trainer.model)
    assert trainer.model.config._attn_implementation == implementation
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    trainer.remove_callback(stop)
    trainer.train()
    assert plug.report.fused == STEPS
    assert_stock(trainer.model)


def test_an_interrupted_classifier_has_no_hooks(tmp_path):
    trainer = trainer_of(tmp_path, "classes")
    fastft.plug(trainer, packing="collate")
    trainer.add_callback(Stop(KeyboardInterrupt, "on_step_end"))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not any(module._forward_hooks for module in trainer.model.modules())


@pytest.mark.slow
def test_trained_twice(tmp_path):
    def twice(plug):
        trainer = trainer_of(tmp_path)
        if plug:
            fastft.plug(trainer)
        return curves(trainer), curves(trainer)

    for expected, actual in zip(twice(False), twice(True), strict=True):
        assert actual[0] == pytest.approx(expected[0], rel=2e-5)


@pytest.mark.slow
def test_a_batch_size_that_is_found(tmp_path):
    class Full(Trainer):
        def training_step(self, *args, **kwargs):
            if self._train_batch_size > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    trainer = trainer_of(tmp_path, kind=Full, auto_find_batch_size=True)
    plug = fastft.plug(trainer)
    trainer.train()
    assert trainer.state.train_batch_size <= 2 and plug.report.fused == STEPS
    assert type(trainer.optimizer.optimizer) is fastft.AdamW
    assert_stock(trainer.model)


@pytest.mark.way("`model_init`", loss="exact", optimizer="exact")
def test_model_init_makes_a_model_for_each_training(tmp_path):
    def trained(plug):
        stock = trainer_of(tmp_path)
        trainer = Trainer(
            None,
            stock.args,
            model_init=lambda: plugged.llama(),
            train_dataset=stock.train_dataset,
            data_collator=stock.data_collator,
        )
        done = fastft.plug(trainer) if plug else None
        return [curves(trainer)[0] for _ in range(2)], done

    (stock, _), (ours, done) = trained(False), trained(True)
    assert ours[0] == pytest.approx(stock[0], rel=2e-5) == ours[1]
    assert done.report.fused == STEPS


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


BEST_TOKENS = {
    "compute_metrics": accuracy,
    "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
}


def test_evaluate_and_predict_alone_are_those_of_stock_and_hold_no_logits(tmp_path):
    rows, length, vocabulary = 16, 120, 20_000
    texts = [{"input_ids": ids} for ids in torch.randint(3, V, (rows, length)).tolist()]

    def found(plug):
        trainer = trainer_of(tmp_path, options=BEST_TOKENS, per_device_eval_batch_size=rows)
        trainer.model = trainer.model_wrapped = tiny_llama(vocabulary, initializer_range=0.2)
        done = fastft.plug(trainer) if plug else None
        with Watch() as watch:
            values = trainer.evaluate(texts)
            predicted = trainer.predict(texts)
        assert_stock(trainer.model)
        values = {name: values[name] for name in ("eval_loss", "eval_accuracy")}
        return values, predicted, watch.elements, done

    stock, ours = found(False), found(True)
    assert ours[0] == pytest.approx(stock[0], rel=1e-5)
    assert (ours[1].predictions == stock[1].predictions).all()
    assert (ours[1].label_ids == stock[1].label_ids).all()
    assert stock[2] >= rows * length * vocabulary > 4 * ours[2]
    assert ours[3].evaluation.fused > 0 and not ours[3].evaluation.materialised


def test_an_evaluation_that_raises_leaves_a_stock_model(tmp_path):
    trainer = trainer_of(tmp_path)
    fastft.plug(trainer)
    trainer.add_callback(Stop(KeyboardInterrupt, "on_prediction_step"))
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    assert_stock(trainer.model)
    assert not torch.is_inference_mode_enabled()


def test_logits_that_are_predicted_are_those_of_stock(tmp_path):
    trainer = trainer_of(tmp_path)
    expected = trainer.predict(examples()[:5])
    fastft.plug(trainer)
    found = trainer.predict(examples()[:5])
    assert type(found.predictions) is type(expected.predictions)
    assert found.predictions == pytest.approx(expected.predictions, rel=1e-4, abs=1e-5)
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", [fastft.FusedLossCallback, fastft.PackingCallback])
def test_a_callback_that_is_there_is_kept(tmp_path, kind):
    own = kind()
    trainer = trainer_of(
        tmp_path,
        options={"callbacks": [own], "data_collator": fastft.PackingCollator()},
    )
    plug = fastft.plug(trainer)
    fusing = [
        callback
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, fastft.FusedLossCallback)
    ]
    assert len(fusing) == 1 and own in trainer.callback_handler.callbacks
    trainer.train()
    assert plug.lines["loss"] == "fused at lm_head"
    assert plug.lines["packing"] == "PackingCollator as it was given"
    assert_stock(trainer.model)


@pytest.mark.way("DataParallel", loss="stock")
def test_data_parallel_is_left_alone_with_a_word(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.args._n_gpu = 2
    assert "DataParallel" in fastft.plug(trainer).lines["loss"]


def test_an_attention_that_is_not_to_be_switched_stays(tmp_path):
    trainer = trainer_of(tmp_path)
    plug = fastft.plug(trainer, packing="collate", attention=False)
    trainer.train()
    assert "attention sdpa, probe exact" in plug.lines["packing"]


REFUSED = {
    "no Trainer": ("a trainer", {}, TypeError, "must be a transformers.Trainer, got str"),
    "a model": (plugged.llama, {}, TypeError, "got LlamaForCausalLM.*fastft.fused_loss"),
    "loss": (None, {"loss": 1}, TypeError, "loss must be True or False, got 1"),
    "attention": (None, {"attention": "sdpa"}, TypeError, "attention must be True or False"),
    "an unknown option": (None, {"rate": 1}, TypeError, "unexpected keyword argument 'rate'"),
    "a wrong value": (None, {"moments": "2bit"}, ValueError, "moments must be"),
    "differentiable": (None, {"differentiable": True}, ValueError, "differentiable"),
    "max_grad_norm": (None, {"max_grad_norm": 1.0}, ValueError, "TrainingArguments.max_grad_norm"),
    "weight_decay": (None, {"weight_decay": 0.5}, ValueError, "weight_decay=0.5 would be lost"),
    "options without an optimizer": (
        None,
        {"optimizer": False, "moments": "8bit"},
        ValueError,
        "moments.*off: optimizer=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_combination_raises_at_once(tmp_path, case):
    thing, options, error, message = REFUSED[case]
    trainer = trainer_of(tmp_path)
    before = dict(vars(trainer))
    with pytest.raises(error, match=message):
        fastft.plug(trainer if thing is None else thing() if callable(thing) else thing, **options)
    assert vars(trainer) == before and Plugged.of(trainer) is None


def test_plugged_twice(tmp_path):
    trainer = trainer_of(tmp_path)
    plug = fastft.plug(trainer)
    assert Plugged.of(trainer) is plug
    with pytest.raises(ValueError, match=r"plugged already: call restore\(\)"):
        fastft.plug(trainer)
    plug.restore()
    fastft.plug(trainer)


def test_the_tokenizer_of_the_tests_masks_its_end_token():
    """What the packing tests rely on: stock ignores an end token that is the padding token."""
    collate = transformers.DataCollatorForLanguageModeling(tokenizer("[EOS]"), mlm=False)
    batch = collate(examples()[:2])
    assert (batch["labels"][batch["attention_mask"] == 1] == -100).sum() == 2


def test_a_batch_without_labels_is_left_out_of_an_evaluation_as_in_stock(tmp_path):
    texts = examples("tokens")[:5]
    texts[3]["labels"] = texts[4]["labels"] = [-100] * 4
    texts[3]["input_ids"] = texts[4]["input_ids"] = [5, 6, 7, 8]

    def loss(plug):
        own = transformers.DataCollatorForSeq2Seq(tokenizer())
        trainer = trainer_of(tmp_path, options={"data_collator": own}, per_device_eval_batch_size=3)
        if plug:
            fastft.plug(trainer)
        return trainer.evaluate(texts)["eval_loss"]

    # an older Trainer takes the mean of all, which is NaN
    assert loss(True) == pytest.approx(loss(False), rel=1e-5, nan_ok=True)


WITHOUT_LABELS = {
    "the model's loss": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "a loss of its own": {"kind": OwnLoss},
}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(one, marks=() if one == "the model's loss" else pytest.mark.slow)
        for one in WITHOUT_LABELS
    ],
)
def test_a_step_without_labels_leaves_the_weights_to_the_next_as_in_stock(tmp_path, way):
    """Trainer divides its loss by 0 labels: NaN is logged, and the gradients are 0."""
    texts = examples("tokens")[:12]
    for text in texts[4:8]:
        text["labels"] = [-100] * len(text["labels"])

    def trained(plug):
        own = transformers.DataCollatorForSeq2Seq(tokenizer())
        trainer = trainer_of(
            tmp_path,
            options={"data_collator": own, "train_dataset": texts},
            train_sampling_strategy="sequential",
            logging_nan_inf_filter=False,
            max_steps=3,
            **WITHOUT_LABELS[way],
        )
        done = fastft.plug(trainer) if plug else None
        return curves(trainer), trainer.model.state_dict(), done

    (stock, weights, _), (ours, found, plug) = trained(False), trained(True)
    assert plug.report.fused >= 3 and stock[1][1] == 0
    assert ours[1] == pytest.approx(stock[1], rel=2e-5)
    assert ours[0] == pytest.approx(stock[0], rel=2e-5, nan_ok=True)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-4)


def test_a_callback_that_is_added_later_is_the_one_that_is_told_of(tmp_path):
    trainer, own = trainer_of(tmp_path), fastft.FusedLossCallback()
    plug = fastft.plug(trainer)
    trainer.add_callback(own)
    trainer.train()
    assert plug.lines["loss"] == "fused at lm_head" and plug.report.fused == STEPS
    assert plug.report is own.report
    trainer.evaluate()
    assert plug.evaluation.fused > 0
    assert_stock(trainer.model)


def test_what_asks_for_real_logits_is_told_with_its_place(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        rows = outputs.logits.sort().values.reshape(-1, V)
        return torch.nn.functional.cross_entropy(rows, labels.reshape(-1))

    trainer = trainer_of(tmp_path, options={"compute_loss_func": loss})
    plug = fastft.plug(trainer)
    trainer.train()
    line = plug.lines["loss"]
    assert line.startswith("left alone: real logits were asked for by ") and "test_plug" in line
