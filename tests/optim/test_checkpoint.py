from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.adamw_modes import MODES
from support.adamw_steps import (
    ENGINES,
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
from support.foreign_checkpoints import (
    SHAPES,
    apex_group,
    bitsandbytes_state,
    mixed_precision_states,
    with_masters,
)

from fastft.optim.adamw import AdamW
from fastft.optim.moment_blocks import SCALES
from fastft.optim.moment_codes import CODES

DTYPES = [torch.float32, torch.bfloat16]


def states(optimizer):
    return [optimizer.state[param] for param in params_of(optimizer)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [0, 2])
def test_accelerate_prepares_without_a_loss(mode, steps):
    accelerate = pytest.importorskip("accelerate")
    optimizer = AdamW(start(SHAPES, MODES[mode].dtype), **MODES[mode].options)
    train(optimizer, gradients(SHAPES, steps))
    before = copy.deepcopy(states(optimizer))
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert_same(states(prepared.optimizer), before)
    assert prepared.state_dict()["param_groups"] == groups


@pytest.mark.parametrize(
    "mode", [mode for mode, kept in MODES.items() if kept.moments not in CODES]
)  # no amsgrad there
def test_from_one_mode_to_another(mode):
    # what the other mode has is taken, what only this one has starts from zero, the rest is dropped
    saved = AdamW(start(SHAPES, torch.bfloat16), amsgrad=True)  # comes with the groups
    train(saved, gradients(SHAPES, 2))
    optimizer = AdamW(start(SHAPES, MODES[mode].dtype), **MODES[mode].options)
    optimizer.load_state_dict(on_disk(saved.state_dict()))
    rounding = mode.partition("-")[0]
    residue = {"exact": {"remainder"}, "kahan": {"kahan"}}.get(rounding, set())
    moments = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    for mine, theirs in zip(states(optimizer), states(saved), strict=True):
        assert mine.keys() == {"step"} | moments | residue
        for name in moments:
            assert torch.equal(mine[name], theirs[name].to(mine[name].dtype))
    train(optimizer, gradients(SHAPES, 1))


@pytest.mark.parametrize("saved_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["fused", "foreach", "loop"])
def test_torchs_checkpoints_of_any_dtype(saved_dtype, dtype, way):
    options = {"fused": way == "fused", "foreach": way == "foreach", "amsgrad": way == "loop"}
    torchs = torch.optim.AdamW(start(SHAPES, saved_dtype), lr=0.02, **options)
    train(torchs, gradients(SHAPES, 2))
    ours = AdamW(start(SHAPES, dtype))
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
    train(ours, gradients(SHAPES, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_continues_from_our_state(dtype):
    # of bf16 parameters torch casts the moments to bf16, and does not know what the remainder is
    # for
    ours = AdamW(start(SHAPES, dtype))
    params = train(ours, gradients(SHAPES, 4))
    torchs = torch.optim.AdamW(clones(params))
    torchs.load_state_dict(on_disk(ours.state_dict()))
    for mine, theirs in zip(states(ours), states(torchs), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert theirs[name].dtype == dtype and torch.equal(theirs[name], mine[name].to(dtype))
    train(torchs, gradients(SHAPES, 3, seed=2))
    train(ours, gradients(SHAPES, 3, seed=2))
    near = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    for mine, theirs in zip(params, torchs.param_groups[0]["params"], strict=True):
        assert torchs.state[theirs]["step"] == ours.state[mine]["step"] == 7
        torch.testing.assert_close(mine, theirs, **near)


def test_bitsandbytes_itself():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for cls in (bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.AdamW):
        theirs = cls(start(SHAPES))
        train(theirs, gradients(SHAPES, 3))
        ours = AdamW(start(SHAPES))
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


def test_remainders_of_transformer_engine():
    optimizer = AdamW(start(SHAPES, torch.bfloat16))
    train(optimizer, gradients(SHAPES, 3))
    saved = optimizer.state_dict()
    for state, own in zip(saved["state"].values(), states(optimizer), strict=True):
        del state["remainder"]
        state["master_param"] = own["remainder"]  # int16
    loaded = AdamW(start(SHAPES, torch.bfloat16))
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
            r"groups of \[3, 3\] parameters, this optimizer of \[3\]",
        ),
        "fewer parameters": (
            {**good, "param_groups": [{**group, "params": [0], "master": masters[:1]}]},
            r"groups of \[1\] parameters, this optimizer of \[3\]",
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
    optimizer = AdamW(start(SHAPES, torch.bfloat16))
    params = train(optimizer, gradients(SHAPES, 1))
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
    "half a step": ({"step": 1.5}, ValueError, "step of parameter 0.*whole number.*got 1.5"),
    "step NaN": ({"step": float("nan")}, ValueError, "step of parameter 0.*finite"),
    "step as text": (
        {"step": "three"},
        TypeError,
        "step of parameter 0 must be a number, got 'three'",
    ),
    "step None": ({"step": None}, TypeError, "step of parameter 0 must be a number"),
    "step of many": ({"step": torch.ones(2)}, TypeError, "step of parameter 0 must be a number"),
    "step too large for float32": (
        {"step": 1e300},
        ValueError,
        r"step of parameter 0.*finite in float32.*got 1e\+300",
    ),
    "step too large for a float": ({"step": 2**2000}, ValueError, "step of parameter 0.*got inf"),
    "moment too large for float32": (
        {"exp_avg": torch.full((70, 73), 1e300, dtype=torch.float64)},
        ValueError,
        "exp_avg of parameter 0 has 5110 values of 5110 that are too large for torch.float32",
    ),
    "second moment too large for float32": (
        {"exp_avg_sq": torch.full((70, 73), 1e39, dtype=torch.float64)},
        ValueError,
        "exp_avg_sq of parameter 0 has 5110 values of 5110 that are too large for torch.float32",
    ),
    "moment sparse": (
        {"exp_avg": torch.ones(70, 73).to_sparse()},
        TypeError,
        "exp_avg of parameter 0 must be a dense tensor, has the layout torch.sparse_coo",
    ),
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
    "remainder in fp16": (
        {"remainder": torch.zeros(70, 73).half()},
        ValueError,
        "remainder of parameter 0 must be 16 bits as int16 or bfloat16, is torch.float16",
    ),
    "second moment below zero": (
        {"exp_avg_sq": torch.ones(70, 73).index_fill(0, torch.tensor(69), -1e-30)},
        ValueError,
        "exp_avg_sq of parameter 0 has 73 values of 5110 that are below zero, which no step writes",
    ),
    "one below zero beside NaN": (
        {"exp_avg_sq": torch.full((70, 73), float("nan")).index_fill(0, torch.tensor(3), -1.0)},
        ValueError,
        "exp_avg_sq of parameter 0 has 73 values",
    ),
    "maximum below zero": (
        {"max_exp_avg_sq": -torch.ones(70, 73)},
        ValueError,
        "max_exp_avg_sq of parameter 0 has 5110 values",
    ),
    "moment without numbers": (
        {"exp_avg": torch.empty(70, 73, device="meta")},
        ValueError,
        "exp_avg of parameter 0 is on the meta device",
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
    "master too large for float32": (
        {"master_param": torch.full((70, 73), 1e39, dtype=torch.float64)},
        ValueError,
        "master of parameter 0 has 5110 values",
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
        "moments of parameter 0 are codes and lack exp_avg_scale, exp_avg_sq_scale",
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
    **{
        f"{name} with {value}": (
            {name: torch.ones(70, 1).index_fill(0, torch.tensor(2), value)},
            ValueError,
            f"{name} of parameter 0 has 1 values of 70 that are NaN, infinite or below zero",
        )
        for name in SCALES
        for value in (float("nan"), float("inf"), -1e-30)
    },
    "scale without numbers": (
        {"exp_avg_scale": torch.empty(70, 1, device="meta")},
        ValueError,
        "exp_avg_scale of parameter 0 is on the meta device",
    ),
    "one moment in fp32": (
        {"exp_avg": torch.ones(70, 73)},
        ValueError,
        "exp_avg of parameter 0.*torch.int8",
    ),
    "codes under another dtype": (
        {"exp_avg": torch.ones(70, 73, dtype=torch.int16)},
        ValueError,
        "exp_avg of parameter 0.*must be torch.int8 or torch.uint8, is torch.int16",
    ),
    "codes under that of 4 bits": (
        {"exp_avg": torch.ones(70, 73, dtype=torch.uint8)},
        ValueError,
        r"exp_avg of parameter 0 has shape \(70, 73\); \(70, 73\) codes need \(70, 37\)",
    ),
}


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("mode", MODES)
def test_what_a_spoilt_training_has_comes_back_as_it_was(mode, impl):
    kept, grads = MODES[mode], gradients(SHAPES, 4)
    for position, value in enumerate((float("nan"), float("inf"), -float("inf"), 3e38)):
        grads[1][0][position, 5] = grads[2][2][position] = value
    twins = [AdamW(start(SHAPES, kept.dtype), **kept.options, impl=impl, seed=1) for _ in range(2)]
    train(twins[0], grads[:3])
    assert not twins[0].state_dict()["state"][2]["exp_avg"].isfinite().all()
    twins[1].load_state_dict(on_disk(twins[0].state_dict()))
    for trained, loaded in zip(*map(params_of, twins), strict=True):
        loaded.data.copy_(trained.data)
    assert_bits(*twins)
    for twin in twins:
        train(twin, grads[3:])
    assert_bits(*twins)


def assert_bits(*twins):
    for mine, theirs in zip(*map(snapshot, twins), strict=True):
        assert mine.keys() == theirs.keys()
        assert_same_bits(list(mine.values()), [theirs[name] for name in mine])


def check_refused(moments, change, error, sentence):
    optimizer = AdamW(start(SHAPES, torch.bfloat16), moments=moments, seed=1)
    params = train(optimizer, gradients(SHAPES, 1))
    saved, groups = (
        copy.deepcopy(optimizer.state_dict()),
        copy.deepcopy(optimizer.state_dict()["param_groups"]),
    )
    train(optimizer, gradients(SHAPES, 1, seed=2))
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


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_a_moment_that_the_optimizers_own_form_has_not_is_refused(moments):
    optimizer = AdamW(start(SHAPES), moments=moments, seed=1)
    saved = on_disk(torch.optim.AdamW(start(SHAPES)).state_dict())
    huge = torch.full((70, 73), 1e39, dtype=torch.float64)
    saved["state"] = {0: {"step": 1, "exp_avg": huge, "exp_avg_sq": huge}}
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has 5110 values.*too large"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


OPTIONS = {
    **{
        f"{name}={value!r}": (
            {name: value},
            TypeError,
            f"{name} must be True or False, got {value!r}",
        )
        for name in ("amsgrad", "maximize", "capturable", "differentiable")
        for value in ("x", None, 1)
    },
    "lr too large": ({"lr": 2**2000}, ValueError, "lr must be a number that a float can be"),
    "lr complex": ({"lr": torch.tensor(1j)}, TypeError, "lr must be a number, got a tensor"),
    "params twice": ({"params": [0, 0, 1]}, ValueError, r"name each parameter once.*got \[0, 0, 1"),
    "params lists": ({"params": [[0], [1], [2]]}, ValueError, "name each parameter once"),
    "amsgrad without its maximum": (
        {"amsgrad": True},
        ValueError,
        "parameter 0 has no max_exp_avg_sq, and its group has amsgrad",
    ),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_an_option_which_a_step_cannot_have_is_refused_by_name(what):
    change, error, sentence = OPTIONS[what]
    optimizer = AdamW(start(SHAPES, torch.bfloat16), seed=1)
    train(optimizer, gradients(SHAPES, 1))
    before, groups = copy.deepcopy(states(optimizer)), optimizer.state_dict()["param_groups"]
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(change)
    with pytest.raises(error, match=sentence):
        optimizer.load_state_dict(saved)
    assert_same(states(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    if "params" not in change and "amsgrad without" not in what:
        with pytest.raises(error, match=sentence):
            AdamW(start(SHAPES), **change)


def test_torchs_amsgrad_without_its_maximum_is_refused():
    torchs = torch.optim.AdamW(start(SHAPES), amsgrad=True)
    train(torchs, gradients(SHAPES, 1))
    saved = torchs.state_dict()
    del saved["state"][1]["max_exp_avg_sq"]
    with pytest.raises(ValueError, match="parameter 1 has no max_exp_avg_sq"):
        AdamW(start(SHAPES)).load_state_dict(saved)


def test_amsgrad_that_a_group_has_got_since_its_last_step_is_saved():
    optimizer = AdamW(start(SHAPES))
    params = train(optimizer, gradients(SHAPES, 1))
    optimizer.param_groups[0]["amsgrad"] = True
    loaded = AdamW(clones(params))
    loaded.load_state_dict(on_disk(optimizer.state_dict()))
    for each in (optimizer, loaded):
        train(each, gradients(SHAPES, 1, seed=2))
    assert_same(states(loaded), states(optimizer))
    assert all(map(torch.equal, params_of(loaded), params))


@pytest.mark.parametrize("rounding", ["exact", "kahan"])
def test_low_bits_that_are_gone_are_named(rounding):
    optimizer = AdamW(start(SHAPES, torch.bfloat16), rounding=rounding)
    train(optimizer, gradients(SHAPES, 1))
    saved = on_disk(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    del saved["state"][1][{"exact": "remainder"}.get(rounding, rounding)]
    loaded = AdamW(start(SHAPES, torch.bfloat16), rounding=rounding)
    with pytest.warns(UserWarning, match=r"1 bf16 parameters \(\[1\]\) have neither remainder nor"):
        loaded.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # nobody can tell: of another rounding, or without need of them
        AdamW(start(SHAPES, torch.bfloat16), rounding="nearest").load_state_dict(saved)
        del saved["weight_checksums"][1]
        loaded.load_state_dict(saved)


@pytest.mark.parametrize("moments", ["8bit", "fp32"])
@pytest.mark.parametrize("what", CODED)
def test_8_bit_moments_without_all_their_parts_are_refused(what, moments):
    change, error, sentence = CODED[what]
    if moments == "8bit":
        check_refused("8bit", change, error, sentence)
        return
    saved = AdamW(start(SHAPES, torch.bfloat16), moments="8bit", seed=1)
    train(saved, gradients(SHAPES, 1))
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
            {"state": None, "param_groups": []},
            TypeError,
            "state of the loaded state dict must be a dict, got NoneType",
        ),
        (
            {"state": [1, 2], "param_groups": []},
            TypeError,
            "state of the loaded state dict must be a dict, got list",
        ),
        (
            {"state": {}, "param_groups": None},
            TypeError,
            "param_groups of the loaded state dict must be a list, got NoneType",
        ),
        (
            {"state": {0: 5}, "param_groups": [apex_group(params=[0, 1, 2])]},
            TypeError,
            "parameter 0 must be a dict",
        ),
    ],
)
def test_what_is_no_state_dict(state_dict, error, sentence):
    with pytest.raises(error, match=sentence):
        AdamW(start(SHAPES)).load_state_dict(state_dict)
