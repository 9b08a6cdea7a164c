"""Trainer's gradient clipping inside the optimizer step.

Trainer clips through `accelerator.clip_grad_norm_`, which reads all gradients for their norm and
then reads and writes them to scale them, even by 1: 12 bytes for each fp32 element, beside the 28
of the step. Here it takes the norm (4 bytes), and `AdamW.step` scales the gradients in its
registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from fastft.foreign.engines import inner_optimizer
from fastft.foreign.objects import put_attributes
from fastft.optim.adamw import AdamW

# accelerate's names of what leaves every gradient on every process
_WHOLE_GRADIENTS = ("NO", "MULTI_CPU", "MULTI_GPU")


def can_be_inside(accelerator: Any) -> bool:
    """Whether clipping can be in the step: every process has every gradient, or the shards of
    FSDP2, whose norm is that of all."""
    whole = accelerator.distributed_type.value in _WHOLE_GRADIENTS
    return whole or bool(getattr(accelerator, "is_fsdp2", False))


def is_inside(accelerator: Any) -> bool:
    """Whether `fuse_clipping` has replaced the accelerator's."""
    clips = vars(accelerator).get("clip_grad_norm_")
    return clips is not None and clips.__module__ == __name__


def fuse_clipping(trainer: Any) -> Callable[[], None]:
    """Makes a Trainer clip inside AdamW's step: 32 bytes moved for each fp32 element, not 40.

        trainer = Trainer(model=model, args=args, optimizers=fastft.adamw(model, args), ...)
        fastft.fuse_clipping(trainer)

    The logged `grad_norm` and the update stay the same up to rounding. After clipping `p.grad`
    holds the gradients as they were before it; one that is changed between clipping and the step
    makes the step raise a RuntimeError. Where the optimizer is another one, the norm another one
    than the Euclidean of all its gradients, or gradients lie in flat parts (FSDP1, DeepSpeed),
    Trainer clips as ever. With `AdamW(offload="gradients")` the norm was taken in backward, and
    this is what Trainer needs to clip at all.

    Args:
        trainer: a `transformers.Trainer`, or any object with `accelerator` and `optimizer`. Only
            this instance's `trainer.accelerator.clip_grad_norm_` is replaced.

    Returns:
        A function which takes it off again.

    Raises:
        TypeError: `trainer` has no accelerator.
    """
    accelerator: Any = getattr(trainer, "accelerator", None)
    if not hasattr(accelerator, "clip_grad_norm_"):
        raise TypeError(
            f"trainer must be a transformers.Trainer, got {type(trainer).__name__} without an "
            "accelerator"
        )
    stock = accelerator.clip_grad_norm_
    made = inner_optimizer(getattr(trainer, "optimizer", None))
    if isinstance(made, AdamW):
        made.watch_gradients()

    def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:
        parameters = list(parameters)
        optimizer = inner_optimizer(trainer.optimizer)
        if isinstance(optimizer, AdamW) and can_be_inside(accelerator) and norm_type == 2:
            held = [param for group in optimizer.param_groups for param in group["params"]]
            ours = {id(param): param.grad for param in held if param.grad is not None}
            # all that it holds, and at least one
            if ours and ours.keys() == {id(p) for p in parameters if p.grad is not None}:
                accelerator.unscale_gradients()
                return optimizer.clip_at_step(list(ours.values()), float(max_norm))
        return stock(parameters, max_norm, norm_type=norm_type)

    return put_attributes(accelerator, clip_grad_norm_=clip_grad_norm_)
