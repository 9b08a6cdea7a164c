"""A loop of one's own with Accelerator trains as without fastft, with its loss and AdamW: the way
in which transformers' `no_trainer` examples are written."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.trainers import quiet_arguments, tiny_llama
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler

import fastft
from fastft.integrations.accelerator_loop import AcceleratorLoop
from fastft.integrations.trainings import at_prepare

ROWS = torch.arange(24 * 9).remainder(97).view(24, 9)
BOTH = ("loss", "optimizer")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def optimizer_of(model, kind=torch.optim.AdamW, **options):
    decays = [param for param in model.parameters() if param.ndim > 1]
    others = [param for param in model.parameters() if param.ndim < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return kind(groups, lr=1e-2, **options)


def trained(folder, together=True, resumed=False, precision="no", **options):
    """Losses, norms, rates and evaluations of a loop with accumulation, clipping and a state that
    is saved and loaded half-way."""
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True, mixed_precision=precision)
    model = tiny_llama()
    optimizer = optimizer_of(model, **options)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=12)
    loader = DataLoader(ROWS, batch_size=4)
    if together:
        model, optimizer, loader, scheduler = accelerator.prepare(
            model, optimizer, loader, scheduler
        )
    else:
        model = accelerator.prepare(model)
        optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
        loader = accelerator.prepare(loader)
    curve = []
    for epoch in range(4):
        model.train()
        for ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    curve += [float(norm), *scheduler.get_last_lr()]
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            curve.append(loss.item())
        model.eval()
        for ids in loader:
            with torch.no_grad():
                outputs = model(input_ids=ids, labels=ids)
            predictions = accelerator.gather_for_metrics(outputs.logits.argmax(-1))
            curve += [outputs.loss.item(), float((predictions == ids).float().mean())]
        if epoch == 1:
            accelerator.save_state(folder)
        if epoch == 2:
            accelerator.load_state(folder)
    return curve, model, optimizer, scheduler


@pytest.mark.way("a loop with Accelerate", loss="exact", optimizer="exact")
@pytest.mark.parametrize("together", [True, False], ids=["one prepare", "one for each"])
def test_it_trains_as_without(tmp_path, together):
    stock = trained(str(tmp_path / "stock"), together)[0]
    AcceleratorState._reset_state(reset_partial_state=True)
    loop = AcceleratorLoop(BOTH)
    with at_prepare(loop.before, loop.after):
        curve, model, optimizer, scheduler = trained(str(tmp_path / "fast"), together)
    torch.testing.assert_close(curve, stock, rtol=5e-5, atol=1e-7)
    assert loop.report.fused == 24
    assert loop.report.materialised == []
    assert loop.lines == {"loss": "fused, 24 times", "optimizer": "AdamW"}
    assert type(optimizer.optimizer) is fastft.AdamW is type(scheduler.scheduler.optimizer)
    loop.restore()
    assert "forward" not in vars(model.lm_head)


def test_in_mixed_precision(tmp_path):
    stock = trained(str(tmp_path / "stock"), precision="bf16")[0]
    AcceleratorState._reset_state(reset_partial_state=True)
    loop = AcceleratorLoop(BOTH)
    with at_prepare(loop.before, loop.after):
        curve = trained(str(tmp_path / "fast"), precision="bf16")[0]
    losses = [index for index in range(len(stock)) if stock[index] > 2]
    for index in losses:
        assert curve[index] == pytest.approx(stock[index], rel=2e-2)
    assert loop.report.fused == 24


@pytest.mark.parametrize("piece", BOTH)
def test_one_piece_alone(tmp_path, piece):
    loop = AcceleratorLoop([piece])
    with at_prepare(loop.before, loop.after):
        _, model, optimizer, _ = trained(str(tmp_path))
    assert (type(optimizer.optimizer) is fastft.AdamW) == (piece == "optimizer")
    assert ("forward" in vars(model.lm_head)) == (piece == "loss")
    assert list(loop.lines) == [piece]
    loop.restore()


def test_another_optimizer_stays_with_a_word(tmp_path):
    loop = AcceleratorLoop(BOTH)
    with at_prepare(loop.before, loop.after):
        _, _, optimizer, _ = trained(str(tmp_path), kind=torch.optim.NAdam)
    assert type(optimizer.optimizer) is torch.optim.NAdam
    assert loop.lines["optimizer"] == "left alone: NAdam is not torch.optim.AdamW"


def test_a_model_without_a_vocabulary_stays_with_a_word():
    loop = AcceleratorLoop(BOTH)
    model = nn.Linear(3, 2)
    with at_prepare(loop.before, loop.after):
        Accelerator(cpu=True).prepare(model, torch.optim.AdamW(model.parameters()))
    assert loop.lines["loss"].startswith("left alone: Linear has no output head")


def test_what_prepare_was_not_given_is_said_at_the_end():
    loop = AcceleratorLoop((*BOTH, "packing"))
    with at_prepare(loop.before, loop.after):
        Accelerator(cpu=True).prepare(tiny_llama())
    assert list(loop.lines) == ["loss"]
    loop.restore()
    assert loop.lines["optimizer"] == "left alone: prepare was not given an optimizer"
    assert loop.lines["packing"] == "left alone: prepare was not given a Trainer"


def test_nothing_of_a_loop_that_is_over_is_kept():
    loop = AcceleratorLoop(BOTH)
    with at_prepare(loop.before, loop.after):
        accelerator, model = Accelerator(cpu=True), tiny_llama()
        accelerator.prepare(model, optimizer_of(model))
    kept = weakref.ref(model)
    accelerator.free_memory()
    del model, accelerator
    gc.collect()
    assert kept() is None


def test_prepare_is_stock_again_after_an_error():
    stock = vars(Accelerator)["prepare"]

    def fails(*_):
        raise KeyError

    with pytest.raises(KeyError), at_prepare(fails, fails):
        Accelerator(cpu=True).prepare(nn.Linear(3, 2))
    assert vars(Accelerator)["prepare"] is stock


def test_a_trainer_s_own_prepare_is_not_a_loop(tmp_path):
    seen = []
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer = Trainer(tiny_llama(), quiet_arguments(tmp_path, max_steps=1), train_dataset=rows)
    with at_prepare(lambda *given: seen.append(given), lambda *given: seen.append(given)):
        trainer.train()
        trainer.evaluate(rows)
    assert not seen
