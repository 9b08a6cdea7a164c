"""Lazy logits: chains of views, copies, functions and changes in place on them against the same on
dense ones.

Everything that a chain has made is looked at: dtype, shape and strides when it is made, its numbers
when all is done (so that memory which is shared, or not, shows), and the gradients of a loss of all
of it.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from fastft.loss.lazy.evaluation import Evaluation
from fastft.loss.lazy.logits import lazy_linear
from fastft.loss.lazy.report import Report

EXAMPLES = 300
B, S, V, H = 2, 3, 5, 4
ROW = torch.linspace(-1, 1, V)
MASK = torch.tensor([True, False, False, True, False])


def in_place_unrecorded(z):
    with torch.no_grad():
        z.mul_(2)
    return z


def detached_in_place(z):
    with torch.no_grad():
        z.detach().mul_(0.5)
    return z


def row_zeroed(z):
    z[0].zero_()
    return z


def through_reshape(z):
    z.reshape(-1, V).add_(1.0)
    return z


def row_set(z):
    z[-1] = 0.5
    return z


def rows_set_by_mask(z):
    z[torch.arange(z.shape[0]) % 2 == 1] = -0.5
    return z


def some_classes_added_to(z):
    z[..., 1:3] += 1.0
    return z


def scattered_(z):
    return z.scatter_(-1, torch.ones(*z.shape[:-1], 1, dtype=torch.int64), 0.75)


def copied_into(z):
    return z.copy_(ROW.expand(z.shape))


def without_gradients(z):
    with torch.no_grad():
        return z.tanh()


def read(z):
    z.detach().double().sum().item()
    return z


def hooked(z):
    z.register_hook(lambda gradient: gradient * 0.5)
    return z


def retained(z):
    z.retain_grad()
    return z


def in_inference_mode(z):
    with torch.inference_mode():
        (z * 1.0).view(-1, V).argmax(-1)
    return z


VIEWS = {
    "view": lambda z: z.view(-1, V),
    "transpose": lambda z: z.transpose(0, -2),
    "permute": lambda z: z.permute(*reversed(range(z.dim() - 1)), -1),
    "slice": lambda z: z[..., :-1, :] if z.dim() > 1 and z.shape[-2] > 1 else z[:],
    "step": lambda z: z[::2] if z.dim() > 1 else z,
    "last": lambda z: z[-1] if z.dim() > 1 else z,
    "narrow": lambda z: z.narrow(0, 0, 1) if z.dim() > 1 else z,
    "unsqueeze": lambda z: z.unsqueeze(0) if z.dim() < 4 else z,
    "squeeze": lambda z: z.squeeze(0) if z.dim() > 1 else z,
    "flatten": lambda z: z.flatten(0, -2) if z.dim() > 1 else z,
    "split": lambda z: z.split(1)[0] if z.dim() > 1 else z,
    "chunk": lambda z: z.chunk(2)[-1] if z.dim() > 1 else z,
    "unbind": lambda z: z.unbind(0)[-1] if z.dim() > 1 else z,
    "iterate": lambda z: next(iter(z)) if z.dim() > 1 else z,
    "movedim": lambda z: z.movedim(0, -2) if z.dim() > 1 else z,
    "swapaxes": lambda z: z.swapaxes(0, -2) if z.dim() > 1 else z,
    "new axis": lambda z: z[None] if z.dim() < 4 else z,
    "expand": lambda z: z[:1].expand(2, *z.shape[1:]) if z.dim() > 1 else z,
    "classes": lambda z: z[..., torch.arange(V)] if z.dim() > 1 else z,
    "reshape": lambda z: z.reshape(-1, V),
    "all": lambda z: z[..., :V],
}
COPIES = {
    "clone": lambda z: z.clone(),
    "clone contiguous": lambda z: z.clone(memory_format=torch.contiguous_format),
    "contiguous": lambda z: z.contiguous(),
    "index": lambda z: z[torch.tensor([0, 0])] if z.dim() > 1 else z.clone(),
    "index inside": lambda z: z[:, torch.tensor([0])] if z.dim() > 2 else z.clone(),
    "mask": lambda z: z[torch.arange(z.shape[0]) % 2 == 0] if z.dim() > 1 else z.clone(),
    "mask inside": lambda z: (
        z[:, torch.ones(z.shape[1], dtype=torch.bool)] if z.dim() > 2 else z.clone()
    ),
    "mask of rows": lambda z: (
        z[torch.ones(z.shape[:-1], dtype=torch.uint8).bool()] if z.dim() > 2 else z.clone()
    ),
    "index of a list": lambda z: z[[0, -1]] if z.dim() > 1 else z.clone(),
    "pairs": lambda z: z[[0, -1], [-1, 0]] if z.dim() > 2 else z.clone(),
    "rows that are true": lambda z: z[z.detach().sum(-1) > -1e9] if z.dim() > 2 else z.clone(),
    "cat": lambda z: torch.cat([z, z]) if z.dim() > 1 else z.clone(),
    "flip": lambda z: z.flip(0) if z.dim() > 1 else z.clone(),
    "deepcopy": copy.deepcopy,  # which torch refuses where there is a history
    "index_select": lambda z: z.index_select(0, torch.tensor([0])) if z.dim() > 1 else z.clone(),
    "to copy": lambda z: z.to(z.dtype, copy=True),
    "to copy by position": lambda z: z.to(z.dtype, False, True),
}
FUNCTIONS = {
    "tanh": lambda z: z.tanh(),
    "exp": lambda z: z.clamp(max=1.0).exp(),
    "sigmoid": lambda z: torch.sigmoid(z),
    "relu": lambda z: F.relu(z),
    "softmax": lambda z: z.softmax(-1),
    "log_softmax": lambda z: F.log_softmax(z, dim=-1),
    "softmax in fp32": lambda z: F.softmax(z, -1, dtype=torch.float32),
    "logsigmoid": lambda z: F.logsigmoid(z),
    "scale": lambda z: z * 0.5,
    "row": lambda z: z + ROW,
    "row in front": lambda z: torch.sub(ROW.view(1, V), z) if z.dim() > 1 else ROW - z,
    "square": lambda z: z * z,
    "negated": lambda z: -z,
    "divided": lambda z: z / 2,
    "without gradients": without_gradients,
    "float": lambda z: z.float(),
    "bfloat16": lambda z: z.bfloat16(),
    "double": lambda z: z.to(torch.float64),
    "less its logsumexp": lambda z: z - z.logsumexp(-1, keepdim=True),
    "masked": lambda z: z.masked_fill(MASK, 0.25),
    "where it is more than its mean": lambda z: torch.where(z > z.mean(-1, keepdim=True), z, -z),
    "mixed with its half": lambda z: torch.stack([z, z * 0.5]).logsumexp(0),
    "rows by rows": lambda z: z * torch.linspace(0.5, 1, z.numel()).view(z.shape).to(z.dtype),
}
IN_PLACE = {
    "mul_": lambda z: z.mul_(0.5),
    "add_ row": lambda z: z.add_(ROW),
    "tanh_": lambda z: z.tanh_(),
    "masked_fill_": lambda z: z.masked_fill_(MASK, 0.25),
    "sub_": lambda z: z.sub_(0.25),
    "div_": lambda z: z.div_(2),
    "clamp_": lambda z: z.clamp_(-1, 1),
    "relu_": lambda z: z.relu_(),
    "sigmoid_": lambda z: z.sigmoid_(),
    "zero_": lambda z: z.zero_(),
    "index_fill_": lambda z: z.index_fill_(-1, torch.tensor([2]), 0.5),
    "scatter_": scattered_,
    "copy_": copied_into,
    "row set": row_set,
    "rows set by mask": rows_set_by_mask,
    "some classes added to": some_classes_added_to,
    "row zeroed": row_zeroed,
    "through reshape": through_reshape,
    "in place, unrecorded": in_place_unrecorded,
    "detached, in place": detached_in_place,
    "in inference mode": in_inference_mode,
}
REDUCTIONS = {
    "sum": lambda z: z.sum(-1),
    "mean": lambda z: z.mean(-1, keepdim=True),
    "sum in fp64": lambda z: z.sum(dim=(-1,), dtype=torch.float64),
    "sum of all": lambda z: z.sum(),
    "mean of all": lambda z: torch.mean(z),
    "take_along_dim": lambda z: torch.take_along_dim(
        z, torch.ones(*z.shape[:-1], 1, dtype=torch.int64), -1
    ),
    "logsumexp": lambda z: z.logsumexp(-1),
    "amax": lambda z: z.amax(-1, True),
    "topk": lambda z: z.topk(2, -1).values,
    "max": lambda z: z.max(-1).values,
    "argmax": lambda z: torch.argmax(z, dim=-1, keepdim=True),
    "gather": lambda z: z.gather(-1, torch.ones(*z.shape[:-1], 2, dtype=torch.int64)),
    "cross entropy": lambda z: F.cross_entropy(z.reshape(-1, V), torch.arange(z.numel() // V) % V),
    "cross entropy of rows": lambda z: F.cross_entropy(
        z.reshape(-1, V), torch.arange(z.numel() // V) % V, reduction="none"
    ),
    "cross entropy of probabilities": lambda z: F.cross_entropy(
        z.reshape(-1, V), torch.linspace(0, 1, z.numel()).view(-1, V).softmax(-1)
    ),
    "nll": lambda z: F.nll_loss(
        z.log_softmax(-1).reshape(-1, V), torch.zeros(z.numel() // V, dtype=torch.int64)
    ),
}
LOOKS = {"read": read, "hooked": hooked, "retained": retained}
STEPS = {**VIEWS, **COPIES, **FUNCTIONS, **IN_PLACE, **REDUCTIONS, **LOOKS}
# torch forbids to change one of them in place
SEVERAL = ("split", "chunk", "unbind", "iterate")
# whose result jumps where a number is rounded otherwise
JUMPS = ("where it is more than its mean", "argmax", "rows that are true")


def made_by(chain, logits):
    """All that a chain makes and how it lay when it was made; what raises ends it."""
    made, layouts, used = [logits], [], False
    for name, back in chain:
        source = made[-1 - back % len(made)]
        used |= name not in VIEWS and name not in LOOKS
        if used and name in ("hooked", "retained"):
            continue  # gradients that are watched too late are an error, which says so
        if name not in VIEWS and source.shape[-1:] != (V,) and name != "clone":
            continue
        try:
            result = STEPS[name](source)
        except (RuntimeError, IndexError) as error:
            return made, [*layouts, type(error)]
        strides = [
            stride for stride, size in zip(result.stride(), result.shape, strict=True) if size != 1
        ]
        layouts.append((name, result.dtype, tuple(result.shape), strides))
        if name not in REDUCTIONS:
            made.append(result)
        else:
            made.insert(0, result)
    return made, layouts


def gradients_of(made, leaves):
    """Of a loss of everything."""
    total = sum(
        (part.double() * (1 + index)).sum()
        for index, part in enumerate(made)
        if part.is_floating_point()
    )
    for leaf in leaves:
        leaf.grad = None
    total.backward()
    return [leaf.grad for leaf in leaves]


class Kind(NamedTuple):
    dtype: torch.dtype
    autocast: bool = False
    evaluation: bool = False  # nothing is recorded, and what is lazy is handed on

    @property
    def rounds(self):
        """Whether it rounds to 16 bits."""
        return self.autocast or self.dtype == torch.bfloat16

    def __str__(self):
        return (
            f"{self.dtype}".removeprefix("torch.")
            + "+autocast" * self.autocast
            + "+evaluation" * self.evaluation
        )


def run(chain, lazy, kind):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(*shape, generator=generator).to(kind.dtype) for shape in ((B, S, H), (V, H))
    )
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    evaluation = Evaluation(lambda: True) if kind.evaluation else None
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=kind.autocast),
        torch.set_grad_enabled(not kind.evaluation),
    ):
        z = (
            lazy_linear(x, weight, None, Report(), evaluation=evaluation)
            if lazy
            else F.linear(x, weight)
        )
        made, layouts = made_by(chain, z)
    return made, layouts, leaves


def made_of_several_views(chain):
    return any(name in SEVERAL for name, _ in chain)


def compare(chain, kind):
    (dense, expected, leaves), (lazy, actual, lazy_leaves) = (
        run(chain, is_lazy, kind) for is_lazy in (False, True)
    )
    if (
        expected[-1:] == [RuntimeError]
        and len(actual) >= len(expected)
        and made_of_several_views(chain)
    ):
        return  # which torch forbids to change in place
    assert actual == expected
    wanted, found = None, []
    if not kind.evaluation:
        # changed in place what backward needs: lazily, it may not need it
        with contextlib.suppress(RuntimeError):
            wanted = gradients_of(dense, leaves)
    if wanted is not None:
        found = gradients_of(lazy, lazy_leaves)
    names = {name for name, _ in chain}
    if kind.rounds or "bfloat16" in names:
        # other orders of summation round differently
        if not names & {*JUMPS}:
            assert_roughly_alike(lazy, dense)
        return
    near = {"rtol": 1e-5, "atol": 1e-5}
    if kind.dtype == torch.float32:
        if names & {*JUMPS}:
            return
        near = {"rtol": 1e-3, "atol": 1e-4}
    for mine, theirs in zip(lazy, dense, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), **near)
    for mine, theirs in zip(found, wanted or [], strict=True):
        torch.testing.assert_close(mine, theirs, **near)


def assert_roughly_alike(lazy, dense):
    """A wrong number is found, and a rounding of 16 bits is none."""
    for mine, theirs in zip(lazy, dense, strict=True):
        allowed = 0.1 * max(1.0, float(theirs.detach().abs().max()) if theirs.numel() else 1.0)
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=0.0, atol=allowed)


STEP = st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from([0, 0, 0, 0, 1, 2]))
KINDS = [Kind(torch.float64), Kind(torch.float32, autocast=True), Kind(torch.bfloat16)]
KINDS += [Kind(torch.float64, evaluation=True), Kind(torch.float32)]
KINDS += [Kind(torch.bfloat16, evaluation=True), Kind(torch.float32, True, True)]


class Case(NamedTuple):
    chain: list[tuple[str, int]]  # steps, each with how far back the tensor lies that it is done to
    kind: Kind


CASES = st.builds(Case, st.lists(STEP, min_size=1, max_size=9), st.sampled_from(KINDS))


def check(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of expanded tensors that are changed in place
        compare(*case)
