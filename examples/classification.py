"""Sequence classification on packed batches: is a function of the standard library a method?
Examples lie one after another, each gets its own prediction, and none sees another.

python examples/classification.py
"""

import stdlib_text
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import fastft

tokenizer, functions = stdlib_text.load(vocab_size=4096, max_tokens=128)
texts = tokenizer.batch_decode([function["input_ids"] for function in functions])
examples = [
    {"input_ids": function["input_ids"], "labels": int("self" in text.partition(")")[0])}
    for function, text in zip(functions, texts, strict=True)
]
model = BertForSequenceClassification(
    BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=2,
    )
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        "out/classification",
        per_device_train_batch_size=16,
        max_steps=40,
        learning_rate=2e-3,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=examples[64:],
    eval_dataset=examples[:64],
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
)
plugged = fastft.plug(trainer, packing="collate")  # the same batches, without their padding
trainer.train()
print(plugged)
print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.2f}")
