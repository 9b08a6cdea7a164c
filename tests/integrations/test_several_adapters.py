"""Several adapters on one model: chosen, added, merged and deleted in the middle of a training,
mixed in a batch, switched off as a reference; with fastft as with stock."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from support.trainers import logged, quiet_arguments, tiny_llama
from transformers import Trainer, TrainerCallback

import fastft

peft = pytest.importorskip("peft")

V, STEPS = 97, 4
SEVERAL = pytest.mark.way("several adapters", loss="exact", optimizer="exact")


def config(r=4, **options):
    targets = ["q_proj", "lm_head"]
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=r, target_modules=targets, init_lora_weights=False, **options
    )


def two_adapters(**options):
    """A model with the adapters "a" and "b", on the head too, of which "a" is active."""
    base = tiny_llama(V, pad_token_id=0)
    model = peft.get_peft_model(base, config(**options), adapter_name="a")
    model.add_adapter("b", config(r=2, **options))
    return model.train()


def rows(count=8, length=16):
    ids = torch.randint(3, V, (count, length), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


class At(TrainerCallback):
    """Does something to the model after a step."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.change(model)


def merged_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def deleted(model):
    model.set_adapter("b")
    model.delete_adapter("a")


def added(model):
    torch.manual_seed(8)
    model.add_adapter("c", config(r=3))


def averaged(model):
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "soup", combination_type="svd")
    model.set_adapter("b")


CHANGES = {
    "another is chosen": lambda model: model.set_adapter("b"),
    "both are chosen": lambda model: model.base_model.set_adapter(["a", "b"]),
    "merged and unmerged": merged_and_back,
    "one is deleted": deleted,
    "one is added": added,
    "a soup is made": averaged,
}


def trained(model, folder, ours, change=None, held=("a", "b")):
    """Stock, or with fastft's loss and AdamW, which hold the adapters `held`."""
    args = quiet_arguments(
        folder, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, seed=3
    )
    model.base_model.set_adapter(list(held))
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = fastft.AdamW if ours else torch.optim.AdamW
    optimizer = adamw(params, lr=args.learning_rate, weight_decay=0.1)
    model.set_adapter("a")
    callbacks = [fastft.FusedLossCallback()] if ours else []
    callbacks += [At(2, change)] if change else []
    trainer = Trainer(
        model, args, train_dataset=rows(), callbacks=callbacks, optimizers=(optimizer, None)
    )
    trainer.train()
    return logged(trainer, "loss", "grad_norm"), callbacks[0].report if ours else None


@SEVERAL
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "another is chosen" else pytest.mark.slow)
        for name in CHANGES
    ],
)
def test_adapters_that_change_in_the_middle_of_a_training(name, tmp_path):
    models = [two_adapters(), two_adapters()]
    stock, _ = trained(models[0], tmp_path, False, CHANGES[name])
    fused, report = trained(models[1], tmp_path, True, CHANGES[name])
    assert fused == pytest.approx(stock, rel=2e-6) and len(fused) == 2 * STEPS
    assert (report.fused, report.materialised, report.skipped) == (STEPS, [], [])
    weights = [dict(model.named_parameters()) for model in models]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)


def test_an_adapter_that_the_optimizer_lacks_is_told_in_the_middle_of_a_training(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = two_adapters()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    stock, _ = trained(two_adapters(), tmp_path, False, CHANGES["another is chosen"], ["a"])
    fused, _ = trained(model, tmp_path, True, CHANGES["another is chosen"], ["a"])
    assert fused == pytest.approx(stock, rel=2e-6)
    moved = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert len(moved) == 4 and all(".a." in key for key in moved)
    said = [r.getMessage() for r in caplog.records if "optimizer_check" in r.name]
    assert len(set(said)) == 1 and "the 4 parameters with a gradient are not in the" in said[0]


def against_the_base(model, ids):
    """The loss of a preference, whose reference is the model without its adapters."""
    with torch.no_grad(), model.disable_adapter():
        reference = model(input_ids=ids).logits
    taken = ids[:, 1:, None]
    own, theirs = (
        logits[:, :-1].log_softmax(-1).gather(-1, taken).sum((1, 2))
        for logits in (model(input_ids=ids).logits, reference)
    )
    return -torch.nn.functional.logsigmoid((own - theirs)[0] - (own - theirs)[1])


@SEVERAL
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_the_model_without_its_adapters_as_reference(options):
    ids = torch.randint(3, V, (2, 16), generator=torch.Generator().manual_seed(6))
    results = []
    for ours in (False, True):
        model = two_adapters(**options)
        with fastft.fused_loss(model) if ours else contextlib.nullcontext() as report:
            loss = against_the_base(model, ids)
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for actual, expected in zip(results[1], results[0], strict=True):
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    assert report.fused and not report.materialised


@SEVERAL
def test_a_batch_of_several_adapters_is_that_of_stock_while_fused():
    model = two_adapters().eval()
    ids = torch.randint(3, V, (3, 16), generator=torch.Generator().manual_seed(6))
    names = ["a", "__base__", "b"]
    with torch.no_grad():
        expected = model(input_ids=ids, adapter_names=names).logits
        with fastft.fused_loss(model):
            actual = model(input_ids=ids, adapter_names=names).logits
    assert type(actual) is torch.Tensor and torch.equal(actual, expected)


@SEVERAL
@pytest.mark.slow
def test_a_plugged_training_of_dora_on_the_head_beside_another_adapter(tmp_path):
    losses = []
    for ours in (False, True):
        model = two_adapters(use_dora=True)
        model.set_adapter("a")
        args = quiet_arguments(
            tmp_path, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, seed=3
        )
        trainer = Trainer(model, args, train_dataset=rows())
        if ours:
            fastft.plug(trainer)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=2e-6) and len(losses[0]) == STEPS
