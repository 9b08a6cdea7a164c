"""Every method of PEFT that a small Llama takes, by the name that people look for.

An older PEFT lacks some, or an option of theirs: `config` says so by None.
"""

from __future__ import annotations

import inspect
from typing import Any

import peft
import torch
from peft import get_peft_model

from support.trainers import tiny_llama

V = 192
BODY = ["q_proj", "v_proj"]
HEAD = ["lm_head"]

# PEFT's class, and the options that make it small; where `init_weights` decides, something is moved
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 4}),
    "LoRA, dropout": ("LoraConfig", {"r": 4, "lora_dropout": 0.3}),
    "rsLoRA": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "PiSSA": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True}),
    "DoRA, dropout": ("LoraConfig", {"r": 4, "use_dora": True, "lora_dropout": 0.3}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "LoHa": ("LoHaConfig", {"r": 4}),
    "LoKr": ("LoKrConfig", {"r": 4}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 100}),
    "VeRA": ("VeraConfig", {"r": 4}),
    "PVeRA": ("PveraConfig", {"r": 4}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 8}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8}),
    "HRA": ("HRAConfig", {"r": 4}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 20}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 20}),
    "MiSS": ("MissConfig", {"r": 4}),
    "RandLoRA": ("RandLoraConfig", {"r": 4}),
    "VB-LoRA": ("VBLoRAConfig", {"r": 4, "num_vectors": 8, "vector_length": 8}),
    "Uni-LoRA": ("UniLoraConfig", {"r": 4}),
    "SHiRA": ("ShiraConfig", {"r": 4}),
    "HiRA": ("HiraConfig", {"r": 4}),
    "GLoRA": ("GloraConfig", {"r": 4}),
    "PSOFT": ("PsoftConfig", {"r": 4}),
    "Lily": ("LilyConfig", {"r": 4}),
    "BEFT": ("BeftConfig", {}),
    "C3A": ("C3AConfig", {"block_size": 8}),
    "RoAd": ("RoadConfig", {"group_size": 8}),
    "GraLoRA": ("GraloraConfig", {"r": 4, "gralora_k": 2}),
    "DeLoRA": ("DeloraConfig", {"r": 4}),
    "FRoD": ("FrodConfig", {}),
}
# on the head: they have T x V numbers of their own; or the logits themselves are built
WIDE_ON_HEAD = ("C3A", "GraLoRA")
DENSE_ON_HEAD = ("RoAd", "DeLoRA", "FRoD")
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
}
# what is not a matter of the layers alone
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA, every linear layer": ("LoraConfig", {"r": 4, "target_modules": "all-linear"}),
    "LoRA with biases": ("LoraConfig", {"r": 4, "target_modules": BODY, "bias": "all"}),
    "modules_to_save, head": (
        "LoraConfig",
        {"r": 4, "target_modules": BODY, "modules_to_save": ["lm_head"]},
    ),
    "modules_to_save, head and embedding": (
        "LoraConfig",
        {"r": 4, "target_modules": BODY, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "target_parameters": (
        "LoraConfig",
        {"r": 4, "target_modules": [], "target_parameters": ["down_proj.weight"]},
    ),
    "trainable tokens": ("TrainableTokensConfig", {"token_indices": [3, 4, 9]}),
    "LoRA and trainable tokens": (
        "LoraConfig",
        {"r": 4, "target_modules": BODY, "trainable_token_indices": [3, 4, 9]},
    ),
    "norms": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
}


def config(name: str, target: list[str] = BODY) -> Any:
    """The configuration of a method; None where this PEFT does not have it."""
    kind, options = {**LAYERS, **PROMPTS, **OTHERS}[name]
    made = getattr(peft, kind, None)
    options = {**({"target_modules": target} if name in LAYERS else {}), **options}
    if made is None or not options.keys() <= inspect.signature(made).parameters.keys():
        return None
    return made(task_type="CAUSAL_LM", **options)


def adapted(chosen: Any, *, seed: int = 1, noise: float = 0.02, **changes: Any) -> Any:
    """A small Llama with an adapter, whose trained numbers have some noise: nothing begins at 0.

    `changes`: of the model's configuration.
    """
    base = tiny_llama(V, pad_token_id=0, **changes)
    torch.manual_seed(seed)
    model = get_peft_model(base, chosen).train()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += noise * torch.randn_like(parameter)
    return model
