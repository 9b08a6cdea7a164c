"""FSDP2 by torch's own `fully_shard`, on GPUs or on CPUs: parameters, gradients and AdamW's states
are sharded, and no process ever holds logits.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import small_llama
import stdlib_text
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastft

kind = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if kind == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
tokenizer, examples = stdlib_text.load(vocab_size=4096, max_tokens=256)
torch.manual_seed(0)
model = small_llama.make(len(tokenizer)).to(device)
mesh = init_device_mesh(kind, (world,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = fastft.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)

model.train()
with fastft.fused_loss(model) as report:
    for step in range(10):
        rows = examples[(step * world + rank) * 4 :][:4]
        batch = tokenizer.pad(
            [{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt"
        ).to(device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        if rank == 0:
            print(f"loss {mean.item():.3f}")
if rank == 0:
    print(f"fused losses: {report.fused}")
dist.destroy_process_group()
