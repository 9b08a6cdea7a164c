"""The references of a comparison: noise of one unit in the last place, and fp32 weights."""

from types import SimpleNamespace

import pytest
import torch
from support.trainers import tiny_llama
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from fastft.integrations.recorder.weights import random_states
from fastft.integrations.reference_runs import add_noise, sum_exactly, train_in_fp32

IDS = torch.arange(3, 15).view(2, 6)


def inputs_of(module, model, **autocast):
    """What the module gets when the model is called."""
    seen = []
    hook = module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.autocast("cpu", **autocast):
        model(input_ids=IDS)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_noise_is_one_unit_of_the_dtype_in_which_the_head_computes(dtype, autocast):
    model = tiny_llama(attention_dropout=0.0).to(dtype)
    context = {"dtype": torch.bfloat16, "enabled": autocast}
    before = inputs_of(model.lm_head, model, **context)
    assert add_noise(model) == "one ulp on the output head's input"
    states = random_states()
    after = inputs_of(model.lm_head, model, **context)
    assert random_states() == states
    computes = torch.bfloat16 if autocast else dtype
    share = (after.double() / before.double() - 1).abs() / torch.finfo(computes).eps
    assert share.min() > 0.3 and share.max() < 1.6  # a product rounds once more
    signs = (after > before).float().mean()
    assert 0.3 < signs < 0.7


def test_noise_is_the_same_in_each_run_and_lets_gradients_through():
    runs = []
    for _ in range(2):
        model = tiny_llama(attention_dropout=0.0)
        add_noise(model)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        runs.append((loss, model.model.embed_tokens.weight.grad))
    assert all(map(torch.equal, *runs)) and runs[0][1].abs().sum() > 0


def test_a_classifier_gets_its_noise_before_its_last_module():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 97}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_attention_heads=2, **sizes)).eval()
    before = inputs_of(model.classifier, model, enabled=False)
    assert add_noise(model) == "one ulp on the input of classifier"
    after = inputs_of(model.classifier, model, enabled=False)
    assert 0 < (after - before).abs().max() < 1e-6


def test_a_model_of_ones_own_gets_its_noise_before_its_last_module_or_in_its_first_weight():
    assert add_noise(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))) == "one ulp on the input of 1"
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    assert add_noise(model) == "one ulp on weight, once"
    assert 0 < (model.weight - before).abs().max() < 1e-6


def test_weights_in_fp32_are_the_same_numbers_and_the_same_parameters():
    model = tiny_llama().to(torch.bfloat16)
    held, before = [*model.parameters()], [p.detach().clone() for p in model.parameters()]
    accelerator = SimpleNamespace(native_amp=True)
    train_in_fp32(model, accelerator)
    after = [*model.parameters()]
    assert all(one is other for one, other in zip(held, after, strict=True))
    assert all(torch.equal(one.float(), other) for one, other in zip(before, after, strict=True))
    assert {p.dtype for p in after} == {torch.float32} and not accelerator.native_amp


def a_large_vocabulary(dtype):
    torch.manual_seed(5)
    logits = torch.randn(7, 49_152) * 2
    logits[:, 17] += 18  # beside it the others are small, and many
    logits = logits.to(dtype).requires_grad_()
    losses = nn.functional.cross_entropy(logits, torch.arange(7), reduction="none")
    losses.sum().backward()
    return losses.detach().double(), logits.grad.double()


def test_exact_sums_of_a_large_vocabulary_are_those_of_float64():
    truth, stock = a_large_vocabulary(torch.float64), a_large_vocabulary(torch.float32)
    library = sum_exactly()
    try:
        exact = a_large_vocabulary(torch.float32)
        columns = torch.randn(3, 5, 2, requires_grad=True)
        torch.autograd.gradcheck(
            lambda value: value.log_softmax(1), columns.double().detach().requires_grad_()
        )
        expected = columns - columns.logsumexp(1, keepdim=True)
        torch.testing.assert_close(columns.log_softmax(1), expected)
    finally:
        library._destroy()
    for ours, theirs, right in zip(exact, stock, truth, strict=True):
        assert (ours - right).abs().max() < 0.3 * (theirs - right).abs().max()
    assert all(map(torch.equal, a_large_vocabulary(torch.float32), stock))
