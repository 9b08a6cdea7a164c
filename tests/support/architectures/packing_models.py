"""The models of the packing matrix: the survey that this library began with."""

from __future__ import annotations

from support.architectures.models import Case

# packed exactly, by our attention where the model takes it, else by stock's or with a block mask
PACKED = (
    Case("causal", "llama", "LlamaForCausalLM"),
    Case("causal", "qwen2", "Qwen2ForCausalLM"),
    Case("causal", "qwen3", "Qwen3ForCausalLM"),
    Case("causal", "phi", "PhiForCausalLM"),
    Case("causal", "phi3", "Phi3ForCausalLM"),
    Case("causal", "olmo2", "Olmo2ForCausalLM"),
    Case("causal", "cohere", "CohereForCausalLM"),
    Case("causal", "granite", "GraniteForCausalLM"),
    Case("causal", "smollm3", "SmolLM3ForCausalLM"),
    Case("causal", "mixtral", "MixtralForCausalLM"),
    Case("causal", "qwen3_moe", "Qwen3MoeForCausalLM"),
    Case("causal", "deepseek_v3", "DeepseekV3ForCausalLM"),
    Case("causal", "gpt2", "GPT2LMHeadModel"),
    Case("causal", "gpt_neox", "GPTNeoXForCausalLM"),
    Case("causal", "mistral", "MistralForCausalLM"),
    Case("causal", "gemma2", "Gemma2ForCausalLM"),
    Case("causal", "gemma3_text", "Gemma3ForCausalLM"),
    Case("causal", "starcoder2", "Starcoder2ForCausalLM"),
    Case("causal", "llama4_text", "Llama4ForCausalLM"),  # chunks
    Case("causal", "gptj", "GPTJForCausalLM"),
    Case("causal", "gpt_neo", "GPTNeoForCausalLM"),
    Case("causal", "gpt_oss", "GptOssForCausalLM"),
    Case("causal", "opt", "OPTForCausalLM"),
    Case("causal", "bloom", "BloomForCausalLM"),
    Case("causal", "falcon", "FalconForCausalLM"),
    Case("causal", "mpt", "MptForCausalLM"),
    Case("masked", "bert", "BertForMaskedLM"),
    Case("masked", "roberta", "RobertaForMaskedLM"),
    Case("masked", "electra", "ElectraForMaskedLM"),
    Case("masked", "eurobert", "EuroBertForMaskedLM"),
    Case("masked", "distilbert", "DistilBertForMaskedLM"),
    Case("masked", "modernbert", "ModernBertForMaskedLM"),
    Case("seq2seq", "t5", "T5ForConditionalGeneration"),
    Case("image-text", "gemma3", "Gemma3ForConditionalGeneration"),
    Case("image-text", "qwen2_vl", "Qwen2VLForConditionalGeneration"),
    Case("image-text", "qwen3_vl", "Qwen3VLForConditionalGeneration"),
)
# refused, unless a version of transformers has made them exact
UNPACKED = (
    Case("masked", "deberta-v2", "DebertaV2ForMaskedLM"),
    Case("seq2seq", "bart", "BartForConditionalGeneration"),  # numbers its positions along the row
    Case("causal", "mamba", "MambaForCausalLM"),
    Case("causal", "mamba2", "Mamba2ForCausalLM"),
    Case("causal", "bamba", "BambaForCausalLM"),
    Case("causal", "falcon_h1", "FalconH1ForCausalLM"),
    Case("causal", "granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    Case("causal", "lfm2", "Lfm2ForCausalLM"),
    Case("causal", "qwen3_next", "Qwen3NextForCausalLM"),
    Case("causal", "jamba", "JambaForCausalLM"),
    Case("causal", "recurrent_gemma", "RecurrentGemmaForCausalLM"),
    Case("causal", "rwkv", "RwkvForCausalLM"),
)
START = {"roberta": 2}
