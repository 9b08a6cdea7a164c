"""DPO with TRL, unchanged, and one line: a small Llama is taught to prefer the body that a function
of the standard library has to that of another function.

python examples/dpo.py
"""

import copy

import datasets
import small_llama
import stdlib_text
from trl import DPOConfig, DPOTrainer

import fastft

tokenizer, functions = stdlib_text.load(vocab_size=4096, max_tokens=128)


def prompt_and_body(function):
    tokens, cut = function["input_ids"], function["labels"].count(stdlib_text.IGNORED)
    return tokenizer.decode(tokens[:cut]), tokenizer.decode(tokens[cut:])


pairs = []
for function, other in zip(functions[:64], functions[64:128], strict=True):
    prompt, body = prompt_and_body(function)
    pairs.append({"prompt": prompt, "chosen": body, "rejected": prompt_and_body(other)[1]})
model = small_llama.make(len(tokenizer), hidden_size=64)
trainer = DPOTrainer(
    model=model,
    ref_model=copy.deepcopy(model),
    args=DPOConfig(
        "out/dpo",
        per_device_train_batch_size=4,
        max_steps=10,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        bf16=False,  # TRL's default is True
    ),
    train_dataset=datasets.Dataset.from_list(pairs),
    processing_class=tokenizer,
)
plugged = fastft.plug(trainer)
trainer.train()
print(plugged)
