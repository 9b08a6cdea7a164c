"""Packed against alone over forty models: transformers' own attention, and what fastft makes of each."""

from __future__ import annotations

import pytest
import transformers
from architectures.models import Case, build
from architectures.packing import (
    EXACT,
    Sequences,
    accepted,
    positions_alone,
    train_begin,
    two_rows,
    with_cache,
    with_mask,
)

import fastft

STOCK, OURS, MASK, REFUSED = "stock", "fastft", "block mask", "refused"  # what keeps a model's sequences apart

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
BATCHES = {
    "positions": positions_alone,
    "and a cache": with_cache,
    "and a 2-D mask": with_mask,
    "all keys": lambda batch: batch,
    "two rows": two_rows,
}


def takes(model, implementation):
    """Whether the model has this attention implementation, which it then has."""
    try:
        model.set_attn_implementation(implementation)
    except ValueError:
        return False
    return model.config._attn_implementation == implementation


def in_trainer(model, sequences, start):
    """The outcome of training with the callback; REFUSED if it raised."""
    try:
        callback = train_begin(model, start)
    except fastft.PackingLeakError:
        return REFUSED
    try:
        masked = model.config._attn_implementation == "fastft_block_mask"
        outcome = sequences.outcome(two_rows)
    finally:
        callback.restore()
    assert outcome == (EXACT, ""), outcome
    return MASK if masked else EXACT


def stock_outcomes(model, sequences):
    changes = {"all keys": BATCHES["all keys"]} if sequences.crossed else BATCHES
    return {
        name: sequences.outcome(lambda batch, change=change: accepted(model, change(batch)))[0]
        for name, change in changes.items()
    }


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_a_model_is_exact_or_refused(case, record_property):
    transformers.logging.set_verbosity_error()
    model, start = build(case).eval(), START.get(case.model_type, 0)
    sequences, rows = Sequences(model, start), {}
    for implementation in ("eager", "sdpa", "fastft"):
        if not takes(model, implementation):
            continue
        outcomes = stock_outcomes(model, sequences)
        try:
            fastft.check_packing(model, position_ids_start=start)
            verdict = "passes"
            assert outcomes["all keys"] == EXACT, "a silent leak"
        except fastft.PackingLeakError:
            verdict = "raises"
        rows[implementation] = {**outcomes, "check_packing": verdict, "in Trainer": in_trainer(model, sequences, start)}
    record_property("packing", {"case": str(case), "rows": rows})
    assert best(rows) == MODELS[case], rows


def best(rows):
    results = {name: row["in Trainer"] for name, row in rows.items()}
    if results.get("fastft") == EXACT:
        return OURS
    if EXACT in results.values():
        return STOCK
    return MASK if MASK in results.values() else REFUSED
