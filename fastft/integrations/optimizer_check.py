"""The check at train begin, and before steps: does the optimizer train what was meant, as it was
meant?

A Trainer hands an optimizer through without looking at it. What then goes wrong without a word:

    under DeepSpeed                 Trainer lets go of `optimizers=`, and of a spec where
                                    DeepSpeed's configuration has an "optimizer"
    `adamw(model)` made too early   resized embeddings, unfrozen layers, LoRA and `set_adapter`
                                    bring parameters that it does not train, before a training or
                                    in the middle of it
    `adamw_spec(args)`              a trainer that copies its args (TRL): the copy says other things
    `max_grad_norm` of ours         over gradients that DeepSpeed or FSDP1 cut into flat parts; or
                                    beside that of args
    gradients freed in backward     Trainer's clipping, GradScaler and DDP look for them later

`foreign` knows the classes. Others, too, decide by an optimizer's class or by its name:

    accelerate     map_pytorch_optim_to_deepspeed: a torch.optim.AdamW gets decoupled decay;
                   set_optimizer_type of Megatron-LM: "adam" in the class's name, and the defaults
    transformers   is_optimizer_factory: subclass of torch.optim.Optimizer; "bitsandbytes" in
                   str(class)
    DeepSpeed      ZERO_SUPPORTED_OPTIMIZERS by exact type: ours needs
                   "zero_allow_untested_optimizer", which transformers and accelerate set; fp16 and
                   bf16 master weights want DeepSpeedCPUAdam itself
    PEFT           create_loraplus_optimizer: 8-bit classes by name, else any class
    Lightning      a subclass of both LightningOptimizer and the optimizer's class; where
                   `_step_supports_amp_scaling` an fp16 run refuses Lightning's clipping with a
                   sentence, as for torch's fused AdamW
    torch          torch.distributed.optim's functional twins by exact type: ours has none;
                   GradScaler by `_step_supports_amp_scaling`
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from fastft.foreign import engines, sharding
from fastft.integrations import clipping, trainings
from fastft.optim import origin
from fastft.optim.adamw import AdamW
from fastft.optim.factory import check_args_for_freed_gradients
from fastft.optim.offload import hooks
from fastft.optim.origin import Origin

# below "transformers", so that its verbosity rules
logger = logging.get_logger(f"transformers.{__name__}")

_SPEC = "Trainer(optimizer_cls_and_kwargs=fastft.adamw_spec(args))"
_NAMED = 8  # parameters of a list that goes into a sentence


def check_optimizer(
    args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer: Any, handed: bool
) -> None:
    """Compares what trains with what was made; quiet about optimizers that are not fastft's affair.

    Args:
        args, state, model, optimizer: of Trainer, as its callbacks get them.
        handed: whether this Trainer was handed an AdamW of fastft's.

    Raises:
        ValueError: where something else would be trained than what the user asked for.
    """
    inner, by_deepspeed = engines.inner_optimizer(optimizer), engines.of_deepspeed(optimizer)
    if not isinstance(inner, AdamW):
        if inner is not None:  # who calls a callback by hand may have none
            # whose stage 0 wraps no optimizer in a class of its own
            drops = by_deepspeed or engines.engine_of(args) == "DeepSpeed"
            _check_replacement(args, model, inner, drops, handed)
        return
    inner.watch_gradients()
    inner.forget_stale_remainders()
    if not by_deepspeed:
        _check_parameters(model, inner)
    # Trainer keeps it for a second train(), as it is
    if inner.origin is not None and not inner.had_gradients:
        _check_settings(args, state, inner, inner.origin)
    if inner.frees_gradients:
        _check_freed_gradients(args, inner)
    if inner.max_grad_norm is not None:
        _check_clipping(args, inner, flat=by_deepspeed or sharding.is_fsdp1(model))


def _check_replacement(
    args: TrainingArguments, model: nn.Module, inner: Any, by_deepspeed: bool, handed: bool
) -> None:
    """Raises or warns where another optimizer trains, and one of fastft's was to do so."""
    # made of our groups
    if engines.is_deepspeed_adam(inner) and "moments" in inner.param_groups[0]:
        if not inner.adam_w_mode:
            raise ValueError(
                "DeepSpeedCPUAdam trains in the place of fastft's AdamW, and its weight decay is "
                'L2, not decoupled: set "zero_force_ds_cpu_optimizer": false in DeepSpeed\'s '
                "configuration"
            )
        logger.warning(
            "fastft: with ZeRO's offload_optimizer DeepSpeedCPUAdam trains in the place of "
            'fastft\'s AdamW, by the same formula; "zero_force_ds_cpu_optimizer": false in '
            "DeepSpeed's configuration lets fastft's train"
        )
        return
    kind = f"{type(inner).__module__}.{type(inner).__name__}"
    if handed and by_deepspeed:
        raise ValueError(
            f"this Trainer was given a fastft.AdamW, but {kind} trains: DeepSpeed drops ours; use "
            f"{_SPEC}"
        )
    ours = _dropped(args, model, by_deepspeed)
    if ours is None:
        return
    what = (
        f"fastft.{ours.way} made an optimizer for this {'model' if ours.model else 'Trainer'}, but "
        f"{kind} trains"
    )
    if by_deepspeed:
        remedy = (
            f"use {_SPEC}"
            if ours.model
            else 'remove the section "optimizer" from its configuration'
        )
        raise ValueError(f"{what}: DeepSpeed drops ours; {remedy}")
    logger.warning(f"fastft: {what}")


def _dropped(args: TrainingArguments, model: nn.Module, by_deepspeed: bool) -> Origin | None:
    """The origin of an optimizer for this training that has not trained since."""
    for module in model.modules():
        made = origin.of_models.get(module)
        if made is not None and not made.trained:
            return made
    # a spec without args may be another Trainer's; only DeepSpeed is known to drop one
    return next(
        (
            made
            for made in origin.of_specs
            if not made.trained and (made.args is args or (by_deepspeed and made.args is None))
        ),
        None,
    )


def _check_parameters(model: nn.Module, optimizer: AdamW) -> None:
    """Raises if the optimizer has no trainable parameter, or lacks one that it was to have."""
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    missing = [name for name, param in trainable.items() if id(param) not in held]
    made_from = None if optimizer.origin is None else optimizer.origin.model
    whole = None if made_from is None else made_from()
    # of the model that was handed over; parameters that the user chose may leave out what they like
    expected = set() if whole is None else {id(param) for param in whole.parameters()}
    unexpected = [name for name in missing if id(trainable[name]) in expected]
    if missing and len(missing) == len(trainable):
        what = (
            f"none of the model's {len(trainable)} trainable parameters is in the optimizer: "
            "nothing would train"
        )
    elif unexpected:
        named = ", ".join(unexpected[:_NAMED])
        rest = f" and {len(unexpected) - _NAMED} more" if len(unexpected) > _NAMED else ""
        what = (
            f"{len(unexpected)} of the model's {len(trainable)} trainable parameters are not in "
            f"the optimizer, and would stay as they are: {named}{rest}"
        )
    else:
        return
    raise ValueError(
        f"{what}. Make the optimizer when the model is ready (embeddings resized, layers unfrozen, "
        "adapters added or chosen; TRL adds them itself where it gets peft_config), or let Trainer "
        f"make it: {_SPEC}. What is not to be trained wants requires_grad_(False), or its absence "
        "from a list of parameters given to fastft.adamw"
    )


def gradients_are_lost(model: nn.Module, optimizer: Any) -> bool:
    """Whether a step would move nothing, since all gradients are those of parameters that an AdamW
    of fastft's does not have; a warning names them.

    Stock goes on without a word where a training chooses another adapter in its middle.
    """
    inner = engines.inner_optimizer(optimizer)
    if not isinstance(inner, AdamW) or engines.of_deepspeed(optimizer):
        return False
    held = [param for group in inner.param_groups for param in group["params"]]
    if any(param.grad is not None for param in held):
        return False
    known = set(map(id, held))
    lost = [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in known]
    if not lost:
        return False
    rest = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
    logger.warning(
        f"fastft: this step trains nothing: the {len(lost)} parameters with a gradient are not in "
        f"the optimizer: {', '.join(lost[:_NAMED])}{rest}. Was an adapter chosen (set_adapter), or "
        "added, after the optimizer was made? Make it while all that will be trained is trainable"
    )
    return True


def _check_settings(
    args: TrainingArguments, state: TrainerState, optimizer: AdamW, made: Origin
) -> None:
    """Raises where the optimizer has other values than `args`, and the user did not ask for them.

    The values are those of the constructor: a schedule changes the groups', and so does a
    checkpoint, with stock too.
    """
    of_args, defaults = origin.hyper_parameters(args), optimizer.defaults
    by_trainer = made.by_trainer
    unasked = [
        name
        for name in of_args
        if name not in made.given and not (by_trainer and name == "weight_decay")
    ]
    wrong = [name for name in unasked if defaults[name] != of_args[name]]
    if wrong:
        values = ", ".join(f"{name} {defaults[name]} for {of_args[name]}" for name in wrong)
        raise ValueError(
            f"fastft.{made.way} made an optimizer with other values than the Trainer's args have "
            f"now: {values}. Give it these very args; {_SPEC} reads them when training begins "
            "(TRL's trainers copy a plain TrainingArguments: give both the trainer's own kind). Or "
            f"say what you want: fastft.{made.way}(..., {wrong[0]}=...)"
        )
    asked = made.given.get("weight_decay") if by_trainer and state.global_step == 0 else None
    if asked is not None and asked not in [
        group["weight_decay"] for group in optimizer.param_groups
    ]:
        raise ValueError(
            f"fastft.{made.way} was given weight_decay={asked}, and Trainer made the groups with "
            f"the {args.weight_decay} of its args: set it in args: "
            f"TrainingArguments(weight_decay={asked})"
        )


def _check_freed_gradients(args: TrainingArguments, optimizer: AdamW) -> None:
    """Raises where somebody still needs gradients that are freed as backward makes them."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            hooks.check_place(param)
    check_args_for_freed_gradients(args, optimizer.release_gradients)
    trainer = trainings.current_trainer()
    if trainer is not None and not clipping.is_inside(trainer.accelerator):
        raise ValueError(
            "Trainer reads p.grad to clip and to log its norm, and AdamW frees gradients as "
            "backward makes them (offload='gradients' or 'overlap', release_gradients): call "
            "fastft.fuse_clipping(trainer) before train(), or let fastft.plug(trainer, ...) make "
            "the optimizer"
        )


def _check_clipping(args: TrainingArguments, optimizer: AdamW, flat: bool) -> None:
    """Raises where the norm would be of a part; warns of clipping twice."""
    if flat:
        raise ValueError(
            "the optimizer's max_grad_norm would clip to the norm of each process's part of the "
            "gradients, which DeepSpeed and FSDP1 cut into flat parts: use "
            "TrainingArguments(max_grad_norm=...)"
        )
    # else adamw or adamw_spec has said so already
    if args.max_grad_norm and (optimizer.origin is None or optimizer.origin.args is not args):
        logger.warning(
            f"fastft: gradients are clipped twice, to {args.max_grad_norm} by Trainer's args and "
            f"to {optimizer.max_grad_norm} by the optimizer: set max_grad_norm to 0 in args, or "
            "leave it out of the optimizer"
        )
