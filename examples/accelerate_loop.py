"""The fused loss in a training loop of one's own, with Accelerate: a small Llama on random tokens,
on a CPU in seconds.

python examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import fastft

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=16_384,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
)
optimizer, _ = fastft.adamw(model, lr=1e-3)
tokens = torch.randint(0, 16_384, (8, 129)).repeat(8, 1)  # eight sentences to learn by heart
loader = torch.utils.data.DataLoader(tokens, batch_size=4, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

model.train()
with fastft.fused_loss(model) as report:
    for ids in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"loss {loss.item():.3f}")
accelerator.print(
    f"fused losses: {report.fused}, places that asked for logits: {report.materialised}"
)
