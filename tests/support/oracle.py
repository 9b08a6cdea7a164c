"""What the losses mean, in plain torch: the truth in float64, and torch's own error in the dtype
under test."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# every option, alone and with those it meets; "weight" stands for random class weights
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "smoothing_only": {"label_smoothing": 1.0},
    "weight": {"weight": True},
    "weight_smoothing": {"weight": True, "label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "z_loss_weight": {"z_loss": 0.01, "weight": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 5.0},
    "all": {
        "softcap": 3.0,
        "logit_scale": 0.5,
        "z_loss": 0.02,
        "label_smoothing": 0.1,
        "weight": True,
    },
}


def options_with_weight(options: dict, classes: int) -> dict:
    """The options with a weight per class, one of them 0, in place of True."""
    if "weight" not in options:
        return options
    weight = torch.rand(classes)
    weight[classes // 2] = 0.0
    return options | {"weight": weight}


def capped(logits, softcap=None, logit_scale=1.0):
    z = logits * logit_scale if logit_scale != 1.0 else logits
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def cross_entropy(
    logits,
    target,
    *,
    weight=None,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=None,
    logit_scale=1.0,
    z_loss=0.0,
):
    """Of logits (T, V) or (V,), in their dtype."""
    z = capped(logits, softcap, logit_scale)
    weight = None if weight is None else weight.to(z.dtype)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(z, target.long(), weight, reduction=reduction, **options)
    if not z_loss:
        return loss
    counted = target != ignore_index
    squares = z_loss * torch.where(counted, z.logsumexp(-1), 0.0).square()
    if reduction == "none":
        return loss + squares
    return loss + (squares.sum() if reduction == "sum" else squares.sum() / counted.sum())


def soft_cross_entropy(
    logits,
    probabilities,
    *,
    weight=None,
    reduction="mean",
    label_smoothing=0.0,
    softcap=None,
    logit_scale=1.0,
    z_loss=0.0,
):
    """Of logits (T, V) or (T, V, d) and a distribution for each row, in their dtype."""
    z = capped(logits, softcap, logit_scale)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    weight = None if weight is None else weight.to(z.dtype)
    loss = F.cross_entropy(z, probabilities.to(z.dtype), weight, **options)
    squares = z_loss * z.logsumexp(1).square()
    return loss + {"none": squares, "sum": squares.sum(), "mean": squares.mean()}[reduction]


def log_probs(logits, target, *, ignore_index=-100, softcap=None, logit_scale=1.0):
    """Of logits (T, V): log_probs, entropy, lse and is_top1, one a row."""
    z = capped(logits, softcap, logit_scale)
    counted = target != ignore_index
    index = torch.where(counted, target, 0).long()[:, None]
    log_p = z.log_softmax(1)
    # filled before the product, whose gradient would be 0 times Inf
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)
    top = (z.argmax(1) == index[:, 0]) & counted
    return (
        *(
            torch.where(counted, r, 0.0)
            for r in (log_p.gather(1, index)[:, 0], entropy, z.logsumexp(1))
        ),
        top,
    )
