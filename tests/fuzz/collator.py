"""PackingCollator: the whole batch of each task, against lists laid out anew in plain Python.

Token t of example i is the number 1000 (i + 1) + t. A batch is checked key by key, number by
number; the masks that are drawn are those of transformers' collator over the same tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import strategies as st
from transformers import DataCollatorForLanguageModeling, modeling_utils

import fastft

EXAMPLES = 300
IGNORED, START, MASK_TOKEN, WORDS = -100, 7, 9, 50
Row = dict[str, Any]
FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "small numpy": lambda value: np.array(value, np.int32 if type(value[0]) is int else np.float32),
    "torch": torch.tensor,
    "small torch": lambda value: torch.tensor(
        value, dtype=torch.int32 if type(value[0]) is int else torch.float32
    ),
}
TASKS = ("causal_lm", "token_classification", "masked_lm", "sequence_classification", "seq2seq")
TASKS += ("seq2seq", "image_text_to_text", "drawn")  # masked_lm with a tokenizer
DIVIDED = ("causal_lm", "token_classification", "masked_lm", "drawn")  # may have documents
TOLD = ("position_ids", "seq_idx", "seq_lengths", "cu_seq_lens", "cu_seq_lens_q", "attention_mask")
# what the batch makes itself: a column of this name would be lost
RESERVED = ("max_length_q", "max_length_k", "padding_lengths", "use_cache", "label_segments")
RESERVED += ("decoder_cu_seq_lens", "decoder_max_length")
FAULTS = ("short", "empty", "words", "half", "two dimensions", "missing", *RESERVED)


class Example(NamedTuple):
    tokens: int
    answer: int  # tokens of the other side
    sentence: int  # tokens of a document
    images: int
    form: str


class Case(NamedTuple):
    task: str
    examples: list[Example]
    features: str
    rows: int
    multiple: int | None
    start: int
    pad: int
    option: str | None
    impl: str
    labels: str | None
    told: str | None  # by which column the documents are
    masked: int  # every so many tokens are
    given: bool  # what the decoder reads, and is masked; which tokens are special
    more: bool  # other columns
    seed: int
    fault: str | None


class Tokenizer:
    mask_token, mask_token_id = "[MASK]", MASK_TOKEN

    def __len__(self) -> int:
        return WORDS

    def convert_tokens_to_ids(self, _: str) -> int:
        return MASK_TOKEN

    def get_special_tokens_mask(self, ids: list[int], already_has_special_tokens: bool) -> Any:
        return [int(token % 4 == 0) for token in ids]


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    task = draw(st.sampled_from(TASKS))
    forms = draw(st.sampled_from([[form] for form in FORMS] + [list(FORMS)] * 6))
    features = draw(st.sampled_from(["dicts", "dicts", "packs", "both", "arrow"]))
    size = st.integers(1, 12) | st.sampled_from([1, 1, 3, 8])
    small = st.integers(1, 4)
    one = st.builds(Example, size, small | size, small, st.integers(0, 2), st.sampled_from(forms))
    needed = task in ("seq2seq", "image_text_to_text", "masked_lm", "sequence_classification")
    kinds = ["number", "vector", "half"] if task == "sequence_classification" else ["tokens"]
    options = [None, None, None, "expand_on_device", "pad_examples"]
    supervised = task == "causal_lm" and hasattr(modeling_utils, "slice_logits_to_keep")
    options += ["supervised_only"] * 2 * supervised
    return Case(
        task,
        draw(st.lists(one, min_size=1, max_size=7)),
        "dicts" if features == "arrow" and task == "image_text_to_text" else features,
        draw(st.integers(1, 4)),
        draw(st.none() | st.sampled_from([1, 2, 8])),
        draw(st.sampled_from([0, 0, 2])),
        draw(st.sampled_from([0, 3])),
        draw(st.sampled_from(options)),
        draw(st.sampled_from(["auto", "cpp", "eager"])),
        draw(st.sampled_from([*kinds, *[None] * (not needed)])),
        # others refuse several documents, and are not asked much about that
        draw(st.sampled_from([*[None] * (6 if task in DIVIDED else 60), *TOLD])),
        draw(st.sampled_from([0, 0, 2, 3])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 2**20)),
        draw(st.sampled_from([None] * 40 + list(FAULTS))),
    )


CASES = _cases()


def check(case: Case) -> None:
    plain = [_row(case, index, example) for index, example in enumerate(case.examples)]
    documents = [_documents(case, row) for row in plain]
    if case.fault is not None:
        _spoil(case, plain[-1])
    rows = [_formed(row, one.form) for row, one in zip(plain, case.examples, strict=True)]
    collator = _collator(case)
    if case.fault is not None or _is_refused(case, documents):
        with pytest.raises((ValueError, TypeError)):
            collator(rows)
        return
    features, units = _features(case, plain, rows)
    batch = collator(features)
    if case.option == "expand_on_device":
        batch = batch.to("cpu")
    padded = case.option == "pad_examples" and case.features in ("dicts", "arrow")
    layout = _Layout(case, [documents[unit] for unit in itertools.chain(*units)], units, padded)
    _check_batch(case, batch, layout.padded() if padded else layout.packed())


def _collator(case: Case) -> fastft.PackingCollator:
    drawn = {"tokenizer": Tokenizer(), "mlm_probability": 0.5, "seed": case.seed}
    return fastft.PackingCollator(
        task="masked_lm" if case.task == "drawn" else case.task,
        rows=case.rows,
        pad_to_multiple_of=case.multiple,
        position_ids_start=case.start,
        pad_token_id=case.pad,
        decoder_start_token_id=START,
        impl=case.impl,
        **({case.option: True} if case.option else {}),
        **(drawn if case.task == "drawn" else {}),
    )


def _row(case: Case, index: int, example: Example) -> Row:
    n, ids = example.tokens, [1000 * (index + 1) + t for t in range(example.tokens)]
    row: Row = {"input_ids": ids}
    if case.labels == "tokens":
        m = example.answer if case.task == "seq2seq" else n
        row["labels"] = [IGNORED if t % 5 == 3 else 500_000 + ids[0] + t for t in range(m)]
        if case.task == "seq2seq" and case.given:
            row["decoder_input_ids"] = [600_000 + ids[0] + t for t in range(m)]
            row["decoder_attention_mask"] = [int(t % 3 != 2) for t in range(m)]
    elif case.labels is not None:
        row["labels"] = {"number": index, "vector": [index, 1], "half": index + 0.5}[case.labels]
    if case.task == "drawn" and case.given:
        row["special_tokens_mask"] = [t % 3 // 2 for t in range(n)]
    if case.task == "image_text_to_text" and example.images:
        row["pixel_values"] = torch.full((example.images, 2), float(index))
        row["image_grid_thw"] = [[1, index, t] for t in range(example.images)]
    if case.more:
        row |= {"token_type_ids": [t % 2 for t in range(n)], "weights": [t / 4 for t in ids]}
        row |= {"text": f"example {index}", "score": 0.5, "nothing": None}
    return row | _told(case, example)


def _told(case: Case, example: Example) -> Row:
    """The columns that say which tokens are masked, and where documents begin."""
    n, size = example.tokens, example.sentence if case.told else example.tokens
    real = [int(not case.masked or (t + 1) % case.masked > 0) for t in range(n)]
    numbers = [t // size for t in range(n)]
    sizes = [min(size, n - begin) for begin in range(0, n, size)]
    borders = [0, *itertools.accumulate(sizes)]
    # of the tokens that are real, as position_ids are made of a mask
    places = [sum(real[t // size * size : t]) for t in range(n)]
    row: Row = {"attention_mask": real} if case.masked else {}
    if case.told == "attention_mask":
        return {"attention_mask": [(t // size + 1) * real[t] for t in range(n)]}
    columns = {"position_ids": places, "seq_idx": numbers, "seq_lengths": sizes}
    return row | ({case.told: columns.get(case.told, borders)} if case.told else {})


def _documents(case: Case, row: Row) -> list[Row]:
    """An example's documents, each with its columns of numbers, and without what is masked."""
    n = len(row["input_ids"])
    size = case.examples[row["input_ids"][0] // 1000 - 1].sentence if case.told else n
    real = row.get("attention_mask", [1] * n)
    columns = {"input_ids", "token_type_ids", "weights", "special_tokens_mask"}
    if case.labels == "tokens" and case.task != "seq2seq":
        columns |= {"labels"}
    parts = [
        [t for t in range(begin, min(begin + size, n)) if real[t]] for begin in range(0, n, size)
    ]
    made: list[Row] = [
        {key: [row[key][t] for t in part] for key in columns & row.keys()} for part in parts if part
    ]
    for key in ("labels", "decoder_input_ids") if case.task == "seq2seq" else ():
        mask = row.get("decoder_attention_mask", [1] * len(row["labels"]))
        if made and key in row:
            made[0]["decoder " + key] = [x for x, kept in zip(row[key], mask, strict=True) if kept]
    if made and case.task in ("image_text_to_text", "sequence_classification"):
        others = {"pixel_values", "image_grid_thw", "labels"} - made[0].keys()
        made[0] |= {"of all " + key: row[key] for key in others & row.keys()}
    return made


def _spoil(case: Case, row: Row) -> None:
    ids = row["input_ids"]
    row |= {
        "short": {"token_type_ids": [0] * (len(ids) + 1)},
        "empty": {"input_ids": []},
        "words": {"input_ids": ["word"] * len(ids)},
        "half": {"input_ids": [token + 0.5 for token in ids]},
        "two dimensions": {"input_ids": [ids, ids]},
        "missing": {f"column of {len(ids)}": 1},
    }.get(case.fault, {case.fault: ids})
    if case.fault == "missing" and len(case.examples) == 1:
        del row["input_ids"]


def _formed(row: Row, form: str) -> Row:
    known = ("pixel_values", "image_grid_thw", "text", "score", "nothing")
    return {
        key: FORMS[form](value)
        if key not in known and isinstance(value, list) and value and type(value[0]) in (int, float)
        else value
        for key, value in row.items()
    }


def _is_refused(case: Case, documents: list[list[Row]]) -> bool:
    several = any(len(made) > 1 for made in documents)
    undivided = case.task not in DIVIDED or case.option == "pad_examples"
    return not all(documents) or (several and undivided)


def _features(case: Case, plain: list[Row], rows: list[Row]) -> tuple[list[Any], list[list[int]]]:
    """What the collator is given, and which examples it has to keep together."""
    alone = [[index] for index in range(len(rows))]
    if case.features == "dicts":
        return rows, alone
    if case.features == "arrow":
        table = pyarrow.Table.from_pylist(plain)
        return [table.slice(0, 2), *([table.slice(2)] if len(rows) > 2 else [])], alone
    packed = fastft.pack(rows, 1000, max_sequences=2)
    units = [
        [
            int(t)
            for t in dict.fromkeys(int(one["input_ids"][0]) // 1000 - 1 for one in pack.examples)
        ]
        for pack in packed
    ]
    if case.features == "packs" or len(rows) < 2:
        return list(packed), units
    # the first one again, outside of a pack
    return [*packed, rows[0]], [*units, [0]]


class _Layout:
    """Where documents lie: rows of them, all as wide as the longest, each key a list for a row."""

    def __init__(
        self, case: Case, examples: list[list[Row]], units: list[list[int]], padded: bool
    ) -> None:
        self.case, self.examples = case, examples
        ends = [0, *itertools.accumulate(map(len, units))]
        numbers = [range(*pair) for pair in itertools.pairwise(ends)]
        sizes = [sum(map(self._size, unit)) for unit in numbers]
        rows = (
            numbers
            if padded
            else [
                [one for unit in row for one in numbers[unit]]
                for row in _balanced(sizes, case.rows)
            ]
        )
        self.order = [*itertools.chain(*rows)]
        self.rows = [[made for one in row for made in examples[one]] for row in rows]
        self.width = self._width("input_ids")

    def _size(self, example: int) -> int:
        sides = ("input_ids", "decoder labels")
        return sum(len(made.get(key, ())) for made in self.examples[example] for key in sides)

    def _width(self, key: str) -> int:
        longest = max(sum(len(made[key]) for made in row) for row in self.rows)
        return longest + -longest % (self.case.multiple or 1)

    def _flat(self, key: str, fill: float, width: int) -> list[list[Any]]:
        lines = [[x for made in row for x in made[key]] for row in self.rows]
        return [line + [fill] * (width - len(line)) for line in lines]

    def _columns(self) -> Row:
        """Those of the examples, and their labels."""
        first = self.rows[0][0]
        fills = {"input_ids": self.case.pad, "labels": IGNORED}
        batch = {
            key: self._flat(key, fills.get(key, 0), self.width)
            for key in first.keys() - {"special_tokens_mask"}
            if not key.startswith(("decoder ", "of all "))
        }
        for key in ("pixel_values", "image_grid_thw"):
            given = [self.examples[one][0].get("of all " + key) for one in self.order]
            held = [line for value in given if value is not None for line in torch.as_tensor(value)]
            batch |= {key: torch.stack(held).tolist()} if held else {}
        if self.case.task == "sequence_classification":
            batch["labels"] = [made[0]["of all labels"] for made in self.examples]
        return batch

    def padded(self) -> Row:
        batch = self._columns()
        sizes = [sum(len(made["input_ids"]) for made in row) for row in self.rows]
        batch["attention_mask"] = [[int(t < n) for t in range(self.width)] for n in sizes]
        if self.case.task == "causal_lm" and "labels" not in batch:
            batch["labels"] = self._flat("input_ids", IGNORED, self.width)
        if self.case.task == "seq2seq":
            batch |= self._decoder(self._width("decoder labels"))
        return batch | self._special()

    def packed(self) -> Row:
        beside = 0
        if self.case.task == "seq2seq":
            beside = self._width("decoder labels")
            self._make_room(beside)
        lengths = [[len(made["input_ids"]) for made in row] for row in self.rows]
        rests = [self.width - sum(row) for row in lengths]
        segments = [[*row, *[rest] * (rest > 0)] for row, rest in zip(lengths, rests, strict=True)]
        flat = [*itertools.chain(*segments)]
        start, borders = self.case.start, [0, *itertools.accumulate(flat)]
        numbers = itertools.count()
        batch = self._columns() | {
            "position_ids": [[start + t for n in row for t in range(n)] for row in segments],
            "seq_idx": [
                [number for n in row for number in [next(numbers)] * n] for row in segments
            ],
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": max(flat),
            "max_length_k": max(flat),
            "use_cache": False,
        }
        if any(rests) and not beside:
            batch["padding_lengths"] = rests
        if self.case.task in ("causal_lm", "image_text_to_text"):
            batch["labels"] = self._shifted(batch, segments)
        if self.case.task == "sequence_classification":
            places = self._segments_of_examples(segments)
            batch["label_segments"] = [places[one] for one in range(len(self.examples))]
        if self.case.option == "supervised_only":
            batch |= self._kept(batch["labels"])
        return batch | self._special() | (self._decoder(beside, rests) if beside else {})

    def _shifted(self, batch: Row, segments: list[list[int]]) -> list[list[int]]:
        """Nothing predicts the first token of a document, nor padding."""
        lines = batch.get("labels") or self._flat("input_ids", IGNORED, self.width)
        firsts = [{0, *itertools.accumulate(row)} for row in segments]
        return [
            [IGNORED if t in first else label for t, label in enumerate(line)]
            for line, first in zip(lines, firsts, strict=True)
        ]

    def _kept(self, lines: list[list[int]]) -> Row:
        labels = [*itertools.chain(*lines), IGNORED]
        following = labels[1:]
        keep = [label != IGNORED for label in following]
        rows = [keep[t : t + self.width] for t in range(0, len(keep), self.width)]
        return {"logits_to_keep": rows, "shift_labels": [x for x in following if x != IGNORED]}

    def _segments_of_examples(self, segments: list[list[int]]) -> dict[int, int]:
        """One document each; a row's padding is a segment that is none's."""
        order, number, places = iter(self.order), 0, {}
        for row, held in zip(segments, self.rows, strict=True):
            places |= {next(order): number + place for place in range(len(held))}
            number += len(row)
        return places

    def _make_room(self, beside: int) -> None:
        """Padding of a decoder's row reads padding of the encoder's."""
        sides = ("input_ids", "decoder labels")
        for row in self.rows:
            ours, theirs = (sum(len(made[key]) for made in row) for key in sides)
            if ours == self.width and theirs < beside:
                self.width += self.case.multiple or 1
                return

    def _decoder(self, width: int, rests: list[int] | None = None) -> Row:
        batch: Row = {"labels": self._flat("decoder labels", IGNORED, width)}
        given = "decoder decoder_input_ids" in self.rows[0][0]
        if given:
            batch["decoder_input_ids"] = self._flat(
                "decoder decoder_input_ids", self.case.pad, width
            )
        if rests is None:  # padded: the model makes them
            return batch
        lengths = [[len(made["decoder labels"]) for made in row] for row in self.rows]
        segments = [
            n
            for row, rest in zip(lengths, rests, strict=True)
            for n in [*row, *[width - sum(row)] * (rest > 0)]
        ]
        if not given:
            labels, read = iter(itertools.chain(*batch["labels"])), list[int]()
            for n in segments:
                of_segment = [START, *itertools.islice(labels, n)]
                read += [self.case.pad if x == IGNORED else x for x in of_segment[:n]]
            batch["decoder_input_ids"] = [read[t : t + width] for t in range(0, len(read), width)]
        borders = [0, *itertools.accumulate(segments)]
        return batch | {"decoder_cu_seq_lens": borders, "decoder_max_length": max(segments)}

    def _special(self) -> Row:
        """The masks that transformers' collator draws over the same tokens."""
        if self.case.task != "drawn":
            return {}
        tokenizer = Tokenizer()
        for row in self.rows:
            for made in row:
                if not self.case.given:
                    made["special_tokens_mask"] = tokenizer.get_special_tokens_mask(
                        made["input_ids"], True
                    )
        theirs = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
        theirs.generator = torch.Generator().manual_seed(self.case.seed)
        ids, special = (
            torch.tensor(self._flat(key, fill, self.width)).flatten()
            for key, fill in (("input_ids", self.case.pad), ("special_tokens_mask", 1))
        )
        drawn, labels = theirs.torch_mask_tokens(ids, special)
        shape = len(self.rows), self.width
        return {"input_ids": drawn.view(shape).tolist(), "labels": labels.view(shape).tolist()}


def _balanced(sizes: list[int], rows: int) -> list[list[int]]:
    """From the longest to the shortest, each into the row with the fewest tokens."""
    held: list[list[int]] = [[] for _ in range(min(rows, len(sizes)))]
    for unit in sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], unit)):
        min(held, key=lambda row: sum(sizes[one] for one in row)).append(unit)
    return sorted(map(sorted, held))


def _check_batch(case: Case, batch: Any, expected: Row) -> None:
    assert batch.keys() == expected.keys(), "the batch has other keys"
    for key, value in expected.items():
        found = batch[key].tolist() if isinstance(batch[key], torch.Tensor) else batch[key]
        assert found == value, f"{key} is {found}, not {value}"
    of_segments = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "padding_lengths")
    of_segments += ("decoder_cu_seq_lens",)
    for key, value in batch.items():
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            wanted = torch.int32 if key in of_segments else torch.int64
            wanted = torch.bool if key == "logits_to_keep" else wanted
            assert value.dtype == wanted, f"{key} is {value.dtype}"
    labels = expected.get("labels")
    flat = None if labels is None else torch.tensor(labels)
    assert batch.counted == (None if flat is None else int((flat != IGNORED).sum()))
