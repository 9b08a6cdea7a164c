"""4-bit moments in the C++ engine: the bits of plain torch, in every block, on any threads.

`tests/instruction_sets.py` runs this room under each instruction set.
"""

from __future__ import annotations

import pytest
import torch
from support.adamw_steps import equal, gradients, needs_native
from torch import Tensor

from fastft.optim import moment_codes
from fastft.optim.adamw_update import ADAMW, RESIDUES, STREAMS, Rounding, random_bits
from fastft.optim.moment_blocks import ENTRIES

pytestmark = needs_native

SHAPES = [
    (1, 1),
    (3, 63),
    (2, 507),
    (4097,),
    (70, 128),
    (2, 3, 7),
    (300, 2),
    (5, 33),
    (0, 3),
    (3, 0),
]
SEED = 2**33 + 7


class Kept:
    """A parameter and its state, and steps of an engine over them by the operator itself."""

    def __init__(self, shape: tuple[int, ...], rounding: Rounding = Rounding.FP32) -> None:
        dtype = torch.float32 if rounding == Rounding.FP32 else torch.bfloat16
        self.rounding = rounding
        self.param = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        self.state = moment_codes.new_entries(self.param, "4bit")
        if rounding in RESIDUES:
            self.state["residue"] = torch.zeros(shape, dtype=RESIDUES[rounding][1])

    def step(self, impl: str, grad: Tensor, number: int, first: int = 0, **changed: float) -> None:
        hyper = {
            **{"decay": 0.999, "lerp_weight": 0.1, "beta2": 0.999, "one_minus_beta2": 0.001},
            **{"negative_step": -0.01, "correction2": 0.03, "eps": 1e-8, "sign": 1.0},
            **{"step": float(number), **changed},
        }
        m, v, *scales = (self.state[name] for name in ENTRIES)
        residues = [self.state["residue"]] if "residue" in self.state else []
        table = torch.tensor([[0, self.rounding, 0, first]])
        lists = [[self.param], [grad.to(self.param.dtype)], [m], [v], [], [*residues, *scales]]
        update = ADAMW.implementation(impl, self.param.device)
        update(*lists, table, torch.tensor([list(hyper.values())]), torch.ones(()), SEED)

    def values(self) -> list[Tensor]:
        return [self.param, *self.state.values()]


def assert_same_steps(
    shape: tuple[int, ...], grads: list[Tensor], rounding: Rounding = Rounding.FP32
) -> None:
    both = {impl: Kept(shape, rounding) for impl in ("eager", "cpp")}
    for number, grad in enumerate(grads, 1):
        for impl, kept in both.items():
            kept.step(impl, grad, number, first=13)
        equal(*(kept.values() for kept in both.values()))


@pytest.mark.parametrize("rounding", Rounding)
def test_a_step_has_the_bits_of_plain_torch(rounding, poisoned_empty):
    for shape, grads in zip(SHAPES, zip(*gradients(SHAPES, 4), strict=True), strict=True):
        for number, grad in enumerate(grads):
            grad.view(-1)[number::5] = 0.0
            if number > 1:  # also rows, blocks and all of v that are zero
                grad[len(grad) // 2 :] = 0.0
        if len(grads[0]) > 4:
            grads[1].view(-1)[2], grads[2].view(-1)[1] = 3e21, -torch.inf
            grads[2].view(-1)[3] = torch.nan
        assert_same_steps(shape, list(grads), rounding)


@pytest.mark.parametrize("size", [1e-33, 1e-20, 1e-15, 1e-10, 1e12])
def test_gradients_of_any_size(size):
    """Where a reciprocal overflows, v is denormal or zero beside m, a ratio is larger than any."""
    shape = (9, 300)
    assert_same_steps(shape, [grad * size for (grad,) in gradients([shape], 4)])


SCALES = [0.0, 1e-45, 2.0**-101, 2.0**-100, 1e-20, 0.3, 1e20, 3e38]


@pytest.mark.parametrize("sq_scale", SCALES)
def test_every_pair_of_codes(sq_scale):
    """The weight tells what they were decoded to, m / (sqrt(v) + eps)."""
    nibbles = torch.arange(16, dtype=torch.uint8)
    both = {impl: Kept((256, 16 * len(SCALES) * 8)) for impl in ("eager", "cpp")}
    for impl, kept in both.items():
        bytes_ = (nibbles | nibbles.roll(5) << 4).repeat(4 * len(SCALES))
        kept.state["exp_avg"].copy_(bytes_.expand(256, -1))
        kept.state["exp_avg_sq"].copy_(torch.arange(256)[:, None].expand_as(kept.param))
        kept.state["exp_avg_scale"].copy_(torch.tensor(SCALES).expand(256, -1))
        kept.state["exp_avg_sq_scale"].fill_(sq_scale)
        for number in (1, 2):
            kept.step(impl, torch.zeros_like(kept.param), number, eps=1e-20)
    equal(*(kept.values() for kept in both.values()))
    assert both["cpp"].param.isfinite().any()


@pytest.mark.parametrize("columns", [128, 127, 33])
def test_ratios_beside_the_place_where_rounding_turns(columns):
    """The ratio is |grad| where v is 1: from some last places below (code + random / 2^16) / 7 to
    some above."""
    rows = 9 * 16
    bits = random_bits(13, rows * columns, 1, STREAMS["moments"], SEED, torch.device("cpu"))
    codes = torch.arange(rows * columns, dtype=torch.float64) % 7
    turns = ((codes + bits.double() / 2**16) / 7).float().view(9, 16, columns)
    places = torch.arange(-4, 5, dtype=torch.int32).view(-1, 1, 1)
    grads = (turns.view(torch.int32) + places).view(torch.float32).clamp(0.0, 1.0).view(rows, -1)
    grads.nan_to_num_(0.0)[:, 0] = 1.0
    grads[::2] *= -1
    both = {impl: Kept((rows, columns)) for impl in ("eager", "cpp")}
    for impl, kept in both.items():
        kept.state["exp_avg_sq"].fill_(255)
        kept.state["exp_avg_sq_scale"].fill_(1.0)
        alone = {"lerp_weight": 1.0, "beta2": 1.0, "one_minus_beta2": 0.0}
        kept.step(impl, grads, 1, first=13, **alone)
    equal(*(kept.values() for kept in both.values()))
    assert (both["cpp"].state["exp_avg_scale"] == 1.0).all()


@pytest.mark.parametrize("shape", [(1, 50_001), (7, 9_999), (40_001, 1)])
def test_threads_never_share_a_byte(shape):
    before = torch.get_num_threads()
    kept, grads = {1: Kept(shape), 2: Kept(shape), 5: Kept(shape)}, gradients([shape], 3)
    try:
        for threads, one in kept.items():
            torch.set_num_threads(threads)
            for number, (grad,) in enumerate(grads, 1):
                one.step("cpp", grad, number)
    finally:
        torch.set_num_threads(before)
    for threads in (2, 5):
        equal(kept[1].values(), kept[threads].values())
    assert (kept[1].state["exp_avg"][:, -1] < 16).all()  # nobody has the last half of a row


def test_parts_have_the_bits_of_the_whole():
    """Some rows, or of one row what begins with a block, as states on the host are cut."""
    whole, grads = Kept((9, 507)), [grad for (grad,) in gradients([(9, 507)], 3)]
    cuts = [(slice(0, 4), slice(0, 507)), (slice(4, 8), slice(0, 507))]
    cuts += [(slice(8, 9), slice(0, 256)), (slice(8, 9), slice(256, 507))]
    parts = []
    for rows, columns in cuts:
        part = Kept(whole.param[rows, columns].shape)
        part.param = whole.param[rows, columns].clone()
        parts.append(part)
    for number, grad in enumerate(grads, 1):
        whole.step("cpp", grad, number)
        for (rows, columns), part in zip(cuts, parts, strict=True):
            first = 507 * rows.start + columns.start
            part.step("cpp", grad[rows, columns].contiguous(), number, first)
    for (rows, columns), part in zip(cuts, parts, strict=True):
        blocks = slice(columns.start // 128, -(-columns.stop // 128))
        halves = slice(columns.start // 2, -(-columns.stop // 2))
        of_whole = [whole.param[rows, columns], whole.state["exp_avg"][rows, halves]]
        of_whole += [whole.state["exp_avg_sq"][rows, columns]]
        of_whole += [whole.state[name][rows, blocks] for name in ENTRIES[2:]]
        equal(part.values(), of_whole)


BAD = {
    "as many bytes as elements": lambda state: state.update(
        exp_avg=torch.zeros(3, 63, dtype=torch.uint8)
    ),
    "flat": lambda state: state.update(exp_avg=torch.zeros(96, dtype=torch.uint8)),
    "rows without their last half": lambda state: state.update(
        exp_avg=torch.zeros(3, 31, dtype=torch.uint8)
    ),
    "turned": lambda state: state.update(exp_avg=torch.zeros(32, 3, dtype=torch.uint8).t()),
}


@pytest.mark.parametrize("what", BAD)
def test_codes_of_another_shape_are_refused(what):
    kept = Kept((3, 63))
    before = kept.param.clone()
    BAD[what](kept.state)
    with pytest.raises(RuntimeError, match=r"two codes of 4 bits a byte: \(3, 32\)|contiguous"):
        kept.step("cpp", torch.ones(3, 63), 1)
    assert torch.equal(kept.param, before)
