"""LoRA on every linear layer and on the output head: the head's two products are fused as well, and
only adapters are trained.

python examples/lora.py
"""

import peft
import small_llama
import stdlib_text
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import fastft

tokenizer, examples = stdlib_text.load(vocab_size=4096, max_tokens=256)
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets)
model = peft.get_peft_model(small_llama.make(len(tokenizer)), config)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        "out/lora",
        max_steps=10,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=examples,
    data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads input_ids and labels
)
plugged = fastft.plug(trainer, packing=512)
trainer.train()
model.save_pretrained("out/lora/adapter")  # PEFT's own files
print(f"fused losses: {plugged.report.fused}")
