"""Trainer with gradients that backward frees: to the bit what the resident optimizer trains, or a
sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.adamw_trainers import arguments, biased_llama, examples
from support.recorded_trainings import recorded
from support.trainers import logged
from support.versions import checkpoint_activations

import fastft
from fastft.optim.offload.absent import AbsentGradient

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


class Course(transformers.TrainerCallback):
    """Looks at gradients, and may throw those of some steps away, as a guard against NaN does."""

    def __init__(self, skipped: tuple[int, ...] = ()) -> None:
        self.skipped, self.absent = skipped, set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.absent |= {isinstance(param.grad, AbsentGradient) for param in model.parameters()}
        if state.global_step in self.skipped:
            model.zero_grad()


def trainer_of(
    folder: Any,
    way: str,
    options: dict[str, Any],
    course: transformers.TrainerCallback,
    checkpointing: bool | None = None,
    **changes: Any,
) -> Any:
    """`checkpointing`: whether it is reentrant; None for none."""
    torch.manual_seed(0)
    usual = {"per_device_train_batch_size": 2, "max_steps": 4, "max_grad_norm": 0.1, "bf16": True}
    args = arguments(folder, **{**usual, **changes})
    model = biased_llama(torch.bfloat16)
    if checkpointing is not None:
        checkpoint_activations(model, use_reentrant=checkpointing)
    given = {"optimizers": fastft.adamw(model, args, **options)} if way == "by hand" else {}
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=examples(), callbacks=[course], **given
    )
    if way == "plug":
        fastft.plug(trainer, loss=False, **options)
    else:
        fastft.fuse_clipping(trainer)
    return trainer


def outcome(trainer: Any) -> list[Any]:
    params = [param.detach() for param in trainer.model.parameters()]
    return [logged(trainer, "grad_norm"), logged(trainer, "loss"), *params]


def assert_same(left: list[Any], right: list[Any]) -> None:
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


TRAININGS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "clipping": ({}, ()),
    "no clipping": ({"max_grad_norm": 0.0}, ()),
    "accumulation": ({"gradient_accumulation_steps": 4, "max_steps": 2}, ()),
    "epochs that do not divide": (
        {
            "gradient_accumulation_steps": 3,
            "per_device_train_batch_size": 4,
            "max_steps": -1,
            "num_train_epochs": 2,
        },
        (),
    ),
    "checkpointing": ({"checkpointing": False}, ()),
    "reentrant checkpointing": ({"checkpointing": True, "gradient_accumulation_steps": 2}, ()),
    "skipped steps": ({"gradient_accumulation_steps": 2}, (1, 2)),
}


@pytest.mark.way('`offload="gradients"`', optimizer="exact")
@pytest.mark.parametrize(
    ("what", "way"), [*((what, "plug") for what in TRAININGS), ("accumulation", "by hand")]
)
def test_gradients_on_the_host_train_as_resident_ones(what, way, tmp_path):
    changes, skipped = TRAININGS[what]
    found = []
    for offload in ("gradients", None):
        course = Course(skipped)
        trainer = trainer_of(tmp_path, way, {"offload": offload}, course, **changes)
        trainer.train()
        assert course.absent == {offload is not None}
        found.append(outcome(trainer))
    assert any(norm > 0.1 for norm in found[0][0])
    assert_same(*found)


@pytest.mark.way("`release_gradients=True`", optimizer="exact")
@pytest.mark.parametrize("way", ["plug", "by hand"])
def test_released_gradients_train_as_resident_ones(way, tmp_path):
    found = []
    for released in (True, False):
        options, course = {"release_gradients": released}, Course()
        trainer = trainer_of(tmp_path, way, options, course, max_grad_norm=0.0)
        trainer.train()
        assert course.absent == {released}
        found.append(outcome(trainer))
    assert_same(*found)


@pytest.mark.parametrize(("first", "second"), [("gradients", None), (None, "gradients")])
def test_a_training_goes_on_with_another_offload(first, second, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = trainer_of(tmp_path / "whole", "plug", {}, Course(), **steps)
    whole.train()
    begun = trainer_of(tmp_path, "plug", {"offload": first}, Course(), **steps)
    begun.train()
    resumed = trainer_of(tmp_path, "plug", {"offload": second}, Course(), **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(outcome(resumed)[2:], outcome(whole)[2:])


def test_two_trainings_of_a_trainer(tmp_path):
    found = []
    for offload in ("gradients", None):
        trainer = trainer_of(tmp_path, "plug", {"offload": offload}, Course())
        trainer.train()
        trainer.train()
        found.append(outcome(trainer))
    assert_same(*found)


# where nobody takes the clipping over


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("options", [{"offload": "gradients"}, {"release_gradients": True}])
@pytest.mark.parametrize("checked", [True, False])
def test_clipping_by_trainer_is_a_sentence(checked, options, max_grad_norm, tmp_path):
    args, model = arguments(tmp_path, max_grad_norm=max_grad_norm), biased_llama(torch.bfloat16)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = fastft.AdamW(model.parameters(), **options)
    trainer = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=examples(),
        optimizers=(optimizer, None),
        callbacks=[fastft.FusedLossCallback()] if checked else [],
    )
    with pytest.raises((ValueError, RuntimeError), match=r"fuse_clipping|max_grad_norm=1\.0"):
        trainer.train()
    if checked or "offload" in options:
        for param, value in zip(model.parameters(), before, strict=True):
            assert torch.equal(param, value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 of TrainingArguments"),
        (
            {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=2 of TrainingArguments",
        ),
    ],
)
@pytest.mark.parametrize("way", ["adamw", "adamw_spec", "plug"])
def test_what_released_gradients_cannot_do_is_told_at_the_door(way, changes, sentence, tmp_path):
    args, model = arguments(tmp_path, **changes), biased_llama(torch.bfloat16)
    doors = {
        "adamw": lambda: fastft.adamw(model, args, release_gradients=True),
        "adamw_spec": lambda: fastft.adamw_spec(args, release_gradients=True),
        "plug": lambda: fastft.plug(
            transformers.Trainer(model=model, args=args), release_gradients=True
        ),
    }
    with pytest.raises(ValueError, match=sentence):
        doors[way]()


@pytest.mark.parametrize("options", [{"offload": "gradients"}, {"release_gradients": True}])
def test_fp16_is_told_at_the_door(options, tmp_path):
    args = arguments(tmp_path, max_grad_norm=0.0)
    args.fp16 = True
    with pytest.raises(ValueError, match="fp16=True scales the loss"):
        fastft.adamw(biased_llama(), args, **options)


@pytest.mark.parametrize("options", [{"offload": "gradients"}, {"release_gradients": True}])
def test_compare_records_gradients_that_are_not_there(options, tmp_path):
    settings = {"max_grad_norm": 0.1} if "offload" in options else {"max_grad_norm": 0.0}
    settings |= {} if "offload" in options else {"gradient_accumulation_steps": 1}
    ours, stock = (
        recorded(tmp_path, "fast", steps=2, options=given, **settings) for given in (options, {})
    )
    for step, expected in zip(ours.steps, stock.steps, strict=True):
        assert step.grad_norm == expected.grad_norm and step.loss == expected.loss
        assert step.gradients == pytest.approx(expected.gradients, rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"offload": "gradients"},
            marks=pytest.mark.way("accelerate loop, gradients on the host", optimizer="exact"),
        ),
        pytest.param(
            {"offload": "states"},
            marks=pytest.mark.way("accelerate loop, states on the host", optimizer="exact"),
        ),
        {"release_gradients": True},
    ],
)
def test_a_loop_with_accelerate(options):
    micro = 2 if "offload" in options else 1

    def weights(**options):
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=micro, cpu=True)
        model = biased_llama(torch.bfloat16)
        optimizer = fastft.AdamW(model.parameters(), lr=1e-2, **options)
        model, optimizer = accelerator.prepare(model, optimizer)
        for example in examples()[:6]:
            with accelerator.accumulate(model):
                row = {name: tokens[None] for name, tokens in example.items()}
                accelerator.backward(model(**row).loss)
                optimizer.step()
                optimizer.zero_grad()
        return [param.detach() for param in model.parameters()]

    clips = {"max_grad_norm": 0.1} if micro > 1 else {}
    assert_same(weights(**options, **clips), weights(**clips))


def test_the_clipping_of_accelerate_is_a_sentence():
    accelerator, model = accelerate.Accelerator(cpu=True), biased_llama(torch.bfloat16)
    optimizer = fastft.AdamW(model.parameters(), offload="gradients")
    model, optimizer = accelerator.prepare(model, optimizer)
    row = {name: tokens[None] for name, tokens in examples()[0].items()}
    accelerator.backward(model(**row).loss)
    with pytest.raises(RuntimeError, match="fuse_clipping"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
