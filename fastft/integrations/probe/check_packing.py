"""Does a model keep packed sequences apart? It is asked, and what helps is tried on it.

`probe.py` says how it is asked and what counts. A short row shows what 31 tokens show; a long one
passes the windows and tables of the configuration (`rows.py`). Where something is wrong, what
could help is tried on the model.

Cost, without gradients: about a dozen forward passes over at most 31 tokens, and two over the long
row and one over two thirds of it, whose head computes one token. More where a way out is looked
for.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from fastft.attention.attention import register_attention
from fastft.attention.segments import keeps_segments, packed_attention
from fastft.foreign.models import base_model, class_name, prompt_learning, unwrapped
from fastft.foreign.sharding import reason_not_to_run
from fastft.integrations.block_mask import block_mask
from fastft.integrations.implementations import STOCK, attention, switched
from fastft.integrations.probe.images import ImageProbe, image_examples
from fastft.integrations.probe.probe import Probe, Trouble
from fastft.integrations.probe.rows import Batches, long_row
from fastft.integrations.probe.twin import twin_of
from fastft.integrations.probe.untouched import untouched


class PackingLeakError(RuntimeError):
    """A model does not compute for packed sequences what it computes for each of them alone."""


class Unasked(ValueError):
    """A model whose weights are elsewhere, and no twin of it: nothing is known against it."""


@dataclass(frozen=True)
class Leak:
    """A fault of a model with packed rows, and what helps.

    Attributes:
        what: a clause.
        way_out: a sentence.
        block_mask: whether that is a block mask.
        loud: whether nothing else is wrong than that rows of some length make the model raise.
    """

    what: str
    way_out: str
    block_mask: bool = False
    loud: bool = False

    def __str__(self) -> str:
        return f"{self.what}. {self.way_out}"


class Verdict(NamedTuple):
    """The probe's answer for a model and its batches.

    Attributes:
        leak: what is wrong; None if nothing is.
        parts: the modules of the base model, by name, that get attention "fastft" for this.
    """

    leak: Leak | None = None
    parts: tuple[str, ...] = ()


def check_packing(
    model: nn.Module,
    *,
    position_ids_start: int = 0,
    max_tokens: int | None = None,
    examples: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Returns if `model`, as it is configured, computes for packed sequences what it computes for
    each of them alone.

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastft")
        fastft.check_packing(model)

    A few sequences of random tokens are packed as `PackingCollator` does it and go through the
    model in evaluation mode, and once in training mode, without gradients: 31 tokens, and a row
    long enough to pass the windows and tables of its configuration. Weights, gradients, buffers,
    modes, configurations, hooks and random states stay as they are; hooks of others see these
    forward passes.

    Args:
        model: a transformers model, or one inside the wrappers of PEFT, DistributedDataParallel or
            torch.compile. Of one whose weights are sharded or on the meta device a small twin with
            random weights is asked.
        position_ids_start: as in `PackingCollator`.
        max_tokens: of the longest row that it will get; the long row is as long, at most 4,096
            tokens. None: it is long enough for every window and table below 4,096, and a warning
            says from where on the model raises.
        examples: for a model that is trained on images: some of its processor's outputs, as
            `PackingCollator(task="image_text_to_text")` takes them. Of the first sixteen the
            shortest of each kind (images, videos, text) are asked with too, three at least. None:
            text alone.

    Raises:
        PackingLeakError: it does not. The message says why, and the way out: each one that it names
            was tried on this model and found exact.
        ValueError: an argument is out of its range, no example has an image; or the model cannot
            be asked: it takes no text alone, or its weights are elsewhere and no small twin of it
            can be made.
        TypeError: `model` is no module.
    """
    for name, value, least in (
        ("position_ids_start", position_ids_start, 0),
        ("max_tokens", max_tokens, 1),
    ):
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value < least
        ):
            raise ValueError(f"{name} must be an integer from {least} on, got {value!r}")
    _check_module(model)
    images = None if examples is None else image_examples(model, examples)
    if examples is not None and images is None:
        raise ValueError("examples must have images (pixel_values ...), got none that has")
    leak = find_leak(model, Batches(position_ids_start, max_tokens, images=images))
    if leak is not None and leak.loud:
        warnings.warn(f"{class_name(base_model(model))}: {leak}", stacklevel=2)
    elif leak is not None:
        raise PackingLeakError(
            f"{class_name(base_model(model))} does not keep packed sequences apart: {leak}"
        )


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def find_leak(model: nn.Module, batches: Batches | None = None) -> Leak | None:
    """Returns what `check_packing` raises or warns of; None if nothing is wrong. Other errors are
    raised here too."""
    return judge(model, batches or Batches()).leak


def judge(model: nn.Module, batches: Batches, *, switch: bool = False) -> Verdict:
    """Probes the model; with `switch`, with attention "fastft" in place of sdpa and eager first.

    Where that is exact, nothing else is asked. Where it is not, the model as it is is probed too,
    and `parts` is empty, unless rows of some length make the model raise with either.
    """
    _check_module(model)
    model = unwrapped(model)
    base = base_model(model)
    if not hasattr(base, "config") or not hasattr(base, "get_input_embeddings"):
        raise ValueError(
            f"model cannot be checked for packing: {type(base).__name__} is no transformers model"
        )
    tuning = prompt_learning(model)
    if tuning is not None:
        return Verdict(
            Leak(
                f"{tuning} puts virtual tokens before each row of a batch, not before each "
                "sequence of it",
                "No way out: train it on padded batches, or an adapter that adds no tokens (LoRA)",
            )
        )
    register_attention()
    with _here(model, batches) as asked, untouched(asked) as states:
        try:
            probe = (Probe if batches.images is None else ImageProbe)(asked, batches, states)
        except Exception as error:
            what = "a text" if batches.images is None else "a text, or an example with its images,"
            kind, whose = (ValueError, "it") if asked is model else (Unasked, "its twin")
            raise kind(
                f"model cannot be checked for packing: alone, {what} makes {whose} raise {error!r}"
            ) from error
        return _judged(probe, switch)


@contextlib.contextmanager
def _here(model: nn.Module, batches: Batches) -> Iterator[nn.Module]:
    """The model, or where its weights are elsewhere its twin, which is told of segments if it is.

    Raises:
        Unasked: there is no twin.
    """
    reason = reason_not_to_run(model)
    if reason is None:
        yield model
        return
    try:
        twin = twin_of(model, smaller=batches.images is None)
    except ValueError as error:
        raise Unasked(
            f"model cannot be checked for packing: {reason}, and {error}; check it before it is "
            "prepared for training"
        ) from error
    with packed_attention(twin) if keeps_segments(model) else contextlib.nullcontext():
        yield twin


def _judged(probe: Probe, switch: bool) -> Verdict:
    """Decides between attention "fastft" and the model as it is."""
    if switch and probe.sound is not None and probe.stock_parts:
        # no other attention reads the states of several sounds apart
        with switched(probe.base, probe.stock_parts):
            found = probe.trouble(probe.batches.position_ids_start)
            return Verdict(_leak(probe, found), probe.stock_parts)
    ours = _with_ours(probe) if switch and probe.stock_parts else None
    if ours is not None and ours.leak is None:
        return ours
    trouble = probe.trouble(probe.batches.position_ids_start)
    if ours is not None and trouble is not None:
        return ours  # both raise in long rows, or ours is the one that keeps sequences apart
    return Verdict(_leak(probe, trouble))


def _with_ours(probe: Probe) -> Verdict | None:
    """The verdict with attention "fastft" for sdpa and eager; None where sequences are mixed."""
    # whatever the model does not like about it, it may stay as it is
    with contextlib.suppress(Exception), switched(probe.base, probe.stock_parts):
        trouble = probe.trouble(probe.batches.position_ids_start)
        if trouble is None or probe.tolerates(trouble):
            return Verdict(_leak(probe, trouble), probe.stock_parts)
    return None


def _leak(probe: Probe, trouble: Trouble | None) -> Leak | None:
    """The trouble of the model as it is, with its way out."""
    start = probe.batches.position_ids_start
    if trouble is None:
        return None
    if not probe.tolerates(trouble):
        return _way_out(probe, trouble, start)
    tokens = _exact_up_to(probe, start)
    advice = f"Rows of at most {tokens} tokens are exact: fastft.pack(dataset, max_tokens={tokens})"
    return Leak(trouble.what, advice if tokens else "Shorter rows are exact", loud=True)


def _way_out(probe: Probe, trouble: Trouble, start: int) -> Leak:
    """The trouble, with what makes the model exact: something for every row, else for rows that are
    short enough."""
    first = probe.first_position(start)
    place = "" if first == start else f"PackingCollator(position_ids_start={first})"
    second_best: Leak | None = None
    for text, contexts, masked in _remedies(probe, as_it_is=bool(place) or trouble.long_row):
        # the model may not take this one
        with contextlib.suppress(ValueError, KeyError), contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            found = probe.trouble(first)
            if found is None or probe.tolerates(found):
                what = trouble.what if found is None else f"{trouble.what}; and then, {found.what}"
                return Leak(what, _tried(place, text), masked)
            # of what mends short rows alone, the first is good enough
            mends = found.long_row and second_best is None
            tokens = _exact_up_to(probe, first) if mends else None
            if tokens is not None:
                rows = (
                    f"rows of at most {tokens} tokens (fastft.pack(dataset, max_tokens={tokens}), "
                    "one pack a row)"
                )
                second_best = Leak(trouble.what, _tried(place, text, rows), masked)
    return second_best or Leak(trouble.what, _no_way_out(probe))


def _tried(*steps: str) -> str:
    return f"Way out, tried on this model: {' and '.join(filter(None, steps))}"


def _no_way_out(probe: Probe) -> str:
    if probe.mixers:
        return (
            "No way out was found: such layers keep sequences apart only if their kernels are "
            "told the boundaries (causal-conv1d, mamba-ssm, flash-linear-attention); without "
            "these, train it on padded batches"
        )
    if probe.batches.padded and probe.sound is None:
        return (
            "No way out was found: train it on padded batches, or leave rows= and "
            "pad_to_multiple_of= out"
        )
    return "No way out was found: train it on padded batches"


def _exact_up_to(probe: Probe, start: int) -> int | None:
    """The largest limit of the configuration below which the model, as it is now, is exact."""
    assert probe.long is not None
    for size, _ in probe.limits.passed(len(probe.long)):
        row = long_row(probe.base, probe.batches, size)
        if row is not None and probe.trouble_of_long(row, start) is None:
            return size
    return None


def _remedies(probe: Probe, as_it_is: bool) -> Iterator[tuple[str, list[Any], bool]]:
    """Yields what to tell, contexts in which the model is like that, and whether that is a block
    mask."""
    if as_it_is:
        yield "", [], False
    inside = (
        "fastft.PackingCallback() in Trainer, or fastft.packed_attention(model) around the loop"
    )
    yield inside, [packed_attention(probe.model)], False
    for name in ("fastft", *STOCK):
        if name != probe.base.config._attn_implementation:
            implementation = f"attn_implementation={name!r}"
            yield implementation, [attention(probe.base, name)], False
            both = [attention(probe.base, name), packed_attention(probe.model)]
            yield f"{implementation} and {inside}", both, False
    mask = (
        "fastft.PackingCallback() in Trainer, or fastft.block_mask(model) around the loop: a mask "
        "of T x T"
    )
    yield mask, [block_mask(probe.model)], True
