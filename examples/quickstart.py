"""fastft in forty lines: a small Llama learns Python's own standard library on a CPU, in about a
minute.

python examples/quickstart.py
"""

import stdlib_text
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastft

tokenizer, examples = stdlib_text.load(vocab_size=16_384, max_tokens=512)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
)
args = TrainingArguments(
    "out/quickstart",
    per_device_train_batch_size=1,  # packs of about 1024 tokens
    max_steps=40,
    learning_rate=1e-3,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
)
callback = fastft.FusedLossCallback()
trainer = Trainer(
    model=model,
    args=args,
    train_dataset=fastft.pack(examples, max_tokens=1024),
    data_collator=fastft.PackingCollator(),
    optimizers=fastft.adamw(model, args),
    callbacks=[callback],
)
trainer.train()
model.save_pretrained("out/quickstart/model")
print(f"fused losses: {callback.report.fused}")
