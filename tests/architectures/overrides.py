"""What the shrinker cannot guess, as data: model type -> values of its config, nested as configs nest.

A key (mapping, model type) is for one mapping alone. `DEFAULTS` are arguments without which the config class has no
default config at all.
"""

from __future__ import annotations

from typing import Any

from architectures.shrink import VOCABULARY

_MLA = {"head_dim": 8, "num_key_value_heads": 4}  # latent attention: all heads share one rotary key
_NO_LAYER_LISTS = {"per_layer_config": None, "layer_types": None, "num_kv_shared_layers": 0}
_GEMMA3N = {
    **{"num_hidden_layers": 2, "intermediate_size": 64, "activation_sparsity_pattern": None, "layer_types": None},
    **{"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "altup_num_inputs": 2},
}
_REFORMER = {
    **{"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 8], "attn_layers": ["local", "lsh"], "num_buckets": 2},
    **{"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8},
}

OVERRIDES: dict[str | tuple[str, str], dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "longcat_flash", "youtu"), _MLA),
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {**_MLA, "topk_method": "greedy"},
    "dots3_note_text": {**_MLA, "per_layer_config": None},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3, "pad_token_id": 1},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _NO_LAYER_LISTS},
    "gemma4_text": _NO_LAYER_LISTS,
    "gemma4_unified": {"text_config": _NO_LAYER_LISTS},
    "gemma4_unified_text": _NO_LAYER_LISTS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "gptj": {"rotary_dim": 8},
    "hunyuan_v1_moe": {"num_shared_expert": 1},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "kimi_k25": {"text_config": _MLA},
    "laguna": {"num_attention_heads_per_layer": [4, 4], "layer_types": ["full_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "neomme": {"layer_types": ["full_attention", "full_attention"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    ("causal", "reformer"): {**_REFORMER, "is_decoder": True},
    ("masked", "reformer"): {**_REFORMER, "is_decoder": False},
    "udop": {"decoder_start_token_id": 0},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba2": {
        **{"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1, "mamba_expand": 2},
        **{"n_mamba_heads": 8, "mamba_headdim": 16, "attention_head_dim": 32, "attention_hidden_size": 128},
        **{"adapter_rank": 8, "use_mem_rope": True},
    },
}

DEFAULTS: dict[str, dict[str, Any]] = {}
