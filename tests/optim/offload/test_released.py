"""Gradients that backward uses up: the bits of the resident optimizer, or a sentence."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.adamw_modes import MODES
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft.optim.adamw import AdamW
from fastft.optim.offload.absent import AbsentGradient

USED_UP = "has used it up inside backward"


def build(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    first, last = nn.Linear(63, 507), nn.Linear(507, 33, bias=False)
    last.weight = nn.Parameter(torch.randn(507, 33).t() / 20)
    return nn.Sequential(first, nn.Tanh(), last).to(dtype)


def loss_of(model: nn.Module, number: int) -> torch.Tensor:
    x = torch.randn(5, 63, generator=torch.Generator().manual_seed(number))
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def train(model: nn.Module, optimizer: AdamW, steps: range) -> list[torch.Tensor]:
    """Norms, weights and states, with a schedule."""
    found = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        loss_of(model, step).backward()
        grads = [param.grad for param in model.parameters()]
        found.append(optimizer.clip_at_step(grads, float("inf")))
        optimizer.step()
        model.zero_grad()
    found += [param.detach() for param in model.parameters()]
    found += [entry for p in model.parameters() for entry in optimizer.state[p].values()]
    return [tensor.clone() for tensor in found]


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:rounding=")
@pytest.mark.parametrize("mode", MODES)
def test_the_bits_of_the_resident_optimizer(mode):
    dtype, options = MODES[mode].dtype, {"seed": 3, **MODES[mode].options}
    outcomes = []
    for released in (True, False):
        model = build(dtype)
        optimizer = AdamW(model.parameters(), release_gradients=released, **options)
        outcomes.append(train(model, optimizer, range(4)))
    assert_same(*outcomes)


def test_a_checkpoint_in_the_middle_and_a_group_that_comes_later():
    def two_halves(first, second):
        model = build()
        optimizer = AdamW(model[0].parameters(), release_gradients=first)
        for step in range(2):
            loss_of(model, step).backward()
            optimizer.step()
            model.zero_grad()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = AdamW(model[0].parameters(), release_gradients=second)
        optimizer.load_state_dict(saved)
        optimizer.add_param_group({"params": list(model[2].parameters())})
        return train(model, optimizer, range(2, 5))

    assert_same(two_halves(True, True), two_halves(False, False))
    assert_same(two_halves(False, True), two_halves(True, False))


def test_a_gradient_that_no_hook_has_seen_is_used_in_the_step():
    def by_hand(released):
        model = build()
        optimizer = AdamW(model.parameters(), release_gradients=released)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        return [param.detach() for param in model.parameters()]

    assert_same(by_hand(True), by_hand(False))


def released() -> tuple[nn.Module, AdamW]:
    """A model behind a backward pass, and its optimizer."""
    model = build()
    optimizer = AdamW(model.parameters(), release_gradients=True)
    loss_of(model, 0).backward()
    return model, optimizer


def test_gradients_are_gone_behind_backward():
    model, _optimizer = released()
    assert all(isinstance(param.grad, AbsentGradient) for param in model.parameters())
    with pytest.raises(RuntimeError, match=USED_UP):
        model[0].weight.grad.clone()


def accumulate(model, optimizer):
    loss_of(model, 1).backward()


def go_on_without_zeroing(model, optimizer):
    optimizer.step()
    loss_of(model, 1).backward()


def step_twice(model, optimizer):
    optimizer.step()
    optimizer.step()


def reentrant_checkpointing_twice(model, optimizer):
    model.zero_grad()
    x = torch.ones(2, 63, dtype=torch.bfloat16, requires_grad=True)
    sum(checkpoint(model, x, use_reentrant=True).sum() for _ in range(2)).backward()


def scale(model, optimizer):
    scaler = torch.amp.GradScaler("cpu")
    model.zero_grad()
    scaler.scale(loss_of(model, 1)).backward()
    scaler.step(optimizer)


REFUSED = {
    "accumulation": accumulate,
    "no zero_grad": go_on_without_zeroing,
    "a second step": step_twice,
    "a weight used twice under reentrant checkpointing": reentrant_checkpointing_twice,
    "clip_grad_norm_": lambda model, opt: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "GradScaler": scale,
    "zero_grad(set_to_none=False)": lambda model, opt: opt.zero_grad(set_to_none=False),
}


@pytest.mark.filterwarnings("ignore:gradients were thrown away")
@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_a_gradient_later_is_a_sentence(what):
    with pytest.raises(RuntimeError, match=f"{USED_UP}|leave out release_gradients"):
        REFUSED[what](*released())


@pytest.mark.parametrize("what", ["lr", "betas", "a tensor of a rate", "a weight"])
def test_what_changes_between_backward_and_the_step_is_too_late(what):
    model, rate = build(), torch.tensor(1e-2)
    tensor_or_number = rate if what == "a tensor of a rate" else 1e-2
    optimizer = AdamW(model.parameters(), lr=tensor_or_number, release_gradients=True)
    loss_of(model, 0).backward()
    optimizer.step()
    model.zero_grad()
    loss_of(model, 1).backward()
    with torch.no_grad():
        if what == "a weight":
            model[2].weight.mul_(0.99)
        elif what == "a tensor of a rate":
            rate.mul_(0.5)
        else:
            optimizer.param_groups[0][what] = {"lr": 1e-3, "betas": (0.8, 0.9)}[what]
    with pytest.raises(RuntimeError, match="changed between backward and step"):
        optimizer.step()


def test_clipping_in_the_step_is_a_sentence():
    model, optimizer = released()
    with pytest.raises(ValueError, match=r"cannot be clipped to 1\.0"):
        optimizer.clip_at_step([param.grad for param in model.parameters()], 1.0)


def test_a_closure_is_a_sentence_before_it_is_called():
    model = build()
    optimizer, called = AdamW(model.parameters(), release_gradients=True), []
    with pytest.raises(RuntimeError, match="a closure's backward pass would update before"):
        optimizer.step(lambda: called.append(1))
    assert not called


def test_capturable_is_a_sentence():
    with pytest.raises(ValueError, match="capturable=True with release_gradients=True"):
        AdamW(build().parameters(), release_gradients=True, capturable=True)


@pytest.mark.parametrize("then", ["optimizer", "model", "step"])
def test_a_backward_pass_that_raises_leaves_whole_parameters(then):
    """The last layer has taken its step, the first has not; then training goes on."""
    model, stock = build(), build()
    optimizer = AdamW(model.parameters(), release_gradients=True)
    plain = AdamW(stock.parameters())
    hidden = model[:2](torch.ones(2, 63, dtype=torch.bfloat16))
    hidden.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model[2](hidden).sum().backward()
    stock[2](stock[:2](torch.ones(2, 63, dtype=torch.bfloat16)).detach()).sum().backward()
    plain.step()
    stock.zero_grad()
    assert torch.equal(model[2].weight, stock[2].weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if then == "step":
            optimizer.step()
            model.zero_grad()
        else:
            {"optimizer": optimizer, "model": model}[then].zero_grad()
        outcomes = [train(*pair, range(3)) for pair in ((model, optimizer), (stock, plain))]
    assert_same(*outcomes)
    told = [str(warning.message) for warning in caught if "thrown away" in str(warning.message)]
    assert len(told) == (then != "step")
