"""Libraries that decide by an optimizer's class, or by its name, take our AdamW for what it is.

Where each decides stands in fastft/integrations/optimizer_check.py; DeepSpeed itself runs in
tests/integrations/test_engines.py.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.trainers import tiny_llama

from fastft.optim.adamw import AdamW

VALUES = {"lr": 0.125, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.375}


def both():
    """The same layer twice, with ours and with torch's AdamW."""
    made = []
    for cls in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        made.append((layer, cls(layer.parameters(), **VALUES)))
    return made


def train(layer, optimizer, steps=3):
    for step in range(steps):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        layer(inputs).square().sum().backward()
        optimizer.step()


def assert_same(ours, theirs):
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


class TestTorchsClass:
    def test_it_is_one_with_its_signature_and_its_defaults(self):
        (_, ours), (_, theirs) = both()
        assert isinstance(ours, torch.optim.AdamW)
        assert ours.defaults.items() >= theirs.defaults.items()
        assert ours.param_groups[0]["decoupled_weight_decay"] is True
        taken = inspect.signature(AdamW).parameters
        for name, parameter in inspect.signature(torch.optim.AdamW).parameters.items():
            assert (taken[name].default, taken[name].kind) == (parameter.default, parameter.kind), (
                name
            )

    @pytest.mark.parametrize("betas", [(0.9, torch.tensor(0.99)), (torch.tensor(0.9), 0.99)])
    def test_betas_of_mixed_kinds_are_torchs_value_error(self, betas):
        for cls in (AdamW, torch.optim.AdamW):
            with pytest.raises(ValueError, match="betas must be either both"):
                cls([torch.zeros(3)], betas=betas)

    def test_its_decay_stays_decoupled_whatever_is_loaded(self):
        (layer, ours), (other, theirs) = both()
        adam = torch.optim.Adam(torch.nn.Linear(5, 3).parameters(), **VALUES)
        assert adam.param_groups[0]["decoupled_weight_decay"] is False
        for loader in (ours, theirs):
            loader.load_state_dict(copy.deepcopy(adam.state_dict()))
            assert loader.param_groups[0]["decoupled_weight_decay"] is True
        train(layer, ours)
        train(other, theirs)
        assert_same(layer, other)

    def test_a_group_with_l2_decay_is_refused(self):
        with pytest.raises(ValueError, match=r"decoupled_weight_decay=False is torch.optim.Adam's"):
            AdamW([{"params": [torch.zeros(3)], "decoupled_weight_decay": False}])

    @pytest.mark.parametrize("first", ["ours", "theirs"])
    def test_state_dicts_go_from_one_to_the_other(self, first):
        (layer, ours), (other, theirs) = both()
        source, target = ((layer, ours), (other, theirs))[:: 1 if first == "ours" else -1]
        train(*source)
        target[0].load_state_dict(source[0].state_dict())
        target[1].load_state_dict(copy.deepcopy(source[1].state_dict()))
        train(*source)
        train(*target)
        assert_same(layer, other)

    def test_older_state_dicts_of_ours_lack_the_option(self):
        (layer, ours), _ = both()
        train(layer, ours)
        old = copy.deepcopy(ours.state_dict())
        for group in old["param_groups"]:
            del group["decoupled_weight_decay"]
        ours.load_state_dict(old)
        assert ours.param_groups[0]["decoupled_weight_decay"] is True
        train(layer, ours)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
    )
    def test_copies(self, copied):
        (layer, ours), _ = both()
        train(layer, ours)
        twin_layer, twin = copied((layer, ours))
        assert type(twin) is AdamW and twin.rounding == "exact"
        train(layer, ours)
        train(twin_layer, twin)
        assert all(map(torch.equal, layer.parameters(), twin_layer.parameters()))

    def test_a_compiled_step(self):
        torch._dynamo.reset()
        (layer, ours), (other, theirs) = both()
        compiled = torch.compile(ours.step, backend="eager")
        for model, optimizer, step in ((layer, ours, compiled), (other, theirs, theirs.step)):
            for number in range(2):
                optimizer.zero_grad()
                model(torch.full((2, 5), 1.0 + number)).square().sum().backward()
                step()
        assert_same(layer, other)

    def test_a_step_is_seen_by_the_profiler_under_its_name(self):
        (layer, ours), _ = both()
        with torch.profiler.profile() as profile:
            train(layer, ours, 1)
        assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}

    def test_a_cycle_of_momenta_moves_the_first_beta(self):
        (layer, ours), (other, theirs) = both()
        for model, optimizer in ((layer, ours), (other, theirs)):
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
            for _ in range(5):
                train(model, optimizer, 1)
                cycle.step()
        assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"] != VALUES["betas"]
        assert_same(layer, other)


def test_accelerates_map_to_deepspeed_takes_it_for_decoupled_decay(monkeypatch):
    accelerates = pytest.importorskip("accelerate.utils.deepspeed")

    class DeepSpeedCPUAdam(torch.optim.Optimizer):
        def __init__(self, params, lr, weight_decay, adamw_mode):
            super().__init__(
                params, {"lr": lr, "weight_decay": weight_decay, "betas": None, "eps": None}
            )
            self.adamw_mode = adamw_mode

    for name in ("deepspeed", "deepspeed.ops", "deepspeed.ops.adam"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["deepspeed.ops.adam"].DeepSpeedCPUAdam = DeepSpeedCPUAdam
    monkeypatch.setattr(accelerates, "compare_versions", lambda *_: True)
    for _, optimizer in both():
        group = {"params": [torch.zeros(3)], "weight_decay": 0.0}
        optimizer.add_param_group(group)
        mapped = accelerates.map_pytorch_optim_to_deepspeed(optimizer)
        assert mapped.adamw_mode is True and [g["weight_decay"] for g in mapped.param_groups] == [
            0.375,
            0.0,
        ]
        assert all(
            (g["lr"], g["betas"], g["eps"]) == (0.125, (0.5, 0.75), 0.25)
            for g in mapped.param_groups
        )


def test_accelerates_megatron_takes_it_for_adam():
    dataclasses = pytest.importorskip("accelerate.utils.dataclasses")
    told = []
    for _, optimizer in both():
        plugin = SimpleNamespace(megatron_lm_default_args={})
        dataclasses.MegatronLMPlugin.set_optimizer_type(plugin, optimizer)
        told.append(plugin.megatron_lm_default_args)
    assert told[0] == told[1] and told[0]["optimizer"] == "adam" and told[0]["adam_beta2"] == 0.75


def test_transformers_takes_it_for_a_class_and_not_for_a_factory():
    module = pytest.importorskip("transformers.trainer_optimizer")  # since transformers 5.18
    assert not module.is_optimizer_factory(AdamW)


def test_torchs_functional_twins_refuse_it_instead_of_training_another_class():
    from torch.distributed.optim import as_functional_optim

    with pytest.raises(ValueError, match="does not have a functional"):
        as_functional_optim(AdamW, [torch.zeros(3)])


def test_torchs_optimizers_in_the_backward_pass():
    from torch.distributed.optim import _apply_optimizer_in_backward

    layers = []
    for cls in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        _apply_optimizer_in_backward(cls, layer.parameters(), VALUES)
        for _ in range(3):
            layer(torch.ones(2, 5)).square().sum().backward()
        layers.append(layer)
    assert_same(*layers)


@pytest.mark.parametrize("maker", ["create_loraplus_optimizer", "create_riemannian_optimizer"])
def test_pefts_makers_of_optimizers(maker):
    peft = pytest.importorskip("peft")
    optimizers = pytest.importorskip("peft.optimizers")
    if not hasattr(optimizers, maker):
        pytest.skip(f"this version of PEFT has no {maker}")
    options = {"lr": 1e-2} | ({"loraplus_lr_ratio": 4.0} if "plus" in maker else {"reg": 0.1})
    tokens, trained = torch.arange(12).view(2, 6), []
    for cls in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False
        )
        model = peft.get_peft_model(tiny_llama(), config)
        optimizer = getattr(optimizers, maker)(
            model, optimizer_cls=cls, weight_decay=0.1, **options
        )
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        trained.append(
            torch.nn.ParameterList([param for param in model.parameters() if param.requires_grad])
        )
    assert_same(*trained)


def test_a_checkpoint_of_trainers_stock_optimizer_is_taken_over_by_ours_and_back(tmp_path):
    """By `torch.load(weights_only=True)`, as Trainer does."""
    (layer, ours), (other, theirs) = both()
    train(layer, ours)
    train(other, theirs)
    for source, target in ((ours, theirs), (theirs, ours)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
    train(layer, ours)
    train(other, theirs)
    assert_same(layer, other)
