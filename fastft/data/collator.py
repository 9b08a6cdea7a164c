"""One packed batch out of a list of examples, with every boundary that attention kernels read and no padding.

The examples' tokens lie one after another in one row of T. A *segment* is one example, or the padding at the end:

    position_ids[t] = position_ids_start + t - cu_seq_lens[s]        s = seq_idx[t], the segment of token t
    labels[t]       = -100 where t is the first token of a segment or padding, else the example's label

A causal model predicts token t from the one before, and the first of a segment has none. There is never a 2-D attention
mask: in transformers one disables the detection of packed sequences, and so does a cache (hence `use_cache`: False).

Bytes moved per token behind the concatenation: 8 read, 20 written.
"""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft import ops

TASKS = ("causal_lm",)
IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class Pack:
    """Examples that go through the model together, as `fastft.pack` yields them.

    It is no dict, so that Trainer's `remove_unused_columns` lets it pass to the collator.
    """

    examples: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.examples)


def boundaries_reference(
    lengths: Tensor,
    source: Tensor,
    position_ids_start: int,
    padding: int,
    labels: Tensor,
    position_ids: Tensor,
    seq_idx: Tensor,
    cu_seqlens: Tensor,
) -> None:
    """The boundary tensors in plain torch, into the same outputs as the kernel; the last `padding` labels ignored."""
    cu_seqlens[0] = 0
    cu_seqlens[1:] = lengths.cumsum(0)
    firsts = cu_seqlens[:-1].long()
    position_ids.copy_(torch.arange(source.numel()) + position_ids_start - torch.repeat_interleave(firsts, lengths))
    seq_idx.copy_(torch.repeat_interleave(lengths))
    labels.copy_(source)
    labels[firsts] = IGNORE_INDEX
    labels[source.numel() - padding :] = IGNORE_INDEX


BOUNDARIES = ops.Operator(
    "packed_boundaries(Tensor lengths, Tensor source, int position_ids_start, int padding, Tensor(a!) labels, "
    "Tensor(b!) position_ids, Tensor(c!) seq_idx, Tensor(d!) cu_seqlens) -> ()",
    boundaries_reference,
    engines=("cpp",),
)


def _examples(features: Iterable[Any]) -> list[dict[str, Any]]:
    examples: list[dict[str, Any]] = []
    for feature in features:
        if isinstance(feature, Pack):
            examples.extend(feature.examples)
        elif isinstance(feature, dict) or hasattr(feature, "keys"):
            examples.append(feature)
        else:
            raise TypeError(f"the collator takes dicts or packs, got {type(feature).__name__}")
    if not examples:
        raise ValueError("the collator got no examples")
    return examples


def _is_per_token(value: Any) -> bool:
    """Whether a column may hold numbers for tokens. Text, single numbers and None go nowhere near a model."""
    if isinstance(value, list | tuple):
        return bool(value) and not isinstance(value[0], str | dict) and value[0] is not None
    return hasattr(value, "ndim") and value.ndim > 0 and getattr(value.dtype, "kind", "i") not in "OSU"


def _columns(examples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The per-token values by key, one of each example; input_ids first."""
    keys = examples[0].keys()
    for index, example in enumerate(examples):
        if "input_ids" not in example:
            raise ValueError(f"example {index} has no input_ids, only {sorted(example)}")
        if example.keys() != keys:
            raise ValueError(f"example {index} has the keys {sorted(example)}, example 0 has {sorted(keys)}")
    columns = {"input_ids": [example["input_ids"] for example in examples]}
    for key in keys - {"input_ids"}:
        values = [example[key] for example in examples]
        if key == "labels" or any(map(_is_per_token, values)):
            columns[key] = values
    return columns


def _checked_lengths(columns: dict[str, list[Any]]) -> list[int]:
    lengths: list[int] = []
    for key, values in columns.items():
        for index, value in enumerate(values):
            if not hasattr(value, "__len__") or isinstance(value, str) or getattr(value, "ndim", 1) != 1:
                shape = getattr(value, "shape", None)
                what = f"shape {tuple(shape)}" if shape is not None else f"{type(value).__name__} {value!r}"
                raise ValueError(f"{key} of example {index} must hold one number per token, got {what}")
            if key == "input_ids":
                if len(value) == 0:
                    raise ValueError(f"example {index} has no tokens: input_ids is empty")
                lengths.append(len(value))
            elif len(value) != lengths[index]:
                raise ValueError(f"{key} of example {index} has length {len(value)}, its input_ids {lengths[index]}")
    return lengths


def _without_masked(columns: dict[str, list[Any]], lengths: list[int]) -> list[int]:
    """Takes attention_mask out of the columns, and the tokens which it masks; returns what is left of the lengths."""
    masks = columns.pop("attention_mask", None)
    if masks is None:
        return lengths
    left = list(lengths)
    for index, mask in enumerate(masks):
        # the usual case, which must not cost a conversion
        if isinstance(mask, list) and mask.count(1) == len(mask):
            continue
        kept = torch.as_tensor(mask) != 0
        if kept.all():
            continue
        left[index] = int(kept.sum())
        if left[index] == 0:
            raise ValueError(f"example {index} has no tokens: its attention_mask is all zeros")
        for key, values in columns.items():
            values[index] = _flat(key, [values[index]])[kept]
    return left


def _flat(key: str, values: Sequence[Any]) -> Tensor:
    """All values of a column one after another in a new tensor; integers as int64."""
    if all(isinstance(value, list) for value in values):
        return _flat_lists(key, values)
    if all(isinstance(value, Tensor) for value in values):
        flat = torch.cat([value.cpu() for value in values])
    elif all(type(value).__module__ == "numpy" for value in values):
        import numpy

        # numpy, because its concatenation takes arrays that are read-only, as those from Arrow are
        flat = torch.from_numpy(numpy.concatenate(values))
    else:
        flat = torch.cat([_flat(key, [value if hasattr(value, "dtype") else list(value)]) for value in values])
    return flat if flat.is_floating_point() else flat.long()


def _flat_lists(key: str, values: Sequence[list[Any]]) -> Tensor:
    for code, dtype in (("q", torch.int64), ("f", torch.float32)):
        flat = array(code)  # by far the fastest way from lists of Python numbers to memory
        try:
            for value in values:
                flat.fromlist(value)
        except TypeError:
            continue
        return torch.frombuffer(flat, dtype=dtype)
    raise ValueError(f"{key} must hold one number per token")


def _check_slices_logits(model: Any) -> None:
    """Raises ValueError where a mask of the logits to keep would not be understood; `model` may be just True."""
    import transformers

    if not hasattr(transformers.modeling_utils, "slice_logits_to_keep"):
        raise ValueError(f"supervised_only needs transformers >= 5.23, {transformers.__version__} is installed")
    if model is True:
        return
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"supervised_only must be True, False or a model, got {model!r}")
    get_base: Any = getattr(model, "get_base_model", None)  # PEFT
    base = model if get_base is None else get_base()
    if "slice_logits_to_keep" not in inspect.unwrap(type(base).forward).__code__.co_names:
        raise ValueError(f"supervised_only: {type(base).__name__} does not use transformers' slice_logits_to_keep")


def _supervised(labels: Tensor) -> dict[str, Tensor]:
    """What makes a causal model compute logits for the tokens alone whose successor has a label."""
    following = torch.full_like(labels, IGNORE_INDEX)
    following[:-1] = labels[1:]
    keep = following != IGNORE_INDEX
    return {"logits_to_keep": keep[None], "shift_labels": following[keep]}


class PackingCollator:
    """A list of examples, or of packs from `fastft.pack`, becomes one packed batch. For `Trainer(data_collator=...)`.

    An example is a dict with `input_ids` (list, array or tensor of n > 0 integers), optionally `labels` (n integers;
    else they are the input_ids) and `attention_mask` (tokens that it masks are removed). Other keys with n numbers are
    kept; position_ids, seq_idx, text and single numbers are left out. The batch, for T tokens in S segments:

    | key | value |
    |---|---|
    | `input_ids`, `labels`, `position_ids` | int64 (1, T) |
    | `seq_idx` | int32 (1, T), the segment of each token |
    | `cu_seq_lens_q`, `cu_seq_lens_k` | int32 (S + 1,), where segments begin, and T |
    | `max_length_q`, `max_length_k` | int, the longest segment |
    | `use_cache` | False |
    | other keys | int64 or the array's floating-point dtype (float32 from lists), (1, T) |
    | `logits_to_keep` | with `supervised_only`: bool (1, T), whether the token after has a label |
    | `shift_labels` | with `supervised_only`: int64 (K,), these labels |

    With `supervised_only` the model computes hidden states for all T tokens, but logits for K alone; the loss is the
    same. The model's logits are then (K, V): evaluate with `prediction_loss_only=True`, and leave label smoothing and
    `compute_loss_func` alone, which expect (1, T, V). A model that does not know a mask raises in its forward.

    Args:
        task: `"causal_lm"`: labels are shifted by the model, so the first one of each example is ignored.
        rows: rows of the batch; only 1.
        pad_to_multiple_of: T is rounded up to a multiple; the padding is one more segment, labels -100, other keys 0.
        position_ids_start: position of an example's first token; RoBERTa-like models need 2.
        pad_token_id: the token used for padding.
        supervised_only: False; True; or the model that the batches are for, which is then checked. Needs transformers
            5.23 and a causal model that uses its `slice_logits_to_keep`.
        impl: `"auto"`, `"cpp"` or `"eager"`.

    Raises:
        ValueError: an argument out of its range; `supervised_only` where transformers or the model lacks it; in a call,
            no examples, input_ids missing or empty, keys that differ between examples, a key that has not one number
            per token.
        TypeError: in a call, a feature that is neither a dict nor a pack.
        RuntimeError: the engine asked for is not available.
    """

    def __init__(
        self,
        *,
        task: str = "causal_lm",
        rows: int = 1,
        pad_to_multiple_of: int | None = None,
        position_ids_start: int = 0,
        pad_token_id: int = 0,
        supervised_only: Any = False,
        impl: str = "auto",
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(map(repr, TASKS))}, got {task!r}")
        if rows != 1:
            raise ValueError(f"rows must be 1, got {rows!r}: all examples of a batch go into one row")
        if pad_to_multiple_of is not None and (not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1):
            raise ValueError(f"pad_to_multiple_of must be a positive integer or None, got {pad_to_multiple_of!r}")
        if supervised_only is not False:
            _check_slices_logits(supervised_only)
        self.supervised_only = supervised_only is not False
        BOUNDARIES.resolve(impl, torch.device("cpu"))
        self.task, self.rows, self.impl = task, rows, impl
        self.pad_to_multiple_of, self.pad_token_id = pad_to_multiple_of, pad_token_id
        self.position_ids_start = position_ids_start

    def __call__(self, features: Iterable[Any]) -> dict[str, Any]:
        """The batch of `features`; see the class."""
        columns = _columns(_examples(features))
        lengths = _without_masked(columns, _checked_lengths(columns))
        for key in ("position_ids", "seq_idx"):  # they said where a token was before packing
            columns.pop(key, None)
        padding = -sum(lengths) % (self.pad_to_multiple_of or 1)
        flat = {key: self._padded(key, _flat(key, values), padding) for key, values in columns.items()}
        for key in ("input_ids", "labels"):
            if key in flat and flat[key].is_floating_point():
                raise ValueError(f"{key} must be integers, got {flat[key].dtype}")
        return self._batch(flat, lengths + [padding] * (padding > 0), padding)

    def _padded(self, key: str, flat: Tensor, padding: int) -> Tensor:
        if padding == 0:
            return flat
        return torch.cat([flat, flat.new_full((padding,), self.pad_token_id if key == "input_ids" else 0)])

    def _batch(self, flat: dict[str, Tensor], lengths: list[int], padding: int) -> dict[str, Any]:
        input_ids = flat.pop("input_ids")
        given = flat.pop("labels", None)
        labels = torch.empty_like(input_ids) if given is None else given
        position_ids = torch.empty_like(input_ids)
        seq_idx = torch.empty_like(input_ids, dtype=torch.int32)
        cu_seqlens = torch.empty(len(lengths) + 1, dtype=torch.int32)
        fill = BOUNDARIES.implementation(self.impl, input_ids.device)
        source = input_ids if given is None else given
        fill(torch.tensor(lengths), source, self.position_ids_start, padding, labels, position_ids, seq_idx, cu_seqlens)
        return {
            "input_ids": input_ids[None],
            "labels": labels[None],
            "position_ids": position_ids[None],
            "seq_idx": seq_idx[None],
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "use_cache": False,
            **{key: value[None] for key, value in flat.items()},
            **(_supervised(labels) if self.supervised_only else {}),
        }
