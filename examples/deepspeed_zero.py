"""DeepSpeed ZeRO-3 under Trainer, and one line: parameters, gradients and optimizer states are
sharded, the loss is fused at the gathered head, AdamW is fastft's.

torchrun --nproc-per-node 2 examples/deepspeed_zero.py

Without GPUs accelerate runs DeepSpeed in one process alone: DS_ACCELERATOR=cpu before torchrun, and
--nproc-per-node 1.
"""

import small_llama
import stdlib_text
import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import fastft

tokenizer, examples = stdlib_text.load(vocab_size=4096, max_tokens=256)
args = TrainingArguments(
    "out/deepspeed",
    per_device_train_batch_size=4,
    max_steps=10,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    deepspeed={
        "zero_optimization": {"stage": 3},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    },
)
torch.manual_seed(0)
model = small_llama.make(len(tokenizer))
trainer = Trainer(
    model=model,
    args=args,
    train_dataset=examples,
    data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads input_ids and labels
)
plugged = fastft.plug(trainer)
trainer.train()
if trainer.is_world_process_zero():
    print(f"fused losses: {plugged.report.fused}")
