"""Trainings in processes whose address space ends at thirteen levels: they train what they would
train anyway, or say that memory is at its end; and where more is given then, the next one is right.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource

import pytest
import torch
import transformers
from support.trainers import logged, quiet_arguments, tiny_llama
from transformers import Trainer

import fastft

LEVELS = [round(2 ** (number / 2), 1) for number in range(2, 15)]  # MiB above what there is
V, LENGTH = 4_000, 128
WAYS = {
    "plug": ({}, torch.float32),
    "packs and 8 bits": ({"packing": LENGTH, "moments": "8bit", "seed": 1}, torch.bfloat16),
    "overlapped": ({"offload": "overlap"}, torch.bfloat16),
    "linear layers": ({"linear": True}, torch.float32),
}


def trained(folder, way):
    options, dtype = WAYS[way]
    rows = torch.randint(3, V, (16, LENGTH), generator=torch.Generator().manual_seed(1))
    model = tiny_llama(V, hidden_size=256, max_position_embeddings=LENGTH).to(dtype)
    trainer = Trainer(
        model,
        quiet_arguments(folder, max_steps=2, per_device_train_batch_size=8, learning_rate=1e-2),
        train_dataset=[{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows],
        data_collator=transformers.default_data_collator,
    )
    fastft.plug(trainer, **options)
    trainer.train()
    sums = [float(param.detach().double().abs().sum()) for param in model.parameters()]
    return logged(trainer, "loss", "grad_norm"), sums


def limited(folder, way, level, answers):
    """In a process of its own: what came of a training, and of another one without the limit."""
    torch.set_num_threads(1)
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    end = pages * resource.getpagesize() + int(level * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (end, hard))
    try:
        outcome = trained(folder, way)
    except (MemoryError, RuntimeError, OSError) as error:
        outcome = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    gc.collect()
    answers.put((outcome, trained(folder, way)))


@pytest.mark.slow
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.parametrize("way", WAYS)
def test_a_training_is_right_or_says_that_memory_is_at_its_end(tmp_path, way):
    context = multiprocessing.get_context("fork")
    expected, short = trained(tmp_path, way), 0
    for level in LEVELS:
        answers = context.SimpleQueue()
        child = context.Process(target=limited, args=(tmp_path, way, level, answers))
        child.start()
        child.join(300)
        assert child.exitcode == 0
        outcome, again = answers.get()
        if isinstance(outcome, str):
            short += 1
            assert any(word in outcome for word in ("memory", "alloc", "MemoryError")), outcome
        else:
            assert outcome == expected, level
        assert again == expected, level
    assert 0 < short
