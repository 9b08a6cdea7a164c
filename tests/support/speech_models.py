"""Tiny models that turn speech into text, of every class that transformers has with a decoder of
its own beside the encoder, and examples for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

V, START, PAD, EOS = 61, 3, 1, 2
IDS = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": EOS, "decoder_start_token_id": START}
FRAMES = 24  # of a Whisper's window
ANSWERS = (5, 1, 9, 4, 3, 6)


def _whisper() -> Any:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": FRAMES // 2}
    rest = {"max_target_positions": 40, "init_std": 0.3, "suppress_tokens": None}
    return transformers.WhisperConfig(
        vocab_size=V, **layers, **heads, **sizes, **rest, begin_suppress_tokens=None, **IDS
    )


def _moonshine() -> Any:
    layers = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2}
    heads = {"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2}
    return transformers.MoonshineConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, **layers, **heads, **IDS
    )


def _moonshine_streaming() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    encoder = {**sizes, **heads, "num_key_value_heads": 2, "sliding_windows": ((4, 2), (4, 0))}
    return transformers.MoonshineStreamingConfig(
        vocab_size=V, **sizes, **heads, num_key_value_heads=2, encoder_config=encoder, **IDS
    )


def _parakeet_encoder() -> dict[str, Any]:
    return {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_mel_bins": 16, "subsampling_conv_channels": 4},
        **{"conv_kernel_size": 3, "dropout_positions": 0.0},
    }


def _cohere() -> Any:
    return transformers.CohereAsrConfig(
        vocab_size=V,
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "encoder_config": _parakeet_encoder(), **IDS},
    )


def _canary() -> Any:
    decoder = {
        **{"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
        **{"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": EOS},
    }
    return transformers.CanaryConfig(
        vocab_size=V, encoder_config=_parakeet_encoder(), decoder_config=decoder, **IDS
    )


def _speech_to_text() -> Any:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 16, "conv_channels": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "input_feat_per_channel": 8}
    return transformers.Speech2TextConfig(
        vocab_size=V, **layers, **heads, **sizes, num_conv_layers=1, conv_kernel_sizes=[3], **IDS
    )


# the class, its configuration, the shape of one sound of n steps
MODELS: dict[str, tuple[str, Callable[[], Any], str, Callable[[int], tuple[int, ...]]]] = {
    "whisper": (
        "WhisperForConditionalGeneration",
        _whisper,
        "input_features",
        lambda n: (8, FRAMES),
    ),
    "moonshine": (
        "MoonshineForConditionalGeneration",
        _moonshine,
        "input_values",
        lambda n: (1000 + 400 * n,),
    ),
    "moonshine streaming": (
        "MoonshineStreamingForConditionalGeneration",
        _moonshine_streaming,
        "input_values",
        lambda n: (1600 + 320 * n,),
    ),
    "cohere asr": (
        "CohereAsrForConditionalGeneration",
        _cohere,
        "input_features",
        lambda n: (24 + 8 * n, 16),
    ),
    "canary": (
        "CanaryForConditionalGeneration",
        _canary,
        "input_features",
        lambda n: (24 + 8 * n, 16),
    ),
    "speech to text": (
        "Speech2TextForConditionalGeneration",
        _speech_to_text,
        "input_features",
        lambda n: (12 + 4 * n, 8),
    ),
}


def speech_model(name: str, attention: str = "sdpa") -> nn.Module:
    """A tiny model, the same weights at each call, without dropout."""
    kind, config, _, _ = MODELS[name]
    torch.manual_seed(0)
    made: Any = getattr(transformers, kind)
    attention = attention if made._supports_sdpa else "eager"
    model = made._from_config(config(), attn_implementation=attention)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def spoken_examples(name: str, count: int = len(ANSWERS), seed: int = 5) -> list[dict[str, Any]]:
    """Sounds of different lengths, where the model takes such, and what they say."""
    _, _, key, shape = MODELS[name]
    draw = torch.Generator().manual_seed(seed)
    made = []
    for index, size in enumerate((ANSWERS * count)[:count]):
        sound: Tensor = torch.randn(shape(index % 3), generator=draw)
        labels = torch.randint(5, V, (size,), generator=draw).tolist()
        made.append({key: sound, "labels": [*labels, EOS]})
    return made
