"""Trainer with packed batches: PackingCallback, and FusedLossCallback which does the same."""

from __future__ import annotations

import contextlib
import functools
import re

import peft
import pytest
import torch
import transformers
from support.numerics import assert_no_worse, terms_of
from support.versions import checkpoint_activations
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastft
from fastft.attention.attention import register_attention
from fastft.integrations import packing, rows_as_examples
from fastft.integrations.pool_segments import is_pooled
from fastft.integrations.probe import verdicts
from fastft.integrations.probe.check_packing import Verdict, find_leak

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 131,
    "pad_token_id": 1,
}
SIZES |= {"max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0}
LENGTHS = (5, 11, 1, 7, 8, 14, 3, 9)
CALLBACKS = (fastft.PackingCallback, fastft.FusedLossCallback)


@pytest.fixture(autouse=True)
def no_verdicts():
    verdicts._verdicts.clear()


@pytest.fixture
def asked(monkeypatch):
    """The models that the probe, which finds nothing, was given."""
    models = []

    def judge(model, batches, switch):
        models.append(model)
        return Verdict()

    monkeypatch.setattr(verdicts, "judge", judge)
    return models


@pytest.fixture
def said(monkeypatch):
    """The warnings, whatever transformers' verbosity is."""
    warnings = []
    for room in (packing, rows_as_examples, verdicts):
        monkeypatch.setattr(room.logger, "warning", warnings.append)
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
        str(tmp_path),
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    losses = Losses()
    collator = collator or fastft.PackingCollator()
    trainer = Trainer(
        model,
        args,
        train_dataset=examples(),
        data_collator=collator,
        callbacks=[losses, *callbacks],
    )
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
    attributes = [
        name
        for m in model.modules()
        for name in ("forward", "_loss_function")
        if name in m.__dict__
    ]
    return hooks, attributes, model.config._attn_implementation, find_leak(model) is None


@pytest.mark.parametrize("kind", CALLBACKS)
def test_training_on_contaminated_batches_is_refused(kind, tmp_path):
    model = made()
    before, weights = (
        traces(model),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    with pytest.raises(fastft.PackingLeakError, match=r"Way out.*attn_implementation='fastft'"):
        trained(tmp_path, model, kind(attention=False))
    assert traces(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", CALLBACKS)
def test_or_only_warned_about(kind, tmp_path, said):
    losses = trained(tmp_path, made(), kind(on_leak="warn", attention=False))
    assert len(losses) == 2 and "training on contaminated batches: OPTForCausalLM" in said[0]


OURS = {
    "opt": lambda: made(implementation="fastft"),
    "bloom": lambda: made("BloomForCausalLM", "eager", n_layer=2, n_head=4),  # a block mask
    "mpt": lambda: made(
        "MptForCausalLM", "eager", d_model=32, n_layers=2, n_heads=4, max_seq_len=64
    ),
    "checkpointed": lambda: checkpoint_activations(made(implementation="fastft")),
}


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.way("gradient checkpointing", packing="exact"))
        if name == "checkpointed"
        else name
        for name in OURS
    ],
)
def test_packed_losses_are_those_of_padded_batches(name, kind, tmp_path):
    model, other = OURS[name](), OURS[name]()
    before = traces(model)
    ours, stock = (
        torch.tensor(trained(tmp_path, model, kind())),
        torch.tensor(padded(tmp_path, other)),
    )
    assert_no_worse(ours, stock, stock, terms=terms_of(model, sum(LENGTHS)))
    assert traces(model) == before


@pytest.mark.way("bf16 autocast", packing="works")
def test_in_bf16_autocast(tmp_path):
    ours = trained(tmp_path, made(implementation="fastft"), fastft.PackingCallback(), bf16=True)
    stock = padded(tmp_path, made())
    assert ours == pytest.approx(stock, rel=2e-2)
    with pytest.raises(fastft.PackingLeakError):
        trained(tmp_path, made(), fastft.PackingCallback(attention=False), bf16=True)


def test_an_evaluation_on_padded_batches_is_stock(tmp_path):
    model = made("BloomForCausalLM", "eager", n_layer=2, n_head=4).eval()
    ids = torch.randint(3, 131, (2, 9))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids).index_fill_(1, torch.tensor([7, 8]), 0),
    }
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


def test_the_probe_runs_once_for_a_configuration(asked):
    for implementation in ("sdpa", "fastft", "sdpa"):
        begin(fastft.PackingCallback(), made(implementation=implementation))
    begin(
        fastft.PackingCallback(),
        made(implementation="fastft"),
        fastft.PackingCollator(position_ids_start=2),
    )
    begin(fastft.PackingCallback(), made(implementation="fastft").to(torch.bfloat16))
    begin(fastft.PackingCallback(attention=False), made())
    assert len(asked) == 5


def changed(how):
    model = made(implementation="fastft")
    how(model)
    return model


def patched(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


CHANGES = {
    "a value of the configuration": lambda model: setattr(model.config, "attention_dropout", 0.5),
    "a private value of it": lambda model: setattr(
        model.config, "_experts_implementation_internal", "grouped_mm"
    ),
    "an attribute of a layer": lambda model: setattr(
        model.model.decoder.layers[1].self_attn, "is_causal", False
    ),
    "a forward": lambda model: patched(model.model.decoder.layers[1]),
    "a layer of another class": lambda model: model.model.decoder.layers.__setitem__(
        1, nn.Identity()
    ),
    "a layer of another place": lambda model: model.model.decoder.layers.append(
        model.model.decoder.layers[0]
    ),
    "the dtype of one weight": lambda model: model.lm_head.half(),
    "a hook": lambda model: model.lm_head.register_forward_hook(
        lambda module, args, output: output
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_verdict_is_of_this_model(what, asked):
    for how in (lambda model: None, CHANGES[what]):
        begin(fastft.PackingCallback(), changed(how))
    assert len(asked) == 2


def test_a_verdict_is_of_these_batches_adapters_and_precision(asked):
    class Half(Arguments):
        bf16 = True

    def adapted(**options):
        config = peft.LoraConfig(target_modules=["q_proj"], **options)
        return peft.get_peft_model(made(implementation="fastft"), config)

    begin(fastft.PackingCallback(), made(implementation="fastft"))
    for options in ({"rows": 2}, {"pad_to_multiple_of": 8}):
        begin(
            fastft.PackingCallback(),
            made(implementation="fastft"),
            fastft.PackingCollator(**options),
        )
    begin(fastft.PackingCallback(), made(implementation="fastft"), args=Half)
    begin(fastft.PackingCallback(), adapted())
    begin(fastft.PackingCallback(), adapted(use_dora=True))
    begin(fastft.PackingCallback(), adapted(use_dora=True))
    assert len(asked) == 6


def test_the_collator_inside_trainers_wrapper_is_found():
    with pytest.raises(fastft.PackingLeakError):
        begin(
            fastft.PackingCallback(attention=False),
            made(),
            Wrapped(Wrapped(fastft.PackingCollator())),
        )


class Counting:
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, features):
        return self.inner(features)

    def collate(self, features):
        return self(features)


COLLATOR = fastft.PackingCollator()
CALLERS = {
    "attribute": Counting(COLLATOR),
    "method": Counting(COLLATOR).collate,
    "partial": functools.partial(lambda features, inner: inner(features), inner=COLLATOR),
    "closure": (lambda inner: lambda features: inner(features))(COLLATOR),
    "global": lambda features: COLLATOR(features),
    "all": Counting(
        functools.partial(lambda collate, features: collate(features), Counting(COLLATOR).collate)
    ),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_the_collator_inside_what_calls_it_is_found(caller):
    with pytest.raises(fastft.PackingLeakError):
        begin(fastft.FusedLossCallback(attention=False), made(), CALLERS[caller])


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
            Arguments,
            None,
            None,
            model=made(implementation="fastft"),
            train_dataloader=DataLoaderDispatcher(),
        )


@pytest.mark.way("DataParallel", packing="refused")
def test_data_parallel_is_refused():
    class Two:
        n_gpu = 2

    with pytest.raises(fastft.PackingLeakError, match="DataParallel"):
        begin(fastft.PackingCallback(), made(implementation="fastft"), args=Two)


def test_a_model_that_cannot_be_asked_is_trained_with_a_warning(said):
    class OfTwo(type(made())):
        def __init__(self, config, teacher):
            super().__init__(config)

    model = OfTwo(made(implementation="fastft").config, None)
    nn.Module.to(model, "meta")
    begin(fastft.PackingCallback(), model)
    assert len(said) == 1 and "packing is not checked" in said[0]
    assert "no small twin of it could be made" in said[0]


@pytest.mark.parametrize("kind", CALLBACKS)
def test_the_arguments_are_checked(kind):
    with pytest.raises(ValueError, match="on_leak must be 'error' or 'warn', got 'ignore'"):
        kind(on_leak="ignore")
    with pytest.raises(TypeError, match="attention must be True or False, got 'fastft'"):
        kind(attention="fastft")


class Words(nn.Module):
    """No model of transformers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(131, 8)

    def forward(self, input_ids, labels=None, **kwargs):
        return {"loss": self.embed(input_ids).sum()}


def needing_images(model):
    def forward(pixel_values=None, **kwargs):
        raise ValueError("pixel_values are needed")

    model.forward = forward
    return model


UNKNOWN = {
    "not of transformers": (Words, "Words is no transformers model"),
    "images": (
        lambda: needing_images(made(implementation="fastft")),
        "a text makes it raise ValueError.'pixel_values",
    ),
    "prompts": (
        lambda: peft.get_peft_model(
            made(implementation="fastft"),
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        ),
        "PEFT's prompt tuning puts virtual tokens before each row",
    ),
}


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize("name", UNKNOWN)
def test_a_model_that_cannot_be_asked_is_not_trained(name, kind, said):
    make, reason = UNKNOWN[name]
    with pytest.raises(fastft.PackingLeakError, match=reason):
        begin(kind(), make())
    begin(kind(on_leak="warn"), make())
    assert len(said) == 1 and re.search(reason, said[0])


def test_modules_whose_hooks_see_the_probe_are_named(said):
    model, seen = made(implementation="fastft"), []
    hook = model.model.decoder.layers[1].register_forward_hook(lambda *args: seen.append(1))
    begin(fastft.PackingCallback(), model)
    assert len(said) == 1 and "which the forward hooks of model.decoder.layers.1 see too" in said[0]
    assert seen and hook.id in model.model.decoder.layers[1]._forward_hooks
    hook.remove()
    said.clear()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    begin(fastft.PackingCallback(), model)
    handle.remove()
    assert len(said) == 1 and "the forward hooks of every module see too" in said[0]
    said.clear()
    begin(fastft.PackingCallback(), model)
    assert not said


def gpt_neo():
    sizes = {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 40,
    }
    dropouts = {"embed_dropout": 0.0, "resid_dropout": 0.0}
    return made("GPTNeoForCausalLM", "eager", **sizes, **dropouts, bos_token_id=2, eos_token_id=2)


@pytest.mark.parametrize(("max_tokens", "packs"), [(70, 1), (40, 2)])
def test_packs_longer_than_a_position_table_are_refused_before_training(
    max_tokens, packs, tmp_path
):
    """All packs of a batch are one row."""
    data = fastft.pack(examples(), max_tokens=max_tokens)
    args = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, per_device_train_batch_size=packs
    )
    trainer = Trainer(
        gpt_neo(),
        args,
        train_dataset=data,
        data_collator=COLLATOR,
        callbacks=[fastft.PackingCallback()],
    )
    with pytest.raises(
        fastft.PackingLeakError, match=r"max_position_embeddings of 64.*rows of at most 64 tokens"
    ):
        trainer.train()


def test_rows_of_unknown_length_are_warned_of_and_trained(tmp_path, said):
    assert len(trained(tmp_path, gpt_neo(), fastft.PackingCallback())) == 2
    assert len(said) == 1 and "Rows of at most 64 tokens are exact" in said[0]


class Tokenizer:
    def __init__(self, pad, end):
        self.pad_token_id, self.eos_token_id = pad, end


@pytest.mark.parametrize(
    ("counted", "options", "tokens", "found"),
    [
        ("non_padding", {"rows": 2}, (1, 2), "give it pad_token_id=1"),
        ("non_padding", {"rows": 2, "pad_token_id": 1}, (1, 2), None),
        ("non_padding", {"pad_to_multiple_of": 8}, (None, 2), "will count padding"),
        ("non_padding", {}, (1, 2), None),
        ("non_padding", {}, (2, 2), "will leave out every end token"),
        ("all", {"rows": 2}, (2, 2), None),
        ("no", {"rows": 2}, (2, 2), None),
    ],
)
def test_what_the_count_of_tokens_seen_gets_wrong_is_said(counted, options, tokens, found, said):
    class Counted(Arguments):
        include_num_input_tokens_seen = counted

    loader = torch.utils.data.DataLoader([0], collate_fn=fastft.PackingCollator(**options))
    inputs = {"model": made(implementation="fastft"), "processing_class": Tokenizer(*tokens)}
    fastft.PackingCallback().on_train_begin(Counted, None, None, train_dataloader=loader, **inputs)
    assert [found in sentence for sentence in said] == ([] if found is None else [True])


def evaluating(tmp_path, model, callback, **collation):
    """A trainer that has not trained."""
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    return Trainer(
        model,
        args,
        eval_dataset=examples(),
        data_collator=fastft.PackingCollator(**collation),
        callbacks=[callback],
    )


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_packs_mixed_by_an_evaluation_outside_training_are_refused(method, kind, tmp_path):
    trainer = evaluating(tmp_path, made(), kind())
    given = [examples()] if method == "predict" else []
    for _ in range(2):
        with pytest.raises(
            fastft.PackingLeakError, match=r"inside train\(\) alone.*pad_examples=True"
        ):
            getattr(trainer, method)(*given)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_or_only_warned_about_once_an_evaluation(kind, tmp_path, said):
    trainer = evaluating(
        tmp_path, made(), kind("warn") if kind is fastft.PackingCallback else kind(on_leak="warn")
    )
    for count in (1, 2):
        trainer.evaluate()
        assert sum("evaluating on contaminated batches" in warning for warning in said) == count


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize("how", ["attention", "padding", "context"])
def test_an_exact_evaluation_outside_training_goes_on_without_a_word(how, kind, tmp_path, said):
    model = made(implementation="sdpa" if how == "padding" else "fastft")
    trainer = evaluating(tmp_path, model, kind(), pad_examples=how == "padding", pad_token_id=1)
    with fastft.packed_attention(model) if how == "context" else contextlib.nullcontext():
        assert trainer.evaluate()["eval_loss"] > 0
    assert not said


def classifier(**changes):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.LlamaConfig(
        vocab_size=131, pad_token_id=1, num_labels=1, **sizes, **changes
    )
    register_attention()
    config._attn_implementation = "fastft"
    return transformers.LlamaForSequenceClassification(config)


def trainer_of_classifier(model, callback, tmp_path, **options):
    quiet = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=3, **quiet)
    data = [
        {"input_ids": each["input_ids"], "labels": float(n)} for n, each in enumerate(examples())
    ]
    collator = fastft.PackingCollator(task="sequence_classification", pad_token_id=1, **options)
    return Trainer(
        model=model, args=args, train_dataset=data, data_collator=collator, callbacks=[callback()]
    )


@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_classifier_is_pooled_in_a_training_or_refused(callback, tmp_path):
    model = classifier()
    trainer_of_classifier(model, callback, tmp_path).train()
    assert not is_pooled(model)
    stock = model.forward

    @functools.wraps(stock)
    def otherwise(*args, **kwargs):
        output = stock(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.forward = otherwise
    with pytest.raises(ValueError, match=r"Llama.* pools its tokens in a way"):
        trainer_of_classifier(model, callback, tmp_path).train()


def test_a_classifier_that_is_pooled_or_gets_padded_examples_trains(tmp_path):
    trainer_of_classifier(classifier(), fastft.PackingCallback, tmp_path, pad_examples=True).train()
    with fastft.pool_segments(model := classifier()):
        trainer_of_classifier(model, fastft.PackingCallback, tmp_path).train()


@pytest.mark.parametrize("callback", CALLBACKS)
def test_an_evaluation_of_a_classifier_without_pool_segments_is_refused(callback, tmp_path):
    trainer = trainer_of_classifier(classifier(), callback, tmp_path)
    with pytest.raises(ValueError, match=r"call fastft\.pool_segments\(model\)"):
        trainer.evaluate(trainer.train_dataset)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_an_evaluation_whose_router_loss_would_count_padding_is_refused(kind, tmp_path):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sizes |= {
        "num_key_value_heads": 2,
        "vocab_size": 131,
        "num_local_experts": 4,
        "output_router_logits": True,
    }
    config = transformers.MixtralConfig(**sizes)
    config._attn_implementation = "fastft"
    trainer = evaluating(tmp_path, transformers.MixtralForCausalLM(config), kind(), rows=2)
    with pytest.raises(fastft.PackingLeakError, match="padding at the end of a row"):
        trainer.evaluate()
    with fastft.packed_attention(trainer.model):
        trainer.evaluate()
