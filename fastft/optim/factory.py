"""Ways to hand AdamW to Trainer: `optimizers=adamw(model, args)` and `optimizer_cls_and_kwargs=adamw_spec(args)`.

For an optimizer that it is given, Trainer ignores its `TrainingArguments` and makes no decay / no-decay groups; both
functions put that right.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastft.optim.adamw import AdamW


def adamw(
    model_or_params: torch.nn.Module | Iterable[Any],
    args: Any = None,
    *,
    lr: float | torch.Tensor | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    **options: Any,
) -> tuple[AdamW, None]:
    """The pair that `Trainer(optimizers=...)` takes: AdamW, and None, for which Trainer builds its schedule.

    Args:
        model_or_params: a model, whose trainable parameters go into Trainer's two groups (biases and norms do not
            decay; needs transformers); or an iterable of tensors, of `(name, tensor)` pairs or of parameter groups.
        args: a `transformers.TrainingArguments`, which gives lr, betas, eps and weight decay where the keyword is None.
        lr: learning rate; without it and without `args`, AdamW's default 1e-3. The others likewise.
        betas: default (0.9, 0.999).
        eps: default 1e-8.
        weight_decay: default 1e-2; of a model, only for the parameters that decay.
        options: further keywords of `AdamW`: `maximize`, `moments`, `rounding`, `impl`, ... Of a model with
            `moments="8bit"`, embeddings and the output head keep fp32 moments, in groups of their own.

    Raises:
        TypeError: `model_or_params` is neither a model nor an iterable, `args` is no TrainingArguments, or a keyword is
            unknown.
        ValueError: as `AdamW`; or a model without trainable parameters.
    """
    kwargs = _kwargs(args, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay) | options
    if isinstance(model_or_params, torch.nn.Module):
        groups = _decay_groups(model_or_params)
        if options.get("moments") == "8bit":
            groups = _with_fp32_moments(groups, _embeddings_and_head(model_or_params))
        return AdamW(groups, **kwargs), None
    if isinstance(model_or_params, torch.Tensor | str) or not isinstance(model_or_params, Iterable):
        raise TypeError(
            "model_or_params must be a torch.nn.Module or an iterable of parameters or parameter groups, "
            f"got {type(model_or_params).__name__}"
        )
    return AdamW(model_or_params, **kwargs), None


def adamw_spec(
    args: Any = None,
    *,
    lr: float | torch.Tensor | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    **options: Any,
) -> tuple[type[AdamW], dict[str, Any]]:
    """The pair that `Trainer(optimizer_cls_and_kwargs=...)` takes: the way in under FSDP, DeepSpeed and `model_init`.

    Trainer makes the parameter groups, with the weight decay of its own `args` whatever is given here. The arguments
    are those of `adamw`; with `moments="8bit"` embeddings and head have 8-bit moments as well.

    Raises:
        TypeError: `args` is no TrainingArguments, or an unknown keyword.
        ValueError: as `AdamW`.
    """
    kwargs = _kwargs(args, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay) | options
    AdamW(
        [torch.zeros(1, dtype=torch.bfloat16)], **{"seed": 0, **kwargs}
    )  # a wrong keyword is told here, not after Trainer has loaded the model
    return AdamW, kwargs


def _kwargs(args: Any, **explicit: Any) -> dict[str, Any]:
    """AdamW's keywords: the explicit ones, else those of `args`, else none, which leaves AdamW's defaults."""
    given = {name: value for name, value in explicit.items() if value is not None}
    if args is None:
        return given
    try:
        of_args = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
        }
    except AttributeError as error:
        raise TypeError(f"args must be a transformers.TrainingArguments, got {type(args).__name__} ({error})") from None
    return of_args | given


def _decay_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The two groups of `Trainer.create_optimizer`; the first takes the optimizer's weight decay."""
    try:
        from transformers import Trainer
    except ImportError as error:
        raise ImportError(
            "adamw(model) needs transformers for its decay groups; or give adamw() the parameters"
        ) from error
    # Trainer's method uses nothing of its instance, and is the one place that knows which names do not decay
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad=True: there is nothing to train")
    return [
        {"params": [param for name, param in trainable if name in decaying]},
        {"params": [param for name, param in trainable if name not in decaying], "weight_decay": 0.0},
    ]


def _embeddings_and_head(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    if head := getattr(model, "get_output_embeddings", lambda: None)():
        modules.append(head)
    return {param for module in modules for param in module.parameters()}


def _with_fp32_moments(groups: list[dict[str, Any]], chosen: set[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """The groups, each followed by one of its `chosen` parameters, where it has any."""
    split = []
    for group in groups:
        kept = [param for param in group["params"] if param in chosen]
        split.append({**group, "params": [param for param in group["params"] if param not in chosen]})
        if kept:
            split.append({**group, "params": kept, "moments": "fp32"})
    return split
