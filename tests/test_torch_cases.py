"""torch's own cases for AdamW: the constructor inputs and bad inputs of its test suite, and what it
asks of every step.

The properties are those of torch's test/test_optim.py, written against our class; results are
compared with `torch.optim.AdamW` given the same input.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.nn import Parameter

from fastft.optim.adamw import AdamW

pytest.importorskip("expecttest")  # torch's test helpers need it
from torch.testing._internal.common_optimizers import (
    optim_error_inputs_func_adamw,
    optim_inputs_func_adamw,
)

# which importing those helpers forbids to all tests
torch.backends.__allow_nonbracketed_mutation_flag = True

INPUTS = {case.desc: case.kwargs for case in optim_inputs_func_adamw("cpu")}
INPUTS["Tensor lr"] = {"lr": torch.tensor(0.01)}
INPUTS["foreach"], INPUTS["fused"] = {"foreach": True}, {"fused": True}
ERRORS = {
    case.optimizer_error_input.desc: case
    for case in optim_error_inputs_func_adamw("cpu", torch.float32)
}
# what torch refuses because of its own implementations; ours is one, which ignores `foreach`
TAKEN = {
    "lr as Tensor doesn't work with foreach & not capturable",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
}
# what torch takes: a step is one operator without autograd formulas, so there is no graph to
# differentiate through
REFUSED = {"differentiable": True}


def params_and_grads(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = [
        Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in [(10, 5), (5,), (2, 3, 4), ()]
    ]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    return params


def build(params, kwargs, cls=AdamW):
    return cls(params, **copy.deepcopy(kwargs))


def steps(optimizer, count):
    """Steps on gradients that change, so that a maximum over them and their mean differ."""
    for step in range(count):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad.mul_(1.5 if step % 3 else -0.3)
        optimizer.step()


def assert_close(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("desc", INPUTS)
class TestInputs:
    def test_equals_torch(self, desc):
        ours, theirs = params_and_grads(), params_and_grads()
        steps(build(ours, INPUTS[desc]), 12)
        steps(build(theirs, INPUTS[desc], torch.optim.AdamW), 12)
        assert_close(ours, theirs)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_goes_in_the_right_direction(self, desc, dtype):
        params = [Parameter(torch.randn(10, 5).to(dtype)), Parameter(torch.randn(10).to(dtype))]
        inputs = torch.randn(5).to(dtype)
        optimizer = build(params, INPUTS[desc])
        sign = -1 if INPUTS[desc].get("maximize") else 1

        def closure():
            optimizer.zero_grad()
            loss = (params[0].mv(inputs) + params[1]).float().square().sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(30)]
        assert sign * (losses[-1] - losses[0]) < 0

    def test_without_gradients_nothing_happens(self, desc):
        params = params_and_grads()
        optimizer = build(params, INPUTS[desc])
        optimizer.zero_grad()
        before = [param.detach().clone() for param in params]
        with pytest.warns(UserWarning, match="no gradient in any of the optimizer's 4 parameters"):
            optimizer.step()
        assert all(map(torch.equal, params, before)) and not optimizer.state

    def test_zero_gradients_move_nothing(self, desc):
        params = params_and_grads()
        optimizer = build(params, {**INPUTS[desc], "weight_decay": 0.0})
        optimizer.zero_grad(set_to_none=False)
        before = [param.detach().clone() for param in params]
        for _ in range(3):
            optimizer.step()
        assert all(map(torch.equal, params, before))

    def test_gradients_are_not_written(self, desc):
        params = params_and_grads()
        grads = [param.grad.clone() for param in params]
        versions = [param.grad._version for param in params]
        build(params, INPUTS[desc]).step()
        assert [param.grad._version for param in params] == versions
        assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads, strict=True))

    @pytest.mark.parametrize("weights_only", [True, False])
    def test_save_and_load(self, desc, weights_only):
        params = params_and_grads()
        optimizer = build(params, INPUTS[desc])
        steps(optimizer, 3)
        twins = copy.deepcopy(params)
        for param, twin in zip(params, twins, strict=True):
            twin.grad = param.grad.clone()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = build(twins, {**INPUTS[desc], "lr": 0.5})
        loaded.load_state_dict(torch.load(file, weights_only=weights_only))
        steps(optimizer, 2)
        steps(loaded, 2)
        assert all(map(torch.equal, params, twins))

    def test_a_deep_copy_goes_the_same_way(self, desc):
        params = params_and_grads()
        optimizer = build(params, INPUTS[desc])
        steps(optimizer, 2)
        twin = copy.deepcopy(optimizer)
        for param, copied in zip(params, twin.param_groups[0]["params"], strict=True):
            copied.grad = param.grad.clone()
        steps(optimizer, 2)
        steps(twin, 2)
        assert all(map(torch.equal, params, twin.param_groups[0]["params"]))

    def test_older_state_dicts_lack_options(self, desc):
        params = params_and_grads()
        optimizer = build(params, INPUTS[desc])
        steps(optimizer, 2)
        old = copy.deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            for name in ("maximize", "foreach", "fused", "capturable", "differentiable"):
                group.pop(name)
        for state in old["state"].values():
            state["step"] = int(state["step"])
        optimizer.load_state_dict(old)
        steps(optimizer, 1)
        assert all(state["step"] == 3 for state in optimizer.state.values())

    def test_named_parameters_and_their_state_dicts(self, desc):
        plain, named = params_and_grads(), params_and_grads()
        optimizers = [
            build(plain, INPUTS[desc]),
            build(list(zip("abcd", named, strict=True)), INPUTS[desc]),
        ]
        for optimizer in optimizers:
            steps(optimizer, 2)
        assert all(map(torch.equal, plain, named))
        saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
        for optimizer, other in zip(optimizers, reversed(saved), strict=True):
            optimizer.load_state_dict(other)
            steps(optimizer, 1)
        assert all(map(torch.equal, plain, named))
        assert optimizers[1].param_groups[0]["param_names"] == list("abcd")

    def test_schedulers(self, desc):
        results = []
        for cls in (AdamW, torch.optim.AdamW):
            params = params_and_grads()
            optimizer = build(params, INPUTS[desc], cls)
            warmup = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
            decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
            for _ in range(6):
                steps(optimizer, 1)
                warmup.step()
                decay.step()
            results.append((params, float(optimizer.param_groups[0]["lr"])))
        assert results[0][1] == pytest.approx(results[1][1])
        assert_close(results[0][0], results[1][0])


@pytest.mark.parametrize("desc", ERRORS)
def test_bad_inputs_raise_what_torch_raises(desc):
    case = ERRORS[desc]
    params, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
    params = [Parameter(torch.randn(1, 1))] if params is None else params
    if desc in TAKEN:
        AdamW(params, **kwargs)
    elif issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            AdamW(params, **kwargs)
    else:
        with pytest.raises(case.error_type):
            AdamW(params, **kwargs)


@pytest.mark.parametrize("option", REFUSED)
def test_refused(option):
    torch.optim.AdamW(params_and_grads(), **{option: REFUSED[option]})
    with pytest.raises(
        ValueError,
        match=f"{option}=True is not implemented by fastft's AdamW; use torch.optim.AdamW",
    ):
        AdamW(params_and_grads(), **{option: REFUSED[option]})


@pytest.mark.parametrize("desc", ["default", "Tensor lr", "nonzero weight_decay"])
def test_in_a_compiled_training_step(desc):
    torch._dynamo.reset()
    inputs, results = torch.randn(8, 5), []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = torch.nn.Linear(5, 3)
        optimizer = build(model.parameters(), INPUTS[desc])

        def training_step(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        step = torch.compile(training_step, backend="aot_eager") if compiled else training_step
        losses = [step().detach() for _ in range(3)]
        results.append([*losses, model.weight.detach(), model.bias.detach()])
    assert_close(*results)
