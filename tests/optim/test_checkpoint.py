from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.nn import Parameter

from fastft.optim.adamw import AdamW
from fastft.optim.adamw_update import load_value

# the first is large enough for 8-bit states in bitsandbytes, and no whole blocks
SHAPES = [(70, 73), (63,), (507,)]
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
    "8bit": (torch.bfloat16, {"moments": "8bit"}),
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
    # the seed of stochastic rounding, before the first step
    first.load_state_dict(whole.state_dict())
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
    before, groups = (
        copy.deepcopy(states(optimizer)),
        copy.deepcopy(optimizer.state_dict()["param_groups"]),
    )
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert_same(states(prepared.optimizer), before)
    assert prepared.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "8bit"])  # which has no amsgrad
def test_from_one_mode_to_another(mode):
    # what the other mode has is taken, what only this one has starts from zero, the rest is dropped
    dtype, options = MODES[mode]
    saved = AdamW(start(torch.bfloat16), amsgrad=mode != "8bit")
    train(saved, gradients(2))
    optimizer = AdamW(start(dtype), **options)
    optimizer.load_state_dict(on_disk(saved.state_dict()))
    residue = {"exact": {"remainder"}, "8bit": {"remainder"}, "kahan": {"kahan"}}.get(mode, set())
    scales = {"exp_avg_scale", "exp_avg_sq_scale"}
    for mine, theirs in zip(states(optimizer), states(saved), strict=True):
        coded = mode == "8bit" and mine["exp_avg"].ndim > 1
        # came with the groups
        moments = {"exp_avg", "exp_avg_sq"} | (set() if mode == "8bit" else {"max_exp_avg_sq"})
        assert mine.keys() == {"step"} | moments | residue | (scales if coded else set())
        for name in () if coded else moments:
            assert torch.equal(mine[name], theirs[name].to(mine[name].dtype))
        if coded:
            assert mine["exp_avg"].dtype == torch.int8 and mine["exp_avg_sq"].dtype == torch.uint8
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
            assert mine[name].dtype == torch.float32 and torch.equal(
                mine[name], theirs[name].float()
            )
    assert ours.param_groups[0]["lr"] == 0.02
    train(ours, gradients(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_continues_from_our_state(dtype):
    # of bf16 parameters torch casts the moments to bf16, and does not know what the remainder is
    # for
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
                entries["state" + number] = truth[index][name] = torch.rand(
                    shape, generator=generator
                )
                continue
            codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            levels = torch.linspace(-1 if number == "1" else 0, 1, 256)
            absmax = torch.rand(-(-size // block), generator=generator)
            entries |= {"state" + number: codes, "qmap" + number: levels, "absmax" + number: absmax}
            pairs = enumerate(codes.flatten().tolist())
            values = [levels[code].double() * absmax[i // block].double() for i, code in pairs]
            truth[index][name] = torch.stack(values).float().view(shape)
        state[index] = (
            {"step": 7, "__bnb_optimizer_quant_state__": entries}
            if nested
            else {"step": 7, **entries}
        )
    group = {
        "lr": 0.1,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "alpha": 0.0,
        "t_alpha": None,
    }
    return {
        "state": state,
        "param_groups": [{**group, "t_beta3": None, "params": [0, 1, 2]}],
    }, truth


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
    """fp32 masters which bf16 drops bits of, one of them a tie that bf16 rounds to even, and AdamW
    states."""
    masters = [param.detach() for param in start(torch.float32, seed=9)]
    masters[1][0] = 1 + 2**-8
    moments = [{"exp_avg": torch.rand(shape), "exp_avg_sq": torch.rand(shape)} for shape in SHAPES]
    return masters, moments


def apex_group(**more):
    return {
        "lr": 0.1,
        "bias_correction": True,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.0,
    } | more


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
    for param, state, master, moment in zip(
        params, states(optimizer), masters, moments, strict=True
    ):
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
        state = {
            name: value
            for name, value in {**saved["state"][0], **entries}.items()
            if value is not None
        }
        return {**saved, "state": {**saved["state"], 0: state}}

    return {
        "more groups": (
            {**good, "param_groups": [group, group]},
            "different number of parameter groups",
        ),
        "fewer parameters": (
            {**good, "param_groups": [{**group, "params": [0], "master": masters[:1]}]},
            "size of",
        ),
        "masters": (
            {**good, "param_groups": [{**group, "master": masters[:1]}]},
            "1 masters for a group of 3",
        ),
        "master": (
            {**good, "param_groups": [{**group, "master": masters[::-1]}]},
            r"master of parameter 0.*\(507,\)",
        ),
        "no bias correction": (
            {**good, "param_groups": [{**group, "bias_correction": False}]},
            "bias_correction",
        ),
        "shape": (
            changed(good, exp_avg_sq=torch.zeros(9)),
            r"exp_avg_sq of parameter 0.*\(9,\).*\(70, 73\)",
        ),
        "another optimizer": (
            changed(good, exp_avg=None, momentum_buffer=torch.zeros(70, 73)),
            "exp_avg missing",
        ),
        "one moment": (changed(eight_bit, state2=None), "one moment"),
        "not block-wise": (changed(eight_bit, absmax1=None), "lacks absmax1"),
        "blocks": (
            changed(eight_bit, absmax2=torch.ones(5)),
            "absmax2 has 5 blocks for 5110 elements",
        ),
        "bad option": (
            {**good, "param_groups": [{**group, "lr": -1.0}]},
            "lr must be finite and not negative",
        ),
    }


@pytest.mark.parametrize("what", bad_checkpoints())
def test_a_refused_checkpoint_changes_nothing(what):
    saved, sentence = bad_checkpoints()[what]
    optimizer = AdamW(start(torch.bfloat16))
    params = train(optimizer, gradients(1))
    before, groups = (
        copy.deepcopy(states(optimizer)),
        copy.deepcopy(optimizer.state_dict()["param_groups"]),
    )
    weights = copy.deepcopy(params)
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(saved)
    assert_same(states(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    assert all(map(torch.equal, params, weights))


REFUSED = {  # of the first parameter's state: what it has become, the error, and what that says
    "step below 0": (
        {"step": torch.tensor(-5.0)},
        ValueError,
        "step of parameter 0.*not negative, got -5",
    ),
    "step NaN": ({"step": float("nan")}, ValueError, "step of parameter 0.*finite"),
    "step as text": (
        {"step": "three"},
        TypeError,
        "step of parameter 0 must be a number, got 'three'",
    ),
    "step None": ({"step": None}, TypeError, "step of parameter 0 must be a number"),
    "step of many": ({"step": torch.ones(2)}, TypeError, "step of parameter 0 must be a number"),
    "moment None": (
        {"exp_avg": None},
        TypeError,
        "exp_avg of parameter 0 must be a tensor, got None",
    ),
    "moment as text": (
        {"exp_avg_sq": "x"},
        TypeError,
        "exp_avg_sq of parameter 0 must be a tensor, got 'x'",
    ),
    "moment complex": (
        {"exp_avg": torch.ones(70, 73, dtype=torch.complex64)},
        TypeError,
        "exp_avg of parameter 0 must be floating-point numbers, is torch.complex64",
    ),
    "moment in integers": (
        {"exp_avg_sq": torch.ones(70, 73, dtype=torch.int64)},
        TypeError,
        "exp_avg_sq.*int64",
    ),
    "maximum None": (
        {"max_exp_avg_sq": None},
        TypeError,
        "max_exp_avg_sq of parameter 0 must be a tensor",
    ),
    "remainder None": ({"remainder": None}, TypeError, "remainder of parameter 0 must be a tensor"),
    "remainder in fp32": (
        {"remainder": torch.zeros(70, 73)},
        ValueError,
        "remainder of parameter 0.*16 bits",
    ),
    "compensation in integers": (
        {"kahan": torch.zeros(70, 73).int()},
        TypeError,
        "kahan of parameter 0.*int32",
    ),
    "master as text": (
        {"master_param": "x"},
        TypeError,
        "master of parameter 0 must be a tensor, got 'x'",
    ),
    "master complex": (
        {"master_param": torch.ones(70, 73) * 1j},
        TypeError,
        "master of parameter 0.*complex64",
    ),
}
CODED = {  # the same, of 8-bit moments
    **{
        f"without {name}": (
            {name: Ellipsis},
            ValueError,
            f"parameter 0.*lack.* {name}|parameter 0.*{name} missing",
        )
        for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    },
    "without both scales": (
        {"exp_avg_scale": Ellipsis, "exp_avg_sq_scale": Ellipsis},
        ValueError,
        "8-bit moments of parameter 0 lack exp_avg_scale, exp_avg_sq_scale",
    ),
    "scales of another tensor": (
        {"exp_avg_scale": torch.ones(9, 1)},
        ValueError,
        r"exp_avg_scale of parameter 0 has shape \(9, 1\); \(70, 73\) codes need \(70, 1\)",
    ),
    "scale None": (
        {"exp_avg_sq_scale": None},
        ValueError,
        "exp_avg_sq_scale of parameter 0.*is NoneType",
    ),
    "one moment in fp32": (
        {"exp_avg": torch.ones(70, 73)},
        ValueError,
        "exp_avg of parameter 0.*torch.int8",
    ),
    "codes under the other dtype": (
        {"exp_avg": torch.ones(70, 73, dtype=torch.uint8)},
        ValueError,
        "exp_avg of parameter 0.*must be torch.int8, is torch.uint8",
    ),
}


def check_refused(moments, change, error, sentence):
    optimizer = AdamW(start(torch.bfloat16), moments=moments, seed=1)
    params = train(optimizer, gradients(1))
    saved, groups = (
        copy.deepcopy(optimizer.state_dict()),
        copy.deepcopy(optimizer.state_dict()["param_groups"]),
    )
    train(optimizer, gradients(1, seed=2))
    before, weights = copy.deepcopy(states(optimizer)), copy.deepcopy(params)
    saved["param_groups"][0]["lr"] = 0.5
    for name, value in change.items():
        saved["state"][0].pop(name, None)
        if value is not Ellipsis:
            saved["state"][0][name] = value
    with pytest.raises(error, match=sentence):
        optimizer.load_state_dict(saved)
    assert_same(states(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    assert all(map(torch.equal, params, weights))


@pytest.mark.parametrize("what", REFUSED)
def test_an_entry_which_is_no_number_is_refused_by_name(what):
    check_refused("fp32", *REFUSED[what])


@pytest.mark.parametrize("moments", ["8bit", "fp32"])
@pytest.mark.parametrize("what", CODED)
def test_8_bit_moments_without_all_their_parts_are_refused(what, moments):
    change, error, sentence = CODED[what]
    if moments == "8bit":
        check_refused("8bit", change, error, sentence)
        return
    saved = AdamW(start(torch.bfloat16), moments="8bit", seed=1)
    train(saved, gradients(1))
    state = {
        name: value for name, value in saved.state_dict()["state"][0].items() if name not in change
    }
    state |= {name: value for name, value in change.items() if value is not Ellipsis}
    fp32_codes = {"exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"}
    check_refused("fp32", {**dict.fromkeys(fp32_codes, Ellipsis), **state}, error, sentence)


@pytest.mark.parametrize(
    ("state_dict", "error", "sentence"),
    [
        (None, TypeError, "state_dict must be an optimizer's state_dict.., got NoneType"),
        (
            {"param_groups": []},
            ValueError,
            "no optimizer's state dict: state missing, found param_groups",
        ),
        ({"state": {}}, ValueError, "param_groups missing, found state"),
        ({"fp32_from_fp16": []}, ValueError, "optimizer_state_dict missing"),
        (
            {"state": {0: 5}, "param_groups": [apex_group(params=[0, 1, 2])]},
            TypeError,
            "parameter 0 must be a dict",
        ),
    ],
)
def test_what_is_no_state_dict(state_dict, error, sentence):
    with pytest.raises(error, match=sentence):
        AdamW(start(torch.float32)).load_state_dict(state_dict)
