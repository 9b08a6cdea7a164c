"""What `python -m fastft doctor` says of a model, whose configuration is enough for it: slow code
paths, losses that are left out, precisions and tokens that lead astray.

A check gets a `Subject`. The model may be on the meta device.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from fastft.integrations.configuration import load_config
from fastft.integrations.doctor.finding import Finding

# packages with kernels for layers of a model, by the name under which code imports them
KERNELS = {
    "fla": "flash-linear-attention",
    "causal_conv1d": "causal-conv1d",
    "mamba_ssm": "mamba-ssm",
}
# as the name of a package in quotes, or imported
_NAMED = re.compile(
    r"""["']({0})["']|^\s*(?:from|import) ({0})\b""".format("|".join(KERNELS)), re.MULTILINE
)
_ON_A_CPU = "On a GPU, that is: the kernels are not for CPUs."


@dataclass(frozen=True)
class Subject:
    """A model and where it is to be trained.

    Attributes:
        model: of transformers, without the wrappers of PEFT and others.
        gpu: whether it is, or can be, trained on a GPU here.
        tokenizer: of the model, or None.
    """

    model: PreTrainedModel
    gpu: bool
    tokenizer: Any = None


def described(target: str) -> Subject:
    """A model on the meta device, without weights.

    Args:
        target: a folder with a config.json, the file, the name of a model class of transformers
            (with its default configuration), or a name on the hub.

    Raises:
        ValueError: nothing of this kind has the name, or the model cannot be built without weights.
    """
    kind: Any = getattr(transformers, target, None) if target.isidentifier() else None
    tokenizer = None
    try:
        if target.isidentifier() and target[0].isupper():
            if not _is_model(kind):
                raise ValueError(f"transformers has no model {target}")
            config = kind.config_class()
        else:
            config = load_config(target)
            tokenizer = _tokenizer(target)
            kind = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            # the configuration may name whatever transformers has, a function too
            if _is_model(kind):
                model = kind(config)
            else:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{target!r} is no model that can be described: a folder with a config.json, the file, "
            "a class of transformers or a name on the hub is needed "
            f"({type(error).__name__}: {first_line})"
        ) from error
    return Subject(model, torch.cuda.is_available(), tokenizer)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, PreTrainedModel)


def _tokenizer(target: str) -> Any:
    folder = target if os.path.isdir(target) else os.path.dirname(target)
    if not os.path.exists(os.path.join(folder, "tokenizer_config.json")):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def missing_kernels(subject: Subject) -> Finding | None:
    """The model's code has kernels for its layers, of a package that cannot be imported."""
    missing = {
        KERNELS[name]: reason
        for name in sorted(_kernels_named(subject.model))
        if (reason := _not_importable(name)) is not None
    }
    if not missing:
        return None
    names = " and ".join(missing)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    return Finding(
        "slow" if subject.gpu else "note",
        f"{type(subject.model).__name__} has a fast path through {names}, and takes the slow one "
        f"({reasons}).",
        "Its layers compute in plain torch (52.8 s instead of 34.7 s in peft#3712), and packed "
        "sequences cannot be kept apart." + ("" if subject.gpu else f" {_ON_A_CPU}"),
        f"pip install {' '.join(missing)}.",
    )


def eager_attention(subject: Subject) -> Finding | None:
    """Attention is computed step by step, although the model can do otherwise."""
    model = subject.model
    if model.config._attn_implementation != "eager" or not model._supports_sdpa:
        return None
    return Finding(
        "slow",
        f'{type(model).__name__} has attn_implementation="eager".',
        "Each layer holds the T x T scores of every head for backward: at 4,096 tokens of bf16, "
        f"{_heads(model.config)} heads take {_heads(model.config) * 4096**2 * 2 / 2**30:.1f} GiB a "
        "layer.",
        'from_pretrained(..., attn_implementation="sdpa"), which is exact as well.',
    )


def no_flash_attention(subject: Subject) -> Finding | None:
    """A GPU, a model that takes flash-attn, and no flash-attn for its packed batches."""
    model = subject.model
    takes = getattr(model, "_supports_flash_attn", False)
    if not subject.gpu or not takes or is_flash_attn_2_available():
        return None
    return Finding(
        "note",
        f"flash-attn is not installed; {type(model).__name__} could use it.",
        "transformers' other attention builds a mask of T x T where sequences are packed.",
        'attn_implementation="fastft" (import fastft), or fastft.PackingCallback(): exact, in '
        "memory that is linear in T.",
    )


def router_without_balance(subject: Subject) -> Finding | None:
    """A router has a loss that balances its experts, which training leaves out."""
    config = subject.model.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", None)
    if not weight or getattr(config, "output_router_logits", True):
        return None
    return Finding(
        "note",
        f"The router's balancing loss (router_aux_loss_coef={weight}) is left out: "
        "output_router_logits is False.",
        "Experts may fall out of use in a long training, and the logged loss does not show it.",
        "model.config.output_router_logits = True, if the experts are to stay balanced.",
    )


def weights_of_16_bits(subject: Subject) -> Finding | None:
    """The checkpoint is in half precision, and transformers keeps what it finds."""
    config = subject.model.config
    dtype = config.dtype or config.get_text_config().dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return Finding(
        "note",
        f"The checkpoint's weights are {dtype}, and from_pretrained keeps that since "
        "transformers 5.",
        "AdamW's updates are smaller than half the distance of neighbouring 16-bit numbers for "
        "most weights at a fine-tuning's learning rate: they round to nothing. With float16 "
        "gradients vanish too.",
        "dtype=torch.float32 with bf16=True in the arguments; or bf16 weights with fastft.adamw, "
        "which keeps the bits that rounding drops.",
    )


def pad_token_is_end_token(subject: Subject) -> Finding | None:
    """What pads a batch is what ends a text."""
    has = subject.tokenizer or subject.model.config.get_text_config()
    ends = end_tokens(subject.model, has)
    pad = getattr(has, "pad_token_id", None)
    if pad is None or pad not in ends or not subject.model.can_generate():
        return None
    return Finding(
        "note",
        f"The pad token is an end token (id {pad}).",
        "DataCollatorForLanguageModeling takes every end token for padding and masks its label: "
        "the model does not learn to stop.",
        "Give the tokenizer another pad token; or make labels yourself, or with "
        "fastft.PackingCollator(), which looks at no pad token.",
    )


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end a text, as the tokenizer and the model's configurations name them."""
    sources = (tokenizer, model.config, getattr(model, "generation_config", None))
    named = [getattr(source, "eos_token_id", None) for source in sources]
    return {
        token
        for tokens in named
        if tokens is not None
        for token in (tokens if isinstance(tokens, list | tuple) else [tokens])
    }


# what holds for the model however it is trained; and what a training's own checks say better
MODEL = (missing_kernels, eager_attention, no_flash_attention, router_without_balance)
MODEL_ALONE = (*MODEL, weights_of_16_bits, pad_token_is_end_token)


def _kernels_named(model: PreTrainedModel) -> set[str]:
    """Which packages of kernels the code of the model's modules names."""
    rooms = {type(module).__module__ for module in model.modules()} - {"torch.nn.modules"}
    named = set()
    for room in rooms:
        module = sys.modules.get(room)
        if module is not None and not room.startswith("torch."):
            found = _NAMED.findall(inspect.getsource(module))
            named |= {name for pair in found for name in pair if name}
    return named


def _not_importable(package: str) -> str | None:
    """Why a package cannot be imported; None if it can."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == package else str(error)
    except Exception as error:  # built for another torch, say
        return f"{type(error).__name__}: {error}"
    return None


def _heads(config: Any) -> int:
    return int(getattr(config.get_text_config(), "num_attention_heads", 1))
