"""What the shrinker cannot guess, as data: model type -> values of its config, nested as configs
nest.

A key (mapping, model type) is for one mapping alone.
"""

from __future__ import annotations

from typing import Any

from support.architectures.shrink import IMAGE_TOKEN, VOCABULARY

_MLA = {"head_dim": 8, "num_key_value_heads": 4}  # latent attention: all heads share one rotary key
_DOTS3 = {**_MLA, "head_dim": 16, "per_layer_config": {}}
_NO_LAYER_LISTS = {"per_layer_config": None, "layer_types": None, "num_kv_shared_layers": 0}
_GEMMA3N = {
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "activation_sparsity_pattern": None,
    "layer_types": None,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}
_REFORMER = {
    "axial_pos_embds_dim": [32, 32],
    "axial_pos_shape": [4, 8],
    "attn_layers": ["local", "lsh"],
    "num_buckets": 2,
    "lsh_attn_chunk_length": 8,
    "local_attn_chunk_length": 8,
    # it seeds its dropout and its hashes by the clock, so that no two runs agree
    "hash_seed": 1,
    "hidden_dropout_prob": 0.0,
    "lsh_attention_probs_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
}
_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
}
_MROPE_TEXT = {"text_config": _MROPE}
# what it changes to in its first pass over so short a text
_FULL_ATTENTION = {"attention_type": "original_full"}
_QUERIES = {"num_query_tokens": 4, "image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN}
_TILES = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}  # of towers for 32 x 32 pixels
_VIBEVOICE = {"num_filters": 2, "depths": [1] * 7, "hidden_size": 16}
_ZAMBA = {"attention_head_dim": 32, "attention_hidden_size": 128}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_BLT = {"hidden_size_global": 64, "sliding_window": 64}

OVERRIDES: dict[str | tuple[str, str], dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "longcat_flash", "youtu"),
        _MLA,
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glmga", "glm_ocr"), _MROPE_TEXT),
    **dict.fromkeys(("big_bird", "bigbird_pegasus"), _FULL_ATTENTION),
    **dict.fromkeys(("blip-2", "instructblip"), _QUERIES),
    "instructblipvideo": {**_QUERIES, "video_token_index": IMAGE_TOKEN},
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _TILES),
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "patcher_config": _BLT,
        "global_config": _BLT,
        "encoder_config": _BLT,
        "decoder_config": _BLT,
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 94},
        "vq_config": {"base_channels": 32, "resolution": 32},
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE["rope_parameters"]}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": _MROPE["rope_parameters"]}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
    "deepseek_v2": {**_MLA, "topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3,
    "emu3": {"vocabulary_map": {"<image>": 94}, "vq_config": {"base_channels": 32}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [3, 3, 2]},
            "moe_intermediate_size": [32, 32],
        }
    },
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3, "pad_token_id": 1},
    "esmc": {"num_key_value_heads": 4},
    "florence2": {
        "vision_config": {
            "embed_dim": [16, 32, 64, 64],
            "num_heads": [2, 2, 4, 4],
            "num_groups": [2, 2, 4, 4],
            "depths": [1, 1, 1, 1],
            "window_size": 4,
            "patch_size": [7, 3, 3, 3],
        }
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _NO_LAYER_LISTS},
    "gemma4_text": _NO_LAYER_LISTS,
    "gemma4_unified": {"text_config": _NO_LAYER_LISTS},
    "gemma4_unified_text": _NO_LAYER_LISTS,
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 2]}
        }
    },
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0}},
    "gpt_neo": {
        "window_size": 16,
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
    },
    "gptj": {"rotary_dim": 8},
    "granite4_vision": {**_TILES, "deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "moe_topk": 2,
        "moe_intermediate_size": 32,
        "num_shared_expert": 1,
    },
    "hunyuan_vl": {"text_config": {"head_dim": 16, **_MROPE}},
    "janus": {"vq_config": {"base_channels": 32, "num_embeddings": 64}},
    "kimi_k25": {"text_config": _MLA},
    "kosmos-2": {"latent_query_num": 4, "text_config": {"layers": 2}},
    "laguna": {
        "num_attention_heads_per_layer": [4, 4],
        "layer_types": ["full_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {
        "vision_config": {
            "intermediate_size": 256,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        }
    },
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "ministral": {"head_dim": 16},
    "mistral_large4": {"text_config": _MLA},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 64}}},
        "text_config": {"layers_block_type": ["linear_attention", "full_attention"]},
    },
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h_omni": {
        "text_config": {"layers_block_type": ["linear_attention", "full_attention"]}
    },
    "neomme": {"layer_types": ["full_attention", "full_attention"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "paddleocr_vl": {"text_config": _MROPE},
    "perceiver": {
        "max_position_embeddings": 32,
        "num_latents": 16,
        "d_latents": 64,
        "num_self_attends_per_block": 2,
    },
    "qwen2_5_omni_thinker": {**_MROPE_TEXT, "vision_start_token_id": 93},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 93},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    ("causal", "reformer"): {**_REFORMER, "is_decoder": True},
    ("masked", "reformer"): {**_REFORMER, "is_decoder": False},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "udop": {"decoder_start_token_id": 0},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _VIBEVOICE,
        "semantic_tokenizer_encoder_config": _VIBEVOICE,
    },
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], **_ZAMBA},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "num_mem_blocks": 1,
        "mamba_expand": 2,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "adapter_rank": 8,
        "use_mem_rope": True,
    },
    "zaya": {"num_experts_per_tok": 1},
}
