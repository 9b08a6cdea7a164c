"""Nothing stale: whatever is swapped, replaced or resized between two steps, the next one works on
what is there."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from support.adamw_steps import ENGINES, equal, gradients, start, states, train
from torch.nn import Parameter

from fastft.optim import adamw_part, adamw_plan
from fastft.optim.adamw import AdamW
from fastft.optim.adamw_state import Claim, State

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


def resize(optimizer, params):
    """In place, to other memory and back."""
    with torch.no_grad():
        value, param = params[0].clone(), params[0].data
        param.set_(torch.empty(0, dtype=value.dtype)).resize_(value.shape).copy_(value)


def replace_one_number(optimizer, params):
    """An entry that equals the one in whose place it comes."""
    state = optimizer.state[params[-1]]
    state["step"] = state["step"].clone()


def pop_and_set(optimizer, params):
    state = optimizer.state[params[0]]
    state["exp_avg"] = state.pop("exp_avg").clone()


def transpose_gradients(optimizer, params):
    params[1].grad = params[1].grad.t().contiguous().t()


def freeze_and_thaw(optimizer, params):
    """A step without the first one, as if its gradient were zero: nothing that it keeps moves."""
    kept, params[0].grad = params[0].grad, None
    others = [param.detach().clone() for param in params]
    states = {param: {n: v.clone() for n, v in optimizer.state[param].items()} for param in params}
    params[0].requires_grad_(False)
    optimizer.step()
    params[0].requires_grad_(True).grad = kept
    for param, value in zip(params, others, strict=True):
        param.data.copy_(value)
        optimizer.state[param] = states[param]


def copy_shallow(optimizer, params):
    """Another optimizer over the very same states takes a step, which is taken back."""
    twin, values = copy.copy(optimizer), [param.detach().clone() for param in params]
    states = [{n: v.clone() for n, v in optimizer.state[param].items()} for param in params]
    twin.step()
    for param, value, state in zip(params, values, states, strict=True):
        param.data.copy_(value)
        for name, entry in state.items():
            optimizer.state[param][name].copy_(entry)


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
    *(transpose, other_gradients, resize_storage, swap_objects, resize, replace_one_number),
    *(pop_and_set, transpose_gradients, freeze_and_thaw, copy_shallow),
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
    devices = torch.device("cpu"), torch.device("cpu", 0)
    monkeypatch.setattr(
        adamw_plan,
        "_by_device",
        lambda tensors: {devices[i]: [i] for i in range(len(tensors))},
    )
    check_disturbed(impl, torch.bfloat16, event)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch's pickle"])
def test_a_copy_and_its_original_train_apart(impl, how):
    params, grads = start(SHAPES, torch.bfloat16), gradients(SHAPES, 5)
    optimizer = AdamW(params, impl=impl)
    train(optimizer, grads[:3])
    both = params, optimizer
    others, other = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    train(optimizer, grads[3:])
    for param, row in zip(others, grads[3], strict=True):
        param.grad = row.bfloat16()
    other.step()
    for param, row in zip(others, grads[4], strict=True):
        param.grad = row.bfloat16()
    other.step()
    equal(others, params)
    for name in ("exp_avg", "exp_avg_sq", "remainder", "step"):
        equal(states(other, name), states(optimizer, name))


@pytest.mark.parametrize("impl", ENGINES)
def test_a_group_added_between_two_steps(impl):
    first, second = start([(300,), (7, 5)])
    whole = AdamW([{"params": [first]}], impl=impl)
    train(whole, gradients([(300,)], 2))
    whole.add_param_group({"params": [second], "lr": 0.1})
    train(whole, gradients([(300,), (7, 5)], 2))
    (alone,) = start([(300,), (7, 5)])[1:]
    rows = [row[1:] for row in gradients([(300,), (7, 5)], 2)]
    equal([second], train(AdamW([alone], lr=0.1, impl=impl), rows))
    assert [float(state["step"]) for state in whole.state.values()] == [4.0, 2.0]


def test_amsgrad_that_a_group_with_8bit_moments_is_given_later():
    (param,) = start([(70, 130)])
    optimizer = AdamW([param], moments="8bit", seed=0)
    train(optimizer, gradients([(70, 130)], 1))
    before, optimizer.param_groups[0]["amsgrad"] = param.detach().clone(), True
    with pytest.raises(ValueError, match='amsgrad with moments="8bit" is not implemented'):
        optimizer.step()
    assert torch.equal(param, before)


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


@pytest.mark.parametrize("impl", ENGINES)
def test_what_a_plan_binds_goes_with_the_optimizer(impl):
    """An engine that still held an entry would keep it, and its Python object, alive."""
    (param,) = start([(300,)])
    optimizer = AdamW([param], impl=impl)
    train(optimizer, gradients([(300,)], 1))
    entry = weakref.ref(optimizer.state[param]["exp_avg"])
    del optimizer
    gc.collect()
    assert entry() is None


def test_a_shard_that_moves_behind_a_parameter(monkeypatch):
    """Also where the optimizer's first parameter is whole, as of FSDP2 with `ignored_params`."""
    params, expected = start([(300,), (300,)]), start([(300,), (300,)])
    parts = {id(params[1]): params[1].detach().clone()}
    monkeypatch.setattr(adamw_part, "local", lambda tensor: parts.get(id(tensor), tensor))
    optimizer, grads = AdamW(params), gradients([(300,), (300,)], 3)
    train(optimizer, grads[:2])
    before = parts[id(params[1])]
    parts[id(params[1])] = before.clone()
    train(optimizer, grads[2:])
    train(AdamW(expected), grads)
    equal([params[0], parts[id(params[1])]], expected)


def test_a_state_pickled_by_an_earlier_version():
    now = pickle.dumps(State(step=1.0), protocol=0)
    assert b"fastft.optim.adamw_state\n" in now
    then = now.replace(b"fastft.optim.adamw_state\n", b"fastft.optim.adamw_plan\n")
    assert pickle.loads(then) == {"step": 1.0} and isinstance(pickle.loads(then), State)


CHANGES = {
    "update": lambda state: state.update(a=3),
    "item": lambda state: state.__setitem__("a", 4),
    "setdefault": lambda state: state.setdefault("c", 5),
    "pop": lambda state: state.pop("a"),
    "del": lambda state: state.__delitem__("b"),
    "|=": lambda state: state.__ior__({"d": 1}),
    "popitem": lambda state: state.popitem(),
    "clear": lambda state: state.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_way_to_replace_an_entry_breaks_the_claim(change):
    state, expected, claims = State(a=1, b=2), {"a": 1, "b": 2}, (Claim(), Claim())
    state.claim(claims[0])
    CHANGES[change](state), CHANGES[change](expected)
    assert claims[0].broken and state == expected
    state.claim(claims[1])
    assert not claims[1].broken
    state.claim(Claim())  # another plan's
    assert claims[1].broken
