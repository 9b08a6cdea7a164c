"""Root mean square norms of models by our own kernel: which they are, and that a training stays
stock's."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from support.fused_trainings import SIZES, WAYS, arguments, examples, llama, train, trained_as_stock
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, Trainer
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import fastft
from fastft import _native
from fastft.integrations import fused_loss as fused_loss_module
from fastft.integrations import norms as norms_module
from fastft.integrations.fused_loss import FusedLossCallback
from fastft.integrations.norms import use_own_norms
from fastft.layers import rms_norm as room

needs_kernel = pytest.mark.skipif(
    _native.missing("cpu") is not None, reason="there is no library for CPUs"
)
KINDS = [LlamaRMSNorm, Olmo2RMSNorm, Gemma2RMSNorm]


@pytest.fixture
def computed(monkeypatch):
    """The norms that the kernel has computed, small ones too and on every processor."""
    monkeypatch.setattr(norms_module, "is_ahead", lambda: True)
    monkeypatch.setattr(room, "LEAST", 1)
    found = []

    def counting(real):
        return lambda *all: found.append(1) or real(*all)

    for name in ("rms_norm", "remembered"):
        monkeypatch.setattr(norms_module, name, counting(getattr(norms_module, name)))
    return found


def norm(kind=LlamaRMSNorm, width=48):
    made = kind(width)
    torch.manual_seed(2)
    nn.init.normal_(made.weight)
    return made


def inputs(width=48, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(3, 11, width).to(dtype).requires_grad_()


def results(module, x):
    y = module(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
    x.grad = None
    module.zero_grad()
    return found


@contextlib.contextmanager
def own(module):
    with contextlib.ExitStack() as stack:
        yield use_own_norms(nn.Sequential(module), stack)


@needs_kernel
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "gemma2", "gpt_oss"]
)
def test_norms_of_decoders_are_known_by_their_code(family, computed):
    config = AutoConfig.for_model(family, **SIZES, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.arange(3, 40).view(1, -1)
    expected = model(tokens).logits
    count = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    with contextlib.ExitStack() as stack:
        used = use_own_norms(model, stack)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(computed) == len(used) == count >= 3
    assert all("forward" not in vars(module) for module in model.modules())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients(kind, dtype, computed):
    module, x = norm(kind).to(dtype), inputs(dtype=dtype)
    expected = results(module, x)
    with own(module):
        found = results(module, x)
    close = {"rtol": 3e-2, "atol": 3e-2} if dtype != torch.float32 else {}
    torch.testing.assert_close(found, expected, **close)
    assert len(computed) == (dtype != torch.float16)


LLAMA = """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
"""
GEMMA = """
def _norm(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
def forward(self, x):
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)
"""
# what is put in the place of what; each is another function, whose instructions may be the same
OTHERS = [
    (LLAMA, "pow(2)", "pow(4)"),
    (LLAMA, "pow(2)", "pow(2.5)"),
    (LLAMA, "mean(-1", "mean(-2"),
    (LLAMA, "pow(2)", "pow(2.0)"),
    (LLAMA, "torch.float32", "torch.float64"),
    (LLAMA, "variance +", "variance -"),
    (LLAMA, "self.weight *", "self.weight +"),
    (LLAMA, "rsqrt", "sqrt"),
    (LLAMA, "hidden_states):", "hidden_states, scale=None):"),
    (GEMMA, "1.0 +", "2.0 +"),
    (GEMMA, "1.0 +", "1 +"),
    (GEMMA, "pow(2)", "pow(3)"),
    (GEMMA, "self.eps", "self.eps * 2"),
]


def of_source(source, kind, **names):
    """A class whose methods this text has."""
    methods = {}
    exec("import torch\n" + source, methods)  # by which compilers know a module from an object
    methods |= names
    own_methods = {name: methods[name] for name in ("forward", "_norm") if name in methods}
    return type("Norm", (kind,), own_methods)


@needs_kernel
@pytest.mark.parametrize("source, kind", [(LLAMA, LlamaRMSNorm), (GEMMA, Gemma2RMSNorm)])
def test_a_class_of_this_text_is_known_and_its_argument_keeps_its_name(source, kind, computed):
    for described in (False, True):
        text = source.replace("):\n    input", '):\n    """Text."""\n    input')
        text = text.replace("):\n    output", '):\n    """Text."""\n    output')
        module, x = norm(of_source(text if described else source, kind)), inputs()
        name = "x" if kind is Gemma2RMSNorm else "hidden_states"
        expected = module(x)
        with own(module):
            torch.testing.assert_close(module(**{name: x}), expected)
        assert computed or described  # Python 3.14 counts a docstring among the constants
        computed.clear()


@needs_kernel
@pytest.mark.parametrize("source, old, new", OTHERS)
def test_another_text_is_left_alone(source, old, new, computed):
    assert old in source
    kind = of_source(source.replace(old, new), LlamaRMSNorm if source == LLAMA else Gemma2RMSNorm)
    module = norm(kind)
    with own(module):
        module(inputs(48).abs())
    assert not computed


@needs_kernel
def test_another_torch_is_another_norm(computed):
    class Other:
        float32 = torch.float32
        rsqrt = staticmethod(torch.sqrt)

    module, x = norm(of_source(LLAMA, LlamaRMSNorm, torch=Other)), inputs()
    expected = module(x)
    with own(module):
        torch.testing.assert_close(module(x), expected)
    assert not computed


class Doubled(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class Inner(Gemma2RMSNorm):
    def _norm(self, x):
        return x


def _subclass(module):
    module.__class__ = Doubled


def _of_another_inner(module):
    module.__class__ = Inner


def _with_an_inner_of_its_own(module):
    module._norm = lambda x: x * 2


def _with_a_forward_of_its_own(module):
    module.forward = torch.tanh


def _whose_eps_is_a_tensor(module):
    module.variance_epsilon = torch.tensor(1e-3)


def _of_another_dtype(module):
    module.weight.data = module.weight.data.double()


CHANGES = [
    (LlamaRMSNorm, _subclass),
    (LlamaRMSNorm, _with_a_forward_of_its_own),
    (LlamaRMSNorm, _whose_eps_is_a_tensor),
    (LlamaRMSNorm, _of_another_dtype),
    (Gemma2RMSNorm, _of_another_inner),
    (Gemma2RMSNorm, _with_an_inner_of_its_own),
]


@needs_kernel
@pytest.mark.parametrize("kind, change", CHANGES)
def test_what_somebody_has_changed_is_left_alone(kind, change, computed):
    module = norm(kind)
    change(module)
    x = inputs()
    expected = module(x)
    with own(module):
        torch.testing.assert_close(module(x), expected)
    assert not computed


@needs_kernel
def test_options_are_read_when_they_are_needed(computed):
    module, x = norm(), inputs()
    with own(module):
        module.variance_epsilon = 0.5
        module.weight = nn.Parameter(torch.full((48,), 3.0))
        found = module(x)
    torch.testing.assert_close(found, module(x))
    assert len(computed) == 1


@needs_kernel
@pytest.mark.parametrize("kind, name", [(LlamaRMSNorm, "forward"), (Gemma2RMSNorm, "_norm")])
@pytest.mark.parametrize("of", ["class", "instance"])
def test_what_is_replaced_in_the_middle_of_a_training_counts(of, kind, name, computed, monkeypatch):
    module, x = norm(kind), inputs()
    with own(module):
        module(x)
        assert computed
        computed.clear()
        if of == "class":
            monkeypatch.setattr(kind, name, lambda self, x: x * 7)
        else:
            setattr(module, name, lambda x: x * 7)
        found = module(x)
        monkeypatch.undo()
    factor = 1.0 if name == "forward" else 1.0 + module.weight
    torch.testing.assert_close(found, 7 * x * factor)
    assert not computed


@needs_kernel
def test_hooks_see_what_they_always_see(computed):
    module, x, seen = norm(), inputs(), []
    module.register_forward_hook(lambda module, args, y: seen.append(args[0] is x) or y * 2)
    expected = module(x)
    with own(module):
        torch.testing.assert_close(module(x), expected)
    assert seen == [True, True] and computed


@needs_kernel
def test_passes_without_gradients_and_who_watches_have_torchs_operations(computed):
    module, x = norm(), inputs()
    expected = module(x).detach()
    with own(module):
        with torch.no_grad():
            assert torch.equal(module(x), expected)
        with BaseTorchFunctionMode():
            torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(torch.func.vmap(module)(x), expected)
        traced = torch.jit.trace(module, x, check_trace=False)
        torch.testing.assert_close(traced(x), expected)
        module.weight.requires_grad_(False)
        assert torch.equal(module(x.detach()), expected)
    assert not computed


@needs_kernel
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), torch.jit.script]
)
def test_a_copy_is_a_stock_one_with_weights_of_its_own(copied, computed):
    module, x = norm(), inputs()
    with own(module):
        made = copied(module)
        torch.testing.assert_close(made(x), module(x))
        assert len(computed) == 1
        if copied is not torch.jit.script:  # which shares them
            nn.init.zeros_(made.weight)
            assert not made(x).any() and module(x).any()


@needs_kernel
def test_who_keeps_its_method_has_the_models_own_afterwards(computed):
    module, x = norm(), inputs()
    with own(module):
        kept = module.forward
    assert "forward" not in vars(module)
    kept(x)
    assert not computed


@needs_kernel
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_training_has_stocks_losses_and_leaves_nothing(way, on, computed, tmp_path):
    callback = FusedLossCallback(rms_norm=on)
    trained_as_stock(tmp_path, way, callback)
    # the first of a model with an adapter has nothing to derive: its weight is frozen, too
    assert callback.norms == (3 - (way == "adapter")) * on and bool(computed) == on


@needs_kernel
def test_it_says_what_it_did(computed, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(fused_loss_module.logger, "info", said.append)
    train(tmp_path, llama(), [FusedLossCallback()])
    assert "fastft: 3 norms are computed in one pass" in said
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=examples())
    plugged = fastft.plug(trainer)
    trainer.train()
    assert "; 3 norms in one pass" in plugged.lines["loss"]


@needs_kernel
def test_small_norms_and_compiled_models_are_left_alone(computed, monkeypatch, tmp_path):
    callback = FusedLossCallback()
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    train(tmp_path, llama(), [callback], **compiled)
    assert callback.norms == 0
    monkeypatch.setattr(room, "LEAST", 1 << 40)
    train(tmp_path, llama(), [callback])
    assert callback.norms == 0 and not computed


def test_processors_without_wide_registers_keep_torchs(monkeypatch):
    for isa, ahead in (("baseline", False), ("avx2", True), ("avx512", True), (None, False)):
        monkeypatch.setattr(_native, "cpu_isa", lambda isa=isa: isa)
        assert room.is_ahead() == ahead


def test_it_is_a_switch(tmp_path):
    with pytest.raises(TypeError, match="rms_norm must be True or False, got 'no'"):
        FusedLossCallback(rms_norm="no")
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=examples())
    with pytest.raises(TypeError, match="rms_norm must be True or False, got 1"):
        fastft.plug(trainer, rms_norm=1)
    trainer = Trainer(llama(), arguments(tmp_path), callbacks=[FusedLossCallback()])
    with pytest.raises(ValueError, match="rms_norm=False needs rms_norm=False of the Trainer's"):
        fastft.plug(trainer, rms_norm=False)
