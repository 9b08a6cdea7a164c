"""A torch AdamW that somebody holds becomes fastft's: what holds it does not notice, and what
cannot become so is left as it was."""

from __future__ import annotations

import pytest
import torch
from support.numerics import assert_no_worse
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import fastft
from fastft.optim.in_place import turn_into_ours

OPTIONS = {
    "defaults": {},
    "hyper-parameters": {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "a rate in a tensor": {"lr": torch.tensor(0.03), "foreach": False},
    "fused": {"fused": True},
}


def made(dtype=torch.float32, turned=None, names=False, scheduled=False, **options):
    """A model of two groups, its AdamW and its scheduler; the AdamW becomes fastft's before step
    `turned`, and weights after five steps are the outcome."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)
    groups = [
        {"params": list(part.named_parameters() if names else part.parameters()), **extra}
        for part, extra in zip(model, ({}, {"weight_decay": 0.5}), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, **options)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step)) if scheduled else None
    for step in range(5):
        if step == turned:
            assert turn_into_ours(optimizer) is None
            assert type(optimizer) is fastft.AdamW
        for number, parameter in enumerate(model.parameters()):
            torch.manual_seed(10 * step + number)
            parameter.grad = torch.randn(parameter.shape, dtype=torch.float64).to(dtype)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("turned", [0, 3], ids=["before the first step", "between steps"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_trains_as_before(options, scheduled, turned):
    truth = made(torch.float64, scheduled=scheduled, **options)
    plain = made(scheduled=scheduled, **options)
    ours = made(scheduled=scheduled, turned=turned, **options)
    assert_no_worse(ours, plain, truth, "weights", terms=5)


def test_parameters_keep_their_names():
    assert torch.equal(made(turned=2, names=True), made(turned=2))


@pytest.fixture
def optimizer():
    return torch.optim.AdamW(nn.Linear(3, 2).parameters(), lr=0.1)


def test_who_holds_it_holds_the_one_that_trains(optimizer, recwarn):
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    groups, group = optimizer.param_groups, optimizer.param_groups[0]
    assert turn_into_ours(optimizer) is None
    assert scheduler.optimizer is optimizer
    assert optimizer.param_groups[0] is group
    assert groups[0] is group
    # accelerate does this, and every training that is resumed: the dicts are other ones then
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    about_the_order = [one for one in recwarn if "lr_scheduler.step" in str(one.message)]
    assert not about_the_order


def test_its_hooks_stay(optimizer):
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    turn_into_ours(optimizer)
    optimizer.step()
    assert seen == ["step"]
    assert optimizer.state_dict()["mine"] == 1


def test_a_group_added_later_has_the_hyper_parameters_that_it_would_have_had(optimizer):
    turn_into_ours(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.param_groups[1]["lr"] == 0.1


def test_fastft_s_own_stays(optimizer):
    ours = fastft.AdamW(optimizer.param_groups[0]["params"])
    before = dict(vars(ours))
    assert turn_into_ours(ours) is None
    assert vars(ours) == before


class Lamb(torch.optim.AdamW):
    pass


def wrapped(optimizer):
    stock = optimizer.step
    optimizer.step = lambda *args: stock(*args)
    return optimizer


REFUSED = {
    "another optimizer": (lambda params: torch.optim.Adam(params), "Adam is not torch.optim.AdamW"),
    "a subclass": (lambda params: Lamb(params), "Lamb is not torch.optim.AdamW"),
    "float64": (
        lambda params: torch.optim.AdamW([p.detach().double() for p in params]),
        "AdamW trains float32 and bfloat16 parameters, got one of torch.float64",
    ),
    "differentiable": (
        lambda params: torch.optim.AdamW(params, differentiable=True),
        "differentiable=True is not implemented",
    ),
    "a step of somebody's": (
        lambda params: wrapped(torch.optim.AdamW(params)),
        "something else than a scheduler has wrapped its step",
    ),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_left_alone_has_not_changed(make, words):
    optimizer = make(list(nn.Linear(3, 2).parameters()))
    before, group = dict(vars(optimizer)), dict(optimizer.param_groups[0])
    kind = type(optimizer)
    assert words in turn_into_ours(optimizer)
    assert type(optimizer) is kind
    assert vars(optimizer) == before
    assert optimizer.param_groups[0].keys() == group.keys()
