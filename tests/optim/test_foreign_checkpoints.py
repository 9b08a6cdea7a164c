"""Checkpoints which other libraries made themselves: each loads right, so that the next step is the
one that they would have taken, or is refused by a sentence with the way to what loads."""

from __future__ import annotations

import copy

import pytest
import torch
from support import documentation, zero_checkpoints
from support.adamw_steps import (
    assert_same,
    assert_same_bits,
    clones,
    gradients,
    on_disk,
    params_of,
    snapshot,
    start,
    train,
)
from support.foreign_checkpoints import FIXTURES, KEPT, SHAPES, Genuine, genuine, next_weights
from support.numerics import assert_no_worse
from torch.distributed.checkpoint import state_dict as distributed

from fastft.optim.adamw import AdamW

LIBRARIES = {
    "bitsandbytes": ["AdamW", "AdamW32bit", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit"],
    "torchao": ["AdamW8bit", "AdamW4bit", "AdamWFp8"],
}
KINDS = [f"{library}.optim.{kind}" for library in LIBRARIES for kind in LIBRARIES[library]]


def check_next_step(made):
    optimizer = AdamW(clones(made.weights))
    optimizer.load_state_dict(made.saved)
    for param, pair in zip(params_of(optimizer), made.moments, strict=True):
        state = optimizer.state[param]
        assert state["step"] == 3
        assert_same_bits([state["exp_avg"], state["exp_avg_sq"]], [each.float() for each in pair])
    train(optimizer, [made.gradients])
    steps = zip(params_of(optimizer), made.next_weights, next_weights(made), strict=True)
    for mine, theirs, truth in steps:
        assert_no_worse(mine, theirs, truth)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_step_is_theirs(kind, dtype):
    pytest.importorskip(kind.partition(".")[0])
    check_next_step(genuine(kind, dtype))


@pytest.mark.parametrize("kind", KEPT)
def test_the_next_step_is_that_of_bitsandbytes_wherever_it_is_not(kind):
    kept = torch.load(FIXTURES / f"bitsandbytes-{kind}.pt", weights_only=True)
    check_next_step(Genuine(**kept))


@pytest.mark.parametrize("moments", ["8bit", "4bit"])
@pytest.mark.parametrize("kind", ["bitsandbytes.optim.AdamW8bit", "torchao.optim.AdamW4bit"])
def test_codes_of_theirs_become_codes_of_ours(kind, moments):
    pytest.importorskip(kind.partition(".")[0])
    made = genuine(kind, torch.float32)
    through = AdamW(clones(made.weights))
    through.load_state_dict(made.saved)
    ours = [AdamW(clones(made.weights), moments=moments, seed=1) for _ in range(2)]
    for optimizer, saved in zip(ours, (made.saved, through.state_dict()), strict=True):
        optimizer.load_state_dict(saved)
    assert any(name.endswith("scale") for state in ours[0].state.values() for name in state)
    assert_same(*map(snapshot, ours))


def offloaded(optimizer_class, params, least):
    """A state dict as torchao's CPUOffloadOptimizer makes it of its optimizers, on a GPU alone."""
    large = [optimizer_class([param], lr=0.02) for param in params if param.numel() >= least]
    small = [param for param in params if param.numel() < least]
    rest = optimizer_class(small, lr=0.02)
    for optimizer in (*large, rest):
        optimizer.step()
    return {
        "offloaded": [optimizer.state_dict() for optimizer in large],
        "on-device": rest.state_dict(),
    }


def test_torchaos_offload_has_an_optimizer_for_each_large_parameter():
    whole = torch.optim.AdamW(start(SHAPES), lr=0.02)
    train(whole, gradients(SHAPES, 1))
    pieces = start(SHAPES)
    for param, grad in zip(pieces, gradients(SHAPES, 1)[0], strict=True):
        param.grad = grad
    saved = offloaded(torch.optim.AdamW, pieces, least=500)
    frozen = torch.nn.Parameter(torch.ones(9999), requires_grad=False)
    first, *others = clones(params_of(whole))
    ours = AdamW([{"params": [frozen, first]}, {"params": others}])
    ours.load_state_dict(on_disk(saved))
    assert frozen not in ours.state
    assert [group["lr"] for group in ours.param_groups] == [0.02, 0.02]
    for mine, theirs in zip((first, *others), params_of(whole), strict=True):
        for name, value in whole.state[theirs].items():
            assert torch.equal(ours.state[mine][name], value)
    sentence = r"CPUOffloadOptimizer is of 2 large and 1 small parameters, .* trains 2"
    with pytest.raises(ValueError, match=sentence):
        AdamW(start(SHAPES[:2])).load_state_dict(saved)


@pytest.mark.parametrize("form", ["apex", "Transformer Engine"])
def test_steps_that_a_gpu_counts(form):
    # capturable=True: the step is an integer of one element, the rate a tensor
    torchs = torch.optim.AdamW(start(SHAPES), lr=0.02)
    params = train(torchs, gradients(SHAPES, 2))
    saved = copy.deepcopy(torchs.state_dict())
    for state in saved["state"].values():
        del state["step"]
    (group,) = saved["param_groups"]
    group |= {"step": torch.tensor([2], dtype=torch.int), "lr": torch.tensor(0.02)}
    group["bias_correction"] = True if form == "apex" else 1
    ours = AdamW(clones(params))
    ours.load_state_dict(on_disk(saved))
    assert all(state["step"] == 2 for state in ours.state.values())
    for _ in range(2):  # a second load is of our own
        train(ours, gradients(SHAPES, 1, seed=3))
        train(torchs, gradients(SHAPES, 1, seed=3))
        for mine, theirs in zip(params_of(ours), params_of(torchs), strict=True):
            torch.testing.assert_close(mine, theirs)
        ours.load_state_dict(on_disk(ours.state_dict()))


def trained_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return model, optimizer


def files_of_others():
    model, optimizer = trained_model()
    own = optimizer.state_dict()
    (group,) = own["param_groups"]
    flattened = distributed.get_optimizer_state_dict(
        model, optimizer, options=distributed.StateDictOptions(flatten_optimizer_state_dict=True)
    )
    zero = {"zero_stage": 2, "base_optimizer_state": own, "ds_version": "0.19.8"}
    deepspeed = "of a DeepSpeed checkpoint.*ds_to_universal.py"
    return {
        "DeepSpeed's file of a process": (
            {"optimizer_state_dict": zero, "ds_config": {}, "ds_version": "0.19.8"},
            deepspeed,
        ),
        "what ZeRO has in it": (zero, deepspeed),
        "ZeRO-3": (
            {"optimizer_state_dict": {"zero_stage": 3, "fp32_flat_groups": []}},
            deepspeed,
        ),
        "DeepSpeed's model": ({"module": {}, "ds_version": "0.19.8"}, deepspeed),
        "flattened": (
            flattened,
            r"found state.0.weight.step.* and 48 more. It is flattened.*of the class that saved it",
        ),
        "Lightning": (
            {"epoch": 1, "state_dict": {}, "optimizer_states": [own]},
            r"Its \['optimizer_states'\]\[0\] is one: load that",
        ),
        "a loop of one's own": (
            {"model": model.state_dict(), "optimizer": own},
            r"Its \['optimizer'\] is one: load that",
        ),
        "AdEMAMix": (
            {**own, "param_groups": [{**group, "betas": (0.9, 0.9, 0.9), "t_beta3": None}]},
            "AdEMAMix, which has two first moments",
        ),
    }


@pytest.mark.parametrize("file", files_of_others())
def test_a_file_of_others_is_refused_with_its_name_and_the_way_out(file):
    saved, sentence = files_of_others()[file]
    model, _ = trained_model()
    optimizer = AdamW(model.parameters())
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(saved)
    assert not optimizer.state and all(map(torch.equal, before, model.parameters()))


def test_torch_distributed_checkpoint_loads_what_it_has_of_torchs():
    model, optimizer = trained_model()
    saved = distributed.get_optimizer_state_dict(model, optimizer)
    ours = AdamW(model.parameters())
    distributed.set_optimizer_state_dict(model, ours, on_disk(saved))
    for param in model.parameters():
        for name, value in optimizer.state[param].items():
            assert torch.equal(ours.state[param][name], value)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zeros_parts_are_refused_and_what_deepspeed_writes_of_them_goes_on(stage, tmp_path):
    pytest.importorskip("deepspeed")
    truth = zero_checkpoints.made(tmp_path, stage)
    model = zero_checkpoints.model()
    optimizer = AdamW(model.parameters(), **zero_checkpoints.OPTIONS)
    parts = sorted((tmp_path / f"global_step{zero_checkpoints.STEPS}").glob("*.pt"))
    assert len(parts) >= 3
    for part in parts:
        with pytest.raises(ValueError, match="of a DeepSpeed checkpoint"):
            # genuine, and of our own making: it has a class of DeepSpeed in it
            optimizer.load_state_dict(torch.load(part, weights_only=False))
    assert not optimizer.state
    scope = {"torch": torch}
    (recipe,) = (text for text in documentation.python_blocks().values() if "ds_to_univ" in text)
    exec(recipe, scope)
    loaded = scope["whole_states"](tmp_path / "whole", model, optimizer, zero_checkpoints.STEPS)
    optimizer.load_state_dict(loaded)
    for name, param in model.named_parameters():
        assert torch.equal(param, truth["weights"][name])
        param.grad = truth["gradients"][name]
    optimizer.step()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach(), truth["next"][name], rtol=1e-6, atol=1e-7)
