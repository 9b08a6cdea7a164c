"""What some classes need beside tokens and labels: class name -> inputs, made of its config and the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


def _image(config: Any, ids: Tensor) -> Inputs:
    size = config.vision_config.image_size
    return {"pixel_values": torch.rand(ids.shape[0], 3, size, size)}


def _image_and_questions(config: Any, ids: Tensor) -> Inputs:
    return {**_image(config, ids), "qformer_input_ids": ids[:, :4]}


def _frames_and_questions(config: Any, ids: Tensor) -> Inputs:
    image = _image(config, ids)["pixel_values"]
    return {"pixel_values": image.unsqueeze(1).repeat(1, 4, 1, 1, 1), "qformer_input_ids": ids[:, :4]}


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
    vision = config.vision_config
    width = (
        2 + vision.num_channels * vision.patch_size**2
        if hasattr(vision, "num_channels")
        else vision.patch_embed_hidden_size
    )
    patches = torch.rand(*ids.shape, width)
    patches[..., :2] = torch.stack((torch.arange(ids.shape[1]) % 4, torch.arange(ids.shape[1]) // 4), -1) + 1
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
    return {"input_ids": ids.repeat_interleave(books, 0), "attention_mask": torch.ones_like(ids), "labels": labels}


EXTRA_INPUTS: dict[str, Callable[[Any, Tensor], Inputs]] = {
    "Blip2ForConditionalGeneration": _image,
    "BlipForConditionalGeneration": _image,
    "FSMTForConditionalGeneration": _full_length_labels,
    "GitForCausalLM": _image,
    "IdeficsForVisionText2Text": _one_image_each,
    "InstructBlipForConditionalGeneration": _image_and_questions,
    "InstructBlipVideoForConditionalGeneration": _frames_and_questions,
    "Kosmos2ForConditionalGeneration": _image_for_tokens,
    "MusicgenForCausalLM": _codebooks,
    "MusicgenMelodyForCausalLM": _codebooks,
    "Pix2StructForConditionalGeneration": _patches,
    "UdopForConditionalGeneration": _boxes,
}
