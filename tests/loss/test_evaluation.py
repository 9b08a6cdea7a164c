"""Evaluation inside `train()` without logits: losses, metrics and predictions equal those of stock
Trainer."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import transformers
from support.fused_trainings import (
    SIZES,
    V,
    arguments,
    assert_stock,
    examples,
    gemma,
    llama,
    per_token_loss,
)
from support.watch import Watch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

import fastft
from fastft.integrations import fused_loss as fused_loss_module
from fastft.integrations.fused_loss import FusedLossCallback
from fastft.loss.lazy.evaluation import Evaluation
from fastft.loss.lazy.logits import LazyLogits, lazy_linear
from fastft.loss.lazy.output_head import Attachment, fused_loss

EVERY_STEP = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
EVALUATIONS = 3
BATCH = {"per_device_eval_batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """accelerate collects garbage whenever a training begins: a second each, in a process with all
    of transformers."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def uneven(count=6):
    """Examples of several lengths."""
    return [
        {key: value[: 24 - 2 * (index % 3)] for key, value in row.items()}
        for index, row in enumerate(examples(count))
    ]


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.stack(
            [nn.functional.pad(row[key], (0, longest - len(row[key])), value=value) for row in rows]
        )
        for key, value in fill.items()
    }


def seq2seq_batch(rows):
    batch = padded(rows)
    return batch | {"decoder_input_ids": nn.functional.pad(batch["labels"].clamp(min=0), (1, -1))}


class Metrics:
    """A `compute_metrics` that remembers what it was given."""

    def __init__(self):
        self.given = []

    def __call__(self, prediction, compute_result=True):
        fields = (
            prediction.predictions,
            prediction.label_ids,
            prediction.inputs,
            prediction.losses,
        )
        self.given.append(copy.deepcopy(fields))
        return {"seen": float(len(self.given))}


def run(
    tmp_path,
    make,
    callbacks,
    metrics,
    *,
    data=None,
    kind=Trainer,
    made=arguments,
    collator=padded,
    options=None,
    **changes,
):
    """A whole training with three evaluations."""
    trainer = kind(
        make(),
        made(tmp_path, **{**EVERY_STEP, **BATCH, **changes}),
        train_dataset=examples(8),
        eval_dataset=uneven() if data is None else data,
        data_collator=collator,
        compute_metrics=metrics,
        callbacks=callbacks,
        **(options or {}),
    )
    trainer.train()
    return trainer


def assert_close(actual, expected, **tolerance):
    assert type(actual) is type(expected), (type(actual), type(expected))
    if isinstance(expected, tuple | list):
        assert len(actual) == len(expected)
        for mine, theirs in zip(actual, expected, strict=True):
            assert_close(mine, theirs, **tolerance)
    elif isinstance(expected, np.ndarray | torch.Tensor):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), **tolerance)
    else:
        assert expected is None or isinstance(expected, transformers.BatchEncoding | dict)


TIMES = ("runtime", "per_second", "epoch", "step")


def history(trainer):
    return [
        {
            key: value
            for key, value in entry.items()
            if not key.endswith(TIMES) and not key.startswith("fastft/")
        }
        for entry in trainer.state.log_history
    ]


def stock_of(tmp_path, make=llama, metrics=True, **settings):
    """What a stock run logs, and what its metrics were given."""
    seen = Metrics() if metrics else None
    trainer = run(tmp_path, make, [], seen, **settings)
    return history(trainer), seen and seen.given


def compare(
    tmp_path,
    make=llama,
    metrics=True,
    rtol=2e-5,
    atol=1e-5,
    only_fused=None,
    stock=None,
    **settings,
):
    """The callback and the trainer of a fused run whose evaluations equal stock's.

    `stock` is what `stock_of` gives, where several tests share it; `only_fused` are changes of the
    fused run.
    """
    logs, given = stock or stock_of(tmp_path, make, metrics, **settings)
    callback, seen = FusedLossCallback(), Metrics() if metrics else None
    fused = run(tmp_path, make, [callback], seen, **{**settings, **(only_fused or {})})
    assert len(logs) == len(history(fused)) >= EVALUATIONS
    for mine, theirs in zip(history(fused), logs, strict=True):
        assert mine == pytest.approx(theirs, rel=rtol)
    if metrics:
        assert len(given) == len(seen.given) >= EVALUATIONS
        assert_close(seen.given, given, rtol=1e-4, atol=atol)
    report = callback.report
    assert report.fused and not report.materialised and not report.skipped, report
    assert callback.evaluation.fused and not callback.evaluation.skipped, callback.evaluation
    assert_stock(fused.model)
    return callback, fused


def bert():
    torch.manual_seed(3)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(
        transformers.BertConfig(**SIZES, **dropout, type_vocab_size=1)
    )


def t5():
    torch.manual_seed(3)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 1, "vocab_size": V}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, **tokens, dropout_rate=0.0)
    )


def lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["lm_head", "q_proj"], r=4, task_type="CAUSAL_LM", init_lora_weights=False
    )
    return peft.get_peft_model(llama(), config)


COLLATORS = {"seq2seq": seq2seq_batch}  # with label smoothing the model sees no labels to shift
MODELS = {
    "causal": llama,
    "masked": bert,
    "seq2seq": t5,
    "LoRA on the head": lora,
    "softcap": gemma,
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_a_model(name, smoothing, tmp_path):
    settings = {"collator": COLLATORS.get(name, padded), "label_smoothing_factor": smoothing}
    callback, _ = compare(tmp_path, MODELS[name], metrics=False, **settings)
    assert not callback.evaluation.materialised


def first(logits):
    return logits[0] if isinstance(logits, tuple) else logits


def log_probs(logits, labels):
    log_softmax = torch.log_softmax(first(logits).float(), -1)
    return log_softmax.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def losses(logits, labels):
    logits = first(logits)[:, :-1]
    flat = nn.functional.cross_entropy(
        logits.reshape(-1, V), labels[:, 1:].reshape(-1), reduction="none"
    )
    return flat.view(len(labels), -1)


def entropy(logits, labels):
    log_softmax = nn.functional.log_softmax(first(logits), dim=-1)
    return -(log_softmax.exp() * log_softmax).sum(-1)


PREPROCESS = {
    "argmax": lambda logits, labels: first(logits).argmax(dim=-1),
    "best": lambda logits, labels: torch.max(first(logits), dim=-1).values,
    "best of each": lambda logits, labels: first(logits).softmax(-1).max(-1, keepdim=True)[0],
    "topk": lambda logits, labels: tuple(first(logits).topk(5, dim=-1)),
    "least": lambda logits, labels: torch.topk(first(logits), k=2, largest=False).values,
    "log-probabilities": log_probs,
    "losses": losses,
    "entropy": entropy,
    "lse": lambda logits, labels: torch.logsumexp(first(logits) / 0.7, -1),
}


@pytest.fixture(scope="module")
def stock_of_all(tmp_path_factory):
    """A stock run that computes all of `PREPROCESS`: the metrics of each are a part of its own."""

    def every_one(logits, labels):
        return tuple(function(logits, labels) for function in PREPROCESS.values())

    options = {"preprocess_logits_for_metrics": every_one}
    logs, given = stock_of(tmp_path_factory.mktemp("stock"), options=options)
    return {
        name: (logs, [(predictions[part], *others) for predictions, *others in given])
        for part, name in enumerate(PREPROCESS)
    }


@pytest.mark.parametrize("name", PREPROCESS)
def test_what_needs_tokens_alone_is_computed_without_logits(name, tmp_path, stock_of_all):
    options = {"preprocess_logits_for_metrics": PREPROCESS[name]}
    callback, _ = compare(tmp_path, stock=stock_of_all[name], options=options)
    assert not callback.evaluation.materialised and callback.evaluation.fused >= 4 * EVALUATIONS


@pytest.mark.parametrize("name", ["masked", "seq2seq", "LoRA on the head", "softcap"])
def test_preprocessed_logits_of_a_model(name, tmp_path):
    callback, _ = compare(
        tmp_path, MODELS[name], options={"preprocess_logits_for_metrics": PREPROCESS["topk"]}
    )
    assert not callback.evaluation.materialised


FULL = {
    "plain": {},
    "in batches": {"batch_eval_metrics": True},
    "accumulated": {"eval_accumulation_steps": 1},
    "in a list": {"eval_do_concat_batches": False},
    "with inputs and losses": {"include_for_metrics": ["inputs", "loss"]},
    "in batches, with inputs and losses": {
        "batch_eval_metrics": True,
        "include_for_metrics": ["inputs", "loss"],
    },
    "label smoothing": {"label_smoothing_factor": 0.1},
    "16 bits": {"bf16": True, "atol": 2e-2, "rtol": 2e-3},
    "bf16_full_eval": {"bf16_full_eval": True},
}


@pytest.mark.parametrize("name", FULL)
def test_metrics_that_want_logits_get_plain_ones(name, tmp_path):
    callback, _ = compare(tmp_path, **FULL[name])
    assert callback.evaluation.materialised


def test_logits_beside_other_outputs(tmp_path):
    compare(tmp_path, t5)


def test_a_model_that_returns_tuples(tmp_path):
    class Tuples(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).to_tuple()

    def make():
        model = llama(use_cache=False)
        model.__class__ = Tuples
        return model

    options = {"preprocess_logits_for_metrics": PREPROCESS["argmax"]}
    compare(tmp_path, make, options=options, remove_unused_columns=False, label_names=["labels"])


def test_compute_loss_func(tmp_path):
    options = {
        "compute_loss_func": per_token_loss,
        "preprocess_logits_for_metrics": PREPROCESS["argmax"],
    }
    callback, _ = compare(tmp_path, options=options)
    assert not callback.evaluation.materialised


def test_packed_batches(tmp_path):
    def packed():
        return llama(attn_implementation="fastft")

    collator = fastft.PackingCollator()
    callback, _ = compare(tmp_path, packed, metrics=False, collator=collator)
    assert not callback.evaluation.materialised
    options = {"preprocess_logits_for_metrics": PREPROCESS["argmax"]}
    callback, _ = compare(
        tmp_path, packed, collator=collator, per_device_eval_batch_size=2, options=options
    )
    assert not callback.evaluation.materialised


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(uneven())


def test_a_stream_without_a_length(tmp_path):
    compare(tmp_path, data=Stream())


def test_several_data_sets(tmp_path):
    callback, _ = compare(tmp_path, metrics=False, data={"one": uneven(), "two": uneven(3)})
    assert callback.evaluation.fused == (2 + 1) * EVALUATIONS


def test_the_best_model_and_early_stopping(tmp_path):
    best = {
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "max_steps": 5,
    }
    # it falls: the first is the best
    best |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainers = []
    for callbacks in ([], [FusedLossCallback()]):
        stopping = transformers.EarlyStoppingCallback(early_stopping_patience=2)
        trainers.append(run(tmp_path, llama, [*callbacks, stopping], None, **best))
    stock, fused = (trainer.state for trainer in trainers)
    assert fused.best_metric == pytest.approx(stock.best_metric, rel=1e-5)
    assert (
        fused.best_global_step == stock.best_global_step
        and fused.global_step == stock.global_step < 5
    )
    expected = trainers[0].model.state_dict()
    for name, tensor in trainers[1].model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_compiled(tmp_path):
    torch._dynamo.reset()
    options = {"preprocess_logits_for_metrics": PREPROCESS["argmax"]}
    compiling = {"torch_compile": True, "torch_compile_backend": "eager"}
    callback, _ = compare(tmp_path, options=options, only_fused=compiling)
    assert not callback.evaluation.materialised


class Seen(Trainer):
    """Remembers the logits of each prediction step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.types, self.kept = [], []

    def prediction_step(self, *args, **kwargs):
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        self.types.append(type(logits))
        self.kept.append(logits)
        return loss, logits, labels


def test_what_leaves_the_preprocessing_is_plain(tmp_path):
    left = []

    def preprocess(logits, labels):
        left.append((logits, torch.log_softmax(logits, -1), logits[:, 1:]))
        return left[-1]

    class Callback(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            types.update(type(part) for parts in left for part in parts)

    types = set()
    options = {"preprocess_logits_for_metrics": preprocess}
    trainer = run(
        tmp_path, llama, [FusedLossCallback(), Callback()], Metrics(), kind=Seen, options=options
    )
    assert set(trainer.types) == {LazyLogits} and types == {torch.Tensor}
    for logits, log_softmax, later in left:
        torch.testing.assert_close(log_softmax, logits.log_softmax(-1))
        # still a view
        assert later.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
        torch.testing.assert_close(later, logits[:, 1:])


def test_logits_that_were_kept_outlive_the_training(tmp_path):
    stock = run(tmp_path, llama, [], Metrics(), kind=Seen)
    fused = run(tmp_path, llama, [FusedLossCallback()], Metrics(), kind=Seen)
    assert {type(logits) for logits in fused.kept} == {torch.Tensor}
    for mine, theirs in zip(fused.kept, stock.kept, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_logits_somebody_has_a_weak_reference_to_have_their_numbers(tmp_path):
    references = []

    def preprocess(logits, labels):
        references.append((weakref.ref(logits), logits))
        return logits.argmax(-1)

    run(
        tmp_path,
        llama,
        [FusedLossCallback()],
        Metrics(),
        options={"preprocess_logits_for_metrics": preprocess},
    )
    for reference, logits in references:
        assert reference() is logits and not logits.is_lazy and logits.cpu().isfinite().all()


class Averaged(Trainer):
    """Evaluates with other weights, put in and out in every step by the way that leaves no
    trace."""

    def prediction_step(self, model, *args, **kwargs):
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
        try:
            return super().prediction_step(model, *args, **kwargs)
        finally:
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.data.copy_(weight)


def test_weights_swapped_in_every_prediction_step(tmp_path):
    compare(tmp_path, kind=Averaged, metrics=False)
    options = {"preprocess_logits_for_metrics": PREPROCESS["argmax"]}
    with pytest.raises(RuntimeError, match="around evaluate"):
        run(tmp_path, llama, [FusedLossCallback()], Metrics(), kind=Averaged, options=options)


def test_preprocessing_changes_logits_in_place(tmp_path):
    def preprocess(logits, labels):
        logits[..., :3] = -1e4
        logits.div_(0.5)
        return logits

    # what Adam makes of other roundings is doubled, too
    options = {"preprocess_logits_for_metrics": preprocess}
    compare(tmp_path, options=options, rtol=1e-4, atol=4e-5)


def test_prediction_inside_a_callback(tmp_path):
    class Predict(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            rows = [
                {key: value for key, value in row.items() if key != "labels"} for row in examples(3)
            ]
            predictions.append(trainers[-1].predict(rows).predictions)

    predictions, trainers = [], []
    for callbacks in ([], [FusedLossCallback()]):
        options = arguments(tmp_path, max_steps=2)
        trainers.append(
            Trainer(llama(), options, train_dataset=examples(8), callbacks=[Predict(), *callbacks])
        )
        trainers[-1].train()
    assert len(predictions) == 4 and predictions[0].shape == (3, 24, V)
    for stock, fused in zip(predictions[:2], predictions[2:], strict=True):
        np.testing.assert_allclose(fused, stock, rtol=1e-4, atol=1e-5)
    assert callbacks[0].evaluation.materialised


# --- what is never lazy


def seq2seq_arguments(tmp_path, **changes):
    generation = {"predict_with_generate": True, "generation_max_length": 6}
    return arguments(tmp_path, kind=Seq2SeqTrainingArguments, **generation, **changes)


@pytest.fixture
def lazy_inputs(monkeypatch):
    """The shapes of the hidden states that heads made lazy logits of."""
    shapes = []

    def remember(input, *args):
        shapes.append(tuple(input.shape))
        return lazy_linear(input, *args)

    monkeypatch.setattr("fastft.loss.lazy.output_head.lazy_linear", remember)
    return shapes


def test_generation_in_the_evaluation_loop_is_stock(tmp_path, lazy_inputs):
    settings = {"kind": Seq2SeqTrainer, "made": seq2seq_arguments, "data": examples(8)}
    callback, _ = compare(tmp_path, t5, **settings)
    assert not callback.evaluation.materialised
    # losses alone
    assert lazy_inputs == [(4, 24, 32)] * 2 + ([(2, 24, 32)] + [(4, 24, 32)] * 2) * 2


def test_generation_in_a_callback_is_stock(tmp_path, lazy_inputs):
    class Generate(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.eval()
            generated.append(
                model.generate(examples(1)[0]["input_ids"][None], max_new_tokens=4, do_sample=False)
            )

    generated = []
    run(tmp_path, llama, [FusedLossCallback(), Generate()], None)
    count = len(lazy_inputs)
    run(tmp_path, llama, [Generate()], None)
    assert len(lazy_inputs) == count == 2 * EVALUATIONS + 2 and len(generated) == 4
    assert all(torch.equal(*pair) for pair in zip(generated[:2], generated[2:], strict=True))


class Exporter(Trainer):
    """Traces and exports the model in the middle of an evaluation."""

    exported = ()

    def prediction_step(self, model, inputs, *args, **kwargs):
        ids = examples(2)[0]["input_ids"][None]
        if not self.exported:
            wrapped = Logits(model)
            with torch.no_grad():
                self.exported = {
                    "traced": torch.jit.trace(wrapped, ids, check_trace=False),
                    "exported": torch.export.export(wrapped, (ids,)).module(),
                    "fx": make_fx(Last(model))(ids),
                }
        return super().prediction_step(model, inputs, *args, **kwargs)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


class Last(Logits):
    def forward(self, ids):
        return self.model.lm_head(self.model.model.embed_tokens(ids))


def test_tracing_and_export_in_the_evaluation_loop_are_stock(tmp_path):
    trainer = run(tmp_path, llama, [FusedLossCallback()], None, kind=Exporter)
    ids = examples(5)[4]["input_ids"][None]
    expected = Logits(trainer.model.eval())(ids)
    assert len(trainer.exported) == 3
    for name, exported in trainer.exported.items():
        found = exported(ids)
        assert type(found) is torch.Tensor, name
        assert found.shape == expected.shape  # its weights are those of the first evaluation


def test_evaluation_outside_train_is_stock(tmp_path, lazy_inputs):
    model, callback = llama(), FusedLossCallback()
    options = arguments(tmp_path, max_steps=1)
    trainer = Seen(
        model,
        options,
        train_dataset=examples(8),
        eval_dataset=examples(6),
        compute_metrics=Metrics(),
        callbacks=[callback],
    )
    trainer.evaluate()
    trainer.train()
    count = len(lazy_inputs)
    trainer.evaluate()
    trainer.predict(examples(3))
    assert set(trainer.types) == {torch.Tensor} and len(lazy_inputs) == count == 2
    assert callback.evaluation.fused == 0 and not callback.evaluation.materialised


def test_forward_passes_of_others_in_evaluation_mode_are_stock(tmp_path, lazy_inputs):
    class Compare(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.eval()
            row = {key: value[None] for key, value in examples(1)[0].items()}
            with torch.no_grad():
                kept.append(model(**row).logits)
            kept.append(model(**row).logits)

    kept = []
    run(tmp_path, llama, [FusedLossCallback(), Compare()], None)
    assert {type(logits) for logits in kept} == {torch.Tensor} and len(
        lazy_inputs
    ) == 2 * EVALUATIONS + 2


def test_the_context_manager_leaves_evaluation_stock():
    model = llama().eval()
    row = {key: value[None] for key, value in examples(1)[0].items()}
    with fused_loss(model) as report, torch.no_grad():
        assert type(model(**row).logits) is torch.Tensor
    assert report.fused == 0


def test_a_sharded_head_is_evaluated_as_stock():
    model = llama().eval()
    model.lm_head.weight.ds_id = 7  # as DeepSpeed marks the parameters that ZeRO-3 shards
    evaluation = Evaluation(lambda: True)
    attachment = Attachment(model, evaluation)
    with torch.no_grad():
        output = model(**{key: value[None] for key, value in examples(1)[0].items()})
    assert type(output.logits) is torch.Tensor and evaluation.report.fused == 0
    assert evaluation.report.skipped == ["the output head is sharded by ZeRO-3"]
    attachment.remove()


# --- memory


@pytest.mark.parametrize("name", [None, "argmax", "topk", "log-probabilities"])
def test_no_tensor_as_large_as_the_logits_in_an_evaluation(name, tmp_path):
    vocabulary, rows, length = 20_000, 8, 512
    tokens = torch.randint(3, vocabulary, (rows, length))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    small = {"hidden_size": 16, "intermediate_size": 16}
    model = llama(vocab_size=vocabulary, max_position_embeddings=length, **small)
    seen = []

    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            seen.append(watch.elements)

    options = arguments(
        tmp_path,
        max_steps=1,
        eval_on_start=True,
        per_device_eval_batch_size=rows,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
    )
    trainer = Trainer(
        model,
        options,
        train_dataset=[{key: value[:8] for key, value in row.items()} for row in data],
        eval_dataset=data,
        compute_metrics=Metrics() if name else None,
        preprocess_logits_for_metrics=PREPROCESS.get(name),
        callbacks=[FusedLossCallback(), Stop()],
    )
    with Watch() as watch:
        trainer.train()
    limit = rows * length * vocabulary / (4 if name else 8)
    # a chunk's part is larger here than at the vocabulary of a large model
    assert vocabulary * 16 <= seen[0] < limit


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(fused_loss_module.logger, "warning", said.append)
    return said


@pytest.mark.parametrize("batch_eval_metrics", [False, True])
def test_a_word_about_gigabytes_of_logits(batch_eval_metrics, tmp_path, warnings, monkeypatch):
    batch = 4 * 24 * V * 4
    monkeypatch.setattr(
        fused_loss_module, "_MANY_BYTES", batch if batch_eval_metrics else 2 * batch
    )
    changes = {"batch_eval_metrics": batch_eval_metrics}
    run(tmp_path, llama, [FusedLossCallback()], Metrics(), **changes)
    assert (
        len(warnings) == 1
        and "preprocess_logits_for_metrics" in warnings[0]
        and "0 MiB" in warnings[0]
    )
    monkeypatch.setattr(fused_loss_module, "_MANY_BYTES", 2 * batch + 1)
    run(tmp_path, llama, [FusedLossCallback()], Metrics(), **changes)
    assert len(warnings) == 1


def test_the_report_of_training_is_of_training_alone(tmp_path, warnings):
    callback = FusedLossCallback()
    run(tmp_path, llama, [callback], Metrics())
    assert (
        callback.report.fused == 2 and callback.evaluation.fused == 2 * EVALUATIONS and not warnings
    )
    assert not callback.report.materialised
    assert "transformers/trainer.py:" in "".join(callback.evaluation.materialised)


# --- padded by accelerate to the length of another process


def head(bias=True, dtype=torch.float32):
    x, weight = torch.randn(2, 5, 8, dtype=dtype), torch.randn(31, 8, dtype=dtype)
    return x, weight, torch.randn(31, dtype=dtype) if bias else None


BEFORE = {
    "as it is": lambda z: z,
    "softcap": lambda z: torch.tanh(z / 3) * 3,
    "cast": lambda z: z.float(),
    "shifted": lambda z: z[:, 1:],
    "log_softmax": lambda z: z.log_softmax(-1),
}
AFTER = {
    "argmax": lambda z: z.argmax(-1),
    "max": lambda z: z.max(-1)[0],
    "topk": lambda z: z.topk(3)[1],
    "log_softmax": lambda z: (
        z[:, :-1].log_softmax(-1).gather(-1, torch.full((2, z.shape[1] - 1, 1), 7))
    ),
    "cross_entropy": lambda z: nn.functional.cross_entropy(
        z.view(-1, 31), torch.arange(2 * z.shape[1]), reduction="none"
    ),
    "numbers": lambda z: z.clone().cpu() + 0,
    "columns": lambda z: z[..., [3, 5]],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", BEFORE)
def test_padded_logits(before, dtype):
    for index, (after, function) in enumerate(AFTER.items()):
        x, weight, bias = head(bias=bool(index % 2), dtype=dtype)
        evaluation = Evaluation(lambda: True)
        lazy = lazy_linear(x, weight, bias, evaluation.report, evaluation=evaluation)
        stock, logits = (BEFORE[before](z) for z in (nn.functional.linear(x, weight, bias), lazy))
        stock, logits = (pad_to(z.detach(), stock.shape[1] + 3) for z in (stock, logits))
        assert type(logits) is LazyLogits and logits.is_lazy
        torch.testing.assert_close(function(logits), function(stock))
        assert bool(evaluation.report.materialised) == (after in ("numbers", "columns"))


def pad_to(tensor, length):
    """As accelerate's `pad_across_processes` does it."""
    size = (tensor.shape[0], length, tensor.shape[2])
    padded = tensor.new_zeros(size) + -100
    padded[tuple(slice(0, old) for old in tensor.shape)] = tensor
    return padded


WRITES = {
    "numbers": lambda z: z.__setitem__((slice(None), slice(0, 5)), torch.ones(2, 5, 31)),
    "a number": lambda z: z.__setitem__((0, 0), 3.0),
    "twice": lambda z: [
        z.__setitem__((slice(None), slice(i, i + 5), slice(None)), logits_of(z)) for i in (0, 3)
    ],
    "in place": lambda z: z.add_(1.0).mul_(2.0),
    "a view": lambda z: z[:, 2:].fill_(4.0),
}


def logits_of(like):
    x, weight, bias = OPERANDS
    if type(like) is torch.Tensor:
        return nn.functional.linear(x, weight, bias)
    return lazy_linear(
        x, weight, bias, like._recipe.report, evaluation=like.recorded.head.origin.evaluation
    )


OPERANDS = head()


@pytest.mark.parametrize("name", WRITES)
def test_other_uses_of_zeros_like_logits_are_stock(name):
    x, weight, bias = OPERANDS
    evaluation = Evaluation(lambda: True)
    lazy = lazy_linear(x, weight, bias, evaluation.report, evaluation=evaluation)
    found, expected = (
        z.new_zeros((2, 9, 31)) for z in (lazy, nn.functional.linear(x, weight, bias))
    )
    assert type(found) is LazyLogits
    WRITES[name](found)
    WRITES[name](expected)
    torch.testing.assert_close(found.cpu() + 0, expected)
    assert (
        torch.equal(lazy.new_zeros(3), torch.zeros(3))
        and lazy.new_zeros((2, 31)).sum() == 0
        and lazy.is_lazy
    )
