"""The probe: what it finds, what it says, and that it leaves no trace."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import fastft
from fastft.attention.attention import register_attention
from fastft.attention.check_packing import find_leak

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 131, "pad_token_id": 1}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64}


def made(name, implementation="sdpa", dtype=torch.float32, **changes):
    kind = getattr(transformers, name)
    register_attention()
    config = kind.config_class(**{**SIZES, **changes})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return kind(config).to(dtype)


def opt(implementation="sdpa", **changes):
    return made("OPTForCausalLM", implementation, ffn_dim=48, word_embed_proj_dim=32, **changes)


def bloom():
    return made("BloomForCausalLM", "eager", n_layer=2, n_head=4)


def recurrent(name, **changes):
    return lambda: made(name, "eager", **changes)


EXACT = {
    "a decoder": lambda: made("LlamaForCausalLM", num_key_value_heads=2),
    "a decoder with ours": lambda: made("LlamaForCausalLM", "fastft", num_key_value_heads=2),
    "dropped positions": lambda: opt("fastft"),
    "an encoder": lambda: made("BertForMaskedLM", "fastft"),
    "labels for tokens": lambda: made("BertForTokenClassification", "fastft", num_labels=13),
    "one label each": lambda: made("BertForSequenceClassification", "fastft", num_labels=3),
    "one label each, no padding token": lambda: made("LlamaForSequenceClassification", "fastft", pad_token_id=None),
    "experts": lambda: made("MixtralForCausalLM", "fastft", num_local_experts=4, num_key_value_heads=2),
    "no head": lambda: made("LlamaModel", "fastft", num_key_value_heads=2),
    "bf16": lambda: made("LlamaForCausalLM", "fastft", torch.bfloat16, num_key_value_heads=2),
    "bf16 experts": lambda: made(
        "MixtralForCausalLM", "fastft", torch.bfloat16, num_local_experts=4, num_key_value_heads=2
    ),
    "adapters": lambda: get_peft_model(made("LlamaForCausalLM", "fastft"), LoraConfig(target_modules=["q_proj"])),
    "compiled": lambda: torch.compile(made("LlamaForCausalLM", "fastft")),
    "training mode": lambda: made("BertForMaskedLM", "fastft", hidden_dropout_prob=0.5).train(),
}


@pytest.mark.parametrize("name", EXACT)
def test_passes(name):
    assert fastft.check_packing(EXACT[name]()) is None


LEAKS = {
    "our attention helps": (
        opt,
        ["the later ones by", "(attn_implementation='sdpa')", "Way out", ": attn_implementation='fastft'"],
    ),
    "bf16": (lambda: made("BertForMaskedLM", "eager", torch.bfloat16), [": attn_implementation='fastft'"]),
    "adapters": (
        lambda: get_peft_model(opt(), LoraConfig(target_modules=["q_proj"])),
        ["attn_implementation='fastft'"],
    ),
    "positions begin elsewhere": (
        lambda: made("RobertaForMaskedLM", "fastft"),
        ["counts positions from 2, position_ids_start is 0", ": PackingCollator(position_ids_start=2)"],
    ),
    "and bf16": (lambda: made("RobertaForMaskedLM", "fastft", torch.bfloat16), ["counts positions from 2"]),
    "both": (
        lambda: made("RobertaForMaskedLM"),
        ["PackingCollator(position_ids_start=2) and attn_implementation='fastft'"],
    ),
    "own attention code": (bloom, ["fastft.PackingCallback()", "fastft.block_mask(model)", "T x T"]),
    "a recurrence": (
        recurrent("MambaForCausalLM", state_size=8),
        ["MambaMixer: tokens mix without attention", "No way out", "causal-conv1d"],
    ),
    "a convolution that refuses": (
        recurrent("Lfm2ForCausalLM", layer_types=["conv", "full_attention"], num_key_value_heads=2),
        ["raises ValueError for a packed batch", "causal_conv1d", "No way out"],
    ),
    "no way": (
        lambda: made("DebertaV2ForMaskedLM", "eager", relative_attention=True, pos_att_type=["p2c", "c2p"]),
        ["No way out was found: train it on padded batches"],
    ),
    "positions along the row": (
        lambda: made("BartForConditionalGeneration", encoder_layers=1, decoder_layers=1, d_model=32),
        ["No way out"],
    ),
    "experts with a capacity": (
        lambda: made(
            "SwitchTransformersForConditionalGeneration", "eager", d_model=32, d_kv=8, num_layers=2, num_experts=2
        ),
        ["capacity of its experts"],
    ),
}


@pytest.mark.parametrize("name", LEAKS)
def test_says_what_is_wrong_and_what_helps(name):
    make, said = LEAKS[name]
    with pytest.raises(fastft.PackingLeakError) as caught:
        fastft.check_packing(make())
    message = str(caught.value)
    assert all(part in message for part in said), message


def test_one_label_each_where_boundaries_are_dropped_on_the_way():
    model = made("DistilBertForSequenceClassification", "fastft", dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    with fastft.packed_attention(model):
        fastft.check_packing(model)
    with fastft.packed_attention(model), fastft.pool_segments(model):
        fastft.check_packing(model)


def test_the_ways_out_that_it_names_are_ones():
    fastft.check_packing(made("RobertaForMaskedLM", "fastft"), position_ids_start=2)
    model = bloom()
    with fastft.block_mask(model):
        fastft.check_packing(model)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(fastft.PackingLeakError):
        fastft.check_packing(model)


def spoiled(change):
    """A model that is exact, but for what `change` adds to the embeddings (rows, tokens, features)."""
    model = made("LlamaForCausalLM", "fastft", num_key_value_heads=2)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + change(output))
    return model


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x: 1e-3 * x.mean(1, keepdim=True), "move the outputs of the later ones"),
        (lambda x: 1e-2 * nn.functional.pad(x, (0, 0, 1, -1)), "move the outputs of the later ones"),  # one token wide
        (lambda x: 1e-2 * torch.arange(x.shape[1])[:, None] * x, "no sequence sees another"),
        (lambda x: 1e-4 * torch.randn_like(x), None),  # no two runs are equal
    ],
    ids=["mean", "neighbour", "place in the row", "noise"],
)
@pytest.mark.filterwarnings("ignore")
def test_small_leaks_and_noise(change, found):
    leak = find_leak(spoiled(change))
    assert leak is None if found is None else found in leak.what


def count(module, args):
    """A model that writes into a buffer in each forward."""
    module.counted += 1


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()


def state(model):
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "config": (model.config.to_json_string(), model.config._attn_implementation),
    }


@pytest.mark.parametrize("make", [EXACT["training mode"], opt, bloom, LEAKS["positions along the row"][0]])
def test_leaves_no_trace(make):
    model = make().train()
    model.get_input_embeddings().eval()  # one module in another mode
    model.register_buffer("counted", torch.zeros(3))
    model.register_forward_pre_hook(count)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before, random_before = state(model), generators()
    find_leak(model)
    after = state(model)
    assert generators() == random_before and torch.is_grad_enabled()
    for name in ("weights", "gradients", "buffers"):
        assert before[name].keys() == after[name].keys()
        assert all(torch.equal(before[name][key], after[name][key]) for key in before[name])
    for name in ("modes", "hooks", "config"):
        assert before[name] == after[name], name


def test_twice_the_same():
    assert find_leak(opt()) == find_leak(opt())


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: "llama", TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: nn.Linear(3, 3), ValueError, "Linear is no transformers model"),
        (lambda: made("LlamaForCausalLM").to("meta"), ValueError, "meta device"),
        (lambda: made("BlipForConditionalGeneration", "eager"), ValueError, "alone, a text makes it raise"),
    ],
    ids=["text", "linear", "meta", "images"],
)
def test_cannot_be_asked(make, error, said):
    with pytest.raises(error, match=said):
        fastft.check_packing(make())


def test_sharded_weights_are_not_asked():
    model = made("LlamaForCausalLM")
    model.model.layers[0].mlp.up_proj.weight.ds_id = 3
    with pytest.raises(ValueError, match="ZeRO-3"):
        fastft.check_packing(model)
