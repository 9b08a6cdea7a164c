"""Numbers of meta tensors, where they follow from numbers that are known.

A model's code asks a mask whether all of it is true, and takes another branch. On the meta device
nobody can answer, though the mask is made of nothing but ones that somebody wrote. This mode
answers: it computes beside each operation on meta tensors the same one on the CPU, as long as all
that goes in is known, as what `full`, `arange` and `know` make is. Weights, and what they touch,
stay without numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_MOST = 1 << 22  # elements of a tensor that is worth a copy
# what has a result, or the size of one, that only numbers tell
_OF_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_WITHOUT_NUMBERS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class KnownNumbers(TorchDispatchMode):
    """While entered, meta tensors whose numbers are known can be read as others can."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: Any = WeakTensorKeyDictionary()

    def know(self, numbers: Tensor) -> Tensor:
        """A meta tensor like `numbers`, which are known."""
        meta = torch.empty_like(numbers, device="meta")
        self._numbers[meta] = numbers
        return meta

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = all(tensor.device.type != "meta" or tensor in self._numbers for tensor in tensors)
        if known and tensors and _OF_NUMBERS.intersection(func.tags):
            result = func(*self._on_cpu(args), **self._on_cpu(kwargs))
            return tree_map(
                lambda leaf: self.know(leaf) if isinstance(leaf, Tensor) else leaf, result
            )
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, result, known)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any, known: bool) -> None:
        """Computes the numbers of `result` too, or forgets those of what was written to."""
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        metas = [tensor for tensor in results if tensor.device.type == "meta"]
        if not metas:
            return
        random = torch.Tag.nondeterministic_seeded in func.tags
        unknown = random or func.overloadpacket.__name__ in _WITHOUT_NUMBERS
        if known and not unknown and all(tensor.numel() <= _MOST for tensor in metas):
            numbers = tree_leaves(func(*self._on_cpu(args), **self._on_cpu(kwargs)))
            twins = [leaf for leaf in numbers if isinstance(leaf, Tensor)]
            self._numbers.update(zip(results, twins, strict=True))
            return
        for tensor in metas:
            self._numbers.pop(tensor, None)

    def _on_cpu(self, arguments: Any) -> Any:
        def on_cpu(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return self._numbers.get(leaf, leaf)
            is_meta = isinstance(leaf, torch.device) and leaf.type == "meta"
            return torch.device("cpu") if is_meta else leaf

        return tree_map(on_cpu, arguments)
