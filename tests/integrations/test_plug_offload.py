"""`plug(trainer, offload=...)`: the resident training to the bit, a line that says what lies where,
and a sentence where it cannot be."""

from __future__ import annotations

import pytest
import torch
from support.plugged import trainer_of

import fastft
from fastft.foreign import engines


def ended(trainer, **options):
    """The Trainer behind a training, and its line."""
    trainer.model.bfloat16()
    plugged = fastft.plug(trainer, **options)
    trainer.train()
    return trainer, plugged.lines["optimizer"]


def assert_same_bits(one, other):
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert one.state.log_history[0]["grad_norm"] == other.state.log_history[0]["grad_norm"]


@pytest.mark.parametrize(
    ("offload", "words"),
    [
        pytest.param(
            "states",
            "AdamW exact bf16, states on the host: ",
            marks=pytest.mark.way('`offload="states"`', optimizer="exact"),
            id="states",
        ),
        pytest.param(
            "gradients",
            "states and gradients on the host: ",
            marks=pytest.mark.way('`offload="gradients"`', optimizer="exact"),
            id="gradients",
        ),
        pytest.param(
            "auto",
            "chosen by offload='auto': None, on a CPU the host's memory is the device's",
            id="auto",
        ),
    ],
)
def test_a_tier_has_the_bits_of_the_resident_training(tmp_path, offload, words):
    given = {"gradient_accumulation_steps": 2}
    stock, _ = ended(trainer_of(tmp_path, **given))
    ours, line = ended(trainer_of(tmp_path, **given), offload=offload)
    assert_same_bits(stock, ours)
    assert words in line and line.endswith("clipping inside")
    assert offload == "auto" or " MiB, beside " in line  # of a small model no 0.0 GiB


def test_before_the_optimizer_is_made_the_line_says_what_will_be(tmp_path):
    plugged = fastft.plug(trainer_of(tmp_path), offload="auto")
    assert "on the host what does not fit the device" in plugged.lines["optimizer"]


@pytest.mark.way("`release_gradients=True`", optimizer="exact")
def test_gradients_used_up_in_backward_have_the_bits_of_the_resident_training(tmp_path):
    stock, _ = ended(trainer_of(tmp_path, max_grad_norm=0.0))
    trainer = trainer_of(tmp_path, max_grad_norm=0.0)
    ours, line = ended(trainer, release_gradients=True)
    for mine, theirs in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert "each gradient used up in backward, no clipping" in line


@pytest.mark.parametrize(
    ("optim", "moments"), [("paged_adamw_32bit", "fp32"), ("paged_adamw_8bit", "8bit")]
)
def test_a_paged_optimizer_gets_states_on_the_host(tmp_path, optim, moments):
    ours, line = ended(trainer_of(tmp_path, optim=optim))
    optimizer = engines.inner_optimizer(ours.optimizer)
    assert (optimizer.offload, optimizer.defaults["moments"]) == ("states", moments)
    assert "states on the host" in line


def test_a_paged_optimizer_may_have_another_tier(tmp_path):
    trainer = trainer_of(tmp_path, optim="paged_adamw_32bit")
    fastft.plug(trainer, offload=None)
    trainer.create_optimizer()
    assert engines.inner_optimizer(trainer.optimizer).offload is None


REFUSED = {
    "an unknown tier": ({}, {"offload": "disk"}, "offload must be one of None, 'states'"),
    "release and clipping": ({}, {"release_gradients": True}, "Set max_grad_norm=0"),
    "release and micro-steps": (
        {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2},
        {"release_gradients": True},
        "gradient_accumulation_steps=2 of TrainingArguments",
    ),
    "release and a tier": (
        {"max_grad_norm": 0.0},
        {"release_gradients": True, "offload": "auto"},
        "Leave out one of them",
    ),
    "a captured step": ({}, {"offload": "auto", "capturable": True}, "capturable=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_a_sentence(tmp_path, case):
    arguments, options, words = REFUSED[case]
    trainer = trainer_of(tmp_path, **arguments)
    with pytest.raises(ValueError, match=words):
        fastft.plug(trainer, **options)
    assert trainer.optimizer_cls_and_kwargs is None


@pytest.mark.parametrize(
    ("value", "given", "words"),
    [("fp16", True, "GradScaler"), ("_n_gpu", 2, "DDP and DataParallel")],
)
@pytest.mark.parametrize("way", ["adamw", "adamw_spec", "plug"])
def test_gradients_that_somebody_else_needs_are_not_taken_away(tmp_path, way, value, given, words):
    trainer = trainer_of(tmp_path)
    setattr(trainer.args, value, given)
    make = {
        "adamw": lambda: fastft.adamw(trainer.model, trainer.args, offload="gradients"),
        "adamw_spec": lambda: fastft.adamw_spec(trainer.args, offload="gradients"),
        "plug": lambda: fastft.plug(trainer, offload="gradients"),
    }
    with pytest.raises(ValueError, match=f"{words}.*offload='states'"):
        make[way]()


@pytest.mark.way("DDP, gradients on the host", optimizer="refused")
def test_ddp_keeps_its_gradients(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match="DDP and DataParallel add up"):
        fastft.adamw(trainer.model, trainer.args, offload="gradients")
    assert fastft.adamw(trainer.model, trainer.args, offload="states")


def known_batch(tmp_path, packing=None, **options):
    trainer = trainer_of(tmp_path, options=options)
    fastft.plug(trainer, offload="auto", packing=packing)
    return trainer.optimizer_cls_and_kwargs[1]._origin.training()["batch"]


def test_the_longest_row_is_known(tmp_path):
    assert known_batch(tmp_path) == (4, 13, ("loss",))
    assert known_batch(tmp_path, packing=64) == (1, 64, ("loss", "packing"))


def test_of_a_stream_no_row_is_known(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from [{"input_ids": [3, 4, 5]}] * 64

    assert known_batch(tmp_path, train_dataset=Stream()) is None
