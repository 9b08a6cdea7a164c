"""Rows of a batch that are cut between processes: losses of each part are fused as stock, and packs
are refused."""

from __future__ import annotations

import pytest
from support import cut_rows
from support.plugged import trainer_of
from support.trainers import Curve, quiet_arguments, tiny_llama
from torch.utils.data import DataLoader
from transformers import Trainer

import fastft
from fastft.integrations.packed_loader import packing_collator

slow = pytest.mark.slow


class Cut:
    """accelerate's configuration, of which nothing but the sizes is asked."""

    def __init__(self, **sizes):
        self.__dict__ |= {"tp_size": 1, "cp_size": 1, "sp_size": 1, **sizes}


@pytest.mark.way("context parallel", packing="refused")
@pytest.mark.way("sequence parallel (DeepSpeed)", packing="refused")
@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"sp_size": 2}])
def test_packs_are_refused_before_training(sizes, tmp_path, monkeypatch):
    """By the callbacks and by `plug`, which leaves the Trainer as it was."""
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr("fastft.foreign.engines._parallelism", lambda: Cut(**sizes))
    with pytest.raises(ValueError, match=r"packing=40: context parallelism.*train unpacked"):
        fastft.plug(trainer, packing=40)
    trainer.data_collator = fastft.PackingCollator()
    trainer.add_callback(fastft.FusedLossCallback())
    with pytest.raises(fastft.PackingLeakError, match="boundaries of packed sequences would be"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_collator_inside_the_loader_that_cuts_rows_is_found():
    class UlyssesSPDataLoaderAdapter:
        def __init__(self, dl):
            self.dl = dl

    collator = fastft.PackingCollator()
    loader = DataLoader([0], collate_fn=collator)
    assert packing_collator(UlyssesSPDataLoaderAdapter(loader)) is collator


def of_one_process(folder):
    """The curve of stock where nothing is cut."""
    args = quiet_arguments(
        folder,
        max_steps=cut_rows.STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        seed=3,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
    )
    curve, model = Curve(), tiny_llama(attn_implementation="sdpa")
    Trainer(model, args, train_dataset=cut_rows.examples(), callbacks=[curve]).train()
    return curve


@slow
@pytest.mark.way("sequence parallel (DeepSpeed)", loss="exact", optimizer="exact")
def test_losses_of_cut_rows_are_those_of_stock_and_of_one_process(tmp_path):
    pytest.importorskip("deepspeed")
    results = {}
    for way in ("stock", "fused"):
        (tmp_path / way).mkdir()
        results[way], output = cut_rows.run("sequence", way, tmp_path / way)
        assert len(results[way]) == cut_rows.PROCESSES, output
    alone = of_one_process(tmp_path / "alone")
    for stock, fused in zip(results["stock"], results["fused"], strict=True):
        assert fused["fused"] == 2 * cut_rows.STEPS
        for name in ("losses", "norms"):
            assert fused[name] == pytest.approx(stock[name], rel=1e-6)
        assert fused["losses"] == pytest.approx(alone.losses, rel=1e-6)


@slow
@pytest.mark.parametrize("way", ["packs", "plug packs"])
def test_every_process_refuses_packs_before_training(way, tmp_path):
    pytest.importorskip("deepspeed")
    found, output = cut_rows.run("sequence", way, tmp_path)
    assert len(found) == cut_rows.PROCESSES, output
    for result in found:
        assert "the boundaries of packed sequences would be lost" in result["error"]
        assert result["steps"] == 0
