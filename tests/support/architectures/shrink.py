"""Makes the default config of any model small, by the names of its attributes."""

from __future__ import annotations

from typing import Any

VOCABULARY = 97
IMAGE_TOKEN = VOCABULARY - 3
LAYERS = 2

_SIZES: tuple[tuple[int, str], ...] = (
    (
        VOCABULARY,
        "vocab_size n_vocab text_vocab_size encoder_vocab_size decoder_vocab_size "
        "vocab_size_per_layer_input",
    ),
    (VOCABULARY, "src_vocab_size tgt_vocab_size"),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers "
        "num_decoder_layers",
    ),
    (LAYERS, "num_encoder_layers n_encoder_layers n_decoder_layers num_layers_per_stack"),
    (
        64,
        "hidden_size d_model n_embd dim embed_dim hidden_dim embedding_size word_embed_proj_dim "
        "emb_dim model_dim",
    ),
    (
        64,
        "embed_proj_dim encoder_hidden_size decoder_hidden_size d_embed token_embedding_dim "
        "embedding_dim lru_width",
    ),
    (
        64,
        "rnn_hidden_size attention_hidden_size output_hidden_size out_hidden_size projection_dim "
        "text_hidden_size",
    ),
    (
        64,
        "backbone_hidden_size hidden_size_per_layer_input cross_attention_hidden_size "
        "mm_hidden_size fc_hidden_size",
    ),
    (
        64,
        "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim inner_dim "
        "ffn_hidden_size d_inner",
    ),
    (64, "feed_forward_size dense_intermediate_size mlp_dim"),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size "
        "expert_ffn_hidden_size",
    ),
    (
        32,
        "moe_shared_expert_intermediate_size shared_intermediate_size moe_ffn_hidden_size "
        "intermediate_size_mlp",
    ),
    (32, "expert_dim shared_expert_dim router_intermediate_size image_size"),
    (
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
        "decoder_attention_heads attention_heads",
    ),
    (
        4,
        "num_query_heads linear_num_value_heads num_linear_value_heads linear_num_heads "
        "index_n_heads",
    ),
    (2, "num_key_value_heads n_kv_heads num_kv_heads linear_num_key_heads multi_query_group_num"),
    (2, "num_global_key_value_heads swa_num_key_value_heads"),
    (
        16,
        "head_dim d_kv attention_head_dim linear_key_head_dim linear_value_head_dim "
        "global_head_dim v_head_dim",
    ),
    (
        16,
        "linear_head_dim kv_channels swa_head_dim swa_v_head_dim qk_head_dim q_lora_rank "
        "kv_lora_rank o_lora_rank",
    ),
    (8, "qk_rope_head_dim qk_nope_head_dim index_head_dim lora_rank rank"),
    (
        4,
        "num_experts n_routed_experts num_local_experts moe_num_experts n_experts num_moe_experts "
        "routed_experts",
    ),
    (4, "num_routed_experts"),
    (
        2,
        "num_experts_per_tok moe_top_k moe_k num_selected_experts top_k_experts moe_topk "
        "num_experts_per_token",
    ),
    (2, "experts_per_token"),
    (
        1,
        "n_group topk_group n_shared_experts first_k_dense_replace num_shared_experts "
        "num_expert_group",
    ),
    (1, "n_expert_groups mamba_n_groups n_groups mamba_ngroups"),
    (
        128,
        "mamba_d_ssm max_position_embeddings n_positions n_ctx max_target_positions "
        "max_source_positions",
    ),
    (128, "max_seq_len seq_len max_seq_length model_max_length context_length"),
    (
        16,
        "mamba_head_dim mamba_d_head chunk_size mamba_chunk_size sliding_window "
        "attention_window_size",
    ),
    (16, "attention_chunk_size local_attention"),
    (
        8,
        "state_size mamba_d_state ssm_state_size time_step_rank mamba_num_heads mamba_n_heads "
        "patch_size",
    ),
)
SIZES = {name: size for size, names in _SIZES for name in names.split()}

# Whatever stands between the head and the loss gets a value that no formula can take for 1.
AFTER_THE_HEAD = {
    "logits_scaling": 3.0,
    "logit_scale": 0.3,
    "lm_head_multiplier": 0.5,
    "final_logit_softcapping": 5.0,
    "output_logit_soft_cap": 5.0,
    "logits_soft_cap": 5.0,
    "output_multiplier": 0.4,
    "logits_mup_width_multiplier": 2.5,
}

_LEFT_OUT = {
    "transformers_version",
    "architectures",
    "dtype",
    "_name_or_path",
    "model_type",
    "per_layer_config",
}


def shrink(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A config's dictionary with small sizes; `overrides` rule, and nest where a config holds
    another."""
    layers = next(
        (config[name] for name in ("num_hidden_layers", "num_layers") if name in config), None
    )
    small = {
        name: _per_layer(value)
        if isinstance(value, list) and len(value) == layers
        else _shrunk(name, value, overrides)
        for name, value in config.items()
        if name not in _LEFT_OUT
    }
    given = {
        name: value for name, value in overrides.items() if not _is_config(name, config.get(name))
    }
    return {**small, **given}


def _is_config(name: str, value: Any) -> bool:
    return isinstance(value, dict) and (
        "model_type" in value or (name.endswith("_config") and name not in _LEFT_OUT)
    )


def _shrunk(name: str, value: Any, overrides: dict[str, Any]) -> Any:
    if _is_config(name, value):
        small = shrink(value, overrides.get(name) or {})
        return {**small, "model_type": value["model_type"]} if "model_type" in value else small
    if name in AFTER_THE_HEAD and (value is None or isinstance(value, int | float)):
        return AFTER_THE_HEAD[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(name, value)
    if name.endswith("_token_id") and isinstance(value, list):
        return [token if token < VOCABULARY else 1 for token in value]
    if (
        name in ("rope_parameters", "rope_scaling")
        and isinstance(value, dict)
        and "mrope_section" in value
    ):
        return {**value, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
    return value


def _number(name: str, value: float) -> float:
    if name in SIZES:
        return SIZES[name]
    if name.endswith(("_token_id", "_token_index")) and value >= VOCABULARY:
        return IMAGE_TOKEN if name.startswith(("image", "video", "audio")) else 1
    return 0 if name == "pad_token_id" and value < 0 else value


def _per_layer(values: list[Any]) -> list[Any]:
    """One value for each layer that is left; two kinds of layers if the model has two."""
    first, others = values[:LAYERS], [value for value in values if value != values[0]]
    if not others or any(value != values[0] for value in first) or not isinstance(values[0], str):
        return first
    return [values[0], "full_attention" if "full_attention" in others else others[0]]
