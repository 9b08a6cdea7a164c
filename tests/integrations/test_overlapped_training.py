"""Trainings with `offload="overlap"` have the bits of the resident ones, whoever looks at weights,
and whichever way their model goes."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from support.adamw_trainers import arguments, biased_llama, examples
from support.trainers import tiny_llama
from support.versions import CHECKPOINTING
from transformers import Trainer, TrainerCallback

import fastft
from fastft.integrations import weights_for_callbacks
from fastft.integrations.weights_for_callbacks import follow_training
from fastft.optim.offload.deferred import PendingStep

HANDED = {
    "adamw": lambda model, args, tier: {"optimizers": fastft.adamw(model, args, offload=tier)},
    "adamw_spec": lambda model, args, tier: {
        "optimizer_cls_and_kwargs": fastft.adamw_spec(args, offload=tier)
    },
    "plug": lambda model, args, tier: {},
}


@pytest.fixture
def waiting(monkeypatch):
    """How many groups of weights still waited at the end of each step, and how many did once."""
    counts, flush = [], PendingStep.flush

    def counted(self):
        counts.append((len(self._at), len(self._order)))
        flush(self)

    monkeypatch.setattr(PendingStep, "flush", counted)
    return counts


def trainer_of(folder, tier, *callbacks, how="adamw", model=None, kind=Trainer, **changes):
    model = biased_llama(torch.bfloat16) if model is None else model
    args = arguments(folder, **{"max_steps": 4, **changes})
    ours = [] if how == "plug" else [fastft.FusedLossCallback()]
    trainer = kind(
        model,
        args,
        train_dataset=examples(),
        eval_dataset=examples()[:4],
        callbacks=[*callbacks, *ours],
        **HANDED[how](model, args, tier),
    )
    if how == "plug":
        fastft.plug(trainer, **({"offload": tier} if tier else {}))
    else:
        fastft.fuse_clipping(trainer)
    return trainer


def inner(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def losses(trainer):
    """The last losses of all logs, which no callback had to look for."""
    return [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history]


def assert_same(one, other):
    """Two trainings ended with the same bits, states too."""
    assert losses(one)[:-1] == losses(other)[:-1]
    for param, twin in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(param, twin)
    states = [inner(trainer).state_dict()["state"] for trainer in (one, other)]
    assert states[0].keys() == states[1].keys()
    for number, entries in states[0].items():
        assert entries.keys() == states[1][number].keys()
        for name, value in entries.items():
            bits = torch.int16 if value.dtype == torch.bfloat16 else value.dtype
            assert torch.equal(value.view(bits), states[1][number][name].view(bits)), name


@pytest.mark.way('`offload="overlap"`', optimizer="exact")
@pytest.mark.parametrize("how", HANDED)
def test_every_way_to_trainer_overlaps_with_the_bits_of_the_resident_one(tmp_path, how, waiting):
    pair = []
    for tier in (None, "overlap"):
        trainer = trainer_of(tmp_path, tier, how=how, gradient_accumulation_steps=2)
        trainer.train()
        pair.append(trainer)
    assert_same(*pair)
    left, groups = zip(*waiting, strict=True)
    assert min(groups) > 20
    assert left == (0, 0, 0, groups[-1])  # the forwards asked for all, the end for the last


class _Aliases(TrainerCallback):
    """Reads weights at one event by their memory, which torch does not see."""

    def __init__(self, event):
        self.event, self.read, self.aliases = event, [], []

        def handle(args, state, control, model=None, **kwargs):
            if not self.aliases:
                self.aliases = [param.data for param in model.parameters()]
            self.read.append(torch.cat([alias.flatten() for alias in self.aliases]).clone())

        setattr(self, event, handle)


EVENTS = {
    "on_step_begin": {},
    "on_optimizer_step": {},
    "on_step_end": {},
    "on_substep_end": {"gradient_accumulation_steps": 2},
    "on_log": {},
    "on_evaluate": {"eval_strategy": "steps", "eval_steps": 2},
    "on_prediction_step": {"eval_strategy": "steps", "eval_steps": 2},
    "on_save": {"save_strategy": "steps", "save_steps": 2},
    "on_epoch_end": {"max_steps": -1, "num_train_epochs": 0.25},
    "on_train_end": {},
}


def reads(folder, tier, event):
    callback = _Aliases(event)
    trainer = trainer_of(folder, tier, callback, **EVENTS[event])
    trainer.train()
    assert callback.read
    return callback.read


_SLOW = ("on_substep_end", "on_prediction_step", "on_save", "on_epoch_end", "on_train_end")


@pytest.mark.parametrize(
    "event", [pytest.param(e, marks=[pytest.mark.slow] * (e in _SLOW)) for e in EVENTS]
)
def test_a_callback_of_others_finds_finished_weights_by_whatever_way_it_looks(tmp_path, event):
    for stock, ours in zip(
        reads(tmp_path, None, event), reads(tmp_path, "overlap", event), strict=True
    ):
        assert torch.equal(stock, ours)


def test_without_the_first_callback_it_would_not(tmp_path, monkeypatch):
    stock = reads(tmp_path, None, "on_step_end")
    monkeypatch.setattr(weights_for_callbacks._FinishFirst, "before", lambda *_: None)
    ours = reads(tmp_path, "overlap", "on_step_end")
    assert not all(map(torch.equal, stock, ours))


def test_a_callback_that_may_look_after_every_step_is_named_once(tmp_path, caplog, waiting):
    trainer_of(tmp_path, "overlap", _Aliases("on_step_end")).train()
    said = [line for line in caplog.messages if "nothing overlaps here" in line]
    assert len(said) == 1 and "_Aliases" in said[0] and "on_step_end" in said[0]
    assert all(left == groups for left, groups in waiting)


def test_callbacks_of_trainer_and_of_fastft_take_no_overlap_away(tmp_path, caplog, waiting):
    own = [fastft.ThroughputCallback(), transformers.EarlyStoppingCallback(99)]
    evaluation = {"eval_strategy": "steps", "eval_steps": 100, "metric_for_best_model": "loss"}
    trainer_of(tmp_path, "overlap", *own, disable_tqdm=False, **evaluation).train()
    assert [left for left, _ in waiting[:-1]] == [0] * 3
    assert not any("overlap" in line for line in caplog.messages)


def test_evaluating_saving_and_resuming_in_the_middle(tmp_path):
    """Also in another tier than the one that saved."""
    steps = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 2}
    runs = {}
    for tier in (None, "overlap"):
        runs[tier] = trainer_of(tmp_path / str(tier), tier, **steps)
        runs[tier].train()
    assert_same(*runs.values())
    for tier, saved in (("overlap", "overlap"), (None, "overlap"), ("overlap", None)):
        again = trainer_of(tmp_path / f"{tier} of {saved}", tier, **steps)
        again.train(resume_from_checkpoint=str(tmp_path / str(saved) / "checkpoint-2"))
        assert_same(again, runs[None])


class _Interrupted(Trainer):
    """Breaks off inside a forward: half of the weights have been asked for."""

    def training_step(self, model, *args, **kwargs):
        if self.state.global_step == self.at:
            layer = self.model.model.layers[1]
            handle = layer.register_forward_pre_hook(_break)
            try:
                return super().training_step(model, *args, **kwargs)
            finally:
                handle.remove()
        return super().training_step(model, *args, **kwargs)


def _break(module, args):
    raise InterruptedError


def test_an_exception_inside_a_forward_loses_nothing_and_training_goes_on(tmp_path):
    pair = []
    for tier in (None, "overlap"):
        trainer = trainer_of(tmp_path, tier, kind=_Interrupted)
        trainer.at = 2
        with pytest.raises(InterruptedError):
            trainer.train()
        trainer.at = None
        trainer.train()
        pair.append(trainer)
    assert_same(*pair)


def test_after_a_training_nothing_is_left_on_the_model_or_the_trainer(tmp_path):
    trainer = trainer_of(tmp_path, "overlap", how="adamw_spec")
    callbacks = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == callbacks
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())
    assert {type(param) for param in trainer.model.parameters()} == {torch.nn.Parameter}


def test_a_model_that_is_followed_is_let_go_of():
    model = torch.nn.Linear(3, 3)
    optimizer = fastft.AdamW([torch.nn.Parameter(torch.ones(2))], offload="overlap")
    optimizer.follow(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_data_parallel_is_refused(tmp_path):
    optimizer = fastft.AdamW([torch.nn.Parameter(torch.ones(2))], offload="overlap")
    with pytest.raises(ValueError, match="DataParallel"):
        follow_training(SimpleNamespace(n_gpu=2), torch.nn.Linear(2, 2), optimizer, None)


def test_under_torch_compile_a_training_says_that_nothing_overlaps(tmp_path, waiting):
    pair = []
    for tier in (None, "overlap"):
        options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 3}
        trainer = trainer_of(tmp_path, tier, model=tiny_llama(64).bfloat16(), **options)
        if tier:
            with pytest.warns(UserWarning, match="torch.compile compiles the model"):
                trainer.train()
        else:
            trainer.train()
        pair.append(trainer)
    assert_same(*pair)
    # code compiled for another model does not show the hooks before a weight waits
    assert {groups for _, groups in waiting[1:]} == {0}


def _mixtral():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    config = transformers.MixtralConfig(**sizes, **heads, output_router_logits=True)
    return transformers.MixtralForCausalLM(config)


def _t5():
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2}
    config = transformers.T5Config(
        **sizes, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0, tie_word_embeddings=True
    )
    return transformers.T5ForConditionalGeneration(config)


def _gpt2():
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def _mamba():
    """Weights of a convolution that its parent reads."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


def _lora():
    model = biased_llama(torch.bfloat16)
    targets = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **targets))


def _dora():
    """Reads the base's weight beside its own."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    return peft.get_peft_model(biased_llama(torch.bfloat16), config)


_OFTEN = ("tied", "mixture of experts", "LoRA")
FAMILIES = {
    "tied": _gpt2,
    "mixture of experts": _mixtral,
    "encoder and decoder": _t5,
    "state space": _mamba,
    "LoRA": _lora,
    "DoRA": _dora,
}


def _trained(folder, tier, make, **changes):
    torch.manual_seed(2)
    trainer = trainer_of(folder, tier, model=make().bfloat16().train(), max_steps=3, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f not in _OFTEN)) for f in FAMILIES]
)
def test_families_have_the_bits_of_the_resident_training(tmp_path, family, waiting):
    assert_same(*(_trained(tmp_path, tier, FAMILIES[family]) for tier in (None, "overlap")))
    assert all(groups > 3 for _, groups in waiting)
    if family != "mixture of experts":
        assert all(left == 0 for left, _ in waiting[:-1])


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_checkpointing_has_the_bits_of_the_resident_training(tmp_path, how, waiting):
    options = {
        CHECKPOINTING: True,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": how == "reentrant"},
    }
    make = lambda: biased_llama(torch.bfloat16)  # noqa: E731
    assert_same(*(_trained(tmp_path, tier, make, **options) for tier in (None, "overlap")))
    assert all(left == 0 for left, _ in waiting[:-1])


def test_a_loop_with_accelerator_follows_the_model_inside(waiting):
    results = []
    for tier in (None, "overlap"):
        torch.manual_seed(0)
        accelerator, model = Accelerator(cpu=True), biased_llama(torch.bfloat16)
        optimizer = fastft.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0, offload=tier)
        model, optimizer = accelerator.prepare(model, optimizer)
        if tier:
            optimizer.optimizer.follow(accelerator.unwrap_model(model))
        for example in examples()[:5]:
            batch = {name: value[None] for name, value in example.items()}
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        results.append([param.detach().clone() for param in model.parameters()])
    assert all(map(torch.equal, *results))
    assert [left for left, _ in waiting] == [0, 0, 0, 0]


def test_an_optimizer_that_knows_no_model_updates_at_once_and_says_so(tmp_path):
    model = biased_llama(torch.bfloat16)
    optimizer = fastft.AdamW(model.parameters(), offload="overlap")
    model(**{name: value[None] for name, value in examples()[0].items()}).loss.backward()
    with pytest.warns(UserWarning, match=r"optimizer\.follow\(model\)"):
        optimizer.step()
    assert {type(param) for param in model.parameters()} == {torch.nn.Parameter}


def test_what_follow_refuses():
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Parameter"):
        fastft.AdamW([param], offload="overlap").follow(param)
    with pytest.raises(ValueError, match="offload='states'"):
        fastft.AdamW([param], offload="states").follow(torch.nn.Linear(2, 2))
