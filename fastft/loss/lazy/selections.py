"""Numbers that were picked out of logits, when they meet these logits again: the same bits.

    kth = z.topk(k).values[..., -1:]            z.masked_fill(z < kth, -inf)
    label = z.gather(-1, y[..., None])          (z > label).sum(-1)

Logits are computed again for each result, and a product of other rows, or of one class alone,
rounds differently: a number could be less than itself. So a tensor that shares memory with picked
numbers is picked again out of the logits that it is combined with.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastft.loss.lazy.expressions import Expression


class Selection(NamedTuple):
    """Numbers that were picked out of each row of an expression.

    `values`: (..., K), without their history. `version`: of their memory. `expression`: what they
    were picked of; or, where there are no `indices` (..., K), what gives them again.
    """

    values: Tensor
    version: int
    expression: Expression
    indices: Tensor | None

    @classmethod
    def of(cls, values: Tensor, expression: Expression, indices: Tensor | None) -> Selection:
        """That of numbers as they are now."""
        return cls(values.detach(), _version(values), expression, indices)

    def column(self, argument: Tensor) -> int | None:
        """Which of the K `argument` (..., 1) is; None if it is none of them."""
        values = self.values
        if argument.shape != (*values.shape[:-1], 1) or argument.dtype != values.dtype:
            return None
        if argument.untyped_storage()._cdata != values.untyped_storage()._cdata:
            return None
        strides = zip(argument.shape, argument.stride(), values.stride(), strict=True)
        is_alike = all(size == 1 or mine == theirs for size, mine, theirs in strides)
        if not is_alike or _version(argument) != self.version:
            return None
        offset = argument.storage_offset() - values.storage_offset()
        columns = range(values.shape[-1])
        return next((at for at in columns if at * values.stride(-1) == offset), None)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
