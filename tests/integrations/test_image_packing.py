"""Images and text, packed against alone: a class of each family in CI, every class of transformers
by `make sweep`."""

from __future__ import annotations

import pickle
import re
from dataclasses import asdict

import pytest
import torch
from support.architectures.image_packing import EXACT, OURS, REFUSED, STOCK, Packed, examine
from support.architectures.image_packing_table import not_asked
from support.architectures.images import model_and_examples
from support.architectures.models import Case, all_cases
from support.architectures.outcome import time_limit
from support.versions import images_looked_up

import fastft

pytestmark = pytest.mark.usefixtures("quiet")

QWEN = Case("image-text", "qwen2_vl", "Qwen2VLForConditionalGeneration")
GEMMA = Case("image-text", "gemma3", "Gemma3ForConditionalGeneration")
LLAVA = Case("image-text", "llava", "LlavaForConditionalGeneration")
LLAVA_KIND = (
    LLAVA,
    Case("image-text", "llava_next", "LlavaNextForConditionalGeneration"),
    Case("image-text", "idefics3", "Idefics3ForConditionalGeneration"),
    Case("image-text", "mistral3", "Mistral3ForConditionalGeneration"),
)
QWEN_KIND = (
    QWEN,
    Case("image-text", "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    Case("image-text", "qwen3_vl", "Qwen3VLForConditionalGeneration"),
    Case("image-text", "glm4v", "Glm4vForConditionalGeneration"),
)
GEMMA_KIND = (GEMMA, Case("image-text", "paligemma", "PaliGemmaForConditionalGeneration"))
RECURRENT = Case("image-text", "qwen3_5", "Qwen3_5ForConditionalGeneration")
QUICK = (*LLAVA_KIND, *QWEN_KIND, *GEMMA_KIND, RECURRENT)
SWEPT = [case for case in all_cases() if case.mapping == "image-text" and case not in QUICK]


def of_way(cases, way, word="exact"):
    return [
        pytest.param(case, id=str(case), marks=pytest.mark.way(way, packing=word)) for case in cases
    ]


@pytest.mark.parametrize(
    "case",
    [
        *of_way(LLAVA_KIND, "LLaVA and its kind"),
        *of_way(QWEN_KIND, "Qwen2-VL and its kind"),
        *of_way(GEMMA_KIND, "Gemma3, PaliGemma"),
    ],
)
def test_losses_and_gradients_are_those_of_examples_alone(case, record_property):
    outcome = examine(case)
    record_property("image packing", {"case": str(case), "outcome": asdict(outcome)})
    assert outcome.best == OURS, outcome


@pytest.mark.way("Qwen3.5", packing="refused")
def test_recurrent_layers_without_their_kernels_are_refused(record_property):
    outcome = examine(RECURRENT)
    record_property("image packing", {"case": str(RECURRENT), "outcome": asdict(outcome)})
    # an older transformers has a layer without that kernel, which leaks
    why = re.search("causal_conv1d|tokens mix without attention", outcome.why)
    assert outcome.best == REFUSED and why, outcome


@pytest.mark.sweep
@pytest.mark.parametrize("case", SWEPT, ids=str)
def test_no_class_for_images_is_wrong_silently(case, record_property):
    with time_limit():
        try:
            model_and_examples(case)[0](**model_and_examples(case)[1][0])
        except Exception as error:
            outcome = not_asked(f"{type(error).__name__}: {' '.join(str(error).split())[:80]}")
        else:
            outcome = examine(case)  # raises where one is wrong in silence
    record_property("image packing", {"case": str(case), "outcome": asdict(outcome)})


def test_blocks_of_images_leak_or_are_off_without_our_attention():
    """transformers' mask looks the blocks of later sequences up in the first one."""
    packed = Packed(GEMMA)
    assert packed.outcome()[0] not in (EXACT, "raises")
    with pytest.raises(fastft.PackingLeakError, match=r"with images.*implementation='fastft'"):
        fastft.check_packing(packed.model, examples=packed.examples)
    fastft.check_packing(packed.model)  # of text alone nothing is wrong


@images_looked_up
def test_examples_that_are_alike_hide_nothing_from_the_probe():
    """A mask that looks everything up in the first example is right for others like it."""
    model, examples = model_and_examples(GEMMA)
    with pytest.raises(fastft.PackingLeakError, match=r"with images"):
        fastft.check_packing(model, examples=[examples[0]] * 3)


@pytest.mark.parametrize("case", [QWEN, GEMMA, LLAVA], ids=str)
def test_attention_chosen_for_the_whole_model_leaves_its_tower_alone(case):
    packed = Packed(case)
    packed.model.set_attn_implementation("fastft")
    with fastft.packed_attention(packed.model):
        assert packed.outcome()[0] == EXACT
        fastft.check_packing(packed.model, examples=packed.examples)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_a_tower_that_is_computed_again_in_backward_has_no_boundaries_either():
    packed = Packed(QWEN)
    packed.model.set_attn_implementation("fastft")
    packed.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with fastft.packed_attention(packed.model):
        assert packed.outcome()[0] == EXACT


@pytest.mark.parametrize("case", [QWEN, LLAVA], ids=str)
@pytest.mark.parametrize("options", [{"rows": 2}, {"pad_to_multiple_of": 32}, {"expand": True}])
def test_rows_padding_and_expansion_keep_images_with_their_tokens(case, options):
    packed = Packed(case)
    flat = options.pop("expand", False)
    packed.collator = fastft.PackingCollator(
        task="image_text_to_text", model=packed.model, expand_on_device=flat, **options
    )
    batch = packed.collator(packed.examples)
    batch = batch.to("cpu") if flat else batch
    packed.model.set_attn_implementation("fastft")
    with fastft.packed_attention(packed.model), torch.no_grad():
        output = packed.model(**batch)
    assert abs(float(output.loss) - packed.alone.loss) <= 1e-6 * packed.alone.loss


@pytest.mark.parametrize("case", [QWEN, LLAVA], ids=str)
def test_examples_without_an_image_share_a_row_with_others(case):
    model, examples = model_and_examples(case)
    text = {"input_ids": torch.arange(6, 17)[None], "labels": torch.arange(6, 17)[None]}
    text["attention_mask"] = torch.ones_like(text["input_ids"])
    if "mm_token_type_ids" in examples[0]:
        text["mm_token_type_ids"] = torch.zeros_like(text["input_ids"])
    every = [examples[0], text, examples[1]]
    model.set_attn_implementation("fastft")
    collator = fastft.PackingCollator(task="image_text_to_text", model=model)
    with torch.no_grad():
        alone = torch.cat([model(**one).logits[0] for one in every])
        with fastft.packed_attention(model):
            packed = model(**collator(every)).logits[0]
            texts = model(**collator([text, text])).logits[0]
            assert "pixel_values" not in collator([text, text])
    assert torch.allclose(packed, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
    assert torch.allclose(texts[:11], texts[11:], rtol=0, atol=1e-5)


def test_positions_are_the_models_own_and_travel_without_its_weights():
    model, examples = model_and_examples(QWEN)
    collator = fastft.PackingCollator(task="image_text_to_text", model=model)
    assert len(pickle.dumps(collator)) < 20_000
    batch = pickle.loads(pickle.dumps(collator))(examples)
    begin = 0
    for example in examples:
        own, _ = model.model.get_rope_index(
            example["input_ids"],
            mm_token_type_ids=example["mm_token_type_ids"],
            image_grid_thw=example["image_grid_thw"],
        )
        end = begin + example["input_ids"].shape[1]
        assert torch.equal(batch["position_ids"][1:, :, begin:end], own)
        assert batch["position_ids"][0, 0, begin:end].tolist() == list(range(end - begin))
        begin = end


def test_the_probe_leaves_no_positions_behind():
    packed = Packed(QWEN)
    assert packed.model.model.rope_deltas is None
    fastft.check_packing(packed.model, examples=packed.examples)
    assert packed.model.model.rope_deltas is None


def test_a_tower_that_mixes_the_images_of_its_batch_is_found():
    """As one whose attention has no boundaries between images."""
    packed = Packed(LLAVA)
    packed.model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: output + output.mean(0, keepdim=True)
    )
    with pytest.raises(fastft.PackingLeakError, match=r"with images, other tokens in the first"):
        fastft.check_packing(packed.model, examples=packed.examples)


def test_check_packing_asks_for_examples_with_images():
    model, examples = model_and_examples(LLAVA)
    text = {"input_ids": examples[0]["input_ids"]}
    with pytest.raises(ValueError, match=r"examples must have images"):
        fastft.check_packing(model, examples=[text])
    with pytest.raises(ValueError, match=r"example 0 has no input_ids"):
        fastft.check_packing(model, examples=[{"pixel_values": examples[0]["pixel_values"]}])
    assert examine(LLAVA).best in (OURS, STOCK)
