"""Nothing stale: whatever is swapped, replaced or resized between two steps, the next one works on
what is there."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.adamw_steps import ENGINES, equal, gradients, start, states, train
from torch.nn import Parameter

from fastft.optim import adamw_plan
from fastft.optim.adamw import AdamW
from fastft.optim.adamw_plan import State

SHAPES = [(300,), (7, 5)]


def swap_data(optimizer, params):
    for param in params:
        param.data = param.data.clone()


def swap_state_data(optimizer, params):
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def swap_counts(optimizer, params):
    for state in optimizer.state.values():
        state["step"].data = state["step"].data.clone()


def swap_last_data(optimizer, params):
    params[-1].data = params[-1].data.clone()


def replace_entries(optimizer, params):
    for state in optimizer.state.values():
        for name in state:
            state[name] = state[name].clone()


def update_entries(optimizer, params):
    for state in optimizer.state.values():
        state.update({name: value.clone() for name, value in state.items()})


def replace_states(optimizer, params):
    for param in params:
        optimizer.state[param] = {
            name: value.clone() for name, value in optimizer.state[param].items()
        }


def reload(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


def transpose(optimizer, params):
    params[1].data = params[1].data.t().contiguous().t()


def other_gradients(optimizer, params):
    for param in params:
        param.grad = param.grad.clone()


def resize_storage(optimizer, params):
    """As FSDP frees and refills parameters."""
    value, storage = params[0].detach().clone(), params[0].untyped_storage()
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    with torch.no_grad():
        params[0].copy_(value)


def swap_objects(optimizer, params):
    """As FSDP2 does: other parameters take the places in the groups, and the keys of the state."""
    for i, param in enumerate(optimizer.param_groups[0]["params"]):
        fresh = Parameter(param.detach().clone())
        fresh.grad = param.grad
        optimizer.param_groups[0]["params"][i] = params[i] = fresh
        optimizer.state[fresh] = optimizer.state.pop(param)


EVENTS = [
    *(
        swap_data,
        swap_last_data,
        swap_state_data,
        swap_counts,
        replace_entries,
        update_entries,
        replace_states,
        reload,
    ),
    *(transpose, other_gradients, resize_storage, swap_objects),
]


def check_disturbed(impl, dtype, event):
    grads = gradients(SHAPES, 6)
    whole = AdamW(start(SHAPES, dtype), impl=impl)
    expected = train(whole, grads)
    params = start(SHAPES, dtype)
    optimizer = AdamW(list(params), impl=impl)
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.to(dtype)
        event(optimizer, params) if optimizer.state else None
        optimizer.step()
    equal(params, expected)
    for name in next(iter(whole.state.values())):
        equal(states(optimizer, name), states(whole, name))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_a_disturbed_run_equals_an_undisturbed_one(impl, dtype, event):
    check_disturbed(impl, dtype, event)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_on_several_devices_nothing_is_updated_twice(impl, event, monkeypatch):
    """Two names of the CPU stand for two devices: their tensors are updated one after the other."""
    devices = {torch.device("cpu"): [0], torch.device("cpu", 0): [1]}
    monkeypatch.setattr(adamw_plan, "_by_device", lambda params: devices)
    check_disturbed(impl, torch.bfloat16, event)


@pytest.mark.parametrize("impl", ENGINES)
def test_a_cleared_state_starts_anew(impl):
    (param,) = start([(300,)])
    optimizer = AdamW([param], impl=impl)
    train(optimizer, gradients([(300,)], 3))
    fresh = Parameter(param.detach().clone())
    optimizer.state.clear()
    grads = gradients([(300,)], 2, seed=4)
    equal(train(optimizer, grads), train(AdamW([fresh], impl=impl), grads))
    assert float(optimizer.state[param]["step"]) == 2


@pytest.mark.parametrize("impl", ENGINES)
def test_a_step_count_set_by_hand_counts(impl):
    (param,) = start([(300,)])
    optimizer = AdamW([param], impl=impl)
    train(optimizer, gradients([(300,)], 3))
    optimizer.state[param]["step"].fill_(10)
    train(optimizer, gradients([(300,)], 1))
    assert float(optimizer.state[param]["step"]) == 11


@pytest.mark.parametrize("impl", ENGINES)
def test_a_parameter_that_becomes_bf16_or_another_size(impl):
    (param,) = start([(300,)])
    optimizer = AdamW([param], impl=impl)
    train(optimizer, gradients([(300,)], 2))
    param.grad, param.data = None, param.data.bfloat16()
    train(optimizer, gradients([(300,)], 2))
    assert param.dtype == torch.bfloat16 and param.isfinite().all()
    assert optimizer.state[param]["remainder"].any() and float(optimizer.state[param]["step"]) == 4
    before = param.detach().clone()
    param.grad, param.data = None, param.data[:100]  # the same address, other states
    with pytest.raises(RuntimeError):
        train(optimizer, gradients([(100,)], 1))
    assert torch.equal(param, before[:100])


@pytest.mark.parametrize("impl", ENGINES)
def test_groups_changed_by_hand(impl):
    first, second = start([(300,), (300,)])
    optimizer = AdamW([{"params": [first]}, {"params": [second], "lr": 0.1}], impl=impl)
    grads = gradients([(300,), (300,)], 2)
    train(optimizer, grads[:1])
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop())
    optimizer.param_groups[0]["amsgrad"] = True
    before = second.detach().clone()
    train(optimizer, grads[1:])
    assert (second - before).abs().max() < 0.005 and "max_exp_avg_sq" in optimizer.state[first]


def test_a_plan_and_what_it_binds_go_with_the_optimizer():
    (param,) = start([(300,)])
    optimizer = AdamW([param])
    train(optimizer, gradients([(300,)], 1))
    gone = weakref.ref(optimizer._plan), weakref.ref(optimizer.state[param]["exp_avg"])
    del optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_every_way_to_replace_an_entry_counts():
    state = State(a=1, b=2)
    changes = [
        lambda: state.update(a=3),
        lambda: state.__setitem__("a", 4),
        lambda: state.setdefault("c", 5),
        lambda: state.pop("c"),
        lambda: state.__delitem__("b"),
        lambda: state.__ior__({"d": 1}),
        lambda: state.popitem(),
        lambda: state.clear(),
    ]
    for change in changes:
        before = State.changes
        change()
        assert State.changes > before
    assert state == {}
