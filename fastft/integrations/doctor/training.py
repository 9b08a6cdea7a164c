"""What `python -m fastft doctor` says of a training's arguments, weights and optimizer.

A check gets a `Sample`, whose trainer has them all; what looks at batches is in
`batches.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import SchedulerType
from transformers.training_args import ParallelMode

from fastft.data.keys import IGNORE_INDEX
from fastft.foreign.engines import deepspeed_config, engine_of, inner_optimizer, replaces_optimizers
from fastft.integrations.doctor.batches import Sample
from fastft.integrations.doctor.finding import Finding
from fastft.integrations.doctor.machine import slowness
from fastft.integrations.processes_apart import processes_apart
from fastft.loss.head_gemms import is_emulated
from fastft.optim.adamw import AdamW

_LOOKED_AT = 4096  # elements of each weight
_WITHOUT_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU)


def updates_that_round_to_nothing(sample: Sample) -> Finding | None:
    """bf16 weights are trained by an Adam that keeps nothing of what rounding drops."""
    trainer = sample.trainer
    rate = trainer.args.learning_rate
    weights = list(_trained(sample, torch.bfloat16))
    if not weights or engine_of(trainer.args) or not _rounds_to_nearest(sample):
        return None
    parts = [weight.detach().flatten()[:_LOOKED_AT].float() for weight in weights]
    values = torch.cat([part.cpu() for part in parts])
    kept = values.bfloat16()
    lost = ((values + rate).bfloat16() == kept) & ((values - rate).bfloat16() == kept)
    share = float(lost.float().mean())
    if share < 0.05:
        return None
    return Finding(
        "wrong",
        f"The weights are bf16, and at learning_rate={rate:g} an update of {share:.0%} of them "
        "rounds to nothing.",
        "AdamW moves a weight by about the learning rate; these have no neighbour that near, and "
        "stay as they are, step after step.",
        "fastft.adamw(model, args) keeps the bits that rounding drops (the trajectory of fp32); or "
        "load with dtype=torch.float32 and train with bf16=True.",
    )


def weights_of_fp16(sample: Sample) -> Finding | None:
    """Weights that are trained are fp16, which no gradient scaler takes."""
    if not any(True for _ in _trained(sample, torch.float16)):
        return None
    scaled = sample.trainer.args.fp16
    return Finding(
        "wrong",
        f"The weights that are trained are float16, and fp16={scaled}.",
        'The gradient scaler raises "Attempting to unscale FP16 gradients" at the first step.'
        if scaled
        else "No scaler keeps gradients below 6e-8 from vanishing, and updates round to nothing.",
        "Load with dtype=torch.float32, and train with fp16=True (or bf16=True); of an adapter it "
        "is enough that its own weights are float32.",
    )


def parameters_without_an_optimizer(sample: Sample) -> Finding | None:
    """The optimizer that Trainer was given does not hold what is trainable."""
    trainer = sample.trainer
    if trainer.optimizer is None or engine_of(trainer.args):
        return None
    groups = inner_optimizer(trainer.optimizer).param_groups
    held = {id(parameter) for group in groups for parameter in group["params"]}
    trained = list(_trained(sample))
    missing = sum(id(parameter) not in held for parameter in trained)
    if not missing:
        return None
    return Finding(
        "wrong",
        f"{missing} of {len(trained)} trainable parameters are not in the optimizer that Trainer "
        "was given.",
        "They stay as they are: the model has changed since the optimizer was made (an adapter, "
        "resized embeddings), or the optimizer is another model's.",
        "Make the optimizer last, or let Trainer make it: "
        "optimizer_cls_and_kwargs=fastft.adamw_spec(args).",
    )


def accumulation_not_divided(sample: Sample) -> Finding | None:
    """Trainer leaves the division by all labels of a step to a model that does not divide."""
    trainer = sample.trainer
    steps = trainer.args.gradient_accumulation_steps
    if (
        steps == 1
        or not trainer.model_accepts_loss_kwargs
        or trainer.compute_loss_func is not None
        or trainer.label_smoother is not None
        or type(trainer).compute_loss is not Trainer.compute_loss
        or not sample.batches
        or "labels" not in sample.batches[0]
    ):
        return None
    labels = int((sample.batches[0]["labels"] != IGNORE_INDEX).sum())
    once, twice = (_loss(sample.adapted, sample.batches[0], labels * times) for times in (1, 2))
    if not once or once != twice:
        return None
    return Finding(
        "wrong",
        f"{type(sample.model).__name__} ignores num_items_in_batch, and Trainer relies on it "
        f"(gradient_accumulation_steps={steps}).",
        f"Gradients and logged losses are {steps} times too large: the losses of {steps} "
        "micro-batches are added, and nobody divides.",
        "Set model.accepts_loss_kwargs = False before Trainer is made; or give it a "
        "compute_loss_func that divides.",
    )


def clipping_that_clips_nothing(sample: Sample) -> Finding | None:
    """A layerwise optimizer has used its gradients up before Trainer clips them."""
    args = sample.trainer.args
    name = str(getattr(args.optim, "value", args.optim))
    if sample.trainer.optimizer is not None or not args.max_grad_norm:
        return None
    if not name.endswith("layerwise"):
        return None
    return Finding(
        "wrong",
        f"optim={name!r} takes its steps inside backward, and max_grad_norm={args.max_grad_norm} "
        "clips nothing.",
        "Trainer clips gradients that are gone by then, without a word.",
        "max_grad_norm=0 says what happens; the optimizer that is not layerwise clips.",
    )


def betas_that_deepspeed_drops(sample: Sample) -> Finding | None:
    """accelerate makes DeepSpeedCPUAdam with default betas and eps."""
    args = sample.trainer.args
    config = deepspeed_config(args)
    if config is None or not replaces_optimizers(config):
        return None
    if (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8):
        return None
    return Finding(
        "wrong",
        "The optimizer is offloaded, for which accelerate makes DeepSpeedCPUAdam without "
        f"adam_beta1={args.adam_beta1}, adam_beta2={args.adam_beta2}, "
        f"adam_epsilon={args.adam_epsilon:g}.",
        "It trains with betas (0.9, 0.999) and eps 1e-8.",
        'Give DeepSpeed\'s configuration an "optimizer" section of its own with these values.',
    )


def warmup_that_never_ends(sample: Sample) -> Finding | None:
    """The learning rate is still rising when the training ends."""
    args, steps = sample.trainer.args, sample.steps
    own = sample.trainer.lr_scheduler is not None
    if own or steps is None or args.lr_scheduler_type in _WITHOUT_WARMUP:
        return None
    warmup = args.get_warmup_steps(steps)
    if warmup <= steps:
        return None
    return Finding(
        "wrong",
        f"The learning rate warms up for {warmup} steps, and the training has {steps}.",
        f"It ends at {steps / warmup:.0%} of learning_rate={args.learning_rate:g}, which is never "
        "reached.",
        "warmup_steps=0.03, say: a number below 1 is a share of the steps.",
    )


def one_process_for_several_gpus(sample: Sample) -> Finding | None:
    """Several GPUs are driven by one process, with DataParallel."""
    args = sample.trainer.args
    if args.n_gpu < 2 or args.parallel_mode != ParallelMode.NOT_DISTRIBUTED:
        return None
    return Finding(
        "slow",
        f"One process drives {args.n_gpu} GPUs (torch.nn.DataParallel).",
        "It copies the model to each GPU in each step, and gathers outputs, logits too, on one.",
        f"torchrun --nproc_per_node {args.n_gpu} script.py; or CUDA_VISIBLE_DEVICES=0 for one GPU.",
    )


def processes_that_train_alone(sample: Sample) -> Finding | None:
    """A launcher has started several processes, and each trains a model of its own."""
    apart = processes_apart(sample.trainer.args.world_size)
    return None if apart is None else Finding("wrong", *apart)


def fp32_products_without_tf32(sample: Sample) -> Finding | None:
    """fp32 products leave the tensor cores of a GPU idle."""
    args = sample.trainer.args
    if args.device.type != "cuda" or args.bf16 or args.fp16 or args.tf32:
        return None
    fp32 = any(True for _ in _trained(sample, torch.float32))
    old = torch.cuda.get_device_capability(args.device) < (8, 0)
    if not fp32 or old or torch.get_float32_matmul_precision() != "highest":
        return None
    return Finding(
        "slow",
        "The model is trained in fp32 without TF32 on a GPU that has it.",
        "Products of matrices take several times as long as on its tensor cores (on an A100 "
        "19.5 TFLOP/s instead of 156).",
        "bf16=True, or tf32=True (products keep 10 bits of each factor).",
    )


def half_precision_emulated(sample: Sample) -> Finding | None:
    """16-bit products on a processor that has no instructions for them."""
    args = sample.trainer.args
    for dtype, asked in ((torch.bfloat16, args.bf16), (torch.float16, args.fp16)):
        used = asked or any(True for _ in _trained(sample, dtype))
        if used and is_emulated(dtype, args.device.type):
            return Finding(
                "slow",
                f"The training computes in {dtype}, which this processor has no instructions for.",
                f"A product of matrices takes {slowness(dtype):.1f} times as long as in fp32 "
                "(measured now).",
                "Train in fp32 on this CPU: neither bf16=True nor fp16=True nor such weights.",
            )
    return None


def debugging_left_on(sample: Sample) -> Finding | None:
    """A switch for debugging slows every step."""
    args = sample.trainer.args
    switches = {
        "torch.autograd.set_detect_anomaly": torch.is_anomaly_enabled(),
        "CUDA_LAUNCH_BLOCKING": args.device.type == "cuda"
        and os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0",
        'debug="underflow_overflow"': "underflow_overflow"
        in map(lambda option: str(getattr(option, "value", option)), args.debug),
    }
    on = [name for name, is_on in switches.items() if is_on]
    if not on:
        return None
    return Finding(
        "slow",
        f"Switched on for debugging: {', '.join(on)}.",
        "Each operation is checked, or waited for.",
        "Switch it off when the fault is found.",
    )


TRAINING = (
    updates_that_round_to_nothing,
    weights_of_fp16,
    parameters_without_an_optimizer,
    accumulation_not_divided,
    clipping_that_clips_nothing,
    betas_that_deepspeed_drops,
    warmup_that_never_ends,
    one_process_for_several_gpus,
    processes_that_train_alone,
    fp32_products_without_tf32,
    half_precision_emulated,
    debugging_left_on,
)


def _trained(sample: Sample, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """The trainable parameters; with `dtype`, those of it."""
    for parameter in sample.adapted.parameters():
        if parameter.requires_grad and dtype in (None, parameter.dtype):
            yield parameter


def _rounds_to_nearest(sample: Sample) -> bool:
    """Whether the optimizer is an Adam or Lion, whose steps are about the learning rate, and rounds
    new weights to the nearest."""
    trainer = sample.trainer
    if trainer.optimizer is not None:
        optimizer: Any = inner_optimizer(trainer.optimizer)
        kind, rounding = type(optimizer), optimizer.param_groups[0].get("rounding")
    else:
        given = trainer.optimizer_cls_and_kwargs
        kind, options = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, sample.adapted)
        rounding = options.get("rounding", "exact")
    if isinstance(kind, type) and issubclass(kind, AdamW):
        return rounding == "nearest"
    return any(word in kind.__name__ for word in ("Adam", "Lion")) and "Stable" not in kind.__name__


@torch.no_grad()
def _loss(model: PreTrainedModel, batch: dict[str, Tensor], num_items: int) -> float:
    """The model's own loss of a batch, in evaluation mode."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items()}
    training = model.training
    model.eval()
    try:
        return float(model(**inputs, num_items_in_batch=torch.tensor(num_items)).loss)
    finally:
        model.train(training)
