"""AdamW's life: each step is the one that is done by hand, in every way of keeping values; engines,
tiers of offload and gradients that backward uses up have the same bits; and what rounds nothing
follows torch.

Steps, accumulation, thrown away gradients, groups that come later, frozen parameters, learning
rates, loss scaling, closures, weights that somebody else writes, saving and loading, copies.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from support import adamw_by_hand as by_hand
from support.numerics import assert_no_worse
from torch import Tensor, nn

import fastft
from fastft.optim.adamw_state import State

EXAMPLES = 40
SHAPES = ((1,), (63,), (5, 7), (3, 130), (2, 3, 5), (0, 4), (4097,), (1, 257), ())
EVENTS = ("step", "step", "step", "accumulate", "discard", "freeze", "thaw", "rate", "add")
EVENTS += ("closure", "write", "save", "copy", "decay", "negated", "strides", "weights", "broken")
EVENTS += ("scaled",)
MOMENTS = ("fp32", "fp32", "bf16", "8bit", "4bit")
BETAS = ((0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.3, 0.5), (0.95, 0.99))
# what there is not with gradients that backward uses up, and what is done in its place
RELEASED = dict.fromkeys(("accumulate", "closure", "negated", "strides"), "step")
RELEASED |= {"discard": "", "broken": ""}
FREED = ("gradients", "overlap", "released")  # without a GradScaler
# what leaves all that is kept as it is
WITHOUT_STEP = ("discard", "broken", "save", "copy", "weights", "rate", "decay", "freeze", "thaw")


class Case(NamedTuple):
    shapes: list[tuple[int, ...]]
    dtype: str
    moments: str
    rounding: str
    clip: float | None
    amsgrad: bool
    maximize: bool
    betas: tuple[float, float]
    eps: float
    tensors: bool  # rates and betas are
    offload: str | None
    events: list[tuple[str, int]]


CASES = st.builds(
    Case,
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    moments=st.sampled_from(MOMENTS),
    rounding=st.sampled_from(["exact", "exact", "kahan", "stochastic", "nearest"]),
    clip=st.none() | st.sampled_from([0.01, 1.0, 1e6]),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    betas=st.sampled_from(BETAS),
    eps=st.sampled_from([1e-8, 1e-8, 1e-30, 1e-3, 1.0]),
    tensors=st.booleans(),
    offload=st.sampled_from([None, "states", "gradients", "overlap", "released"]),
    events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 1000)), max_size=12),
)


class _Life:
    """Parameters with their optimizer, which take one event after another."""

    def __init__(self, case: Case, kind: str) -> None:
        self.case, self.kind = case, kind
        dtype = getattr(torch, case.dtype)
        own = {"torch64": torch.float64, "torch32": torch.float32}.get(kind, dtype)
        generator = torch.Generator().manual_seed(0)
        self.params: list[Tensor] = [
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype).to(own))
            for shape in case.shapes
        ]
        self.writes, self.written = 0, set[int]()  # weights that others wrote since their last step
        self.clip = None if case.offload == "released" else case.clip
        self.late = self.params[len(self.params) // 2 + 1 :]
        self.optimizer = self._made(self.params[: len(self.params) // 2 + 1])

    def _made(self, params: list[Tensor]) -> torch.optim.Optimizer:
        case = self.case
        options: dict[str, Any] = {"amsgrad": self._amsgrad(case.moments), "eps": case.eps}
        options |= {"maximize": case.maximize, "betas": self._betas(case.betas)}
        groups = [{"params": params, "lr": self._rate(0.01)}]
        if self.kind.startswith("torch"):
            return torch.optim.AdamW(groups, fused=True, **options)
        options |= {"moments": case.moments, "rounding": case.rounding, "max_grad_norm": self.clip}
        how: dict[str, Any] = {
            "ours": {},
            "eager": {"impl": "eager"},
            "released": {"release_gradients": True},
        }.get(self.kind, {"offload": self.kind})
        made = fastft.AdamW(groups, seed=7, **options, **how)
        # the steps by hand take what the groups say
        asked = {name: made.param_groups[0][name] for name in ("betas", "eps", "maximize")}
        assert all(options[name] == asked[name] for name in asked), f"the group has {asked}"
        return made

    def _rate(self, value: float) -> Any:
        return torch.tensor(value) if self.case.tensors else value

    def _betas(self, betas: tuple[float, float]) -> Any:
        return tuple(map(torch.tensor, betas)) if self.case.tensors else betas

    def _amsgrad(self, moments: str) -> bool:
        return self.case.amsgrad and moments in ("fp32", "bf16")

    def _given(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def _look(self) -> list[by_hand.Kept]:
        return by_hand.look(self.optimizer, [self.params[at] for at in self.written])

    def _backward(self, number: int, scaler: torch.amp.GradScaler | None = None) -> None:
        """The gradient of each is a number that its dtype holds, the same in every life."""
        generator = torch.Generator().manual_seed(number)
        scale = 10.0 ** (number % 7 - 3)
        losses = []
        for at, param in enumerate(self.params):
            drawn = scale * torch.randn(param.shape, generator=generator)
            drawn = drawn.to(getattr(torch, self.case.dtype)).to(param.dtype)
            used = (number + at) % 5  # one in five takes no part
            if param.requires_grad and used:
                losses.append((param * drawn).sum())
        if losses:
            loss = torch.stack(losses).sum()
            (loss if scaler is None else scaler.scale(loss)).backward()

    def _step(self) -> None:
        if self.kind.startswith("torch"):
            given = self._given()
            for param in given:
                if param.grad is not None:  # accumulated in the dtype of the others
                    param.grad = param.grad.to(getattr(torch, self.case.dtype)).to(param.dtype)
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(given, self.clip)
        self._take_step(self.optimizer.step)

    def _take_step(
        self, step: Callable[[], Any], scale: float = 1.0, skipped: bool = False
    ) -> None:
        before = self._look() if self.kind == "ours" else []
        step()
        if self.kind == "ours" and skipped:
            by_hand.check_same(before, self._look())
        elif self.kind == "ours":
            moved = [param for param in self._given() if param.grad is not None]
            self.written -= {
                at for at in self.written if any(self.params[at] is param for param in moved)
            }
            how = {"rounding": self.case.rounding, "max_norm": self.clip, "scale": scale}
            by_hand.check_step(self.optimizer, before, self._look(), **how)
        self._discard()

    def _discard(self) -> None:
        for param in self.params:
            param.grad = None

    def take(self, event: str, number: int) -> None:
        case = self.case
        if event == "scaled" and case.offload in FREED:
            event = "step"
        if case.offload == "released":
            event = RELEASED.get(event, event)
        before = self._look() if self.kind == "ours" and event in WITHOUT_STEP else None
        if event:
            getattr(self, f"_{event}_")(number)
        if before is not None:
            split_anew = event == "weights" and case.rounding == "kahan"
            by_hand.check_same(before, self._look(), split_anew=split_anew)

    def _step_(self, number: int) -> None:
        self._backward(number)
        self._step()

    def _accumulate_(self, number: int) -> None:
        self._backward(number)
        self._backward(number + 1)
        self._step()

    def _discard_(self, number: int) -> None:
        self._backward(number)
        self.optimizer.zero_grad()
        self._discard()

    def _closure_(self, number: int) -> None:
        if self.kind.startswith("torch"):  # whose clipping would come too early
            self._step_(number)
            return

        def closure() -> Tensor:
            self._backward(number)
            return torch.zeros(())

        self._take_step(lambda: self.optimizer.step(closure))

    def _scaled_(self, number: int) -> None:
        """By a GradScaler, which finds Inf in one of three."""
        follows = self.kind.startswith("torch")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (number % 20))
        self._backward(number, None if follows else scaler)
        grads = [p.grad for p in self._given() if p.grad is not None and p.numel()]
        skipped, unscaled = number % 3 == 0 and bool(grads), number % 2 == 0
        if skipped:
            grads[0].view(-1)[-1] = torch.inf
        if not grads or (follows and not skipped):
            self._step()
        elif follows:
            self._discard()
        else:
            if unscaled:
                scaler.unscale_(self.optimizer)
            scale = 1.0 if unscaled else scaler.get_scale()
            self._take_step(lambda: scaler.step(self.optimizer), scale, skipped)
            assert self.optimizer.step_was_skipped == skipped

    def _broken_(self, number: int) -> None:
        """A closure that raises behind its backward pass: nothing has moved."""

        def closure() -> Tensor:
            self._backward(number)
            raise ArithmeticError

        if not self.kind.startswith("torch"):
            with contextlib.suppress(ArithmeticError):
                self.optimizer.step(closure)
            self.optimizer.zero_grad()
            self._discard()

    def _weights_(self, _: int) -> None:
        """All weights into a folder, with their low bits, and from there."""
        if self.kind.startswith("torch"):
            return
        model = nn.ParameterList(self.params)
        # the disk need not be waited for
        with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
            fastft.save_fp32(model, self.optimizer, folder, max_shard_size=2000)
            if self.case.rounding == "exact":
                with torch.no_grad():
                    for param in self.params:
                        param.fill_(0.25)
            fastft.load_fp32(model, self.optimizer, folder)

    def _negated_(self, number: int) -> None:
        """Gradients that are minus their memory."""
        self._step_with(lambda grad: torch._neg_view(-grad), number)

    def _strides_(self, number: int) -> None:
        """Gradients whose last dimension is not the one that lies together."""
        self._step_with(lambda grad: grad.movedim(-1, 0).contiguous().movedim(0, -1), number)

    def _step_with(self, put: Callable[[Tensor], Tensor], number: int) -> None:
        self._backward(number)
        for param in self.params:
            # torch refuses the first
            if param.grad is not None and param.ndim and not self.kind.startswith("torch"):
                param.grad = put(param.grad.clone())
        self._step()

    def _freeze_(self, number: int) -> None:
        self.params[number % len(self.params)].requires_grad_(False)

    def _thaw_(self, number: int) -> None:
        self.params[number % len(self.params)].requires_grad_(True)

    def _rate_(self, number: int) -> None:
        group = self.optimizer.param_groups[0]
        if self.case.tensors and number % 2:
            group["lr"].fill_(number / 1e5)
        else:
            group["lr"] = self._rate(number / 1e5)

    def _decay_(self, number: int) -> None:
        self.optimizer.param_groups[-1]["weight_decay"] = number / 1e4

    def _add_(self, number: int) -> None:
        """A group with options of its own."""
        if not self.late:
            return
        group = {"params": [self.late.pop(0)], "lr": self._rate(number / 1e5)}
        group |= {"betas": self._betas(BETAS[number % 5]), "maximize": number % 2 == 0}
        if self.case.moments != "fp32":  # which may have to follow torch
            moments = MOMENTS[number % 5]
            group |= {"moments": moments, "amsgrad": self._amsgrad(moments)}
        self.optimizer.add_param_group(group)

    def _write_(self, number: int) -> None:
        at = number % len(self.params)
        param = self.params[at]
        self.written.add(at)
        self.writes += 1  # a value that no weight has yet: the same bits again would be no change
        with torch.no_grad():
            param.copy_(torch.full_like(param, 8.0 + self.writes))

    def _save_(self, _: int) -> None:
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        groups = self.optimizer.param_groups
        self.optimizer = self._made(groups[0]["params"])
        for group in groups[1:]:
            kept = {name: group[name] for name in ("params", "moments", "amsgrad") if name in group}
            self.optimizer.add_param_group(kept)
        with torch.serialization.safe_globals([State]):
            self.optimizer.load_state_dict(torch.load(file))

    def _copy_(self, _: int) -> None:
        together = {"params": self.params, "late": self.late, "optimizer": self.optimizer}
        vars(self).update(copy.deepcopy(together))

    def masters(self) -> list[Tensor]:
        """The parameters, of 16 bits with their low ones."""
        if isinstance(self.optimizer, fastft.AdamW):
            # a write to a weight that had no gradient since is told of when it is asked for
            self.optimizer.forget_stale_remainders()
        return [_master(param, self.optimizer.state.get(param, {})) for param in self.params]

    def values(self) -> list[Tensor]:
        """What was trained, in the form that this life keeps it in."""
        states = self.optimizer.state_dict()["state"]
        entries = [states[key][name] for key in sorted(states) for name in sorted(states[key])]
        return [param.detach() for param in self.params] + list(map(torch.as_tensor, entries))


def check(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bf16 weights that were written, a rounding of fp32
        _check(case)


def _check(case: Case) -> None:
    kinds = ["ours", "eager", *([case.offload] if case.offload else [])]
    # what fp32 is to follow: everything but moments that are rounded, and weights that are
    exact = case.dtype == "float32" or case.rounding == "exact"
    followed = case.moments == "fp32" and exact
    lives = {kind: _Life(case, kind) for kind in kinds}
    torchs = {kind: _Life(case, kind) for kind in ("torch32", "torch64") if followed}
    for event, number in [*case.events, ("step", 3)]:
        for life in (*lives.values(), *torchs.values()):
            life.take(event, number)
    ours = lives.pop("ours")
    for kind, life in lives.items():
        # plain torch rounds a product with its sum twice, which is off in one of 2^29: it was seen
        # once in 2,227 cases of up to 4,097 weights
        allowed = 2**-10 if kind == "eager" else 0.0
        for at, (mine, other) in enumerate(zip(ours.values(), life.values(), strict=True)):
            assert mine.dtype == other.dtype and mine.shape == other.shape
            differ = (_bytes(mine) != _bytes(other)).sum() if mine.numel() else 0
            same = differ <= allowed * mine.numel()
            assert same, f"value {at} of {kind!r} differs from the resident optimizer's"
    if followed:
        results = (life.masters() for life in (ours, torchs["torch32"], torchs["torch64"]))
        for at, each in enumerate(zip(*results, strict=True)):
            assert_no_worse(*each, f"parameter {at}", terms=20)


def _master(param: Tensor, state: dict[str, Any]) -> Tensor:
    if "remainder" not in state:
        return param.detach()
    return by_hand.with_remainder(param, state["remainder"])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
