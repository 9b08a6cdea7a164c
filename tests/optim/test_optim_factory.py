from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from support.adamw_trainers import arguments, biased_llama, examples

import fastft
from fastft.optim.adamw import AdamW
from fastft.optim.factory import adamw, adamw_spec


class Recorder(transformers.TrainerCallback):
    """Keeps the parameters after every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append([param.detach().clone() for param in model.parameters()])


def run(args, model, checkpoint=None, **options):
    recorder = Recorder()
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=examples(), callbacks=[recorder], **options
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses, recorder.steps


@pytest.mark.way("resuming", optimizer="exact")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_equals_an_uninterrupted_one_to_the_bit(dtype, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=4, bf16=dtype == torch.bfloat16)
    model = biased_llama(dtype)
    whole, _, whole_steps = run(args, model, optimizers=adamw(model, args))
    model = biased_llama(dtype)
    resumed, _, steps = run(
        args, model, checkpoint=str(tmp_path / "checkpoint-4"), optimizers=adamw(model, args)
    )
    assert len(steps) == 4
    for params, whole_params in zip(steps, whole_steps[4:], strict=True):
        assert all(map(torch.equal, params, whole_params))
    for state, whole_state in zip(
        resumed.optimizer.state.values(), whole.optimizer.state.values(), strict=True
    ):
        assert state.keys() == whole_state.keys() and ("remainder" in state) == (
            dtype == torch.bfloat16
        )
        assert all(torch.equal(state[name], whole_state[name]) for name in state)


def test_model_init_takes_the_spec(tmp_path):
    args = arguments(tmp_path, max_steps=2)
    trainer = transformers.Trainer(
        model_init=biased_llama,
        args=args,
        train_dataset=examples(),
        optimizer_cls_and_kwargs=adamw_spec(args),
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, AdamW)


EXPLICIT = {"lr": 0.5, "betas": (0.1, 0.2), "eps": 1e-3, "weight_decay": 0.25}


@pytest.mark.parametrize("name", [None, *EXPLICIT])
def test_keywords_win_over_arguments(name, tmp_path):
    given = {} if name is None else {name: EXPLICIT[name]}
    expected = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1} | given
    args, model = arguments(tmp_path), biased_llama()
    optimizer, schedule = adamw(model, args, **given)
    assert schedule is None
    decay, no_decay = optimizer.param_groups
    assert {key: decay[key] for key in expected} == expected
    assert {key: no_decay[key] for key in expected} == expected | {"weight_decay": 0.0}
    assert adamw_spec(**given) == (AdamW, given)
    if name != "weight_decay":
        assert adamw_spec(args, maximize=True, **given) == (AdamW, expected | {"maximize": True})


def test_a_weight_decay_that_trainer_would_not_use_is_refused(tmp_path):
    args = arguments(tmp_path, weight_decay=0.1)
    with pytest.raises(
        ValueError, match=r"weight_decay=0.25 would be lost.* the 0.1 of its args; set it in args"
    ):
        adamw_spec(args, weight_decay=0.25)
    assert adamw_spec(args, weight_decay=0.1)[1]["weight_decay"] == 0.1


@pytest.mark.parametrize("how", ["as it is", "copied deeply", "pickled", "unpacked by Trainer"])
def test_what_comes_from_args_is_read_when_the_optimizer_is_made(how, tmp_path):
    args = arguments(tmp_path, weight_decay=0.0)
    spec = adamw_spec(args, eps=1e-3)
    if how == "copied deeply":
        args, spec = copy.deepcopy((args, spec))
    elif how == "pickled":  # as ray sends a Trainer to its workers
        args, spec = pickle.loads(pickle.dumps((args, spec)))
    args.learning_rate, args.adam_beta1, args.adam_epsilon, args.weight_decay = 0.5, 0.25, 1.0, 0.75
    if how == "unpacked by Trainer":
        trainer = transformers.Trainer(
            model_init=biased_llama,
            args=args,
            train_dataset=examples(),
            optimizer_cls_and_kwargs=spec,
        )
        optimizer = trainer.create_optimizer()
    else:
        optimizer = spec[0]([torch.zeros(2)], **spec[1])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        0.5,
        (0.25, 0.95),
        1e-3,
        0.75,
    )


def test_the_keywords_are_a_mapping_like_any_other(tmp_path):
    _, keywords = adamw_spec(arguments(tmp_path), impl="eager")
    assert "lr" in keywords and "params" not in keywords and keywords.get("optim_bits") is None
    assert keywords.get("lr") == 3e-3 and dict(keywords)["impl"] == "eager"
    keywords.update(lr=0.5)
    keywords["eps"] = 0.25
    assert keywords.pop("impl") == "eager" and "impl" not in keywords
    assert keywords == {"lr": 0.5, "betas": (0.9, 0.95), "eps": 0.25, "weight_decay": 0.1}
    assert str(keywords) == str({"lr": 0.5, "betas": (0.9, 0.95), "eps": 0.25, "weight_decay": 0.1})
    with pytest.raises(KeyError):
        del keywords["betas"]  # it is args'


def test_every_trial_of_a_search_trains_at_its_own_values(tmp_path):
    """What Trainer does in a search: it sets values on args, then makes a model and an
    optimizer."""
    args = arguments(tmp_path, max_steps=1, lr_scheduler_type="constant", warmup_steps=0)
    used = []

    class Note(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            group = optimizer.param_groups[0]
            used.append((group["lr"], group["betas"][1], group["weight_decay"]))

    trainer = transformers.Trainer(
        model_init=biased_llama,
        args=args,
        train_dataset=examples(),
        optimizer_cls_and_kwargs=adamw_spec(args),
        callbacks=[Note(), fastft.FusedLossCallback()],
    )
    asked = [(10.0**-trial, 0.5 + trial / 10, trial / 100) for trial in range(1, 4)]
    for trial in asked:
        trainer.args.learning_rate, trainer.args.adam_beta2, trainer.args.weight_decay = trial
        trainer.train()
    assert used == asked


def test_groups_are_trainers_own(tmp_path):
    model = biased_llama()
    model.model.embed_tokens.requires_grad_(False)
    names = {param: name for name, param in model.named_parameters()}
    optimizer, _ = adamw(model)
    decay, no_decay = (
        [names[param] for param in group["params"]] for group in optimizer.param_groups
    )
    trainer = transformers.Trainer(model=model, args=arguments(tmp_path), train_dataset=examples())
    stock = trainer.create_optimizer()
    assert [[names[param] for param in group["params"]] for group in stock.param_groups] == [
        decay,
        no_decay,
    ]
    assert decay and no_decay and all("bias" in name or "norm" in name for name in no_decay)
    assert "model.embed_tokens.weight" not in decay + no_decay


PARAMS = {
    "generator": lambda layer: layer.parameters(),
    "list": lambda layer: list(layer.parameters()),
    "groups": lambda layer: [{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias]}],
    "named": lambda layer: layer.named_parameters(),
}


@pytest.mark.parametrize("form", PARAMS)
def test_parameters_instead_of_a_model(form):
    layer = torch.nn.Linear(3, 2)
    optimizer, schedule = adamw(PARAMS[form](layer), lr=0.2)
    assert schedule is None and sum(len(group["params"]) for group in optimizer.param_groups) == 2
    assert optimizer.param_groups[-1]["lr"] == 0.2


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: adamw(3), TypeError, "model_or_params"),
        (lambda: adamw("model"), TypeError, "model_or_params"),
        (lambda: adamw(torch.zeros(3)), TypeError, "model_or_params"),
        (
            lambda: adamw(torch.nn.Linear(2, 2), {"learning_rate": 1.0}),
            TypeError,
            "TrainingArguments",
        ),
        (lambda: adamw_spec(1e-3), TypeError, "TrainingArguments"),
        (lambda: adamw([]), ValueError, "empty"),
        (lambda: adamw(torch.nn.Linear(2, 2).requires_grad_(False)), ValueError, "Linear"),
        (lambda: adamw(torch.nn.Linear(2, 2), lr=-1.0), ValueError, "lr"),
        (lambda: adamw(torch.nn.Linear(2, 2), learning_rate=1.0), TypeError, "learning_rate"),
        (lambda: adamw(torch.nn.Linear(2, 2), impl="fast"), ValueError, "impl"),
        (lambda: adamw_spec(lr=1e-3, impl="fast"), ValueError, "impl"),
        (lambda: adamw_spec(moment="fp32"), TypeError, "moment"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
