"""The models of the packing matrix, and the best that keeps the sequences of each apart."""

from __future__ import annotations

from architectures.models import Case
from architectures.packing import MASK, OURS, REFUSED, STOCK

# The models of the survey that this library began with, and the best that is exact for each.
MODELS = {
    Case("causal", "llama", "LlamaForCausalLM"): OURS,
    Case("causal", "qwen2", "Qwen2ForCausalLM"): OURS,
    Case("causal", "qwen3", "Qwen3ForCausalLM"): OURS,
    Case("causal", "phi", "PhiForCausalLM"): OURS,
    Case("causal", "phi3", "Phi3ForCausalLM"): OURS,
    Case("causal", "olmo2", "Olmo2ForCausalLM"): OURS,
    Case("causal", "cohere", "CohereForCausalLM"): OURS,
    Case("causal", "granite", "GraniteForCausalLM"): OURS,
    Case("causal", "smollm3", "SmolLM3ForCausalLM"): OURS,
    Case("causal", "mixtral", "MixtralForCausalLM"): OURS,
    Case("causal", "qwen3_moe", "Qwen3MoeForCausalLM"): OURS,
    Case("causal", "deepseek_v3", "DeepseekV3ForCausalLM"): OURS,
    Case("causal", "gpt2", "GPT2LMHeadModel"): OURS,
    Case("causal", "gpt_neox", "GPTNeoXForCausalLM"): OURS,
    Case("causal", "mistral", "MistralForCausalLM"): OURS,
    Case("causal", "gemma2", "Gemma2ForCausalLM"): OURS,
    Case("causal", "gemma3_text", "Gemma3ForCausalLM"): OURS,
    Case("causal", "starcoder2", "Starcoder2ForCausalLM"): OURS,
    Case("causal", "llama4_text", "Llama4ForCausalLM"): OURS,  # chunks
    Case("causal", "gptj", "GPTJForCausalLM"): STOCK,  # attention code of its own, exact in eager mode
    Case("causal", "gpt_neo", "GPTNeoForCausalLM"): STOCK,
    Case("causal", "gpt_oss", "GptOssForCausalLM"): OURS,
    Case("causal", "opt", "OPTForCausalLM"): OURS,
    Case("causal", "bloom", "BloomForCausalLM"): MASK,
    Case("causal", "falcon", "FalconForCausalLM"): MASK,
    Case("causal", "mpt", "MptForCausalLM"): MASK,
    Case("masked", "bert", "BertForMaskedLM"): OURS,
    Case("masked", "roberta", "RobertaForMaskedLM"): OURS,
    Case("masked", "electra", "ElectraForMaskedLM"): OURS,
    Case("masked", "eurobert", "EuroBertForMaskedLM"): OURS,
    Case("masked", "distilbert", "DistilBertForMaskedLM"): OURS,
    Case("masked", "modernbert", "ModernBertForMaskedLM"): OURS,
    Case("masked", "deberta-v2", "DebertaV2ForMaskedLM"): REFUSED,
    Case("seq2seq", "t5", "T5ForConditionalGeneration"): OURS,
    Case("seq2seq", "bart", "BartForConditionalGeneration"): REFUSED,  # numbers its positions along the row
    Case("image-text", "gemma3", "Gemma3ForConditionalGeneration"): OURS,
    Case("image-text", "qwen2_vl", "Qwen2VLForConditionalGeneration"): OURS,
    Case("image-text", "qwen3_vl", "Qwen3VLForConditionalGeneration"): OURS,
    Case("causal", "mamba", "MambaForCausalLM"): REFUSED,
    Case("causal", "mamba2", "Mamba2ForCausalLM"): REFUSED,
    Case("causal", "bamba", "BambaForCausalLM"): REFUSED,
    Case("causal", "falcon_h1", "FalconH1ForCausalLM"): REFUSED,
    Case("causal", "granitemoehybrid", "GraniteMoeHybridForCausalLM"): REFUSED,
    Case("causal", "lfm2", "Lfm2ForCausalLM"): REFUSED,
    Case("causal", "qwen3_next", "Qwen3NextForCausalLM"): REFUSED,
    Case("causal", "jamba", "JambaForCausalLM"): REFUSED,
    Case("causal", "recurrent_gemma", "RecurrentGemmaForCausalLM"): REFUSED,
    Case("causal", "rwkv", "RwkvForCausalLM"): REFUSED,
}
START = {"roberta": 2}
