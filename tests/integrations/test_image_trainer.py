"""Trainer on images and text: packed as padded, with the fused loss and AdamW as stock."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.image_trainers import GEMMA, LLAVA, QWEN, Padded, image_trainer
from support.trainers import logged

import fastft
from fastft.integrations.probe.images import image_examples

pytestmark = pytest.mark.usefixtures("quiet")

WAYS = {
    "LLaVA and its kind": LLAVA,
    "Qwen2-VL and its kind": QWEN,
    "Gemma3, PaliGemma": GEMMA,
}


def of_ways(**cells):
    return [
        pytest.param(case, id=case.model_type, marks=pytest.mark.way(way, **cells))
        for way, case in WAYS.items()
    ]


def packing(model):
    return fastft.PackingCollator(task="image_text_to_text", model=model)


def losses(trainer):
    trainer.train()
    return logged(trainer)


@pytest.mark.parametrize("case", of_ways(loss="exact", optimizer="exact", packing="exact"))
def test_a_plugged_trainer_has_the_losses_of_stock_on_padded_batches(tmp_path, case):
    stock = losses(image_trainer(tmp_path, case))
    trainer = image_trainer(tmp_path, case)
    plug = fastft.plug(trainer, packing="collate")
    assert losses(trainer) == pytest.approx(stock, rel=2e-5)
    assert plug.lines["packing"].startswith("the same batches, no padding"), plug.lines
    assert "attention fastft, probe exact" in plug.lines["packing"]
    assert "cross-entropy" in plug.lines["loss"] or "fused" in plug.lines["loss"], plug.lines


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(QWEN, id="qwen2_5_vl"),
        pytest.param(GEMMA, id="gemma3", marks=pytest.mark.slow),
        pytest.param(LLAVA, id="llava", marks=pytest.mark.slow),
    ],
)
def test_packed_batches_have_the_losses_of_padded_ones(tmp_path, case):
    stock = losses(image_trainer(tmp_path, case))
    callback = fastft.PackingCallback()
    packed = losses(image_trainer(tmp_path, case, packing, callbacks=[callback]))
    assert packed == pytest.approx(stock, rel=2e-5) and packed[0] == pytest.approx(stock[0], 1e-6)
    assert (callback.probe, callback.switched) == ("exact", "sdpa")


def test_packs_of_a_dataset_are_trained_whole(tmp_path):
    tokens = []

    class Counted(fastft.PackingCollator):
        def collate(self, features):
            batch = super().collate(features)
            tokens.append(batch["input_ids"].numel())
            return batch

    trainer = image_trainer(
        tmp_path,
        LLAVA,
        lambda model: Counted(task="image_text_to_text", model=model),
        dataset=lambda examples: fastft.pack(examples, 90),
        callbacks=[fastft.FusedLossCallback()],
        per_device_train_batch_size=1,
        max_steps=-1,
        num_train_epochs=1,
    )
    trainer.train()
    sizes = [len(one["input_ids"][0]) for one in trainer.train_dataset.dataset]
    assert sum(tokens) == sum(sizes) and max(tokens) <= 90 and len(tokens) < len(sizes)


def test_padding_on_the_left_is_packed_too(tmp_path):
    """As processors pad: labels leave the first tokens out, so that padding predicts none."""
    stock = losses(image_trainer(tmp_path, QWEN, lambda model: Padded("left")))
    trainer = image_trainer(tmp_path, QWEN, lambda model: Padded("left"))
    fastft.plug(trainer, packing="collate")
    assert losses(trainer) == pytest.approx(stock, rel=2e-5)


def test_a_collator_without_the_model_is_refused_where_positions_have_several_axes(tmp_path):
    def collator(model):
        return fastft.PackingCollator(task="image_text_to_text")

    trainer = image_trainer(tmp_path, QWEN, collator, callbacks=[fastft.PackingCallback()])
    with pytest.raises(fastft.PackingLeakError, match=r"several axes \(mRoPE\).*model=model"):
        trainer.train()


def test_blocks_of_images_are_refused_without_our_attention(tmp_path):
    callback = fastft.PackingCallback(attention=False)
    trainer = image_trainer(tmp_path, GEMMA, packing, callbacks=[callback])
    with pytest.raises(fastft.PackingLeakError, match=r"with images.*attn_implementation='fastft'"):
        trainer.train()


def test_images_of_an_iterable_dataset_are_refused_before_training(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __init__(self, examples):
            self.examples = examples

        def __iter__(self):
            return iter(self.examples)

    trainer = image_trainer(
        tmp_path,
        LLAVA,
        packing,
        dataset=Stream,
        callbacks=[fastft.PackingCallback()],
        accelerator_config={"dispatch_batches": False},
    )
    with pytest.raises(fastft.PackingLeakError, match=r"nobody knows whether images.*examples="):
        trainer.train()


def test_images_behind_many_texts_are_found_by_the_probe(tmp_path):
    """As in datasets that were joined end to end."""
    text = {key: torch.arange(6, 17)[None] for key in ("input_ids", "labels")}
    text["attention_mask"] = torch.ones_like(text["input_ids"])
    text["token_type_ids"] = torch.zeros_like(text["input_ids"])
    callback = fastft.PackingCallback(attention=False)
    trainer = image_trainer(
        tmp_path, GEMMA, packing, dataset=lambda images: [text] * 40 + images, callbacks=[callback]
    )
    with pytest.raises(fastft.PackingLeakError, match=r"with images"):
        trainer.train()


def test_the_probe_asks_with_examples_of_each_kind():
    model = torch.nn.Module()
    model.forward = lambda input_ids, pixel_values=None, pixel_values_videos=None: None
    model.config = transformers.PretrainedConfig(vocab_size=64)
    image, video = {"pixel_values": torch.zeros(1, 3)}, {"pixel_values_videos": torch.zeros(2, 3)}
    given = [{"input_ids": torch.arange(4 + n), **image} for n in range(5)]
    given += [{"input_ids": torch.arange(40), **more} for more in (video, image | video, {})]
    chosen = [one.keys() - {"input_ids"} for one in image_examples(model, given).examples]
    assert sorted(map(sorted, chosen)) == sorted(map(sorted, [image, video, image | video, {}]))


def test_examples_whose_images_touch_are_asked_side_by_side():
    """Longer ones than others: before transformers 5.23 a mask joined the two images."""
    model = torch.nn.Module()
    model.forward = lambda input_ids, pixel_values=None: None
    model.config = transformers.PretrainedConfig(vocab_size=64, image_token_id=60)
    image = {"pixel_values": torch.zeros(1, 3)}
    word, picture = torch.arange(3, 9), torch.tensor([60, 60])
    begins = {"input_ids": torch.cat([picture, word]), **image}
    ends = {"input_ids": torch.cat([word, word, picture]), **image}
    between = {"input_ids": torch.cat([word[:1], picture, word[:1]]), **image}
    given = [between, between, begins, ends, {"input_ids": word}]
    first, second, *others = image_examples(model, given).examples
    assert torch.equal(first["input_ids"], ends["input_ids"])
    assert torch.equal(second["input_ids"], begins["input_ids"])
    assert len(others) == 2  # an image between words, a text


def all_learned(examples):
    return [example | {"labels": example["input_ids"]} for example in examples]


def without_labels(examples):
    return [{key: each[key] for key in each if key != "labels"} for each in examples]


@pytest.mark.parametrize("dataset", [all_learned, without_labels])
@pytest.mark.parametrize("callback", [fastft.PackingCallback, fastft.FusedLossCallback])
def test_smoothed_labels_of_first_tokens_are_refused_with_a_collator_of_ours(
    tmp_path, dataset, callback
):
    given = {"dataset": dataset, "label_smoothing_factor": 0.1, "remove_unused_columns": False}
    trainer = image_trainer(tmp_path, LLAVA, packing, callbacks=[callback()], **given)
    with pytest.raises(fastft.PackingLeakError, match="with label_smoothing_factor Trainer does"):
        trainer.train()


def test_smoothed_labels_behind_the_first_token_are_those_of_stock(tmp_path):
    stock = losses(image_trainer(tmp_path, LLAVA, label_smoothing_factor=0.1))
    given = {"callbacks": [fastft.PackingCallback()], "label_smoothing_factor": 0.1}
    packed = losses(image_trainer(tmp_path, LLAVA, packing, **given))
    assert packed == pytest.approx(stock, rel=2e-5)


def test_label_smoothing_that_learns_first_tokens_is_left_alone(tmp_path):
    """Trainer shifts no labels for it but those of causal models."""
    trainer = image_trainer(tmp_path, LLAVA, dataset=all_learned, label_smoothing_factor=0.1)
    plug = fastft.plug(trainer, packing="collate")
    assert plug.lines["packing"].startswith("left alone: with label_smoothing_factor"), plug.lines
