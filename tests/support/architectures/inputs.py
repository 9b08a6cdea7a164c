"""What some classes need beside tokens and labels: class name -> inputs, made of its config and the
tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.architectures.shrink import IMAGE_TOKEN

Inputs = dict[str, Any]


def _image(config: Any, ids: Tensor) -> Inputs:
    vision = config.vision_config if hasattr(config, "vision_config") else config.encoder
    return {"pixel_values": torch.rand(ids.shape[0], 3, vision.image_size, vision.image_size)}


def _image_and_tokens(config: Any, ids: Tensor) -> Inputs:
    """The first tokens stand for what the query transformer makes of the image."""
    ids[:, : config.num_query_tokens] = IMAGE_TOKEN
    return _image(config, ids)


def _image_and_questions(config: Any, ids: Tensor) -> Inputs:
    return {**_image_and_tokens(config, ids), "qformer_input_ids": torch.ones_like(ids[:, :4])}


def _frames_and_questions(config: Any, ids: Tensor) -> Inputs:
    inputs = _image_and_questions(config, ids)
    ids[:, : 4 * config.num_query_tokens] = IMAGE_TOKEN
    return {**inputs, "pixel_values": inputs["pixel_values"].unsqueeze(1).repeat(1, 4, 1, 1, 1)}


def _image_for_tokens(config: Any, ids: Tensor) -> Inputs:
    """The first tokens stand for the image."""
    where = torch.zeros_like(ids)
    where[:, 1 : 1 + config.latent_query_num] = 1
    return {**_image(config, ids), "image_embeds_position_mask": where}


def _one_image_each(config: Any, ids: Tensor) -> Inputs:
    size = config.vision_config.image_size
    return {
        "pixel_values": torch.rand(ids.shape[0], 1, 3, size, size),
        "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long),
    }


def _patches(config: Any, ids: Tensor) -> Inputs:
    width = 2 + config.vision_config.patch_embed_hidden_size  # row and column come first
    patches = torch.rand(*ids.shape, width)
    patches[..., :2] = (
        torch.stack((torch.arange(ids.shape[1]) % 4, torch.arange(ids.shape[1]) // 4), -1) + 1
    )
    return {"flattened_patches": patches}


def _boxes(config: Any, ids: Tensor) -> Inputs:
    corners = torch.rand(*ids.shape, 2) / 2
    return {"bbox": torch.cat((corners, corners + 0.25), -1)}


def _full_length_labels(config: Any, ids: Tensor) -> Inputs:
    """Its decoder reads the encoder's tokens where it is given none of its own."""
    return {"labels": ids.masked_fill(torch.arange(ids.shape[1]) < 3, -100)}


def _codebooks(config: Any, ids: Tensor) -> Inputs:
    books = config.num_codebooks
    labels = torch.randint(5, config.vocab_size - 6, (*ids.shape, books))
    return {
        "input_ids": ids.repeat_interleave(books, 0),
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
    }


def _text_alone(config: Any, ids: Tensor) -> Inputs:
    return {"mm_token_type_ids": torch.zeros_like(ids)}


def _sound(config: Any, ids: Tensor) -> Inputs:
    frames = config.audio_length_per_tok * ids.shape[1]
    return {"input_features": torch.rand(ids.shape[0], config.audio_config.num_mel_bins, frames)}


EXTRA_INPUTS: dict[str, Callable[[Any, Tensor], Inputs]] = {
    "Blip2ForConditionalGeneration": _image_and_tokens,
    "BlipForConditionalGeneration": _image,
    "FSMTForConditionalGeneration": _full_length_labels,
    "GitForCausalLM": _image,
    "IdeficsForVisionText2Text": _one_image_each,
    "InstructBlipForConditionalGeneration": _image_and_questions,
    "InstructBlipVideoForConditionalGeneration": _frames_and_questions,
    "Kosmos2ForConditionalGeneration": _image_for_tokens,
    "Molmo2ForConditionalGeneration": _text_alone,
    "MusicgenForCausalLM": _codebooks,
    "MusicgenMelodyForCausalLM": _codebooks,
    "PPFormulaNetForConditionalGeneration": _image,
    "Pix2StructForConditionalGeneration": _patches,
    "UdopForConditionalGeneration": _boxes,
    "VisionEncoderDecoderModel": _image,
    "VoxtralRealtimeForConditionalGeneration": _sound,
}
