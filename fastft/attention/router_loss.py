"""The padding of packed rows stays out of the loss of a router (load balancing, with
`output_router_logits`).

transformers' models leave out of that loss what the 2-D attention mask masks. A packed batch has
none, because attention would then take its tokens for one sequence. Here the model gets one, (R,
T), 0 where a row ends with padding, and its body, which computes attention, does not:

    model(attention_mask=None) -> hook: attention_mask=mask -> model.forward -> hook: None -> body
                                                                             -> router's loss, with
                                                                             the mask
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastft.data.keys import PADDING_LENGTHS
from fastft.foreign.models import base_model

_MARK = "fastft_padding"  # an attribute of the mask, by which the body's hook knows it


@contextlib.contextmanager
def count_no_padding(model: nn.Module) -> Iterator[None]:
    """Keeps the padding of packed batches out of the router's loss of `model` inside this context.

    The batch says how many tokens at the end of each row are padding: `padding_lengths`, integers
    (R,). A model that returns no router's loss, or has no body beside its head, is left alone.
    """
    base = base_model(model)
    body = getattr(base, "base_model", base)
    with contextlib.ExitStack() as hooks:
        if body is not base and isinstance(body, nn.Module):
            hooks.callback(model.register_forward_pre_hook(_give_mask, with_kwargs=True).remove)
            hooks.callback(body.register_forward_pre_hook(_take_mask, with_kwargs=True).remove)
        yield


def _give_mask(
    model: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    padding, tokens = kwargs.get(PADDING_LENGTHS), kwargs.get("input_ids")
    if (
        not isinstance(padding, Tensor)
        or tokens is None
        or kwargs.get("attention_mask") is not None
        or not _returns_router_logits(model, kwargs)
    ):
        return None
    width = tokens.shape[1]
    mask = (
        torch.arange(width, device=tokens.device) < (width - padding.to(tokens.device))[:, None]
    ).long()
    setattr(mask, _MARK, True)
    return args, {**kwargs, "attention_mask": mask}


def _returns_router_logits(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("output_router_logits")
    if asked is not None:
        return bool(asked)
    configs = (getattr(module, "config", None) for module in model.modules())
    return any(getattr(config, "output_router_logits", False) for config in configs)


def _take_mask(
    body: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    if not any(hasattr(value, _MARK) for value in (*args, *kwargs.values())):
        return None
    return (
        tuple(None if hasattr(value, _MARK) else value for value in args),
        {key: None if hasattr(value, _MARK) else value for key, value in kwargs.items()},
    )
