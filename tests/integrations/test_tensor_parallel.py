"""Trainer on a model that transformers' plan spreads over two, three and four processes: losses,
norms and weights of stock."""

from __future__ import annotations

import contextlib
import os
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.trainers import Curve, quiet_arguments, tiny_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]
SIZES = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}
STEPS = 3
USUAL = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 3}
USUAL |= {"lr_scheduler_type": "constant", "weight_decay": 0.3, "max_grad_norm": 0.5}
USUAL |= {"adam_epsilon": 1e-5}  # else the rounding of a gradient that is almost nothing is a step


def examples(vocab):
    tokens = torch.randint(0, vocab, (32, 12), generator=torch.Generator().manual_seed(5))
    labels = tokens.masked_fill(
        torch.rand(32, 12, generator=torch.Generator().manual_seed(6)) < 0.3, -100
    )
    return [{"input_ids": row, "labels": kept} for row, kept in zip(tokens, labels, strict=True)]


def trained(model, vocab, folder, prepare=None, **changes):
    """The curve and the whole weights after a training, and what `prepare` of its Trainer made."""
    from transformers import Trainer

    curve = Curve()
    args = quiet_arguments(folder, **{**USUAL, **changes})
    trainer = Trainer(model, args, train_dataset=examples(vocab), callbacks=[curve])
    prepared = None if prepare is None else prepare(trainer)
    trainer.train()
    weights = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in trainer.model.named_parameters()
    }
    return curve, weights, prepared


@contextlib.contextmanager
def as_ranks():
    """This process as one of torchrun's, whose processors accelerate takes for GPUs."""
    from support.engines import real_engines

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    real_engines()
    folder = [tempfile.mkdtemp() if rank == "0" else None]
    dist.broadcast_object_list(folder)
    yield Path(folder[0])


def spread(saved, **sizes):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        saved, distributed_config=DistributedConfig(**sizes)
    )


def check(vocab, tied=False, sizes=None, **changes):
    import fastft

    with as_ranks() as folder:
        sizes = sizes or {"tp_size": dist.get_world_size()}
        # made by all: what is imported for it takes its time
        model = tiny_llama(vocab, tie_word_embeddings=tied, initializer_range=0.2, **SIZES)
        if dist.get_rank() == 0:
            model.save_pretrained(folder / "saved")
        dist.barrier()
        results = []
        for prepare in (None, fastft.plug):
            model = spread(folder / "saved", **sizes)
            given = {"use_cpu": False, **changes}
            results.append(trained(model, vocab, folder / "out", prepare, **given))
    (stock, expected, _), (ours, actual, plugged) = results
    # label smoothing reads the logits twice a step
    assert plugged.report.fused >= STEPS and not plugged.report.materialised, plugged.report
    assert "AdamW" in plugged.lines["optimizer"]
    assert ours.losses == pytest.approx(stock.losses, rel=1e-6)
    assert ours.norms == pytest.approx(stock.norms, rel=1e-5)
    for name, weight in actual.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=2e-6)


SPREAD = {
    "vocabulary that divides evenly": partial(check, 96),
    "vocabulary that does not": partial(check, 211),
    "tied": partial(check, 211, tied=True),
    "label smoothing": partial(check, 211, label_smoothing_factor=0.1),
}
SHARDED = {"FSDP2": partial(check, 96, sizes={"fsdp_size": 2, "tp_size": 2})}


def on(count, case):
    """The case, which another number of processes leaves out."""
    return lambda: case() if (dist.get_world_size() == 4) == (count == 4) else None


CASES = {name: on(2, case) for name, case in SPREAD.items()}
CASES |= {name: on(4, case) for name, case in SHARDED.items()}


@pytest.mark.way("tensor parallel", loss="exact", optimizer="exact")
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", SPREAD)
def test_trainer_on_a_plan_of_transformers(case, world, tmp_path_factory):
    outcomes = processes.run(__name__, world, tmp_path_factory)
    assert not any(outcomes[case]), "\n".join(outcomes[case])


@pytest.mark.way("FSDP2 with tensor parallel", loss="exact", optimizer="exact")
@pytest.mark.parametrize("case", SHARDED)
def test_trainer_on_a_plan_whose_parts_are_sharded_too(case, tmp_path_factory):
    outcomes = processes.run(__name__, 4, tmp_path_factory)
    assert not any(outcomes[case]), "\n".join(outcomes[case])
