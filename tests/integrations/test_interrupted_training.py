"""After an exception out of `train()` Trainer calls no callback: what ours have left on a model,
the next takes off.

The next training may have new callbacks of the same kind or of another, on the same Trainer or a
new one; the interrupted ones may still be held by somebody, or be gone.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.trainers import logged, quiet_arguments
from torch import nn
from transformers import Trainer, TrainerCallback

import fastft

V = 61
SIZES = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": V, "pad_token_id": 0}
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, V, (12, 9)).tolist()]
FIRST = {
    "fused loss": lambda: fastft.FusedLossCallback(verify=True),
    "packing": fastft.PackingCallback,
}
NEXT = {"fused loss": fastft.FusedLossCallback, "packing": fastft.PackingCallback}


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def made():
    """BLOOM has attention code of its own: packed batches get a block mask."""
    torch.manual_seed(2)
    config = transformers.BloomConfig(**{**SIZES, "hidden_size": SIZES["n_embd"]})
    config._attn_implementation = "eager"
    return transformers.BloomForCausalLM(config)


def trainer_of(tmp_path, model, callbacks, **options):
    batches = {"max_steps": 2, "per_device_train_batch_size": 2}
    return Trainer(
        model,
        quiet_arguments(tmp_path, **batches, seed=1, **options),
        train_dataset=ROWS,
        data_collator=fastft.PackingCollator(),
        callbacks=callbacks,
    )


def losses_of(trainer):
    trainer.train()
    return logged(trainer)


def traces(model):
    """Whatever callbacks leave on a model."""
    return (
        sorted(
            name
            for module in model.modules()
            for name in vars(module)
            if name in ("forward", "_loss_function")
        ),
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        model.config._attn_implementation,
    )


def interrupt(tmp_path, model, callback, **options):
    trainer = trainer_of(tmp_path, model, [callback, Stop()], **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """The losses of a training that follows none; packed batches are the same with either
    callback."""
    return losses_of(
        trainer_of(tmp_path_factory.mktemp("stock"), made(), [fastft.PackingCallback()])
    )


@pytest.mark.parametrize("held", [True, False], ids=["held", "gone"])
@pytest.mark.parametrize("then", NEXT)
@pytest.mark.parametrize("first", FIRST)
def test_a_new_callback_takes_off_what_an_interrupted_training_has_left(
    first, then, held, tmp_path, stock
):
    model = made()
    before = traces(model)
    stale = FIRST[first]()
    interrupt(tmp_path, model, stale)
    assert traces(model) != before
    if not held:
        del stale
        gc.collect()
        assert traces(model) == before
    callback = NEXT[then]()
    assert losses_of(trainer_of(tmp_path, model, [callback])) == pytest.approx(stock, rel=1e-6)
    assert traces(model) == before
    if then == "fused loss":
        assert (
            callback.report.fused >= 2
            and not callback.report.skipped
            and not callback.report.materialised
        )
    if held:
        stale.restore()
        assert traces(model) == before


def test_the_same_trainer_trains_again(tmp_path):
    model = made()
    callback = fastft.FusedLossCallback()
    before = traces(model)
    trainer = interrupt(tmp_path, model, callback)
    trainer.pop_callback(Stop)
    trainer.train()
    assert callback.report.fused >= 2 and traces(model) == before


def test_the_next_training_wraps_the_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = made()
    stale = fastft.FusedLossCallback()
    interrupt(tmp_path, model, stale)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"])
    )
    callback = fastft.FusedLossCallback()
    trainer_of(tmp_path, adapted, [callback]).train()
    assert callback.report.fused >= 2 and not callback.report.skipped
    assert "forward" not in vars(model.lm_head) and model.config._attn_implementation == "eager"


def test_both_callbacks_in_one_training_keep_what_they_have(tmp_path, stock):
    model = made()
    before = traces(model)
    callback = fastft.FusedLossCallback()
    losses = losses_of(trainer_of(tmp_path, model, [fastft.PackingCallback(), callback]))
    assert callback.report.fused >= 2 and not callback.report.skipped and traces(model) == before
    assert losses == pytest.approx(stock, rel=1e-6)


def test_the_loss_function_that_was_kept_from_the_compiler_is_given_back(tmp_path):
    class Compiled:
        n_gpu, torch_compile = 0, True

    model, loader = made(), None
    before = traces(model)
    first, second = fastft.FusedLossCallback(), fastft.FusedLossCallback()
    for callback, state in ((first, object()), (second, object())):
        callback.on_train_begin(Compiled, state, None, model=model, train_dataloader=loader)
        assert "_loss_function" in vars(model)
    second.on_train_end(Compiled, None, None)
    first.restore()
    assert traces(model) == before


def test_fused_loss_after_an_interrupted_training_leaves_a_stock_head(tmp_path):
    model = made()
    stale = fastft.FusedLossCallback()
    interrupt(tmp_path, model, stale)
    ids = torch.randint(3, V, (2, 9))
    with fastft.fused_loss(model) as report:
        model.train()(input_ids=ids, labels=ids).loss.backward()
    assert report.fused == 1 and not report.skipped and "forward" not in vars(model.lm_head)
    assert "another fused loss has taken the output head" in stale.report.skipped


def test_models_are_not_kept_alive(tmp_path):
    model = made()
    interrupt(tmp_path, model, fastft.FusedLossCallback())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, V)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x, target):
        return F.cross_entropy(self.head(x), target)


def test_an_exception_inside_fused_loss_leaves_nothing():
    model = Head()
    with pytest.raises(ZeroDivisionError), fastft.fused_loss(model):
        raise ZeroDivisionError
    assert "forward" not in vars(model.head)
