"""What `python -m fastft doctor` says of a training's first batches: padding, labels, end tokens,
packs, the time that they take.

A check gets a `Sample`: the batches themselves, as Trainer's own loader gives them.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from fastft.data.collator import PackingCollator
from fastft.data.keys import IGNORE_INDEX
from fastft.foreign.models import base_model, output_embeddings, unwrapped
from fastft.integrations.batch_segments import kept_of, segments_of
from fastft.integrations.doctor.finding import Finding
from fastft.integrations.doctor.model import end_tokens
from fastft.integrations.implementations import STOCK
from fastft.integrations.packed_loader import packing_collator
from fastft.integrations.packing import PackingCallback
from fastft.integrations.probe.check_packing import find_leak
from fastft.integrations.probe.rows import Batches

MOST_BATCHES, MOST_SECONDS = 8, 30.0
SLOW_BATCH = 0.05  # seconds: a device waits that long in each step


@dataclass(frozen=True)
class Sample:
    """The first batches of a training.

    Attributes:
        trainer: whose they are.
        batches: dictionaries of tensors, `input_ids` (rows, tokens) among them; on the CPU. Others
            are left out.
        seconds: that the making of one took, without the first.
        steps: of the optimizer, in the whole training; None where the data set has no length.
        packing: the collator of the loader, where it packs; with `plug` the trainer has another.
    """

    trainer: Trainer
    batches: list[dict[str, Tensor]]
    seconds: float
    steps: int | None = None
    packing: PackingCollator | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model inside all wrappers."""
        model: PreTrainedModel = base_model(self.trainer.model)
        return model

    @property
    def adapted(self) -> PreTrainedModel:
        """The model inside all wrappers but those of adapters."""
        model: PreTrainedModel = unwrapped(self.trainer.model)
        return model

    @property
    def generates(self) -> bool:
        """Whether the model predicts the next token of its input."""
        causal = getattr(self.model, "can_generate", lambda: False)()
        return causal and not self.model.config.is_encoder_decoder

    @property
    def size(self) -> str:
        """How many batches there are, in words."""
        return f"{len(self.batches)} batch{'' if len(self.batches) == 1 else 'es'}"


def sample(trainer: Trainer) -> Sample:
    """Takes the first batches from the trainer's own loader: a few, or as many as 30 seconds give.

    Whatever the loader raises passes through.
    """
    batches: list[Any] = []
    begin = first = time.perf_counter()
    loader = trainer.get_train_dataloader()
    for batch in itertools.islice(loader, MOST_BATCHES):
        batches.append(batch)
        now = time.perf_counter()
        first = now if len(batches) == 1 else first
        if now - begin > MOST_SECONDS:
            break
    # the workers of a loader have the first ones ready before they are asked for
    seconds = (time.perf_counter() - first) / max(1, len(batches) - 1)
    texts = [_tensors(batch) for batch in batches if _has_text(batch)]
    return Sample(trainer, texts, seconds, _steps(trainer.args, loader), packing_collator(loader))


def padding_share(sample: Sample) -> Finding | None:
    """Much of what the model computes is padding."""
    tokens = sum(batch["input_ids"].numel() for batch in sample.batches)
    padding = sum(int(_padding(batch).sum()) for batch in sample.batches)
    if not tokens or padding < tokens / 5:
        return None
    return Finding(
        "slow",
        f"{padding / tokens:.0%} of the tokens are padding (of {tokens:,} in {sample.size}).",
        f"The model computes {tokens / (tokens - padding):.1f} times as many tokens as there are.",
        'fastft.plug(trainer, packing="collate"), or python -m fastft run --packing collate '
        "script.py: the same batches without padding. Stock: "
        'train_sampling_strategy="group_by_length".',
    )


def labels_all_ignored(sample: Sample) -> Finding | None:
    """Nothing is learnt from a batch, or from an example."""
    labels = [batch["labels"] for batch in sample.batches if "labels" in batch]
    labels = [each for each in labels if not each.is_floating_point() and each.dim() > 1]
    empty = sum(bool((each == IGNORE_INDEX).all()) for each in labels)
    if empty:
        return Finding(
            "wrong",
            f"All labels are {IGNORE_INDEX} in {empty} of {len(labels)} sampled batches.",
            "Such a batch teaches nothing: its loss is 0 or NaN.",
            "Look at what masks the labels: a response template that is not in the text, a "
            "truncation that cuts the answer off, a pad token that is everywhere.",
        )
    rows = [row for each in labels for row in each]
    lost = sum(bool((row == IGNORE_INDEX).all()) for row in rows)
    if not lost or not sample.generates:
        return None
    return Finding(
        "slow",
        f"All labels are {IGNORE_INDEX} in {lost} of {len(rows)} sampled rows.",
        "They are computed and teach nothing; a truncation may have cut the answers off.",
        "Take such examples out of the data set, or allow longer ones.",
    )


def end_token_not_learnt(sample: Sample) -> Finding | None:
    """Every end token's label is ignored, as the collator takes it for padding."""
    ends = end_tokens(sample.model, sample.trainer.processing_class)
    if not sample.generates or not ends:
        return None
    seen = learnt = 0
    for batch in filter(_is_labelled, sample.batches):
        end = torch.isin(batch["input_ids"], torch.tensor(sorted(ends)))
        end &= ~_padding(batch)
        seen += int(end.sum())
        learnt += int((batch["labels"][end] != IGNORE_INDEX).sum())
    if not seen or learnt:
        return None
    return Finding(
        "wrong",
        f"None of {seen} end tokens in {sample.size} has a label.",
        "The model never learns to stop: DataCollatorForLanguageModeling ignores every label that "
        "is the pad token, and others mask the end of an answer.",
        "Give the tokenizer a pad token that is not its end token, or make the labels yourself; "
        "fastft.PackingCollator() looks at no pad token.",
    )


def two_begin_tokens(sample: Sample) -> Finding | None:
    """Texts begin with the begin token twice: a template's and the tokenizer's."""
    begin = getattr(sample.trainer.processing_class, "bos_token_id", None)
    if begin is None or begin in end_tokens(sample.model, sample.trainer.processing_class):
        return None
    rows = [row for batch in sample.batches for row in _texts(batch) if len(row) > 1]
    twice = sum(row[:2].tolist() == [begin, begin] for row in rows)
    if not twice:
        return None
    return Finding(
        "wrong",
        f"{twice} of {len(rows)} sampled rows begin with the begin token (id {begin}) twice.",
        "The model has never seen such a text, and will not see it when it generates.",
        "tokenizer(..., add_special_tokens=False) for what a chat template has written.",
    )


def padding_is_learnt(sample: Sample) -> Finding | None:
    """Padding has labels that count."""
    learnt = rows = 0
    pad = getattr(sample.trainer.processing_class, "pad_token_id", None)
    ends = end_tokens(sample.model, sample.trainer.processing_class)
    for batch in sample.batches:
        if sample.model.config.is_encoder_decoder:
            known = "labels" in batch and isinstance(pad, int) and pad not in ends
            learnt += int(torch.isin(batch["labels"], torch.tensor(pad)).sum()) if known else 0
        elif _is_labelled(batch):
            learnt += int((batch["labels"][_padding(batch)] != IGNORE_INDEX).sum())
        rows += len(batch["input_ids"])
    # one for each row may be meant: the token that ends it
    if learnt <= rows:
        return None
    return Finding(
        "wrong",
        f"{learnt} padding tokens of {sample.size} have labels that count.",
        "The loss is that of padding in good part, and falls as padding is learnt.",
        f"Labels of padding must be {IGNORE_INDEX}: copy input_ids to labels after padding, and "
        "mask where attention_mask is 0; or leave padding and labels to the collator.",
    )


def longer_than_the_model_knows(sample: Sample) -> Finding | None:
    """A text has more rotary positions than the model was made for; a table of them would raise."""
    config = sample.model.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None)
    limit = getattr(config, "max_position_embeddings", None) if rotary else None
    longest = max(itertools.chain.from_iterable(map(_lengths, sample.batches)), default=0)
    if limit is None or longest <= limit:
        return None
    return Finding(
        "note",
        f"A sampled text has {longest:,} tokens; the model has positions for {limit:,}.",
        "Rotary positions beyond that are computed without a word; the model has never seen them.",
        'Truncate or split (fastft.pack(..., overlong="split")), or set rope_parameters for it.',
    )


def packs_with_a_square_mask(sample: Sample) -> Finding | None:
    """Packed rows go through an attention that builds a mask of T x T."""
    name = getattr(sample.model.config, "_attn_implementation", None)
    packed = [batch for batch in sample.batches if _is_packed(batch)]
    if not packed or name not in STOCK or _kept_apart_by_us(sample):
        return None
    square = sum(batch["input_ids"].numel() * batch["input_ids"].shape[-1] for batch in packed)
    needed = sum(length**2 for batch in packed for length in _lengths(batch))
    longest = max(batch["input_ids"].shape[-1] for batch in packed)
    return Finding(
        "slow",
        f"Batches are packed, and attention {name!r} builds a mask of T x T for them "
        f"({longest**2 / 2**20:,.0f} MiB for the longest sampled row).",
        f"It computes {square / needed:.1f} times the products that the sequences need.",
        'attn_implementation="fastft" (import fastft), fastft.PackingCallback(), or flash-attn.',
    )


def packs_leak(sample: Sample) -> Finding | None:
    """Packed rows go to a model that does not keep their sequences apart."""
    if not any(map(_is_packed, sample.batches)) or _kept_apart_by_us(sample):
        return None
    start = 0 if sample.packing is None else sample.packing.position_ids_start
    longest = max(batch["input_ids"].shape[-1] for batch in sample.batches)
    leak = find_leak(sample.adapted, Batches(start, longest))
    if leak is None or leak.loud:
        return None
    return Finding(
        "wrong",
        f"{type(sample.model).__name__} does not keep packed sequences apart: {leak.what}.",
        "Every sequence of a pack is trained on its neighbours.",
        f"{leak.way_out}.",
    )


def batches_come_slowly(sample: Sample) -> Finding | None:
    """The device waits while a batch is made."""
    if sample.trainer.args.dataloader_num_workers or sample.seconds < SLOW_BATCH:
        return None
    return Finding(
        "slow",
        f"A batch takes {sample.seconds:.2f} s to make, and dataloader_num_workers is 0.",
        "Each micro-step waits for it.",
        "dataloader_num_workers=2 or more; or tokenize the data set before the training.",
    )


def evaluation_holds_all_logits(sample: Sample) -> Finding | None:
    """Metrics get the logits of the whole evaluation set at once."""
    trainer, args = sample.trainer, sample.trainer.args
    head: Any = output_embeddings(sample.model)
    rows = sum(len(each) for each in _evaluation_sets(trainer))
    if (
        args.eval_strategy == "no"
        or trainer.compute_metrics is None
        or trainer.preprocess_logits_for_metrics is not None
        or args.batch_eval_metrics
        or getattr(args, "predict_with_generate", False)
        or head is None
        or not sample.batches
    ):
        return None
    length = max(batch["input_ids"].shape[-1] for batch in sample.batches)
    size = rows * length * head.weight.shape[0] * 4 / 2**30
    if size < 1:
        return None
    return Finding(
        "slow",
        f"An evaluation holds the logits of {rows:,} rows: about {size:,.0f} GiB.",
        "compute_metrics gets all of them at once, and Trainer concatenates copies on the way.",
        "Trainer(preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1)), if that "
        "is what the metrics need; or batch_eval_metrics=True.",
    )


BATCHES = (
    labels_all_ignored,
    end_token_not_learnt,
    padding_is_learnt,
    two_begin_tokens,
    longer_than_the_model_knows,
    packs_leak,
    packs_with_a_square_mask,
    padding_share,
    batches_come_slowly,
    evaluation_holds_all_logits,
)


def _steps(args: TrainingArguments, loader: Any) -> int | None:
    if args.max_steps > 0:
        return args.max_steps
    if not has_length(loader):
        return None
    of_an_epoch = max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
    return math.ceil(of_an_epoch * args.num_train_epochs)


def _has_text(batch: Any) -> bool:
    tokens = batch.get("input_ids") if hasattr(batch, "get") else None
    return isinstance(tokens, Tensor) and tokens.dim() == 2


def _tensors(batch: Any) -> dict[str, Tensor]:
    return {key: value.cpu() for key, value in batch.items() if isinstance(value, Tensor)}


def _is_labelled(batch: dict[str, Tensor]) -> bool:
    """Whether each token has a label beside it."""
    return "labels" in batch and batch["labels"].shape == batch["input_ids"].shape


def _padding(batch: dict[str, Tensor]) -> Tensor:
    """Which tokens are padding (rows, tokens), bool, as far as the batch says."""
    return ~kept_of(batch).view_as(batch["input_ids"])


def _texts(batch: dict[str, Tensor]) -> list[Tensor]:
    """The rows without their padding."""
    rows, padding = batch["input_ids"], _padding(batch)
    return [row[~padded] for row, padded in zip(rows, padding, strict=True)]


def _is_packed(batch: dict[str, Tensor]) -> bool:
    """Whether some row has several texts."""
    return len(segments_of(batch)) > len(batch["input_ids"])


def _lengths(batch: dict[str, Tensor]) -> list[int]:
    """How many tokens each text has; where rows are packed, each sequence of them."""
    return [len(places) for places in segments_of(batch)]


def _kept_apart_by_us(sample: Sample) -> bool:
    """Whether a callback of ours probes the model at train begin, and gives it our attention."""
    return sample.packing is not None and any(
        isinstance(callback, PackingCallback)
        for callback in sample.trainer.callback_handler.callbacks
    )


def _evaluation_sets(trainer: Trainer) -> list[Any]:
    given: Any = trainer.eval_dataset
    sets = list(given.values()) if isinstance(given, dict) else [given]
    return [each for each in sets if hasattr(each, "__len__")]
