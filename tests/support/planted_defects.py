"""Ten ways in which an accelerator trains something else than stock, and what `compare` must call
them.

Each breaks a Trainer that `fastft.plug` has plugged, where it would be broken by a bug of ours: in
the loss, the collator, the optimizer, the clipping.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from fastft.data.keys import BOUNDARY_KEYS
from fastft.foreign.engines import inner_optimizer


class AtFirstStep(TrainerCallback):
    """Breaks a training once it has begun: behind all checks of train begin."""

    def __init__(self, breaks: Callable[[Any, Any], None]):
        self.breaks, self.broken = breaks, False

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.broken:
            self.breaks(kwargs["model"], inner_optimizer(kwargs["optimizer"]))
            self.broken = True


def at_first_step(breaks):
    return lambda trainer: trainer.add_callback(AtFirstStep(breaks))


def with_loss(loss: Callable[..., Any]):
    """Has the model compute its loss by `loss(labels, num_items, compute)`, where `compute` is
    stock's."""

    def breaks(trainer: Trainer) -> None:
        steps = trainer.args.gradient_accumulation_steps

        def loss_function(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
            def compute(labels, num_items, **more):
                return ForCausalLMLoss(logits, labels, vocab_size, num_items, **more)

            return loss(labels, num_items_in_batch, compute, steps)

        trainer.model.loss_function = loss_function

    return breaks


def learn_ignored_labels(labels, num_items, compute, steps):
    return compute(labels.masked_fill(labels == -100, 0), num_items)


def mean_of_means(labels, num_items, compute, steps):
    return compute(labels, None) / steps


def shift_twice(labels, num_items, compute, steps):
    return compute(
        labels, num_items, shift_labels=functional.pad(labels, (0, 2), value=-100)[:, 2:]
    )


@at_first_step
def leak(model, optimizer):
    def forget_boundaries(module, args, kwargs):
        kept = {key: value for key, value in kwargs.items() if key not in BOUNDARY_KEYS}
        kept["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None]
        return args, kept

    model.register_forward_pre_hook(forget_boundaries, with_kwargs=True, prepend=True)


@at_first_step
def decay_everything(model, optimizer):
    for group in optimizer.param_groups:
        group["weight_decay"] = max(group["weight_decay"] for group in optimizer.param_groups)


@at_first_step
def decay_norms_unseen(model, optimizer):
    """As above, and the groups do not show it."""

    def decay(optimizer, args, kwargs):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight.mul_(1 - 0.1 * optimizer.param_groups[0]["lr"])

    optimizer.register_step_pre_hook(decay)


@at_first_step
def move_less(model, optimizer):
    def lower(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            group["lr"] *= 0.8

    def raise_again(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            group["lr"] /= 0.8

    optimizer.register_step_pre_hook(lower)
    optimizer.register_step_post_hook(raise_again)


def drop_last_batch(trainer):
    trainer.args.dataloader_drop_last = True
    trainer.args.max_steps = 9  # as many as stock takes


@at_first_step
def train_another_tensor(model, optimizer):
    """The optimizer goes on with the tensor that it was made with."""
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight = nn.Parameter(attention.q_proj.weight.detach().clone())


@at_first_step
def draw_twice(model, optimizer):
    def draw(module, args, kwargs):
        if module.training:
            functional.dropout(torch.ones(64), 0.1)

    model.model.layers[0].self_attn.register_forward_pre_hook(draw, with_kwargs=True)


def clip_twice(trainer):
    """The optimizer scales gradients by the factor of clipping, and scales them once more."""

    def breaks(model, optimizer):
        clip = trainer.accelerator.clip_grad_norm_

        def twice(parameters, max_norm, *rest, **kwargs):
            norm = clip(parameters, max_norm, *rest, **kwargs)
            factor = float((max_norm / (norm + 1e-6)).clamp(max=1.0))
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            return optimizer.clip_at_step(grads, max_norm * factor)

        trainer.accelerator.clip_grad_norm_ = twice

    at_first_step(breaks)(trainer)


@dataclass(frozen=True)
class Defect:
    """What breaks the fast training, what `Finding.what` must say of it, and the settings of
    `recorded` with which both sides train."""

    breaks: Callable[[Trainer], None]
    named: str
    settings: dict[str, Any] = field(default_factory=dict)


PACKED = {"packing": "collate"}
DEFECTS = {
    "wrong ignore_index": Defect(with_loss(learn_ignored_labels), "ignored labels", PACKED),
    "mean of means": Defect(with_loss(mean_of_means), "gradient accumulation", PACKED),
    "leak between packed texts": Defect(leak, "leak between packed documents", PACKED),
    "decay on norms": Defect(decay_everything, "weight decay"),
    "decay on norms that the groups do not show": Defect(decay_norms_unseen, "weight decay"),
    "weights move too little": Defect(move_less, "size of updates"),
    "bf16 weights move too little": Defect(move_less, "size of updates", {"dtype": torch.bfloat16}),
    "dropped last batch": Defect(drop_last_batch, "batches"),
    "stale parameter": Defect(train_another_tensor, "stale parameter"),
    "wrong shift": Defect(with_loss(shift_twice), "shift of the labels", PACKED),
    "dropout drawn twice": Defect(draw_twice, "random numbers", {"dropout": 0.2}),
    "clipped twice": Defect(clip_twice, "clipping", {"max_grad_norm": 0.1}),
}
