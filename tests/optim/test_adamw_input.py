"""Bad input at the step, which torch's autograd cannot refuse: what was swapped behind the
optimizer's back."""

from __future__ import annotations

import pytest
import torch
from support.adamw_steps import ENGINES
from torch.nn import Parameter

from fastft.optim.adamw import AdamW

EVERY = ["auto", *ENGINES]


def swap_data(value):
    def swap(param, state):
        param.data = value

    return swap


def swap_entry(name, value):
    def swap(param, state):
        state[name] = value

    return swap


SWAPS = {
    "a larger parameter": (
        swap_data(torch.zeros(8, 3)),
        RuntimeError,
        r"\(4, 3\).*\(8, 3\)|\(8, 3\).*\(4, 3\)",
    ),
    "a smaller parameter": (
        swap_data(torch.zeros(2, 3)),
        RuntimeError,
        r"\(4, 3\).*\(2, 3\)|\(2, 3\).*\(4, 3\)",
    ),
    "another shape of as many elements": (
        swap_data(torch.zeros(3, 4)),
        RuntimeError,
        r"\(4, 3\).*\(3, 4\)",
    ),
    "a float16 parameter": (
        swap_data(torch.zeros(4, 3).half()),
        TypeError,
        "has become torch.float16",
    ),
    "a float64 parameter": (
        swap_data(torch.zeros(4, 3).double()),
        TypeError,
        "has become torch.float64",
    ),
    "a sparse gradient": (
        lambda param, _: setattr(param, "grad", torch.eye(4, 3).to_sparse()),
        RuntimeError,
        "does not take sparse gradients",
    ),
    "a state of another shape": (
        swap_entry("exp_avg", torch.zeros(2, 2)),
        RuntimeError,
        r"exp_avg of.*\(2, 2\)",
    ),
    "a state of another dtype": (
        swap_entry("exp_avg_sq", torch.zeros(4, 3).double()),
        RuntimeError,
        "is torch.float64",
    ),
}


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("what", SWAPS)
def test_swapped_tensors(what, stepped, impl):
    swap, error, sentence = SWAPS[what]
    bystander, param = Parameter(torch.ones(5)), Parameter(torch.ones(4, 3))
    bystander.grad, param.grad = torch.ones(5), torch.ones(4, 3)
    optimizer = AdamW([bystander, param], impl=impl)
    if stepped or "state" in what:
        optimizer.step()
    before, steps = (
        bystander.detach().clone(),
        [float(state["step"]) for state in optimizer.state.values()],
    )
    swap(param, optimizer.state[param])
    with pytest.raises(error, match=sentence):
        optimizer.step()
    assert torch.equal(bystander, before)
    assert [float(state["step"]) for state in optimizer.state.values()] == (
        steps or [0.0, 0.0][: len(optimizer.state)]
    )


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ([], ValueError),
        (torch.zeros(3), TypeError),
        (["weight"], TypeError),
        ([Parameter(torch.zeros(3)) * 2], ValueError),
        ([torch.zeros(3, dtype=torch.complex64)], TypeError),
        ([torch.zeros(3, dtype=torch.int64)], TypeError),
    ],
)
def test_parameters_which_cannot_be_trained(params, error):
    with pytest.raises(error):
        AdamW(params)
