"""What a Trainer with fastft's AdamW is tried on: a small model with biases, arguments whose every
value shows in the steps, random tokens."""

import torch

from support.trainers import quiet_arguments, tiny_llama


def biased_llama(dtype=torch.float32):
    """Two layers, with biases in the attention, which get no weight decay."""
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 32}
    return tiny_llama(64, seed=3, attention_bias=True, **sizes).to(dtype)


def arguments(folder, **changes):
    steps = {"per_device_train_batch_size": 2, "max_steps": 8, "warmup_steps": 2}
    adamw = {"learning_rate": 3e-3, "weight_decay": 0.1, "adam_beta2": 0.95, "max_grad_norm": 1.0}
    return quiet_arguments(folder, **{"optim": "adamw_torch_fused", **steps, **adamw, **changes})


def examples():
    tokens = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in tokens]
