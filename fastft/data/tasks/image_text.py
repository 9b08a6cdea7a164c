"""Image-text-to-text: the next token, with images whose pixels go through the model beside it.

Tokens are laid out as for causal models. Images, patches and their sizes, of which a processor
gives as many as they need, follow one another as the examples lie in the batch: the model puts the
features of its images where the image tokens are, in their order.

    input_ids, labels, mm_token_type_ids ...  (n,) or (1, n)  ->  (R, T)
    pixel_values, image_grid_thw ...          (m, ...)        ->  (sum of m, ...)

Images that differ in size or number are filled with zeros up to the largest, as processors do it
for a batch, where the examples say which pixels are real.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.data.column_rows import Column
from fastft.data.columns import Columns
from fastft.data.keys import is_of_images
from fastft.data.processed import holds_images, tensor_of, unbatched
from fastft.data.rows import Layout
from fastft.data.tasks.causal_lm import CausalLM

IMAGE_TEXT = "image_text_to_text"
_SAY_WHAT_IS_REAL = ("image_sizes", "pixel_attention_mask")
_SIZES = ("_thw", "_hws", "image_sizes")  # whose names end so: a row for each image
_TOKENS = {"input_ids", "mm_token_type_ids", "token_type_ids"}  # of which models make positions


class ImageText(CausalLM):
    """The next token as the label; which tokens have one, the examples say."""

    sources = ("labels",)
    undivided = "task 'image_text_to_text' does not know whose images are whose"

    def take(self, columns: Columns) -> None:
        """Takes the images out, and the leading dimension of 1 off the rest.

        Raises:
            ValueError: the examples have no labels; images that are no numbers, or of another
                number of dimensions than the first ones.
        """
        if "labels" not in columns:
            raise ValueError(
                "task 'image_text_to_text' needs labels: input_ids with -100 at image tokens and "
                f"at all that is not to be learned; the examples have {sorted(columns)}"
            )
        rows = zip(*columns.values(), strict=True)
        examples = [unbatched(dict(zip(columns, row, strict=True))) for row in rows]
        for key in list(columns):
            columns[key] = [example[key] for example in examples]
        self._images = {
            key: _tensors(key, columns.pop(key)) for key in list(columns) if is_of_images(key)
        }

    def fill(self, columns: Columns, layout: Layout) -> dict[str, Any]:
        """Lays the columns out, and the images as their examples lie."""
        batch = super().fill(columns, layout)
        order = [example for example in layout.order if example is not None]
        real = any(key in self._images for key in _SAY_WHAT_IS_REAL)
        for key, values in self._images.items():
            given = {index: value for index in order if (value := values[index]) is not None}
            if given:
                batch[key] = _joined(key, given, real)
        return batch

    def finish(self, batch: dict[str, Any], layout: Layout) -> None:
        """Adds the positions that the model makes of each example, (1 + A, R, T), if it has several
        axes."""
        of_model, ends = self.collator.positions, itertools.accumulate(layout.lengths, initial=0)
        if of_model is None:
            return
        made = list[Tensor]()
        for example, (begin, end) in zip(layout.order, itertools.pairwise(ends), strict=True):
            tokens = {key: batch[key].view(-1)[begin:end] for key in batch.keys() & _TOKENS}
            images = {} if example is None else self._images_of(example)
            made.append(of_model(tokens, images))
        batch["position_ids"] = torch.cat(made, 1).view(-1, *batch["input_ids"].shape)

    def _images_of(self, example: int) -> dict[str, Tensor]:
        images = {key: values[example] for key, values in self._images.items()}
        return {key: value for key, value in images.items() if value is not None}


def _tensors(key: str, values: Column) -> list[Tensor | None]:
    """Turns what examples have of their images into tensors; None stays where there is no image."""
    made = list[Tensor | None]()
    for index, value in enumerate(values):
        if not holds_images(key, value):
            made.append(None)
            continue
        try:
            tensor = tensor_of(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"{key} of example {index} must be numbers of one shape, got {type(value).__name__}"
            ) from None
        if key.endswith(_SIZES) and tensor.ndim == 1:
            raise ValueError(
                f"{key} of example {index} must have a row for each image, got the shape "
                f"{tuple(tensor.shape)}: leave the first dimension that its processor gives it"
            )
        made.append(tensor)
    return made


def _joined(key: str, given: dict[int, Tensor], real: bool) -> Tensor:
    """Joins what examples, by their index, have of their images: along the first dimension.

    Args:
        real: whether the examples say which pixels are real.

    Raises:
        ValueError: other dimensions differ, and zeros would be taken for pixels.
    """
    (first, pattern), *others = given.items()
    for index, value in others:
        if value.ndim != pattern.ndim or not (real or value.shape[1:] == pattern.shape[1:]):
            raise ValueError(
                f"{key} of example {index} has shape {tuple(value.shape)}, of example {first} "
                f"{tuple(pattern.shape)}, and nothing says which pixels are real "
                f"({' or '.join(_SAY_WHAT_IS_REAL)}): give images of one size, or examples with "
                "what the processor says of sizes"
            )
    largest = [max(sizes) for sizes in zip(*(v.shape[1:] for v in given.values()), strict=True)]
    return torch.cat([_filled(value, largest) for value in given.values()])


def _filled(value: Tensor, sizes: Sequence[int]) -> Tensor:
    """Fills all dimensions but the first with zeros at their ends, up to `sizes`."""
    if list(value.shape[1:]) == list(sizes):
        return value
    made = value.new_zeros(len(value), *sizes)
    made[tuple(slice(size) for size in value.shape)] = value
    return made
