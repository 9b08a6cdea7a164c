"""The layer that PEFT puts around an output head: what it adds to the head's logits is lazy too.

    LoRA, VeRA, ...          logits = base(x) + F.linear(h, B)      h of rank r is made of x
    LoHa, FourierFT, ...     logits = base(x) + F.linear(x, D)      D (V, H) is made of few numbers
    HRA, SHiRA, ...          logits = F.linear(x, W')               W' (V, H) is the adapted weight
    IA3, BOFT, DoRA          logits = base(x) * s + ...             s (V,) is trained

Whatever the method, T x V numbers come out of products of T rows with a matrix of V rows alone. So
while the layer's own code runs, such a product returns lazy logits, and what the layer does with
them is recorded as a model's softcap is. There is no list of methods here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastft.foreign.compiling import is_exporting
from fastft.foreign.objects import put_attributes

if TYPE_CHECKING:
    from fastft.loss.lazy.output_head import LazyForward

_PRODUCTS = (torch.matmul, Tensor.matmul)


class AdaptedForward:
    """The `forward` of an adapter's `layer` around the head whose forward `base` is lazy, from now
    until `remove()`.

    It copies and pickles as the method that the layer's class has.
    """

    def __init__(self, layer: nn.Module, base: LazyForward) -> None:
        self.layer = layer
        self.base = base
        self._outside_compiled = torch.compiler.disable(self._forward)
        self._restore = put_attributes(layer, forward=self)

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""
        if is_exporting():
            return type(self.layer).forward(self.layer, input, *args, **kwargs)
        return self._outside_compiled(input, *args, **kwargs)

    def _forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        stock, make = type(self.layer).forward, self.base.maker(input)
        if make is None:
            return stock(self.layer, input, *args, **kwargs)
        with _Products(make, self.base.head.out_features, input.shape[:-1]):
            result = stock(self.layer, input, *args, **kwargs)
        report = self.base.report
        if type(result) is Tensor and not report.materialised:
            report.note_materialised(f"the forward of {type(self.layer).__module__}")
        return result

    def remove(self) -> None:
        """Takes the layer back to stock, if it is still ours."""
        self._restore()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.layer, "forward")


class _Products(TorchFunctionMode):
    """While it is open, `make` answers a product of `rows` rows with a matrix of `vocab` rows."""

    def __init__(self, make: Callable[..., Tensor], vocab: int, rows: torch.Size) -> None:
        super().__init__()
        self.make, self.vocab, self.rows = make, vocab, rows

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operands = self._operands(func, args, kwargs)
        return func(*args, **kwargs) if operands is None else self.make(*operands)

    def _operands(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        if func is F.linear:
            x, weight, bias = _of_linear(*args, **kwargs)
        elif func in _PRODUCTS and len(args) == 2 and not kwargs and args[1].dim() == 2:
            x, weight, bias = args[0], args[1].T, None
        else:
            return None
        plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in (x, weight))
        fits = plain and weight.dim() == 2 and len(weight) == self.vocab
        return (x, weight, bias) if fits and x.shape[:-1] == self.rows else None


def _of_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias
