"""8-bit moments: what is lost, on which gradients; the same bits however they are computed, split,
saved and loaded."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import Parameter

from fastft import _native
from fastft.optim import moments_8bit
from fastft.optim.adamw import AdamW
from fastft.optim.factory import adamw

NATIVE = _native.missing("cpu") is None
ENGINES = [
    "eager",
    pytest.param("cpp", marks=pytest.mark.skipif(not NATIVE, reason="no native library")),
]
SHAPES = [(5, 1), (3, 63), (4, 507), (2, 3, 7), (9,), (70, 128), (2, 1000), (0, 3), (3, 0), (4099,)]
MODES = [
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"rounding": "kahan"}),
    (torch.bfloat16, {"rounding": "stochastic"}),
]


def start(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(step, shapes=SHAPES):
    """Over six decades, different at each step."""
    generator = torch.Generator().manual_seed(step)

    def one(shape):
        return torch.randn(shape, generator=generator) * 10 ** (
            torch.rand(shape, generator=generator) * 6 - 4
        )

    return [one(shape) for shape in shapes]


def train(optimizer, first, last, shapes=SHAPES, size=1.0):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(first, last):
        for param, grad in zip(params, gradients(step, shapes), strict=True):
            param.grad = grad.mul_(size).to(param.dtype)
        optimizer.step()
    return params


def snapshot(optimizer):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [{"weight": param.detach(), **optimizer.state[param]} for param in params]


def assert_same(left, right):
    assert len(left) == len(right)
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            same = torch.equal(a[name].nan_to_num(12345.0), b[name].nan_to_num(12345.0))
            assert a[name].dtype == b[name].dtype and same, (index, name)


def codes_of(m, v):
    state = moments_8bit.new_entries(m)
    names = moments_8bit.ENTRIES
    moments_8bit.quantise(m, v, tuple(state[name] for name in names))
    return tuple(state[name] for name in names)


# What is lost: the update relative to fp32's
# -------------------------------------------------------------------------


def compared(stream, steps, impl="auto", elements=4096):
    """fp32 and 8-bit updates of weights which start at zero, without decay: error, largest, sums;
    of the last steps."""
    weights = {name: Parameter(torch.zeros(elements // 512, 512)) for name in ("fp32", "8bit")}
    optimizers = [
        AdamW([weight], lr=1.0, weight_decay=0.0, moments=name, seed=1, impl=impl)
        for name, weight in weights.items()
    ]
    error, norm, largest = 0.0, 0.0, {"fp32": 0.0, "8bit": 0.0}
    for step in range(steps):
        grad = stream(
            step, torch.randn(elements // 512, 512, generator=torch.Generator().manual_seed(step))
        )
        updates = {}
        for (name, weight), optimizer in zip(weights.items(), optimizers, strict=True):
            weight.data.zero_()
            weight.grad = grad
            optimizer.step()
            updates[name] = weight.detach().clone()
            largest[name] = max(largest[name], float(weight.detach().abs().max()))
        if step >= steps - 50:
            error += float((updates["8bit"] - updates["fp32"]).square().sum())
            norm += float(updates["fp32"].square().sum())
    return (error / norm) ** 0.5, largest["8bit"] / largest["fp32"]


def outlier(step, grad):
    grad[:, ::128] *= 1000
    return grad


# steps, largest error, largest update relative to fp32's; measured: see moments_8bit.py
STREAMS = {
    "iid": (lambda step, grad: grad, 300, 0.10, 1.2),
    "outlier": (outlier, 200, 0.25, 1.6),
    "drop": (lambda step, grad: grad * (1 if step < 200 else 1 / 30), 500, 0.10, 1.2),
    "tiny": (lambda step, grad: grad * 1e-7, 200, 0.10, 1.2),
    "tiniest": (lambda step, grad: grad * 1e-15, 100, 0.10, 1.2),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_updates_are_near_those_of_fp32(stream):
    function, steps, most, largest = STREAMS[stream]
    error, ratio = compared(function, steps)
    assert error < most and ratio < largest


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradients_move_nothing(impl, dtype):
    # whole blocks, and single elements among others that are updated
    weight = start([(6, 300)], dtype)[0]
    before, still = (
        weight.detach().clone(),
        torch.rand(6, 300, generator=torch.Generator().manual_seed(2)) < 0.5,
    )
    still[3] = True
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.0, moments="8bit", impl=impl)
    for step in range(60):
        weight.grad = gradients(step, [(6, 300)])[0].masked_fill(still, 0.0).to(dtype)
        optimizer.step()
    assert torch.equal(weight[still], before[still])
    assert not torch.equal(weight[~still], before[~still])


@pytest.mark.parametrize("impl", ENGINES)
def test_second_moments_decay(impl):
    weight = Parameter(torch.ones(32, 128))
    optimizer = AdamW([weight], lr=0.0, betas=(0.9, 0.99), moments="8bit", impl=impl, seed=4)
    weight.grad = torch.rand(32, 128, generator=torch.Generator().manual_seed(1)) + 0.5
    optimizer.step()
    state = optimizer.state[weight]
    names = moments_8bit.ENTRIES
    first = moments_8bit.dequantise(*(state[name] for name in names))[1].mean()
    weight.grad = torch.zeros_like(weight)
    for _ in range(200):
        optimizer.step()
    last = moments_8bit.dequantise(*(state[name] for name in names))[1].mean()
    assert abs(float(last / first) / 0.99**200 - 1) < 0.02


def test_fine_tune_ends_at_the_loss_of_fp32():
    # of a small model, on noisy targets; that of a language model: benchmarks/moments_8bit.py tune
    inputs = torch.randn(512, 32, generator=torch.Generator().manual_seed(1))
    target = (inputs @ torch.randn(32, 4, generator=torch.Generator().manual_seed(2))).tanh()
    losses = {}
    for moments in ("fp32", "8bit"):
        torch.manual_seed(3)
        model = torch.nn.Sequential(
            torch.nn.Linear(32, 160), torch.nn.Tanh(), torch.nn.Linear(160, 4)
        )
        optimizer = AdamW(model.parameters(), lr=1e-3, moments=moments, seed=5)
        noise = torch.Generator().manual_seed(4)
        for _ in range(300):
            rows = torch.randint(512, (64,), generator=noise)
            loss = (
                (model(inputs[rows]) - target[rows] - 0.5 * torch.randn(64, 4, generator=noise))
                .square()
                .mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[moments] = (model(inputs) - target).square().mean().item() + 0.25  # the noise's part
    assert abs(losses["8bit"] / losses["fp32"] - 1) < 0.005


# The codes
# -----------------------------------------------------------------------------------------------------------


def test_every_code_stands_for_itself():
    # each in a block of its own, beside the largest
    codes = (
        torch.full((256, 2), 127, dtype=torch.int8),
        torch.full((256, 2), 255, dtype=torch.uint8),
    )
    codes[0][:, 1], codes[1][:, 1] = torch.arange(256).sub(127).clamp(max=127), torch.arange(256)
    m, v = moments_8bit.dequantise(*codes, *torch.ones(2, 256, 1).unbind())
    assert torch.equal(m[:, 0], torch.ones(256)) and torch.equal(v[:, 0], torch.ones(256))
    assert (
        (m[:255, 1].diff() > 0).all()
        and m[127, 1] == 0
        and (v[:, 1].diff() > 0).all()
        and v.min() > 0
    )
    assert all(map(torch.equal, codes_of(m, v), (*codes, *torch.ones(2, 256, 1))))


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e30])
def test_rounding_is_right_in_the_mean(scale):
    value = torch.rand(1, 100, generator=torch.Generator().manual_seed(1)) ** 3 * scale
    bits = torch.arange(0, 65536, 64, dtype=torch.int32)
    many = value.expand(len(bits), 100).contiguous()
    state = tuple(
        torch.empty(shape, dtype=dtype)
        for shape, dtype in (
            (many.shape, torch.int8),
            (many.shape, torch.uint8),
            ((len(bits), 1), torch.float32),
            ((len(bits), 1), torch.float32),
        )
    )
    moments_8bit.quantise(many, many, state, *[bits[:, None].expand_as(many)] * 2)
    m, v = moments_8bit.dequantise(*state)
    assert torch.equal(state[2], many.amax(1, keepdim=True)) and torch.equal(state[2], state[3])
    large = value[0] > value.max() / 2e6  # smaller ones become the smallest value of v
    torch.testing.assert_close(m.double().mean(0), value[0].double(), rtol=2e-3, atol=1e-9 * scale)
    torch.testing.assert_close(
        v.double().mean(0)[large], value[0].double()[large], rtol=2e-3, atol=0.0
    )


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 3e21])
def test_a_bad_gradient_spoils_its_own_element(impl, bad):
    # 3e21 is finite, its square is not
    optimizers = [AdamW(start([(3, 200)]), moments="8bit", impl=impl, seed=1) for _ in range(2)]
    for step in range(3):
        for optimizer, value in zip(optimizers, (1.0, bad), strict=True):
            (weight,) = optimizer.param_groups[0]["params"]
            weight.grad = gradients(step, [(3, 200)])[0]
            weight.grad[1, 5] = value if step == 1 else 0.0
            weight.grad[1, 6] = 2.0  # larger than 1.0, which then does not change the scale
            optimizer.step()
    clean, spoilt = (optimizer.param_groups[0]["params"][0].detach() for optimizer in optimizers)
    others = torch.ones(3, 200, dtype=torch.bool)
    others[1, 5] = False
    assert not spoilt[1, 5].isfinite() and spoilt[others].isfinite().all()
    assert torch.equal(spoilt[others], clean[others])


# The same bits
# -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not NATIVE, reason="no native library")
@pytest.mark.parametrize(("dtype", "options"), MODES)
@pytest.mark.parametrize("size", [1.0, 1e-17, 1e-33])
def test_engines_have_the_same_bits(dtype, options, size, poisoned_empty):
    """Also where the reciprocal of a scale overflows."""
    optimizers = [
        AdamW(start(dtype=dtype), moments="8bit", impl=impl, seed=3, **options)
        for impl in ("eager", "cpp")
    ]
    for step in range(8):
        for optimizer in optimizers:
            train(optimizer, step, step + 1, size=size)
        assert_same(*map(snapshot, optimizers))


DIGEST = """
import hashlib, sys, torch
sys.path[:0] = ["tests", "tests/optim"]
import test_moments_8bit as tests
from fastft.optim.adamw import AdamW
torch.set_num_threads(int(sys.argv[1]))
optimizer = AdamW(tests.start([*tests.SHAPES, (300, 130)], torch.bfloat16), moments="8bit", impl="cpp", seed=3)
tests.train(optimizer, 0, 6, [*tests.SHAPES, (300, 130)])
digest = hashlib.sha256()
for entries in tests.snapshot(optimizer):
    for name in sorted(entries):
        digest.update(entries[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.skipif(not NATIVE, reason="no native library")
@pytest.mark.skipif(not NATIVE, reason="no native library")
@pytest.mark.parametrize("columns", [128, 127, 33])
def test_moments_beside_a_code_have_the_same_bits(columns):
    """First moments that are a code's value, or some last places beside it: where roots and floors
    may differ."""
    codes = torch.arange(128, dtype=torch.float64)
    values = (codes / 127).pow(4).float().roll(1)[:columns]  # the largest, 1, is in every row
    rows = torch.stack(
        [(values.view(torch.int32) + places).view(torch.float32) for places in range(-4, 5)]
    )
    grads = rows.clamp(0.0, 1.0).index_fill_(1, torch.tensor(0), 1.0)
    grads[::2] *= -1
    runs = []
    for impl in ("eager", "cpp"):
        param = Parameter(torch.zeros_like(grads))
        optimizer = AdamW([param], lr=1e-3, betas=(0.0, 0.999), moments="8bit", seed=7, impl=impl)
        entries = []
        for step in range(40):  # with betas[0] = 0 the first moment is the gradient
            param.grad = grads * 2.0**-step
            optimizer.step()
            entries += [optimizer.state[param][name].clone() for name in moments_8bit.ENTRIES]
        runs.append(entries)
    for eager, cpp in zip(*runs, strict=True):
        assert torch.equal(eager, cpp)


def test_instruction_sets_and_threads_have_the_same_bits():
    def digest(isa, threads):
        environment = {**os.environ, "FASTFT_CPU_ISA": isa, "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, "-c", DIGEST, str(threads)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert len({digest("baseline", 1), digest("avx2", 2), digest("avx512", 1)}) == 1


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("columns", [1, 63, 507])
def test_rows_do_not_depend_on_each_other(impl, columns):
    """A shard of rows, whose random bits begin where they do in the whole, has the bits of the
    whole."""
    from fastft.optim.adamw_update import ADAMW

    names = moments_8bit.ENTRIES

    def step(param, grad, state, first, number):
        table = torch.tensor([[0, 0, 0, first]])
        hyper = torch.tensor([[1.0, 0.1, 0.999, 0.001, -0.1, 0.03, 1e-8, 1.0, number]])
        lists = [[param], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], []]
        update = ADAMW.implementation(impl, param.device)
        update(*lists, [state[name] for name in names[2:]], table, hyper, torch.ones(()), 7)

    whole = start([(9, columns)])[0].detach()
    parts = [whole[:4].clone(), whole[4:].clone()]
    states = [moments_8bit.new_entries(tensor) for tensor in (whole, *parts)]
    for number in range(1, 6):
        (grad,) = gradients(number, [(9, columns)])
        step(whole, grad, states[0], 0, float(number))
        step(parts[0], grad[:4].clone(), states[1], 0, float(number))
        step(parts[1], grad[4:].clone(), states[2], 4 * columns, float(number))
    assert torch.equal(torch.cat(parts), whole)
    for name in names:
        assert torch.equal(torch.cat([states[1][name], states[2][name]]), states[0][name])


@pytest.mark.parametrize(("cut", "same"), [(4096 + 128, True), (4096 + 64, False)])
def test_parts_of_a_vector_that_begin_with_a_block_have_the_bits_of_the_whole(cut, same):
    """A flat vector cut anew among processes: exact where every part begins at a multiple of
    128."""
    size, names = 9000, moments_8bit.ENTRIES
    m, v = torch.randn(size, generator=torch.Generator().manual_seed(1)), torch.rand(size)
    whole, parts = codes_of(m, v), [codes_of(m[:cut], v[:cut]), codes_of(m[cut:], v[cut:])]
    joined = [torch.cat([part[i] for part in parts], 0 if i < 2 else 1) for i in range(len(names))]
    assert (
        all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(joined, whole, strict=True))
        == same
    )


def test_any_layout():
    # a transposed weight is updated as its copy is
    copied, transposed = (
        start([(63, 130)])[0],
        Parameter(start([(63, 130)])[0].detach().t().contiguous().t()),
    )
    optimizers = [AdamW([weight], moments="8bit", seed=3) for weight in (copied, transposed)]
    for optimizer in optimizers:
        train(optimizer, 0, 4, [(63, 130)])
    assert not transposed.is_contiguous()
    assert_same(*map(snapshot, optimizers))


# States
# --------------------------------------------------------------------------------------------------------------


def on_disk(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_states_have_the_promised_form():
    optimizer = AdamW(start(), moments="8bit")
    train(optimizer, 0, 1)
    for entries in snapshot(optimizer):
        weight = entries["weight"]
        assert entries["exp_avg"].shape == entries["exp_avg_sq"].shape == weight.shape
        if weight.ndim < 2 and len(weight) < 4096:
            assert entries["exp_avg"].dtype == entries["exp_avg_sq"].dtype == torch.float32
            continue
        assert (entries["exp_avg"].dtype, entries["exp_avg_sq"].dtype) == (torch.int8, torch.uint8)
        rows = 1 if weight.ndim == 1 else len(weight)
        blocks = -(-(weight.numel() // rows) // 128) if rows else 1
        for name in moments_8bit.SCALES:
            assert entries[name].dtype == torch.float32 and entries[name].shape == (rows, blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flat_part_of_many_parameters_is_in_8_bits(dtype):
    """As ZeRO-1, 2 and 3 and FSDP1 hand it over; it was in fp32 without a word."""
    flat = start([(40_064,)], dtype)
    optimizer = AdamW(flat, moments="8bit", seed=1)
    train(optimizer, 0, 2, [(40_064,)])
    state = optimizer.state[flat[0]]
    kept = sum(state[name].nbytes for name in moments_8bit.ENTRIES)
    assert kept == 2 * 40_064 + 2 * 4 * 40_064 // 128


@pytest.mark.parametrize(
    ("size", "dtype"), [(4095, torch.float32), (4096, torch.int8), (4097, torch.int8)]
)
def test_vectors_have_codes_from_4096_elements_on(size, dtype):
    optimizer = AdamW(start([(size,)]), moments="8bit", seed=1)
    train(optimizer, 0, 1, [(size,)])
    assert next(iter(optimizer.state.values()))["exp_avg"].dtype == dtype


@pytest.mark.parametrize(("dtype", "options"), MODES)
def test_resuming_equals_no_interruption(dtype, options):
    whole, first = (AdamW(start(dtype=dtype), moments="8bit", seed=3, **options) for _ in range(2))
    train(whole, 0, 8)
    weights = [Parameter(param.detach().clone()) for param in train(first, 0, 5)]
    resumed = AdamW(weights, moments="8bit", **options)
    resumed.load_state_dict(on_disk(first.state_dict()))
    train(resumed, 5, 8)
    assert_same(snapshot(resumed), snapshot(whole))


def test_into_torchs_form_and_back():
    ours = AdamW(start(), moments="8bit", seed=3)
    train(ours, 0, 4)
    torchs, wide = torch.optim.AdamW(start()), AdamW(start(), seed=3)
    torchs.load_state_dict(on_disk(ours.torch_state_dict()))
    wide.load_state_dict(on_disk(ours.state_dict()))
    assert all(group["moments"] == "fp32" for group in wide.param_groups)
    assert_same(snapshot(torchs), snapshot(wide))
    for param in ours.param_groups[0]["params"]:
        if param.ndim > 1 or len(param) > 4096:
            decoded = moments_8bit.dequantise(
                *(ours.state[param][name] for name in moments_8bit.ENTRIES)
            )
            at = next(
                other for other, mine in zip(wide.state, ours.state, strict=True) if mine is param
            )
            assert torch.equal(wide.state[at]["exp_avg"], decoded[0])
            assert torch.equal(wide.state[at]["exp_avg_sq"], decoded[1])
    again = AdamW(start(), moments="8bit", seed=3)
    again.load_state_dict(on_disk(torchs.state_dict()))
    for left, right in zip(snapshot(again), snapshot(ours), strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"weight"}:  # what was rounded once rounds to itself
            assert torch.equal(left[name], right[name]), name
    train(again, 4, 5)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(70, 128), (3, 63), (5, 1), (4099,)])
def test_codes_that_were_read_as_numbers_are_refused(shape, moments, tmp_path):
    """torch.distributed.checkpoint loads 8-bit codes into an optimizer of other moments, and says
    nothing."""
    from torch.distributed import checkpoint as dcp

    ours = AdamW(start([shape]), moments="8bit", seed=3)
    train(ours, 0, 3, [shape])
    dcp.save({"optimizer": ours.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    other = AdamW(start([shape]), moments=moments, seed=3)
    train(other, 0, 1, [shape])
    loaded = {"optimizer": other.state_dict()}
    del loaded["optimizer"]["param_groups"]
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    # else DCP has become better
    assert loaded["optimizer"]["state"][0]["exp_avg"].abs().max() == 127
    loaded["optimizer"]["param_groups"] = other.state_dict()["param_groups"]
    with pytest.raises(
        ValueError, match="moments of parameter 0 are 8-bit codes that were read as numbers"
    ):
        other.load_state_dict(loaded["optimizer"])


def test_integers_that_are_no_codes_are_taken():
    saved = torch.optim.AdamW(start([(3, 63)]))
    train(saved, 0, 1, [(3, 63)])
    for m, v in ((0.0, 0.0), (1.0, 1.0), (127.0, 254.0), (127.5, 255.0)):
        state_dict = copy.deepcopy(saved.state_dict())
        state_dict["state"][0]["exp_avg"].fill_(m)
        state_dict["state"][0]["exp_avg_sq"].fill_(v)
        AdamW(start([(3, 63)])).load_state_dict(state_dict)


def test_a_copy_goes_on_with_the_same_bits():
    ours = AdamW(start(), moments="8bit", seed=3)
    train(ours, 0, 3)
    other = copy.deepcopy(ours)
    assert_same(*(snapshot(optimizer) for optimizer in (ours, other) if train(optimizer, 3, 6)))


def test_a_group_may_have_its_own():
    weights = start([(4, 8), (4, 8), (4, 8)])
    groups = [{"params": [weights[0]]}, {"params": [weights[1]], "moments": "8bit"}]
    optimizer = AdamW([*groups, {"params": [weights[2]], "moments": "bf16"}])
    train(optimizer, 0, 2, [(4, 8)] * 3)
    dtypes = [optimizer.state[weight]["exp_avg"].dtype for weight in weights]
    assert dtypes == [torch.float32, torch.int8, torch.bfloat16]
    seeds = {group["seed"] for group in optimizer.param_groups}
    assert len(seeds) == 1 and None not in seeds


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_keep_fp32(tied):
    transformers = pytest.importorskip("transformers")
    size = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=tied, **size)
    model = transformers.LlamaForCausalLM(config)
    optimizer, _ = adamw(model, moments="8bit", weight_decay=0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        wide = param.ndim < 2 or "embed_tokens" in name or "lm_head" in name
        assert optimizer.state[param]["exp_avg"].dtype == (torch.float32 if wide else torch.int8), (
            name
        )
    decays = {
        id(param): group["weight_decay"]
        for group in optimizer.param_groups
        for param in group["params"]
    }
    assert (
        decays[id(model.model.embed_tokens.weight)] == 0.1
        and decays[id(model.model.norm.weight)] == 0.0
    )


@pytest.mark.parametrize("how", ["constructor", "group", "checkpoint"])
def test_amsgrad_is_refused(how):
    with pytest.raises(ValueError, match='amsgrad with moments="8bit"'):
        if how == "constructor":
            AdamW(start(), moments="8bit", amsgrad=True)
        elif how == "group":
            AdamW([{"params": start(), "moments": "8bit"}], amsgrad=True)
        else:
            AdamW(start(), moments="8bit").load_state_dict(
                torch.optim.AdamW(start(), amsgrad=True).state_dict()
            )
