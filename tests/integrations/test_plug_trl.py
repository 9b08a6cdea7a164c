"""plug on TRL's trainers: their log-probabilities are fused, their own packing is left to them, and
the optimizer is fastft's, also where they take none."""

from __future__ import annotations

import pytest
import transformers
from support.plugged import llama
from support.trainers import logged

import fastft

trl = pytest.importorskip("trl", minversion="1.16")
from support.trl_trainers import (  # noqa: E402
    CHATS,
    SIZES,
    STEPS,
    TEXTS,
    chat_tokenizer,
    lora,
    policy,
    train,
    trainer_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of TRL
PLAIN = {"rows": [{"text": text} for text in TEXTS]}
MEMBERS = {
    "SFT": PLAIN,
    "SFT, label smoothing": {**PLAIN, "label_smoothing_factor": 0.1},
    "SFT, packing": {**PLAIN, "packing": True, "max_length": 32},
    "SFT, PEFT": {**PLAIN, "options": lora},
    "SFT, the assistant's turns": {
        "rows": CHATS,
        "options": chat_tokenizer,
        "assistant_only_loss": True,
    },
    "DPO": {},
    "KTO": {},
    "GRPO": {},
    "RLOO": {},
    "Reward": {},
}
# what others make of batches is left to them
PACKED = ("SFT", "SFT, label smoothing", "SFT, PEFT", "SFT, the assistant's turns")
# of the table, where the name is not that of its row
ROWS = {"SFT, packing": None, "SFT, the assistant's turns": "SFT (TRL)"}


def ways(column, words):
    """The members, with the marks of those that are rows of the table."""
    for name in MEMBERS:
        kind, _, rest = name.partition(", ")
        row = ROWS.get(name, f"{kind} (TRL), {rest}" if rest else f"{kind} (TRL)")
        marks = [] if row is None else [pytest.mark.way(row, **{column: words(name)})]
        yield pytest.param(name, marks=marks)


def reward_model():
    config = llama(**SIZES, num_key_value_heads=2, num_labels=1).config
    return transformers.LlamaForSequenceClassification(config)


def trainers(folder, member, **more):
    changes = {**MEMBERS[member], **more}
    options = changes.pop("options", lambda folder: {})
    for _ in range(2):
        model = reward_model() if member == "Reward" else policy(folder)
        name = member.partition(",")[0]
        yield trainer_of(folder, name, model=model, options=options(folder), **changes)


@pytest.mark.parametrize(
    "member", ways("packing", lambda name: "exact" if name in PACKED else "stock")
)
def test_the_losses_of_stock_and_lines_that_say_what_was_done(tmp_path, member):
    stock, ours = trainers(tmp_path, member)
    plug = fastft.plug(ours, packing="collate", optimizer=False)
    expected, actual = train(stock), train(ours)
    assert [entry.keys() for entry in actual] == [entry.keys() for entry in expected]
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    assert len(logged(ours)) == STEPS
    loss, packing = plug.lines["loss"], plug.lines["packing"]
    if member == "Reward":
        assert loss.startswith("left alone: LlamaForSequenceClassification has no output head")
    else:
        assert loss == "fused at lm_head"
    if member == "SFT, packing":
        assert packing == "left alone: TRL packs already"
    elif member.startswith("SFT"):
        assert packing.startswith("the same batches, no padding instead of")
    else:
        assert packing.startswith(f"left alone: {member}Trainer makes batches of its own")


def test_the_assistant_s_turns_alone_are_learnt(tmp_path):
    """Fewer labels than tokens: the packed batches have the mask, too."""
    trainer = trainer_of(
        tmp_path, "SFT", rows=CHATS, options=chat_tokenizer(tmp_path), assistant_only_loss=True
    )
    (first, *_) = trainer.train_dataset
    learnt = [label != -100 for label in first["labels"]]
    assert 0 < sum(learnt) < len(learnt)
    plug = fastft.plug(trainer, packing="collate", optimizer=False)
    train(trainer)
    assert plug.report.fused == STEPS and not plug.report.materialised


@pytest.mark.parametrize("member", ways("optimizer", lambda name: "exact"))
def test_the_optimizer_is_fastfts(tmp_path, member):
    stock, ours = trainers(tmp_path, member, optim="adamw_torch", learning_rate=1e-2)
    plug = fastft.plug(ours, loss=False)
    train(stock), train(ours)
    assert isinstance(ours.optimizer.optimizer, fastft.AdamW)
    assert plug.lines["optimizer"].startswith("AdamW")
    assert logged(ours) == pytest.approx(logged(stock), rel=1e-6, abs=1e-6)


def test_packs_of_sft(tmp_path):
    trainer = trainer_of(tmp_path, "SFT", **PLAIN, max_steps=-1, num_train_epochs=1)
    plug = fastft.plug(trainer, packing=40)
    trainer.train()
    assert plug.lines["packing"].startswith("40 tokens, one pack a batch")
    least = -(-sum(map(len, trainer.train_dataset["input_ids"])) // 40)
    assert least <= trainer.state.global_step <= least + 1
