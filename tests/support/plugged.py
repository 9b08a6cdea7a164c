"""Trainings of every task with transformers' own collators, stock and plugged."""

from __future__ import annotations

import tokenizers
import torch
import transformers
from transformers import PreTrainedTokenizerFast, Trainer

import fastft
from support.trainers import logged, quiet_arguments, tiny_llama

V, STEPS = 61, 2
PAD, EOS, MASK = 0, 1, 2
SIZES = [5, 12, 9, 4, 3, 7, 2, 8, 6, 4, 10, 6, 11, 3, 5, 8]
ENCODER = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
    "num_labels": 5,
    "pad_token_id": PAD,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}


def tokenizer(pad="[PAD]", side="right"):
    """One word for each number; padding is a token of its own, or the end token."""
    words = {"[PAD]": PAD, "[EOS]": EOS, "[MASK]": MASK} | {str(i): i for i in range(3, V)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[MASK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": pad, "eos_token": "[EOS]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=model, padding_side=side, **special)


def examples(labels=None, seed=1):
    """Texts of different lengths that end with the end token, and labels of a kind."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for index, size in enumerate(SIZES):
        ids = [*torch.randint(3, V, (size,), generator=draw).tolist(), EOS]
        answer = torch.randint(3, V, (SIZES[-1 - index],), generator=draw).tolist()
        kinds = {
            "tokens": [-100 if place < size // 2 else token for place, token in enumerate(ids)],
            "classes": [(place * 3 + index) % 5 for place in range(size + 1)],
            "class": index % 3,
            "answer": [*answer, EOS],
        }
        made.append({"input_ids": ids} | ({} if labels is None else {"labels": kinds[labels]}))
    return made


def encoder(kind, **config):
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}")(
        getattr(transformers, f"{kind.partition('For')[0]}Config")(**{**ENCODER, **config})
    )


def t5():
    torch.manual_seed(0)
    ids = {"decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": EOS}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=V, **T5, **ids))


def llama(**config):
    return tiny_llama(V, initializer_range=0.2, pad_token_id=PAD, **config)


# a model, the labels of its examples, and what collates them: (model, tokenizer) -> collator
TASKS = {
    "causal": (
        llama,
        None,
        lambda model: transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False),
    ),
    "causal, the end token is the padding token": (
        llama,
        None,
        lambda model: transformers.DataCollatorForLanguageModeling(tokenizer("[EOS]"), mlm=False),
    ),
    "causal, to a multiple of 8": (
        llama,
        None,
        lambda model: transformers.DataCollatorForLanguageModeling(
            tokenizer(), mlm=False, pad_to_multiple_of=8
        ),
    ),
    "causal, labels of its own": (
        llama,
        "tokens",
        lambda model: transformers.DataCollatorForSeq2Seq(tokenizer()),
    ),
    "causal, flattened already": (
        llama,
        None,
        lambda model: transformers.DataCollatorWithFlattening(),
    ),
    "masked": (
        lambda: encoder("BertForMaskedLM"),
        None,
        lambda model: transformers.DataCollatorForLanguageModeling(
            tokenizer(), mlm_probability=0.4, mask_replace_prob=0.6, random_replace_prob=0.3
        ),
    ),
    "masked, positions from 1 on": (
        lambda: encoder("RobertaForMaskedLM"),
        None,
        lambda model: transformers.DataCollatorForLanguageModeling(
            tokenizer(), mlm_probability=0.4
        ),
    ),
    "token classes": (
        lambda: encoder("BertForTokenClassification"),
        "classes",
        lambda model: transformers.DataCollatorForTokenClassification(tokenizer()),
    ),
    "classes": (
        lambda: encoder("BertForSequenceClassification", num_labels=3),
        "class",
        lambda model: transformers.DataCollatorWithPadding(tokenizer()),
    ),
    "answers": (
        t5,
        "answer",
        lambda model: transformers.DataCollatorForSeq2Seq(tokenizer(), model=model),
    ),
    "answers, without the model": (
        t5,
        "answer",
        lambda model: transformers.DataCollatorForSeq2Seq(tokenizer()),
    ),
}


def trainer_of(
    folder,
    task="causal",
    *,
    model=None,
    kind=Trainer,
    arguments=transformers.TrainingArguments,
    options=None,
    **changes,
):
    """A Trainer of a task and a new model, or this one; `options` are Trainer's, `changes` those of
    its arguments."""
    make, labels, collate = TASKS[task]
    model = make() if model is None else model
    usual = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    usual |= {"weight_decay": 0.1, "seed": 7, "max_grad_norm": 0.5, "optim": "adamw_torch"}
    given = {"train_dataset": examples(labels), "data_collator": collate(model)}
    return kind(
        model,
        quiet_arguments(folder, arguments, **{**usual, **changes}),
        **{**given, "eval_dataset": examples(labels, seed=2)[:6], **(options or {})},
    )


def curves(trainer):
    """What a training and an evaluation have logged."""
    trainer.train()
    return logged(trainer, "loss"), logged(trainer, "grad_norm"), logged(trainer, "eval_loss")


def stock_and_plugged(folder, task="causal", *, plugs=None, **given):
    """The curves of the same training without and with `plug`; the Plugged; both Trainers."""
    stock = trainer_of(folder, task, **given)  # which sets the seed
    expected = curves(stock)
    ours = trainer_of(folder, task, **given)
    plugged = fastft.plug(ours, **(plugs or {}))
    return expected, curves(ours), plugged, (stock, ours)
