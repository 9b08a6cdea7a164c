"""The optimizer of a plugged Trainer: made by Trainer, of its groups, when it makes one; and whose
optimizer is left alone."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from accelerate.state import GradientState
from support.plugged import curves, examples, stock_and_plugged, trainer_of
from support.trainers import logged
from torch import nn
from transformers import Trainer

import fastft
from fastft.integrations.plug.plug import Plugged


def inner(trainer):
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def names_of(trainer, group):
    names = {id(param): name for name, param in trainer.model.named_parameters()}
    return {names[id(param)] for param in group["params"]}


class NothingDecays(Trainer):
    def get_decay_parameter_names(self, model):
        return []


@pytest.mark.parametrize("kind", [Trainer, pytest.param(NothingDecays, marks=pytest.mark.slow)])
def test_the_groups_are_trainers_own(tmp_path, kind):
    _, _, _, (stock, ours) = stock_and_plugged(tmp_path, kind=kind)
    assert type(inner(ours)) is fastft.AdamW and type(inner(stock)) is torch.optim.AdamW
    for one, other in zip(inner(stock).param_groups, inner(ours).param_groups, strict=True):
        assert names_of(stock, one) == names_of(ours, other)
        for value in ("weight_decay", "betas", "eps", "lr"):
            assert one[value] == other[value]


def test_arguments_are_read_when_the_optimizer_is_made(tmp_path):
    trainer = trainer_of(tmp_path)
    fastft.plug(trainer)
    trainer.args.learning_rate, trainer.args.adam_beta2 = 0.125, 0.5
    trainer.create_optimizer()
    assert inner(trainer).defaults["lr"] == 0.125
    assert inner(trainer).defaults["betas"] == (0.9, 0.5)


def test_other_arguments_of_the_trainer_are_read_at_its_next_training(tmp_path):
    trainer = trainer_of(tmp_path)
    fastft.plug(trainer)
    trainer.args = trainer_of(tmp_path, learning_rate=0.25).args
    trainer.train()
    assert inner(trainer).defaults["lr"] == 0.25


@pytest.mark.parametrize(
    ("optim", "bits"),
    [("adamw_bnb_8bit", 8), ("adamw_8bit", 8), ("adamw_torch_8bit", 8), ("adamw_torch_4bit", 4)],
)
def test_optimizers_of_few_bits_get_such_moments_but_for_embeddings_and_head(tmp_path, optim, bits):
    trainer = trainer_of(tmp_path, optim=optim)
    plug = fastft.plug(trainer)
    trainer.train()
    kept = {
        name
        for group in inner(trainer).param_groups
        for name in names_of(trainer, group)
        if group["moments"] == "fp32"
    }
    assert kept == {"model.embed_tokens.weight", "lm_head.weight"}
    assert inner(trainer).defaults["moments"] == f"{bits}bit"
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    assert inner(trainer).state[weight]["exp_avg"].nbytes == weight.numel() * bits // 8
    assert plug.lines["optimizer"] == (
        f"AdamW, {bits}-bit moments, those of embeddings and head fp32, clipping inside"
    )


def test_arguments_that_torchao_alone_reads_are_told_of(tmp_path):
    lines = [
        fastft.plug(trainer_of(tmp_path, optim=optim, optim_args="block_size=64")).lines
        for optim in ("adamw_torch_8bit", "adamw_torch_4bit", "adamw_bnb_8bit", "adamw_torch")
    ]
    told = ["without block_size=64 (optim_args)" in line["optimizer"] for line in lines]
    assert told == [True, True, False, False]


@pytest.mark.parametrize("moments", ["8bit", "4bit"])
def test_the_groups_with_moments_of_few_bits_are_those_of_adamw(tmp_path, moments):
    trainer = trainer_of(tmp_path)
    fastft.plug(trainer, moments=moments)
    trainer.create_optimizer()
    by_hand, _ = fastft.adamw(trainer.model, trainer.args, moments=moments)
    for one, other in zip(by_hand.param_groups, inner(trainer).param_groups, strict=True):
        assert [*map(id, one["params"])] == [*map(id, other["params"])]
        assert one["weight_decay"] == other["weight_decay"] and one["moments"] == other["moments"]


def test_an_option_of_the_user_goes_before_that_of_args(tmp_path):
    trainer = trainer_of(tmp_path, optim="adamw_bnb_8bit")
    fastft.plug(trainer, moments="bf16", lr=0.5)
    trainer.create_optimizer()
    assert inner(trainer).defaults["moments"] == "bf16" and inner(trainer).defaults["lr"] == 0.5


def test_an_optimizer_that_rounds_stochastically_draws_nothing_from_torch(tmp_path):
    trainer = trainer_of(tmp_path)
    fastft.plug(trainer, moments="bf16")
    before = torch.get_rng_state()
    trainer.create_optimizer()
    assert torch.equal(torch.get_rng_state(), before)
    assert inner(trainer).defaults["seed"] == trainer.args.seed


class OwnOptimizer(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        return self.optimizer


class OwnClass(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return torch.optim.RAdam, {"lr": args.learning_rate}


def with_sgd(trainer):
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)


LEFT_ALONE = {
    "args.optim": ({"optim": "adafactor"}, None, "args.optim is 'adafactor'"),
    "for TPUs": ({"optim": "adamw_torch_xla"}, None, "it is for TPUs"),
    "target modules": ({"optim_target_modules": ["q_proj"]}, None, "optim_target_modules"),
    "create_optimizer": ({"kind": OwnOptimizer}, None, "OwnOptimizer has a create_optimizer"),
    "the class": ({"kind": OwnClass}, None, "get_optimizer_cls_and_kwargs of its own"),
    "optimizers=": ({}, with_sgd, "the Trainer has a SGD already"),
    "optimizer_cls_and_kwargs=": (
        {"options": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}},
        None,
        "optimizer_cls_and_kwargs= chose SGD",
    ),
    "an earlier train()": ({}, Trainer.train, "the Trainer has a AdamW already"),
}


@pytest.mark.way("`optim` that is no AdamW", optimizer="stock")
@pytest.mark.parametrize("case", LEFT_ALONE)
def test_an_optimizer_that_the_user_chose_is_left_alone_with_a_word(tmp_path, case):
    given, prepare, word = LEFT_ALONE[case]
    trainer = trainer_of(tmp_path, **given)
    if prepare is not None:
        prepare(trainer)
    before = trainer.optimizer, trainer.optimizer_cls_and_kwargs
    plug = fastft.plug(trainer)
    assert plug.lines["optimizer"].startswith("left alone: ") and word in plug.lines["optimizer"]
    assert (trainer.optimizer, trainer.optimizer_cls_and_kwargs) == before
    plug.restore()
    with pytest.raises(ValueError, match=r"an option for fastft's AdamW \(moments\), which plug"):
        fastft.plug(trainer, moments="8bit")


def test_fp16_weights_are_left_to_stock(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.model.half()
    assert "the model has torch.float16" in fastft.plug(trainer).lines["optimizer"]


def by_pair(trainer):
    trainer.optimizer = fastft.adamw(trainer.model, trainer.args)[0]


def by_spec(trainer):
    trainer.optimizer_cls_and_kwargs = fastft.adamw_spec(trainer.args)


@pytest.mark.parametrize("hand_over", [by_pair, pytest.param(by_spec, marks=pytest.mark.slow)])
def test_an_adamw_of_ours_is_kept_and_clips_inside(tmp_path, hand_over, monkeypatch):
    stock = curves(trainer_of(tmp_path))
    trainer = trainer_of(tmp_path)
    hand_over(trainer)
    before = trainer.optimizer, trainer.optimizer_cls_and_kwargs
    plug = fastft.plug(trainer)
    assert (trainer.optimizer, trainer.optimizer_cls_and_kwargs) == before
    assert plug.lines["optimizer"] == "AdamW as it was given, clipping inside"
    clipped = []
    clip = fastft.AdamW.clip_at_step
    monkeypatch.setattr(
        fastft.AdamW, "clip_at_step", lambda *given: clipped.append(1) or clip(*given)
    )
    assert curves(trainer)[0] == pytest.approx(stock[0], rel=2e-5)
    assert clipped == [1, 1]


def lora(trainer):
    made = peft.get_peft_model(trainer.model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    trainer.model = trainer.model_wrapped = made
    return made


def grown(trainer):
    trainer.model.resize_token_embeddings(70, mean_resizing=False)
    return trainer.model


@pytest.mark.parametrize("change", [lora, grown])
def test_what_changes_the_model_before_train_is_trained(tmp_path, change):
    trainer = trainer_of(tmp_path)
    fastft.plug(trainer)
    torch.manual_seed(1)
    model = change(trainer)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    trainer.train()
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) != param.requires_grad, name


def test_trials_of_a_search_train_at_their_own_values(tmp_path, monkeypatch):
    """What `hyperparameter_search` does for a trial: it sets args, and makes an accelerator."""
    stock = trainer_of(tmp_path)
    trainer = Trainer(
        None,
        stock.args,
        model_init=lambda: trainer_of(tmp_path).model,
        train_dataset=examples(),
        data_collator=stock.data_collator,
    )
    plug = fastft.plug(trainer)
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)
    trainer.hp_search_backend = transformers.trainer_utils.HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: trial.params
    for number, rate in enumerate((1e-3, 3e-3)):
        trial = SimpleNamespace(number=number, params={"learning_rate": rate})
        trainer.train(trial=trial)
        assert inner(trainer).defaults["lr"] == rate
        assert plug.lines["optimizer"] == "AdamW, clipping inside"
    assert "clip_grad_norm_" not in vars(trainer.accelerator)


def test_a_trainer_that_ray_has_sent_to_a_process_trains_at_the_values_of_its_copy(tmp_path):
    cloudpickle = pytest.importorskip("cloudpickle")
    # accelerate refers in every process to loaders whose training was broken off, by other tests
    GradientState._reset_state()
    trainer = trainer_of(tmp_path)
    fastft.plug(trainer)
    sent = cloudpickle.loads(cloudpickle.dumps(trainer))
    plug = Plugged.of(sent)
    sent.args.learning_rate = 3e-3
    sent.train()
    assert inner(sent).defaults["lr"] == 3e-3 and type(inner(sent)) is fastft.AdamW
    assert plug.report.fused == 2 and plug.lines["optimizer"] == "AdamW, clipping inside"
    assert trainer.optimizer is None and trainer.state.global_step == 0
    stock = trainer_of(tmp_path, learning_rate=3e-3)
    stock.train()
    assert logged(sent) == pytest.approx(logged(stock), rel=1e-6)


def test_a_restored_trainer_trains_with_its_own(tmp_path):
    trainer = trainer_of(tmp_path)
    fastft.plug(trainer).restore()
    trainer.train()
    assert type(inner(trainer)) is torch.optim.AdamW and len(logged(trainer)) == 2


@pytest.mark.way("from stock to fastft, and back", loss="exact", optimizer="exact")
@pytest.mark.slow
def test_checkpoints_of_plugged_and_stock_trainers_are_each_others(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = curves(trainer_of(tmp_path / "stock", **saving))[0]
    trainer = trainer_of(tmp_path / "ours", **saving)
    fastft.plug(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-1"))
    assert logged(trainer)[-2:] == pytest.approx(whole[-2:], rel=2e-5)
    stock = trainer_of(tmp_path / "again", **saving)
    stock.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert logged(stock)[-1:] == pytest.approx(whole[-1:], rel=2e-5)


def test_a_model_without_embeddings_can_have_8_bit_moments(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def forward(self, x, labels=None):
            return {"loss": (self.layer(x) - labels).square().mean()}

    rows = [{"x": torch.full((8,), float(i)), "labels": torch.ones(1)} for i in range(4)]
    stock = trainer_of(tmp_path)
    stock.args.optim = "adamw_bnb_8bit"
    trainer = Trainer(Net(), stock.args, train_dataset=rows)
    plug = fastft.plug(trainer)
    trainer.train()
    assert plug.lines["loss"].startswith("left alone") and len(logged(trainer)) == 2
