"""Moments as codes, of 8 and of 4 bits: what is lost, on which gradients; the same bits however
they are computed, split, saved and loaded."""

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

from fastft.optim.adamw import AdamW
from fastft.optim.adamw_update import ADAMW
from fastft.optim.factory import adamw
from fastft.optim.moment_blocks import ENTRIES, SCALES
from fastft.optim.moment_codes import (
    CODES,
    code_of,
    dequantise,
    entries_of,
    new_entries,
    quantise,
    restore,
)

of_both = pytest.mark.parametrize("moments", CODES)
SHAPES = [(5, 1), (3, 63), (4, 507), (2, 3, 7), (9,), (70, 128), (2, 1000), (0, 3), (3, 0), (4099,)]


def codes_of(m, v, moments):
    state = entries_of(new_entries(m, moments))
    quantise(m, v, state)
    return state


@of_both
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradients_move_nothing(impl, dtype, moments):
    # whole blocks, and single elements among others that are updated
    weight = start([(6, 300)], dtype)[0]
    before = weight.detach().clone()
    still = torch.rand(6, 300, generator=torch.Generator().manual_seed(2)) < 0.5
    still[3] = True
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.0, moments=moments, impl=impl)
    train(optimizer, [[row[0].masked_fill(still, 0.0)] for row in gradients([(6, 300)], 60)])
    assert torch.equal(weight[still], before[still])
    assert not torch.equal(weight[~still], before[~still])


def test_fine_tunes_end_at_the_loss_of_fp32():
    # of a small model, on noisy targets; those of language models: benchmarks/moments_8bit.py tune
    inputs = torch.randn(512, 32, generator=torch.Generator().manual_seed(1))
    target = (inputs @ torch.randn(32, 4, generator=torch.Generator().manual_seed(2))).tanh()
    losses = {}
    for moments in ("fp32", *CODES):
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
    assert all(abs(losses[moments] / losses["fp32"] - 1) < 0.005 for moments in CODES)


@of_both
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 3e21])
def test_a_bad_gradient_spoils_its_own_element(impl, bad, moments):
    # 3e21 is finite, its square is not
    optimizers = [AdamW(start([(3, 200)]), moments=moments, impl=impl, seed=1) for _ in range(2)]
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
@pytest.mark.parametrize("mode", [mode for mode, kept in MODES.items() if kept.moments in CODES])
@pytest.mark.parametrize("size", [1e-17, 1e-33, 1.5e20])
def test_engines_have_the_same_bits_of_tiny_and_huge_gradients(mode, size, poisoned_empty):
    """Where the reciprocal of a scale overflows, or is denormal and times the scale above 1."""
    optimizers = [
        AdamW(start(SHAPES, MODES[mode].dtype), impl=impl, seed=3, **MODES[mode].options)
        for impl in ("eager", "cpp")
    ]
    for row in gradients(SHAPES, 8):
        for optimizer in optimizers:
            train(optimizer, [[grad * size for grad in row]])
        assert_same(*map(snapshot, optimizers))


@of_both
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("columns", [1, 63, 507])
def test_rows_do_not_depend_on_each_other(impl, columns, moments):
    """A shard of rows, whose random bits begin where they do in the whole, has the bits of the
    whole."""

    def step(param, grad, state, first, number):
        table = torch.tensor([[0, 0, 0, first]])
        hyper = torch.tensor([[1.0, 0.1, 0.999, 0.001, -0.1, 0.03, 1e-8, 1.0, number]])
        lists = [[param], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], []]
        update = ADAMW.implementation(impl, param.device)
        update(*lists, [state[name] for name in SCALES], table, hyper, torch.ones(()), 7)

    whole = start([(9, columns)])[0].detach()
    parts = [whole[:4].clone(), whole[4:].clone()]
    states = [new_entries(tensor, moments) for tensor in (whole, *parts)]
    for number, (grad,) in enumerate(gradients([(9, columns)], 5), 1):
        step(whole, grad, states[0], 0, float(number))
        step(parts[0], grad[:4].clone(), states[1], 0, float(number))
        step(parts[1], grad[4:].clone(), states[2], 4 * columns, float(number))
    assert torch.equal(torch.cat(parts), whole)
    for name in ENTRIES:
        assert torch.equal(torch.cat([states[1][name], states[2][name]]), states[0][name])


@of_both
@pytest.mark.parametrize(("cut", "same"), [(4096 + 128, True), (4096 + 64, False)])
def test_parts_of_a_vector_that_begin_with_a_block_have_the_bits_of_the_whole(cut, same, moments):
    """A flat vector cut anew among processes: exact where every part begins at a multiple of
    128."""
    m, v = torch.randn(9000, generator=torch.Generator().manual_seed(1)), torch.rand(9000)
    whole = codes_of(m, v, moments)
    parts = [codes_of(m[:cut], v[:cut], moments), codes_of(m[cut:], v[cut:], moments)]
    joined = [torch.cat(both, both[0].ndim - 1) for both in zip(*parts, strict=True)]
    assert (
        all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(joined, whole, strict=True))
        == same
    )


@of_both
def test_any_layout(moments):
    # a transposed weight is updated as its copy is
    (copied,) = start([(63, 130)])
    transposed = Parameter(copied.detach().t().contiguous().t())
    optimizers = [AdamW([weight], moments=moments, seed=3) for weight in (copied, transposed)]
    for optimizer in optimizers:
        train(optimizer, gradients([(63, 130)], 4))
    assert not transposed.is_contiguous()
    assert_same(*map(snapshot, optimizers))


@of_both
def test_states_have_the_promised_form(moments):
    optimizer = AdamW(start(SHAPES), moments=moments)
    train(optimizer, gradients(SHAPES, 1))
    for entries in snapshot(optimizer):
        weight = entries["weight"]
        assert entries["exp_avg_sq"].shape == weight.shape
        if weight.ndim < 2 and len(weight) < 4096:
            assert entries["exp_avg"].shape == weight.shape
            assert entries["exp_avg"].dtype == entries["exp_avg_sq"].dtype == torch.float32
            continue
        rows = 1 if weight.ndim == 1 else len(weight)
        columns = weight.shape[1:].numel() if weight.ndim > 1 else len(weight)
        form = (torch.int8, weight.shape)
        if moments == "4bit":
            form = (torch.uint8, torch.Size((rows, -(-columns // 2))))
        assert (entries["exp_avg"].dtype, entries["exp_avg"].shape) == form
        assert entries["exp_avg_sq"].dtype == torch.uint8
        blocks = -(-columns // 128)
        for name in SCALES:
            assert entries[name].dtype == torch.float32 and entries[name].shape == (rows, blocks)


@pytest.mark.parametrize(("moments", "halves"), [("8bit", 4), ("4bit", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flat_part_of_many_parameters_is_in_codes(dtype, moments, halves):
    """As ZeRO-1, 2 and 3 and FSDP1 hand it over; it was in fp32 without a word."""
    flat = start([(40_064,)], dtype)
    optimizer = AdamW(flat, moments=moments, seed=1)
    train(optimizer, gradients([(40_064,)], 2))
    state = optimizer.state[flat[0]]
    kept = sum(state[name].nbytes for name in ENTRIES)
    assert kept == halves * 40_064 // 2 + 2 * 4 * 40_064 // 128


@of_both
@pytest.mark.parametrize(("size", "coded"), [(4095, False), (4096, True), (4097, True)])
def test_vectors_have_codes_from_4096_elements_on(size, coded, moments):
    optimizer = AdamW(start([(size,)]), moments=moments, seed=1)
    train(optimizer, gradients([(size,)], 1))
    code = code_of(next(iter(optimizer.state.values()))["exp_avg"])
    assert code == (CODES[moments] if coded else None)


@of_both
def test_into_torchs_form_and_back(moments):
    ours = AdamW(start(SHAPES), moments=moments, seed=3)
    train(ours, gradients(SHAPES, 4))
    torchs, wide = torch.optim.AdamW(start(SHAPES)), AdamW(start(SHAPES), seed=3)
    torchs.load_state_dict(on_disk(ours.torch_state_dict()))
    wide.load_state_dict(on_disk(ours.state_dict()))
    assert all(group["moments"] == "fp32" for group in wide.param_groups)
    assert_same(snapshot(torchs), snapshot(wide))
    for param in ours.param_groups[0]["params"]:
        if param.ndim > 1 or len(param) > 4096:
            decoded = dequantise(*entries_of(ours.state[param]))
            at = next(
                other for other, mine in zip(wide.state, ours.state, strict=True) if mine is param
            )
            assert torch.equal(wide.state[at]["exp_avg"], decoded[0])
            assert torch.equal(wide.state[at]["exp_avg_sq"], decoded[1])
    again = AdamW(start(SHAPES), moments=moments, seed=3)
    again.load_state_dict(on_disk(torchs.state_dict()))
    # rounded once, it stays; of 4 bits another scale may stand for the same moments
    assert_same(snapshot(again), snapshot(ours), but=("weight", "exp_avg_scale"))
    assert_same(snapshot_in_fp32(again), snapshot_in_fp32(ours), but=("weight",))
    train(again, gradients(SHAPES, 1))


def snapshot_in_fp32(optimizer):
    return list(optimizer.torch_state_dict()["state"].values())


@of_both
@pytest.mark.parametrize("columns", [1, 63, 129, 507])
def test_moments_that_codes_stood_for_are_restored(columns, moments):
    m = torch.randn(40, columns, generator=torch.Generator().manual_seed(columns))
    v = torch.rand(40, columns, generator=torch.Generator().manual_seed(1)) * m.square()
    m[:5] *= 1e-30
    m[7, 0] = torch.nan
    kept = dequantise(*codes_of(m, v, moments))
    state = entries_of(new_entries(m, moments))
    restore(*kept, state)
    for again, before in zip(dequantise(*state), kept, strict=True):
        assert torch.equal(again.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("source", ["fp32", "bf16", *CODES])
@of_both
def test_other_moments_are_converted(moments, source):
    saved = AdamW(start(SHAPES), moments=source, seed=3)
    train(saved, gradients(SHAPES, 4))
    loaded = AdamW(start(SHAPES), moments=moments, seed=3)
    loaded.load_state_dict(on_disk(saved.state_dict()))
    assert all(group["moments"] == moments for group in loaded.param_groups)
    # to the nearest code: v by twelfths of an octave, m / sqrt(v) by sevenths of a block's largest
    for before, after in zip(snapshot_in_fp32(saved), snapshot_in_fp32(loaded), strict=True):
        v, root = before["exp_avg_sq"], after["exp_avg_sq"].sqrt()
        if v.numel():
            smallest = float(v.max() * 1e-6)
            torch.testing.assert_close(after["exp_avg_sq"], v, rtol=0.05, atol=smallest)
            x, other = (state["exp_avg"] / root for state in (before, after))
            torch.testing.assert_close(other, x, rtol=0.02, atol=float(x.max() / 13))
    train(loaded, gradients(SHAPES, 1))
    assert all(weight.isfinite().all() for weight in loaded.param_groups[0]["params"])


@of_both
def test_a_resumed_run_is_the_uninterrupted_one(moments):
    def make():
        return AdamW(start(SHAPES, torch.bfloat16), moments=moments, seed=3)

    through, first, second = make(), make(), make()
    train(through, gradients(SHAPES, 6))
    train(first, gradients(SHAPES, 6)[:3])
    for weight, other in zip(second.param_groups[0]["params"], train(first, []), strict=True):
        weight.data.copy_(other.data)
    second.load_state_dict(on_disk(first.state_dict()))
    copied = copy.deepcopy(second)
    for resumed in (second, copied):
        train(resumed, gradients(SHAPES, 6)[3:])
        assert_same(snapshot(resumed), snapshot(through))


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("bits", "shape"), [(8, (70, 128)), (8, (3, 63)), (8, (5, 1)), (8, (4099,)), (4, (5, 1))]
)
def test_codes_that_were_read_as_numbers_are_refused(bits, shape, moments, tmp_path):
    """torch.distributed.checkpoint loads codes of the parameter's shape into an optimizer of other
    moments, and says nothing. (Of another shape it refuses them.)"""
    from torch.distributed import checkpoint as dcp

    ours = AdamW(start([shape]), moments=f"{bits}bit", seed=3)
    train(ours, gradients([shape], 3))
    dcp.save({"optimizer": ours.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    other = AdamW(start([shape]), moments=moments, seed=3)
    train(other, gradients([shape], 1))
    loaded = {"optimizer": other.state_dict()}
    del loaded["optimizer"]["param_groups"]
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    # else DCP has become better
    assert loaded["optimizer"]["state"][0]["exp_avg_sq"].max() == 255
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


@of_both
def test_a_group_may_have_its_own(moments):
    weights = start([(4, 8), (4, 8), (4, 8)])
    groups = [{"params": [weights[0]]}, {"params": [weights[1]], "moments": moments}]
    optimizer = AdamW([*groups, {"params": [weights[2]], "moments": "bf16"}])
    train(optimizer, gradients([(4, 8)] * 3, 2))
    dtypes = [optimizer.state[weight]["exp_avg"].dtype for weight in weights]
    assert dtypes == [torch.float32, CODES[moments].dtype, torch.bfloat16]
    seeds = {group["seed"] for group in optimizer.param_groups}
    assert len(seeds) == 1 and None not in seeds


@of_both
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_keep_fp32(tied, moments):
    model = tiny_llama(32, tie_word_embeddings=tied)
    optimizer, _ = adamw(model, moments=moments, weight_decay=0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        wide = param.ndim < 2 or "embed_tokens" in name or "lm_head" in name
        assert (code_of(optimizer.state[param]["exp_avg"]) is None) == wide, name
    decays = {
        id(param): group["weight_decay"]
        for group in optimizer.param_groups
        for param in group["params"]
    }
    assert (
        decays[id(model.model.embed_tokens.weight)] == 0.1
        and decays[id(model.model.norm.weight)] == 0.0
    )


@of_both
def test_embeddings_keep_fp32_where_a_model_refuses_to_name_a_head(moments):
    class Headless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4)

        def get_output_embeddings(self):
            raise NotImplementedError

    model = Headless()
    optimizer, _ = adamw(model, moments=moments)
    kinds = {
        id(param): group["moments"] for group in optimizer.param_groups for param in group["params"]
    }
    assert kinds[id(model.embedding.weight)] == "fp32"
    assert kinds[id(model.layer.weight)] == moments


@of_both
@pytest.mark.parametrize("how", ["constructor", "group", "checkpoint"])
def test_amsgrad_is_refused(how, moments):
    with pytest.raises(ValueError, match=f'amsgrad with moments="{moments}"'):
        if how == "constructor":
            AdamW(start(SHAPES), moments=moments, amsgrad=True)
        elif how == "group":
            AdamW([{"params": start(SHAPES), "moments": moments}], amsgrad=True)
        else:
            AdamW(start(SHAPES), moments=moments).load_state_dict(
                torch.optim.AdamW(start(SHAPES), amsgrad=True).state_dict()
            )
