"""Full fine-tuning of bf16 weights with everything else on the host: AdamW's states, and each
gradient as backward makes it. Of 8 to 14 bytes a parameter 2 stay on a GPU, and the weights have
the bits that they have without `offload`.

python examples/offload.py
"""

import small_llama
import stdlib_text
import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import fastft

tokenizer, examples = stdlib_text.load(vocab_size=4096, max_tokens=256)


def train(offload):
    torch.manual_seed(0)
    model = small_llama.make(len(tokenizer)).bfloat16()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            "out/offload",
            gradient_accumulation_steps=2,
            max_steps=5,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads input_ids and labels
    )
    plugged = fastft.plug(trainer, packing=512, moments="8bit", seed=0, offload=offload)
    trainer.train()
    print(plugged.lines["optimizer"])
    return model.state_dict()


resident = train(None)
for tier in ("states", "gradients", "overlap"):
    weights = train(tier)
    equal = all(torch.equal(weights[name], resident[name]) for name in resident)
    print(f"{tier}: {'the same bits' if equal else 'OTHER BITS'}")
