"""At train begin: an optimizer that would not train what the user meant is told, before anything is
trained."""

from __future__ import annotations

import gc
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.adamw_trainers import arguments, biased_llama, examples

import fastft
from fastft.foreign import engines
from fastft.integrations.optimizer_check import check_optimizer
from fastft.optim import origin
from fastft.optim.adamw import AdamW


def train(model, args, callback=fastft.FusedLossCallback, **options):
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=examples(), callbacks=[callback()], **options
    )
    trainer.train()
    return trainer


def begin(args, model, optimizer, handed=False):
    check_optimizer(args, transformers.TrainerState(), model, optimizer, handed)


def moved(model, before):
    return [
        name for name, param in model.named_parameters() if not torch.equal(param, before[name])
    ]


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.fixture
def said(caplog, monkeypatch):
    """What is logged as a warning by the check."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if "optimizer_check" in r.name]


def resized(model):
    model.resize_token_embeddings(70)


def unfrozen(model):
    model.requires_grad_(True)


def lora(model):
    return pytest.importorskip("peft").get_peft_model(model, lora_config())


def lora_config():
    return pytest.importorskip("peft").LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])


def other_adapter(model):
    model.add_adapter("b", lora_config())
    model.set_adapter("b")


STALE = {
    "embeddings resized": (biased_llama, resized, r"\d+ of the model's \d+ .*: .*lm_head.weight"),
    "layers unfrozen": (
        lambda: frozen_body(),
        unfrozen,
        r"\d+ of the model's \d+ .*layers.0.* and \d+ more",
    ),
    "LoRA added": (biased_llama, lora, "none of the model's 4 trainable parameters"),
    "another adapter set": (
        lambda: lora(biased_llama()),
        other_adapter,
        "none of the model's 4 trainable parameters",
    ),
    "an adapter of another model": (
        biased_llama,
        lambda model: biased_llama(),
        "none of the model's",
    ),
}


def frozen_body():
    model = biased_llama()
    model.model.requires_grad_(False)
    return model


@pytest.mark.way("a model changed after `adamw(model)`", optimizer="refused")
@pytest.mark.parametrize("change", STALE)
def test_a_model_that_changed_after_adamw_is_not_trained_in_part(change, tmp_path):
    make, then, sentence = STALE[change]
    args, model = arguments(tmp_path), make()
    optimizer, _ = fastft.adamw(model, args)
    model = then(model) or model
    with pytest.raises(
        ValueError, match=f"{sentence}.*Make the optimizer when the model is ready.*adamw_spec"
    ):
        begin(args, model, optimizer)
    begin(args, model, fastft.adamw(model, args)[0])


@pytest.mark.parametrize("callback", [fastft.FusedLossCallback, fastft.PackingCallback])
def test_either_callback_asks_before_anything_is_trained(callback, tmp_path):
    args, model = arguments(tmp_path, max_steps=1), frozen_body()
    optimizers = fastft.adamw(model, args)
    model.requires_grad_(True)
    before = weights(model)
    with pytest.raises(
        ValueError, match=r"layers.0.* and [0-9]+ more. Make the optimizer when the model is ready"
    ):
        train(model, args, callback, optimizers=optimizers)
    assert moved(model, before) == []


@pytest.mark.parametrize("change", ["embeddings resized", "another adapter set"])
def test_a_spec_trains_all_of_a_model_that_changed_after_it(change, tmp_path):
    make, then, _ = STALE[change]
    args, model = arguments(tmp_path, max_steps=2, warmup_steps=0), make()
    spec = fastft.adamw_spec(args)
    model = then(model) or model
    before = weights(model)
    train(model, args, optimizer_cls_and_kwargs=spec)
    assert moved(model, before) == [
        name for name, param in model.named_parameters() if param.requires_grad
    ]


CHOSEN = {
    "frozen": lambda model, args: (model.model.requires_grad_(False), fastft.adamw(model, args))[1],
    "groups": lambda model, args: fastft.adamw([{"params": model.lm_head.parameters(), "lr": 0.1}]),
    "parameters and args": lambda model, args: fastft.adamw(model.lm_head.parameters(), args),
    "the class": lambda model, args: (AdamW(model.lm_head.parameters()), None),
    "a module": lambda model, args: fastft.adamw(model.lm_head, args),
}


@pytest.mark.parametrize("how", CHOSEN)
def test_a_part_of_the_model_that_the_user_chose_trains_without_a_word(how, tmp_path, said):
    args, model = arguments(tmp_path), biased_llama()
    optimizer, _ = CHOSEN[how](model, args)
    begin(args, model, optimizer)
    held = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(held) == 1 and held[0] is model.lm_head.weight and said() == []


def test_torchs_own_optimizers_are_none_of_our_business(tmp_path, said):
    args, model = arguments(tmp_path), biased_llama()
    begin(args, model, torch.optim.AdamW(model.parameters()))
    begin(args, model, torch.optim.SGD(model.lm_head.parameters(), lr=1e-3))
    assert said() == []


SETTINGS = {
    "learning_rate": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.5,
    "weight_decay": 0.5,
}
NAMES = {"learning_rate": "lr", "adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_other_values_than_those_of_args_train_only_if_they_were_asked_for(setting, tmp_path):
    name = NAMES.get(setting, setting)
    args, model = arguments(tmp_path), biased_llama()
    stale, _ = fastft.adamw(model, args)
    asked, _ = fastft.adamw(model, args, **{name: 0.25 if name != "betas" else (0.1, 0.2)})
    setattr(args, setting, SETTINGS[setting])
    with pytest.raises(
        ValueError, match=f"fastft.adamw made an optimizer with other values.*{name} .* for .*0.5"
    ):
        begin(args, model, stale)
    begin(args, model, asked)


def test_adamw_without_args_does_not_replace_the_learning_rate_of_args(tmp_path):
    args, model = arguments(tmp_path, max_steps=1, learning_rate=5e-6), biased_llama()
    with pytest.raises(ValueError, match=r"lr 0.001 for 5e-06, betas"):
        begin(args, model, fastft.adamw(model)[0])
    with pytest.raises(
        ValueError,
        match=r"fastft.adamw_spec made an optimizer with other values .*lr 0.001 for 5e-06",
    ):
        train(model, args, optimizer_cls_and_kwargs=fastft.adamw_spec())
    begin(args, model, fastft.adamw(model, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.01)[0])


def test_a_trainer_that_copies_its_args_as_trls_do_is_compared_with_its_copy(tmp_path):
    plain, copied, model = arguments(tmp_path), arguments(tmp_path), biased_llama()

    def made():  # what Trainer makes of the spec
        cls, keywords = spec
        return cls(
            [{"params": list(model.parameters()), "weight_decay": copied.weight_decay}], **keywords
        )

    spec = fastft.adamw_spec(plain)
    begin(copied, model, made())
    copied.learning_rate = 0.125
    with pytest.raises(ValueError, match=r"lr 0.003 for 0.125.*TRL"):
        begin(copied, model, made())
    plain.learning_rate = 0.125
    begin(copied, model, made())
    copied.weight_decay = 0.75  # which Trainer's groups have from its args
    begin(copied, model, made())


def test_a_weight_decay_of_a_spec_without_args_that_trainer_does_not_use_is_told(tmp_path):
    args = arguments(tmp_path, max_steps=1, weight_decay=0.25)
    given = {"lr": args.learning_rate, "betas": (0.9, 0.95)}
    with pytest.raises(
        ValueError, match=r"given weight_decay=0.5, and Trainer made the groups with the 0.25"
    ):
        train(
            biased_llama(),
            args,
            optimizer_cls_and_kwargs=fastft.adamw_spec(weight_decay=0.5, **given),
        )
    train(
        biased_llama(), args, optimizer_cls_and_kwargs=fastft.adamw_spec(weight_decay=0.25, **given)
    )


@pytest.mark.parametrize("way", ["adamw", "adamw_spec"])
def test_a_resumed_run_and_a_second_one_are_not_taken_for_wrong(way, tmp_path, said):
    def run(checkpoint, **changes):
        options = {
            "max_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "warmup_steps": 0,
            **changes,
        }
        args, model = arguments(tmp_path, **options), biased_llama()
        how = {"optimizers": fastft.adamw(model, args)}
        if way == "adamw_spec":
            how = {"optimizer_cls_and_kwargs": fastft.adamw_spec(args)}
        callbacks = [fastft.FusedLossCallback()]
        trainer = transformers.Trainer(
            model=model, args=args, train_dataset=examples(), callbacks=callbacks, **how
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    run(None)
    # the groups are the checkpoint's from here on, with stock as with us
    trainer = run(
        str(tmp_path / "checkpoint-2"),
        max_steps=4,
        learning_rate=0.5,
        weight_decay=0.25,
        adam_beta1=0.5,
    )
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 3e-3
    # Trainer goes on with the optimizer that it has, with stock as with us
    trainer.args.learning_rate = 0.125
    trainer.train()
    assert said() == []


def test_two_clippings_get_a_word(tmp_path, said):
    args, model = arguments(tmp_path, max_steps=1), biased_llama()
    for call in (
        lambda: fastft.adamw(model, args, max_grad_norm=0.5),
        lambda: fastft.adamw_spec(args, max_grad_norm=0.5),
    ):
        with pytest.warns(
            UserWarning, match=r"clipped twice, to 1.0 by Trainer and to 0.5 by the optimizer"
        ):
            call()
    with pytest.warns(UserWarning, match="clipped twice"):
        told, _ = fastft.adamw(model, args, max_grad_norm=0.5)
    begin(args, model, told)
    assert not said()
    made, _ = fastft.adamw(model, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=0.5)
    begin(args, model, made)
    assert (
        len(said()) == 1
        and "gradients are clipped twice, to 1.0 by Trainer's args and to 0.5" in said()[0]
    )


def test_one_clipping_gets_none(tmp_path, said):
    args, model = arguments(tmp_path, max_steps=1, max_grad_norm=0.0), biased_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        begin(args, model, fastft.adamw(model, args, max_grad_norm=0.5)[0])
        args.max_grad_norm = 1.0
        begin(args, model, fastft.adamw(model, args)[0])
    assert said() == []


# Trainer under an engine: objects with the classes' names and modules; test_deepspeed.py has the
# real ones


def deepspeed_class(name, **attributes):
    return type(name, (), {"__module__": "deepspeed.runtime.zero", **attributes})


def under_deepspeed(inner):
    """What `trainer.optimizer` is under ZeRO: accelerate's wrapper, DeepSpeed's, and the
    optimizer."""
    return SimpleNamespace(optimizer=deepspeed_class("DeepSpeedZeroOptimizer", optimizer=inner)())


def test_an_optimizer_that_deepspeed_dropped_is_told(tmp_path):
    args, model = arguments(tmp_path), biased_llama()
    fastft.adamw(model, args)  # as Trainer does, nobody keeps it
    gc.collect()
    theirs = torch.optim.AdamW(model.parameters())
    with pytest.raises(
        ValueError,
        match=(
            r"fastft.adamw made an optimizer for this model, but torch.optim.adamw.AdamW "
            r"trains.*adamw_spec"
        ),
    ):
        begin(args, model, under_deepspeed(theirs))


@pytest.mark.parametrize("callback", [fastft.FusedLossCallback(), fastft.PackingCallback()])
def test_an_optimizer_made_by_hand_that_deepspeed_dropped_is_told(callback, tmp_path):
    args, model = arguments(tmp_path), biased_llama()
    ours, theirs = AdamW(model.parameters()), torch.optim.AdamW(model.parameters())
    data = {"train_dataset": examples(), "callbacks": [callback]}
    transformers.Trainer(model, args, optimizers=(ours, None), **data)
    with pytest.raises(
        ValueError, match=r"was given a fastft.AdamW, but torch.optim.adamw.AdamW trains: DeepSpeed"
    ):
        begin(args, model, under_deepspeed(theirs), callback._handed is args)
    begin(args, model, theirs, callback._handed is args)
    args = arguments(tmp_path)
    transformers.Trainer(model, args, optimizers=(theirs, None), **data)
    begin(args, model, under_deepspeed(theirs), callback._handed is args)


def test_an_optimizer_that_stage_0_dropped_is_told(tmp_path, monkeypatch):
    """Where no class of DeepSpeed is around the one that trains."""
    args, model = arguments(tmp_path), biased_llama()
    theirs = SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters()))
    begin(args, model, theirs, True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"was given a fastft.AdamW, but .* DeepSpeed drops ours"):
        begin(args, model, theirs, True)


@pytest.mark.parametrize("with_args", [True, False])
def test_a_spec_that_deepspeeds_own_optimizer_displaced_is_told(with_args, tmp_path, said):
    args, model = arguments(tmp_path), biased_llama()
    spec = fastft.adamw_spec(args if with_args else None)
    theirs = torch.optim.AdamW(model.parameters())
    with pytest.raises(
        ValueError,
        match=r'fastft.adamw_spec made .* for this Trainer.*remove the section "optimizer"',
    ):
        begin(args, model, under_deepspeed(theirs))
    if with_args:
        begin(arguments(tmp_path), model, under_deepspeed(theirs))  # another Trainer's
    else:
        begin(args, model, theirs)  # perhaps another Trainer's
    assert said() == []
    del spec
    gc.collect()
    begin(args, model, under_deepspeed(theirs))


def test_an_optimizer_that_a_trainer_of_ones_own_ignores_gets_a_word(tmp_path, said):
    class Own(transformers.Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
            return self.optimizer

    args, model = arguments(tmp_path, max_steps=1), biased_llama()
    callbacks, spec = [fastft.FusedLossCallback()], fastft.adamw_spec(args)
    Own(
        model, args, train_dataset=examples(), callbacks=callbacks, optimizer_cls_and_kwargs=spec
    ).train()
    assert len(said()) == 1 and "for this Trainer, but torch.optim.sgd.SGD trains" in said()[0]


def test_a_model_that_was_trained_with_ours_may_be_trained_with_another_one(tmp_path, said):
    args, model = arguments(tmp_path, max_steps=1), biased_llama()
    spec = fastft.adamw_spec(args)
    train(model, args, optimizers=fastft.adamw(model, args))
    train(model, args, optimizer_cls_and_kwargs=spec)
    train(model, args)
    begin(args, model, under_deepspeed(torch.optim.AdamW(model.parameters())))
    assert said() == []


def test_what_is_remembered_of_a_model_goes_with_it(tmp_path):
    model = biased_llama()
    fastft.adamw(model, arguments(tmp_path))
    assert model in origin.of_models
    count = len(origin.of_models)
    del model
    gc.collect()
    assert len(origin.of_models) < count


def test_flat_parameters_are_not_looked_for_in_the_model(tmp_path, said):
    args, model = arguments(tmp_path), biased_llama()
    _, keywords = fastft.adamw_spec(args)
    flat = AdamW([torch.zeros(8, requires_grad=True)], **keywords)
    begin(args, model, under_deepspeed(flat))
    assert said() == []
    flat.max_grad_norm = 0.5
    with pytest.raises(ValueError, match=r"each process's part of the gradients.*DeepSpeed"):
        begin(args, model, under_deepspeed(flat))


@pytest.mark.parametrize("decoupled", [True, False])
def test_deepspeeds_adam_in_the_place_of_ours_is_told_and_must_decouple_its_decay(
    decoupled, tmp_path, said
):
    args, model = arguments(tmp_path), biased_llama()
    ours = AdamW(model.parameters())
    cpu_adam = deepspeed_class(
        "DeepSpeedCPUAdam", param_groups=ours.param_groups, adam_w_mode=decoupled
    )()
    if decoupled:
        begin(args, model, under_deepspeed(cpu_adam))
        assert (
            len(said()) == 1
            and "DeepSpeedCPUAdam trains in the place of fastft's AdamW" in said()[0]
        )
    else:
        with pytest.raises(ValueError, match="its weight decay is L2, not decoupled"):
            begin(args, model, under_deepspeed(cpu_adam))


def with_deepspeed(args, **config):
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config=config)
    return args


OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
ENGINES = {
    "deepspeed of args": lambda args, env: setattr(
        args, "deepspeed", {"zero_optimization": {"stage": 1}}
    ),
    "deepspeed plugin": lambda args, env: with_deepspeed(args),
    "accelerate launch with deepspeed": lambda args, env: env.setenv(
        "ACCELERATE_USE_DEEPSPEED", "true"
    ),
    "fsdp of args": lambda args, env: setattr(args, "fsdp", True),
    "accelerate launch with fsdp": lambda args, env: env.setenv("ACCELERATE_USE_FSDP", "true"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_adamw_names_adamw_spec_where_trainer_takes_no_optimizer(engine, tmp_path, monkeypatch):
    args, model = arguments(tmp_path), biased_llama()
    ENGINES[engine](args, monkeypatch)
    name = "FSDP" if "fsdp" in engine else "DeepSpeed"
    for what in (model, model.parameters()):
        with pytest.raises(
            ValueError,
            match=rf"{name} trains here.*optimizer_cls_and_kwargs=fastft.adamw_spec\(args\)",
        ):
            fastft.adamw(what, args)
    fastft.adamw_spec(args)
    fastft.adamw(model)  # a loop of one's own: accelerate takes it


LOST = {
    "rounding": "kahan",
    "moments": "8bit",
    "max_grad_norm": 1.0,
    "amsgrad": True,
    "maximize": True,
    "impl": "eager",
}


@pytest.mark.parametrize("name", LOST)
def test_what_deepspeeds_adam_does_not_have_is_refused_under_offload(name, tmp_path, monkeypatch):
    args = with_deepspeed(arguments(tmp_path), **OFFLOAD)
    given, sentence = (
        {name: LOST[name]},
        rf"{name}.*(zero_force_ds_cpu_optimizer|TrainingArguments\(max_grad_norm)",
    )
    with pytest.raises(ValueError, match=sentence):
        fastft.adamw_spec(args, **given)
    free = with_deepspeed(arguments(tmp_path), **OFFLOAD, zero_force_ds_cpu_optimizer=False)
    nothing = with_deepspeed(
        arguments(tmp_path), zero_optimization={"offload_optimizer": {"device": "none"}}
    )
    for kept in (free, nothing):
        if name != "max_grad_norm":
            fastft.adamw_spec(kept, **given)
    # a spec without args, or an Accelerate loop: only the running engine knows
    monkeypatch.setattr(engines, "optimizers_are_replaced", lambda: True)
    with pytest.raises(
        ValueError, match=f"DeepSpeedCPUAdam .*{name}=.*zero_force_ds_cpu_optimizer"
    ):
        AdamW([torch.zeros(4, 4)], **given)
    AdamW([torch.zeros(4, 4)], seed=1, capturable=True, fused=True)
    if name in ("moments", "amsgrad", "maximize"):
        with pytest.raises(ValueError, match=f"{name}="):
            AdamW([{"params": torch.zeros(4, 4), name: LOST[name]}])


def test_plain_adamw_survives_offload_and_an_optimizer_of_deepspeeds_own_does_not_pass(tmp_path):
    args = with_deepspeed(arguments(tmp_path), **OFFLOAD)
    fastft.adamw_spec(args, eps=1e-6, capturable=True)
    args.deepspeed_plugin.deepspeed_config["optimizer"] = {"type": "AdamW"}
    with pytest.raises(ValueError, match='remove the section "optimizer"'):
        fastft.adamw_spec(args)


def test_clipping_is_refused_where_the_running_engine_cuts_gradients_into_parts(monkeypatch):
    monkeypatch.setattr(engines, "gradients_are_parts", lambda: True)
    AdamW([torch.zeros(4, 4)])
    with pytest.raises(ValueError, match=r"each process's part .*Accelerator.clip_grad_norm_"):
        AdamW([torch.zeros(4, 4)], max_grad_norm=1.0)


def test_the_running_engine_is_asked_only_where_accelerate_has_started_one():
    accelerate = pytest.importorskip("accelerate")
    assert not engines.optimizers_are_replaced()
    accelerate.Accelerator(cpu=True)
    assert not engines.optimizers_are_replaced()
    assert not engines.gradients_are_parts()


def test_step_says_once_that_nothing_has_a_gradient():
    params = [torch.zeros(3, requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
    optimizer = AdamW(params)
    with pytest.warns(UserWarning, match="no gradient in any of the optimizer's 2 parameters"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        params[0].grad = torch.ones(3)
        optimizer.step()
        params[0].grad = None
        optimizer.step()


def test_step_says_nothing_where_gradients_only_pause():
    param = torch.zeros(3, requires_grad=True)
    optimizer = AdamW([param])
    param.grad = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        param.grad = None
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["optimizers", "spec", "optimizers of a model with adapters"])
def test_trl_with_an_adapter_of_its_own_trains_it_or_says_that_it_would_not(way, tmp_path):
    """SFTTrainer adds LoRA after the optimizer was made, and makes an SFTConfig of a plain
    TrainingArguments."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    args, model = arguments(tmp_path, max_steps=2, warmup_steps=0), biased_llama()
    rows = [
        {"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()}
        for row in examples()
    ]
    options = {"peft_config": lora_config(), "callbacks": [fastft.FusedLossCallback()]}
    if way == "optimizers of a model with adapters":
        model = peft.get_peft_model(model, options.pop("peft_config"))
    if way == "spec":
        options["optimizer_cls_and_kwargs"] = fastft.adamw_spec(args)
    else:
        options["optimizers"] = fastft.adamw(model, args)
    data = pytest.importorskip("datasets").Dataset.from_list(rows)
    trainer = trl.SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=byte_tokenizer(), **options
    )
    before = weights(trainer.model)
    if way == "optimizers":
        with pytest.raises(
            ValueError, match=r"none of the model's 4 trainable parameters.*TRL adds them itself"
        ):
            trainer.train()
        return
    trainer.train()
    trainable = [name for name, param in trainer.model.named_parameters() if param.requires_grad]
    assert moved(trainer.model, before) == trainable and len(trainable) == 4
    assert (
        trainer.args is not args
        and trainer.optimizer.param_groups[0]["initial_lr"] == args.learning_rate
    )


def byte_tokenizer():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1, "[UNK]": 2}, "[UNK]"))
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def test_a_second_training_starts_from_the_weights_that_others_wrote_between(tmp_path):
    """As an average of weights does through `.data`, which torch does not count: the low bits are
    not theirs."""
    model = biased_llama().to(torch.bfloat16)
    args = arguments(tmp_path, max_steps=2, learning_rate=1e-2)
    optimizer, _ = fastft.adamw(model, args)
    trainer = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=examples(),
        optimizers=(optimizer, None),
        callbacks=[fastft.FusedLossCallback()],
    )
    trainer.train()
    matrices = [param for param in model.parameters() if param.ndim > 1]
    assert all(optimizer.state[param]["remainder"].any() for param in matrices)
    for param in matrices:
        param.data.copy_(torch.randn_like(param))
    remainders = []

    class Look(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            remainders.extend(optimizer.state[param]["remainder"].clone() for param in matrices)

    trainer.add_callback(Look())
    with pytest.warns(UserWarning, match="written"):
        trainer.train()
    assert remainders and not any(map(torch.any, remainders))


def test_a_spec_that_another_trainer_has_made_its_optimizer_of_is_not_one_dropped_here():
    kind, keywords = fastft.adamw_spec(lr=1e-3)
    assert keywords["_origin"] in origin.of_specs
    made = kind([torch.nn.Parameter(torch.ones(2))], **keywords)
    assert made.origin is keywords["_origin"] and made.origin not in origin.of_specs
