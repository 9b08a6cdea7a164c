"""The fused loss on two processes (gloo): DDP, FSDP1, FSDP2; and under ZeRO-3's hooks, imitated in
one process.

All cases run in one pair of processes, because starting it costs more than the cases; each has a
test of its own.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import processes
from support.trainers import Curve, logged, quiet_arguments, tiny_llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fastft.integrations.fused_loss import FusedLossCallback
from fastft.loss.lazy.output_head import fused_loss

PROCESSES, V, S, STEPS = 2, 53, 12, 2
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}


def llama(**changes):
    return tiny_llama(V, **{**SIZES, **changes})


def batch(rank, step):
    generator = torch.Generator().manual_seed(17 * step + rank)
    ids = torch.randint(3, V, (2, S), generator=generator)
    labels = ids.clone()
    labels[:, : 2 + 5 * rank] = -100  # the processes count different numbers of labels
    return {"input_ids": ids, "labels": labels}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train_by_hand(model, inner, outside, fused):
    """Losses, the gradients of the last step, the report."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    with fused_loss(inner) if fused else contextlib.nullcontext() as report:
        for step in range(STEPS):
            optimizer.zero_grad()
            inputs = batch(dist.get_rank(), step)
            labels = inputs.pop("labels")
            if outside:
                logits = model(**inputs).logits[:, :-1].float()
                loss = nn.functional.cross_entropy(logits.reshape(-1, V), labels[:, 1:].reshape(-1))
            else:
                loss = model(**inputs, labels=labels).loss
            loss.backward()
            losses.append(loss.detach().float())
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            optimizer.step()
    return torch.stack(losses), [whole(gradient) for gradient in gradients], report


def compare(make, outside, tolerance=1e-5):
    """The report, where losses and gradients are stock's; `make` returns the model to call and the
    model to attach to."""
    stock, stock_gradients, _ = train_by_hand(*make(), outside, False)
    fused, gradients, report = train_by_hand(*make(), outside, True)
    torch.testing.assert_close(fused, stock, rtol=tolerance, atol=tolerance)
    assert len(gradients) == len(stock_gradients) > 0
    for mine, theirs in zip(gradients, stock_gradients, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=0, atol=2 * tolerance * max(theirs.abs().max().item(), 0.1)
        )
    assert not report.materialised
    return report


def fused(make, outside=False, tolerance=1e-5):
    """A loss inside forward, which any library of sharding and DDP can follow."""
    report = compare(make, outside, tolerance)
    assert report.fused == STEPS and not report.skipped


def stays_stock(make, reason="the loss is computed outside"):
    """A loss outside a sharded forward, or a head whose weight is gone by then."""
    report = compare(make, outside=reason.endswith("outside"))
    assert report.fused == 0 and reason in report.skipped[0]


def fsdp2(layout, policy=None, **config):
    model = llama(**config)
    body, head = model.model, model.lm_head
    options = {"mesh": init_device_mesh("cpu", (PROCESSES,))}
    if policy is not None:
        options["mp_policy"] = policy
    if layout != "one unit":
        for layer in body.layers:
            fully_shard(layer, **options)
    if layout == "head":
        fully_shard(head, **options)
    tail = (
        [body.norm, body.embed_tokens, head]
        if config.get("tie_word_embeddings")
        else [body.norm, head]
    )
    if layout == "tail":  # accelerate's
        fully_shard(tail, reshard_after_forward=False, **options)
    if layout == "tail resharded":
        fully_shard(tail, reshard_after_forward=True, **options)
    fully_shard(
        model, **options, **({"reshard_after_forward": True} if layout == "root resharded" else {})
    )
    return model, model


def fsdp1(use_orig_params, attach_inside=False):
    inner = llama()
    wrap = ModuleWrapPolicy({LlamaDecoderLayer})
    model = FullyShardedDataParallel(
        inner, auto_wrap_policy=wrap, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    return model, inner if attach_inside else model


def ddp(**options):
    model = llama()
    return DistributedDataParallel(model, **options), model


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
FSDP2 = {
    **{layout: partial(fsdp2, layout) for layout in ("one unit", "root", "head", "tail")},
    "root resharded": partial(fsdp2, "root resharded"),
    "tied": partial(fsdp2, "root", tie_word_embeddings=True),
}
FSDP1 = {
    "whole": partial(fsdp1, False),
    "use_orig_params": partial(fsdp1, True),
    "inner model": partial(fsdp1, True, True),
}
SHARDED = {
    **{f"fsdp2 {name}": make for name, make in FSDP2.items()},
    **{f"fsdp1 {name}": make for name, make in FSDP1.items()},
}
FUSED = {
    **{name: partial(fused, make) for name, make in SHARDED.items()},
    "fsdp2 tied tail": partial(fused, partial(fsdp2, "tail", tie_word_embeddings=True)),
    "fsdp2 bf16": partial(fused, partial(fsdp2, "root", BF16), tolerance=1e-2),
    "fsdp2 bf16 head": partial(fused, partial(fsdp2, "head", BF16), tolerance=1e-2),
    "ddp": partial(fused, partial(ddp, find_unused_parameters=True)),
    "ddp loss outside": partial(fused, partial(ddp, find_unused_parameters=True), True),
    "ddp static graph": partial(fused, partial(ddp, static_graph=True)),
}
STOCK = {
    **{f"{name}, loss outside": partial(stays_stock, make) for name, make in SHARDED.items()},
    "fsdp2 tail resharded": partial(
        stays_stock, partial(fsdp2, "tail resharded"), "shares an FSDP2 unit"
    ),
}


def on_both(**changes):
    """Arguments of a Trainer on the processes that are there."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(PROCESSES)}
    # accelerate asks for them; the group is there
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    batches = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "seed": 1}
    return quiet_arguments("unused", **batches, **changes)


def examples(count):
    return [
        {key: value[0] for key, value in batch(index % 2, index).items()} for index in range(count)
    ]


def trainer_run(callbacks, **changes):
    curve, options = Curve(), on_both(max_steps=3, learning_rate=1e-3, **changes)
    trainer = Trainer(llama(), options, train_dataset=examples(16), callbacks=[curve, *callbacks])
    trainer.train()
    assert options.world_size == PROCESSES
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert trainer.model_wrapped.find_unused_parameters
    return curve


def compare_trainers(**changes):
    stock = trainer_run([], **changes)
    callback = FusedLossCallback()
    fused = trainer_run([callback], **changes)
    assert fused.losses == pytest.approx(stock.losses, rel=1e-6) and len(stock.losses) == 3
    assert fused.norms == pytest.approx(stock.norms, rel=1e-5)
    report = callback.report
    assert report.fused >= 3 and not report.materialised and not report.skipped


TRAINERS = {
    "plain": compare_trainers,
    "accumulation": partial(compare_trainers, gradient_accumulation_steps=2),
    "tokens of all processes": partial(
        compare_trainers, gradient_accumulation_steps=2, average_tokens_across_devices=True
    ),
    "tokens of each process": partial(
        compare_trainers, gradient_accumulation_steps=2, average_tokens_across_devices=False
    ),
    "label smoothing": partial(compare_trainers, label_smoothing_factor=0.1),
}


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    return {
        key: torch.stack(
            [nn.functional.pad(row[key], (0, longest - len(row[key])), value=value) for row in rows]
        )
        for key, value in fill.items()
    }


def evaluated(callbacks, preprocess, **changes):
    """What metrics are given in two evaluations of batches that are not equally long on the two
    processes."""
    rows = examples(15)
    uneven = [
        {key: value[: 9 - index % 5] for key, value in row.items()}
        for index, row in enumerate(rows[:7])
    ]
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    options = on_both(max_steps=1, per_device_eval_batch_size=2, **evaluation, **changes)
    given = []

    def metrics(prediction):
        given.append((prediction.predictions, prediction.label_ids))
        return {"sum": float(prediction.predictions.sum())}

    trainer = Trainer(
        llama(),
        options,
        train_dataset=rows,
        eval_dataset=uneven,
        data_collator=padded,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=preprocess,
        callbacks=callbacks,
    )
    trainer.train()
    return logged(trainer, "eval_loss"), given


def compare_evaluations(preprocess, **changes):
    losses, expected = evaluated([], preprocess, **changes)
    callback = FusedLossCallback()
    found, actual = evaluated([callback], preprocess, **changes)
    assert (
        found == pytest.approx(losses, rel=1e-5) and len(found) == len(actual) == len(expected) == 2
    )
    for mine, theirs in zip(actual, expected, strict=True):
        for ours, stock in zip(mine, theirs, strict=True):
            assert ours.shape == stock.shape and ours.dtype == stock.dtype and len(ours) == 7
            np.testing.assert_allclose(ours, stock, rtol=1e-4, atol=1e-5)
    report = callback.evaluation
    assert report.fused and not report.skipped
    assert bool(report.materialised) == (preprocess is None)


def token_log_probs(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


EVALUATIONS = {
    "argmax": partial(compare_evaluations, lambda logits, labels: logits.argmax(-1)),
    "topk": partial(compare_evaluations, lambda logits, labels: logits.topk(3).indices),
    "log-probabilities": partial(compare_evaluations, token_log_probs, label_smoothing_factor=0.1),
    "logits": partial(compare_evaluations, None),
}
CASES = {**FUSED, **STOCK, **TRAINERS, **EVALUATIONS}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return processes.run(__name__, PROCESSES, tmp_path_factory)


@pytest.mark.parametrize("name", FUSED)
def test_a_loss_inside_forward_is_fused_and_stock(outcomes, name):
    assert outcomes[name] == [""] * PROCESSES


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.way("FSDP, a loss outside the model's forward", loss="stock")
            if name.endswith("loss outside")
            else (),
        )
        for name in STOCK
    ],
)
def test_what_a_sharding_library_would_not_notice_stays_stock_and_says_so(outcomes, name):
    assert outcomes[name] == [""] * PROCESSES


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_on_two_processes(outcomes, name):
    assert outcomes[name] == [""] * PROCESSES


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_on_two_processes_whose_batches_are_not_equally_long(outcomes, name):
    assert outcomes[name] == [""] * PROCESSES


class CalledInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, module, tensor):
        ctx.call = function, module
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient):
        function, module = ctx.call
        function(module)
        return None, None, gradient


class Zero3:
    """What DeepSpeed's hooks do: a parameter is empty, but inside the forward and the backward of
    its own module."""

    def __init__(self, model):
        self.full, self.gathers, self.gradients = {}, {}, {}
        for index, parameter in enumerate(model.parameters()):
            parameter.ds_id = index
            self.full[parameter] = parameter.data.clone()
            parameter.data = torch.empty(0)
            parameter.register_post_accumulate_grad_hook(self.reduce)
        for module in model.modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_pre_hook(self.before)
                module.register_forward_hook(self.after)

    def gather(self, module):
        self.gathers[module] = self.gathers.get(module, 0) + 1
        for parameter in module.parameters(recurse=False):
            parameter.data = self.full[parameter]

    def release(self, module):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    def before(self, module, args):
        self.gather(module)
        return tuple(
            CalledInBackward.apply(self.release, module, arg) if arg.requires_grad else arg
            for arg in args
        )

    def after(self, module, args, output):
        self.release(module)
        return (
            CalledInBackward.apply(self.gather, module, output) if output.requires_grad else output
        )

    def reduce(self, parameter):
        self.gradients[parameter] = self.gradients.get(parameter, 0) + parameter.grad
        parameter.grad = None

    def step(self):
        gradients = [gradient.clone() for gradient in self.gradients.values()]
        for parameter, gradient in self.gradients.items():
            self.full[parameter] -= 0.5 * gradient
            parameter.data = torch.empty(0)
        self.gradients = {}
        return gradients


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_under_zero3_the_head_is_entered_for_its_weight(tied, outside):
    curves = []
    for fused in (False, True):
        model = llama(tie_word_embeddings=tied)
        zero3, curve = Zero3(model), []
        with fused_loss(model) if fused else contextlib.nullcontext() as report:
            for step in range(STEPS):
                inputs = batch(0, step)
                labels = inputs["labels"]
                if outside:
                    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
                    loss = nn.functional.cross_entropy(
                        logits.reshape(-1, V), labels[:, 1:].reshape(-1)
                    )
                else:
                    loss = model(**inputs).loss
                assert model.lm_head.weight.numel() == 0
                loss.backward()
                curve += [loss.detach(), *zero3.step()]
        curves.append(curve)
    for mine, theirs in zip(curves[1], curves[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert report.fused == (0 if outside else STEPS) and not report.materialised
    assert zero3.gathers[model.lm_head] == (2 if outside else 3) * STEPS
    assert ("sharded by ZeRO-3" in report.skipped[0]) if outside else not report.skipped


def test_logits_of_a_sharded_head_cannot_be_used_after_forward():
    model = llama()
    Zero3(model)
    with fused_loss(model):
        logits = model(**batch(0, 0)).logits
        with pytest.raises(RuntimeError, match="sharded by ZeRO-3; with labels given"):
            logits[:, -1].logsumexp(-1)
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"sharded by ZeRO-3"):
            # an optimizer step may have changed the weight that the head would gather
            logits.argmax(-1)
        model(**batch(0, 1))
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"sharded by ZeRO-3"):
            logits[:, 1:]
    assert not model._forward_hooks and not model._forward_pre_hooks
