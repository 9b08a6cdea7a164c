"""Tiny models and examples of every task, and what each example gives when it goes through the
model alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

import fastft
from fastft.integrations.implementations import attention_configs

V = 61
SIZES = [5, 1, 9, 4, 3, 7, 2, 8, 6, 4, 10]
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
DROPLESS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {
    "vocab_size": V,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
MODELS = {
    "causal_lm": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "token_classification": (
        "BertForTokenClassification",
        "BertConfig",
        {**SMALL, **DROPLESS, "num_labels": 5},
    ),
    "masked_lm": ("BertForMaskedLM", "BertConfig", {**SMALL, **DROPLESS}),
    "sequence_classification": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**SMALL, "num_labels": 3},
    ),
    "seq2seq": ("T5ForConditionalGeneration", "T5Config", T5),
}
OPTIONS = {"seq2seq": {"decoder_start_token_id": 0}}


def model_for(task: str, attention: str = "fastft") -> Any:
    """The model of a task, in evaluation mode; one of `sequence_classification` pools segments."""
    fastft.register_attention()
    name, config, sizes = MODELS[task]
    torch.manual_seed(0)
    made = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    made.set_attn_implementation(attention)
    for config in attention_configs(made):  # older versions leave an encoder's copy alone
        config._attn_implementation = attention
    if task == "sequence_classification" and attention == "fastft":
        fastft.pool_segments(made)
    return made


def examples_for(task: str) -> list[dict[str, Any]]:
    """Eleven examples of different lengths, with labels."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for index, size in enumerate(SIZES):
        ids = torch.randint(2, V, (size,), generator=draw).tolist()
        answer = torch.randint(2, V, (SIZES[-1 - index],), generator=draw).tolist()
        labels = {
            "token_classification": [(place * 3 + index) % 5 for place in range(size)],
            "sequence_classification": index % 3,
            "seq2seq": answer,
        }.get(task, ids)
        made.append({"input_ids": ids, "labels": labels})
    return made


def alone(task: str) -> list[Tensor]:
    """The logits of each example by the stock model, one at a time: (n, V), or (C,) of a whole
    example."""
    model = model_for(task, "sdpa")
    with torch.no_grad():
        outputs = [
            model(
                input_ids=torch.tensor([one["input_ids"]]),
                **({"labels": torch.tensor([one["labels"]])} if task == "seq2seq" else {}),
            )
            for one in examples_for(task)
        ]
    return [output.logits[0] for output in outputs]


def pad(task: str, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What a padding collator of transformers makes of the examples."""

    def filled(key: str, value: int) -> Tensor:
        width = max(len(row[key]) for row in rows)
        return torch.tensor([[*row[key], *[value] * (width - len(row[key]))] for row in rows])

    batch = {"input_ids": filled("input_ids", 0)}
    batch["attention_mask"] = filled("input_ids", -1).ne(-1).long()
    single = task == "sequence_classification"
    return batch | {
        "labels": torch.tensor([row["labels"] for row in rows])
        if single
        else filled("labels", -100)
    }


def trainer_for(
    task: str, folder: str, collator: Any, size: int, *, attention: str = "fastft", **options: Any
) -> Any:
    """A trainer whose evaluations have batches of `size`."""
    # Seq2SeqTrainer keeps repeated examples by itself ("we don't want to drop samples"), with any
    # collator
    generates = options.get("predict_with_generate", False)
    kind = transformers.Seq2SeqTrainer if generates else transformers.Trainer
    arguments = (
        transformers.Seq2SeqTrainingArguments if generates else transformers.TrainingArguments
    )
    quiet = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    callbacks = options.pop("callbacks", None)
    args = arguments(folder, **quiet, per_device_eval_batch_size=size, **options)
    return kind(
        model=model_for(task, attention), args=args, data_collator=collator, callbacks=callbacks
    )


def logits_of(prediction: Any) -> Any:
    """The logits among a model's outputs."""
    return (
        prediction.predictions[0]
        if isinstance(prediction.predictions, tuple)
        else prediction.predictions
    )


def assert_rows(task: str, prediction: Any, order: list[int] | None = None) -> None:
    """Raises unless the rows of a prediction are the examples, each once, in `order`; by default
    the dataset's."""
    expected, examples = alone(task), examples_for(task)
    rows, labels = torch.tensor(logits_of(prediction)), torch.tensor(prediction.label_ids)
    order = list(range(len(examples))) if order is None else order
    assert len(rows) == len(labels) == len(order)
    for row, label, index in zip(rows, labels, order, strict=True):
        if task == "sequence_classification":
            torch.testing.assert_close(row, expected[index], rtol=1e-4, atol=1e-5)
            assert int(label) == examples[index]["labels"]
            continue
        size = len(expected[index])
        torch.testing.assert_close(row[:size], expected[index], rtol=1e-4, atol=1e-5)
        ignored = 1 if task == "causal_lm" else 0  # the first has no token before it
        assert label[ignored:size].tolist() == examples[index]["labels"][ignored:]
        assert set(label[size:].tolist()) <= {-100}


def assert_tokens(task: str, prediction: Any) -> None:
    """Raises unless the labelled tokens of a prediction are those of all examples, each once, in
    any order."""
    logits, labels = torch.tensor(logits_of(prediction)), torch.tensor(prediction.label_ids)
    shift = 1 if task == "causal_lm" else 0
    width = labels.shape[1]
    counted = labels[:, shift:] != -100
    found = [
        *zip(
            labels[:, shift:][counted].tolist(),
            logits[:, : width - shift][counted].tolist(),
            strict=True,
        )
    ]
    expected = []
    for one, rows in zip(examples_for(task), alone(task), strict=True):
        expected += zip(one["labels"][shift:], rows[: len(rows) - shift].tolist(), strict=True)
    assert len(found) == len(expected)
    for (label, row), (other, alike) in zip(_sorted(found), _sorted(expected), strict=True):
        assert label == other
        torch.testing.assert_close(torch.tensor(row), torch.tensor(alike), rtol=1e-4, atol=1e-5)


def _sorted(pairs: list[tuple[int, list[float]]]) -> list[tuple[int, list[float]]]:
    return sorted(pairs, key=lambda pair: (pair[0], round(sum(pair[1]), 3)))
