"""AdamW over all tensors in one call, with the fp32 trajectory for bf16 parameters.

For a parameter p with gradient g at step t (fp32 inside, whatever p's dtype):

    p = p * (1 - lr * weight_decay)
    m = m + (1 - beta1) * (g - m)                    m: exp_avg
    v = v * beta2 + (1 - beta2) * g * g              v: exp_avg_sq
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

The order of roundings is that of torch's fused CPU kernel. The moments are fp32. `rounding="exact"` keeps for a bf16
parameter the 16 bits that its rounding drops: parameter and int16 `remainder` together are the fp32 master, whose bits
are `(parameter << 16) + remainder`, so that training equals fp32 AdamW bit for bit. The parameter is the master rounded
to nearest; exact ties go away from zero, for with ties to even two masters would share one (parameter, remainder).

Bytes moved per element and step: fp32 28 (p, m, v read and written, g read), bf16 26 (p, remainder, m, v, g).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain, groupby, pairwise
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import ops
from fastft.optim import checkpoint
from fastft.optim.remainder import join as _join
from fastft.optim.remainder import split as _split


def _adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    remainders: Sequence[Tensor],
    hyper: Tensor,
    counts: Sequence[int],
) -> None:
    """Plain torch. Row r of `hyper` (float32, 8 columns, as struct AdamwHyper) serves the next counts[r] tensors; each
    bf16 tensor takes the next remainder.
    """
    rows = (row for row, count in zip(hyper.tolist(), counts, strict=True) for _ in range(count))
    unused = iter(remainders)
    for param, grad, m, v, row in zip(params, grads, exp_avgs, exp_avg_sqs, rows, strict=True):
        decay, lerp_weight, beta2, one_minus_beta2, negative_step, correction2_sqrt, eps, grad_sign = row
        remainder = next(unused) if param.dtype == torch.bfloat16 else None
        master = param if remainder is None else _join(param, remainder)
        grad = grad.float() * grad_sign
        m.lerp_(grad, lerp_weight)
        v.mul_(beta2).addcmul_(grad * one_minus_beta2, grad)
        master = master * decay + (m * negative_step) / ((v.sqrt() / correction2_sqrt) + eps)
        if remainder is None:
            param.copy_(master)
        else:
            _split(master, param, remainder)


OP = ops.Operator(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] remainders, Tensor hyper, int[] counts) -> ()",
    _adamw_reference,
    engines=("cpp", "cuda"),
)


class _Plan(NamedTuple):
    """What steps over the same parameters share; params, states and step views are compared before it is used again."""

    params: list[Tensor]  # those with a gradient, in the order of the groups
    states: list[dict[str, Any]]
    steps: Tensor  # all step counts in one tensor, so that one addition advances them
    step_views: list[Tensor]  # state["step"] of each parameter is a view of it
    group_index: list[int]
    order: list[int] | None  # a permutation which brings tensors of one device together; None where there is one device
    devices: list[tuple[torch.device, int, int]]  # with the slice of the ordered tensors
    narrow: list[int]  # positions of the bf16 parameters
    plain: bool  # all parameters are contiguous and none is a DTensor


class AdamW(torch.optim.Optimizer):
    """AdamW with torch's interface, fp32 moments, and bf16 parameters which follow fp32 AdamW to the last bit.

    `state[p]` holds `step` (float32, on the CPU), `exp_avg`, `exp_avg_sq` (float32, the shape of p) and, for bf16
    parameters, `remainder` (int16, the shape of p). State dicts of fp32 parameters load into `torch.optim.AdamW`, its
    state dicts load here, and saving and loading keeps every dtype and bit.

    Args:
        params: float32 or bfloat16 tensors, `(name, tensor)` pairs, or parameter groups (dicts), of any layout.
        lr: learning rate; a one-element tensor is read at each step (which waits for the device if it is on one).
        betas: decay of the running averages of the gradient and of its square, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled: each step scales the parameter by 1 - lr * weight_decay.
        amsgrad: must be False.
        maximize: ascend instead of descend.
        foreach: accepted for torch's signature, ignored: all tensors are always updated in one call.
        capturable: must be False.
        differentiable: must be False.
        fused: as foreach.
        moments: dtype of the running averages: "fp32".
        rounding: of bf16 parameters: "exact" keeps the 16 bits which rounding drops. fp32 parameters need none.
        impl: "auto", "eager" (plain torch), "cpp" or "cuda"; an explicit one never falls back.

    Raises:
        TypeError: a parameter that is neither float32 nor bfloat16, or a hyper-parameter that is no number.
        ValueError: a hyper-parameter out of range, an option that is not implemented, an empty parameter list.
        RuntimeError: at `step`, an explicit `impl` which is not available (says why), or a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
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
        impl: str = "auto",
    ) -> None:
        ops.check_impl(impl)
        for name, value, known in (("moments", moments, ("fp32",)), ("rounding", rounding, ("exact",))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        self.moments, self.rounding, self.impl = moments, rounding, impl
        self._plan: _Plan | None = None
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "amsgrad": amsgrad}
        defaults |= {"maximize": maximize, "capturable": capturable, "differentiable": differentiable}
        defaults |= {"foreach": None, "fused": None}
        _check_group(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does. Raises as the constructor does, leaving the optimizer as it was."""
        if isinstance(param_group, dict):
            _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dtype not in (torch.float32, torch.bfloat16):
                del self.param_groups[-1]
                raise TypeError(f"AdamW trains float32 and bfloat16 parameters, got one of {param.dtype}")

    def __getstate__(self) -> dict[str, Any]:
        own = {"moments": self.moments, "rounding": self.rounding, "impl": self.impl}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group["foreach"] = group["fused"] = None  # a checkpoint of torch's may say otherwise
        checkpoint.reveal(self)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch's; a `remainder` has its 16 bits under the dtype bfloat16, which every backend of FSDP sends."""
        return checkpoint.packed(super().state_dict())

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of `torch.optim.AdamW`, whose 16-bit moments become fp32.

        As with torch, tensors which need no conversion are shared with `state_dict`, not copied.

        Raises:
            ValueError: groups or shapes which do not fit this optimizer, or a checkpoint made with amsgrad.
        """
        checkpoint.load(self, state_dict, _check_group, lambda param, _: _new_state(param))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a sparse gradient, or an explicit `impl` that cannot be used on these parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [
            (param, grad, index)
            for index, group in enumerate(self.param_groups)
            for param in group["params"]
            if (grad := param.grad) is not None
        ]
        if not found:
            return loss
        params, grads, group_index = map(list, zip(*found, strict=True))
        plan = self._current_plan(params, group_index)
        columns = [params, grads, [s["exp_avg"] for s in plan.states], [s["exp_avg_sq"] for s in plan.states]]
        remainders = {i: plan.states[i]["remainder"] for i in plan.narrow}
        copied: list[tuple[Tensor, Tensor]] = []
        if not (plan.plain and all(map(Tensor.is_contiguous, grads))):  # sparse tensors are not contiguous
            if any(grad.layout != torch.strided for grad in grads):
                raise RuntimeError("AdamW does not take sparse gradients (an Embedding with sparse=True makes them)")
            columns, remainders, copied = _align(columns, remainders)
        updates = [OP.implementation(self.impl, device) for device, _, _ in plan.devices]  # raises before a step counts
        plan.steps.add_(1)
        self._launch(plan, updates, columns, remainders)
        for param, updated in copied:
            param.copy_(updated)
        torch.autograd.graph.increment_version(params)  # the kernels write outside autograd's sight
        return loss

    def _launch(
        self,
        plan: _Plan,
        updates: list[Callable[..., None]],
        columns: list[list[Tensor]],
        remainders: dict[int, Tensor],
    ) -> None:
        """Calls the operator once per device; neighbours of the same group and step count share a row of the table."""
        keys = list(zip(plan.group_index, plan.steps.tolist(), strict=True))
        order: Sequence[int] = range(len(keys))
        if plan.order is not None:
            order, keys = plan.order, [keys[i] for i in plan.order]
            columns = [[column[i] for i in order] for column in columns]
        for update, (_, begin, end) in zip(updates, plan.devices, strict=True):
            rows, counts = [], []
            for (index, step), run in groupby(keys[begin:end]):
                rows.append(_hyper_row(self.param_groups[index], step))
                counts.append(len(list(run)))
            narrow = [remainders[i] for i in order[begin:end] if i in remainders] if remainders else []
            hyper = torch.tensor(rows, dtype=torch.float32)
            update(*(column[begin:end] for column in columns), narrow, hyper, counts)

    def _current_plan(self, params: list[Tensor], group_index: list[int]) -> _Plan:
        """The plan for these parameters, made anew unless parameters, groups and states are the very same as before."""
        plan = self._plan
        if plan is not None and len(plan.params) == len(params) and plan.group_index == group_index:
            states = [self.state[param] for param in params]
            same = all(map(is_, plan.params, params)) and all(map(is_, plan.states, states))
            if same and all(map(is_, plan.step_views, [state.get("step") for state in states])):
                return plan
        self._plan = plan = self._make_plan(params, group_index)
        return plan

    def _make_plan(self, params: list[Tensor], group_index: list[int]) -> _Plan:
        for param in params:
            if not self.state[param]:
                self.state[param] = _new_state(param)
        states = [self.state[param] for param in params]
        steps = torch.tensor([float(state["step"]) for state in states], dtype=torch.float32)
        step_views = list(steps.unbind())
        for state, view in zip(states, step_views, strict=True):
            state["step"] = view
        by_device: dict[torch.device, list[int]] = {}
        for i, param in enumerate(params):
            by_device.setdefault(param.device, []).append(i)
        bounds = pairwise(accumulate((len(indices) for indices in by_device.values()), initial=0))
        return _Plan(
            params,
            states,
            steps,
            step_views,
            group_index,
            order=list(chain(*by_device.values())) if len(by_device) > 1 else None,
            devices=[(device, begin, end) for device, (begin, end) in zip(by_device, bounds, strict=True)],
            narrow=[i for i, param in enumerate(params) if param.dtype == torch.bfloat16],
            plain=all(p.is_contiguous() and not hasattr(p, "to_local") for p in params),
        )


def _check_group(group: dict[str, Any]) -> None:
    """Raises where a group's hyper-parameters are no numbers, out of range or not implemented."""
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} as a tensor must have one element, got shape {tuple(value.shape)}")
        on_host = not isinstance(value, Tensor) or value.device.type == "cpu"
        if on_host and not 0.0 <= float(value) < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    if not all(isinstance(beta, int | float) and 0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must both be in [0, 1), got {betas!r}")
    for name in ("amsgrad", "capturable", "differentiable"):
        if group[name]:
            raise ValueError(f"{name}=True is not implemented by fastft's AdamW; use torch.optim.AdamW for it")


def _hyper_row(group: dict[str, Any], step: float) -> list[float]:
    """A row of the hyper table, in double precision up to the table's float32, as torch does."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    return [
        1 - lr * float(group["weight_decay"]),
        1 - beta1,
        beta2,
        1 - beta2,
        -(lr / (1 - beta1**step)),
        (1 - beta2**step) ** 0.5,
        float(group["eps"]),
        -1.0 if group["maximize"] else 1.0,
    ]


def _new_state(param: Tensor) -> dict[str, Any]:
    state = {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format),
    }
    if param.dtype == torch.bfloat16:
        state["remainder"] = torch.zeros_like(param, dtype=torch.int16, memory_format=torch.preserve_format)
    return state


def _align(
    columns: list[list[Tensor]], remainders: dict[int, Tensor]
) -> tuple[list[list[Tensor]], dict[int, Tensor], list[tuple[Tensor, Tensor]]]:
    """Shards of DTensors, and dense copies in the moments' layout of parameters and gradients that have another layout.

    Returns the four columns, the remainders, and the (parameter, copy) pairs which the caller must copy back.
    """
    params, grads, exp_avgs, exp_avg_sqs = ([_local(tensor) for tensor in column] for column in columns)
    dense_params = [_like(param, exp_avg) for param, exp_avg in zip(params, exp_avgs, strict=True)]
    dense_grads = [_like(grad, exp_avg) for grad, exp_avg in zip(grads, exp_avgs, strict=True)]
    copied = [(param, dense) for param, dense in zip(params, dense_params, strict=True) if param is not dense]
    aligned = [dense_params, dense_grads, exp_avgs, exp_avg_sqs]
    return aligned, {i: _local(remainder) for i, remainder in remainders.items()}, copied


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _like(tensor: Tensor, layout: Tensor) -> Tensor:
    return tensor if tensor.stride() == layout.stride() else torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)
