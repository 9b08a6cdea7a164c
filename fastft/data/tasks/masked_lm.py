"""Masked language modelling: tokens to guess, drawn as transformers' collator draws them.

With probability p a token that is not special counts: its label is the token, all others are -100.
Of those that count, 80 % become the mask token, 10 % a random one, and 10 % stay. The draws are
those of `DataCollatorForLanguageModeling`, in its order, over the tokens as they lie in the batch:
the same state of the random numbers gives the same masks where the batch has the same tokens in the
same shape.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastft.data.columns import Columns
from fastft.data.keys import IGNORE_INDEX
from fastft.data.rows import Layout
from fastft.data.tasks.task import Task

MASK_TOKEN, RANDOM_TOKEN = 0.8, 0.1  # of the tokens that count


class TokenMasking:
    """Masks tokens for a tokenizer's vocabulary; see the module.

    Args:
        tokenizer: it says the mask token, the special tokens and, by its `len`, the vocabulary.
        probability: of a token to count.
        seed: None draws from torch's global generator; a number from one of its own, in a
            `DataLoader`'s worker with the worker's number added. Workers that start anew with each
            epoch then mask each epoch alike.

    Raises:
        ValueError: the tokenizer has no mask token, or `probability` is no probability.
    """

    def __init__(self, tokenizer: Any, probability: Any, seed: int | None) -> None:
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise ValueError(
                f"tokenizer must have a mask token, {type(tokenizer).__name__} has none"
            )
        if not isinstance(probability, Real) or not 0.0 <= float(probability) <= 1.0:
            raise ValueError(f"mlm_probability must be from 0 to 1, got {probability!r}")
        self.tokenizer, self.probability, self.seed = tokenizer, float(probability), seed
        self._generator: torch.Generator | None = None
        # whose generator it is: a forked worker finds its parent's here
        self._drawer: int | None = None

    def special_tokens(self, example: Any) -> list[int]:
        """Asks the tokenizer which of an example's input_ids are special: 1, others 0."""
        ids = example if isinstance(example, list) else list(map(int, example))
        mask: list[int] = self.tokenizer.get_special_tokens_mask(
            ids, already_has_special_tokens=True
        )
        return mask

    def _random(self) -> torch.Generator | None:
        """Makes the generator of this process when it is first asked for."""
        worker = torch.utils.data.get_worker_info()
        number = worker.id if worker else -1
        if self.seed is not None and self._drawer != number:
            self._generator = torch.Generator().manual_seed(self.seed + max(number, 0))
            self._drawer = number
        return self._generator

    def __call__(self, input_ids: Tensor, special: Tensor) -> Tensor:
        """Masks `input_ids` (T,) in place and returns the labels; `special` (T,) is not 0 where
        nothing is masked."""
        generator = self._random()
        labels = input_ids.clone()
        chances = torch.full(labels.shape, self.probability).masked_fill_(special != 0, 0.0)
        counted = torch.bernoulli(chances, generator=generator).bool()
        labels[~counted] = IGNORE_INDEX
        replaced = (
            torch.bernoulli(torch.full(labels.shape, MASK_TOKEN), generator=generator).bool()
            & counted
        )
        input_ids[replaced] = self.tokenizer.mask_token_id
        chances.fill_(RANDOM_TOKEN / (1 - MASK_TOKEN))
        randomised = torch.bernoulli(chances, generator=generator).bool() & counted & ~replaced
        words = torch.randint(len(self.tokenizer), labels.shape, generator=generator)
        input_ids[randomised] = words[randomised]
        return labels


class MaskedLM(Task):
    """Masks, drawn for each batch; without a tokenizer the examples are masked already."""

    def take(self, columns: Columns) -> None:
        """Raises ValueError where there is nothing to draw with and nothing drawn."""
        if self.collator.masking is None and "labels" not in columns:
            raise ValueError(
                "task 'masked_lm' needs tokenizer, or examples that have labels already"
            )

    def fill(self, columns: Columns, layout: Layout) -> dict[str, Any]:
        """Lays the columns out, masks tokens and makes the labels of these."""
        masking = self.collator.masking
        if masking is None:
            return super().fill(columns, layout)
        columns.pop("labels", None)
        if "special_tokens_mask" not in columns:
            columns["special_tokens_mask"] = [*map(masking.special_tokens, columns["input_ids"])]
        self.fills["special_tokens_mask"] = 1  # padding is never drawn
        batch = super().fill(columns, layout)
        input_ids, special = batch["input_ids"], batch.pop("special_tokens_mask")
        batch["labels"] = masking(input_ids.view(-1), special.view(-1)).view(input_ids.shape)
        return batch
