"""TRL's trainers, small, and what they should log: with plain logits in the place of TRL's fused
head."""

from __future__ import annotations

import functools
import types
from contextlib import nullcontext

import datasets
import peft
import pytest
import torch
import trl
from transformers import LlamaForCausalLM
from trl.trainer.utils import FusedCausalLMOutput

import fastft
from fastft.foreign.models import base_model
from support.plugged import V, llama, tokenizer
from support.trainers import quiet_arguments

STEPS = 3
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
WORDS = [[str(3 + (i * 7 + j) % (V - 3)) for j in range(6 + i % 7)] for i in range(12)]
TEXTS = [" ".join(words) for words in WORDS]
PAIRS = [
    {"prompt": text, "chosen": f" {TEXTS[i - 1]}", "rejected": f" {TEXTS[-1 - i]}"}
    for i, text in enumerate(TEXTS)
]
SINGLE = [
    {"prompt": text, "completion": f" {TEXTS[i - 1]}", "label": i % 2 == 0}
    for i, text in enumerate(TEXTS)
]
SPLIT = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
# two questions and answers each
CHATS = [
    {
        "messages": [
            {"role": role, "content": TEXTS[i - turn]}
            for turn, role in enumerate(["user", "assistant"] * 2)
        ]
    }
    for i in range(len(TEXTS))
]
# tells which words are the assistant's, its end of turn included
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}3 {% generation %}"
    "{{ message['content'] }} [EOS]{% endgeneration %} {% else %}4 {{ message['content'] }} [EOS] "
    "{% endif %}{% endfor %}"
)
GENERATED = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "temperature": 0.7}
# a trainer's examples and arguments
MEMBERS = {
    "SFT": (SPLIT, {"max_length": 64}),
    "DPO": (PAIRS, {}),
    "KTO": (SINGLE, {}),
    "GRPO": ([{"prompt": text} for text in TEXTS], GENERATED),
    "RLOO": ([{"prompt": text} for text in TEXTS], GENERATED),
    "Reward": (PAIRS, {}),
}


def reward(completions, **kwargs):
    """Differs from completion to completion, so that advantages are not zero."""
    return [float(sum(map(len, text.split())) % 5 + len(set(text))) for text in completions]


def policy(folder, **config):
    """A language model of 61 words that is sure of some of them, loaded from a folder in `folder`,
    from which TRL loads a reference model."""
    place = folder / "policy"
    llama(**{**SIZES, "num_key_value_heads": 2, **config}).save_pretrained(place)
    return LlamaForCausalLM.from_pretrained(place).train()


def lora(folder):
    """The option of a trainer that adds adapters, which change the model from the beginning."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    return {"peft_config": config}


def chat_tokenizer(folder):
    """The option of a trainer that makes it read CHATS."""
    reader = tokenizer()
    reader.chat_template = CHAT_TEMPLATE
    return {"processing_class": reader}


def trainer_of(folder, name, *, rows=None, model=None, options=None, **changes):
    """`trl.{name}Trainer` on a CPU, of MEMBERS.

    `rows`: other examples. `options`: of the trainer itself. `changes`: of its arguments.
    """
    examples, given = MEMBERS[name]
    # Adam makes steps of noise, where gradients of chosen and rejected cancel out
    usual = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.05}
    usual |= {"optim": "sgd", "disable_tqdm": True}
    arguments = quiet_arguments(
        folder,
        getattr(trl, f"{name}Config"),
        **{**usual, "bf16": False, "seed": 7, **given, **changes},
    )
    more = {"reward_funcs": reward} if name in ("GRPO", "RLOO") else {}
    return getattr(trl, f"{name}Trainer")(
        model=model or policy(folder),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows or examples),
        **{"processing_class": tokenizer(), **more, **(options or {})},
    )


def plain_log_probs(logits, labels):
    """All that TRL's fused head returns, of logits that exist."""
    counted = labels != -100
    log_p = logits.log_softmax(-1)
    picked = labels.clamp(min=0)[..., None]
    found = {
        "log_probs": log_p.gather(-1, picked)[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": log_p.exp().square().sum(-1).log().detach(),
        "mean_logits": logits.mean(-1).detach(),
        "is_top1": log_p.argmax(-1) == picked[..., 0],
    }
    found = {name: value.masked_fill(~counted, 0) for name, value in found.items()}
    return {**found, "label_mask": counted}


def put_plain_head(model, temperature=1.0, fp32=False):
    """Takes TRL's fused head off `model`, and answers from the logits that its own code makes."""
    del model.forward
    stock = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return stock(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        outputs = stock(*args, **{**kwargs, "use_cache": False})
        logits = outputs.logits.float() / temperature
        if shifted is None:
            logits, shifted = logits[:, :-1], labels[:, 1:]
        found = plain_log_probs(logits, shifted)
        items = found["label_mask"].sum().clamp(min=1) if items is None else items
        return FusedCausalLMOutput(
            loss=-found["log_probs"].sum() / items,
            aux_loss=getattr(outputs, "aux_loss", None),
            **found,
        )

    model.forward = types.MethodType(forward, model)


def with_plain_heads(trainer):
    """The trainer, whose models build their logits."""
    for model in {base_model(m) for m in (trainer.model, getattr(trainer, "ref_model", None)) if m}:
        put_plain_head(model, getattr(trainer, "temperature", 1.0))
    return trainer


def curves(trainer):
    """What a trainer has logged, one dict a step, without what a clock or fastft says."""
    clocks = ("runtime", "per_second", "step_time", "total_flos", "epoch", "fastft/")
    entries = [
        {key: value for key, value in entry.items() if not any(map(key.count, clocks))}
        for entry in trainer.state.log_history
    ]
    return [entry for entry in entries if any("loss" in key for key in entry)]


def train(trainer, inside=None):
    """Trains within the context `inside`, and returns the curves; the same draws each time."""
    with inside or nullcontext(), torch.random.fork_rng():
        torch.manual_seed(3)
        trainer.train()
    return curves(trainer)


# An estimate of KL subtracts log-probabilities of whole texts, about -50 here: of those, fp32 has
# steps of 3.8e-6, also in plain logits.
STEP_OF_SUMS = 4e-6


def compare(stock, ours, callback=None, rel=1e-6, abs=1e-6):
    """Trains two trainers, the first with plain logits, and compares all that they log.

    Returns:
        The callback of the second, and the curves.
    """
    expected = train(with_plain_heads(stock))
    callback = callback or fastft.FusedLossCallback()
    models = [m for m in (ours.model, getattr(ours, "ref_model", None)) if m is not None]
    before = [dict(vars(base_model(model))) for model in models]
    ours.add_callback(callback)
    actual = train(ours)
    for model, attributes in zip(models, before, strict=True):
        forward = vars(base_model(model))["forward"]
        # accelerate puts its own around it, to cast
        assert forward is attributes["forward"] or ours.args.bf16
        assert type(forward).__name__ == "method"
    assert [entry.keys() for entry in actual] == [entry.keys() for entry in expected]
    for mine, theirs in zip(actual, expected, strict=True):
        for key, value in theirs.items():
            tolerance = max(abs, STEP_OF_SUMS) if key in ("kl", "eval_kl") else abs
            assert mine[key] == pytest.approx(value, rel=rel, abs=tolerance, nan_ok=True), key
    return callback, actual
