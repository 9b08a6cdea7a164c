"""A batch is the same in every form: padded on either side, packed, flattened, in another order."""

from itertools import chain

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DataCollatorWithFlattening,
    GPT2Config,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.bert.modeling_bert import BertForTokenClassification

from fastft import PackingCollator
from fastft.integrations.recorder.batches import Reading, described, shift_of

CAUSAL, MASKED, OTHER = Reading(causal=True), Reading(masked=True), Reading()
APART = Reading(apart=True)
TEXTS = [[5, 6, 7, 8], [9, 5, 5], [11, 12, 13, 14, 15, 16], [7]]
LABELS = [[-100, -100, 7, 8], [9, 5, 5], [11, 12, -100, 14, 15, 16], [7]]


def rows(values, fill, left=False):
    width = max(map(len, values))
    padding = [[fill] * (width - len(row)) for row in values]
    pairs = zip(values, padding, strict=True)
    return torch.tensor([p + row if left else row + p for row, p in pairs])


def padded(texts=TEXTS, labels=LABELS, left=False):
    return {
        "input_ids": rows(texts, 0, left),
        "labels": rows(labels, -100, left),
        "attention_mask": rows([[1] * len(text) for text in texts], 0, left),
    }


def features(labels=LABELS):
    pairs = zip(TEXTS, labels, strict=True)
    return [{"input_ids": text, "labels": label} for text, label in pairs]


def flattened(reset):
    """Packed by hand into a row, where positions alone say where documents begin."""
    columns = {"input_ids": TEXTS, "labels": LABELS}
    if reset:
        columns["position_ids"] = [range(len(text)) for text in TEXTS]
    return {key: torch.tensor([[*chain(*values)]]) for key, values in columns.items()}


def numbered():
    """One row, whose mask numbers the documents, and padding behind them."""
    batch = flattened(False)
    numbers = [n for n, text in enumerate(TEXTS, 1) for _ in text]
    batch["attention_mask"] = torch.tensor([[*numbers, 0, 0]])
    for key, fill in {"input_ids": 0, "labels": -100}.items():
        batch[key] = torch.nn.functional.pad(batch[key], (0, 2), value=fill)
    return batch


FORMS = {
    "padded on the left": lambda: padded(left=True),
    "in another order": lambda: padded(TEXTS[::-1], LABELS[::-1]),
    "packed": lambda: PackingCollator()(features()),
    "packed into two rows": lambda: PackingCollator(rows=2)(features()),
    "packed with padding": lambda: PackingCollator(pad_to_multiple_of=16)(features()),
    "flattened by transformers": lambda: DataCollatorWithFlattening(return_seq_idx=True)(
        features()
    ),
    "positions that begin anew": lambda: flattened(True),
    "a mask of numbers": numbered,
}


def said(batch, reading=CAUSAL):
    micro = described(dict(batch), 1.0, reading)
    return micro.inputs, micro.targets, micro.documents, micro.tokens, micro.supervised


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_is_the_same_in_every_form(form):
    assert said(FORMS[form]()) == said(padded())


def test_what_is_counted():
    micro = described(padded(), 1.0, CAUSAL)
    assert (micro.documents, micro.tokens, micro.padding) == (4, 14, 10)
    assert (micro.supervised, micro.ignored, micro.packed) == (8, 6, False)
    micro = described(PackingCollator(pad_to_multiple_of=16)(features()), 1.0, CAUSAL)
    assert (micro.documents, micro.tokens, micro.padding, micro.packed) == (4, 14, 2, True)


CHANGES = {
    "a token": (lambda texts, labels: texts[1].__setitem__(0, 8), True),
    "a label": (lambda texts, labels: labels[1].__setitem__(1, 8), False),
    "a label that is ignored": (lambda texts, labels: labels[2].__setitem__(1, -100), False),
    "labels that are shifted": (lambda texts, labels: labels[2].append(labels[2].pop(0)), False),
    "a document": (lambda texts, labels: (texts.pop(), labels.pop()), True),
    "a document twice": (lambda texts, labels: (texts.append([7]), labels.append([7])), True),
    "where one ends": (lambda *both: [lists[0].append(lists[1].pop(0)) for lists in both], True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_seen(change):
    alter, in_tokens = CHANGES[change]
    texts, labels = [[*text] for text in TEXTS], [[*label] for label in LABELS]
    alter(texts, labels)
    before, after = said(padded()), said(padded(texts, labels))
    assert before[1] != after[1] and (before[0] != after[0]) == in_tokens


def test_the_first_label_is_no_label_of_a_causal_model_alone():
    others = [[3, *label[1:]] for label in LABELS]
    assert said(padded(labels=others)) == said(padded())
    assert said(padded(labels=others), OTHER) != said(padded(), OTHER)


def test_tokens_that_are_masked_are_put_back_for_the_digest_of_the_text():
    def masked(place):
        text, label = [5, 6, 7, 8], [-100] * 4
        label[place], text[place] = text[place], 3
        return {"input_ids": torch.tensor([text]), "labels": torch.tensor([label])}

    one, other = (described(masked(place), 1.0, MASKED) for place in (1, 2))
    assert one.inputs == other.inputs and one.targets != other.targets
    assert one.supervised == 1 and one.ignored == 3


def test_classes_of_packed_documents():
    classes = [2, 0, 1, 2]
    pairs = [{"input_ids": t, "labels": c} for t, c in zip(TEXTS, classes, strict=True)]
    rows_of = {key: value for key, value in padded().items() if key != "labels"}
    stock = said({**rows_of, "labels": torch.tensor(classes)}, OTHER)
    for count in (1, 2):
        packed = PackingCollator(task="sequence_classification", rows=count)(pairs)
        assert said(packed, OTHER) == stock
    assert said({**rows_of, "labels": torch.tensor([2, 0, 2, 1])}, OTHER)[1] != stock[1]
    assert stock[4] == 4


def test_texts_and_their_translations():
    answers = [[3, 4], [5], [6, 7, 8, 9], [5, 5]]
    pairs = [{"input_ids": t, "labels": a} for t, a in zip(TEXTS, answers, strict=True)]
    stock = {**padded(), "labels": rows(answers, -100)}
    for multiple in (None, 8):
        collator = PackingCollator(
            task="seq2seq", decoder_start_token_id=0, pad_to_multiple_of=multiple
        )
        assert said(collator(pairs), APART) == said(stock, APART)
    swapped = {**stock, "labels": rows([answers[1], answers[0], *answers[2:]], -100)}
    assert said(swapped, APART)[1] != said(stock, APART)[1]


def test_answers_in_a_text_count():
    batch = {key: value for key, value in padded().items() if key != "labels"}
    ends = {"start_positions": torch.tensor([0, 1, 2, 0]), "end_positions": torch.ones(4).long()}
    before = said({**batch, **ends}, OTHER)
    ends["end_positions"] = torch.tensor([1, 2, 1, 1])
    after = said({**batch, **ends}, OTHER)
    assert before[0] == after[0] and before[1] != after[1]


def test_a_batch_without_tokens_is_digested_whole():
    pixels = torch.arange(12.0).view(1, 3, 4)
    one = described({"pixel_values": pixels, "names": ["a"]}, 1.0, OTHER)
    assert one.inputs == described({"names": ["a"], "pixel_values": pixels}, 1.0, OTHER).inputs
    other = {"pixel_values": pixels.flip(1), "names": ["a"]}
    assert one.inputs != described(other, 1.0, OTHER).inputs
    assert described([{"prompt": "a"}], 1.0, OTHER).inputs != one.inputs


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_the_shift_is_read_off_the_rows_that_learn(shift):
    batch = padded()
    counted = batch["labels"] != -100
    learning = torch.zeros_like(counted)
    learning[:, : counted.shape[1] - shift] = counted[:, shift:]
    assert shift_of(learning, batch) == shift
    assert shift_of(~learning, batch) is None and shift_of(None, batch) is None


def test_how_a_model_reads_its_labels():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 11}
    small = {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 11}
    t5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 11}
    bert = BertConfig(intermediate_size=8, **sizes)
    made = {
        AutoModelForCausalLM.from_config(LlamaConfig(intermediate_size=8, **sizes)): CAUSAL,
        AutoModelForCausalLM.from_config(GPT2Config(**small)): CAUSAL,
        BertForMaskedLM(bert): MASKED,
        BertForTokenClassification(bert): OTHER,
        T5ForConditionalGeneration(T5Config(**t5)): APART,
    }
    assert {model: Reading.of(model) for model in made} == made
