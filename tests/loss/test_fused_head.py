"""TRL's `add_fused_lm_head`, answered from the model's own logits: the numbers and gradients of
plain logits."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from support.watch import Watch
from torch import nn

import fastft
from fastft.loss import head_sweep
from fastft.loss.lazy.output_head import Attachment

trl = pytest.importorskip("trl", minversion="1.16")
from support.trl_trainers import plain_log_probs  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

V = 97
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def inputs(rows=3, length=11, classes=V, ignored=0.3):
    ids = torch.randint(0, classes, (rows, length))
    return ids, ids.masked_fill(torch.rand(rows, length) < ignored, -100)


def plain(model, ids, labels, *, temperature=1.0, shift_labels=None, **options):
    logits = model(ids, **options).logits.float() / temperature
    if shift_labels is not None:
        return plain_log_probs(logits, shift_labels)
    return plain_log_probs(logits[:, :-1], labels[:, 1:])


def check(model, *, head=None, given=None, rtol=1e-5, atol=2e-6, fused=1, **options):
    """The answer against plain logits, with the gradients of all that is trained."""
    ids, labels = inputs(classes=model.config.vocab_size)
    given = given or {}
    truth = plain(model, ids, labels, temperature=(head or {}).get("temperature", 1.0), **given)
    weights = [p for p in model.parameters() if p.requires_grad]
    upstream = torch.randn(2, *truth["log_probs"].shape)

    def gradients(log_probs, entropy):
        total = (log_probs * upstream[0] + entropy * upstream[1]).sum()
        return torch.autograd.grad(total, weights, allow_unused=True)

    wanted = gradients(truth["log_probs"], truth["entropy"])
    add_fused_lm_head(base_of(model), **{"outputs": OUTPUTS, **(head or {})})
    theirs = vars(base_of(model))["forward"]
    with fastft.fused_loss(model) as report:
        result = model(ids, labels=labels, fused_lm_head=True, **given)
        found = gradients(result.log_probs, result.entropy)
    assert vars(base_of(model))["forward"] is theirs
    assert report.fused == fused
    close = {"rtol": rtol, "atol": atol}
    for name in (*OUTPUTS, "label_mask"):
        torch.testing.assert_close(getattr(result, name), truth[name], **close)
        assert getattr(result, name).requires_grad == (name in ("log_probs", "entropy"))
    mean = -truth["log_probs"].sum() / truth["label_mask"].sum()
    torch.testing.assert_close(result.loss, mean, **close)
    for ours, exact in zip(found, wanted, strict=True):
        assert (ours is None) == (exact is None)
        if ours is not None:
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    return report, result


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def build(name, **config):
    """A small model of a class of transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, **config}
    made = getattr(transformers, f"{name}Config")(**sizes, pad_token_id=0, use_cache=True)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(made).train()


MODELS = {
    "Llama": {},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Gemma2": {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "GPTJ": {"n_embd": 32, "n_head": 4, "n_layer": 1, "rotary_dim": 4},
}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", MODELS)
def test_a_models_own_scale_softcap_and_bias(name, temperature):
    model = build(name, **MODELS[name])
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    report, _ = check(model, head={"temperature": temperature})
    assert not report.materialised and not report.skipped


def test_a_softcap_that_trl_does_not_read():
    """RecurrentGemma's configuration has another name for it: TRL's own head leaves it out."""
    model = build("RecurrentGemma", logits_soft_cap=0.3, lru_width=32, block_types=["attention"])
    _, result = check(model)
    ids, labels = inputs()
    theirs = model(ids, labels=labels, fused_lm_head=True).mean_logits
    assert theirs.shape == result.mean_logits.shape
    ours = plain(model, ids, labels)["entropy"]
    assert (model(ids, labels=labels, fused_lm_head=True).entropy - ours).abs().max() > 1e-3


def with_lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).train()


HEADS = {
    "LoRA": ({"target_modules": ["q_proj", "lm_head"]}, 1),
    "DoRA": ({"target_modules": ["lm_head"], "use_dora": True}, 1),
    "a trained copy": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 1),
    "adapters elsewhere": ({"target_modules": ["q_proj"]}, 1),
}


@pytest.mark.parametrize("name", HEADS)
def test_adapters_on_the_head(name):
    """TRL reads the base weight there, and knows nothing of them."""
    options, fused = HEADS[name]
    report, _ = check(with_lora(build("Llama"), **options), fused=fused)
    assert bool(report.materialised) == (not fused)


@pytest.mark.parametrize("name", HEADS)
def test_the_same_model_without_its_adapters_is_a_reference(name):
    model, (ids, labels) = with_lora(build("Llama"), **HEADS[name][0]), inputs()
    with model.disable_adapter(), torch.no_grad():
        truth = plain(model, ids, labels)
    add_fused_lm_head(model.get_base_model(), outputs=OUTPUTS)
    with fastft.fused_loss(model) as report, model.disable_adapter(), torch.no_grad():
        result = model(ids, labels=labels, fused_lm_head=True)
    assert report.fused == 1
    torch.testing.assert_close(result.log_probs, truth["log_probs"])


DIFFERENCES = {
    "none": (lambda: build("Cohere", logit_scale=0.25), None),
    "a softcap": (
        lambda: build(
            "RecurrentGemma", logits_soft_cap=0.3, lru_width=32, block_types=["attention"]
        ),
        "it reads a scale of 1 and a softcap of 0 in the configuration, the model's code has 1 and "
        "0.3",
    ),
    "an adapter": (
        lambda: with_lora(build("Llama"), target_modules=["lm_head"]),
        "it reads the weight of the output head alone, which has an adapter",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_where_the_formula_of_trl_is_not_the_models_it_is_said(name):
    make, words = DIFFERENCES[name]
    model, (ids, labels) = make(), inputs()
    add_fused_lm_head(base_of(model))
    attachment = Attachment(model)
    model(ids, labels=labels, fused_lm_head=True)
    assert [head.difference for head in attachment.fused_heads] == [words]
    attachment.remove()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_and_in_evaluation_mode(training, dtype, monkeypatch):
    model, (ids, labels) = build("Llama").to(dtype).train(training), inputs()
    add_fused_lm_head(model, outputs=OUTPUTS)
    monkeypatch.setitem(head_sweep._LIMITS, "cpu", (0, 4, 4, 0))
    with torch.no_grad():
        truth = plain(model, ids, labels)
        with fastft.fused_loss(model) as report, Watch() as watch:
            result = model(ids, labels=labels, fused_lm_head=True)
    assert report.fused == 1 and watch.elements <= V * 48
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}
    torch.testing.assert_close(result.log_probs, truth["log_probs"], **tolerance)


def test_labels_that_are_shifted_already_and_items_of_all_processes():
    model, (ids, labels) = build("Llama"), inputs()
    truth = plain(model, ids, labels, shift_labels=labels)
    add_fused_lm_head(model)
    with fastft.fused_loss(model):
        result = model(
            ids, shift_labels=labels, num_items_in_batch=torch.tensor(70), fused_lm_head=True
        )
    torch.testing.assert_close(result.log_probs, truth["log_probs"])
    torch.testing.assert_close(result.loss, -truth["log_probs"].sum() / 70)
    assert result.entropy is result.mean_logits is result.is_top1 is None


def test_no_label_at_all_has_a_gradient_of_zero():
    model, (ids, labels) = build("Llama"), inputs(ignored=1.1)
    add_fused_lm_head(model, outputs=OUTPUTS)
    with fastft.fused_loss(model):
        result = model(ids, labels=labels, fused_lm_head=True)
        result.loss.backward()
    assert not result.label_mask.any() and not any(
        getattr(result, name).any() for name in (*OUTPUTS, "loss")
    )
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_in_fp32_over_a_16_bit_model(autocast):
    model, (ids, labels) = build("Llama"), inputs()
    model = model if autocast else model.bfloat16()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        hidden = model.model(ids).last_hidden_state[:, :-1].float()
    truth = plain_log_probs(hidden @ model.lm_head.weight.float().T / 0.5, labels[:, 1:])
    add_fused_lm_head(model, temperature=0.5, cast_lm_head_to_fp32=True, outputs=OUTPUTS)
    with fastft.fused_loss(model) as report:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = model(ids, labels=labels, fused_lm_head=True)
        result.loss.backward()
    assert report.fused == 1 and model.lm_head.weight.grad.dtype == model.lm_head.weight.dtype
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(result, name), truth[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asked", [True, False])
def test_the_loss_of_a_router_is_the_models_own(asked):
    model = build(
        "Mixtral", num_local_experts=4, router_aux_loss_coef=0.5, output_router_logits=asked
    )
    ids, labels = inputs()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    given = {} if asked else {"output_router_logits": True}
    stock = model(ids, attention_mask=mask, labels=labels, **given)
    add_fused_lm_head(model)
    with fastft.fused_loss(model):
        result = model(ids, attention_mask=mask, labels=labels, fused_lm_head=True, **given)
    torch.testing.assert_close(result.aux_loss, stock.aux_loss)
    torch.testing.assert_close(result.loss, stock.loss)


def test_what_does_not_ask_for_it_is_as_ever():
    model, (ids, labels) = build("Llama"), inputs()
    before = inspect.signature(model.forward)
    add_fused_lm_head(model)
    loss, theirs = model(ids, labels=labels).loss, vars(model)["forward"]
    with fastft.fused_loss(model) as report:
        assert inspect.signature(model.forward) == before
        torch.testing.assert_close(model(ids, labels=labels).loss, loss)
        assert report.fused == 1 and not report.materialised
        tokens = model.generate(ids[:1], max_new_tokens=3, do_sample=False)
        twin = copy.deepcopy(model)
        assert twin(ids, labels=labels, fused_lm_head=True).log_probs.shape == (3, 10)
        assert twin.forward.__func__ is theirs.__func__ and report.fused == 1
    assert torch.equal(model.generate(ids[:1], max_new_tokens=3, do_sample=False), tokens)


def test_two_at_a_time_and_a_model_that_raises():
    model, (ids, labels) = build("Llama"), inputs()
    add_fused_lm_head(model)
    theirs = vars(model)["forward"]
    with fastft.fused_loss(model) as first, fastft.fused_loss(model) as second:
        model(ids, labels=labels, fused_lm_head=True)
        with pytest.raises(IndexError):
            model(ids + V, labels=labels, fused_lm_head=True)
        with torch.no_grad():  # nobody asks for log-probabilities any more
            assert type(model(ids).logits) is torch.Tensor
    assert (first.fused, second.fused) == (0, 1)
    assert vars(model)["forward"] is theirs and "forward" not in vars(model.lm_head)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_head_that_is_not_a_plain_layer_is_left_to_trl():
    model = build("Llama")
    model.lm_head.__class__ = Scaled
    add_fused_lm_head(model)
    theirs = vars(model)["forward"]
    with fastft.fused_loss(model) as report:
        assert vars(model)["forward"] is theirs
    assert report.skipped == ["the output head is a Scaled, not a plain torch.nn.Linear"]


def test_a_hook_on_the_gradient_of_logits_leaves_it_to_trl():
    model, (ids, labels) = build("Llama"), inputs()
    add_fused_lm_head(model)
    expected = model(ids, labels=labels, fused_lm_head=True).log_probs
    model.lm_head.register_full_backward_hook(lambda *_: None)
    with fastft.fused_loss(model) as report:
        result = model(ids, labels=labels, fused_lm_head=True)
    assert report.fused == 0 and "backward hook" in report.skipped[0]
    torch.testing.assert_close(result.log_probs, expected, rtol=0, atol=0)


def test_logits_that_a_model_computes_with_are_right():
    """Nothing is saved where the model itself asks for numbers."""

    class Sorted(type(build("Llama"))):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits.flip(-1)
            return outputs

    model = build("Llama")
    model.__class__ = Sorted
    report, _ = check(model, fused=0)
    assert "flip" in report.materialised[0]


@pytest.mark.slow
def test_compiled():
    model, (ids, labels) = build("Llama"), inputs()
    truth = plain(model, ids, labels)
    add_fused_lm_head(model, outputs=OUTPUTS)
    compiled = torch.compile(model, backend="eager")
    with fastft.fused_loss(compiled) as report:
        result = compiled(ids, labels=labels, fused_lm_head=True)
        result.loss.backward()
    assert report.fused == 1
    torch.testing.assert_close(result.log_probs, truth["log_probs"])
    torch.testing.assert_close(result.entropy, truth["entropy"])
