"""The optimizer AdamW: torch's interface, one call for all tensors, no fp32 copies beside bf16.

The formula, how parameters and moments are kept, and the bytes that a step moves: adamw_update.py.
Bytes resident for each element, gradient included (amsgrad adds 4, or 2 with bf16 moments):

    parameter         fp32 moments   bf16 moments   8-bit moments   4-bit moments
    fp32                        16             12           10.06            9.56
    bf16 exact, kahan           14             10            8.06            7.56
    bf16 stochastic             12              8            6.06            5.56

Clipping adds one reading of the gradients (4 or 2 bytes an element); torch's clip_grad_norm_ adds
three passes' worth.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import compress, repeat
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastft import ops
from fastft.foreign import engines, tensors
from fastft.optim import checkpoint, device_counts, weight_bits
from fastft.optim.adamw_plan import Plan, same_objects
from fastft.optim.adamw_state import state_bytes
from fastft.optim.adamw_update import Rounding
from fastft.optim.grad_norm import GRAD_NORM, ToClip, clip_factor, grad_norm
from fastft.optim.groups import check_group, check_max_grad_norm
from fastft.optim.offload.choice import Choice, choose_for
from fastft.optim.offload.deferred import Followed, PendingStep
from fastft.optim.offload.gradients import HeldGradients
from fastft.optim.offload.host_memory import check_that_it_suffices, processes_here
from fastft.optim.offload.refused import (
    check_capturable,
    check_engine,
    check_offload,
    check_step,
)
from fastft.optim.offload.released import ReleasedGradients
from fastft.optim.offload.tiers import OF_GRADIENTS
from fastft.optim.origin import Origin
from fastft.signals import Held

ROUNDINGS = tuple(rounding.name.lower() for rounding in Rounding if rounding != Rounding.FP32)
# what every AdamW has, of a group and of the whole; another value is lost where a library puts its
# own in our place
_GROUP_OF_ANY: dict[str, Any] = {"amsgrad": False, "maximize": False, "moments": "fp32"}
_OPTIMIZER_OF_ANY: dict[str, Any] = {
    "rounding": "exact",
    "max_grad_norm": None,
    "impl": "auto",
    "offload": None,
    "release_gradients": False,
}


class _Clipping(NamedTuple):
    """A norm taken before the step, with the gradients it was taken of."""

    norm: Tensor
    max_norm: float
    grads: list[Tensor]
    versions: list[int]


class AdamW(torch.optim.AdamW):
    """AdamW with torch's interface and fp32 moments; bf16 parameters follow fp32 AdamW to the bit.

    It is a `torch.optim.AdamW` because libraries decide by that: accelerate puts DeepSpeedCPUAdam
    in an optimizer's place under ZeRO with CPU offload, and makes its weight decay decoupled for
    instances of this class alone. Nothing of torch's constructor or step is used.

    `state[p]` holds `step` (float32, on the CPU unless `capturable`), `exp_avg`, `exp_avg_sq`
    (float32, or bfloat16 with `moments="bf16"`; the shape of p), with amsgrad `max_exp_avg_sq`
    (likewise) and, for bf16 parameters, `remainder` (int16, with `rounding="exact"`) or `kahan`
    (bfloat16). With `moments="8bit"`, `exp_avg` and `exp_avg_sq` are int8 and uint8 codes, and
    `exp_avg_scale`, `exp_avg_sq_scale` (float32, rows x blocks) go with them; with "4bit" `exp_avg`
    is uint8, rows x bytes of two codes. State dicts of fp32 parameters with fp32 moments load into
    `torch.optim.AdamW`, its state dicts load here, and saving and loading keeps every dtype and
    bit; an optimizer with other `moments` converts what it loads.

    torch's `GradScaler` is served through its attributes: with `found_inf`, for which the step
    waits unless it is `capturable`, nothing is updated or counted and `step_was_skipped` is True. A
    gradient that is NaN or Inf without a GradScaler spoils its own element, and with clipping, as
    in torch, every element.

    Attributes:
        grad_norm: the norm of all gradients before the last clipping: float32, shape (); None
            before the first.
        origin: how `adamw`, `adamw_spec` or `plug` was called for it; None: made by hand.
        had_gradients: whether a step has found a gradient, or has said that there is none.
        choice: what `offload="auto"` has chosen, and why; None: it was not asked for.

    Args:
        params: float32 or bfloat16 tensors, `(name, tensor)` pairs, or parameter groups (dicts), of
            any layout.
        lr: learning rate; a one-element tensor is read at each step, which waits for the device if
            it is on one, unless `capturable`.
        betas: decay of the running averages of the gradient and of its square, each in [0, 1); both
            numbers or both one-element tensors.
        eps: added to the denominator.
        weight_decay: decoupled: each step scales the parameter by 1 - lr * weight_decay.
        amsgrad: divide by the largest `exp_avg_sq` so far.
        maximize: ascend instead of descend.
        foreach: accepted for torch's signature, ignored: all tensors are always updated in one
            call.
        capturable: where parameters are on a GPU, steps are counted there, so that a CUDA graph can
            capture `step`: the replay counts, reads `lr` where that is a tensor on the GPU, and
            obeys GradScaler's `found_inf` without waiting. impl "cuda" only: capturing another
            raises, as does capturing without this. Take a step before capturing, and capture anew
            where groups, states or the parameters that have a gradient have changed. No effect on
            CPU parameters.
        differentiable: must be False.
        fused: as foreach.
        moments: how the running averages are kept: "fp32"; "bf16", rounded stochastically; "8bit",
            codes with a scale for each block of 128 elements of a row (moments_8bit.py), likewise;
            or "4bit", such codes of 4 bits for the first and 8 for the second (moments_4bit.py).
            Codes are not for amsgrad, and vectors of fewer than 4,096 elements keep fp32. A
            parameter group may have its own.
        rounding: how a bf16 parameter is kept: "exact" keeps the 16 bits which rounding drops and
            follows fp32 to the last bit; "kahan" keeps a bf16 compensation; "stochastic" keeps
            nothing and is right in the mean; "nearest" keeps nothing and loses small updates. fp32
            parameters need none: it is ignored, with one warning.
        max_grad_norm: clip the gradients of all groups together to this norm as
            `torch.nn.utils.clip_grad_norm_` does, but inside the step: `grad_norm` is the norm
            before (float32, shape ()), and `p.grad` stays as it was. With Trainer set
            `TrainingArguments(max_grad_norm=0)`, or use `fastft.fuse_clipping` instead.
        seed: of stochastic rounding, in [0, 2^63); None draws one from torch's default generator
            where anything is rounded stochastically. Kept in the parameter groups and so in the
            state dict. Processes which train the same parameters need the same seed.
        offload: what lies on the host between steps, which changes no bit of what is trained
            (offload/__init__.py has the bytes): None, nothing; "states", moments and what
            `rounding` keeps, which each step streams through two buffers on the device and waits
            for; "gradients", also each gradient as backward has produced it; "overlap", which
            also updates weights only before their next forward; or "auto", the first of None,
            "states" and "gradients" that fits the device (offload/choice.py). Not with
            `capturable`.
        release_gradients: use up each gradient inside backward, so that never all of them exist.
            Not with `max_grad_norm`, `offload` or `capturable`.
        impl: "auto", "eager" (plain torch), "cpp", "cuda" or "triton", of the update and of the
            norm that clipping takes, which Triton has no kernel for; an explicit one never falls
            back.

    Raises:
        TypeError: a parameter that is neither float32 nor bfloat16, or a hyper-parameter that is no
            number, or no bool where one is needed.
        ValueError: a hyper-parameter out of range, betas of mixed kinds, an option that is not
            implemented, an empty parameter list; or where accelerate's DeepSpeed is going to put
            DeepSpeedCPUAdam in this optimizer's place, an option that this does not have.
        RuntimeError: the host has too little memory for what is offloaded; at `step`, an explicit
            `impl` which is not available (says why), or a sparse gradient.
    """

    grad_norm: Tensor | None = None
    _skipped: bool | Tensor = False
    origin: Origin | None = None
    had_gradients = False
    choice: Choice | None = None
    _warned_of_stale = _warned_of_no_model = False
    _pending: PendingStep | None = None
    _followed: Followed | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        moments: str = "fp32",
        rounding: str = "exact",
        max_grad_norm: float | None = None,
        seed: int | None = None,
        offload: str | None = None,
        release_gradients: bool = False,
        impl: str = "auto",
        _origin: Origin | None = None,
    ) -> None:
        ops.check_impl(impl)
        if rounding not in ROUNDINGS:
            raise ValueError(
                f"rounding must be one of {', '.join(map(repr, ROUNDINGS))}, got {rounding!r}"
            )
        check_max_grad_norm(max_grad_norm)
        if max_grad_norm is not None and impl not in ("auto", "eager", *GRAD_NORM.engines):
            raise ValueError(
                f"max_grad_norm needs a norm that impl={impl!r} has no kernel for; impl='auto' has "
                "one"
            )
        check_offload(offload, release_gradients, max_grad_norm)
        params = params if _origin is None else _origin.grouped(params)
        if offload == "auto":
            params, self.choice = choose_for(params, moments, amsgrad, rounding, _origin)
            offload = self.choice.offload
        self.rounding, self.impl, self.max_grad_norm = rounding, impl, max_grad_norm
        self.offload, self.release_gradients = offload, release_gradients
        self._plan: Plan | None = None
        self._clipping: _Clipping | None = None
        self._make_keepers()
        self._warned = False
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "foreach": None,
            "fused": None,
            "decoupled_weight_decay": True,
            "moments": moments,
            "seed": seed,
        }
        check_group(defaults)
        # torch.optim.AdamW's would own the defaults
        torch.optim.Optimizer.__init__(self, params, defaults)
        self.origin = _origin
        if _origin is not None:
            _origin.is_made()
        self._check_host_memory(
            [param.requires_grad for param in self._params()],
            0 if self._held is None else sum(map(_bytes, self._params())),
            processes_here(),
        )
        if engines.optimizers_are_replaced():
            self.check_that_a_replacement_is_faithful()
        if self.frees_gradients:
            check_engine()
        if max_grad_norm is not None and engines.gradients_are_parts():
            raise ValueError(
                "the optimizer's max_grad_norm would clip to the norm of each process's part of "
                "the gradients, which DeepSpeed and FSDP1 cut into flat parts: use "
                "TrainingArguments(max_grad_norm=...), or Accelerator.clip_grad_norm_"
            )

    def check_that_a_replacement_is_faithful(self) -> None:
        """Raises where DeepSpeedCPUAdam, put in this one's place, lacks options; names them."""
        options = [
            (vars(self), _OPTIMIZER_OF_ANY),
            *((group, _GROUP_OF_ANY) for group in self.param_groups),
        ]
        lost = {
            f"{name}={of[name]!r}"
            for of, plain in options
            for name in plain
            if of[name] != plain[name]
        }
        if lost:
            raise ValueError(
                "with ZeRO's offload_optimizer accelerate puts DeepSpeedCPUAdam in this "
                f"optimizer's place, which knows no {', '.join(sorted(lost))}: leave them out, or "
                'set "zero_force_ds_cpu_optimizer": false in DeepSpeed\'s configuration, with '
                "which fastft's AdamW trains the offloaded parameters"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does; raises as the constructor does, with nothing changed."""
        if isinstance(param_group, dict):
            check_group({**self.defaults, **param_group})
            check_capturable({**self.defaults, **param_group}, self.offload, self.release_gradients)
            if not param_group.get("decoupled_weight_decay", True):
                raise ValueError(
                    "decoupled_weight_decay=False is torch.optim.Adam's; AdamW's decay is decoupled"
                )
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        for param in params:
            if param.dtype not in (torch.float32, torch.bfloat16):
                del self.param_groups[-1]
                raise TypeError(
                    f"AdamW trains float32 and bfloat16 parameters, got one of {param.dtype}"
                )
        self.watch_gradients()
        random = self.rounding == "stochastic" or self.param_groups[-1]["moments"] != "fp32"
        if random and self.param_groups[0]["seed"] is None:  # all groups have that of the first
            self.defaults["seed"] = int(torch.randint(2**63 - 1, ()))
            for group in self.param_groups:
                group["seed"] = self.defaults["seed"]
        if (
            self.rounding != "exact"
            and not self._warned
            and any(p.dtype == torch.float32 for p in params)
        ):
            self._warned = True
            warnings.warn(
                f"rounding={self.rounding!r} has no effect on float32 parameters", stacklevel=3
            )

    def __getstate__(self) -> dict[str, Any]:
        names = ("rounding", "impl", "max_grad_norm", "offload", "release_gradients", "_warned")
        # a copy cannot tell which weights others have written
        for weight in self.stale_weights(awaited=False):
            weight_bits.forget(weight, self.state[weight])
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch.optim.AdamW's looks into states that are still hidden
        torch.optim.Optimizer.__setstate__(self, state)
        self._plan = self._clipping = None
        is_copy = "_held" not in vars(self)  # or out of a pickle
        if is_copy:
            self._make_keepers()
            self.watch_gradients()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group["foreach"] = group["fused"] = None  # a checkpoint of torch's may say otherwise
            group["decoupled_weight_decay"] = True  # a checkpoint of torch's Adam says otherwise
            if self.offload is not None or self.release_gradients:
                group["capturable"] = False  # a checkpoint of another `offload` may say otherwise
        checkpoint.reveal(self)
        for weight, kept in self.state.items() if is_copy else ():
            weight_bits.mark_copied(weight, kept)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state dict; a `remainder` has its bits under bfloat16, which FSDP sends.

        Beside `state` and `param_groups` it has `weight_checksums`, of the bf16 weights that
        remainders belong to.
        """
        return checkpoint.packed(super().state_dict(), self, self.stale_weights(awaited=False))

    @torch._disable_dynamo
    def torch_state_dict(self) -> dict[str, Any]:
        """Returns what `torch.optim.AdamW` continues from: fp32 moments, and only what torch knows.

        The weights are the model's own; those of bf16 parameters lose what rounding kept for them,
        unless the model takes `save_fp32`'s. On loading, torch casts the moments to the dtype of
        its parameters.
        """
        self._settle()
        return checkpoint.for_torch(super().state_dict())

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, or of torch's, bitsandbytes', torchao's, apex',
        DeepSpeed's or TransformerEngine's AdamW.

        What is read of each: checkpoint.py. Moments become what `moments` says; fp32 masters
        overwrite the parameters. As with torch, tensors which need no conversion are shared with
        `state_dict`, not copied.

        Raises:
            ValueError: groups or shapes which do not fit this optimizer.
        """
        self.flush()
        checkpoint.load(self, state_dict)

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        It is done whole: Ctrl-C, and other signals, wait for its end.

        Args:
            closure: evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a sparse gradient, a gradient that was changed after `clip_at_step`, an
                explicit `impl` that cannot be used on these parameters, a CUDA graph that captures
                a step it could only repeat, or an earlier step broke off in its middle.
        """
        if self.frees_gradients:
            check_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with Held(), torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        self.flush()
        params, grads, present = self._with_gradients()
        if grads and device_counts.is_capturing():
            device_counts.check_capture(grads, self.param_groups, self.impl)
        clipping, self._clipping = self._clipping, None
        found_inf = getattr(self, "found_inf", None)
        self._skipped = False if found_inf is None else found_inf
        if not grads:
            self._say_that_nothing_is_trained()
        elif self._released is not None:
            self._note_training()
            self._released.step(self._params())
        elif (
            found_inf is None
            or device_counts.all_counted_there(grads, self.param_groups)
            or not self.step_was_skipped
        ):
            factor = self._to_clip(clipping) or self._grad_factor(grads, clipping)
            plan = self._plan_of(params, present)
            seed = self.param_groups[0]["seed"] or 0
            if self._held is not None:
                grads = self._held.on_host(grads)
            while not plan.step(self.param_groups, grads, factor, seed, found_inf):
                plan = self._new_plan(present)
            if isinstance(factor, ToClip):
                self.grad_norm = factor.norm
            if self.offload == "overlap":
                self._pending = PendingStep(plan.placed(), self._together())

    def follow(self, model: nn.Module | None) -> None:
        """Lets updates overlap with the forwards of `model` (`offload="overlap"`).

        From now on `step()` returns before the model's weights are updated: each is when it is next
        asked for, which hooks before the forward of its module do first. `fastft.adamw(model)`,
        `FusedLossCallback`, `PackingCallback` and `plug` call this; so has a loop of your own, with
        the model that is inside of what `Accelerator.prepare` or `torch.compile` returned.

        Args:
            model: its parameters are among the optimizer's; in place of an earlier one. None: the
                hooks go, and `step()` updates at once.

        Raises:
            TypeError: `model` is no module.
            ValueError: the optimizer has another `offload`.
        """
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if self.offload != "overlap":
            raise ValueError(
                f'follow() is for AdamW(offload="overlap"), this one has offload={self.offload!r}'
            )
        self.flush()
        if self._followed is not None:
            self._followed.remove()
        self._followed = None if model is None else Followed(model)

    @torch._disable_dynamo
    def flush(self) -> None:
        """Updates all weights that the last step has left to be updated when they are asked for.

        Before they are read in a way that torch does not see: by memory that they share, by a
        kernel that gets them without torch, by a CUDA graph. Nothing but `offload="overlap"` leaves
        any.
        """
        if self._pending is None:
            return
        with Held():
            pending, self._pending = self._pending, None
            if pending is not None:  # a handler of signals has not been here meanwhile
                pending.flush()
                if self._followed is not None:
                    self._followed.learn(pending.asked)

    def _together(self) -> list[list[Tensor]]:
        if self._followed is not None:
            return self._followed.together()
        if not self._warned_of_no_model:
            self._warned_of_no_model = True
            warnings.warn(
                'offload="overlap": the optimizer knows no model before whose forwards weights '
                "could be updated, so that step() updates them at once: call "
                "optimizer.follow(model), or use FusedLossCallback, PackingCallback or plug",
                stacklevel=4,
            )
        return []

    @property
    def state(self) -> Any:
        """What is kept of each parameter, after `flush()`."""
        self.flush()
        return vars(self)["state"]

    @state.setter
    def state(self, value: Any) -> None:
        vars(self)["state"] = value

    @property
    def frees_gradients(self) -> bool:
        """Whether backward leaves no gradients on the device."""
        return self._held is not None or self._released is not None

    @property
    def staging(self) -> int:
        """Bytes of the buffers on all devices through which states stream; 0 before a step."""
        return 0 if self._plan is None else self._plan.staging

    def _check_host_memory(
        self, chosen: list[bool], gradients: int = 0, processes: int = 1
    ) -> None:
        """Raises where the host has too little memory for the states of chosen parameters that are
        still to be made, and so many bytes of gradients, in each of so many processes."""
        if self.offload is None:
            return
        every = [(param, group) for group in self.param_groups for param in group["params"]]
        states = sum(
            state_bytes(param, group, self.rounding)
            for param, group in compress(every, chosen)
            if param not in self.state
        )
        check_that_it_suffices(states + gradients, processes)

    def _make_keepers(self) -> None:
        """Makes what takes gradients as backward makes them."""
        held = self.offload in OF_GRADIENTS
        self._held = HeldGradients(self.impl) if held else None
        self._released = ReleasedGradients(self) if self.release_gradients else None

    def watch_gradients(self) -> None:
        """Takes gradients of the parameters that there are now as backward makes them, where
        `offload` or `release_gradients` says so: others may have put theirs into the groups, as
        accelerate does under FSDP2. `step` does this too, which is one backward pass later."""
        for keeper in (self._held, self._released):
            if keeper is not None:
                keeper.watch(self._params())

    def _params(self) -> list[Any]:
        params: list[Any] = []
        for group in self.param_groups:
            params += group["params"]
        return params

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Throws gradients away, wherever they are, as torch does."""
        super().zero_grad(set_to_none)
        if self._released is not None:
            self._released.zero_grad()

    def _with_gradients(self) -> tuple[list[Any], list[Any], list[bool]]:
        """The parameters that have a gradient, the gradients, and of all whether they have one."""
        params = self._params()
        if self._held is not None:
            self._held.take(params)
        grads = [param.grad for param in params]
        present = list(map(is_not, grads, repeat(None)))
        if not all(present):
            params, grads = list(compress(params, present)), list(compress(grads, present))
        return params, grads, present

    def _plan_of(self, params: list[Any], present: list[bool]) -> Plan:
        """The plan of the last step, if it holds for these parameters, or a new one."""
        plan = self._plan
        if plan is None or not plan.holds(self.param_groups, self.state, params, present):
            return self._new_plan(present)
        self._warn_of_stale(plan.kept.look())
        return plan

    def _note_training(self) -> None:
        self.had_gradients = True
        if self.origin is not None:
            self.origin.trained = True

    def _new_plan(self, present: list[bool]) -> Plan:
        self._note_training()
        self._settle()
        for group in self.param_groups:
            check_capturable(group, self.offload, self.release_gradients)
        # of this process alone: others may have made theirs
        self._check_host_memory(present)
        self._plan = None  # should the new one raise
        self._plan = Plan(
            self.param_groups, self.state, present, self.rounding, self.impl, self.offload
        )
        self._warn_of_stale(self._plan.kept.forgotten)
        return self._plan

    def _settle(self) -> None:
        """What goes before any look at states."""
        self.flush()
        if self._released is not None:
            self._released.settle()
        if self._plan is not None:
            self._plan.settle()

    @torch._disable_dynamo
    @torch.no_grad()
    def forget_stale_remainders(self) -> int:
        """Sets to zero what `rounding` keeps beside weights that somebody else has written to.

        Such a weight means its bf16 value then, as whoever wrote it meant. `step` does so by itself
        where torch counts the change (`p.copy_`, `load_state_dict`); this also finds writes through
        `.data`, on a CPU, and weights which are not those of the state dict that was loaded. For
        the beginning of a training.

        Returns:
            Of how many weights it was. If any, and for the first time, a warning says so.
        """
        return sum(
            weight_bits.forget(weight, self.state[weight]) for weight in self.stale_weights()
        )

    def stale_weights(self, *, awaited: bool = True) -> set[Tensor]:
        """The weights that somebody else has written to since the low bits beside them were.

        If there are any, and for the first time, a warning says so.

        Args:
            awaited: also those of a loaded state dict whose weights nobody has looked at since.
        """
        self._settle()
        stale = {
            weight
            for weight, state in self.state.items()
            if weight_bits.is_stale(weight, state)
            and (awaited or not weight_bits.awaits_weights(state))
        }
        self._warn_of_stale(len(stale))
        return stale

    def _warn_of_stale(self, count: int) -> None:
        if count and not self._warned_of_stale:
            self._warned_of_stale = True
            warnings.warn(
                f"{count} bf16 weights were written by somebody else since AdamW wrote the low "
                "bits that it keeps beside them (another checkpoint, an average swapped in, "
                "pruning): they count as their bf16 values, and these bits as zero",
                stacklevel=2,
            )

    def _say_that_nothing_is_trained(self) -> None:
        if not self.had_gradients:
            self.had_gradients = True  # once
            count = sum(len(group["params"]) for group in self.param_groups)
            warnings.warn(
                f"step() found no gradient in any of the optimizer's {count} parameters: if it "
                "stays so, nothing is trained. Was the optimizer made before the model got its "
                "final parameters, or are they frozen?",
                stacklevel=3,
            )

    @property
    def step_was_skipped(self) -> bool:
        """Whether GradScaler had found NaN or Inf at the last step; may wait for the device."""
        return bool(self._skipped)

    @property
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        # accelerate takes a step for skipped when GradScaler does not call step(): there GradScaler
        # must decide itself
        return not str(getattr(self.step, "__module__", "")).startswith("accelerate.")

    def clip_at_step(self, grads: Sequence[Tensor], max_norm: float) -> Tensor:
        """Takes the norm of `grads` now, and leaves the scaling of clipping to the next `step`.

        Args:
            grads: the gradients of all parameters that have one, with which `step` must find them
                unchanged.
            max_norm: as of `torch.nn.utils.clip_grad_norm_`; of this step, `max_grad_norm` does not
                count for it.

        Returns:
            The norm of all gradients together, float32 of shape (); also `grad_norm`.
        """
        if self._released is not None and max_norm != float("inf"):
            raise ValueError(
                f"gradients cannot be clipped to {max_norm} after release_gradients=True has used "
                "them up inside backward: TrainingArguments(max_grad_norm=0), or "
                "offload='gradients', which clips"
            )
        if self._held is not None:
            owners = {id(p.grad): p for p in self._params() if p.grad is not None}
            self._held.take(self._params())
            grads = [owners[id(grad)].grad if id(grad) in owners else grad for grad in grads]
        self.grad_norm = grad_norm(grads, self.impl)
        self._clipping = _Clipping(
            self.grad_norm, max_norm, list(grads), [grad._version for grad in grads]
        )
        return self.grad_norm

    def _to_clip(self, clipping: _Clipping | None) -> ToClip | None:
        """Clipping that may be left to the update, with its norm."""
        scaled = self._held is not None or getattr(self, "grad_scale", None) is not None
        if clipping is None and not scaled and isinstance(self.max_grad_norm, (int, float)):
            return ToClip(self.max_grad_norm, self.impl)
        return None

    def _grad_factor(self, grads: list[Tensor], clipping: _Clipping | None) -> Tensor | None:
        """Computes what clipping and loss scaling multiply every gradient by; None for 1."""
        scale = getattr(self, "grad_scale", None)
        if clipping is not None:
            versions = [grad._version for grad in grads]
            if not same_objects(grads, clipping.grads) or versions != clipping.versions:
                raise RuntimeError(
                    "a gradient was changed between clipping and the step, which clips while it "
                    "updates; change gradients before clipping, or clip with "
                    "torch.nn.utils.clip_grad_norm_"
                )
            norm, max_norm = clipping.norm, clipping.max_norm
        elif self.max_grad_norm is not None:
            norm, max_norm = grad_norm(grads, self.impl), self.max_grad_norm
        else:
            return None if scale is None else scale.float().reciprocal()
        self.grad_norm = norm if scale is None else norm / scale.to(norm.device)
        factor = clip_factor(self.grad_norm, max_norm)
        return factor if scale is None else factor / scale.to(norm.device)


def _bytes(param: Any) -> int:
    """Bytes of this process's part of a parameter."""
    return int(tensors.local(param).nbytes)
