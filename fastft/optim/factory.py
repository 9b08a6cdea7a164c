"""Ways to hand AdamW to Trainer: `optimizers=` and `optimizer_cls_and_kwargs=`.

For an optimizer that it is given, Trainer ignores its `TrainingArguments` and makes no decay /
no-decay groups; both functions put that right. What Trainer would drop or do otherwise is refused
here where `args` tell, and at train begin (fastft/integrations/optimizer_check.py) where only the
training itself does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from fastft.foreign import engines, models
from fastft.optim.adamw import AdamW
from fastft.optim.moment_codes import CODES
from fastft.optim.origin import Keywords, Origin


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
    """The pair that `Trainer(optimizers=...)` takes: AdamW, and None for Trainer's own schedule.

    Call it when the model is ready: embeddings resized, layers frozen or unfrozen, adapters added.
    With `FusedLossCallback` or `PackingCallback` training does not begin where a parameter is
    trainable that was not so now.

    Args:
        model_or_params: a model, whose trainable parameters go into Trainer's two groups (biases
            and norms do not decay; needs transformers); or an iterable of tensors, of
            `(name, tensor)` pairs or of parameter groups, which may leave out what they like.
        args: a `transformers.TrainingArguments`, which gives lr, betas, eps and weight decay where
            the keyword is None.
        lr: learning rate; without it and without `args`, AdamW's default 1e-3. The others likewise.
        betas: default (0.9, 0.999).
        eps: default 1e-8.
        weight_decay: default 1e-2; of a model, only for the parameters that decay.
        options: further keywords of `AdamW`: `maximize`, `moments`, `rounding`, `impl`, ... Of a
            model with `moments="8bit"` or "4bit", embeddings and the output head keep fp32 moments,
            in groups of their own.

    Raises:
        TypeError: `model_or_params` is neither a model nor an iterable, `args` is no
            TrainingArguments, or a keyword is unknown.
        ValueError: as `AdamW`; a model without trainable parameters; or `args`, or the environment
            of `accelerate launch`, say DeepSpeed or FSDP, where Trainer drops or refuses an
            optimizer: see `adamw_spec`.
    """
    given = _given(options, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    model = model_or_params if isinstance(model_or_params, torch.nn.Module) else None
    groups: Any = model_or_params
    engine = None if args is None else engines.engine_of(args)
    if engine is not None:
        raise ValueError(
            f"{engine} trains here, for which Trainer makes the optimizer itself: use "
            "Trainer(optimizer_cls_and_kwargs=fastft.adamw_spec(args)) in the place of "
            "optimizers=fastft.adamw(model, args)"
        )
    if model is not None:
        groups = _decay_groups(model)
        if options.get("moments") in CODES:
            groups = with_fp32_moments(groups, model)
    elif isinstance(groups, torch.Tensor | str) or not isinstance(groups, Iterable):
        raise TypeError(
            "model_or_params must be a torch.nn.Module or an iterable of parameters or parameter "
            f"groups, got {type(model_or_params).__name__}"
        )
    elif args is None:
        # parameters and hyper-parameters by hand: there is nothing to compare them with
        return AdamW(groups, **given), None
    origin = Origin("adamw", args, given, model)
    optimizer = AdamW(groups, **Keywords(origin))
    if args is not None:
        _warn_of_two_clippings(args, optimizer.max_grad_norm)
        _check_freed(args, optimizer, model)
    if model is not None and optimizer.offload == "overlap":
        optimizer.follow(model)
    origin.remember()
    return optimizer, None


def adamw_spec(
    args: Any = None,
    *,
    lr: float | torch.Tensor | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    **options: Any,
) -> tuple[type[AdamW], Keywords]:
    """The pair for `Trainer(optimizer_cls_and_kwargs=...)`: FSDP, DeepSpeed, `model_init` need it.

    What comes from `args` is read when Trainer makes the optimizer, so that every trial of a
    `hyperparameter_search` trains at its own values; a keyword that is given here stays. Trainer
    makes the parameter groups, with the weight decay of its own `args`. The arguments are those of
    `adamw`; with `moments="8bit"` or "4bit" embeddings and head have such moments as well.

    Returns:
        The class, and a mapping of its keywords.

    Raises:
        TypeError: `args` is no TrainingArguments, or an unknown keyword.
        ValueError: as `AdamW`; a `weight_decay` other than that of `args`; or what DeepSpeed, if
            `args` say so, would drop: any optimizer beside the one of its own configuration, with
            `offload_optimizer` all but plain fp32 AdamW, and `max_grad_norm`, which would be taken
            of each process's part alone.
    """
    given = _given(options, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return spec_of(Origin("adamw_spec", args, given))


def spec_of(origin: Origin) -> tuple[type[AdamW], Keywords]:
    """The pair of `adamw_spec` for an origin, which is remembered; raises as `adamw_spec` does."""
    args, weight_decay = origin.args, origin.given.get("weight_decay")
    keywords = Keywords(origin)
    # a wrong keyword is told here, not after Trainer has loaded the model
    tried = {"seed": 0, **keywords}
    if tried.get("offload") == "auto":  # which looks at parameters
        tried["offload"] = "states"
    example = AdamW([torch.zeros(1, dtype=torch.bfloat16)], **tried)
    if args is not None:
        _check_freed(args, example)
        if weight_decay is not None and weight_decay != args.weight_decay:
            raise ValueError(
                f"weight_decay={weight_decay} would be lost: Trainer makes the groups with the "
                f"{args.weight_decay} of its args; set it in args: "
                f"TrainingArguments(weight_decay={weight_decay})"
            )
        config = engines.deepspeed_config(args)
        if config is None:
            _warn_of_two_clippings(args, example.max_grad_norm, stacklevel=4)
        else:
            _check_deepspeed(config, example)
    origin.remember()
    return AdamW, keywords


def check_args_for_freed_gradients(args: Any, released: bool) -> None:
    """Raises where a Trainer with `args` needs gradients later than backward makes them.

    Args:
        args: a `transformers.TrainingArguments`.
        released: with `release_gradients`, which has nothing left to clip or to add to.
    """
    if getattr(args, "fp16", False):
        raise ValueError(
            "fp16=True scales the loss, and GradScaler looks for Inf in gradients that are freed "
            "as backward makes them (offload='gradients' or 'overlap', release_gradients): use "
            "bf16=True, or offload='states'"
        )
    clips = getattr(args, "max_grad_norm", None)
    micro = getattr(args, "gradient_accumulation_steps", 1)
    asked = [f"max_grad_norm={clips}"] if clips else []
    asked += [f"gradient_accumulation_steps={micro}"] if micro > 1 else []
    if released and asked:
        raise ValueError(
            f"release_gradients=True with {' and '.join(asked)} of TrainingArguments: backward "
            "uses each gradient up, so that there is none to clip or to add to. Set "
            "max_grad_norm=0 and gradient_accumulation_steps=1, or use offload='gradients', which "
            "does both"
        )


def _given(options: dict[str, Any], **named: Any) -> dict[str, Any]:
    """The keywords that the user gave."""
    return {name: value for name, value in named.items() if value is not None} | options


def _check_freed(args: Any, optimizer: AdamW, model: torch.nn.Module | None = None) -> None:
    if not optimizer.frees_gradients:
        return
    check_args_for_freed_gradients(args, optimizer.release_gradients)
    copies = getattr(args, "world_size", 1) // engines.same_batch_ranks(model, args)
    if (copies > 1 and engines.engine_of(args) is None) or getattr(args, "n_gpu", 1) > 1:
        raise ValueError(
            "DDP and DataParallel add up the gradients of all copies of a model when backward is "
            "over, and these are freed as backward makes them (offload='gradients' or 'overlap', "
            "release_gradients): use offload='states', or FSDP2"
        )


def _warn_of_two_clippings(args: Any, max_grad_norm: float | None, stacklevel: int = 3) -> None:
    if max_grad_norm is not None and args.max_grad_norm:
        warnings.warn(
            f"gradients are clipped twice, to {args.max_grad_norm} by Trainer and to "
            f"{max_grad_norm} by the optimizer: set TrainingArguments(max_grad_norm=0), or leave "
            "max_grad_norm to args and use fastft.fuse_clipping",
            stacklevel=stacklevel,
        )


def _check_deepspeed(config: dict[str, Any], optimizer: AdamW) -> None:
    """Raises where DeepSpeed, so configured, would train something else than `optimizer`."""
    if "optimizer" in config:
        raise ValueError(
            "DeepSpeed's configuration has an optimizer of its own, which would train in the place "
            'of fastft\'s: remove the section "optimizer" from it'
        )
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            "max_grad_norm would clip to the norm of each process's part of the gradients under "
            "DeepSpeed: use TrainingArguments(max_grad_norm=...), for which DeepSpeed takes the "
            "norm of all"
        )
    if engines.replaces_optimizers(config):
        optimizer.check_that_a_replacement_is_faithful()


def _decay_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The two groups of `Trainer.create_optimizer`; only the first has the optimizer's decay."""
    try:
        from transformers import Trainer
    except ImportError as error:
        raise ImportError(
            "adamw(model) needs transformers for its decay groups; or give adamw() the parameters"
        ) from error
    # Trainer's method uses nothing of its instance, and is the one place that knows which names do
    # not decay
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no parameter with requires_grad=True: there is nothing to "
            "train"
        )
    return [
        {"params": [param for name, param in trainable if name in decaying]},
        {
            "params": [param for name, param in trainable if name not in decaying],
            "weight_decay": 0.0,
        },
    ]


def with_fp32_moments(groups: list[dict[str, Any]], model: torch.nn.Module) -> list[dict[str, Any]]:
    """The groups, each followed by one of the embeddings and the output head, if it has any."""
    modules: list[torch.nn.Module] = [
        module for module in model.modules() if isinstance(module, torch.nn.Embedding)
    ]
    head = models.output_embeddings(model)
    if head is not None:
        modules.append(head)
    chosen = {param for module in modules for param in module.parameters()}
    split = []
    for group in groups:
        kept = [param for param in group["params"] if param in chosen]
        split.append({**group, "params": [p for p in group["params"] if p not in chosen]})
        if kept:
            split.append({**group, "params": kept, "moments": "fp32"})
    return split
