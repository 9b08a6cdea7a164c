"""The collator's task for images and text: what a processor gives, laid out, cut or refused."""

from __future__ import annotations

import datasets
import numpy
import pytest
import torch

import fastft
from fastft.data.processed import token_count, unbatched


def example(tokens, images=1, side=4, batched=True, **more):
    """As a processor gives it: (1, n) of tokens, the first of which stand for an image."""
    ids = torch.arange(10, 10 + tokens)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    made["labels"][:2] = -100
    if batched:
        made = {key: value[None] for key, value in made.items()}
    if images:
        made["pixel_values"] = torch.full((images, 3, side, side), float(tokens))
    return made | more


def packed(examples, **options):
    return fastft.PackingCollator(task="image_text_to_text", **options)(examples)


def test_images_follow_one_another_as_their_examples_do():
    batch = packed([example(5), example(7, images=2), example(4, images=0)])
    assert batch["input_ids"].shape == (1, 16) and "attention_mask" not in batch
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 12, 16]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5, 7, 7]
    assert batch["labels"][0, :5].tolist() == [-100, -100, 12, 13, 14]


def test_rows_carry_their_images_with_them():
    """The longest example comes into a row of its own: images are in the order of the rows."""
    sizes = (3, 4, 9)
    batch = packed([example(size) for size in sizes], rows=2)
    tokens = [ids[:1].item() for ids in batch["input_ids"]]
    firsts = [int(size) for size in batch["pixel_values"][:, 0, 0, 0]]
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    assert [n for n in lengths if n in sizes] == firsts and tokens == [10, 10]


@pytest.mark.parametrize("form", ["tensors", "lists", "arrays", "without the dimension of 1"])
def test_every_form_of_an_example_gives_the_same_batch(form):
    given = [example(5), example(7)]
    expected = packed(given)
    if form == "lists":
        given = [{key: value.tolist() for key, value in one.items()} for one in given]
    elif form == "arrays":
        given = [{key: value.numpy() for key, value in one.items()} for one in given]
    elif form != "tensors":
        given = [example(5, batched=False), example(7, batched=False)]
    batch = packed(given)
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(value, batch[key]) if torch.is_tensor(value) else value == batch[key]
        assert same, key


def test_tokens_that_are_masked_are_left_out():
    one = example(6)
    one["attention_mask"][0, :2] = 0
    batch = packed([one, example(5)])
    assert batch["input_ids"][0].tolist() == [12, 13, 14, 15, 10, 11, 12, 13, 14]


def test_sizes_that_differ_are_filled_as_a_processor_fills_a_batch():
    small, large = (
        example(4 + side, side=side, image_sizes=torch.tensor([[side, side]])) for side in (2, 4)
    )
    batch = packed([small, large])
    assert batch["pixel_values"].shape == (2, 3, 4, 4)
    assert batch["pixel_values"][0, 0].count_nonzero() == 4
    assert batch["image_sizes"].tolist() == [[2, 2], [4, 4]]


def test_a_batch_that_is_expanded_on_its_device_is_the_same():
    examples = [example(5, image_grid_thw=torch.tensor([[1, 2, 2]])), example(7, images=0)]
    plain = packed(examples)
    flat = packed(examples, expand_on_device=True).to("cpu")
    assert plain.keys() == flat.keys()
    assert all(torch.equal(plain[key], flat[key]) for key in plain if torch.is_tensor(plain[key]))


def test_examples_of_an_evaluation_are_padded_with_their_images():
    batch = packed([example(5), example(7)], pad_examples=True)
    assert batch["attention_mask"].sum(1).tolist() == [5, 7] and "position_ids" not in batch
    assert batch["pixel_values"].shape[0] == 2 and batch["labels"][0, 5:].tolist() == [-100, -100]


@pytest.mark.parametrize("stored", [False, True], ids=["list", "datasets.Dataset"])
def test_packs_count_tokens_and_keep_images(stored):
    examples = [example(size) for size in (9, 5, 6, 3, 7)]
    if stored:
        rows = [{key: value.tolist() for key, value in one.items()} for one in examples]
        examples = datasets.Dataset.from_list(rows)
    packs = fastft.pack(examples, 12)
    sizes = sorted(length for pack in packs for length in map(len, pack["input_ids"].values))
    assert sizes == [3, 5, 6, 7, 9] and len(packs) == 3
    batch = packed([packs[0]])
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == lengths == [9, 3]


def test_packs_of_a_stream_count_tokens_too():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([example(9), example(3, images=0), example(6)])

    packs = [[len(one["input_ids"]) for one in p.examples] for p in fastft.pack(Stream(), 12)]
    assert packs == [[9, 3], [6]]


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_no_example_is_cut_through_its_images(overlong):
    said = r"has pixel_values and cannot be cut.*overlong='drop'"
    with pytest.raises(ValueError, match=said):
        fastft.pack([example(4), example(9)], 6, overlong=overlong)
    packs = fastft.pack([example(9, images=0), example(8)], 6, overlong=overlong)
    with pytest.raises(ValueError, match=said):
        [packs[index] for index in range(len(packs))]
    texts = fastft.pack([example(9, images=0)], 6, overlong=overlong)
    assert len(texts[0]["input_ids"]) == 6


def test_examples_that_are_too_long_can_be_dropped():
    assert len(fastft.pack([example(9), example(4)], 6, overlong="drop")) == 1


def test_an_empty_pack_is_filled_without_an_image():
    packs = fastft.pack([example(9), example(8), example(7)], 9, balance=4)
    batch = packed([packs[index] for index in range(4)])
    assert len(batch["pixel_values"]) == 3 and batch["input_ids"].numel() == 25


REFUSED = {
    "labels": ([{"input_ids": [1, 2]}], r"needs labels: input_ids with -100 at image tokens"),
    "sizes": ([example(5), example(6, side=2)], r"shape \(1, 3, 2, 2\).*which pixels are real"),
    "numbers": (
        [example(5) | {"pixel_values": [[1.0], [1.0, 2.0]]}],
        r"pixel_values of example 0 must be num",
    ),
    "a key of tokens": ([example(5, kinds=torch.zeros(1, 3))], r"kinds of example 0 has length 3"),
    "keys": ([example(5), example(6, kinds=torch.zeros(1, 6))], r"example 1 has the keys"),
    "documents": (
        [example(4, position_ids=torch.tensor([[0, 1, 0, 1]]))],
        r"example 0 is 2 documents.*whose images are whose",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_lose_images_is_refused(case):
    examples, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        packed(examples)


def test_a_row_that_another_tool_packed_does_not_multiply_its_images():
    row = example(4, batched=False, position_ids=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match=r"nothing says whose pixel_values are whose"):
        fastft.pack([row], 9)[0]


def test_the_model_is_for_this_task_and_is_one():
    with pytest.raises(ValueError, match=r"model is for task 'image_text_to_text'"):
        fastft.PackingCollator(model=torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        fastft.PackingCollator(task="image_text_to_text", model="llava")
    assert fastft.PackingCollator(task="image_text_to_text", model=torch.nn.Linear(1, 1))


def test_the_dimension_of_one_is_of_tokens_alone():
    one = {"input_ids": [[1, 2, 3]], "pixel_values": numpy.zeros((1, 3)), "text": "a"}
    assert unbatched(one)["input_ids"] == [1, 2, 3]
    assert unbatched(one)["pixel_values"].shape == (1, 3) and unbatched(one)["text"] == "a"
    assert [token_count(ids) for ids in ([[1, 2]], [1, 2], torch.ones(1, 4), [5])] == [2, 2, 4, 1]


def test_a_list_of_arrays_is_an_image_each():
    """As processors give it without `return_tensors`."""
    expected = packed([example(5, images=2)])["pixel_values"]
    for one in (torch.Tensor.numpy, torch.Tensor.clone):
        given = example(5, images=2)
        given["pixel_values"] = [one(image) for image in given["pixel_values"]]
        assert torch.equal(packed([given])["pixel_values"], expected)


def test_an_empty_list_is_no_image():
    """As `datasets` stores what a processor gives of no image."""
    batch = packed([example(5, images=0, pixel_values=[]), example(7)])
    assert len(batch["pixel_values"]) == 1
    assert len(fastft.pack([example(9, images=0, pixel_values=[])], 6, overlong="truncate")) == 1


def test_what_a_dataset_says_of_images_beside_them_is_left_out():
    said = {"image_url": "a.png", "image_id": 3, "images": [object()], "video_paths": ["a", "b"]}
    assert packed([example(5) | said]).keys() == packed([example(5)]).keys()


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_texts_with_words_about_images_are_cut_as_ever(overlong):
    rows = [{"input_ids": [*range(9)], "image_url": "a.png", "video_id": 7, "image_ids": []}]
    assert len(fastft.pack(rows, 6, overlong=overlong)[0]["input_ids"]) == 6
    row = {"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1], "image_url": "a.png"}
    assert fastft.PackingCollator()([row])["cu_seq_lens_q"].tolist() == [0, 2, 4]


def test_images_of_as_many_patches_as_tokens_are_not_cut_with_a_packed_row():
    row = example(4, images=0, batched=False, position_ids=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match=r"nothing says whose pixel_values are whose"):
        fastft.pack([row | {"pixel_values": torch.zeros(4, 12)}], 9)[0]


def test_sizes_without_a_row_for_each_image_are_refused():
    with pytest.raises(ValueError, match=r"image_grid_thw of example 1 must have a row for each"):
        packed([example(5), example(6, image_grid_thw=torch.tensor([1, 2, 2]))])
