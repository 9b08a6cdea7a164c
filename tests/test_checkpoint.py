from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.nn import Parameter

from fastft.optim.adamw import AdamW
from fastft.optim.adamw_update import load_value

SHAPES = [(70, 73), (63,), (507,)]  # the first is large enough for 8-bit states in bitsandbytes, and no whole blocks
DTYPES = [torch.float32, torch.bfloat16]


def start(dtype, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(steps, seed=1, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(steps)]


def train(optimizer, steps_of_grads):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for grads in steps_of_grads:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()
    return params


def clones(params):
    return [Parameter(param.detach().clone()) for param in params]


def on_disk(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def states(optimizer):
    return [optimizer.state[param] for group in optimizer.param_groups for param in group["params"]]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


MODES = {
    "fp32": (torch.float32, {}),
    "fp32 amsgrad": (torch.float32, {"amsgrad": True}),
    "fp32 bf16 moments": (torch.float32, {"moments": "bf16", "amsgrad": True}),
    "exact": (torch.bfloat16, {}),
    "kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic", "moments": "bf16"}),
    "nearest": (torch.bfloat16, {"rounding": "nearest"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_state_dict_keeps_every_dtype_and_bit(mode):
    dtype, options = MODES[mode]
    trained = AdamW(start(dtype), **options)
    train(trained, gradients(3))
    loaded = AdamW(start(dtype), **options)
    loaded.load_state_dict(on_disk(trained.state_dict()))
    assert_same(states(loaded), states(trained))
    assert loaded.state_dict()["param_groups"] == trained.state_dict()["param_groups"]


@pytest.mark.parametrize("mode", MODES)
def test_resuming_equals_no_interruption(mode):
    dtype, options = MODES[mode]
    whole, first = AdamW(start(dtype), **options), AdamW(start(dtype), **options)
    first.load_state_dict(whole.state_dict())  # the seed of stochastic rounding, before the first step
    train(whole, gradients(8))
    resumed = AdamW(clones(train(first, gradients(8)[:5])), **options)
    resumed.load_state_dict(on_disk(first.state_dict()))
    train(resumed, gradients(8)[5:])
    assert_same(states(resumed), states(whole))
    assert all(map(torch.equal, resumed.param_groups[0]["params"], whole.param_groups[0]["params"]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [0, 2])
def test_accelerate_prepares_without_a_loss(mode, steps):
    accelerate = pytest.importorskip("accelerate")
    dtype, options = MODES[mode]
    optimizer = AdamW(start(dtype), **options)
    train(optimizer, gradients(steps))
    before, groups = copy.deepcopy(states(optimizer)), copy.deepcopy(optimizer.state_dict()["param_groups"])
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert_same(states(prepared.optimizer), before)
    assert prepared.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("mode", MODES)
def test_from_one_mode_to_another(mode):
    # what the other mode has is taken, what only this one has starts from zero, the rest is dropped
    saved = AdamW(start(torch.bfloat16), amsgrad=True)
    train(saved, gradients(2))
    dtype, options = MODES[mode]
    optimizer = AdamW(start(dtype), **options)
    optimizer.load_state_dict(on_disk(saved.state_dict()))
    expected = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}  # amsgrad came with the groups
    expected |= {"exact": {"remainder"}, "kahan": {"kahan"}}.get(mode, set())
    for mine, theirs in zip(states(optimizer), states(saved), strict=True):
        assert mine.keys() == expected
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(mine[name], theirs[name].to(mine[name].dtype))
    train(optimizer, gradients(1))


@pytest.mark.parametrize("saved_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["fused", "foreach", "loop"])
def test_torchs_checkpoints_of_any_dtype(saved_dtype, dtype, way):
    options = {"fused": way == "fused", "foreach": way == "foreach", "amsgrad": way == "loop"}
    torchs = torch.optim.AdamW(start(saved_dtype), lr=0.02, **options)
    train(torchs, gradients(2))
    ours = AdamW(start(dtype))
    ours.load_state_dict(on_disk(torchs.state_dict()))
    assert ours.param_groups[0]["amsgrad"] == options["amsgrad"]
    for mine, theirs in zip(states(ours), states(torchs), strict=True):
        assert mine["step"] == theirs["step"] == 2
        assert theirs.keys() <= mine.keys()
        for name in theirs.keys() - {"step"}:
            assert mine[name].dtype == torch.float32 and torch.equal(mine[name], theirs[name].float())
    assert ours.param_groups[0]["lr"] == 0.02
    train(ours, gradients(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_continues_from_our_state(dtype):
    # of bf16 parameters torch casts the moments to bf16, and does not know what the remainder is for
    ours = AdamW(start(dtype))
    params = train(ours, gradients(4))
    torchs = torch.optim.AdamW(clones(params))
    torchs.load_state_dict(on_disk(ours.state_dict()))
    for mine, theirs in zip(states(ours), states(torchs), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert theirs[name].dtype == dtype and torch.equal(theirs[name], mine[name].to(dtype))
    train(torchs, gradients(3, seed=2))
    train(ours, gradients(3, seed=2))
    near = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    for mine, theirs in zip(params, torchs.param_groups[0]["params"], strict=True):
        assert torchs.state[theirs]["step"] == ours.state[mine]["step"] == 7
        torch.testing.assert_close(mine, theirs, **near)


@pytest.mark.parametrize("mode", MODES)
def test_the_form_for_torch(mode):
    dtype, options = MODES[mode]
    ours = AdamW(start(dtype), **options)
    params = train(ours, gradients(4))
    written = on_disk(ours.torch_state_dict())
    torchs = torch.optim.AdamW([Parameter(param.detach().float()) for param in params])
    assert written["param_groups"][0].keys() <= torchs.param_groups[0].keys()
    torchs.load_state_dict(written)
    train(torchs, gradients(1, seed=3))
    fp32 = AdamW([Parameter(param.detach().float()) for param in params])
    fp32.load_state_dict(ours.state_dict())
    train(fp32, gradients(1, seed=3))
    for mine, theirs in zip(states(fp32), states(torchs), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name].float())


def bitsandbytes_state(nested, block):
    """A state as bitsandbytes writes it, and what it stands for: code by code, in float64."""
    generator = torch.Generator().manual_seed(4)
    state, truth = {}, {}
    for index, shape in enumerate(SHAPES):
        size = torch.Size(shape).numel()
        entries, truth[index] = {}, {}
        for number, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
            if size < 4096:
                entries["state" + number] = truth[index][name] = torch.rand(shape, generator=generator)
                continue
            codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            levels = torch.linspace(-1 if number == "1" else 0, 1, 256)
            absmax = torch.rand(-(-size // block), generator=generator)
            entries |= {"state" + number: codes, "qmap" + number: levels, "absmax" + number: absmax}
            pairs = enumerate(codes.flatten().tolist())
            values = [levels[code].double() * absmax[i // block].double() for i, code in pairs]
            truth[index][name] = torch.stack(values).float().view(shape)
        state[index] = {"step": 7, "__bnb_optimizer_quant_state__": entries} if nested else {"step": 7, **entries}
    group = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "alpha": 0.0, "t_alpha": None}
    return {"state": state, "param_groups": [{**group, "t_beta3": None, "params": [0, 1, 2]}]}, truth


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("nested", "block"), [(True, 256), (False, 2048)])
def test_bitsandbytes_checkpoints(dtype, nested, block):
    saved, truth = bitsandbytes_state(nested, block)
    optimizer = AdamW(start(dtype))
    optimizer.load_state_dict(on_disk(saved))
    for index, state in enumerate(states(optimizer)):
        assert state["step"] == 7 and not any("state" in name for name in state)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], truth[index][name])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    train(optimizer, gradients(1))


def test_bitsandbytes_itself():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for cls in (bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.AdamW):
        theirs = cls(start(torch.float32))
        train(theirs, gradients(3))
        ours = AdamW(start(torch.float32))
        ours.load_state_dict(on_disk(theirs.state_dict()))
        for mine, state in zip(states(ours), states(theirs), strict=True):
            assert mine["step"] == 3
            for number, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
                expected = state["state" + number]
                if expected.dtype == torch.uint8:
                    absmax, code = state["absmax" + number], state["qmap" + number]
                    expected = bitsandbytes.functional.dequantize_blockwise(
                        expected, absmax=absmax, code=code, blocksize=256
                    )
                assert torch.equal(mine[name], expected)


def mixed_precision_states():
    """fp32 masters which bf16 drops bits of, one of them a tie that bf16 rounds to even, and AdamW states."""
    masters = [param.detach() for param in start(torch.float32, seed=9)]
    masters[1][0] = 1 + 2**-8
    moments = [{"exp_avg": torch.rand(shape), "exp_avg_sq": torch.rand(shape)} for shape in SHAPES]
    return masters, moments


def apex_group(**more):
    return {"lr": 0.1, "bias_correction": True, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0} | more


def with_masters(form, masters, moments):
    params = list(range(len(masters)))
    stepped = {i: {**state, "step": 5} for i, state in enumerate(moments)}
    if form == "group":
        groups = [apex_group(step=5, params=params, master=masters)]
        return {"state": dict(enumerate(moments)), "param_groups": groups}
    if form == "FP16_Optimizer":
        inner = {"state": stepped, "param_groups": [apex_group(params=params)]}
        return {"loss_scaler": None, "optimizer_state_dict": inner, "fp32_from_fp16": [masters]}
    state = {i: {**stepped[i], "master_param": master} for i, master in enumerate(masters)}
    return {"state": state, "param_groups": [apex_group(params=params)]}


@pytest.mark.parametrize("form", ["group", "FP16_Optimizer", "master_param"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_of_apex_and_transformer_engine(form, dtype):
    masters, moments = mixed_precision_states()
    params = [Parameter(master.to(dtype)) for master in masters]
    optimizer = AdamW(params)
    optimizer.load_state_dict(on_disk(with_masters(form, masters, moments)))
    for param, state, master, moment in zip(params, states(optimizer), masters, moments, strict=True):
        assert torch.equal(load_value(param.detach(), state.get("remainder")), master)
        assert state["step"] == 5 and torch.equal(state["exp_avg"], moment["exp_avg"])
        assert "master_param" not in state
    assert not {"master", "step", "bias_correction"} & optimizer.param_groups[0].keys()
    train(optimizer, gradients(1))


def test_remainders_of_transformer_engine():
    optimizer = AdamW(start(torch.bfloat16))
    train(optimizer, gradients(3))
    saved = optimizer.state_dict()
    for state, own in zip(saved["state"].values(), states(optimizer), strict=True):
        del state["remainder"]
        state["master_param"] = own["remainder"]  # int16
    loaded = AdamW(start(torch.bfloat16))
    loaded.load_state_dict(on_disk(saved))
    assert_same(states(loaded), states(optimizer))


def bad_checkpoints():
    masters, moments = mixed_precision_states()
    good = with_masters("group", masters, moments)
    (group,) = good["param_groups"]
    eight_bit = bitsandbytes_state(nested=False, block=256)[0]

    def changed(saved, **entries):
        state = {name: value for name, value in {**saved["state"][0], **entries}.items() if value is not None}
        return {**saved, "state": {**saved["state"], 0: state}}

    return {
        "more groups": ({**good, "param_groups": [group, group]}, "different number of parameter groups"),
        "fewer parameters": ({**good, "param_groups": [{**group, "params": [0], "master": masters[:1]}]}, "size of"),
        "masters": ({**good, "param_groups": [{**group, "master": masters[:1]}]}, "1 masters for a group of 3"),
        "master": ({**good, "param_groups": [{**group, "master": masters[::-1]}]}, r"master of parameter 0.*\(507,\)"),
        "no bias correction": ({**good, "param_groups": [{**group, "bias_correction": False}]}, "bias_correction"),
        "shape": (changed(good, exp_avg_sq=torch.zeros(9)), r"exp_avg_sq of parameter 0.*\(9,\).*\(70, 73\)"),
        "another optimizer": (changed(good, exp_avg=None, momentum_buffer=torch.zeros(70, 73)), "exp_avg missing"),
        "one moment": (changed(eight_bit, state2=None), "one moment"),
        "not block-wise": (changed(eight_bit, absmax1=None), "lacks absmax1"),
        "blocks": (changed(eight_bit, absmax2=torch.ones(5)), "absmax2 has 5 blocks for 5110 elements"),
        "bad option": ({**good, "param_groups": [{**group, "lr": -1.0}]}, "lr must be finite and not negative"),
    }


@pytest.mark.parametrize("what", bad_checkpoints())
def test_a_refused_checkpoint_changes_nothing(what):
    saved, sentence = bad_checkpoints()[what]
    optimizer = AdamW(start(torch.bfloat16))
    params = train(optimizer, gradients(1))
    before, groups = copy.deepcopy(states(optimizer)), copy.deepcopy(optimizer.state_dict()["param_groups"])
    weights = copy.deepcopy(params)
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(saved)
    assert_same(states(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    assert all(map(torch.equal, params, weights))
