"""Image-text models with small towers, and examples for them as a processor gives them.

How many tokens an image becomes is asked of the model (`get_image_features`), so that nothing here
repeats what a processor knows. An example has images of its own size, and text around them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.architectures.models import Case, build

Example = dict[str, Any]
# tokens before and behind the images: one example ends with an image, the next begins with one
TEXT, LEAST, MOST = ((5, 0), (0, 12), (8, 4)), 5, 60
SIZES = ((2, 3), (4, 2), (2, 2))  # of images, in what a tower makes of them


def _first(config: Any, *names: str) -> int:
    value = next(getattr(config, name) for name in names if hasattr(config, name))
    return int(value if isinstance(value, int) else value[0])


def _patches(config: Any, size: tuple[int, int]) -> Example:
    """Patches of one image after another, and their grid: Qwen-VL and its kind."""
    vision = config.vision_config
    merge = _first(vision, "spatial_merge_size", "merge_size", "hidden_size")
    merge = merge if merge <= 4 else 1
    patch = _first(vision, "patch_size")
    channels = _first(vision, "in_channels", "num_channels", "in_chans")
    grid = torch.tensor([[1, size[0] * merge, size[1] * merge]])
    width = channels * getattr(vision, "temporal_patch_size", 1) * patch * patch
    return {"pixel_values": torch.randn(int(grid.prod()), width), "image_grid_thw": grid}


def _square(config: Any, size: tuple[int, int]) -> Example:
    """One image of the tower's size: LLaVA and its kind."""
    vision = getattr(config, "vision_config", None) or config.vq_config
    side = _first(vision, "image_size", "resolution")
    return {"pixel_values": torch.randn(1, 3, side, side)}


def _tiles(config: Any, size: tuple[int, int]) -> Example:
    """The whole image and tiles of it, as many as its size asks for: LLaVA-NeXT and its kind."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = _first(config.vision_config, "image_size")
    sizes = torch.tensor([[side * size[0] // 2, side * size[1] // 2]])
    count = image_size_to_num_patches(sizes[0], config.image_grid_pinpoints, side)
    return {"pixel_values": torch.randn(1, count, 3, side, side), "image_sizes": sizes}


def _sized(config: Any, size: tuple[int, int]) -> Example:
    """One image of any size: Pixtral and its kind."""
    step = _first(config.vision_config, "patch_size") * getattr(config, "spatial_merge_size", 1)
    height, width = (step * side for side in size)
    return {
        "pixel_values": torch.randn(1, 3, height, width),
        "image_sizes": torch.tensor([[height, width]]),
    }


def _several(config: Any, size: tuple[int, int]) -> Example:
    """Several images in a dimension of their own: Idefics and its kind."""
    side, count = _first(config.vision_config, "image_size"), size[1] // 2 + 1
    return {
        "pixel_values": torch.randn(1, count, 3, side, side),
        "pixel_attention_mask": torch.ones(1, count, side, side, dtype=torch.int64),
    }


_SIZED = ("mistral3", "mistral_large4", "lighton_ocr")
_TILES = ("llava_next", "llava_next_video", "llava_onevision", "granite4_vision")


def _images(case: Case, model: nn.Module) -> Callable[[Any, tuple[int, int]], Example]:
    takes = inspect.signature(model.forward).parameters
    if "image_grid_thw" in takes:
        return _patches
    if "pixel_attention_mask" in takes:
        return _several
    if case.model_type in _TILES:
        return _tiles
    return _sized if case.model_type in _SIZED else _square


def _features(model: Any) -> Callable[..., Any]:
    """What makes the features of images, of the model or of its body."""
    name = "get_image_features"
    made: Callable[..., Any] = getattr(model if hasattr(model, name) else model.model, name)
    return made


def _count(features: Any) -> list[int]:
    """How many tokens each image becomes."""
    features = getattr(features, "pooler_output", features)
    if isinstance(features, Tensor):
        features = [features] if features.ndim == 2 else list(features)
    return [one.numel() // one.shape[-1] for one in features]


def _example(case: Case, model: Any, place: int) -> Example:
    config, takes = model.config, inspect.signature(model.forward).parameters
    images = _images(case, model)(config, SIZES[place])
    with torch.no_grad():
        counts = _count(_features(model)(**images, return_dict=True))
    token = getattr(config, "image_token_id", None)
    token = getattr(config, "image_token_index", None) if token is None else token
    before, behind = TEXT[place]
    # images are told apart by the text between them
    is_image = [kind for count in counts for kind in ([1] * count + [0] * 2)][:-2]
    kinds = torch.tensor([[0] * before + is_image + [0] * behind])
    words = torch.randint(LEAST, MOST, kinds.shape)
    words += words == token  # an image's token stands nowhere else
    tokens = torch.where(kinds == 1, token, words)
    labels = tokens.masked_fill(kinds == 1, -100)
    labels[0, : before // 2] = -100
    made = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    if "mm_token_type_ids" in takes:
        made["mm_token_type_ids"] = kinds
    if "token_type_ids" in takes:
        suffix = torch.arange(tokens.shape[1])[None] >= tokens.shape[1] - behind
        made["token_type_ids"] = suffix.long() if case.model_type == "paligemma" else kinds
    return made | images


def model_and_examples(case: Case, count: int = len(SIZES)) -> tuple[Any, list[Example]]:
    """A small model in evaluation mode, and examples with images."""
    model = build(case).eval()
    torch.manual_seed(5)
    return model, [_example(case, model, place % len(SIZES)) for place in range(count)]
