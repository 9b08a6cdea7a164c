"""TRL's experimental trainers that read a model's logits, small: how each is made, and what it
logs."""

from __future__ import annotations

import importlib

import datasets
import torch
from transformers import LlamaForCausalLM

from support.plugged import PAD, tokenizer
from support.trainers import quiet_arguments, tiny_llama
from support.trl_trainers import PAIRS, SIZES, TEXTS, WORDS

STEPS, WIDE = 3, 1009
TRIPLES = [{**pair, "reference": f" {TEXTS[(i + 5) % 12]}"} for i, pair in enumerate(PAIRS)]
PROMPTS = [{"prompt": text} for text in TEXTS]
IDS = [[int(word) for word in words] for words in WORDS]


def student(**config):
    """A language model of more words than hidden states, so that logits are its largest tensor."""
    usual = {"initializer_range": 0.2, "pad_token_id": PAD, "num_key_value_heads": 2, **SIZES}
    return tiny_llama(WIDE, **{**usual, **config})


def teacher():
    """A wider model of the same words, which is not trained."""
    return student(seed=5, hidden_size=24).eval().requires_grad_(False)


def rows_of_tokens(examples):
    """Collates rows of token ids, whose first third is a prompt, as GKD reads them."""
    size = max(len(example["input_ids"]) for example in examples)
    ids = torch.zeros(len(examples), size, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example["input_ids"])
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, len(tokens) // 3 : len(tokens)] = tokens[len(tokens) // 3 :]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "prompts": ids[:, :2],
        "prompt_attention_mask": mask[:, :2],
    }


def reward(completions, **kwargs):
    """Differs from completion to completion."""
    return [float(len(set(text)) % 3) for text in completions]


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "prediction_loss_only": True}
# a trainer, its examples, its arguments, and what else it is given
MEMBERS = {
    "ORPO": ("orpo.ORPO", PAIRS, {"max_length": 48, **EVALUATED}, dict),
    "CPO": ("cpo.CPO", PAIRS, {"max_length": 48, **EVALUATED}, dict),
    "SimPO": (
        "cpo.CPO",
        PAIRS,
        {"loss_type": "simpo", "cpo_alpha": 0.0, "max_length": 48, **EVALUATED},
        dict,
    ),
    "GKD": (
        "gkd.GKD",
        [{"input_ids": ids} for ids in IDS],
        {"lmbda": 0.0, "beta": 0.5, **EVALUATED},
        lambda: {"teacher_model": teacher(), "data_collator": rows_of_tokens},
    ),
    "TPO": ("tpo.TPO", TRIPLES, {"max_length": 48, **EVALUATED}, dict),
    "GOLD": (
        "gold.GOLD",
        [{"input_ids": ids} for ids in IDS],
        {"lmbda": 0.0, "beta": 0.5, "temperature": 0.7, **EVALUATED},
        lambda: {"teacher_model": teacher(), "data_collator": rows_of_tokens},
    ),
    "Online DPO": (
        "online_dpo.OnlineDPO",
        PROMPTS,
        {"max_new_tokens": 6, "missing_eos_penalty": None},
        lambda: {"reward_funcs": reward},
    ),
    "A*-PO": (
        "a2po.A2PO",
        PROMPTS,
        {"max_completion_length": 12, "num_value_samples": 2},
        lambda: {"reward_funcs": reward},
    ),
    "SDFT": (
        "sdft.SDFT",
        [{"prompt": text, "privileged_context": TEXTS[-1 - i]} for i, text in enumerate(TEXTS)],
        {"max_completion_length": 12, "num_generations": 2},
        dict,
    ),
    "SDPO": (
        "sdpo.SDPO",
        [{"prompt": text, "privileged_context": TEXTS[-1 - i]} for i, text in enumerate(TEXTS)],
        {"max_completion_length": 12, "num_generations": 2},
        lambda: {"reward_funcs": reward},
    ),
}


def trainer_of(folder, member, *, model=None, options=None, **changes):
    """The trainer of a member on a CPU; `changes`: of its arguments, `options`: of itself."""
    place, rows, given, extra = MEMBERS[member]
    package, name = place.split(".")
    module = importlib.import_module(f"trl.experimental.{package}")
    usual = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.1}
    usual["optim"] = "sgd"  # Adam makes much of gradients that are nothing but rounding
    arguments = quiet_arguments(
        folder,
        getattr(module, f"{name}Config"),
        **{**usual, "bf16": False, "seed": 7, **given, **changes},
    )
    if model is None:  # from a folder, out of which some load a teacher
        student().save_pretrained(folder / "student")
        model = LlamaForCausalLM.from_pretrained(folder / "student").train()
    return getattr(module, f"{name}Trainer")(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows[:4]),
        processing_class=tokenizer(),
        **{**extra(), **(options or {})},
    )
