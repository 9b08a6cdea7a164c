"""The update of AdamW and the forms in which it keeps values: the operator `adamw_`.

For a parameter p with gradient g at step t (fp32 inside, whatever p's dtype):

    g = g * factor * (-1 if maximize else 1)         factor: of clipping and loss scaling
    p = p * (1 - lr * weight_decay)
    m = m + (1 - beta1) * (g - m)                    m: exp_avg
    v = v * beta2 + (1 - beta2) * g * g              v: exp_avg_sq
    w = max(w, v) with amsgrad, else v               w: max_exp_avg_sq
    p = p - lr / (1 - beta1^t) * m / (sqrt(w) / sqrt(1 - beta2^t) + eps)

The order of roundings is that of torch's fused CPU kernel.

A bf16 parameter is one of four things (`Rounding`):

* exact: with the 16 bits that its rounding drops, the int16 `remainder`, it is an fp32 master,
  whose bits are `(parameter << 16) + remainder`. The parameter is the master rounded to nearest;
  exact ties go away from zero, for with ties to even two masters would share one (parameter,
  remainder).
* kahan: with the bf16 `kahan`, what its rounding to nearest lost, it is the sum of both: at least
  16 bits of mantissa.
* stochastic: the result is rounded to one of its two neighbours, the nearer the likelier, so that
  it is right in the mean; random bits by `random_bits`, stream 0.
* nearest: the result is rounded to nearest, ties to even. Updates below half of a last place are
  lost.

Moments are fp32, or bf16 rounded stochastically (streams 1 to 3: m, v, w), or block-wise codes of 8
or 4 bits likewise (moments_8bit.py, moments_4bit.py); the update uses them before the rounding.

Bytes moved for each element and step (p, residue, m and v read and written, g read; amsgrad adds 8,
or 4 in bf16):

    parameter         fp32 moments   bf16 moments   8-bit moments   4-bit moments
    fp32                        28             20           16.13           15.13
    bf16 exact, kahan           26             18           14.13           13.13
    bf16 stochastic             22             14           10.13            9.13
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from fastft import _native, ops
from fastft.optim import moment_codes
from fastft.optim.grad_norm import ToClip
from fastft.optim.moment_blocks import Entries


class Rounding(IntEnum):
    """Ways to keep a parameter; numbers as in the op's `table` and csrc/include/adamw_math.h."""

    FP32 = 0
    EXACT = 1
    KAHAN = 2
    STOCHASTIC = 3
    NEAREST = 4


ROUNDS = 7  # of Philox
STREAMS = {"param": 0, "moments": 1, "max_exp_avg_sq": 2}
_WORD = 0xFFFFFFFF
RESIDUES = {Rounding.EXACT: ("remainder", torch.int16), Rounding.KAHAN: ("kahan", torch.bfloat16)}


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master of a bf16 parameter and its int16 remainder."""
    high = param.view(torch.int16).int() << 16
    master = (high + remainder).view(torch.float32)
    # no split makes NaN from another parameter: somebody has overwritten it, and the old remainder
    # does not fit
    return torch.where(master.isnan(), high.view(torch.float32), master)


def split_master(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Writes an fp32 master into a bf16 parameter and its int16 remainder."""
    bits = master.view(torch.int32).masked_fill(master.isnan(), 0x7FC00000)
    param.view(torch.int16).copy_((bits + 0x8000) >> 16)
    remainder.copy_(bits)


def _split_kahan(value: Tensor, param: Tensor, compensation: Tensor) -> None:
    param.copy_(value)
    lost = value - param.float()
    compensation.copy_(lost.where(lost.isfinite(), 0.0))


def _round_stochastic(value: Tensor, bits: Tensor, to: Tensor) -> None:
    rounded = (value.view(torch.int32) + bits) >> 16
    to.view(torch.int16).copy_(rounded.masked_fill(value.isnan(), 0x7FC0))


def random_bits(
    first: int, count: int, step: int, stream: int, seed: int, device: torch.device
) -> Tensor:
    """The bits of elements `first` to `first + count - 1`: int32, (count,), each in [0, 65535].

    They are those of Philox4x32 (Salmon et al., 2011) with the seven rounds which that paper finds
    enough for every test: a function of the seed, the step, the stream (what is rounded) and the
    element's index among all elements of the optimizer, so that neither the engine nor the way in
    which tensors are split changes them. Elements 8k to 8k + 7 share one call, with the counter
    (k, k >> 32, step, stream); each takes 16 of its 128 bits, in memory order. Both moments of an
    element are rounded with the same 16 bits, the second one with the two bytes swapped.
    """
    block = torch.arange(first // 8, (first + count + 7) // 8, dtype=torch.int64, device=device)
    words = [
        block & _WORD,
        block >> 32,
        torch.full_like(block, step),
        torch.full_like(block, stream),
    ]
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        # int64 products wrap, which leaves the 64 bits of the unsigned product in place
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            ((b >> 32) & _WORD) ^ words[1] ^ key0,
            b & _WORD,
            ((a >> 32) & _WORD) ^ words[3] ^ key1,
            a & _WORD,
        ]
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, 1).flatten()[first % 8 :][:count].int()


def swap_bytes(bits: Tensor) -> Tensor:
    """Random bits of 16 bits each with their bytes swapped."""
    return (bits & 0xFF) << 8 | bits >> 8


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    residues: Sequence[Tensor],
    table: Tensor,
    hyper: Tensor,
    grad_factor: Tensor,
    seed: int,
) -> None:
    """Plain torch. The tensors of one index have the same shape and dense strides, but for packed
    codes of 4 bits.

    Each has a row of `table` (int64): its row of `hyper` (float32, as struct AdamwHyper), its
    Rounding, whether it takes the next of `max_exp_avg_sqs`, and the index of its first element,
    for the random bits. Those with exact or kahan take the next of `residues`, and then those whose
    moments are codes two: the scales.
    """
    next_max, next_residue, factor = iter(max_exp_avg_sqs), iter(residues), grad_factor.reshape(())
    for *tensors, (row, kept_as, amsgrad, first) in zip(
        params, grads, exp_avgs, exp_avg_sqs, table.tolist(), strict=True
    ):
        param, grad, *moments = map(_flat, tensors)
        if amsgrad:
            moments.append(_flat(next(next_max)))
        residue = _flat(next(next_residue)) if kept_as in RESIDUES else None
        coded: Entries | None = None
        if moment_codes.code_of(tensors[2]):
            coded = (tensors[2], tensors[3], next(next_residue), next(next_residue))
        # in fp32, themselves where they are that
        m, v, *largest = (
            map(_flat, moment_codes.dequantise(*coded))
            if coded
            else [moment.float() for moment in moments]
        )
        decay, lerp_weight, beta2, one_minus_beta2, *others = hyper[row].tolist()
        negative_step, correction2_sqrt, eps, sign, step = others
        if step == 0:  # the device has found NaN or Inf
            continue
        grad = grad.float() * (factor * sign)
        near = lerp_weight < 0.5  # torch's lerp starts from the nearer end
        m.copy_(_fma(grad - m, lerp_weight if near else lerp_weight - 1, m if near else grad))
        v.copy_(_fma(grad * one_minus_beta2, grad, v * beta2))
        for w in largest:
            torch.maximum(w, v, out=w)
        # torch's fp32 sqrt may be off by a last place
        root = (largest[0] if largest else v).double().sqrt().float()
        denominator = root / correction2_sqrt + eps
        result = load_value(param, residue) * decay + (m * negative_step) / denominator

        def bits(stream: int) -> Tensor:
            return random_bits(first, param.numel(), int(step), stream, seed, param.device)  # noqa: B023

        store_value(
            result,
            param,
            residue,
            bits(STREAMS["param"]) if kept_as == Rounding.STOCHASTIC else None,
        )
        _store_moments((m, v, *largest), moments, coded, bits)


def _store_moments(
    values: Sequence[Tensor],
    moments: list[Tensor],
    coded: Entries | None,
    bits: Callable[[int], Tensor],
) -> None:
    if coded:
        shape = coded[1].shape
        m, v = (value.view(shape) for value in values)
        drawn = bits(STREAMS["moments"]).view(shape)
        moment_codes.quantise(m, v, coded, drawn, swap_bytes(drawn))
    elif moments[0] is not values[0]:
        drawn = bits(STREAMS["moments"])
        _round_stochastic(values[0], drawn, moments[0])
        _round_stochastic(values[1], swap_bytes(drawn), moments[1])
        for moment, value in zip(moments[2:], values[2:], strict=True):
            _round_stochastic(value, bits(STREAMS["max_exp_avg_sq"]), moment)


def _fma(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """Rounds a * b + c once, as the C++ engine (but for one in 2^29, where double rounds first)."""
    return (a.double() * b + c).float()


def load_value(param: Tensor, residue: Tensor | None) -> Tensor:
    """The fp32 value of a parameter with its int16 remainder, its bf16 compensation, or neither."""
    if residue is None:
        return param.float()
    return (
        join_master(param, residue)
        if residue.dtype == torch.int16
        else param.float() + residue.float()
    )


def store_value(
    result: Tensor, param: Tensor, residue: Tensor | None, bits: Tensor | None = None
) -> None:
    """Writes an fp32 value into a parameter and its residue; `bits` round it stochastically."""
    if bits is not None:
        _round_stochastic(result, bits, param)
    elif residue is None:
        param.copy_(result)
    else:
        (split_master if residue.dtype == torch.int16 else _split_kahan)(result, param, residue)


def _alike(device: torch.device, params: Sequence[Tensor], grads: Sequence[Tensor]) -> str | None:
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if param.dtype != grad.dtype:
            return (
                f"it takes gradients of their parameters' dtypes; parameter {i} is {param.dtype}, "
                f"its gradient {grad.dtype}"
            )
    return None


ADAMW = ops.Operator(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] residues, Tensor table, Tensor hyper, "
    "Tensor grad_factor, int seed) -> ()",
    _adamw_reference,
    engines=dict.fromkeys(("cpp", "cuda", "triton"), _alike),
)
# Of the native engines only (`Binding`); csrc/cpu/adamw.cpp says why.
ops.library.define(
    "adamw_bind(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] residues, Tensor table) -> int"
)
ops.library.define(
    "adamw_bound_(Tensor[] grads, Tensor hyper, Tensor grad_factor, int seed, int bound) -> int"
)
# Of the C++ engine only.
ops.library.define(
    "adamw_clipped_(Tensor[] grads, Tensor hyper, Tensor(a!) norm, float max_norm, int seed, "
    "int bound) -> int"
)
ops.library.define("adamw_written(Tensor(a!) sums, int bound) -> ()")


def _with_own_signs(grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients that are minus their memory (`imag` of a conjugate), with memory of their own.

    torch's fallback would make it too, but end it before the kernel reads it.
    """
    return [grad.resolve_neg() for grad in grads]


def _adamw_of_negated(params: list[Tensor], grads: list[Tensor], *others: Any) -> None:
    if any(param.is_neg() for param in params):
        raise RuntimeError("AdamW does not train parameters that are minus their memory (is_neg())")
    torch.ops.fastft.adamw_.default(params, _with_own_signs(grads), *others)


def _bound_of_negated(grads: list[Tensor], *others: Any) -> int:
    return torch.ops.fastft.adamw_bound_.default(_with_own_signs(grads), *others)


def _clipped_of_negated(grads: list[Tensor], *others: Any) -> int:
    return torch.ops.fastft.adamw_clipped_.default(_with_own_signs(grads), *others)


ops.library.impl("adamw_", _adamw_of_negated, "Negative")
ops.library.impl("adamw_bound_", _bound_of_negated, "Negative")
ops.library.impl("adamw_clipped_", _clipped_of_negated, "Negative")

_OUTCOMES = (True, False, None)  # by the number that `adamw_bound_` returns


class Binding:
    """Tensors that a native engine has checked once and holds: a step hands over gradients alone.

    It goes by a number there, which is no address: an unknown one is an error
    (csrc/include/live_table.h).

    Args:
        engine: "cpp" or "cuda".
        tensors: the operator's arguments from `params` to `residues`, without `grads`.
        table: the operator's.

    Attributes:
        takes_norms: whether there is `clip_and_step`.
    """

    def __init__(self, engine: str, tensors: Sequence[list[Tensor]], table: Tensor) -> None:
        self.size, self.takes_norms = len(table), engine == "cpp"
        self._number = torch.ops.fastft.adamw_bind.default(*tensors, table)
        weakref.finalize(self, _release, self._number, ops.LIBRARIES[engine])

    def step(
        self, grads: Sequence[Tensor], hyper: Tensor, grad_factor: Tensor, seed: int
    ) -> bool | None:
        """Updates, the arguments as the operator's; returns whether it did.

        Nothing is done where a bound tensor has other memory or another form than before: False;
        or where a gradient has another dtype, layout or size than its parameter: None.
        """
        step = torch.ops.fastft.adamw_bound_.default
        try:
            return _OUTCOMES[step(grads, hyper, grad_factor, seed, self._number)]
        except NotImplementedError:  # no such kernel for sparse tensors
            return None

    def clip_and_step(
        self, grads: Sequence[Tensor], hyper: Tensor, to: ToClip, seed: int
    ) -> bool | None:
        """Takes the norm of the gradients, which it writes into `to`, and updates; returns as
        `step`, and None also where a parameter is not contiguous."""
        step = torch.ops.fastft.adamw_clipped_.default
        try:
            return _OUTCOMES[step(grads, hyper, to.norm, to.max_norm, seed, self._number)]
        except NotImplementedError:  # no such kernel for sparse tensors
            return None

    def written(self) -> list[int]:
        """The sampled checksum of what the last step wrote to each parameter; 0: not known."""
        sums = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        torch.ops.fastft.adamw_written(sums, self._number)
        return [value % 2**64 for value in sums.tolist()]


def _release(number: int, kind: str) -> None:
    library = _native.library(kind)
    if isinstance(library, ctypes.CDLL):
        library.fastft_adamw_release(ctypes.c_int64(number))
