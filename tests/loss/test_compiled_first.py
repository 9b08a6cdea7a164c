"""Every public function of tensors, called for the first time in a process by compiled code."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastft.foreign import private_names
from fastft.ops import Operator

HEAD = """
import sys, torch, fastft
torch.manual_seed(0)
backend = sys.argv[1]
x, head, logits = (torch.randn(shape, requires_grad=True) for shape in ((6, 5), (7, 5), (6, 7)))
target = torch.tensor([0, 1, -100, 6, 2, 3])

def check(function, *leaves, fullgraph=True):
    results = []
    compiled_first = torch.compile(function, backend=backend, fullgraph=fullgraph), function
    for run in compiled_first:
        value = run(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
"""
FUNCTIONS = {
    "cross_entropy": "check(lambda z: fastft.cross_entropy(z, target), logits)",
    "cross_entropy of probabilities": (
        "p = torch.rand(6, 7)\ncheck(lambda z: fastft.cross_entropy(z, p), logits)"
    ),
    "CrossEntropyLoss": (
        "loss = fastft.CrossEntropyLoss()\ncheck(lambda z: loss(z, target), logits)"
    ),
    "linear_cross_entropy": (
        "check(lambda x, w: fastft.linear_cross_entropy(x, w, target), x, head)"
    ),
    "LinearCrossEntropyLoss": (
        "loss = fastft.LinearCrossEntropyLoss(5, 7)\ncheck(lambda x: loss(x, target), x)"
    ),
    "linear_log_probs": """
def use(x, w):
    tokens = fastft.linear_log_probs(x, w, target)
    return (tokens.log_probs * 2 + tokens.entropy + tokens.lse).sum()
check(use, x, head)""",
    # a function of the user's is differentiated inside the forward pass, which is a graph break
    "linear_token_loss": """
def use(x, w):
    return fastft.linear_token_loss(x, w, target, lambda tokens: tokens.log_probs.exp())
check(use, x, head, fullgraph=False)""",
    "AdamW.step": """
params = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
for param in params:
    optimizer = fastft.AdamW([param])
    param.grad = torch.arange(12.0).view(3, 4)
    (torch.compile(optimizer.step, backend=backend) if param is params[0] else optimizer.step)()
assert torch.equal(*params) and not torch.equal(params[0], torch.ones(3, 4))""",
    "seq2seq_masks": """
collator = fastft.PackingCollator(task="seq2seq", decoder_start_token_id=0)
batch = collator([{"input_ids": [5, 6, 7], "labels": [8]}, {"input_ids": [9], "labels": [10, 11]}])
compiled = torch.compile(fastft.seq2seq_masks, backend=backend)(batch)
assert all(map(torch.equal, compiled, fastft.seq2seq_masks(batch)))""",
}
QUICK = ("cross_entropy", "linear_cross_entropy")


def cases():
    for name in FUNCTIONS:
        for backend in ("eager", "aot_eager", "inductor"):
            slow = () if name in QUICK and backend == "aot_eager" else pytest.mark.slow
            yield pytest.param(name, backend, marks=slow, id=f"{name}, {backend}")


@pytest.mark.parametrize(("name", "backend"), list(cases()))
def test_compiled_code_may_be_the_first_to_call(name: str, backend: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", HEAD + FUNCTIONS[name], backend]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_choice_of_an_engine_is_a_constant_as_torch_marks_one() -> None:
    def function() -> None: ...

    before = set(vars(function))
    torch.compiler.assume_constant_result(function)
    (mark,) = set(vars(function)) - before
    assert getattr(Operator.resolve, mark) is True
    assert any(mark in name for name in private_names.PRIVATE_NAMES)
