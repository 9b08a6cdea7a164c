"""Which layer is taken for a model's output head, which heads keep their own forward, and who holds
a head."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers import set_seed

from fastft.loss.lazy.output_head import (
    Attachment,
    LazyForward,
    expects_head,
    find_heads,
    fused_loss,
)

V = 32  # of everything: the vocabulary, the hidden states and what is between them
WIDTHS = {"vocab_size": V, "hidden_size": V, "intermediate_size": V}
BERT = {**WIDTHS, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": V, "n_embd": V, "n_layer": 1, "n_head": 2, "n_positions": 64}
GPT2 |= {"pad_token_id": 0}
T5 = {"vocab_size": V, "d_model": V, "d_kv": 16, "d_ff": V, "num_layers": 1, "num_heads": 2}
BART = {"vocab_size": V, "d_model": V, "pad_token_id": 1}
for part in ("encoder", "decoder"):
    BART |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": V}
DISTILBERT = {"vocab_size": V, "dim": V, "n_layers": 1, "n_heads": 2, "hidden_dim": V}
VIT = {**BERT, "image_size": 8, "patch_size": 4}
BLIP = {"text_config": {**BERT, "encoder_hidden_size": V}, "vision_config": VIT}
WAV2VEC2 = {**BERT, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WAV2VEC2 |= {"conv_dim": [V], "conv_kernel": [3], "conv_stride": [2], "num_feat_extract_layers": 1}

CLASSIFIERS = {
    "BertForSequenceClassification": ("BertConfig", BERT),
    "BertForTokenClassification": ("BertConfig", BERT),
    "BertForQuestionAnswering": ("BertConfig", BERT),
    "BertForMultipleChoice": ("BertConfig", BERT),
    "BertForNextSentencePrediction": ("BertConfig", BERT),
    "RobertaForSequenceClassification": ("RobertaConfig", BERT),
    "XLMRobertaForTokenClassification": ("XLMRobertaConfig", BERT),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTILBERT),
    "ModernBertForSequenceClassification": ("ModernBertConfig", {**BERT, "pad_token_id": 0}),
    "LlamaForSequenceClassification": ("LlamaConfig", LLAMA),
    "Qwen2ForTokenClassification": ("Qwen2Config", LLAMA),
    "GPT2ForSequenceClassification": ("GPT2Config", GPT2),
    "T5ForSequenceClassification": ("T5Config", T5),
    "BartForSequenceClassification": ("BartConfig", BART),
    "ViTForImageClassification": ("ViTConfig", VIT),
    "Wav2Vec2ForSequenceClassification": ("Wav2Vec2Config", WAV2VEC2),
    "BertModel": ("BertConfig", BERT),
    "LlamaModel": ("LlamaConfig", LLAMA),
}
LANGUAGE_MODELS = {
    "BertForMaskedLM": ("BertConfig", BERT, "cls.predictions.decoder"),
    "RobertaForMaskedLM": ("RobertaConfig", BERT, "lm_head.decoder"),
    "DistilBertForMaskedLM": ("DistilBertConfig", DISTILBERT, "vocab_projector"),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA, "lm_head"),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, "lm_head"),
    "GPT2DoubleHeadsModel": ("GPT2Config", GPT2, "lm_head"),
    "T5ForConditionalGeneration": ("T5Config", T5, "lm_head"),
    "BartForConditionalGeneration": ("BartConfig", BART, "lm_head"),
    "BlipForConditionalGeneration": ("BlipConfig", BLIP, "text_decoder.cls.predictions.decoder"),
}


def build(name, config, sizes):
    set_seed(1)
    return getattr(transformers, name)(getattr(transformers, config)(**sizes))


def names_of(model, layers):
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in layers]


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("labels", [3, V])
def test_no_layer_of_a_classifier_as_wide_as_its_vocabulary_is_taken_for_a_head(name, labels):
    config, sizes = CLASSIFIERS[name]
    model = build(name, config, {**sizes, "num_labels": labels})
    assert (
        any(isinstance(m, nn.Linear) and m.out_features == V for m in model.modules())
        or "GPT2" in name
    )
    assert find_heads(model) == [] and not expects_head(model)
    with fused_loss(model) as report:
        assert "nothing to fuse" in report.skipped[0]
        assert not any(
            isinstance(module.__dict__.get("forward"), LazyForward) for module in model.modules()
        )


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_head_alone_of_a_language_model_as_wide_as_its_vocabulary(name):
    config, sizes, expected = LANGUAGE_MODELS[name]
    model = build(name, config, sizes)
    assert names_of(model, find_heads(model)) == [expected] and expects_head(model)


class Stranger(nn.Module):
    """A module of one's own, which has never heard of output embeddings."""

    def __init__(self, *layers, vocab_size=V):
        super().__init__()
        self.config = types.SimpleNamespace(vocab_size=vocab_size)
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def wide(inner):
    """An attention block and a feed-forward as wide as the vocabulary."""
    return [nn.Linear(inner, V), nn.ReLU(), nn.Linear(V, inner)]


STRANGERS = {
    "head last": (lambda: Stranger(*wide(8), nn.Linear(8, V)), ["layers.3"]),
    "several wide layers": (lambda: Stranger(*wide(8), *wide(8), nn.Linear(8, V)), ["layers.6"]),
    "no head": (lambda: Stranger(*wide(8)), []),
    "a square layer": (lambda: Stranger(nn.Linear(V, V)), []),
    "another size": (lambda: Stranger(nn.Linear(8, V + 1)), []),
    "no config": (lambda: nn.Sequential(nn.Linear(8, V)), []),
    "around a body": (lambda: Stranger(build("BertModel", "BertConfig", BERT)), []),
    "around a body, with a head": (
        lambda: Stranger(
            build("BertModel", "BertConfig", {**BERT, "hidden_size": 8}), nn.Linear(8, V)
        ),
        ["layers.1"],
    ),
    "around a language model": (
        lambda: Stranger(build("LlamaForCausalLM", "LlamaConfig", LLAMA), nn.Linear(8, V)),
        ["layers.0.lm_head"],
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_the_head_of_a_module_of_ones_own(name):
    make, expected = STRANGERS[name]
    model = make()
    assert names_of(model, find_heads(model)) == expected and expects_head(model)
    with fused_loss(model) as report:
        assert report.skipped == [] if expected else "get_output_embeddings()" in report.skipped[0]


class Noise(nn.Module):
    """A weight with noise, drawn anew whenever it is read."""

    reads = 0

    def forward(self, weight):
        Noise.reads += 1
        return weight + 0.1 * torch.randn_like(weight)


class Halved(nn.Linear):
    """A weight that a property computes."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.whole = nn.Parameter(self.weight.detach().clone())
        del self._parameters["weight"]

    @property
    def weight(self):
        return self.whole * 0.5

    @weight.setter
    def weight(self, value):
        self._parameters["weight"] = value


def with_noise(head):
    parametrize.register_parametrization(head, "weight", Noise())
    return head


def noisy_bias(head):
    parametrize.register_parametrization(head, "bias", Noise())
    return head


READ_OFTEN = {
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "noise": with_noise,
    "noise on the bias": noisy_bias,
    "property": lambda head: Halved(8, V),
}
READ_ONCE = {  # hooks before forward compute it, and keep it
    "spectral norm by a hook": spectral_norm,
    "weight norm by a hook": weight_norm,
    "pruned": lambda head: prune.random_unstructured(head, "weight", 0.3),
}


def three_steps(change, fused):
    """Losses, parameters and buffers of a training, and the report."""
    set_seed(5)
    model = Stranger(nn.Linear(8, 8), change(nn.Linear(8, V))).train()
    model.get_output_embeddings = lambda: model.layers[1]
    optimizer, losses, reads = torch.optim.SGD(model.parameters(), lr=0.5), [], Noise.reads
    x, target = torch.randn(6, 8), torch.arange(6)
    attachment = Attachment(model) if fused else None
    for _ in range(3):
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if attachment is not None:
        attachment.remove()
    return losses, model.state_dict(), Noise.reads - reads, attachment and attachment.report


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("name", [*READ_OFTEN, *READ_ONCE])
def test_a_head_whose_weight_is_computed_trains_as_stock(name):
    change = READ_OFTEN.get(name) or READ_ONCE[name]
    stock, expected, reads, _ = three_steps(change, False)
    fused, actual, as_often, report = three_steps(change, True)
    assert fused == pytest.approx(stock, rel=1e-6) and as_often == reads
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-6)
    if name in READ_OFTEN:
        assert (
            "computes its weight or bias each time it is read" in report.skipped[0]
            and not report.fused
        )
    else:
        assert (report.fused, report.materialised, report.skipped) == (3, [], [])


def test_whoever_comes_last_holds_the_head():
    model, x = Stranger(nn.Linear(8, 8), nn.Linear(8, V)).train(), torch.randn(6, 8)
    stale, new = Attachment(model), Attachment(model)
    stale.remove()
    F.cross_entropy(model(x), torch.arange(6)).backward()
    assert new.report.fused == 1 and not new.report.skipped
    assert stale.report.fused == 0 and stale.report.skipped == [
        "another fused loss has taken the output head"
    ]
    new.remove()
    assert "forward" not in vars(model.layers[1])
    with fused_loss(model), fused_loss(model) as inner:
        F.cross_entropy(model(x), torch.arange(6)).backward()
    assert inner.fused == 1 and "forward" not in vars(model.layers[1])


def test_a_copy_of_an_attached_model_has_a_head_of_its_own():
    model = Stranger(nn.Linear(8, 8), nn.Linear(8, V)).train()
    with fused_loss(model) as report:
        twin = copy.deepcopy(model)
        with fused_loss(twin) as other:
            F.cross_entropy(twin(torch.randn(6, 8)), torch.arange(6)).backward()
        F.cross_entropy(model(torch.randn(6, 8)), torch.arange(6)).backward()
    assert report.fused == other.fused == 1


def test_what_is_no_module_is_refused_by_name():
    with (
        pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"),
        fused_loss("gpt2"),
    ):
        pass
