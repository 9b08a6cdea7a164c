"""How many labels count, from the collator to the fused loss: a bound that holds, or none."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.device_mode import DeviceMode
from support.trainers import logged, quiet_arguments, tiny_llama
from support.watch import Watch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

import fastft
from fastft.data.batch import known_count, note_count
from fastft.loss.counted_labels import CountedLabels, bound_of, give_counted_labels
from fastft.loss.lazy import losses as lazy_losses

EXAMPLES = [
    {
        "input_ids": [*range(start, start + length)],
        "labels": [-100] * (length // 2) + [*range(length - length // 2)],
    }
    for start, length in enumerate((9, 14, 3, 11, 8, 1, 6, 17))
]


def given(labels):
    """What a model gets for noted labels."""
    seen = []
    module = nn.Module()
    module.forward = lambda labels: seen.append(labels)
    remove = give_counted_labels(module, known_count)
    module(labels=labels)
    remove()
    return seen[0]


def noted():
    labels = torch.tensor([[-100, 3, 4, -100], [5, -100, -100, 6]])
    note_count(labels, 4)
    return labels


KEEPS = {
    "stock": lambda y: F.pad(y, (0, 1), value=-100)[..., 1:].contiguous().view(-1).to("cpu"),
    "older": lambda y: y[..., 1:].contiguous().view(-1).long(),
    "row": lambda y: y[0],
    "rows": lambda y: y[None, 1:, ::2],
    "reshape": lambda y: y.reshape(4, 2).flatten().unsqueeze(0).squeeze(),
    "transpose": lambda y: y.transpose(0, 1).t().permute(1, 0).clone().detach(),
    "chunk": lambda y: y.chunk(2, 1)[1],
    "split": lambda y: torch.split(y, 1)[0],
    "unbind": lambda y: y.unbind()[1],
    "roll": lambda y: torch.roll(y, -1, 1),
    "int32": lambda y: y.int(),
    "masked_fill": lambda y: y.masked_fill(torch.tensor([True, False, False, False]), -100),
}
LOSES = {
    "pad_with_zeros": lambda y: F.pad(y, (0, 1)),
    "pad_by_repeating": lambda y: F.pad(y.float(), (1, 1), mode="replicate").long(),
    "expand": lambda y: y[None].expand(3, 2, 4),
    "repeat": lambda y: y.repeat(2, 1),
    "index": lambda y: y[[0, 0, 1, 1]],
    "mask": lambda y: y[torch.tensor([True, True])],
    "cat": lambda y: torch.cat([y, y]),
    "where": lambda y: torch.where(y == -100, 0, y),
    "sum": lambda y: y + 100,
    "bytes": lambda y: y.to(torch.uint8).long(),
    "other_view": lambda y: y.view(torch.int32),
    "masked_fill_of_others": lambda y: y.masked_fill(y == -100, 0),
    "masked_fill_of_a_larger_mask": lambda y: y.masked_fill(
        torch.zeros(5, 2, 4, dtype=torch.bool), -100
    ),
    "clamp": lambda y: y.clamp(min=0),
    "written": lambda y: y.fill_(1),
    "unfold": lambda y: y.unfold(1, 2, 1),
}


@pytest.mark.parametrize("name", KEEPS)
def test_what_picks_and_moves_labels_keeps_the_bound(name):
    labels, function = noted(), KEEPS[name]
    target, counted = bound_of(function(given(labels)), -100)
    assert counted == 4 and type(target) is torch.Tensor and torch.equal(target, function(labels))
    assert (target != -100).sum() <= counted


@pytest.mark.parametrize("name", LOSES)
def test_what_could_let_more_labels_count_loses_it(name):
    labels, function = noted(), LOSES[name]
    result = function(given(labels))
    assert bound_of(result, -100)[1] is None and type(result) is torch.Tensor
    assert torch.equal(result, function(labels))


WRITES = {
    "to it": lambda labels, mine, shifted: shifted.fill_(3),
    "to a part": lambda labels, mine, shifted: shifted.__setitem__(slice(0, 2), 3),
    "to what it is a view of": lambda labels, mine, shifted: mine.masked_fill_(mine == -100, 3),
    "to the labels of the batch": lambda labels, mine, shifted: labels.zero_(),
    "by another view": lambda labels, mine, shifted: labels.view(-1)[3:].zero_(),
}


@pytest.mark.parametrize("name", WRITES)
def test_who_writes_to_labels_takes_the_bound_away(name):
    labels = noted()
    mine = given(labels)
    shifted = mine[..., 1:]
    assert bound_of(shifted, -100)[1] == 4
    WRITES[name](labels, mine, shifted)
    assert bound_of(shifted, -100)[1] is None
    # a later forward pass gets none either
    assert type(given(labels)) is torch.Tensor or name == "to it"


@pytest.mark.parametrize(
    "derive", [lambda y: y[..., 1:], lambda y: y.clone(), lambda y: F.pad(y, (0, 1), value=-100)]
)
@pytest.mark.parametrize("copy_first", [False, True])
def test_labels_that_are_written_to_before_the_shift_have_no_bound_after_it(derive, copy_first):
    mine = given(noted())
    mine = mine.clone() if copy_first else mine
    assert bound_of(derive(mine), -100)[1] == 4
    mine[mine == -100] = 3
    assert bound_of(derive(mine), -100)[1] is None


def test_a_compiled_function_is_compiled_once_for_labels_of_any_count():
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def shift(labels):
        return F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)

    graphs = []
    for counted in (4, 5, 6):
        labels = noted()
        note_count(labels, counted)
        assert torch.equal(
            shift(given(labels)), torch.tensor([3, 4, -100, -100, -100, -100, 6, -100])
        )
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


def test_another_ignore_index_has_no_bound():
    assert bound_of(given(noted()), -1)[1] is None and bound_of(noted(), -100)[1] is None


def test_labels_of_inference_mode_or_of_nobody_stay_as_they_are():
    assert type(given(torch.tensor([1, 2]))) is torch.Tensor
    with torch.inference_mode():
        labels = torch.tensor([1, -100])
        note_count(labels, 1)
        assert type(given(labels)) is torch.Tensor


def test_a_model_that_is_copied_or_pickled_meanwhile_works():
    model = tiny_llama()
    remove = give_counted_labels(model, known_count)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        labels = noted()
        assert other(input_ids=labels.clamp(min=0), labels=labels).loss.isfinite()
    remove()
    assert not model._forward_pre_hooks


class Model(nn.Module):
    """A head and stock's loss."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(97, 8), nn.Linear(8, 97, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels, **kwargs):
        return ForCausalLMLoss(self.head(self.embedding(input_ids)), labels, vocab_size=97)


@pytest.mark.parametrize("expand_on_device", [False, True])
@pytest.mark.parametrize("labels", [True, False])
def test_ignored_rows_cost_nothing_on_a_device(expand_on_device, labels):
    examples = EXAMPLES if labels else [{"input_ids": example["input_ids"]} for example in EXAMPLES]
    model, collator = (
        Model(),
        fastft.PackingCollator(expand_on_device=expand_on_device, impl="eager"),
    )
    expected = fastft.PackingCollator()(examples)
    stock = model(**expected)
    stock.backward()
    gradient, model.head.weight.grad = model.head.weight.grad, None
    counted = int((expected["labels"] != -100).sum())
    assert 0 < counted < expected["labels"].numel()
    with fastft.fused_loss(model) as report, Watch() as watch, DeviceMode() as mode:
        batch = collator(examples).to(mode.device)
        mode.waits.clear()  # of the copy
        remove = give_counted_labels(model, known_count)
        loss = model(**dict(batch))  # Trainer makes a copy of the dict
        loss.backward()
        remove()
    assert report.fused == 1 and mode.waits == [] and watch.flops == 3 * 2 * counted * 8 * 97
    torch.testing.assert_close([loss, model.head.weight.grad], [stock, gradient])


TASKS = {
    "regression": (
        {"input_ids": [5, 6, 7], "label": 0.5},
        {"task": "sequence_classification"},
        False,
    ),
    "classes": ({"input_ids": [5, 6, 7], "label": 2}, {"task": "sequence_classification"}, True),
    "seq2seq": (
        {"input_ids": [5, 6], "labels": [4, 3, 2]},
        {"task": "seq2seq", "decoder_start_token_id": 0},
        True,
    ),
    "own labels": ({"input_ids": [5, 6, 7], "labels": [-100, 3, -100]}, {}, True),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("how", ["packed", "flat", "padded"])
def test_labels_of_every_task_are_counted_as_they_are(name, how):
    example, options, counts = TASKS[name]
    options = options | {"expand_on_device": how == "flat", "pad_examples": how == "padded"}
    batch = fastft.PackingCollator(**options)([example, example]).to("cpu")
    labels = given(batch["labels"])
    assert isinstance(labels, CountedLabels) == counts
    if counts:
        assert bound_of(labels, -100)[1] == (batch["labels"] != -100).sum()


def test_labels_that_are_replaced_before_the_move_are_the_ones_that_count():
    batch = fastft.PackingCollator()(EXAMPLES)
    batch["labels"] = batch["input_ids"].clone()
    moved = batch.to("cpu")
    assert bound_of(given(moved["labels"]), -100)[1] == batch["input_ids"].numel()
    flat = fastft.PackingCollator(expand_on_device=True)(EXAMPLES)
    flat.integers[2 * flat.segments :] = 7  # every label
    moved = flat.to("cpu")
    assert (
        bound_of(given(moved["labels"]), -100)[1] == (moved["labels"] != -100).sum() > flat.counted
    )


@pytest.mark.parametrize("expand_on_device", [False, True])
@pytest.mark.parametrize("labels", [True, False])
def test_padding_does_not_count(expand_on_device, labels):
    examples = EXAMPLES if labels else [{"input_ids": example["input_ids"]} for example in EXAMPLES]
    batch = fastft.PackingCollator(
        rows=3, pad_to_multiple_of=32, expand_on_device=expand_on_device
    )(examples)
    counted, moved = batch.counted, batch.to("cpu")
    assert bound_of(given(moved["labels"]), -100)[1] == counted == (moved["labels"] != -100).sum()


class Spy:
    """The bounds that the loss knows, beside what really counts."""

    def __init__(self, monkeypatch):
        self.bounds, self.counts = [], []

        def spy(target, ignore_index):
            plain, counted = bound_of(target, ignore_index)
            self.bounds.append(counted)
            self.counts.append(int((plain != -100).sum()))
            return plain, counted

        monkeypatch.setattr(lazy_losses, "bound_of", spy)


def train(tmp_path, collator, callbacks, kind=Trainer):
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 3}
    arguments = quiet_arguments(
        tmp_path, max_steps=3, **batches, **evaluation, remove_unused_columns=False
    )
    trainer = kind(
        tiny_llama(),
        arguments,
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES[:3],
        data_collator=collator,
        callbacks=callbacks,
    )
    trainer.train()
    return logged(trainer, "loss", "eval_loss")


@pytest.mark.parametrize(
    "options",
    [{}, {"expand_on_device": True}, {"rows": 2, "pad_to_multiple_of": 8}, {"pad_examples": True}],
)
def test_trainer_hands_the_count_to_the_loss(options, tmp_path, monkeypatch):
    collator, spy = fastft.PackingCollator(**options), Spy(monkeypatch)
    fused = train(tmp_path, collator, [fastft.FusedLossCallback()])
    assert len(spy.bounds) == 3 * 2 + 1
    if collator.pad_examples:  # whose first labels the model's shift drops
        assert all(
            bound - 3 <= count <= bound for bound, count in zip(spy.bounds, spy.counts, strict=True)
        )
    else:
        assert spy.bounds == spy.counts
    stock = train(tmp_path, collator, [fastft.PackingCallback()])
    assert len(fused) == 4 and fused == pytest.approx(stock, rel=1e-5)


def padded(features):
    width = max(len(example["input_ids"]) for example in features)
    return {
        key: torch.tensor(
            [example[key] + [fill] * (width - len(example[key])) for example in features]
        )
        for key, fill in (("input_ids", 0), ("labels", -100))
    }


def test_without_our_collator_nothing_is_known(tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    fused = train(tmp_path, padded, [fastft.FusedLossCallback()])
    assert spy.bounds == [None] * 7
    assert fused == pytest.approx(train(tmp_path, padded, []), rel=1e-5)


class MoreLabels(Trainer):
    """Lets all tokens count."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(
            model, {**inputs, "labels": inputs["input_ids"].clone()}, *args, **kwargs
        )


class WrittenLabels(Trainer):
    """The same, in place."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs["labels"].copy_(inputs["input_ids"])
        return super().compute_loss(model, inputs, *args, **kwargs)


class LabelsWrittenByTheModel(Trainer):
    """The same, by the model, on a copy."""

    def __init__(self, model, *args, **kwargs):
        forward = model.forward

        def wrapped(*inputs, labels=None, **options):
            if labels is not None:
                labels = labels.clone()
                labels[labels == -100] = 3
            return forward(*inputs, labels=labels, **options)

        model.forward = wrapped
        super().__init__(model, *args, **kwargs)


class FewerLabels(Trainer):
    """Lets every second token count."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs["labels"][:, ::2] = -100
        return super().compute_loss(model, inputs, *args, **kwargs)


class LossOfItsOwn(Trainer):
    """A loss of labels that the model has not seen."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_loss_func=self.loss_of, **kwargs)

    def loss_of(self, outputs, labels, num_items_in_batch=None):
        return ForCausalLMLoss(
            outputs.logits,
            labels.clamp(min=1),
            vocab_size=97,
            num_items_in_batch=num_items_in_batch,
        )


@pytest.mark.parametrize(
    "kind", [MoreLabels, WrittenLabels, LabelsWrittenByTheModel, FewerLabels, LossOfItsOwn]
)
def test_labels_that_change_behind_the_collator_are_all_taken(kind, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    fused = train(tmp_path, fastft.PackingCollator(), [fastft.FusedLossCallback()], kind)
    assert set(spy.bounds) == {None} and len(spy.bounds) == 7
    assert fused == pytest.approx(
        train(tmp_path, fastft.PackingCollator(), [fastft.PackingCallback()], kind), rel=1e-5
    )


class UnseenWrites(Trainer):
    """Lets all tokens count, by numpy, of whose writes torch knows nothing."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs["labels"].numpy()[:] = inputs["input_ids"].numpy()
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_labels_that_numpy_writes_to_are_all_taken(tmp_path):
    fused = train(tmp_path, fastft.PackingCollator(), [fastft.FusedLossCallback()], UnseenWrites)
    stock = train(tmp_path, fastft.PackingCollator(), [fastft.PackingCallback()], UnseenWrites)
    assert fused == pytest.approx(stock, rel=1e-5)
