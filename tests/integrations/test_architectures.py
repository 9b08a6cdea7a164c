"""The fused loss on the language models of transformers: thirty in CI, every one of them by `make
sweep`."""

from __future__ import annotations

import contextlib
from dataclasses import asdict

import pytest
import torch
from support.architectures.models import Case, all_cases, batch, build
from support.architectures.outcome import (
    FUSED,
    INERT,
    MATERIALISED,
    NOT_RUN,
    WRONG,
    compare,
    examine,
    run,
)

import fastft

# Chosen for what happens between the head and the loss, and for how the head is made.
REPRESENTATIVE = (
    ("causal", "llama", "LlamaForCausalLM"),
    ("causal", "qwen3", "Qwen3ForCausalLM"),
    ("causal", "gemma2", "Gemma2ForCausalLM"),  # softcap
    ("causal", "gemma3_text", "Gemma3ForCausalLM"),
    ("causal", "cohere", "CohereForCausalLM"),  # logit scale
    ("causal", "granite", "GraniteForCausalLM"),  # logits divided
    ("causal", "falcon_h1", "FalconH1ForCausalLM"),  # head multiplier
    ("causal", "gpt2", "GPT2LMHeadModel"),  # tied, no loss type
    ("causal", "gpt_oss", "GptOssForCausalLM"),
    ("causal", "mixtral", "MixtralForCausalLM"),  # auxiliary loss
    ("causal", "deepseek_v3", "DeepseekV3ForCausalLM"),
    ("causal", "phi", "PhiForCausalLM"),  # head with a bias
    ("causal", "falcon", "FalconForCausalLM"),
    ("causal", "opt", "OPTForCausalLM"),
    ("causal", "bloom", "BloomForCausalLM"),
    ("causal", "mamba", "MambaForCausalLM"),
    ("causal", "xlstm", "xLSTMForCausalLM"),
    ("causal", "recurrent_gemma", "RecurrentGemmaForCausalLM"),
    ("causal", "whisper", "WhisperForCausalLM"),
    ("masked", "bert", "BertForMaskedLM"),
    ("masked", "roberta", "RobertaForMaskedLM"),
    ("masked", "modernbert", "ModernBertForMaskedLM"),
    ("masked", "esm", "EsmForMaskedLM"),  # trained bias after the head
    ("masked", "electra", "ElectraForMaskedLM"),
    ("masked", "xlm", "XLMWithLMHeadModel"),
    ("seq2seq", "t5", "T5ForConditionalGeneration"),
    ("seq2seq", "bart", "BartForConditionalGeneration"),  # final_logits_bias
    ("seq2seq", "marian", "MarianMTModel"),
    ("image-text", "idefics3", "Idefics3ForConditionalGeneration"),
    ("image-text", "paligemma", "PaliGemmaForConditionalGeneration"),  # boolean masks
    ("image-text", "blip", "BlipForConditionalGeneration"),  # smoothed loss
)

# What is not fused, and is known not to be.
OTHERWISE = {
    "ChameleonForConditionalGeneration": MATERIALISED,  # writes into columns of the logits
    "FSMTForConditionalGeneration": INERT,  # multiplies by its embeddings itself
    "IdeficsForVisionText2Text": INERT,  # a head of two weights
    "MobileBertForMaskedLM": INERT,  # multiplies by two weights, concatenated
    "MusicgenForCausalLM": INERT,  # a head for each codebook
    "MusicgenMelodyForCausalLM": INERT,
    "PerceiverForMaskedLM": INERT,  # multiplies by its embeddings itself
}


@pytest.mark.parametrize("case", [Case(*names) for names in REPRESENTATIVE], ids=str)
def test_representative_architectures(case):
    outcome = examine(case)
    assert outcome.kind == FUSED, outcome


@pytest.mark.sweep
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_every_architecture(case, record_property):
    outcome = examine(case)
    record_property("architecture", {"case": str(case), "outcome": asdict(outcome)})
    if outcome.kind == NOT_RUN:
        pytest.skip(outcome.why)
    assert outcome.kind == OTHERWISE.get(case.class_name, FUSED), outcome


def spoiled(change):
    """`fastft.fused_loss` under which the model's loss is changed."""
    fused_loss = fastft.fused_loss

    @contextlib.contextmanager
    def context(model):
        def hook(module, args, output):
            output["loss"] = change(output["loss"])

        handle = model.register_forward_hook(hook)
        with fused_loss(model) as report:
            yield report
        handle.remove()

    return context


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda loss: loss * (1 + 1e-5), "fp32: "),
        (lambda loss: loss.detach() + (1 - 1e-5) * (loss - loss.detach()), "fp32: "),
        (lambda loss: loss * 1.05 if torch.is_autocast_enabled("cpu") else loss, "bf16: "),
        (lambda loss: loss, ""),
    ],
    ids=["loss", "gradients", "bf16", "nothing"],
)
def test_the_sweep_finds_a_slightly_wrong_loss(change, found, monkeypatch):
    monkeypatch.setattr(fastft, "fused_loss", spoiled(change))
    outcome = examine(Case("causal", "llama", "LlamaForCausalLM"))
    assert outcome.kind == (WRONG if found else FUSED) and outcome.why.startswith(found), outcome


def image_of_patches(config, ids, tokens):
    """Square images, and `tokens` image tokens in each row for them."""
    ids[:, 4 : 4 + tokens] = config.image_token_id
    size = config.vision_config.image_size
    return {"pixel_values": torch.rand(len(ids), 3, size, size)}


def llava(config, ids):
    return image_of_patches(config, ids, 16)


def gemma3(config, ids):
    types = torch.zeros_like(ids)
    types[:, 4 : 4 + config.mm_tokens_per_image] = 1
    return {**image_of_patches(config, ids, config.mm_tokens_per_image), "token_type_ids": types}


def qwen2_5_vl(config, ids):
    """Images of 4 x 4 patches, merged by 2 x 2."""
    vision = config.vision_config
    ids[:, 4], ids[:, 5:9] = config.vision_start_token_id, config.image_token_id
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    types = torch.zeros_like(ids)
    types[:, 5:9] = 1
    grid = torch.tensor([[1, 4, 4]] * len(ids))
    return {
        "pixel_values": torch.rand(16 * len(ids), width),
        "image_grid_thw": grid,
        "mm_token_type_ids": types,
    }


IMAGES = {
    ("llava", "LlavaForConditionalGeneration"): llava,
    ("gemma3", "Gemma3ForConditionalGeneration"): gemma3,
    ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"): qwen2_5_vl,
}


@pytest.mark.parametrize("names", IMAGES, ids=lambda names: names[0])
def test_vision_models_with_images(names):
    case = Case("image-text", *names)
    model = build(case)
    inputs = batch(case, model)
    inputs |= IMAGES[names](model.config, inputs["input_ids"])
    stock = run(model, inputs)
    seen = [name for name, gradient in stock.gradients.items() if "vis" in name and gradient.any()]
    assert len(seen) > 10, "the images do not reach the loss"
    outcome = compare(model, inputs, stock)
    assert outcome.kind == FUSED, outcome
