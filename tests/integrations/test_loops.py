"""Loops without Trainer: plain torch, and Lightning where it is installed."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.trainers import tiny_llama

import fastft

ROWS = torch.arange(24 * 9).remainder(97).view(24, 9)


def pieces(model, fast):
    """The loss's context and the optimizer of a loop."""
    if fast:
        return fastft.fused_loss(model), fastft.AdamW(model.parameters(), lr=1e-2)
    return contextlib.nullcontext(), torch.optim.AdamW(model.parameters(), lr=1e-2)


def plain(fast):
    model = tiny_llama()
    loss_of, optimizer = pieces(model, fast)
    curve = []
    with loss_of as report:
        for ids in ROWS.split(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
    return curve, report


@pytest.mark.way("a loop of plain torch", loss="exact", optimizer="exact")
def test_a_loop_of_plain_torch():
    stock, _ = plain(False)
    ours, report = plain(True)
    assert len(stock) == 6 and ours == pytest.approx(stock, rel=1e-6)
    assert report.fused == 6 and not report.materialised


@pytest.mark.way("a loop of plain torch", packing="exact")
def test_a_loop_of_plain_torch_over_packs():
    """The recipe of docs/packing.md: the mean over all targets, whichever row they are in."""
    fastft.register_attention()
    examples = [{"input_ids": row[: 3 + index % 7].tolist()} for index, row in enumerate(ROWS)]
    model, twin = tiny_llama(attn_implementation="fastft"), tiny_llama()
    batches = torch.utils.data.DataLoader(
        fastft.pack(examples, max_tokens=32), collate_fn=fastft.PackingCollator()
    )
    losses, targets = [], sum(len(example["input_ids"]) - 1 for example in examples)
    with fastft.packed_attention(model), fastft.fused_loss(model):
        for batch in batches:
            count = int((batch["labels"] != -100).sum())
            losses.append(model(**batch, num_items_in_batch=count).loss.item() * count)
    alone = [
        twin(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
        for ids in (torch.tensor([example["input_ids"]]) for example in examples)
    ]
    assert sum(losses) / targets == pytest.approx(sum(alone) / targets, rel=1e-6)


def scaled(fast):
    model = tiny_llama()
    loss_of, optimizer = pieces(model, fast)
    scaler, curve = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    with loss_of as report:
        for ids in ROWS.split(4):
            with torch.autocast("cpu", torch.float16):
                loss = model(input_ids=ids, labels=ids).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            curve.append(loss.item())
    return curve, report


@pytest.mark.way("fp16 autocast with a GradScaler", loss="works", optimizer="works")
def test_a_loop_in_fp16_with_a_scaler():
    stock, _ = scaled(False)
    ours, report = scaled(True)
    assert ours == pytest.approx(stock, rel=2e-3) and stock[-1] < stock[0]
    assert report.fused == 6 and not report.materialised


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning
@pytest.mark.way("Lightning", loss="exact", optimizer="exact")
def test_lightning_with_accumulation_and_clipping(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, fast):
            super().__init__()
            self.model, self.curve = tiny_llama(), []
            self.loss_of, self.made = pieces(self.model, fast)

        def configure_optimizers(self):
            return self.made

        def on_train_start(self):
            self.report = self.loss_of.__enter__()

        def on_train_end(self):
            self.loss_of.__exit__(None, None, None)

        def training_step(self, ids, index):
            loss = self.model(input_ids=ids, labels=ids).loss
            self.curve.append(loss.item())
            return loss

    def trained(fast):
        module = Module(fast)
        loop = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            accumulate_grad_batches=2,
            default_root_dir=tmp_path,
        )
        loop.fit(module, torch.utils.data.DataLoader(ROWS, batch_size=4))
        return module.curve, module.report

    stock, _ = trained(False)
    ours, report = trained(True)
    assert len(stock) == 6 and ours == pytest.approx(stock, rel=1e-6)
    assert report.fused == 6 and not report.materialised
