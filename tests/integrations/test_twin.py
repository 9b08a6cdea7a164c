"""The twin of a model whose weights are elsewhere gets the verdict that the model itself would
get."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.architectures.models import build
from support.architectures.packing_models import PACKED, START, UNPACKED
from support.trainers import tiny_llama

import fastft
from fastft.attention.segments import packed_attention
from fastft.integrations.probe.check_packing import Unasked, find_leak, judge
from fastft.integrations.probe.rows import Batches
from fastft.integrations.probe.twin import MOST, twin_of

pytestmark = pytest.mark.usefixtures("quiet")

MODELS = (*PACKED, *UNPACKED)
# shapes that must fit together otherwise, or experts that are too many: nothing small is like them
UNLIKE = {"bamba", "falcon_h1", "granitemoehybrid", "qwen3_vl", "rwkv"}
QUICK = {"llama", "gemma2", "deepseek_v3", "gpt_oss", "opt", "mpt", "roberta", "qwen3_next"}
CASES = [
    pytest.param(case, marks=() if case.model_type in QUICK else pytest.mark.slow)
    for case in MODELS
]


def said(model, batches):
    """Whether it leaks, the kind of the way out, and what gets attention "fastft"."""
    leak, parts = judge(model, batches, switch=True)
    return leak and (leak.what.partition(" by ")[0], leak.way_out, leak.block_mask), parts


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_twin_of_a_small_model_gets_its_verdict(case):
    model, batches = build(case), Batches(START.get(case.model_type, 0))
    assert said(copy.deepcopy(model).to("meta"), batches) == said(model, batches)


def published(case):
    """The model with the sizes of its default configuration, without weights."""
    small = build(case)
    with torch.device("meta"):
        config = type(small.config)()
        whole = type(small)(config if isinstance(config, small.config_class) else small.config)
    if case.mapping == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    return small, whole


@pytest.mark.parametrize(
    "case",
    # the default configuration of lfm2 has no convolution
    [case for case in CASES if case.values[0].model_type != "lfm2"],
    ids=str,
)
def test_the_twin_of_a_published_size_gets_the_verdict_of_a_small_model(case):
    small, whole = published(case)
    batches = Batches(START.get(case.model_type, 0), max_tokens=64)
    if case.model_type in UNLIKE:
        with pytest.raises(Unasked, match="meta device, and no small twin of it could be made"):
            judge(whole, batches)
        return
    leak, parts = said(whole, batches)
    expected, its_parts = said(small, batches)
    assert (leak is None) == (expected is None) and parts == its_parts
    if leak is not None:
        assert leak[1:] == expected[1:], (leak, expected)


def test_it_is_small_and_has_every_kind_of_layer():
    config = transformers.Gemma3TextConfig()
    with torch.device("meta"):
        whole = transformers.Gemma3ForCausalLM(config)
    twin = twin_of(whole)
    assert type(twin) is transformers.Gemma3ForCausalLM
    assert sum(parameter.numel() for parameter in twin.parameters()) < MOST
    kinds = config.layer_types[:6]  # five windows, then the whole row
    assert twin.config.layer_types == kinds and len(set(kinds)) == 2
    assert len(twin.model.layers) == 6 and len(whole.model.layers) == 26
    for name in ("sliding_window", "head_dim", "rope_parameters", "max_position_embeddings"):
        assert getattr(twin.config, name) == getattr(config, name)
    assert config.vocab_size == 262_208 and config.num_hidden_layers == 26  # the user's own


def test_special_tokens_stay_special_and_apart():
    config = transformers.LlamaConfig(
        vocab_size=150_000, pad_token_id=149_000, eos_token_id=[149_001, 2], bos_token_id=1
    )
    with torch.device("meta"):
        whole = transformers.LlamaForCausalLM(config)
    few = twin_of(whole).config
    found = [few.pad_token_id, *few.eos_token_id, few.bos_token_id]
    assert len(set(found)) == 4 and max(found) < few.vocab_size <= 1024


def test_nothing_is_drawn_for_it():
    model = tiny_llama().to("meta")
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    assert find_leak(model) is None
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


def test_it_is_told_of_segments_where_the_model_is():
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"vocab_size": 131, "ffn_dim": 48, "word_embed_proj_dim": 32}
    fastft.register_attention()
    made = transformers.OPTConfig(**config, attn_implementation="fastft")
    model = transformers.OPTForCausalLM(made).to("meta")
    with packed_attention(model):
        fastft.check_packing(model)


class Elsewhere(transformers.LlamaForCausalLM):
    def __init__(self, config, teacher):
        super().__init__(config)
        self.teacher = teacher


def test_a_class_that_takes_more_than_a_configuration_has_none():
    model = Elsewhere(tiny_llama().config, None).to("meta")
    with pytest.raises(ValueError, match=r"on the meta device, and no small twin .*'teacher'"):
        fastft.check_packing(model)


def test_sharded_weights_are_asked_of_the_twin():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.ds_id = 3
    model.get_input_embeddings().weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    model.set_attn_implementation("fastft")
    fastft.check_packing(model)


def test_hooks_that_a_twin_has_not_are_spoken_of(caplog):
    model = tiny_llama().to("meta")
    model.model.layers[0].register_forward_hook(lambda module, args, output: output)
    loader = SimpleNamespace(collate_fn=fastft.PackingCollator())
    args = SimpleNamespace(n_gpu=1, torch_compile=False)
    transformers.logging.set_verbosity_info()
    transformers.logging.enable_propagation()
    callback = fastft.PackingCallback()
    callback.on_train_begin(args, None, None, model=model, train_dataloader=loader)
    assert callback.probe == "exact" and callback.switched == "sdpa"
    callback.restore()
    assert "asks a twin of LlamaForCausalLM (its parameters are on the meta device), with" in (
        caplog.text
    )
    assert "in its place the packing probe asks a small model of the class" in caplog.text
    transformers.logging.disable_propagation()
