"""The callbacks give a model attention "fastft" for a training on packed batches, where that is
exact, and put back what it had."""

from __future__ import annotations

import json
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from support.trainers import quiet_arguments, tiny_llama
from torch.utils.data import DataLoader
from transformers import AttentionInterface, Trainer, TrainerCallback

import fastft
from fastft.integrations import packing
from fastft.integrations.implementations import attention_configs

CALLBACKS = (fastft.PackingCallback, fastft.FusedLossCallback)
ROWS = [
    {"input_ids": ids, "labels": ids}
    for n, length in enumerate((9, 4, 7, 2, 6, 5, 8, 3))
    for ids in [torch.arange(3 + n, 3 + n + 5 * length, 5).tolist()]
]
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
OPT = {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "pad_token_id": 1}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
SEQ2SEQ = {"task": "seq2seq", "decoder_start_token_id": 0}


def made(name, implementation, **sizes):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes))
    for config in attention_configs(model):
        config._attn_implementation = implementation
    return model.train()


def llama(implementation="sdpa"):
    return tiny_llama(attn_implementation=implementation)


def opt(implementation="sdpa"):
    """A model that mixes packed sequences with either stock attention."""
    return made("OPTForCausalLM", implementation, **OPT)


def named(model):
    """What all configurations inside a model name, in their order."""
    return [config._attn_implementation for config in attention_configs(model)]


class Seen(TrainerCallback):
    """Keeps the attention that the model has in each step, and does `then` in it."""

    def __init__(self, then=lambda: None):
        self.names, self.then = [], then

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.names.append(model.config._attn_implementation)
        self.then()


def trainer_of(folder, model, *callbacks, collator=None, evaluated=None, **options):
    sizes = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    return Trainer(
        model,
        quiet_arguments(folder, **{**sizes, **options}),
        train_dataset=ROWS,
        eval_dataset=evaluated,
        data_collator=collator or fastft.PackingCollator(),
        callbacks=list(callbacks),
    )


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def pad(rows):
    longest = max(len(row["labels"]) for row in rows)
    filled = {
        key: torch.tensor([row["labels"] + [fill] * (longest - len(row["labels"])) for row in rows])
        for key, fill in (("input_ids", 0), ("labels", -100))
    }
    return {**filled, "attention_mask": (filled["labels"] != -100).long()}


def begin(callback, model, collator=None, n_gpu=0, torch_compile=False):
    """What Trainer does with a callback when a training begins."""
    loader = DataLoader([0], collate_fn=collator or fastft.PackingCollator())
    args = SimpleNamespace(n_gpu=n_gpu, torch_compile=torch_compile)
    callback.on_train_begin(args, object(), None, model=model, train_dataloader=loader)
    return callback


@pytest.mark.parametrize(
    ("make", "implementation", "kind"),
    [
        (llama, "sdpa", fastft.FusedLossCallback),
        (llama, "eager", fastft.PackingCallback),
        (opt, "sdpa", fastft.PackingCallback),
        (opt, "eager", fastft.FusedLossCallback),
    ],
)
def test_stock_attention_is_switched_and_losses_are_those_of_padded_batches(
    make, implementation, kind, tmp_path
):
    model, callback, seen = make(implementation), kind(), Seen()
    losses = losses_of(trainer_of(tmp_path, model, callback, seen))
    assert seen.names == ["fastft"] * 2 and callback.switched == implementation
    assert set(named(model)) == {implementation}
    stock = losses_of(trainer_of(tmp_path, make(implementation), collator=pad))
    assert losses == pytest.approx(stock, rel=1e-5)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_it_is_said(kind, monkeypatch):
    said = []
    monkeypatch.setattr(packing.logger, "info", said.append)
    begin(kind(), llama("eager")).restore()
    assert said == [
        "fastft: LlamaForCausalLM has attention 'fastft', not eager, until the training's end"
    ]


@pytest.mark.parametrize("kind", CALLBACKS)
def test_an_argument_leaves_it_alone(kind, tmp_path):
    model, callback, seen = llama(), kind(attention=False), Seen()
    trainer_of(tmp_path, model, callback, seen).train()
    assert seen.names == ["sdpa"] * 2 and callback.switched is None


@pytest.fixture
def chosen():
    """A user's own attention, under a name of its own."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register("chosen", sdpa_attention_forward)
    AttentionMaskInterface.register("chosen", sdpa_mask)
    yield "chosen"
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping["chosen"]


@pytest.mark.parametrize("kind", CALLBACKS)
def test_what_the_user_chose_stays(kind, chosen):
    for implementation in (chosen, "fastft"):
        model = llama(implementation)
        callback = begin(kind(), model)
        assert set(named(model)) == {implementation} and callback.switched is None
        callback.restore()


@pytest.mark.parametrize("kind", CALLBACKS)
def test_and_is_refused_where_it_mixes_sequences(kind, chosen):
    with pytest.raises(fastft.PackingLeakError, match=r"attn_implementation='chosen'"):
        begin(kind(), opt(chosen))


@pytest.mark.parametrize(
    ("kind", "error"),
    [(fastft.PackingCallback, RuntimeError), (fastft.FusedLossCallback, KeyboardInterrupt)],
)
@pytest.mark.parametrize("end", ["restored", "gone", "another training"])
def test_after_an_exception(end, error, kind, tmp_path):
    def stop():
        raise error

    model, callback = llama(), kind()
    trainer = trainer_of(tmp_path, model, callback, Seen(stop))
    with pytest.raises(error):
        trainer.train()
    assert set(named(model)) == {"fastft"}  # Trainer calls no callback
    if end == "restored":
        callback.restore()
    elif end == "gone":
        del trainer, callback
    else:
        seen = Seen()
        trainer_of(tmp_path, model, fastft.PackingCallback(attention=False), seen).train()
        assert seen.names == ["sdpa"] * 2
    assert set(named(model)) == {"sdpa"}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_two_trainings_one_after_the_other(kind, tmp_path):
    model, callback, seen = llama(), kind(), Seen()
    trainer = trainer_of(tmp_path, model, callback, seen)
    for count in (2, 4):
        trainer.train()
        assert seen.names == ["fastft"] * count and set(named(model)) == {"sdpa"}


@pytest.mark.parametrize("first", CALLBACKS)
def test_both_callbacks_in_one_training(first, tmp_path):
    model, seen = llama(), Seen()
    callbacks = sorted((kind() for kind in CALLBACKS), key=lambda each: type(each) is not first)
    trainer_of(tmp_path, model, *callbacks, seen).train()
    assert seen.names == ["fastft"] * 2 and set(named(model)) == {"sdpa"}


def test_a_training_that_begins_anew_forgets_nothing():
    """As auto_find_batch_size does it, without an end."""
    model, callback = llama("eager"), fastft.PackingCallback()
    begin(callback, model)
    begin(callback, model)
    assert set(named(model)) == {"fastft"} and callback.switched == "eager"
    callback.restore()
    assert set(named(model)) == {"eager"}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_what_is_saved_is_what_stock_saves(kind, tmp_path):
    def saved(folder, *callbacks):
        trainer = trainer_of(folder, llama(), *callbacks, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model(f"{folder}/end")
        return [
            json.loads((folder / place / "config.json").read_text())
            for place in ("checkpoint-1", "checkpoint-2", "end")
        ]

    assert saved(tmp_path / "ours", kind()) == saved(
        tmp_path / "stock", fastft.PackingCallback(attention=False)
    )
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-1")
    assert again.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_evaluation_on_padded_batches_inside_a_training(implementation, tmp_path):
    def losses(attention):
        callback = fastft.PackingCallback(attention=attention)
        collator = fastft.PackingCollator(pad_examples=True, pad_token_id=0)
        options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}
        trainer = trainer_of(
            tmp_path, llama(implementation), callback, collator=collator, evaluated=ROWS, **options
        )
        trainer.train_dataset = fastft.pack(ROWS, 20)
        trainer.train()
        assert (callback.switched is not None) is attention
        return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

    assert len(stock := losses(False)) == 2
    assert losses(True) == pytest.approx(stock, rel=1e-5)


def t5(encoder, decoder):
    """A model whose parts have attention of their own."""
    model = made("T5ForConditionalGeneration", "sdpa", **T5)
    model.encoder.config._attn_implementation_internal = encoder
    model.decoder.config._attn_implementation_internal = decoder
    return model


@pytest.mark.parametrize(("encoder", "decoder"), [("eager", "sdpa"), ("fastft", "eager")])
def test_encoder_and_decoder_go_back_to_what_each_had(encoder, decoder, tmp_path):
    model, callback, names = t5(encoder, decoder), fastft.PackingCallback(), []
    seen = Seen(lambda: names.append(named(model)))
    trainer = trainer_of(
        tmp_path, model, callback, seen, collator=fastft.PackingCollator(**SEQ2SEQ)
    )
    losses = losses_of(trainer)
    assert names == [["fastft"] * 3] * 2 and named(model) == ["sdpa", encoder, decoder]
    assert callback.switched == ", ".join(sorted({"sdpa", encoder, decoder} - {"fastft"}))
    stock = losses_of(trainer_of(tmp_path, t5("eager", "eager"), collator=pad))
    assert losses == pytest.approx(stock, rel=1e-5)


def test_all_parts_stay_where_one_of_the_users_mixes_sequences(chosen):
    model = t5("eager", chosen)
    with pytest.raises(fastft.PackingLeakError, match="does not keep packed sequences apart"):
        begin(fastft.PackingCallback(), model, fastft.PackingCollator(**SEQ2SEQ))
    assert named(model) == ["sdpa", "eager", chosen]


def test_a_tower_for_images_stays_as_it_is():
    """A text does not reach it, so that nothing is known of it."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = {"vocab_size": 97, "num_key_value_heads": 1, "head_dim": 16, **sizes}
    model = made(
        "Gemma3ForConditionalGeneration",
        "sdpa",
        text_config=text,
        vision_config={"image_size": 16, "patch_size": 8, **sizes},
        mm_tokens_per_image=4,
        **{"image_token_id": 90, "boi_token_id": 91, "eoi_token_id": 92},
    )
    callback = begin(fastft.PackingCallback(), model.eval())
    assert model.get_submodule("model.vision_tower").config._attn_implementation == "sdpa"
    assert model.get_submodule("model.language_model").config._attn_implementation == "fastft"
    callback.restore()
    assert set(named(model)) == {"sdpa"}


@pytest.mark.parametrize("make", [llama, opt])
def test_a_model_with_adapters(make, tmp_path):
    def adapted():
        torch.manual_seed(1)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        return peft.get_peft_model(make(), config)

    model, seen = adapted(), Seen()
    losses = losses_of(trainer_of(tmp_path, model, fastft.FusedLossCallback(), seen))
    assert seen.names == ["fastft"] * 2 and set(named(model)) == {"sdpa"}
    stock = losses_of(trainer_of(tmp_path, adapted(), collator=pad))
    assert losses == pytest.approx(stock, rel=1e-5)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_padded_batches_touch_nothing(kind, tmp_path):
    model, callback, seen = llama(), kind(), Seen()
    trainer_of(tmp_path, model, callback, seen, collator=pad).train()
    assert seen.names == ["sdpa"] * 2 and callback.switched is None


def test_padded_batches_after_packed_ones(tmp_path):
    callback = fastft.FusedLossCallback()
    begin(callback, llama()).restore()
    assert callback.switched == "sdpa"
    begin(callback, llama(), pad).restore()
    assert callback.switched is None


def not_exact_with_ours(change):
    """A model that packed sequences leave exact, but for what `change` adds to its embeddings with
    our attention."""
    model = llama()
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, x: (
            x + change(x) if model.config._attn_implementation == "fastft" else x
        )
    )
    return model


def too_long(x):
    assert x.shape[1] < 100, "too long"
    return 0 * x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change", [lambda x: x.mean(1, keepdim=True), too_long], ids=["leaks", "raises in long rows"]
)
def test_a_model_that_is_exact_as_it_is_alone_stays_so(change):
    model = not_exact_with_ours(change)
    callback = begin(fastft.PackingCallback(), model)
    assert set(named(model)) == {"sdpa"} and callback.switched is None and callback._apart
    callback.restore()


def test_where_no_attention_takes_long_rows_ours_is_taken(monkeypatch):
    said, model = [], opt()
    monkeypatch.setattr(packing.logger, "warning", said.append)
    model.get_input_embeddings().register_forward_hook(lambda module, args, x: x + too_long(x))
    model.config.max_position_embeddings = 128
    callback = begin(fastft.PackingCallback(), model)
    assert "too long" in said[-1] and "Shorter rows are exact" in said[-1]
    assert callback.switched == "sdpa"
    callback.restore()


REFUSED = {
    "attention code of its own": ("BloomForCausalLM", {"n_layer": 1, "n_head": 4}),
    "a recurrence": ("MambaForCausalLM", {"state_size": 8}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_treated_as_without_it(name):
    kind, sizes = REFUSED[name]
    outcomes = []
    for attention in (True, False):
        model = made(kind, "eager", **{**SMALL, **sizes})
        try:
            callback = begin(fastft.PackingCallback(attention=attention), model)
            outcomes.append(named(model))
            callback.restore()
        except fastft.PackingLeakError as leak:
            outcomes.append(str(leak))
        assert named(model) == ["eager"]
    assert outcomes[0] == outcomes[1]


def compiled_layer(model):
    model.model.layers[0].compile()
    return model


@pytest.mark.parametrize("compiled", [torch.compile, compiled_layer], ids=["whole", "a layer"])
def test_a_compiled_model_keeps_its_graph(compiled):
    model = compiled(llama())
    callback = begin(fastft.PackingCallback(), model)
    assert set(named(model)) == {"sdpa"} and callback.switched is None
    callback.restore()


def test_a_model_that_trainer_will_compile_keeps_its_graph(tmp_path):
    """accelerate compiles a wrapper of the model, of which the model itself knows nothing."""
    callback, seen = fastft.PackingCallback(), Seen()
    model = llama()
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1}
    trainer_of(tmp_path, model, callback, seen, **options).train()
    assert seen.names == ["sdpa"] and callback.switched is None


@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_model_that_returns_its_attentions_does_so(kind, tmp_path):
    """transformers saves no configuration that asks for them with another attention than eager."""
    model = tiny_llama(attn_implementation="eager", output_attentions=True)
    callback, returned = kind(), []
    model.register_forward_hook(lambda module, args, output: returned.append(output["attentions"]))
    saved = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, model, callback, **saved).train()
    assert all(len(attentions) == 1 for attentions in returned) and callback.switched is None
    assert (tmp_path / "checkpoint-2" / "config.json").exists()


@pytest.mark.parametrize("kind", CALLBACKS)
def test_another_training_of_the_model_inside_a_training_is_the_end_of_both(kind, tmp_path):
    """The outer training would go on with what the model had: sequences that see each other."""
    model = opt()
    other = trainer_of(tmp_path / "inner", model, kind())
    once = iter([other.train])
    outer = trainer_of(tmp_path, model, kind(), Seen(lambda: next(once, lambda: None)()))
    with pytest.raises(fastft.PackingLeakError, match="another training of the model has begun"):
        outer.train()
    assert set(named(model)) == {"sdpa"}


def test_batches_that_are_cut_anyway_keep_the_attention():
    model = llama()
    callback = begin(fastft.PackingCallback("warn"), model, n_gpu=2)
    assert set(named(model)) == {"sdpa"}
    callback.restore()


def test_a_model_that_is_exact_with_ours_is_not_asked_twice():
    def forwards(attention):
        model, count = llama(), []
        model.register_forward_pre_hook(lambda module, args: count.append(1))
        begin(fastft.PackingCallback(attention=attention), model).restore()
        return len(count)

    assert 0 < forwards(True) <= forwards(False)


def test_a_training_that_goes_on_with_a_warning_is_warned_of_once(caplog):
    callback = begin(fastft.PackingCallback("warn"), llama())
    loader = DataLoader([0], collate_fn=fastft.PackingCollator())
    callback.on_step_begin(None, None, None, train_dataloader=loader)
    assert "contaminated" not in caplog.text
    callback.restore()
    for _ in range(3):
        callback.on_step_begin(None, None, None, train_dataloader=loader)
    assert caplog.text.count("training on contaminated batches") == 1
