"""The probe: what it finds, what it says, and that it leaves no trace."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
import transformers
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from support.versions import checkpoint_activations
from torch import nn

import fastft
from fastft.attention.attention import register_attention
from fastft.integrations.probe.check_packing import find_leak
from fastft.integrations.probe.rows import Batches

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 131,
    "pad_token_id": 1,
}
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
    "one label each, no padding token": lambda: made(
        "LlamaForSequenceClassification", "fastft", pad_token_id=None
    ),
    "experts": lambda: made(
        "MixtralForCausalLM", "fastft", num_local_experts=4, num_key_value_heads=2
    ),
    "no head": lambda: made("LlamaModel", "fastft", num_key_value_heads=2),
    "bf16": lambda: made("LlamaForCausalLM", "fastft", torch.bfloat16, num_key_value_heads=2),
    "bf16 experts": lambda: made(
        "MixtralForCausalLM", "fastft", torch.bfloat16, num_local_experts=4, num_key_value_heads=2
    ),
    "adapters": lambda: get_peft_model(
        made("LlamaForCausalLM", "fastft"), LoraConfig(target_modules=["q_proj"])
    ),
    "compiled": lambda: torch.compile(made("LlamaForCausalLM", "fastft")),
    "training mode": lambda: made("BertForMaskedLM", "fastft", hidden_dropout_prob=0.5).train(),
}


@pytest.mark.parametrize("name", EXACT)
def test_passes(name):
    assert fastft.check_packing(EXACT[name]()) is None


LEAKS = {
    "our attention helps": (
        opt,
        [
            "the later ones by",
            "(attn_implementation='sdpa')",
            "Way out",
            ": attn_implementation='fastft'",
        ],
    ),
    "bf16": (
        lambda: made("BertForMaskedLM", "eager", torch.bfloat16),
        [": attn_implementation='fastft'"],
    ),
    "adapters": (
        lambda: get_peft_model(opt(), LoraConfig(target_modules=["q_proj"])),
        ["attn_implementation='fastft'"],
    ),
    "positions begin elsewhere": (
        lambda: made("RobertaForMaskedLM", "fastft"),
        [
            "counts positions from 2, position_ids_start is 0",
            ": PackingCollator(position_ids_start=2)",
        ],
    ),
    "and bf16": (
        lambda: made("RobertaForMaskedLM", "fastft", torch.bfloat16),
        ["counts positions from 2"],
    ),
    "both": (
        lambda: made("RobertaForMaskedLM"),
        ["PackingCollator(position_ids_start=2) and attn_implementation='fastft'"],
    ),
    "own attention code": (
        bloom,
        ["fastft.PackingCallback()", "fastft.block_mask(model)", "T x T"],
    ),
    "a recurrence": (
        recurrent("MambaForCausalLM", state_size=8),
        ["MambaMixer: tokens mix without attention", "No way out", "causal-conv1d"],
    ),
    "a convolution": (
        recurrent("Lfm2ForCausalLM", layer_types=["conv", "full_attention"], num_key_value_heads=2),
        ["conv", "No way out"],  # older versions leak, and say nothing
    ),
    "no way": (
        lambda: made(
            "DebertaV2ForMaskedLM", "eager", relative_attention=True, pos_att_type=["p2c", "c2p"]
        ),
        ["No way out was found: train it on padded batches"],
    ),
    "positions along the row": (
        lambda: made(
            "BartForConditionalGeneration", encoder_layers=1, decoder_layers=1, d_model=32
        ),
        ["No way out"],
    ),
    "experts with a capacity": (
        lambda: made(
            "SwitchTransformersForConditionalGeneration",
            "eager",
            d_model=32,
            d_kv=8,
            num_layers=2,
            num_experts=2,
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
    model = made(
        "DistilBertForSequenceClassification",
        "fastft",
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
    )
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
    """A model that is exact, but for what `change` adds to the embeddings (rows, tokens,
    features)."""
    model = made("LlamaForCausalLM", "fastft", num_key_value_heads=2)
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output + change(output)
    )
    return model


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x: 1e-3 * x.mean(1, keepdim=True), "move the outputs of the later ones"),
        # one token wide
        (
            lambda x: 1e-2 * nn.functional.pad(x, (0, 0, 1, -1)),
            "move the outputs of the later ones",
        ),
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
    """A model that writes into a buffer in each forward, and thaws a weight."""
    module.counted += 1
    next(module.parameters()).requires_grad_()


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()


def state(model):
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        },
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "config": (model.config.to_json_string(), model.config._attn_implementation),
    }


@pytest.mark.parametrize(
    "make", [EXACT["training mode"], opt, bloom, LEAKS["positions along the row"][0]]
)
def test_leaves_no_trace(make):
    model = make().train()
    model.get_input_embeddings().eval()  # one module in another mode
    model.register_buffer("counted", torch.zeros(3))
    model.register_forward_pre_hook(count)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    next(model.parameters()).requires_grad_(False)
    before, random_before = state(model), generators()
    find_leak(model)
    after = state(model)
    assert generators() == random_before and torch.is_grad_enabled()
    for name in ("weights", "gradients", "buffers"):
        assert before[name].keys() == after[name].keys()
        assert all(torch.equal(before[name][key], after[name][key]) for key in before[name])
    for name in ("trained", "modes", "hooks", "config"):
        assert before[name] == after[name], name


def test_twice_the_same():
    assert find_leak(opt()) == find_leak(opt())


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: "llama", TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: nn.Linear(3, 3), ValueError, "Linear is no transformers model"),
        (
            lambda: made("BlipForConditionalGeneration", "eager"),
            ValueError,
            "alone, a text makes it raise",
        ),
    ],
    ids=["text", "linear", "images"],
)
def test_cannot_be_asked(make, error, said):
    with pytest.raises(error, match=said):
        fastft.check_packing(make())


PROMPTS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16
    ),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("implementation", ["sdpa", "fastft"])
@pytest.mark.parametrize("name", PROMPTS)
def test_virtual_tokens_before_a_row_are_refused_by_name(name, implementation):
    model = get_peft_model(made("LlamaForCausalLM", implementation), PROMPTS[name])
    with pytest.raises(
        fastft.PackingLeakError, match=f"PEFT's {name} puts virtual tokens before each row"
    ):
        fastft.check_packing(model)


def embeddings_changed(model, change):
    """The model with `change(module, embeddings)` added to its embeddings (rows, tokens,
    features)."""
    hook = lambda module, args, output: output + change(module, output)  # noqa: E731
    model.get_input_embeddings().register_forward_hook(hook)
    return model


def exact(**changes):
    return made("LlamaForCausalLM", "fastft", num_key_value_heads=2, **changes)


def mixing_from(tokens):
    """Its tokens see the whole row where that has more than `tokens`."""
    return lambda module, x: x.mean(1, keepdim=True) * (x.shape[1] > tokens)


@pytest.mark.parametrize(
    ("config", "rows", "found"),
    [
        (
            {"max_position_embeddings": 60},
            {},
            "in a row of 61 tokens, longer than its max_position_embeddings of 60",
        ),
        ({"max_position_embeddings": 99999}, {}, None),  # nothing says that 61 tokens are different
        (
            {"max_position_embeddings": 99999},
            {"max_tokens": 61},
            "in a row of 61 tokens: other tokens",
        ),
        ({"max_position_embeddings": 99999}, {"max_tokens": 60}, None),
        (
            {"sliding_window": 40},
            {},
            "longer than its max_position_embeddings of 64, sliding_window of 40",
        ),
        ({"attention_window": [50, 40]}, {"max_tokens": 90}, "in a row of 90 tokens"),
        ({"n_positions": 70, "vision_config": {"window_size": 4000}}, {}, "in a row of 71 tokens"),
    ],
)
def test_a_leak_that_begins_behind_a_limit(config, rows, found):
    model = embeddings_changed(exact(), mixing_from(60))
    for name, value in config.items():
        setattr(model.config, name, value)
    leak = find_leak(model, Batches(**rows))
    assert leak is None if found is None else found in leak.what


def test_the_way_out_of_such_a_leak_is_shorter_rows():
    model = embeddings_changed(exact(), mixing_from(60))
    model.config.max_position_embeddings = 60
    with pytest.raises(
        fastft.PackingLeakError, match=r"tried on this model: rows of at most 60 tokens"
    ):
        fastft.check_packing(model, max_tokens=200)
    fastft.check_packing(model, max_tokens=60)


def gpt_neo():
    sizes = {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 40,
    }
    return made("GPTNeoForCausalLM", "eager", **sizes, bos_token_id=2, eos_token_id=2)


def test_rows_longer_than_a_table_raise_and_it_is_said_before():
    """GPT-Neo looks its causal mask up by the place in the row."""
    model, said = gpt_neo(), "longer than its max_position_embeddings of 64, .*raises RuntimeError"
    with pytest.raises(fastft.PackingLeakError, match=f"{said}.*rows of at most 64 tokens"):
        fastft.check_packing(model, max_tokens=100)
    with pytest.warns(UserWarning, match=f"{said}.*Rows of at most 64 tokens are exact"):
        fastft.check_packing(model)
    fastft.check_packing(model, max_tokens=64)


def test_a_block_mask_and_rows_longer_than_a_table():
    """MPT counts its biases by the place in the row."""
    model = made("MptForCausalLM", "eager", d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    leak = find_leak(model, Batches(max_tokens=100))
    assert leak.block_mask and "rows of at most 64 tokens" in leak.way_out
    leak = find_leak(model)
    assert leak.block_mask and not leak.loud and "max_seq_len of 64" in leak.what


def test_the_long_row_costs_no_logits():
    model, widths = exact(vocab_size=4001), []
    model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    assert find_leak(model, Batches(max_tokens=400)) is None
    assert max(widths) == 31


def test_a_leak_in_training_mode_alone():
    model = embeddings_changed(exact(), lambda module, x: x.mean(1, keepdim=True) * module.training)
    assert "in training mode other tokens" in find_leak(model.eval()).what


def test_dropout_and_checkpointing_in_training_mode_are_no_leak():
    model = made(
        "BertForMaskedLM", "fastft", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5
    )
    checkpoint_activations(model)
    assert find_leak(model.train()) is None


def test_noise_does_not_hide_a_leak():
    model = embeddings_changed(opt(), lambda module, x: torch.randn_like(x))
    assert "move the outputs of the later ones" in find_leak(model).what


def from_other_rows(tokens):
    """Every row sees the others, with the first `tokens` of its tokens."""
    return lambda module, x: (
        x.sum((0, 1)) * (torch.arange(x.shape[1]) < tokens)[:, None] * (len(x) > 1)
    )


def test_noise_of_every_token_could_hide_a_leak():
    assert (
        "for no reason, which could hide a leak"
        in find_leak(embeddings_changed(exact(), from_other_rows(99))).what
    )


def test_noise_of_a_few_tokens_does_not_hide_a_leak():
    """As in a mixture of experts, where a rounding chooses another expert for some tokens."""
    model = opt()
    few = (torch.arange(13) < 2)[None, :, None]
    model.lm_head.register_forward_hook(
        lambda module, args, output: (
            output + output.sum((0, 1)) * few if len(output) > 1 else output
        )
    )
    assert "move the outputs of the later ones" in find_leak(model).what
    model.set_attn_implementation("fastft")
    assert find_leak(model) is None


@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min, 1e9])
def test_masked_logits_do_not_hide_a_leak(value):
    model = opt()

    def mask(module, args, output):
        return output.index_fill(-1, torch.arange(9), value)

    model.lm_head.register_forward_hook(mask)
    assert "move the outputs of the later ones" in find_leak(model).what
    model.set_attn_implementation("fastft")
    assert find_leak(model) is None


def test_a_head_of_zeros_does_not_hide_a_leak():
    model = opt()
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert "move the outputs of the later ones" in find_leak(model).what
    model.set_attn_implementation("fastft")
    assert find_leak(model) is None


def test_outputs_that_are_not_numbers_tell_nothing():
    model = exact()
    nn.init.constant_(model.model.embed_tokens.weight, float("nan"))
    with pytest.raises(ValueError, match="its outputs are not finite, or the same for every token"):
        fastft.check_packing(model)


def test_a_leak_from_row_to_row():
    model = embeddings_changed(
        exact(), lambda module, x: x.mean(0, keepdim=True) * (len(x) > 1) * (x.shape[1] > 25)
    )
    assert find_leak(model) is None
    assert "move the outputs of the later ones" in find_leak(model, Batches(rows=2)).what


@pytest.mark.parametrize("make", [exact, EXACT["an encoder"], EXACT["one label each"]])
def test_rows_and_padding_of_exact_models(make):
    with fastft.packed_attention(model := make()):
        assert find_leak(model, Batches(rows=3, padded=True)) is None
        assert find_leak(model, Batches(rows=2, padded=True, max_tokens=300)) is None


def test_autocast_inside_the_model_is_noticed():
    """As accelerate does it: the outputs are float32, and no closer than bfloat16."""
    model = exact(hidden_size=64, num_hidden_layers=6)
    forward, inside = model.forward, torch.autocast("cpu", torch.bfloat16)
    model.forward = lambda **inputs: inside(forward)(**inputs)
    assert find_leak(model) is None


@pytest.mark.parametrize(
    "argument",
    [
        {"max_tokens": -3},
        {"max_tokens": "8"},
        {"position_ids_start": True},
        {"position_ids_start": -1},
    ],
)
def test_an_argument_out_of_its_range_is_named(argument):
    [(name, value)] = argument.items()
    with pytest.raises(ValueError, match=f"{name} must be an integer from . on, got {value!r}"):
        fastft.check_packing(exact(), **argument)
