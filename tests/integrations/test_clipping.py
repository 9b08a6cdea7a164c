"""fuse_clipping: Trainer's clipping inside the step."""

from __future__ import annotations

import pytest
import torch
from support.adamw_trainers import arguments, biased_llama, examples
from support.trainers import logged

import fastft

transformers = pytest.importorskip("transformers")


class Watcher(transformers.TrainerCallback):
    """Keeps the gradients' version counters after clipping, and what the parameters became."""

    def __init__(self):
        self.versions, self.steps = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.versions.append(sum(param.grad._version for param in model.parameters()))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append([param.detach().clone() for param in model.parameters()])


def run(folder, fuse, dtype=torch.float32, **options):
    args, model, watcher = arguments(folder, max_steps=5, **options), biased_llama(dtype), Watcher()
    trainer = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=examples(),
        optimizers=fastft.adamw(model, args),
        callbacks=[watcher],
    )
    if fuse:
        fastft.fuse_clipping(trainer)
    trainer.train()
    return logged(trainer, "grad_norm"), watcher


@pytest.mark.parametrize("max_grad_norm", [0.1, 1e6, 0.0])
def test_trainer_logs_and_learns_the_same(max_grad_norm, tmp_path):
    norms, fused = run(tmp_path, True, max_grad_norm=max_grad_norm)
    stock_norms, stock = run(tmp_path, False, max_grad_norm=max_grad_norm)
    assert len(norms) == 5 and norms == pytest.approx(stock_norms, rel=1e-5)
    assert sum(fused.versions) < sum(stock.versions)  # nobody multiplied the gradients
    for params, expected in zip(fused.steps, stock.steps, strict=True):
        for param, other in zip(params, expected, strict=True):
            torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


def test_accumulation_and_bf16(tmp_path):
    options = {
        "dtype": torch.bfloat16,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "bf16": True,
    }
    norms, fused = run(tmp_path, True, **options)
    stock_norms, stock = run(tmp_path, False, **options)
    assert norms == pytest.approx(stock_norms, rel=1e-2)  # stock rounds its norms to bf16
    assert sum(fused.versions) < sum(stock.versions)


class Changes(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        next(model.parameters()).grad.mul_(2.0)


def trainer_with(tmp_path, **options):
    args, model = arguments(tmp_path, max_steps=2), biased_llama()
    optimizers = options.pop("optimizers", None) or fastft.adamw(model, args)
    return transformers.Trainer(
        model=model, args=args, train_dataset=examples(), optimizers=optimizers, **options
    )


def test_a_gradient_changed_after_the_norm_is_noticed(tmp_path):
    trainer = trainer_with(tmp_path, callbacks=[Changes()])
    restore = fastft.fuse_clipping(trainer)
    with pytest.raises(RuntimeError, match="changed between clipping and the step"):
        trainer.train()
    restore()
    trainer.train()


def test_other_parameters_and_optimizers_are_clipped_as_ever(tmp_path):
    trainer = trainer_with(tmp_path)
    trainer.create_optimizer()
    fastft.fuse_clipping(trainer)
    param, other = next(trainer.model.parameters()), torch.nn.Parameter(torch.ones(4))
    clip = trainer.accelerator.clip_grad_norm_
    for parameters, norm_type in (([other], 2), ([param, other], 2), ([param], 1)):
        param.grad, other.grad = torch.ones_like(param), torch.ones_like(other)
        clip(iter(parameters), 0.5, norm_type=norm_type)
        assert torch.linalg.vector_norm(parameters[-1].grad, norm_type) <= 0.5
    trainer.optimizer = torch.optim.SGD([param], lr=0.1)
    param.grad = torch.ones_like(param)
    clip([param], 0.5)
    assert param.grad.norm() == pytest.approx(0.5, rel=1e-4)


def test_no_trainer():
    with pytest.raises(TypeError, match="Trainer"):
        fastft.fuse_clipping(torch.nn.Linear(2, 2))
