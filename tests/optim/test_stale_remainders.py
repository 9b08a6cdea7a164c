"""Weights that others write while AdamW keeps low bits beside them: these bits then mean nothing,
and do not count."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adamw_steps import ENGINES, needs_native, on_disk
from torch import Tensor
from torch.nn import Parameter

import fastft
from fastft.optim import weight_bits
from fastft.optim.adamw_update import load_value
from fastft.optim.moment_codes import CODES
from fastft.optim.weight_bits import residue_of

pytestmark = pytest.mark.filterwarnings("ignore:.*were written by somebody else:UserWarning")
SHAPES = [(5, 7), (300,), (70, 130), (2,)]
KEPT = ["exact", "kahan"]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
        self.weights = torch.nn.ParameterList(map(Parameter, values))


def step(model: Model, optimizer: torch.optim.Optimizer, count: int = 1, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for param in model.weights:
            param.grad = torch.randn(param.shape, generator=generator).bfloat16()
        optimizer.step()


def trained(
    impl: str = "auto", rounding: str = "exact", **options: Any
) -> tuple[Model, fastft.AdamW]:
    model = Model()
    optimizer = fastft.AdamW(model.parameters(), lr=1e-3, impl=impl, rounding=rounding, **options)
    step(model, optimizer, 3)
    return model, optimizer


def residues(optimizer: fastft.AdamW) -> list[Tensor]:
    return [residue_of(state).clone() for state in optimizer.state.values()]


def masters(model: Model, optimizer: fastft.AdamW) -> list[Tensor]:
    return [
        load_value(param.detach(), residue_of(optimizer.state[param])) for param in model.weights
    ]


def other(param: Tensor) -> Tensor:
    return (param.detach().float() * 1.25).bfloat16()


def swap_data(model: Model) -> None:
    """As torch_ema, diffusers and most hand-written averages do."""
    for param in model.weights:
        param.data.copy_(other(param))


def load_a_checkpoint(model: Model) -> None:
    """As Trainer does at the end with load_best_model_at_end."""
    model.load_state_dict({name: other(value) for name, value in model.state_dict().items()})


@torch.no_grad()
def copy_in_place(model: Model) -> None:
    for param in model.weights:
        param.copy_(other(param))


def new_memory(model: Model) -> None:
    for param in model.weights:
        param.data = other(param)


def prune(model: Model) -> None:
    for param in model.weights:
        param.data.mul_(torch.arange(param.numel()).view(param.shape) % 2)


def merge(model: Model) -> None:
    """As PEFT merges a LoRA into its base."""
    for param in model.weights:
        param.data += 0.01 * torch.ones_like(param)


WRITERS = [swap_data, load_a_checkpoint, copy_in_place, new_memory, prune, merge]
COUNTED = [load_a_checkpoint, copy_in_place, new_memory]  # what a step sees by itself


def warned(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if "somebody else" in str(warning.message)]


def saved(folder: Path) -> list[Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return [tensors[f"weights.{i}"] for i in range(len(SHAPES))]


@pytest.mark.parametrize("rounding", KEPT)
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_save_fp32_writes_what_others_wrote(
    write: Callable[[Model], None], impl: str, rounding: str, tmp_path: Path
) -> None:
    model, optimizer = trained(impl, rounding)
    before = residues(optimizer)
    write(model)
    messages = warned(lambda: fastft.save_fp32(model, optimizer, tmp_path))
    assert len(messages) == 1 and messages[0].startswith(
        f"{len(SHAPES)} bf16 weights were written by somebody else"
    )
    assert all(
        torch.equal(value, param.float())
        for value, param in zip(saved(tmp_path), model.weights, strict=True)
    )
    assert all(map(torch.equal, residues(optimizer), before))  # the weights may come back


def test_an_average_swapped_in_and_out_leaves_no_trace(tmp_path: Path) -> None:
    model, optimizer = trained()
    twin, undisturbed = trained()
    own = copy.deepcopy(model.state_dict())
    swap_data(model)
    fastft.save_fp32(model, optimizer, tmp_path)
    for param, value in zip(model.weights, own.values(), strict=True):
        param.data.copy_(value)
    assert not warned(lambda: step(model, optimizer, 2, seed=5))
    step(twin, undisturbed, 2, seed=5)
    assert all(map(torch.equal, masters(model, optimizer), masters(twin, undisturbed)))


@pytest.mark.parametrize("rounding", KEPT)
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("write", COUNTED, ids=lambda write: write.__name__)
def test_the_next_step_starts_from_what_others_wrote(
    write: Callable[[Model], None], impl: str, rounding: str
) -> None:
    model, optimizer = trained(impl, rounding)
    write(model)
    plain = fastft.AdamW(
        [Parameter(param.detach().float()) for param in model.weights], lr=1e-3, impl=impl
    )
    for param, state in zip(plain.param_groups[0]["params"], optimizer.state.values(), strict=True):
        names = ("step", "exp_avg", "exp_avg_sq")
        plain.state[param] = {name: state[name].clone() for name in names}
    messages = warned(lambda: step(model, optimizer, 1, seed=7))
    assert len(messages) == 1 and messages[0].startswith(f"{len(SHAPES)} bf16 weights")
    for param, own in zip(plain.param_groups[0]["params"], model.weights, strict=True):
        param.grad = own.grad.float()
    plain.step()
    for param, master in zip(
        plain.param_groups[0]["params"], masters(model, optimizer), strict=True
    ):
        if rounding == "exact":
            assert torch.equal(param, master)
        else:
            torch.testing.assert_close(param.detach(), master, rtol=2**-15, atol=0)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_forgotten_at_the_beginning_of_a_training(
    write: Callable[[Model], None], impl: str
) -> None:
    model, optimizer = trained(impl)
    assert optimizer.forget_stale_remainders() == 0
    write(model)
    counts = []
    messages = warned(lambda: counts.append(optimizer.forget_stale_remainders()))
    assert counts == [len(SHAPES)] and len(messages) == 1
    assert not any(residue.any() for residue in residues(optimizer))
    assert optimizer.forget_stale_remainders() == 0
    assert not warned(lambda: step(model, optimizer, 2))


@pytest.mark.parametrize("impl", ENGINES)
def test_only_the_weights_that_were_written(impl: str) -> None:
    model, optimizer = trained(impl)
    before = residues(optimizer)
    model.weights[2].data.mul_(1.5)
    assert optimizer.forget_stale_remainders() == 1
    after = residues(optimizer)
    assert [bool(residue.any()) for residue in after] == [True, True, False, True]
    assert all(torch.equal(after[i], before[i]) for i in (0, 1, 3))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("changed", [True, False], ids=["other numbers", "the same numbers"])
def test_other_memory_after_a_step_with_gradients_that_lie_otherwise(
    changed: bool, impl: str
) -> None:
    """The native engine leaves such a step to the operator, and knows nothing of what it wrote."""
    model, optimizer = trained(impl)
    if changed:  # a new plan, whose engine has not written anything yet
        state = optimizer.state[model.weights[0]]
        state["exp_avg"] = state["exp_avg"].clone()
    model.weights[2].grad = model.weights[2].grad.t().contiguous().t()  # type: ignore[union-attr]
    optimizer.step()
    model.weights[2].data = other(model.weights[2]) if changed else model.weights[2].data.clone()
    messages = warned(lambda: step(model, optimizer, seed=2))
    assert len(messages) == changed


@pytest.mark.parametrize("impl", ENGINES)
def test_the_same_bits_written_again_are_no_change(impl: str) -> None:
    """As DDP does when it begins, and everybody who loads the checkpoint that is already there."""
    (model, optimizer), (twin, undisturbed) = trained(impl), trained(impl)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert not warned(lambda: step(model, optimizer))
    for param in model.weights:
        param.data = param.data.clone()
    assert not warned(lambda: step(model, optimizer, seed=2))
    step(twin, undisturbed), step(twin, undisturbed, seed=2)
    assert all(map(torch.equal, masters(model, optimizer), masters(twin, undisturbed)))


@pytest.mark.parametrize("rounding", KEPT)
@pytest.mark.parametrize("order", ["weights first", "states first"])
def test_a_checkpoint_in_either_order_keeps_every_bit(order: str, rounding: str) -> None:
    model, optimizer = trained(rounding=rounding)
    states, weights = on_disk(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    again = Model()
    resumed = fastft.AdamW(again.parameters(), lr=1e-3, rounding=rounding)
    loads = [lambda: again.load_state_dict(weights), lambda: resumed.load_state_dict(states)]
    for load in loads if order == "weights first" else reversed(loads):
        load()
        if load is loads[1]:
            states_again = resumed.state_dict()  # as accelerate does in between
            assert states_again["weight_checksums"] == states["weight_checksums"]
    assert not warned(lambda: step(again, resumed, 2, seed=5))
    step(model, optimizer, 2, seed=5)
    assert all(map(torch.equal, masters(again, resumed), masters(model, optimizer)))


@pytest.mark.parametrize("then", ["step", "save_fp32", "train begin"])
def test_states_of_other_weights(then: str, tmp_path: Path) -> None:
    """The state dict of the last step beside the weights of the best one."""
    _, optimizer = trained()
    states = on_disk(optimizer.state_dict())
    best = Model()
    resumed = fastft.AdamW(best.parameters(), lr=1e-3)
    resumed.load_state_dict(states)
    run = {
        "step": lambda: step(best, resumed),
        "save_fp32": lambda: fastft.save_fp32(best, resumed, tmp_path),
        "train begin": resumed.forget_stale_remainders,
    }[then]
    assert len(warned(run)) == 1
    if then == "save_fp32":
        assert all(map(torch.equal, saved(tmp_path), [param.float() for param in best.weights]))
    if then == "train begin":
        assert not any(residue.any() for residue in residues(resumed))


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_state_dict_made_after_others_wrote_fits_their_weights(
    write: Callable[[Model], None],
) -> None:
    model, optimizer = trained()
    before = residues(optimizer)
    write(model)
    states = optimizer.state_dict()
    assert not any(state["remainder"].any() for state in states["state"].values())
    assert all(map(torch.equal, residues(optimizer), before))
    again = copy.deepcopy(model)
    resumed = fastft.AdamW(again.parameters(), lr=1e-3)
    resumed.load_state_dict(states)
    assert not warned(lambda: step(again, resumed))


def test_an_old_checkpoint_without_checksums_loads_as_before() -> None:
    _, optimizer = trained()
    states = on_disk(optimizer.state_dict())
    del states["weight_checksums"]
    other_model = Model()
    resumed = fastft.AdamW(other_model.parameters(), lr=1e-3)
    resumed.load_state_dict(states)
    assert not warned(lambda: step(other_model, resumed))


@pytest.mark.parametrize("value", [5, {0: "x"}, {0: 1.5}, None])
def test_checksums_that_are_none_are_refused(value: Any) -> None:
    _, optimizer = trained()
    states = on_disk(optimizer.state_dict()) | {"weight_checksums": value}
    with pytest.raises(
        TypeError, match="weight_checksums of a state dict must be integers by parameter"
    ):
        optimizer.load_state_dict(states)


def test_torch_takes_a_state_dict_with_checksums() -> None:
    model, optimizer = trained()
    torchs = torch.optim.AdamW([Parameter(param.detach().float()) for param in model.weights])
    torchs.load_state_dict(on_disk(optimizer.state_dict()))
    assert "weight_checksums" not in optimizer.torch_state_dict()
    assert "weight_checksums" not in fastft.AdamW([Parameter(torch.ones(3))]).state_dict()


def test_load_fp32_between_two_steps(tmp_path: Path) -> None:
    model, optimizer = trained()
    fastft.save_fp32(model, optimizer, tmp_path)
    kept, weights = residues(optimizer), copy.deepcopy(model.state_dict())
    step(model, optimizer, 2)
    fastft.load_fp32(model, optimizer, tmp_path)
    assert optimizer.forget_stale_remainders() == 0
    assert all(map(torch.equal, residues(optimizer), kept))
    assert all(map(torch.equal, model.state_dict().values(), weights.values()))
    assert not warned(lambda: step(model, optimizer))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_forgets_nothing(how: str) -> None:
    model, optimizer = trained()
    optimizer.state_dict()  # leaves marks
    both = (model, optimizer)
    again, copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert not warned(lambda: step(again, copied))
    step(model, optimizer)
    assert all(map(torch.equal, masters(again, copied), masters(model, optimizer)))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_made_after_others_wrote_has_their_weights(how: Callable[[Any], Any]) -> None:
    model, optimizer = trained()
    copy_in_place(model)
    again, copied = how((model, optimizer))
    exact = [param.detach().float() for param in model.weights]
    assert all(map(torch.equal, masters(again, copied), exact))
    assert all(map(torch.equal, masters(model, optimizer), exact))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_sees_what_others_write_before_its_first_step(how: Callable[[Any], Any]) -> None:
    again, copied = how(trained())
    copy_in_place(again)
    exact = [param.detach().float() for param in again.weights]
    assert copied.forget_stale_remainders() == len(SHAPES)
    assert all(map(torch.equal, masters(again, copied), exact))


def test_a_weight_whose_low_bits_are_zero_already_is_not_told_of() -> None:
    model = Model()
    optimizer = fastft.AdamW(model.parameters(), lr=0.0)
    step(model, optimizer)
    for state in optimizer.state.values():
        state["remainder"].zero_()
    swap_data(model)
    assert not warned(optimizer.forget_stale_remainders)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 4096, 70_001, 2_200_001])
@pytest.mark.parametrize("every", [1, 32, 2**63 - 1])
@needs_native
def test_the_engines_have_the_same_checksum(size: int, every: int) -> None:
    weight, sums = torch.randn(size).bfloat16(), torch.zeros(2, 1, dtype=torch.int64)
    weight_bits.WEIGHT_CHECKSUM.native(sums[0], weight, every)
    # beyond the weight's end a step of any size is the same
    weight_bits.WEIGHT_CHECKSUM.reference(sums[1], weight, min(every, 2**20))
    assert torch.equal(sums[0], sums[1])


def test_the_checksum_is_that_of_the_docstring() -> None:
    """State dicts have it: it must stay."""
    weight = torch.arange(300).sub(150).bfloat16()
    bits, total = weight.view(torch.int16).tolist(), 0
    for q in range(3):
        section = bits[128 * q : 128 * q + 128]
        part = sum(x * (((j + 1) * 40503 % 2**15) | 1) for j, x in enumerate(section)) % 2**32
        total += part * (2 * q + 1) * 0x9E3779B97F4A7C15
    assert weight_bits.checksum(weight) == total % 2**64


def test_one_changed_bit_anywhere_changes_the_checksum() -> None:
    weight = torch.randn(1000).bfloat16()
    before, seen = weight_bits.checksum(weight), set()
    for i in range(0, 1000, 7):
        for bit in (0, 7, 15):
            changed = weight.clone()
            flipped = changed.view(torch.int16)[i].int() ^ (1 << bit)
            changed.view(torch.int16)[i] = (flipped << 16 >> 16).short()
            seen.add(weight_bits.checksum(changed))
    assert before not in seen and len(seen) == 3 * len(range(0, 1000, 7))


@pytest.mark.parametrize("moments", ["fp32", "bf16", *CODES])
@pytest.mark.parametrize("shape", [(70_000,), (300, 256), (3, 5), (300, 130)])
@needs_native
def test_what_a_step_samples_is_what_is_there(shape: tuple[int, ...], moments: str) -> None:
    """On one thread and on two, which share a tensor."""
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            weight = Parameter(torch.randn(shape).bfloat16())
            optimizer = fastft.AdamW([weight], impl="cpp", moments=moments, seed=1)
            for _ in range(2):
                weight.grad = torch.randn(shape).bfloat16()
                optimizer.step()
        finally:
            torch.set_num_threads(threads)
        optimizer.stale_weights()  # which marks the states
        expected = weight_bits.checksum(weight, weight_bits.EVERY)
        assert optimizer.state[weight].mark.sample == expected


@pytest.mark.parametrize("moments", ["fp32", *CODES])
@needs_native
def test_rows_that_cut_the_sections_of_the_checksum(moments: str) -> None:
    """The C++ engine knows what it wrote there too, so that another tensor is seen."""
    values: list[Tensor] = []
    for impl in ("cpp", "eager"):
        param = torch.linspace(-1, 1, 5 * 129).view(5, 129).bfloat16().requires_grad_()
        optimizer = fastft.AdamW([param], moments=moments, seed=1, impl=impl)
        param.grad = torch.linspace(-2, 3, 5 * 129).view(5, 129).bfloat16()
        optimizer.step()
        param.data = param.detach() * 2
        with pytest.warns(UserWarning, match="written by somebody else"):
            optimizer.step()
        values += [param.detach(), optimizer.state[param]["remainder"]]
    assert torch.equal(values[0], values[2]) and torch.equal(values[1], values[3])
