"""The twin of a model that one process cannot run: what the packing probe asks in its place.

Whether a model keeps packed sequences apart is a matter of its code and its configuration, not of
the numbers that it has learnt. A model whose weights are sharded (FSDP, ZeRO-3) or on the meta
device therefore has a twin: a model of the same class and configuration, with small random
weights, on the same device. Where that has more than `OWN` parameters, it is made smaller in what
does not decide whether sequences are kept apart:

    layers      the first ones, as many as it takes to have each kind of layer that the model has
    vocabulary  as many tokens as the probe needs
    widths      a few heads, each as large as they are, and features for them; small experts

The attention implementation, windows, tables of positions, rotary dimensions, types of layers and
the number of experts stay. Bytes: 4 a parameter, at most 512 MiB.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastft.attention.attention import NAME as OURS
from fastft.foreign import models
from fastft.integrations.block_mask import NAME as BLOCK_MASK
from fastft.integrations.implementations import STOCK
from fastft.integrations.probe.rows import TABLES, WINDOWS
from fastft.integrations.probe.untouched import RandomStates

OWN, MOST = 2**24, 2**27  # parameters of a twin of the same sizes, of any
VOCABULARY, WIDTH = 1024, 16  # tokens; features inside experts and other layers of two matrices
_COUNTS_LAYERS = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|depth")
_INDEX = re.compile(r"idx|index|_id$")
_INNER = re.compile(r"intermediate|inner|ffn|d_ff")


def twin_of(model: nn.Module, smaller: bool = True) -> nn.Module:
    """Makes a model of the class and configuration of `model`'s base model, whose weights are
    here.

    It is in fp32, or in bf16 where its attention may be of a kernel that takes no fp32. Adapters
    and hooks are not on it. Random states stay as they are.

    Args:
        model: whose weights are elsewhere.
        smaller: False for one that gets tokens and images of the model's own sizes.

    Raises:
        ValueError: none could be made that takes a text, and is small enough.
    """
    base, why = models.base_model(model), ""
    states = RandomStates(model)
    try:
        for config, most in _configurations(base, smaller):
            try:
                return _made(base, config(), most)
            except Exception as error:  # a size that this class does not allow, or is too large
                why = " ".join(str(error).split())[:200]
    finally:
        states.rewind()
    raise ValueError(f"no small twin of it could be made ({why})")


def _configurations(base: Any, smaller: bool) -> Iterator[tuple[Callable[[], Any], int]]:
    """The model's own if it is small, the smallest, one of its width; and how many parameters it
    may have."""
    yield lambda: copy.deepcopy(base.config), OWN
    if not smaller:
        return
    layers = _enough_layers(base)
    yield lambda: _narrow(_short(base.config, layers)), MOST
    yield lambda: _short(base.config, layers), MOST


def _made(base: Any, config: Any, most: int) -> nn.Module:
    kind = models.class_without_sharding(base)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > most:
        raise ValueError(f"one has {size} parameters, more than {most}")
    torch.manual_seed(0)  # the same on every process, and so is the verdict
    twin: nn.Module = kind(config)
    with torch.no_grad():
        for parameter in twin.parameters():
            if not parameter.any():  # biases and gates, which would hide what they multiply
                parameter.normal_(std=0.02)
    known = {*STOCK, OURS, BLOCK_MASK}
    usual = all(one._attn_implementation in known for one in _configs_in(config))
    twin = twin.to(models.computing_device(base), torch.float32 if usual else torch.bfloat16)
    if base.main_input_name == "input_ids":
        text = torch.arange(8, device=models.computing_device(base))[None]
        with torch.no_grad():
            twin.eval()(text, **({"decoder_input_ids": text} if config.is_encoder_decoder else {}))
    return twin


def _configs_in(config: Any) -> list[Any]:
    """A configuration and those of its parts."""
    parts = [value for value in vars(config).values() if models.is_config(value)]
    return [config, *(inner for part in parts for inner in _configs_in(part))]


def _enough_layers(base: Any) -> int:
    """The shortest beginning of every list of layers, and of every list that the configuration has
    for them, with each kind in the list."""
    lists = [
        [_kind(layer) for layer in module]
        for module in base.modules()
        if isinstance(module, nn.ModuleList)
    ]
    for part in _configs_in(base.config):
        counts = _layer_counts(part).values()
        values = (value for value in vars(part).values() if isinstance(value, list | tuple))
        lists += [list(map(str, value)) for value in values if len(value) in counts]
    return max([1, *(kinds.index(kind) + 1 for kinds in lists for kind in set(kinds))])


def _layer_counts(config: Any) -> dict[str, int]:
    """What counts the layers, by name."""
    values = vars(config).items()
    return {n: v for n, v in values if isinstance(v, int) and _COUNTS_LAYERS.fullmatch(n)}


def _kind(layer: nn.Module) -> Any:
    """What tells a layer from others, but for its place: its modules and their plain attributes."""
    return tuple(
        (
            type(module),
            *(
                (name, value)
                for name, value in sorted(vars(module).items())
                if isinstance(value, bool | int | str | None)
                and not name.startswith(("_", "ds_", "training"))
                and not _INDEX.search(name)
            ),
        )
        for module in layer.modules()
    )


def _short(whole: Any, layers: int) -> Any:
    """A copy of the configuration with few layers and few tokens."""
    config = copy.deepcopy(whole)
    for part in _configs_in(config):
        _with_few_layers(part, layers)
    _with_few_tokens(config)
    return config


def _with_few_layers(config: Any, enough: int) -> None:
    """Leaves `enough` layers of each list, and their values in what has one for each layer."""
    counts = {name: count for name, count in _layer_counts(config).items() if count > enough}
    for name, value in list(vars(config).items()):
        if name in counts:
            setattr(config, name, enough)
        elif isinstance(value, list | tuple) and len(value) in counts.values():
            setattr(config, name, value[:enough])


def _with_few_tokens(config: Any) -> None:
    """Leaves a small vocabulary, at whose end the special tokens are that lay beyond it."""
    parts = _configs_in(config)
    sizes = {
        name: value
        for part in parts
        for name, value in vars(part).items()
        if "vocab_size" in name and isinstance(value, int) and value > VOCABULARY
    }
    places: dict[int, int] = {}

    def moved(token: Any) -> Any:
        if isinstance(token, list):
            return [moved(one) for one in token]
        if not isinstance(token, int) or token < VOCABULARY // 2:
            return token
        return places.setdefault(token, VOCABULARY - 1 - len(places))

    if not sizes:
        return
    for part in parts:
        for name, value in list(vars(part).items()):
            if name in sizes:
                setattr(part, name, min(value, VOCABULARY))
            elif name.endswith(("_token_id", "_token_index", "_token_ids")):
                setattr(part, name, moved(value))


def _narrow(config: Any) -> Any:
    """The configuration with one or two key-value heads of the size that they have, as many query
    heads or twice, and features for these."""
    text = config.get_text_config()
    width, heads = text.hidden_size, text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or width // heads
    few_groups = min(groups, 2 if size <= 128 else 1)
    few_heads = few_groups * min(heads // groups, 2)
    for name, value in list(vars(text).items()):
        if not isinstance(value, int) or isinstance(value, bool) or name in (*TABLES, *WINDOWS):
            continue
        if _INNER.search(name):
            setattr(text, name, min(value, WIDTH))
        elif "head" in name and "dim" not in name and value in (heads, groups):
            setattr(text, name, few_heads if value == heads else few_groups)
        elif value == width and not name.endswith("_token_id"):
            setattr(text, name, few_heads * size)
    return config
