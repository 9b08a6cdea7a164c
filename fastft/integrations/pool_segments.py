"""Sequence classification on packed batches: one row of logits for each example, not for each row
of the batch.

transformers' models take the hidden state of one token of each row: of the first one, as BERT, or
of the last, as generative models. Here hooks give them that of each example's first or last token
(or the mean over it) instead:

    first-token models    hidden states (R, T, H) become (E, 1, H) on their way to pooler or head
    last-token models     scores (R, T, C) of the head are taken at (E,) tokens, the loss from these

The last token is the model's: where the configuration has a padding token, the last one that is
another, as models find it (an end token that is the padding token too is none of theirs).

The model's own code computes all else: pooler, dropout, head, and the loss by its `problem_type`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.data.host_boundaries import on_host
from fastft.data.keys import CU_SEQLENS_Q, LABEL_SEGMENTS
from fastft.data.packed import PackedDataset, packs_of
from fastft.foreign.loaders import active_dataloader
from fastft.foreign.models import base_model, unwrapped
from fastft.foreign.sharding import world_size


@dataclass(frozen=True, eq=False)
class _Examples:
    """The examples of a batch.

    Attributes:
        segments: which of the batch's segments they are, (E,).
        boundaries: where segments begin, (S + 1,).
        labels: (E,) or (E, C); None without.
        real: which tokens are none of padding, (R, T); None: all of them.
    """

    segments: Tensor
    boundaries: Tensor
    labels: Tensor | None = None
    real: Tensor | None = None

    @property
    def first(self) -> Tensor:
        return self.boundaries[self.segments].long()

    @property
    def last(self) -> Tensor:
        """The last token of each that is real, the first where none is, as models count."""
        ends = self.boundaries[self.segments + 1].long() - 1
        if self.real is None:
            return ends
        real = self.real.flatten()
        places = torch.arange(real.numel(), device=real.device).masked_fill(~real, -1)
        return torch.maximum(places.cummax(0).values[ends], self.first)


class SegmentPooling:
    """The hooks of `pool_segments` on a model, until `.remove()` or the end of a `with` block."""

    def __init__(self, model: nn.Module, last: bool) -> None:
        base = getattr(model, getattr(model, "base_model_prefix", ""), None)
        head = getattr(model, "score", getattr(model, "classifier", None))
        if not isinstance(base, nn.Module) or head is None:
            raise ValueError(
                f"{type(model).__name__} is no transformers model for sequence classification"
            )
        self._examples: _Examples | None = None
        self._scores: Tensor | None = None
        self._spoke_of_order = False
        self._takes_last = last
        self._means = getattr(model.config, "classifier_pooling", "cls") == "mean"
        config: Any = model.config
        self._pad = getattr(config.get_text_config(), "pad_token_id", None)
        self._hooks = [
            # first of all, as other hooks may take the boundaries off
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        if last:
            self._hooks.append(head.register_forward_hook(self._after_score))
        else:
            self._hooks.append(base.register_forward_hook(self._after_base))
            pooler = getattr(base, "pooler", None)
            if isinstance(pooler, nn.Module):
                self._hooks.append(pooler.register_forward_pre_hook(self._before_pooler))

    def __enter__(self) -> SegmentPooling:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Takes the hooks off. Calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(
        self, model: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if LABEL_SEGMENTS not in kwargs:  # not packed
            return None
        if not model.training:
            self._check_evaluation()
        kwargs = dict(kwargs)
        boundaries, segments = kwargs.get(CU_SEQLENS_Q), kwargs.pop(LABEL_SEGMENTS)
        if boundaries is None:
            raise ValueError(
                f"the batch has {LABEL_SEGMENTS} but no {CU_SEQLENS_Q}: it must come from "
                "PackingCollator"
            )
        self._examples = self.examples(
            segments, boundaries, kwargs.get("labels"), kwargs.get("input_ids")
        )
        # the model would compare them with one row of logits for each row of the batch
        if self._takes_last:
            kwargs.pop("labels", None)
        return args, kwargs

    def examples(
        self,
        segments: Tensor,
        boundaries: Tensor,
        labels: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> _Examples:
        """The examples of a batch whose tokens are (R, T)."""
        real = None
        if self._takes_last and tokens is not None and self._pad is not None:
            real = tokens.ne(self._pad)
        return _Examples(segments, boundaries, labels, real)

    def _check_evaluation(self) -> None:
        """Says that rows of predictions come in the order of packs; raises where ranks cannot
        gather them.

        A pack has as many rows as examples, so that ranks have different numbers of them: gloo
        aborts, and which of them accelerate gave out twice nobody knows.
        """
        dataset = packs_of(active_dataloader())  # what accelerate's loader gives out just now
        if dataset is None:
            return
        if world_size() > 1:
            raise ValueError(
                "predictions for the examples of fastft.pack cannot be gathered from several "
                "processes, as packs have different numbers of them: evaluate on the dataset "
                "itself (eval_dataset=packed.dataset), of which PackingCollator packs each batch"
            )
        if self._spoke_of_order:
            return
        self._spoke_of_order = True
        planned = isinstance(dataset, PackedDataset)
        rows = "row i is example packed.plan.indices[i]" if planned else "not of the examples"
        warnings.warn(
            f"predictions for fastft.pack come in the order of the packs: {rows}; in the order of "
            "the dataset, if evaluated on the dataset itself, of which PackingCollator packs each "
            "batch",
            stacklevel=2,
        )

    def _pooled(self, hidden_states: Tensor, examples: _Examples) -> Tensor:
        """Pools hidden states, (R, T, H), to one of each example, (E, 1, H)."""
        flat = hidden_states.flatten(0, 1)
        if not self._means:
            return flat[examples.first][:, None]
        end = on_host(examples.boundaries)[0].ends[-1]
        if end != len(flat):
            raise ValueError(
                f"the model has {len(flat)} hidden states, the batch's {CU_SEQLENS_Q} ends with "
                f"{end}"
            )
        wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
        lengths = examples.boundaries.diff().long()
        # unsafe: else torch looks at the lengths, for which it waits
        means = torch.segment_reduce(wide, "mean", lengths=lengths, unsafe=True)
        return means[examples.segments][:, None].to(flat.dtype)

    def _before_pooler(self, pooler: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._examples is None:
            return None
        return (self._pooled(args[0], self._examples), *args[1:])

    def _after_base(self, base: nn.Module, args: Any, output: Any) -> Any:
        if self._examples is None:
            return None
        if isinstance(output, tuple):
            return (self._pooled(output[0], self._examples), *output[1:])
        pooled = self._pooled(output[0], self._examples)
        return type(output)(**{**output, "last_hidden_state": pooled})

    def _after_score(self, head: nn.Module, args: Any, output: Tensor) -> None:
        if self._examples is not None:
            self._scores = output.flatten(0, 1)[self._examples.last]

    def _after(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        examples, scores, self._examples, self._scores = self._examples, self._scores, None, None
        if scores is None or examples is None or output is None:
            return None
        if isinstance(output, tuple):
            raise ValueError(
                f"{type(model).__name__} must return a dict for packed batches (return_dict=True)"
            )
        loss = None
        if examples.labels is not None:
            loss = model.loss_function(
                logits=scores, labels=examples.labels, pooled_logits=scores, config=model.config
            )
        return type(output)(**{**output, "loss": loss, "logits": scores})


def is_pooled(model: nn.Module) -> bool:
    """Tells whether `pool_segments` is at work on `model`, or on the model inside its wrappers."""
    return any(
        isinstance(getattr(hook, "__self__", None), SegmentPooling)
        for hook in base_model(model)._forward_pre_hooks.values()
    )


def _check(model: Any, called: Any, pooling: SegmentPooling) -> None:
    """Raises ValueError unless unpacked examples have the same logits with the hooks as without.

    `called` is what runs `model`: itself, or PEFT's wrapper, of which old versions run it past its
    hooks.
    """
    config = model.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    tokens = [token for token in range(min(config.vocab_size, 64)) if token != pad]
    # the last token of a row may be padding, which models that take the last one pass over
    end = tokens[-1] if pad is None or not pooling._takes_last else pad
    ids = torch.tensor([tokens[:3], [*tokens[-3:-1], end]], device=next(model.parameters()).device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            rows = ids[:1] if pad is None else ids
            stock = model(input_ids=rows).logits
            # one example in each row
            places = torch.arange(len(rows) + 1, device=rows.device)
            pooling._examples = pooling.examples(places[:-1], places * rows.shape[1], tokens=rows)
            ours = called(input_ids=rows).logits
    finally:
        for module in training:
            module.training = True
    if pooling._examples is not None:
        raise ValueError(
            f"{type(called).__name__} runs {type(model).__name__} past its hooks, with which "
            "segments are pooled: this peft is too old (0.21 is not), or pad instead of packing"
        )
    tolerance = 16 * torch.finfo(stock.dtype).eps * stock.abs().max()
    if ours.shape != stock.shape or not bool(((ours - stock).abs() <= tolerance).all()):
        raise _Otherwise


class _Otherwise(Exception):
    """The model pools its tokens in another way."""


def pool_segments(model: Any) -> SegmentPooling:
    """Makes a model for sequence classification return logits of examples, (E, C), and their loss.

    For batches of `PackingCollator(task="sequence_classification")`; others go through as before.
    Examples are the rows of the logits in the order of the batch's `labels`; the mean loss is over
    examples, as with padding. The model's attention must keep packed sequences apart, see
    `fastft.check_packing`.

        fastft.pool_segments(model)
        collator = fastft.PackingCollator(task="sequence_classification")
        trainer = Trainer(model, args, data_collator=collator, ...)

    Knows models that classify by the first token or the mean (BERT, RoBERTa, DistilBERT, ELECTRA,
    ModernBERT ...) and those by the last (Llama, Qwen ...). The model is run on three tokens, by
    itself and with the hooks, to see that it is one of them. The callbacks and `plug` do this in a
    training by themselves; outside of one, an evaluation of packed examples needs it.

    Args:
        model: `...ForSequenceClassification`, or PEFT's wrapper of one.

    Returns:
        A handle whose `.remove()` takes the hooks off; also a context manager.

    Raises:
        TypeError: `model` is no module.
        ValueError: it is no such model, pools its tokens in another way, or an old peft runs it
            past its hooks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inner, why = base_model(model), ""
    # with a `score` head none takes the first
    for last in (True,) if hasattr(inner, "score") else (False, True):
        pooling = SegmentPooling(inner, last)
        try:
            _check(inner, unwrapped(model), pooling)
            return pooling
        except ValueError:
            pooling.remove()
            raise
        except Exception as error:
            pooling.remove()
            why = why if isinstance(error, _Otherwise) else f" ({type(error).__name__}: {error})"
    raise ValueError(
        f"{type(inner).__name__} pools its tokens in a way that pool_segments does not know{why}: "
        "pad instead of packing"
    )
