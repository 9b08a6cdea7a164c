"""Five steps on padded, on unpacked and on packed batches: the same losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.packed_models import MODELS, build, gradients, sequences
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastft

pytest.importorskip("transformers")

STEPS, IGNORED, MASK = 5, -100, 4
Example = dict[str, Tensor]
NAMES = ("llama", "qwen3", "gemma2", "gpt_oss", "opt", "bert", "distilbert", "modernbert", "t5")


def examples_of(name: str, step: int) -> list[Example]:
    """Four examples; of a masked model a third of the tokens are masked, of T5 they have targets of
    other lengths."""
    tokens = sequences((11, 7, 16, 2), seed=step)
    if name == "t5":
        targets = sequences((5, 9, 3, 12), seed=step + 100)
        return [
            {"input_ids": ids, "labels": target}
            for ids, target in zip(tokens, targets, strict=True)
        ]
    if MODELS[name].causal:
        return [{"input_ids": ids, "labels": ids} for ids in tokens]
    hidden = [torch.arange(len(ids)) % 3 == 1 for ids in tokens]
    return [
        {"input_ids": ids.masked_fill(mask, MASK), "labels": ids.masked_fill(~mask, IGNORED)}
        for ids, mask in zip(tokens, hidden, strict=True)
    ]


def supervised(name: str, example: Example) -> int:
    labels = example["labels"][1:] if MODELS[name].causal else example["labels"]
    return int((labels != IGNORED).sum())


def padded_loss(name: str, model: nn.Module, examples: list[Example]) -> Tensor:
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    full = [
        {**example, "attention_mask": torch.ones_like(example["input_ids"])} for example in examples
    ]
    batch = {key: pad_sequence([each[key] for each in full], True, fill[key]) for key in fill}
    return model(**batch).loss


def unpacked_loss(name: str, model: nn.Module, examples: list[Example]) -> Tensor:
    counts = [supervised(name, example) for example in examples]
    losses = [
        model(**{key: value[None] for key, value in example.items()}).loss for example in examples
    ]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def packed_loss(name: str, model: nn.Module, examples: list[Example]) -> Tensor:
    task = "seq2seq" if name == "t5" else "causal_lm" if MODELS[name].causal else "masked_lm"
    collator = fastft.PackingCollator(task=task, decoder_start_token_id=0 if name == "t5" else None)
    return model(**collator(examples)).loss


def five_steps(
    name: str, attention: str, loss_of: Callable[[str, nn.Module, list[Example]], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Loss and gradients of each step, from the same weights."""
    model: Any = build(name, attention)  # in evaluation mode: nothing but the batch is to differ
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.02), []
    with fastft.packed_attention(model):
        for step in range(STEPS):
            loss = loss_of(name, model, examples_of(name, step))
            loss.backward()
            optimizer.step()
            steps.append((loss.detach(), gradients(model)))
    return steps


@pytest.mark.parametrize("name", NAMES)
def test_padded_unpacked_and_packed_are_one(name: str) -> None:
    unpacked = five_steps(name, "eager", unpacked_loss)
    runs = {
        "padded": five_steps(name, "eager", padded_loss),
        "packed": five_steps(name, "fastft", packed_loss),
    }
    assert len({float(loss) for loss, _ in unpacked}) == STEPS  # the steps move the weights
    for kind, steps in runs.items():
        for step, ((loss, grad), (true_loss, true_grad)) in enumerate(
            zip(steps, unpacked, strict=True)
        ):
            off = (grad - true_grad).abs().max() / true_grad.abs().max()
            assert abs(loss - true_loss) <= 1e-5 * abs(true_loss), (
                f"{kind}, step {step}: {loss} and {true_loss}"
            )
            assert off <= 1e-4, f"{kind}, step {step}: gradients differ by {off:.2g} of the largest"


@pytest.mark.parametrize("name", ["gpt_oss", "opt", "bert", "modernbert", "distilbert"])
def test_stock_attention_is_not(name: str) -> None:
    """What the test above is for: the same batches with stock attention, as if nothing were
    wrong."""
    truth, stock = (five_steps(name, "eager", each)[0] for each in (unpacked_loss, packed_loss))
    assert abs(stock[0] - truth[0]) > 1e-3 * abs(truth[0])
