"""Gradients that are scaled on their way into the step: clipping, GradScaler, accelerate."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.adamw_steps import (
    ENGINES,
    equal,
    gradients,
    needs_native,
    snapshot,
    start,
    states,
    train,
)
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.optim.adamw import AdamW
from fastft.optim.adamw_part import Part

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


class Counted(TorchDispatchMode):
    """How often each of fastft's operators is called within it."""

    def __enter__(self):
        self.names = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name()] += func.namespace == "fastft"
        return func(*args, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1, 1e30, float("inf")])
@pytest.mark.parametrize("size", [1, 63, 507, 40_000])
def test_a_norm_taken_by_the_update_has_the_bits_of_one_taken_before(size, max_norm, monkeypatch):
    def trained(by_update):
        monkeypatch.setattr(Part, "takes_norms", by_update)
        torch.manual_seed(0)
        shapes = [(size,), (3, 5), (0,), (2, size)]
        params = [Parameter(torch.randn(shape)) for shape in shapes]
        params += [Parameter(torch.randn(shape).bfloat16()) for shape in shapes]
        optimizer, norms = AdamW(params, max_grad_norm=max_norm, seed=1, impl="cpp"), []
        for scale in (1e-6, 1.0, 1e6):
            for param in params:
                param.grad = torch.randn_like(param) * scale
            with Counted() as calls:
                optimizer.step()
            assert calls.names["fastft::adamw_clipped_"] == by_update
            assert calls.names["fastft::grad_norm_squared_"] == (not by_update)
            norms.append(optimizer.grad_norm)
            oracle = sum(param.grad.double().square().sum() for param in params).sqrt()
            torch.testing.assert_close(norms[-1].double(), oracle, rtol=2e-7, atol=0)
        return [*(value for kept in snapshot(optimizer) for value in kept.values()), *norms]

    equal(trained(True), trained(False))


CLIPPED_BY_PARTS = {
    "a parameter of another layout": "channels_last",
    "a gradient of another layout": "strides",
    "a norm that is a tensor": "tensor",
    "a loss scale": "scale",
    "plain torch": "eager",
}


@needs_native
@pytest.mark.parametrize("case", CLIPPED_BY_PARTS.values(), ids=CLIPPED_BY_PARTS)
def test_what_the_update_cannot_clip_is_clipped_before(case):
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        layout = torch.channels_last if case == "channels_last" else torch.contiguous_format
        params = [Parameter(torch.randn(2, 3, 4, 5).to(memory_format=layout)) for _ in range(2)]
        optimizer = (
            AdamW(params, impl="eager" if case == "eager" else "auto")
            if ours
            else torch.optim.AdamW(params)
        )
        for _ in range(2):
            for param in params:
                param.grad = torch.randn_like(param) * 9
                if case == "strides":
                    param.grad = param.grad.mT.contiguous().mT
            if ours:
                norm = torch.tensor(0.5) if case == "tensor" else 0.5
                optimizer.max_grad_norm = norm
                if case == "scale":
                    for param in params:
                        param.grad.mul_(64)
                    optimizer.grad_scale = torch.tensor(64.0)
            else:
                torch.nn.utils.clip_grad_norm_(params, 0.5)
            optimizer.step()
        results.append([param.detach().clone() for param in params])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@needs_native
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_the_device_of_new_tensors_has_no_part_in_a_step(max_norm):
    """`torch.set_default_device`, here a device without memory."""
    results = []
    for default in ("cpu", "meta"):
        params, grads = start(SHAPES), gradients(SHAPES, 3)
        with torch.device(default):
            optimizer = AdamW(params, max_grad_norm=max_norm)
            train(optimizer, grads)
            assert all(float(step) == 3 for step in states(optimizer, "step"))
            optimizer.load_state_dict(optimizer.state_dict())
            train(optimizer, grads)
        results.append(params)
    equal(*results)


@needs_native
def test_weights_that_are_given_other_memory_are_clipped_and_updated_once():
    """The plan made anew takes the norm anew."""
    plain, moved = start(SHAPES), start(SHAPES)
    optimizers = [AdamW(params, max_grad_norm=0.1, impl="cpp") for params in (plain, moved)]
    for i, grads in enumerate(gradients(SHAPES, 3)):
        for optimizer, params in zip(optimizers, (plain, moved), strict=True):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
                if params is moved and i:
                    param.data = param.data.clone()
            optimizer.step()
    equal(plain, moved)
    assert all(float(step) == 3 for step in states(optimizers[1], "step"))


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
