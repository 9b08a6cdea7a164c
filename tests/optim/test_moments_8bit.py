"""8-bit moments: what is lost, on which gradients; the same bits however they are computed, split,
saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from support.adamw_modes import MODES
from support.adamw_steps import (
    ENGINES,
    assert_same,
    gradients,
    needs_native,
    on_disk,
    snapshot,
    start,
    train,
)
from support.trainers import tiny_llama
from torch.nn import Parameter

from fastft.optim import moment_blocks, moment_codes, moments_8bit
from fastft.optim.adamw import AdamW
from fastft.optim.factory import adamw

SHAPES = [(5, 1), (3, 63), (4, 507), (2, 3, 7), (9,), (70, 128), (2, 1000), (0, 3), (3, 0), (4099,)]


def codes_of(m, v):
    state = moment_codes.new_entries(m, "8bit")
    names = moment_blocks.ENTRIES
    moments_8bit.quantise(m, v, tuple(state[name] for name in names))
    return tuple(state[name] for name in names)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradients_move_nothing(impl, dtype):
    # whole blocks, and single elements among others that are updated
    weight = start([(6, 300)], dtype)[0]
    before = weight.detach().clone()
    still = torch.rand(6, 300, generator=torch.Generator().manual_seed(2)) < 0.5
    still[3] = True
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.0, moments="8bit", impl=impl)
    train(optimizer, [[row[0].masked_fill(still, 0.0)] for row in gradients([(6, 300)], 60)])
    assert torch.equal(weight[still], before[still])
    assert not torch.equal(weight[~still], before[~still])


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
    for step, (grad,) in enumerate(gradients([(3, 200)], 3)):
        for optimizer, value in zip(optimizers, (1.0, bad), strict=True):
            (weight,) = optimizer.param_groups[0]["params"]
            weight.grad = grad.clone()
            weight.grad[1, 5] = value if step == 1 else 0.0
            weight.grad[1, 6] = 2.0  # larger than 1.0, which then does not change the scale
            optimizer.step()
    clean, spoilt = (optimizer.param_groups[0]["params"][0].detach() for optimizer in optimizers)
    others = torch.ones(3, 200, dtype=torch.bool)
    others[1, 5] = False
    assert not spoilt[1, 5].isfinite() and spoilt[others].isfinite().all()
    assert torch.equal(spoilt[others], clean[others])


@needs_native
@pytest.mark.parametrize("mode", [mode for mode in MODES if "8bit" in mode])
@pytest.mark.parametrize("size", [1e-17, 1e-33])
def test_engines_have_the_same_bits_of_tiny_gradients(mode, size, poisoned_empty):
    """Where the reciprocal of a scale overflows."""
    optimizers = [
        AdamW(start(SHAPES, MODES[mode].dtype), impl=impl, seed=3, **MODES[mode].options)
        for impl in ("eager", "cpp")
    ]
    for row in gradients(SHAPES, 8):
        for optimizer in optimizers:
            train(optimizer, [[grad * size for grad in row]])
        assert_same(*map(snapshot, optimizers))


@needs_native
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
            entries += [optimizer.state[param][name].clone() for name in moment_blocks.ENTRIES]
        runs.append(entries)
    for eager, cpp in zip(*runs, strict=True):
        assert torch.equal(eager, cpp)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("columns", [1, 63, 507])
def test_rows_do_not_depend_on_each_other(impl, columns):
    """A shard of rows, whose random bits begin where they do in the whole, has the bits of the
    whole."""
    from fastft.optim.adamw_update import ADAMW

    names = moment_blocks.ENTRIES

    def step(param, grad, state, first, number):
        table = torch.tensor([[0, 0, 0, first]])
        hyper = torch.tensor([[1.0, 0.1, 0.999, 0.001, -0.1, 0.03, 1e-8, 1.0, number]])
        lists = [[param], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], []]
        update = ADAMW.implementation(impl, param.device)
        update(*lists, [state[name] for name in names[2:]], table, hyper, torch.ones(()), 7)

    whole = start([(9, columns)])[0].detach()
    parts = [whole[:4].clone(), whole[4:].clone()]
    states = [moment_codes.new_entries(tensor, "8bit") for tensor in (whole, *parts)]
    for number, (grad,) in enumerate(gradients([(9, columns)], 5), 1):
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
    size, names = 9000, moment_blocks.ENTRIES
    m, v = torch.randn(size, generator=torch.Generator().manual_seed(1)), torch.rand(size)
    whole, parts = codes_of(m, v), [codes_of(m[:cut], v[:cut]), codes_of(m[cut:], v[cut:])]
    joined = [torch.cat([part[i] for part in parts], 0 if i < 2 else 1) for i in range(len(names))]
    assert (
        all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(joined, whole, strict=True))
        == same
    )


def test_any_layout():
    # a transposed weight is updated as its copy is
    (copied,) = start([(63, 130)])
    transposed = Parameter(copied.detach().t().contiguous().t())
    optimizers = [AdamW([weight], moments="8bit", seed=3) for weight in (copied, transposed)]
    for optimizer in optimizers:
        train(optimizer, gradients([(63, 130)], 4))
    assert not transposed.is_contiguous()
    assert_same(*map(snapshot, optimizers))


def test_states_have_the_promised_form():
    optimizer = AdamW(start(SHAPES), moments="8bit")
    train(optimizer, gradients(SHAPES, 1))
    for entries in snapshot(optimizer):
        weight = entries["weight"]
        assert entries["exp_avg"].shape == entries["exp_avg_sq"].shape == weight.shape
        if weight.ndim < 2 and len(weight) < 4096:
            assert entries["exp_avg"].dtype == entries["exp_avg_sq"].dtype == torch.float32
            continue
        assert (entries["exp_avg"].dtype, entries["exp_avg_sq"].dtype) == (torch.int8, torch.uint8)
        rows = 1 if weight.ndim == 1 else len(weight)
        blocks = -(-(weight.numel() // rows) // 128) if rows else 1
        for name in moment_blocks.SCALES:
            assert entries[name].dtype == torch.float32 and entries[name].shape == (rows, blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flat_part_of_many_parameters_is_in_8_bits(dtype):
    """As ZeRO-1, 2 and 3 and FSDP1 hand it over; it was in fp32 without a word."""
    flat = start([(40_064,)], dtype)
    optimizer = AdamW(flat, moments="8bit", seed=1)
    train(optimizer, gradients([(40_064,)], 2))
    state = optimizer.state[flat[0]]
    kept = sum(state[name].nbytes for name in moment_blocks.ENTRIES)
    assert kept == 2 * 40_064 + 2 * 4 * 40_064 // 128


@pytest.mark.parametrize(
    ("size", "dtype"), [(4095, torch.float32), (4096, torch.int8), (4097, torch.int8)]
)
def test_vectors_have_codes_from_4096_elements_on(size, dtype):
    optimizer = AdamW(start([(size,)]), moments="8bit", seed=1)
    train(optimizer, gradients([(size,)], 1))
    assert next(iter(optimizer.state.values()))["exp_avg"].dtype == dtype


def test_into_torchs_form_and_back():
    ours = AdamW(start(SHAPES), moments="8bit", seed=3)
    train(ours, gradients(SHAPES, 4))
    torchs, wide = torch.optim.AdamW(start(SHAPES)), AdamW(start(SHAPES), seed=3)
    torchs.load_state_dict(on_disk(ours.torch_state_dict()))
    wide.load_state_dict(on_disk(ours.state_dict()))
    assert all(group["moments"] == "fp32" for group in wide.param_groups)
    assert_same(snapshot(torchs), snapshot(wide))
    for param in ours.param_groups[0]["params"]:
        if param.ndim > 1 or len(param) > 4096:
            decoded = moments_8bit.dequantise(
                *(ours.state[param][name] for name in moment_blocks.ENTRIES)
            )
            at = next(
                other for other, mine in zip(wide.state, ours.state, strict=True) if mine is param
            )
            assert torch.equal(wide.state[at]["exp_avg"], decoded[0])
            assert torch.equal(wide.state[at]["exp_avg_sq"], decoded[1])
    again = AdamW(start(SHAPES), moments="8bit", seed=3)
    again.load_state_dict(on_disk(torchs.state_dict()))
    assert_same(snapshot(again), snapshot(ours), but=("weight",))  # rounded once, it stays
    train(again, gradients(SHAPES, 1))


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(70, 128), (3, 63), (5, 1), (4099,)])
def test_codes_that_were_read_as_numbers_are_refused(shape, moments, tmp_path):
    """torch.distributed.checkpoint loads 8-bit codes into an optimizer of other moments, and says
    nothing."""
    from torch.distributed import checkpoint as dcp

    ours = AdamW(start([shape]), moments="8bit", seed=3)
    train(ours, gradients([shape], 3))
    dcp.save({"optimizer": ours.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    other = AdamW(start([shape]), moments=moments, seed=3)
    train(other, gradients([shape], 1))
    loaded = {"optimizer": other.state_dict()}
    del loaded["optimizer"]["param_groups"]
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    # else DCP has become better
    assert loaded["optimizer"]["state"][0]["exp_avg"].abs().max() == 127
    loaded["optimizer"]["param_groups"] = other.state_dict()["param_groups"]
    with pytest.raises(
        ValueError, match="moments of parameter 0 are codes that were read as numbers"
    ):
        other.load_state_dict(loaded["optimizer"])


def test_integers_that_are_no_codes_are_taken():
    saved = torch.optim.AdamW(start([(3, 63)]))
    train(saved, gradients([(3, 63)], 1))
    for m, v in ((0.0, 0.0), (1.0, 1.0), (127.0, 254.0), (127.5, 255.0)):
        state_dict = copy.deepcopy(saved.state_dict())
        state_dict["state"][0]["exp_avg"].fill_(m)
        state_dict["state"][0]["exp_avg_sq"].fill_(v)
        AdamW(start([(3, 63)])).load_state_dict(state_dict)


def test_a_group_may_have_its_own():
    weights = start([(4, 8), (4, 8), (4, 8)])
    groups = [{"params": [weights[0]]}, {"params": [weights[1]], "moments": "8bit"}]
    optimizer = AdamW([*groups, {"params": [weights[2]], "moments": "bf16"}])
    train(optimizer, gradients([(4, 8)] * 3, 2))
    dtypes = [optimizer.state[weight]["exp_avg"].dtype for weight in weights]
    assert dtypes == [torch.float32, torch.int8, torch.bfloat16]
    seeds = {group["seed"] for group in optimizer.param_groups}
    assert len(seeds) == 1 and None not in seeds


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_keep_fp32(tied):
    model = tiny_llama(32, tie_word_embeddings=tied)
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


def test_embeddings_keep_fp32_where_a_model_refuses_to_name_a_head():
    class Headless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4)

        def get_output_embeddings(self):
            raise NotImplementedError

    model = Headless()
    optimizer, _ = adamw(model, moments="8bit")
    kinds = {
        id(param): group["moments"] for group in optimizer.param_groups for param in group["params"]
    }
    assert kinds[id(model.embedding.weight)] == "fp32"
    assert kinds[id(model.layer.weight)] == "8bit"


@pytest.mark.parametrize("how", ["constructor", "group", "checkpoint"])
def test_amsgrad_is_refused(how):
    with pytest.raises(ValueError, match='amsgrad with moments="8bit"'):
        if how == "constructor":
            AdamW(start(SHAPES), moments="8bit", amsgrad=True)
        elif how == "group":
            AdamW([{"params": start(SHAPES), "moments": "8bit"}], amsgrad=True)
        else:
            AdamW(start(SHAPES), moments="8bit").load_state_dict(
                torch.optim.AdamW(start(SHAPES), amsgrad=True).state_dict()
            )
