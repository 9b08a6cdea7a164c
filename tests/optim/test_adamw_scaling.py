"""Gradients that are scaled on their way into the step: clipping, GradScaler, accelerate."""

from __future__ import annotations

import pytest
import torch
from support.adamw_steps import ENGINES, equal, gradients, start, states, train
from torch.nn import Parameter

from fastft.optim.adamw import AdamW

SHAPES = [(507,), (64, 3), (0,)]


def test_clipping_spans_groups_dtypes_and_missing_gradients():
    wide, narrow, idle = (
        Parameter(torch.ones(10)),
        Parameter(torch.ones(10).bfloat16()),
        Parameter(torch.ones(3)),
    )
    optimizer = AdamW(
        [{"params": [wide, idle]}, {"params": [narrow], "lr": 0.1}], max_grad_norm=1.0
    )
    wide.grad, narrow.grad = torch.full((10,), 3.0), torch.full((10,), 4.0).bfloat16()
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(250**0.5)
    assert float(optimizer.state[narrow]["exp_avg"][0]) == pytest.approx(
        0.1 * 4 / 250**0.5, rel=1e-4
    )


def test_clip_at_step_clips_once_and_wins_over_max_grad_norm():
    (param,) = start([(64,)])
    param.grad = torch.ones(64)
    optimizer = AdamW([param], max_grad_norm=1e-3)
    assert optimizer.clip_at_step([param.grad], 0.8) == 8
    optimizer.step()
    assert float(optimizer.state[param]["exp_avg"][0]) == pytest.approx(0.1 * 0.1, rel=1e-4)
    optimizer.max_grad_norm = None
    optimizer.step()  # the norm above was for one step
    assert float(optimizer.state[param]["exp_avg"][0]) == pytest.approx(0.9 * 0.01 + 0.1, rel=1e-4)


@pytest.mark.parametrize("change", ["in place", "replaced", "missing"])
def test_a_gradient_changed_after_clip_at_step_is_an_error(change):
    (param,) = start([(64,)])
    param.grad = torch.ones(64)
    optimizer, before = AdamW([param, Parameter(torch.ones(1))]), param.detach().clone()
    optimizer.param_groups[0]["params"][1].grad = torch.ones(1)
    optimizer.clip_at_step([p.grad for p in optimizer.param_groups[0]["params"]], 1.0)
    if change == "in place":
        param.grad.mul_(2)
    else:
        param.grad = None if change == "missing" else param.grad.clone()
    with pytest.raises(RuntimeError, match="changed between clipping and the step"):
        optimizer.step()
    assert torch.equal(param, before)
    optimizer.step()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clipping_a_gradient_that_is_not_finite_does_what_torch_does(impl, bad):
    results = []
    for fused in (True, False):
        (param,) = start([(64,)])
        param.grad = torch.ones(64)
        param.grad[7] = bad
        optimizer = AdamW([param], max_grad_norm=1.0 if fused else None, impl=impl)
        if not fused:
            torch.nn.utils.clip_grad_norm_([param], 1.0)
        optimizer.step()
        results.append(param.detach())
    equal(results[:1], results[1:])


def test_a_skipped_step_does_not_advance_accelerates_schedule():
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)  # AcceleratedOptimizer asks it for its state
    (param,) = start([(64,)])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    optimizer = AdamW([param], lr=1.0)
    # it wraps step() as well
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    for i in range(3):
        param.grad = torch.full((64,), float("inf") if i == 1 else 1024.0)
        wrapped.step()
        assert wrapped.step_was_skipped == (i == 1)
        if not wrapped.step_was_skipped:
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25 and float(optimizer.state[param]["step"]) == 2
    assert optimizer._step_supports_amp_scaling


def test_capturable_does_nothing_on_a_cpu():
    grads = gradients(SHAPES, 3)
    results = [
        train(AdamW(start(SHAPES), capturable=capturable), grads) for capturable in (True, False)
    ]
    equal(*results)


def test_a_compiled_training_step():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 3) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    inputs, results = torch.randn(5, 4), []
    for layer, compiled in zip(layers, (True, False), strict=True):
        optimizer = AdamW(layer.parameters(), lr=0.1)

        def train_step(layer=layer, optimizer=optimizer):
            optimizer.zero_grad()
            loss = layer(inputs).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(train_step, backend="eager") if compiled else train_step
        results.append([run().item() for _ in range(3)])
        assert [float(step) for step in states(optimizer, "step")] == [3.0, 3.0]
    assert results[0] == results[1]
