"""plug on TRL's trainers: their own fused heads are named, their own packing is left to them, and
the optimizer is fastft's, also where they take none."""

from __future__ import annotations

import datasets
import pytest
from support.plugged import STEPS, V, llama, tokenizer
from support.trainers import logged, quiet_arguments

import fastft

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of TRL
TEXTS = [" ".join(str(3 + (i * 7 + j) % (V - 3)) for j in range(4 + i % 7)) for i in range(16)]
PAIRS = [
    {"prompt": text, "chosen": text, "rejected": TEXTS[-1 - i]} for i, text in enumerate(TEXTS)
]
SINGLE = [{"prompt": text, "completion": text, "label": i % 2 == 0} for i, text in enumerate(TEXTS)]
PROMPTS = [{"prompt": text} for text in TEXTS]
MEMBERS = {
    "SFT": ([{"text": text} for text in TEXTS], {}),
    "SFT, label smoothing": ([{"text": text} for text in TEXTS], {"label_smoothing_factor": 0.1}),
    "SFT, packing": ([{"text": text} for text in TEXTS], {"packing": True, "max_length": 32}),
    "DPO": (PAIRS, {}),
    "KTO": (SINGLE, {}),
    "Reward": (PAIRS, {}),
    "GRPO": (PROMPTS, {"num_generations": 2, "max_completion_length": 4}),
}


def reward(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


def trainer_of(folder, member, **changes):
    rows, given = MEMBERS[member]
    name = member.partition(",")[0]
    kind, arguments = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    usual = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    args = quiet_arguments(
        folder, arguments, **{**usual, "bf16": False, "seed": 7, **given, **changes}
    )
    model = llama()
    if name == "Reward":
        from transformers import LlamaForSequenceClassification

        model = LlamaForSequenceClassification(llama(num_labels=1).config)
    options = {
        "GRPO": {"reward_funcs": reward},
        "DPO": {"ref_model": llama()},
        "KTO": {"ref_model": llama()},
    }.get(name, {})
    return kind(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        **options,
    )


@pytest.mark.parametrize("member", MEMBERS)
def test_trains_as_stock(tmp_path, member):
    stock = trainer_of(tmp_path, member)
    stock.train()
    ours = trainer_of(tmp_path, member)
    plug = fastft.plug(ours, packing="collate")
    ours.train()
    assert logged(ours) == pytest.approx(logged(stock), rel=2e-4, abs=1e-6)
    assert len(logged(ours)) == STEPS
    assert plug.lines["optimizer"].startswith("AdamW")
    assert isinstance(ours.optimizer.optimizer, fastft.AdamW)
    if member == "SFT, label smoothing":
        assert plug.lines["loss"] == "fused at lm_head"
    elif member == "SFT":
        assert "TRL's trainers compute their loss" in plug.lines["loss"]
    packing = plug.lines["packing"]
    if member == "SFT, packing":
        assert packing == "left alone: TRL packs already"
    elif member.startswith("SFT"):
        assert packing.startswith("the same batches, no padding instead of")
    else:
        assert packing.startswith(f"left alone: {member}Trainer makes batches of its own")


def test_packs_of_sft(tmp_path):
    trainer = trainer_of(tmp_path, "SFT", max_steps=-1, num_train_epochs=1)
    plug = fastft.plug(trainer, packing=40)
    trainer.train()
    assert plug.lines["packing"].startswith("40 tokens, one pack a batch")
    least = -(-sum(map(len, trainer.train_dataset["input_ids"])) // 40)
    assert least <= trainer.state.global_step <= least + 1
