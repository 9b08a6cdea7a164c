"""Examples as processors of images and text give them: each a batch of one.

input_ids, attention_mask, labels ...    (1, n), which becomes (n,)
pixel_values, image_grid_thw ...         images, patches or pixels first; they stay as they are
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.data.columns import may_hold_numbers
from fastft.data.keys import is_of_images


def _is_batch_of_one(value: Any) -> bool:
    """Recognises (1, n)."""
    if hasattr(value, "ndim"):
        return value.ndim == 2 and value.shape[0] == 1
    return (
        isinstance(value, list | tuple)
        and len(value) == 1
        and hasattr(value[0], "__len__")
        and not isinstance(value[0], str | dict)
    )


def holds_images(key: str, value: Any) -> bool:
    """Tells images and numbers of these from None, from an empty list, in whose place `datasets`
    has none, and from what else a dataset says of images (`image_url`, `video_id`)."""
    return is_of_images(key) and may_hold_numbers(value) and len(value) > 0


def token_count(input_ids: Any) -> int:
    """Counts the tokens of (n,), or of (1, n)."""
    return len(input_ids[0]) if _is_batch_of_one(input_ids) else len(input_ids)


def unbatched(example: dict[str, Any]) -> dict[str, Any]:
    """Takes the leading dimension of 1 off what an example has for its tokens, if it has one."""
    if not _is_batch_of_one(example["input_ids"]):
        return example
    return {
        key: value[0] if not is_of_images(key) and _is_batch_of_one(value) else value
        for key, value in example.items()
    }


def tensor_of(value: Any) -> Tensor:
    """Makes a tensor of an array, of lists of numbers, or of a list of arrays, an image each, as
    processors give them without `return_tensors`."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, list | tuple) and hasattr(value[0], "dtype"):
        return torch.stack([tensor_of(one) for one in value])
    return torch.tensor(value)  # a copy, as Arrow's memory is not to be written to
