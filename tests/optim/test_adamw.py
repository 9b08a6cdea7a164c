from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adamw_modes import MODES
from support.adamw_steps import (
    ENGINES,
    OPTIONS,
    assert_same,
    clones,
    equal,
    gradients,
    needs_native,
    snapshot,
    start,
    states,
    train,
)
from torch.nn import Parameter

import fastft
from fastft.optim.adamw import AdamW
from fastft.optim.adamw_update import join_master


@needs_native
@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_torch_fused(options):
    # exact on whole vectors; in the tail of a tensor torch's compiler contracts the second moment
    # differently
    shapes = [(64,), (4096,), (16, 64)]
    ours, fused = (
        AdamW(start(shapes), impl="cpp", **options),
        torch.optim.AdamW(start(shapes), fused=True, **options),
    )
    grads = gradients(shapes, 50)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        equal(train(ours, grads), train(fused, grads))
        equal(states(ours, "exp_avg"), states(fused, "exp_avg"))
        equal(states(ours, "exp_avg_sq"), states(fused, "exp_avg_sq"))


@needs_native
@pytest.mark.parametrize("rival", [{"fused": True}, {"foreach": False}, {"foreach": True}])
def test_one_step_is_within_an_ulp_of_torch(rival):
    shapes, grads = [(507,), (63,), (1,)], gradients([(507,), (63,), (1,)], 1)
    ours, theirs = (
        train(AdamW(start(shapes), impl="cpp"), grads),
        train(torch.optim.AdamW(start(shapes), **rival), grads),
    )
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).abs() <= torch.finfo(torch.float32).eps * b.abs()).all()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("options", OPTIONS)
def test_bf16_follows_fp32_to_the_last_bit(impl, options):
    shapes = [(507,), (63, 3)]
    narrow = start(shapes, torch.bfloat16)
    wide = [Parameter(param.detach().float()) for param in narrow]
    grads = [[grad.bfloat16() for grad in step] for step in gradients(shapes, 60)]
    ours, fp32 = AdamW(narrow, impl=impl, **options), AdamW(wide, impl=impl, **options)
    train(ours, grads)
    train(fp32, grads)
    equal(
        [
            join_master(p.detach(), r)
            for p, r in zip(narrow, states(ours, "remainder"), strict=True)
        ],
        [w.detach() for w in wide],
    )
    equal(states(ours, "exp_avg"), states(fp32, "exp_avg"))
    equal(states(ours, "exp_avg_sq"), states(fp32, "exp_avg_sq"))
    for param, master in zip(narrow, wide, strict=True):
        tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(param[~tie], master.bfloat16()[~tie])


def test_an_overwritten_parameter_does_not_become_nan():
    param = Parameter(torch.randn(1000).bfloat16())
    optimizer = AdamW([param], lr=1e-3)
    train(optimizer, gradients([(1000,)], 5))
    with torch.no_grad():
        param.zero_()
    train(optimizer, gradients([(1000,)], 1))
    assert param.isfinite().all() and param.abs().max() < 0.01


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_gradients_spoil_their_own_element_only(impl, bad, dtype):
    param = Parameter(torch.ones(100, dtype=dtype))
    grad = torch.ones(100)
    grad[37] = bad
    train(AdamW([param], impl=impl), [[grad]])
    assert param[37].isnan() and param[torch.arange(100) != 37].isfinite().all()


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "strided": lambda t: torch.stack([t, t], 2)[:, :, 0],
    "contiguous": lambda t: t.contiguous(),
}


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_layouts(impl, dtype, layout, grad_layout):
    value, steps = torch.randn(17, 9).to(dtype), gradients([(17, 9)], 3)
    plain, odd = Parameter(value.clone()), Parameter(LAYOUTS[layout](value.clone()))
    optimizers = AdamW([plain], impl=impl), AdamW([odd], impl=impl)
    for (grad,) in steps:
        plain.grad, odd.grad = grad.to(dtype), LAYOUTS[grad_layout](grad.to(dtype))
        for optimizer in optimizers:
            optimizer.step()
    equal([odd.detach()], [plain.detach()])
    equal(states(optimizers[1], "exp_avg"), states(optimizers[0], "exp_avg"))


def test_groups_missing_gradients_and_late_parameters():
    shapes = [(5,), (63,), (7,), (9,)]
    grads = gradients(shapes, 6)
    for row, missing in zip(grads, (None, 1, 1, 0, None, 2), strict=True):
        if missing is not None:
            row[missing] = None
    results = []
    for cls, options in ((AdamW, {}), (torch.optim.AdamW, {"foreach": False})):
        params = start(shapes)
        optimizer = cls(
            [{"params": params[:2], "lr": 0.1}, {"params": params[2:3], "weight_decay": 0.0}],
            **options,
        )
        train(optimizer, [row[:3] for row in grads[:3]])
        optimizer.add_param_group({"params": params[3], "betas": (0.5, 0.9)})
        train(optimizer, grads[3:])
        results.append((params, [float(step) for step in states(optimizer, "step")]))
    assert results[0][1] == results[1][1]
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


COPIES = {
    "deepcopy": lambda optimizer: copy.deepcopy(optimizer).state_dict(),
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)).state_dict(),
}


@pytest.mark.parametrize("mode", ["fp32-fp32", "exact-fp32", "stochastic-8bit"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_goes_on_with_the_same_bits_and_alone(mode, way):
    shapes, grads, kept = [(63,), (8, 9)], gradients([(63,), (8, 9)], 10), MODES[mode]
    whole, first = (AdamW(start(shapes, kept.dtype), seed=3, **kept.options) for _ in range(2))
    train(whole, grads)
    resumed = AdamW(clones(train(first, grads[:5])), **kept.options)
    resumed.load_state_dict(COPIES[way](first))
    train(resumed, grads[5:])
    # must not reach the resumed one's steps
    train(first, [[torch.zeros(shape) for shape in shapes]])
    assert_same(snapshot(resumed), snapshot(whole))


def test_schedulers_hooks_closures_and_zero_grad():
    param = Parameter(torch.tensor([1.0, 2.0]))
    optimizer, calls = AdamW([param], lr=0.5), []
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1**epoch)
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    optimizer.register_load_state_dict_pre_hook(
        lambda _, loaded: calls.append(sorted(loaded["state"][0]))
    )

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    version = param._version
    assert optimizer.step(closure).item() == 5.0 and param._version > version
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post", ["exp_avg", "exp_avg_sq", "step"]]
    optimizer.zero_grad()
    assert param.grad is None and optimizer.step() is None


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    narrow=st.lists(st.booleans(), min_size=12, max_size=12),
    present=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_any_mix_equals_one_optimizer_per_tensor(sizes, narrow, present):
    shapes = [(size,) for size in sizes]
    grads = gradients(shapes, len(present))
    for row, mask in zip(grads, present, strict=True):
        row[:] = [grad if here else None for grad, here in zip(row, mask, strict=False)]

    def params():
        return [
            p if wide else Parameter(p.detach().bfloat16())
            for p, wide in zip(start(shapes), narrow, strict=False)
        ]

    together, alone = AdamW(params()), [AdamW([param]) for param in params()]
    train(together, grads)
    for i, optimizer in enumerate(alone):
        train(optimizer, [[row[i]] for row in grads])
    equal(
        together.param_groups[0]["params"],
        [optimizer.param_groups[0]["params"][0] for optimizer in alone],
    )


BAD = [
    ({"lr": -1.0}, ValueError, "lr"),
    ({"lr": float("nan")}, ValueError, "lr"),
    ({"lr": "1e-3"}, TypeError, "lr"),
    ({"lr": torch.ones(2)}, ValueError, "lr"),
    ({"betas": (1.0, 0.9)}, ValueError, "betas"),
    ({"betas": (0.9, -0.1)}, ValueError, "betas"),
    ({"betas": 0.9}, TypeError, "betas"),
    ({"eps": -1e-8}, ValueError, "eps"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay"),
    ({"moments": "2bit"}, ValueError, "moments"),
    ({"rounding": "down"}, ValueError, "rounding"),
    ({"impl": "metal"}, ValueError, "impl"),
    ({"lr": torch.tensor(1j)}, TypeError, "lr must be a number, got a tensor of torch.complex64"),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be a number above 0.*got 0.0"),
    ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm .*above 0.*got nan"),
    ({"max_grad_norm": "x"}, TypeError, "max_grad_norm .*above 0.*or None.*got 'x'"),
    ({"max_grad_norm": True}, TypeError, "max_grad_norm .*got True"),
    ({"max_grad_norm": torch.ones(2)}, ValueError, r"max_grad_norm .*one element.*\(2,\)"),
    ({"max_grad_norm": torch.tensor(-1.0)}, ValueError, "max_grad_norm .*got tensor"),
    ({"amsgrad": "x"}, TypeError, "amsgrad must be True or False, got 'x'"),
    ({"amsgrad": None}, TypeError, "amsgrad must be True or False, got None"),
    ({"maximize": "no"}, TypeError, "maximize must be True or False, got 'no'"),
    ({"maximize": 1}, TypeError, "maximize must be True or False, got 1"),
    ({"capturable": "no"}, TypeError, "capturable must be True or False, got 'no'"),
    ({"differentiable": "no"}, TypeError, "differentiable must be True or False, got 'no'"),
    ({"release_gradients": "no"}, TypeError, "release_gradients must be True or False, got 'no'"),
    ({"seed": -1}, ValueError, "seed"),
    ({"seed": 0.5}, TypeError, "seed"),
    ({"differentiable": True}, ValueError, "differentiable"),
]


# of the whole optimizer: in a group they are keys that nobody reads, as with torch
OF_THE_WHOLE = {"rounding", "impl", "max_grad_norm", "release_gradients"}


@pytest.mark.parametrize(("options", "error", "match"), BAD)
def test_bad_options(options, error, match):
    for make in (AdamW, fastft.adamw, functools.partial(fastft.adamw_spec, None)):
        given = [] if isinstance(make, functools.partial) else [start([(3,)])]
        with pytest.raises(error, match=match):
            make(*given, **options)
    optimizer = AdamW(start([(3,)]))
    if not OF_THE_WHOLE & options.keys():
        with pytest.raises(error, match=match):
            optimizer.add_param_group({"params": start([(4,)]), **options})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("norm", [1, 0.5, float("inf"), torch.tensor(0.5), torch.tensor([0.5])])
def test_norms_to_clip_to(norm):
    """A number, an integer, infinity (which scales nothing) or a tensor of one element."""
    (param,), (other,) = start([(64,)]), start([(64,)])
    rival = torch.optim.AdamW([other])
    optimizer = AdamW([param], max_grad_norm=norm)
    param.grad, other.grad = torch.ones(64), torch.ones(64)
    torch.nn.utils.clip_grad_norm_([other], float(norm))
    for each in (optimizer, rival):
        each.step()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], rival.state[other]["exp_avg"])


@pytest.mark.way("fp16 parameters", optimizer="refused")
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64, torch.complex64])
def test_bad_dtypes(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        AdamW([torch.zeros(3, dtype=dtype)])


def test_bad_parameters_gradients_engines_and_checkpoints():
    with pytest.raises(ValueError, match="empty"):
        AdamW([])
    param = Parameter(torch.zeros(4, 3))
    param.grad = torch.eye(4, 3).to_sparse()
    optimizer = AdamW([param])
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    param.grad = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="cuda"):
        AdamW([param], impl="cuda").step()
    optimizer.step()
    checkpoint = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"exp_avg.*\(4, 3\).*\(5,\)"):
        AdamW(start([(5,)])).load_state_dict(checkpoint)
    with pytest.raises(ValueError, match="missing"):
        AdamW(start([(5,)])).load_state_dict(
            {**checkpoint, "state": {0: {"momentum_buffer": torch.zeros(5)}}}
        )


def test_an_unavailable_engine_leaves_the_step_uncounted() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = AdamW([param], impl="cuda")
    with pytest.raises(RuntimeError, match="impl='cuda' is not available"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3)) and optimizer.state[param]["step"] == 0
