"""FLOPs of documents against torch's counter on each of them alone."""

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.architectures.models import Case, build
from support.counted_flops import all_counted, alone, counted_flops
from support.trainers import tiny_llama
from support.versions import checkpoint_activations
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import fastft
from fastft.flops.attention_masks import Mask
from fastft.flops.document_flops import FlopsUnknownError, document_flops
from fastft.integrations.batch_counts import count_batch

LENGTHS = (6, 19, 30)
QUICK = (
    Case("causal", "llama", "LlamaForCausalLM"),
    Case("causal", "gpt2", "GPT2LMHeadModel"),  # layers that are no nn.Linear
    Case("causal", "mixtral", "MixtralForCausalLM"),  # experts
    Case("masked", "bert", "BertForMaskedLM"),
    Case("seq2seq", "t5", "T5ForConditionalGeneration"),
)
SLOW = (
    Case("causal", "qwen2", "Qwen2ForCausalLM"),
    Case("causal", "qwen3", "Qwen3ForCausalLM"),
    Case("causal", "qwen3_moe", "Qwen3MoeForCausalLM"),
    Case("causal", "gemma2", "Gemma2ForCausalLM"),
    Case("causal", "gemma3_text", "Gemma3ForCausalLM"),
    Case("causal", "cohere", "CohereForCausalLM"),
    Case("causal", "granite", "GraniteForCausalLM"),
    Case("causal", "mistral", "MistralForCausalLM"),
    Case("causal", "smollm3", "SmolLM3ForCausalLM"),
    Case("causal", "olmo2", "Olmo2ForCausalLM"),
    Case("causal", "phi", "PhiForCausalLM"),
    Case("causal", "phi3", "Phi3ForCausalLM"),
    Case("causal", "falcon", "FalconForCausalLM"),
    Case("causal", "opt", "OPTForCausalLM"),
    Case("causal", "bloom", "BloomForCausalLM"),
    Case("causal", "gptj", "GPTJForCausalLM"),
    Case("causal", "gpt_neox", "GPTNeoXForCausalLM"),
    Case("causal", "gpt_oss", "GptOssForCausalLM"),
    Case("causal", "deepseek_v3", "DeepseekV3ForCausalLM"),
    Case("causal", "llama4_text", "Llama4ForCausalLM"),
    Case("causal", "qwen3_next", "Qwen3NextForCausalLM"),  # pads to chunks
    Case("causal", "mamba", "MambaForCausalLM"),  # a convolution, no attention
    Case("causal", "mamba2", "Mamba2ForCausalLM"),
    Case("causal", "jamba", "JambaForCausalLM"),
    Case("masked", "roberta", "RobertaForMaskedLM"),
    Case("masked", "modernbert", "ModernBertForMaskedLM"),
    Case("masked", "electra", "ElectraForMaskedLM"),
    Case("masked", "distilbert", "DistilBertForMaskedLM"),
    Case("masked", "deberta-v2", "DebertaV2ForMaskedLM"),
    Case("seq2seq", "bart", "BartForConditionalGeneration"),
    Case("seq2seq", "marian", "MarianMTModel"),
)
TASKS = {"causal": "causal_lm", "masked": "token_classification", "seq2seq": "seq2seq"}


def documents(beside):
    """Tokens, and labels of another length where a decoder reads them."""
    draw = random.Random(3)
    for length in LENGTHS:
        tokens = [draw.randrange(5, 60) for _ in range(length)]
        yield tokens, [draw.randrange(5, 60) for _ in range(length // 2 + 3)] if beside else None


def padded(texts):
    """The batch of a padding collator."""

    def rows(columns, fill):
        width = max(map(len, columns))
        return torch.tensor([column + [fill] * (width - len(column)) for column in columns])

    tokens = [tokens for tokens, _ in texts]
    labels = [tokens if labels is None else labels for tokens, labels in texts]
    mask = rows([[1] * len(column) for column in tokens], 0)
    return {"input_ids": rows(tokens, 0), "attention_mask": mask, "labels": rows(labels, -100)}


def packed(texts, task, **options):
    examples = [
        {"input_ids": tokens, "labels": tokens if labels is None else labels}
        for tokens, labels in texts
    ]
    return fastft.PackingCollator(task=task, **options)(examples)


def flops_of(document, batch, beside, kind="whole"):
    counts = count_batch(batch, beside, shifts=False)
    outputs = None if counts.outputs is None else counts.outputs.double()
    return float(getattr(document, kind)(counts.tokens.double(), outputs).sum())


def check(case):
    model, beside = all_counted(build(case)), case.mapping == "seq2seq"
    texts = [*documents(beside)]
    expected = sum(counted_flops(model, **alone(model, *text)) for text in texts)
    document = document_flops(model, padded(texts))
    start = {"decoder_start_token_id": 0} if beside else {}
    for batch in (padded(texts), packed(texts, TASKS[case.mapping], **start)):
        assert flops_of(document, batch, beside) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_flops_are_the_sum_over_documents_alone(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_flops_are_the_sum_over_documents_alone_for_thirty_more(case):
    check(case)


def llama(**changes):
    return all_counted(tiny_llama(num_hidden_layers=2, **changes))


def ids(length):
    return torch.arange(length)[None] % 90 + 5


def check_llama(model, counted=None):
    """That FLOPs of 37 tokens are those counted on `model`, or on `counted`."""
    batch = {"input_ids": ids(37), "labels": ids(37)}
    document = document_flops(model, batch)
    expected = counted_flops(counted or model, **batch)
    assert float(document.whole(torch.tensor([37.0]).double())) == expected
    return document


def frozen_below():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


def with_lora():
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    return get_peft_model(llama(), config).train()


@pytest.mark.parametrize("make", [llama, frozen_below, with_lora])
def test_what_is_frozen_has_no_gradient_of_its_weight(make):
    check_llama(make())


def test_a_head_that_is_tied_or_patched_counts_as_stock():
    model = llama(tie_word_embeddings=True)
    with fastft.fused_loss(model):
        check_llama(model, counted=llama(tie_word_embeddings=True))


def test_what_checkpointing_computes_again_is_counted_once():
    check_llama(checkpoint_activations(llama()), counted=llama())


def test_compiled_and_wrapped_models_count_as_what_is_inside():
    check_llama(torch.compile(llama(), backend="eager"), counted=llama())


class PackedLinear(nn.Linear):
    """A layer whose weight is quantised: four bits an element."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, input):
        raise AssertionError("needs a GPU")


def test_quantised_linear_layers_count_as_frozen_plain_ones():
    model, plain = llama(), llama()
    for layers, made in ((model.model.layers, PackedLinear), (plain.model.layers, None)):
        for layer in layers:
            if made:
                layer.mlp.up_proj = made(layer.mlp.up_proj)
            else:
                layer.mlp.up_proj.weight.requires_grad_(False)
    check_llama(model, counted=plain)


def test_a_classifier_counts_its_head_once_a_document():
    config = BertConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    config.num_attention_heads, config._attn_implementation = 4, "eager"
    model = BertForSequenceClassification(config).train()
    batch = {"input_ids": ids(20).repeat(3, 1), "labels": torch.tensor([0, 1, 0])}
    document = document_flops(model, batch)
    expected = counted_flops(model, input_ids=ids(37), labels=torch.tensor([1]))
    assert float(document.whole(torch.tensor([37.0]).double())) == expected
    assert float(document.whole(torch.tensor([0.0]).double())) == 0


def test_the_model_and_the_random_states_stay_as_they_were():
    model = llama(attention_dropout=0.1)
    before = {name: (p, p._version) for name, p in model.named_parameters()}
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    model.eval()
    document_flops(model, {"input_ids": ids(9), "labels": ids(9)})
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()
    assert not any(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert before[name] == (parameter, parameter._version) and parameter.grad is None
    assert model.config._attn_implementation == "eager"


class ReadsNumbers(nn.Module):
    def forward(self, rows):
        return rows * float(rows.sum())


def test_images_and_code_that_needs_numbers_are_refused_with_a_sentence():
    model = llama()
    with pytest.raises(FlopsUnknownError, match="more than tokens: pixel_values"):
        document_flops(model, {"input_ids": ids(9), "pixel_values": torch.zeros(1, 3, 4, 4)})
    model.model.layers[0].mlp.act_fn = ReadsNumbers()
    with pytest.raises(FlopsUnknownError, match="LlamaForCausalLM does not run without numbers"):
        document_flops(model, {"input_ids": ids(9), "labels": ids(9)})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_hidden_pairs_are_those_of_the_mask(causal, window):
    for n in (1, 4, 5, 6, 33):
        query, key = torch.arange(n)[:, None], torch.arange(n)[None]
        seen = (key <= query) if causal else torch.ones(n, n, dtype=torch.bool)
        if window is not None:
            seen = seen & ((query - key).abs() < window)
        hidden = Mask(False, causal, window).hidden_pairs(torch.tensor([float(n)]))
        assert int(hidden) == int((~seen).sum())


@pytest.mark.parametrize(
    ("case", "windows"),
    [
        (QUICK[0], [None, None]),
        (Case("causal", "gemma2", "Gemma2ForCausalLM"), [16, None]),  # layers by turns
        (QUICK[4], [None, None]),  # the decoder alone is causal
    ],
    ids=["llama", "gemma2", "t5"],
)
def test_the_causal_figure_is_without_what_masks_hide(case, windows):
    model, beside = all_counted(build(case)), case.mapping == "seq2seq"
    for config in (model.config, *(layer.self_attn for layer in getattr(model, "layers", ()))):
        assert getattr(config, "sliding_window", None) in (None, 16)
    n, lengths = 50, (20, 40, 60)
    tokens = [7] * 10
    texts = [(tokens, [7] * m) if beside else ([7] * m, None) for m in lengths]
    first, second, third = (counted_flops(model, **alone(model, *text)) for text in texts)
    of_a_pair = (third - 2 * second + first) / (2 * 20 * 20) / len(windows)
    hidden = 0
    for window in windows:
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        hidden += of_a_pair * int((~seen).sum())
    document = document_flops(model, padded(texts))
    sides = torch.tensor([10.0 if beside else n]), torch.tensor([float(n)])
    sides = [side.double() for side in sides]
    assert float(document.whole(*sides) - document.causal(*sides)) == pytest.approx(hidden)
