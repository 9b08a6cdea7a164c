"""Trainer with packed batches: PackingCallback, and FusedLossCallback which does the same."""

from __future__ import annotations

import pytest
import torch
import transformers
from numerics import assert_no_worse, terms_of
from support.versions import checkpoint_activations
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastft
from fastft.attention.attention import register_attention
from fastft.attention.check_packing import find_leak
from fastft.integrations import packing

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 131, "pad_token_id": 1}
SIZES |= {"max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0}
LENGTHS = (5, 11, 1, 7, 8, 14, 3, 9)
CALLBACKS = (fastft.PackingCallback, fastft.FusedLossCallback)


@pytest.fixture(autouse=True)
def no_verdicts():
    packing._verdicts.clear()


@pytest.fixture
def said(monkeypatch):
    """The warnings, whatever transformers' verbosity is."""
    warnings = []
    monkeypatch.setattr(packing.logger, "warning", warnings.append)
    return warnings


def made(name="OPTForCausalLM", implementation="sdpa", **changes):
    kind = getattr(transformers, name)
    register_attention()
    config = kind.config_class(**{**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, **changes})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return kind(config)


def examples():
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 131, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": tokens, "labels": tokens, "length": len(tokens)} for tokens in ids]


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values += [logs["loss"]] if "loss" in logs else []


def trained(tmp_path, model, *callbacks, collator=None, **options):
    """The losses of two steps of four examples."""
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, **options}
    args = TrainingArguments(
        str(tmp_path), logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **options
    )
    losses = Losses()
    collator = collator or fastft.PackingCollator()
    trainer = Trainer(model, args, train_dataset=examples(), data_collator=collator, callbacks=[losses, *callbacks])
    trainer.train()
    return losses.values


def padded(tmp_path, model):
    class Pad:
        def __call__(self, features):
            longest = max(len(feature["input_ids"]) for feature in features)
            rows = {"input_ids": 1, "labels": -100}
            batch = {
                key: torch.tensor([f[key] + [fill] * (longest - len(f[key])) for f in features])
                for key, fill in rows.items()
            }
            lengths = torch.tensor([[len(f["input_ids"])] for f in features])
            return {**batch, "attention_mask": (torch.arange(longest) < lengths).long()}

    return trained(tmp_path, model, collator=Pad())


def traces(model):
    hooks = [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()]
    attributes = [name for m in model.modules() for name in ("forward", "_loss_function") if name in m.__dict__]
    return hooks, attributes, model.config._attn_implementation, find_leak(model) is None


@pytest.mark.parametrize("kind", CALLBACKS)
def test_training_on_contaminated_batches_is_refused(kind, tmp_path):
    model = made()
    before, weights = traces(model), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(fastft.PackingLeakError, match=r"Way out.*attn_implementation='fastft'"):
        trained(tmp_path, model, kind())
    assert traces(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", CALLBACKS)
def test_or_only_warned_about(kind, tmp_path, said):
    losses = trained(tmp_path, made(), kind(on_leak="warn"))
    assert len(losses) == 2 and "training on contaminated batches: OPTForCausalLM" in said[0]


OURS = {
    "opt": lambda: made(implementation="fastft"),
    "bloom": lambda: made("BloomForCausalLM", "eager", n_layer=2, n_head=4),  # a block mask
    "mpt": lambda: made("MptForCausalLM", "eager", d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "checkpointed": lambda: checkpoint_activations(made(implementation="fastft")),
}


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize("name", OURS)
def test_packed_losses_are_those_of_padded_batches(name, kind, tmp_path):
    model, other = OURS[name](), OURS[name]()
    before = traces(model)
    ours, stock = torch.tensor(trained(tmp_path, model, kind())), torch.tensor(padded(tmp_path, other))
    assert_no_worse(ours, stock, stock, terms=terms_of(model, sum(LENGTHS)))
    assert traces(model) == before


def test_in_bf16_autocast(tmp_path):
    ours = trained(tmp_path, made(implementation="fastft"), fastft.PackingCallback(), bf16=True)
    stock = padded(tmp_path, made())
    assert ours == pytest.approx(stock, rel=2e-2)
    with pytest.raises(fastft.PackingLeakError):
        trained(tmp_path, made(), fastft.PackingCallback(), bf16=True)


def test_an_evaluation_on_padded_batches_is_stock(tmp_path):
    model = made("BloomForCausalLM", "eager", n_layer=2, n_head=4).eval()
    ids = torch.randint(3, 131, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill_(1, torch.tensor([7, 8]), 0)}
    stock = model(**batch).logits
    callback = fastft.PackingCallback()
    begin(callback, model)
    assert model.config._attn_implementation == "fastft_block_mask"
    assert torch.equal(model(**batch).logits, stock)
    callback.restore()
    callback.restore()
    assert model.config._attn_implementation == "eager"


class Arguments:
    n_gpu = 0
    torch_compile = False


class Wrapped:
    def __init__(self, collator):
        self.data_collator = collator


def begin(callback, model, collator=None, args=Arguments):
    loader = torch.utils.data.DataLoader([0], collate_fn=collator or fastft.PackingCollator())
    callback.on_train_begin(args, None, None, model=model, train_dataloader=loader)


def test_the_probe_runs_once_for_a_configuration(monkeypatch):
    calls = []
    monkeypatch.setattr(packing, "find_leak", lambda *args: calls.append(args) and None)
    for implementation in ("sdpa", "fastft", "sdpa"):
        begin(fastft.PackingCallback(), made(implementation=implementation))
    begin(fastft.PackingCallback(), made(implementation="fastft"), fastft.PackingCollator(position_ids_start=2))
    begin(fastft.PackingCallback(), made(implementation="fastft").to(torch.bfloat16))
    assert len(calls) == 4


def test_the_collator_inside_trainers_wrapper_is_found():
    with pytest.raises(fastft.PackingLeakError):
        begin(fastft.PackingCallback(), made(), Wrapped(Wrapped(fastft.PackingCollator())))


def test_batches_of_other_collators_are_left_alone(said):
    model = made()
    for kind in CALLBACKS:
        begin(kind(), model, transformers.default_data_collator)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert len(said) == 1 and "PackingCallback does nothing" in said[0]


def test_dispatched_batches_are_refused():
    class DataLoaderDispatcher:
        collate_fn = fastft.PackingCollator()

    with pytest.raises(fastft.PackingLeakError, match="dispatch_batches"):
        fastft.PackingCallback().on_train_begin(
            Arguments, None, None, model=made(implementation="fastft"), train_dataloader=DataLoaderDispatcher()
        )


def test_data_parallel_is_refused():
    class Two:
        n_gpu = 2

    with pytest.raises(fastft.PackingLeakError, match="DataParallel"):
        begin(fastft.PackingCallback(), made(implementation="fastft"), args=Two)


def test_a_model_that_cannot_be_asked_is_trained_with_a_warning(said):
    model = made(implementation="fastft")
    nn.Module.to(model, "meta")
    begin(fastft.PackingCallback(), model)
    assert len(said) == 1 and "packing is not checked" in said[0]


@pytest.mark.parametrize("kind", CALLBACKS)
def test_on_leak_is_checked(kind):
    with pytest.raises(ValueError, match="on_leak must be 'error' or 'warn', got 'ignore'"):
        kind(on_leak="ignore")
