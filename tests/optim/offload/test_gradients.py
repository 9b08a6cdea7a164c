"""Gradients on the host: what backward makes, the norm by parts, and what becomes of `p.grad`."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.adamw_steps import ENGINES
from support.scheduler import Freed, Race, Scheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastft.optim import grad_norm as norms
from fastft.optim.adamw import AdamW
from fastft.optim.grad_norm import grad_norm
from fastft.optim.offload import gradients, pieces
from fastft.optim.offload.absent import AbsentGradient

ORDERS = ["late", "early", 1, 2]


@pytest.fixture
def small(monkeypatch):
    """Several runs in a gradient, and gradients that wait for the bus."""
    monkeypatch.setattr(gradients, "STAGE", norms.CHUNK)
    monkeypatch.setattr(gradients, "IN_FLIGHT", 1500)
    monkeypatch.setattr(pieces, "BUFFER", 1 << 16)


class Net(nn.Module):
    """Sizes that no chunk divides, a weight that lies transposed, one of channels, one that two
    layers share, and one without elements."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(63, 507), nn.Linear(507, 63, bias=False)
        self.second.weight = nn.Parameter(torch.randn(507, 63).t() / 20)
        self.tied = nn.Linear(63, 507, bias=False)
        self.tied.weight = self.first.weight
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.single, self.none = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(0))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(torch.tanh(self.first(x)))
        pixels = self.conv(hidden[:, :48].reshape(-1, 3, 4, 4)).flatten(1)
        rest = pixels.mean() + self.single.sum() + self.none.sum()
        return self.tied(torch.tanh(hidden)).square().mean() + rest


def batch(number: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 63, generator=torch.Generator().manual_seed(number)).to(dtype)


def train(
    offload: str | None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    steps: int = 4,
    micro: int = 1,
    zero: str = "model",
    before_step: Callable[[int, nn.Module], Any] = lambda step, model: None,
    **options: Any,
) -> list[Tensor]:
    """Weights, states and norms."""
    model, found = Net(dtype), []
    optimizer = AdamW(model.parameters(), lr=1e-2, offload=offload, **options)
    for step in range(steps):
        for number in range(micro):
            model(batch(micro * step + number, dtype)).backward()
        before_step(step, model)
        optimizer.step()
        found.append(optimizer.grad_norm)
        if zero == "to zeros":
            optimizer.zero_grad(set_to_none=False)
        elif zero != "never":
            {"model": model, "optimizer": optimizer}[zero].zero_grad()
    found += [param.detach() for param in model.parameters()]
    states = [optimizer.state[param] for param in model.parameters() if param in optimizer.state]
    found += [entry for state in states for name, entry in state.items() if name != "step"]
    return [tensor.clone() for tensor in found if tensor is not None]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_bits_of_the_resident_optimizer(impl, dtype, micro, clip):
    options = {"micro": micro, "max_grad_norm": clip, "impl": impl}
    assert_same(train("gradients", dtype, **options), train(None, dtype, **options))


@pytest.mark.parametrize("zero", ["optimizer", "to zeros", "never"])
def test_whoever_zeroes_gradients_and_however(zero):
    options = {"zero": zero, "micro": 2, "max_grad_norm": 0.01}
    assert_same(train("gradients", **options), train(None, **options))


def replace_one(step: int, model: nn.Module) -> None:
    if step == 1:
        model.first.weight.grad = torch.ones_like(model.first.weight)
    if step == 2:
        model.first.bias.grad = None


def test_a_gradient_that_the_user_sets_or_takes_away_counts_as_it_would_resident():
    options = {"before_step": replace_one, "max_grad_norm": 0.01}
    assert_same(train("gradients", **options), train(None, **options))


def test_gradients_that_no_hook_has_seen_are_clipped_as_resident_ones():
    """As at the first step where a library has put other parameters into the groups."""

    def by_hand(offload):
        model = Net(torch.bfloat16)
        optimizer = AdamW(model.parameters(), lr=1e-2, offload=offload)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        norm = optimizer.clip_at_step([param.grad for param in model.parameters()], 0.1)
        optimizer.step()
        return [norm, *(param.detach() for param in model.parameters())]

    assert_same(by_hand("gradients"), by_hand(None))


def add_noise(step: int, model: nn.Module) -> None:
    for param in model.parameters():
        param.grad += torch.full_like(param, 1e-2)
        param.grad.add_(torch.ones((), dtype=param.dtype))


@pytest.mark.parametrize("order", [None, "late"])
def test_what_the_user_adds_to_a_gradient_is_added(order, small):
    options = {"before_step": add_noise, "max_grad_norm": 0.01}
    with contextlib.nullcontext() if order is None else Scheduler(order).installed():
        offloaded = train("gradients", **options)
    assert_same(offloaded, train(None, **options))


def freeze(step: int, model: nn.Module) -> None:
    model.second.weight.requires_grad_(step % 2 == 1)


def test_parameters_that_are_trained_now_and_then():
    options = {"before_step": freeze, "zero": "optimizer", "max_grad_norm": 0.01}
    assert_same(train("gradients", **options), train(None, **options))


def test_a_group_that_is_added_in_the_middle():
    def late(offload):
        layers = [nn.Linear(7, 7, dtype=torch.bfloat16) for _ in range(2)]
        for seed, layer in enumerate(layers):
            torch.manual_seed(seed)
            layer.reset_parameters()
        optimizer = AdamW(layers[0].parameters(), lr=1e-2, offload=offload, max_grad_norm=0.1)
        for step in range(4):
            if step == 2:
                optimizer.add_param_group({"params": list(layers[1].parameters()), "lr": 0.1})
            optimizer.zero_grad()
            x = batch(step, torch.bfloat16)[:, :7]
            layers[1](torch.tanh(layers[0](x))).square().sum().backward()
            if step >= 2 and offload:
                assert isinstance(layers[1].weight.grad, AbsentGradient)
            optimizer.step()
            layers[1].zero_grad()
        return [param.detach() for layer in layers for param in layer.parameters()]

    assert_same(late("gradients"), late(None))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_two_backward_passes(reentrant):
    def twice(offload):
        model = Net(torch.bfloat16)
        optimizer = AdamW(model.parameters(), lr=1e-2, offload=offload, max_grad_norm=0.01)
        for step in range(3):
            x = batch(step, torch.bfloat16).requires_grad_()
            first, second = (
                checkpoint(model, x * scale, use_reentrant=reentrant) for scale in (1, 2)
            )
            (first + second).backward(retain_graph=not reentrant)
            model(x).backward()
            optimizer.step()
            model.zero_grad()
        return [param.detach() for param in model.parameters()]

    assert_same(twice("gradients"), twice(None))


def fails(*args: Any) -> Any:
    raise ArithmeticError("in the middle")


def test_an_exception_in_backward_leaves_nothing_behind():
    def interrupted(offload):
        model = Net(torch.bfloat16)
        optimizer = AdamW(model.parameters(), lr=1e-2, offload=offload, max_grad_norm=0.01)
        for step in range(4):
            if step == 2:
                hidden = torch.tanh(model.first(batch(9, torch.bfloat16)))
                hidden.register_hook(fails)
                with pytest.raises(ArithmeticError):
                    (model.second(hidden).sum() + model.single.sum()).backward()
                assert model.second.weight.grad is not None
            model.zero_grad()
            model(batch(step, torch.bfloat16)).backward()
            optimizer.step()
        return [param.detach() for param in model.parameters()]

    assert_same(interrupted("gradients"), interrupted(None))


def held(dtype: torch.dtype = torch.bfloat16) -> tuple[Net, AdamW]:
    """A model behind a backward pass, and its optimizer."""
    model = Net(dtype)
    optimizer = AdamW(model.parameters(), offload="gradients")
    model(batch(0, dtype)).backward()
    return model, optimizer


def test_one_gradient_is_read_as_if_it_were_there():
    model, _optimizer = held()
    plain = Net(torch.bfloat16)
    plain(batch(0, torch.bfloat16)).backward()
    for param, other in zip(model.parameters(), plain.parameters(), strict=True):
        gradient, expected = param.grad, other.grad
        assert isinstance(gradient, AbsentGradient) and "AbsentGradient" in repr(gradient)
        assert gradient.shape == expected.shape and gradient.dtype == expected.dtype
        assert torch.equal(gradient.clone(), expected)
        assert gradient.float().norm().item() == expected.float().norm().item()
        assert gradient.isfinite().all()


ELSEWHERE = "keeps gradients on the host. Clip inside the step"
REFUSED = {
    "clip_grad_norm_": lambda model, opt: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "one by one": lambda model, opt: nn.utils.clip_grad_norm_(
        model.parameters(), 1.0, foreach=False
    ),
    "clip_grad_value_": lambda model, opt: nn.utils.clip_grad_value_(model.parameters(), 1.0),
    "in place": lambda model, opt: model.first.weight.grad.mul_(0.5),
    "of the data": lambda model, opt: model.first.weight.grad.data.mul_(0.5),
    "an item": lambda model, opt: model.first.weight.grad.__setitem__(0, 0.0),
    "a view": lambda model, opt: model.first.weight.grad.view(-1).zero_(),
    "two at once": lambda model, opt: torch.cat([model.first.bias.grad, model.single.grad]),
    "as a target": lambda model, opt: model.first.bias.grad.copy_(torch.ones(507)),
    "as out": lambda model, opt: torch.add(
        torch.ones(507).bfloat16(), 1, out=model.first.bias.grad
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_memory_for_gradients_is_a_sentence(what):
    model, optimizer = held()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match=ELSEWHERE):
        REFUSED[what](model, optimizer)
    assert_same([param.detach() for param in model.parameters()], before)


def test_grad_scaler_is_a_sentence_and_updates_nothing():
    model = Net(torch.float32)
    optimizer, scaler = AdamW(model.parameters(), offload="gradients"), torch.amp.GradScaler("cpu")
    before = [param.detach().clone() for param in model.parameters()]
    scaler.scale(model(batch(0, torch.float32))).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)
    optimizer.found_inf = torch.zeros(())
    with pytest.raises(RuntimeError, match="GradScaler looks for Inf"):
        optimizer.step()
    assert_same([param.detach() for param in model.parameters()], before)


def sparse() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AdamW(embedding.parameters(), offload="gradients")
    embedding(torch.tensor([1])).sum().backward()
    optimizer.step()


def with_a_history() -> None:
    layer = nn.Linear(3, 3)
    _optimizer = AdamW(layer.parameters(), offload="gradients")
    layer(torch.ones(3)).square().sum().backward(create_graph=True)


def of_doubles() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad_dtype = torch.float64
    _optimizer = AdamW([param], offload="gradients")
    param.double().sum().backward()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (sparse, RuntimeError, "sparse gradients"),
        (with_a_history, RuntimeError, "create_graph=True"),
        (of_doubles, TypeError, "float32 or bfloat16, got torch.float64"),
    ],
)
def test_gradients_that_cannot_be_held(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_fp32_gradients_of_a_bf16_parameter():
    def mixed(offload):
        param = nn.Parameter(
            torch.randn(507, generator=torch.Generator().manual_seed(0)).bfloat16()
        )
        param.grad_dtype = torch.float32
        optimizer = AdamW([param], lr=1e-2, offload=offload, max_grad_norm=0.1)
        for _ in range(3):
            for scale in (1.0, 1e-3):
                (param.float() * scale).square().sum().backward()
            assert param.grad.dtype == torch.float32
            optimizer.step()
            optimizer.zero_grad()
        return [param.detach()]

    assert_same(mixed("gradients"), mixed(None))


def test_a_gradient_that_was_thrown_away_is_not_taken_for_a_later_one():
    model, optimizer = held()
    old = model.first.weight.grad
    model.zero_grad()
    model(batch(1, torch.bfloat16)).backward()
    model.first.weight.grad = old
    with pytest.raises(RuntimeError, match="this gradient was thrown away"):
        optimizer.step()


def test_nothing_keeps_a_model_or_a_hook_alive():
    model, optimizer = held()
    gone = weakref.ref(model.first.weight), weakref.ref(optimizer)
    hooks = model.second.weight._post_accumulate_grad_hooks
    assert len(hooks) == 1
    gc.disable()
    try:
        del optimizer
        assert gone[1]() is None and not hooks
        del model
        assert gone[0]() is None
    finally:
        gc.enable()


def test_a_new_optimizer_takes_over_where_the_old_one_lives_on():
    def handed_over(offload):
        model = Net(torch.bfloat16)
        optimizers = [AdamW(model.parameters(), lr=1e-2, offload=offload) for _ in range(2)]
        for step in range(4):
            model(batch(step, torch.bfloat16)).backward()
            optimizers[step // 2].step()
            model.zero_grad()
        return [param.detach() for param in model.parameters()]

    assert_same(handed_over("gradients"), handed_over(None))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_hold_gradients_of_their_own(copied):
    model, optimizer = copied(held())
    model.zero_grad()
    model(batch(0, torch.bfloat16)).backward()
    assert isinstance(model.first.weight.grad, AbsentGradient)
    optimizer.step()


# under the scheduler


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("impl", ENGINES)
def test_the_same_bits_in_whatever_order_the_queues_work(order, impl, small):
    options = {"steps": 2, "micro": 3, "max_grad_norm": 0.01, "impl": impl}
    with Scheduler(order).installed():
        offloaded = train("gradients", **options)
    assert_same(offloaded, train(None, **options))


def read_each() -> None:
    model, _optimizer = held()
    for param in model.parameters():
        param.grad.clone()


def one_parameter_twice() -> None:
    param = nn.Parameter(torch.ones(507, 63))
    _optimizer = AdamW([param], offload="gradients")
    for _ in range(3):
        param.sum().backward()


def hooks_in_another_queue() -> None:
    model = Net(torch.bfloat16)
    optimizer = AdamW(model.parameters(), offload="gradients")
    scheduler = gradients.devices.of(torch.device("cpu"))
    reduces = scheduler.queue()
    reduces.wait(scheduler.current().record())
    with scheduler.under(reduces):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
            for hook in param._post_accumulate_grad_hooks.values():  # as FSDP2 does
                hook(param)
    grad_norm([param.grad for param in model.parameters()])
    del optimizer


def micro_batches() -> None:
    model, _optimizer = held()
    for number in (1, 2):
        model(batch(number, torch.bfloat16)).backward()
    grad_norm([param.grad for param in model.parameters()])


SITUATIONS = [read_each, one_parameter_twice, hooks_in_another_queue, micro_batches]


def waits() -> list[int]:
    lines = open(gradients.__file__).read().splitlines()
    return [number for number, line in enumerate(lines, 1) if ".wait(" in line]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_no_wait_is_missing(situation, small):
    for order in ORDERS:
        with Scheduler(order).installed():
            situation()


@pytest.mark.parametrize("line", waits())
def test_every_wait_is_needed(line, small):
    for situation in SITUATIONS:
        scheduler = Scheduler("late", without=("gradients.py", range(line, line + 1)))
        try:
            with scheduler.installed():
                situation()
        except (Race, Freed):
            assert scheduler.ignored
            return
    pytest.fail("no situation needs this wait")
