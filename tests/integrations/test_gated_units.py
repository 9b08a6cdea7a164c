"""Gated units of models by our own kernel: which they are, and that a training stays stock's."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from support.fused_trainings import (
    SIZES,
    WAYS,
    arguments,
    examples,
    gemma,
    llama,
    train,
    trained_as_stock,
)
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, Trainer
from transformers.models.llama.modeling_llama import LlamaMLP

import fastft
from fastft import _native
from fastft.integrations import fused_loss as fused_loss_module
from fastft.integrations import gated_units, linear_products
from fastft.integrations.fused_loss import FusedLossCallback
from fastft.integrations.gated_units import use_own_units
from fastft.integrations.probe import verdicts
from fastft.layers import swiglu as swiglu_room

needs_kernel = pytest.mark.skipif(
    _native.missing("cpu") is not None, reason="there is no library for CPUs"
)


@pytest.fixture
def units(monkeypatch):
    """The units that the kernel has computed, small ones too and on every processor."""
    monkeypatch.setattr(gated_units, "is_ahead", lambda: True)
    monkeypatch.setattr(swiglu_room, "LEAST", 1)
    computed = []
    for name in ("swiglu", "gated_down"):
        real = getattr(gated_units, name)
        monkeypatch.setattr(
            gated_units,
            name,
            lambda *all, real=real, name=name: computed.append(name) or real(*all),
        )
    return computed


def unit(**changes):
    return llama(**changes).model.layers[0].mlp


def inputs(module):
    torch.manual_seed(1)
    return torch.randn(3, 11, module.gate_proj.in_features, requires_grad=True)


def results(module, x):
    y = module(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
    x.grad = None
    module.zero_grad()
    return found


@needs_kernel
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2"])
def test_units_of_decoders_are_known_by_their_code(family, units):
    config = AutoConfig.for_model(family, **SIZES, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.arange(3, 40).view(1, -1)
    expected = model(tokens).logits
    with contextlib.ExitStack() as stack:
        used = use_own_units(model, stack)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(units) == len(used) == 1
    assert all("forward" not in vars(module) for module in model.modules())


class Doubled(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


class Limited(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7.0) * self.up_proj(x))


class Swapped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class WithOptions(LlamaMLP):
    def forward(self, x, *, scale=None):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class WithDefault(LlamaMLP):
    def forward(self, x=torch.ones(3, 32)):  # noqa: B008
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OtherName(LlamaMLP):
    def forward(self, states):
        return self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))


class Subclass(LlamaMLP):
    pass


@needs_kernel
def test_an_argument_keeps_its_name(units):
    """Also of a class that is defined in a function."""

    class Named(LlamaMLP):
        def forward(self, hidden_state):
            """With a docstring."""
            return self.down_proj(
                self.act_fn(self.gate_proj(hidden_state)) * self.up_proj(hidden_state)
            )

    for kind, name in ((Named, "hidden_state"), (OtherName, "states"), (LlamaMLP, "x")):
        module = unit()
        module.__class__ = kind
        x = inputs(module)
        expected = module(x)
        with contextlib.ExitStack() as stack:
            use_own_units(nn.Sequential(module), stack)
            torch.testing.assert_close(module(**{name: x}), expected)
    assert len(units) == 3


OTHERS = [Doubled, Limited, Swapped, WithOptions, WithDefault]


@needs_kernel
@pytest.mark.parametrize("kind", [*OTHERS, Subclass])
def test_another_forward_is_left_alone(kind, units):
    module = unit()
    module.__class__ = kind
    x = inputs(module)
    expected = results(module, x)
    with contextlib.ExitStack() as stack:
        use_own_units(nn.Sequential(module), stack)
        torch.testing.assert_close(results(module, x), expected)
    assert len(units) == (kind is Subclass)


@needs_kernel
def test_another_activation_is_left_alone(units):
    for model in (gemma(), llama(hidden_act="gelu")):
        with contextlib.ExitStack() as stack:
            use_own_units(model, stack)
            model(torch.arange(3, 20).view(1, -1))
    assert not units


class Seen(nn.SiLU):
    pass


def _with_hook(module):
    module.act_fn.register_forward_hook(lambda *call: call[-1] + 1)


def _with_pre_hook(module):
    module.act_fn.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _of_another_class(module):
    module.act_fn = Seen()


def _with_a_forward_of_its_own(module):
    module.act_fn.forward = torch.tanh


def _that_writes(module):
    module.act_fn = nn.SiLU(inplace=True)


CHANGES = [_with_hook, _with_pre_hook, _of_another_class, _with_a_forward_of_its_own, _that_writes]


@needs_kernel
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_an_activation_that_somebody_sees_or_changes_runs(change, late, units):
    module = unit()
    changed = copy.deepcopy(module)
    change(changed)
    x = inputs(module)
    expected = results(changed, x)
    with contextlib.ExitStack() as stack:
        if not late:
            change(module)
        use_own_units(nn.Sequential(module), stack)
        if late:
            change(module)
        torch.testing.assert_close(results(module, x), expected)
    assert not units


@needs_kernel
@pytest.mark.parametrize("owner, name", [("SiLU", "forward"), ("functional", "silu")])
def test_a_silu_that_somebody_has_replaced_is_his(owner, name, units, monkeypatch):
    module = unit()
    module.act_fn = nn.SiLU()
    x = inputs(module)
    with contextlib.ExitStack() as stack:
        use_own_units(nn.Sequential(module), stack)
        monkeypatch.setattr(
            getattr(nn, owner), name, lambda *args, **options: args[-1].tanh(), raising=True
        )
        y = module(x)
    torch.testing.assert_close(y, module.down_proj(module.gate_proj(x).tanh() * module.up_proj(x)))
    assert not units


@needs_kernel
def test_a_forward_that_is_replaced_in_the_middle_of_a_training_counts(units, monkeypatch):
    module = unit()
    x = inputs(module)
    with contextlib.ExitStack() as stack:
        use_own_units(nn.Sequential(module), stack)
        module(x)
        assert units
        units.clear()
        monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x * 7)
        assert torch.equal(module(x), x * 7)
        monkeypatch.undo()
    assert not units


@needs_kernel
@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("owner, name", [("Linear", "forward"), ("functional", "linear")])
@pytest.mark.parametrize("early", [True, False])
def test_layers_that_somebody_has_replaced_are_his(
    early, owner, name, products, units, monkeypatch
):
    monkeypatch.setattr(linear_products, "LEAST_WORK", 1)
    monkeypatch.setattr(linear_products.matrix_product, "LEAST", 1)
    module = unit()
    x, real = inputs(module), getattr(getattr(nn, owner), name)

    def replace():
        monkeypatch.setattr(getattr(nn, owner), name, lambda *all: real(*all) * 3)

    with contextlib.ExitStack() as stack:
        if early:
            replace()
        if products:
            linear_products.use_own_layers(module, stack)
        use_own_units(nn.Sequential(module), stack)
        if not early:
            replace()
        found = module(x)
    torch.testing.assert_close(found, module(x))
    assert units == ["swiglu"]


class Workspace(nn.Linear):
    """Writes each result where the one before was."""

    memory = torch.empty(33, 64)

    def forward(self, x):
        if torch.is_grad_enabled():
            return super().forward(x)
        rows = x.flatten(0, -2)
        out = self.memory[:, : self.out_features]
        return torch.mm(rows, self.weight.T, out=out).view(*x.shape[:-1], -1)


@needs_kernel
def test_passes_without_gradients_have_the_layers_order(units):
    module = unit()
    for name in ("gate_proj", "up_proj"):
        getattr(module, name).__class__ = Workspace
    x = inputs(module).detach()
    with torch.no_grad():
        expected = module(x)
        with contextlib.ExitStack() as stack:
            use_own_units(nn.Sequential(module), stack)
            assert torch.equal(module(x), expected)
    assert not units


@needs_kernel
def test_who_keeps_its_method_has_the_models_own_afterwards(units):
    module = unit()
    x = inputs(module)
    with contextlib.ExitStack() as stack:
        use_own_units(nn.Sequential(module), stack)
        kept = module.forward
        module.forward = lambda y: kept(y)
    module(x)
    assert not units


class Locked(LlamaMLP):
    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "lock"}


@needs_kernel
def test_a_copy_has_what_its_class_says(units):
    module = unit()
    module.__class__ = Locked
    module.lock = threading.Lock()
    with contextlib.ExitStack() as stack:
        use_own_units(nn.Sequential(module), stack)
        made = copy.deepcopy(module)
    assert not hasattr(made, "lock") and "forward" not in vars(made)


@needs_kernel
def test_a_hook_on_all_modules_sees_the_activation(units):
    module, seen = unit(), []
    x = inputs(module)
    with contextlib.ExitStack() as stack:
        use_own_units(nn.Sequential(module), stack)
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *call: seen.append(module)
        )
        stack.callback(handle.remove)
        module(x)
    assert module.act_fn in seen and not units


@needs_kernel
def test_the_layers_are_called_with_their_hooks_and_in_their_order(units):
    module, seen = unit(), []
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(module, name).register_forward_hook(lambda *call, name=name: seen.append(name))
    with contextlib.ExitStack() as stack:
        use_own_units(nn.Sequential(module), stack)
        module(inputs(module))
    assert seen == ["gate_proj", "up_proj", "down_proj"] and units


def _stock(layer):
    pass


def _that_has_a_bias(layer):
    layer.bias = nn.Parameter(torch.ones(layer.out_features))


def _that_is_seen(layer):
    layer.register_forward_hook(lambda *call: call[-1] * 2)


def _that_is_frozen(layer):
    layer.weight.requires_grad_(False)


def _of_another_kind(layer):
    layer.__class__ = Workspace


def _with_a_forward(layer):
    layer.forward = lambda y: F.linear(y, layer.weight) * 2


def _that_is_compiled(layer):
    layer.compile(backend="eager")


def _of_another_dtype(layer):
    layer.weight.data = layer.weight.data.double()
    layer.register_forward_pre_hook(lambda module, args: (args[0].double(),))


def _that_is_parametrized(layer):
    nn.utils.parametrizations.weight_norm(layer)


MORE = [
    _that_has_a_bias,
    _that_is_seen,
    _that_is_frozen,
    _of_another_kind,
    _with_a_forward,
    _that_is_compiled,
    _of_another_dtype,
    _that_is_parametrized,
]


@needs_kernel
@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("change", [_stock, *MORE])
def test_a_last_layer_that_is_more_than_a_product_is_called(change, products, units, monkeypatch):
    """With the input that it expects; one that is a product keeps none, whoever multiplies."""
    monkeypatch.setattr(linear_products, "LEAST_WORK", 1)
    monkeypatch.setattr(linear_products.matrix_product, "LEAST", 1)
    module = unit()
    change(module.down_proj)
    x = inputs(module)
    expected = results(module, x)
    with contextlib.ExitStack() as stack:
        used = linear_products.use_own_layers(module, stack) if products else set()
        use_own_units(nn.Sequential(module), stack)
        found = results(module, x)
    torch.testing.assert_close(found, expected)
    assert units == ["gated_down" if change is _stock else "swiglu"]
    if change is _stock:
        assert (id(module.down_proj) in used) == products


@needs_kernel
def test_two_thirds_of_a_unit_are_kept(units):
    def kept():
        memory = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: memory.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            y = module(x)
        of_model = {each.data_ptr() for each in (*module.parameters(), x)}
        return sum(size for place, size in memory.items() if place not in of_model), y

    module = unit()
    x = inputs(module)
    size = 3 * 11 * module.gate_proj.out_features
    assert kept()[0] == 4 * size  # gate, up, silu and y
    with contextlib.ExitStack() as stack:
        use_own_units(nn.Sequential(module), stack)
        assert kept()[0] == 2 * size


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_and_gradients_by_dtype(dtype, units):
    module = unit().to(dtype)
    x = inputs(module).detach().to(dtype).requires_grad_()
    expected = results(module, x)
    with contextlib.ExitStack() as stack:
        use_own_units(nn.Sequential(module), stack)
        found = results(module, x)
    close = {"rtol": 3e-2, "atol": 3e-2} if dtype != torch.float32 else {}
    torch.testing.assert_close(found, expected, **close)
    assert len(units) == (dtype != torch.float16)


@needs_kernel
def test_under_autocast_the_kernel_takes_what_the_layers_give(units):
    module = unit()
    with contextlib.ExitStack() as stack:
        use_own_units(nn.Sequential(module), stack)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(inputs(module)).dtype == torch.bfloat16
    assert units == ["swiglu"]


@needs_kernel
def test_who_watches_sees_torchs_operations(units):
    module = unit()
    x = inputs(module)
    expected = module(x)
    with contextlib.ExitStack() as stack:
        use_own_units(nn.Sequential(module), stack)
        with BaseTorchFunctionMode():
            torch.testing.assert_close(module(x), expected)
        torch.func.vmap(module)(x)
        assert not units
        scripted = torch.jit.trace(module, x, check_trace=False)
        torch.testing.assert_close(scripted(x), expected)
    assert not units


@needs_kernel
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_a_stock_one_with_weights_of_its_own(copied, units):
    module = unit()
    x = inputs(module)
    with contextlib.ExitStack() as stack:
        use_own_units(nn.Sequential(module), stack)
        made = copied(module)
        torch.testing.assert_close(made(x), module(x))
        nn.init.zeros_(made.down_proj.weight)
        assert not made(x).any()
    assert len(units) == 1


@needs_kernel
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_training_has_stocks_losses_and_leaves_nothing(way, own, units, tmp_path):
    callback = FusedLossCallback(swiglu=own)
    trained_as_stock(tmp_path, way, callback)
    assert callback.gated_units == int(own) and bool(units) == own


@needs_kernel
def test_it_says_what_it_did(units, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(fused_loss_module.logger, "info", said.append)
    callback = FusedLossCallback()
    train(tmp_path, llama(), [callback])
    assert "fastft: 1 gated unit is computed in one pass" in said
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=examples())
    plugged = fastft.plug(trainer)
    trainer.train()
    assert "; 1 gated unit in one pass" in plugged.lines["loss"]


@needs_kernel
def test_small_units_and_compiled_models_are_left_alone(units, monkeypatch, tmp_path):
    callback = FusedLossCallback()
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    train(tmp_path, llama(), [callback], **compiled)
    assert callback.gated_units == 0
    monkeypatch.setattr(swiglu_room, "LEAST", 1 << 40)
    train(tmp_path, llama(), [callback])
    assert callback.gated_units == 0 and not units


def test_processors_without_wide_registers_keep_torchs(monkeypatch):
    for isa, ahead in (("baseline", False), ("avx2", True), ("avx512", True), (None, False)):
        monkeypatch.setattr(_native, "cpu_isa", lambda isa=isa: isa)
        assert swiglu_room.is_ahead() == ahead


def test_it_is_a_switch(tmp_path):
    with pytest.raises(TypeError, match="swiglu must be True or False, got 'no'"):
        FusedLossCallback(swiglu="no")
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=examples())
    with pytest.raises(TypeError, match="swiglu must be True or False, got 1"):
        fastft.plug(trainer, swiglu=1)


@pytest.mark.parametrize("own", [True, False])
def test_plug_does_not_overrule_the_trainers_own_callback(own, tmp_path):
    callbacks = [FusedLossCallback(swiglu=own)]
    trainer = Trainer(llama(), arguments(tmp_path), callbacks=callbacks)
    if own:
        with pytest.raises(ValueError, match="swiglu=False needs swiglu=False of the Trainer's"):
            fastft.plug(trainer, swiglu=False)
    else:
        fastft.plug(trainer, swiglu=False).restore()
    fastft.plug(trainer).restore()


@needs_kernel
def test_the_probe_knows_a_model_with_our_layers(units, monkeypatch, tmp_path):
    """Both callbacks ask it, the second one while the units are ours."""
    asked, real = [], verdicts.judge
    monkeypatch.setattr(verdicts, "_verdicts", {})
    monkeypatch.setattr(verdicts, "judge", lambda *a, **k: asked.append(1) or real(*a, **k))
    counts = []
    for _ in range(2):
        callbacks = [FusedLossCallback(), fastft.PackingCallback()]
        options = {"data_collator": fastft.PackingCollator()}
        train(tmp_path, llama(), callbacks, options)
        counts.append(len(asked))
    assert counts[0] and counts == [counts[0]] * 2 and units
