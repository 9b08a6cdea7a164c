"""offload="states": the bits of the resident step, wherever states lie and however they are cut."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from support.adamw_modes import BF16, FP32, MODES, WITH_AMSGRAD
from support.adamw_problems import SIZES, Training
from support.scheduler import Race, Scheduler
from torch.nn import Parameter

from fastft import fuse_clipping
from fastft.optim import adamw_update, fp32_weights
from fastft.optim.adamw import AdamW
from fastft.optim.moment_codes import CODES
from fastft.optim.offload import host_memory, pieces

IMPLS = ("cpp", "eager")
# of 8-bit moments, a row of it is longer than a piece
LONG_ROWS = (*SIZES, 4 * 9001, 8 * 507)
LAYOUTS = {
    "channels last": lambda: torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(77, 63).t(),
    "every other column": lambda: torch.randn(63, 154)[:, ::2],
    "of no dimension": lambda: torch.randn(()),
    "a vector with gaps": lambda: torch.randn(9000)[::2],
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Buffers in which a parameter of these tests has several pieces, or many share one."""
    monkeypatch.setattr(pieces, "BUFFER", 20_000)


def assert_same(one, other):
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)


def assert_trains_as_resident(trained, staged):
    """`trained(offload)` gives the bits of `trained(None)`, on the host or through a device."""
    with Scheduler("late").installed() if staged else contextlib.nullcontext():
        offloaded = trained("states")
    assert_same(offloaded, trained(None))


def pieces_of(optimizer):
    return [piece.spans for part in optimizer._plan.parts for piece in part._pieces]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", {**MODES, **WITH_AMSGRAD})
def test_every_way_of_keeping_values_has_the_bits_of_the_resident_step(mode, impl):
    kept = {**MODES, **WITH_AMSGRAD}[mode]
    resident, offloaded = (
        Training(kept, impl, sizes=LONG_ROWS, offload=offload).step(3)
        for offload in (None, "states")
    )
    assert_same(offloaded.values(), resident.values())
    cut = pieces_of(offloaded.optimizer)
    assert max(map(len, cut)) >= 8  # many share a piece, and one has several
    assert any(span.begin for spans in cut for span in spans)


@pytest.mark.parametrize("order", ["late", "early", 0, 1])
@pytest.mark.parametrize(
    "mode", ["fp32-fp32", "exact-fp32", "exact-8bit", "exact-4bit", "stochastic-bf16"]
)
def test_staged_through_two_buffers_in_every_order_that_the_waits_allow(mode, order):
    resident = Training(MODES[mode], "auto", sizes=LONG_ROWS, max_grad_norm=1.0).step(3)
    with Scheduler(order).installed() as device:
        offloaded = Training(
            MODES[mode], "auto", sizes=LONG_ROWS, max_grad_norm=1.0, offload="states"
        ).step(3)
        values, staging = offloaded.values(), offloaded.optimizer.staging
        assert device.device_bytes >= staging
    assert_same(values, resident.values())
    assert 0 < staging <= 2 * pieces.BUFFER


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("moments", ["fp32", *CODES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_gradients_that_lie_in_any_way(layout, moments, staged):
    def trained(offload):
        torch.manual_seed(0)
        param = Parameter(LAYOUTS[layout]().to(BF16))
        optimizer = AdamW(
            [param, Parameter(torch.ones(3))], moments=moments, seed=1, offload=offload
        )
        for strided in (False, True, False):
            grad = torch.randn(param.shape).to(BF16)
            param.grad = grad if strided else torch.empty_like(param).copy_(grad)
            optimizer.step()
        return [param.detach(), *optimizer.state[param].values()]

    assert_trains_as_resident(trained, staged)


def test_a_gradient_of_another_dtype_takes_the_engine_that_the_resident_step_takes():
    def trained(offload):
        torch.manual_seed(0)
        params = [Parameter(torch.randn(63, 507).to(BF16)) for _ in range(2)]
        optimizer = AdamW(params, offload=offload)
        params[0].grad = torch.randn(63, 507).to(BF16)
        params[1].grad_dtype = None
        params[1].grad = torch.randn(63, 507)
        optimizer.step()
        return [param.detach() for param in params]

    assert_same(trained("states"), trained(None))


def test_an_explicit_engine_that_cannot_take_a_gradient_says_so_before_anything_is_updated():
    param = Parameter(torch.ones(5000, dtype=BF16))
    optimizer = AdamW([param], impl="cpp", offload="states")
    param.grad_dtype = None
    param.grad = torch.ones(5000)
    with pytest.raises(RuntimeError, match="impl='cpp' is not available"):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param)) and optimizer.state[param]["step"] == 0
    param.grad = torch.ones(5000, dtype=BF16)
    optimizer.step()


def test_sparse_gradients_are_refused_before_anything_is_updated():
    table = torch.nn.Embedding(2000, 8, sparse=True)
    optimizer = AdamW([Parameter(torch.ones(5)), table.weight], offload="states")
    optimizer.param_groups[0]["params"][0].grad = torch.ones(5)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(5))


@pytest.mark.parametrize("mode", ["exact-fp32", "stochastic-8bit", "kahan-4bit"])
def test_switching_between_runs_of_one_checkpoint_changes_no_bit(mode):
    resident = Training(MODES[mode], "auto", sizes=LONG_ROWS).step(6)
    switched = Training(MODES[mode], "auto", sizes=LONG_ROWS)
    for offload in ("states", None, "states"):
        file = io.BytesIO()
        torch.save(switched.optimizer.state_dict(), file)
        file.seek(0)
        made = AdamW(
            [dict(group) for group in switched.optimizer.param_groups],
            offload=offload,
            **MODES[mode].options,
        )
        made.load_state_dict(torch.load(file))
        switched.optimizer = made
        switched.step(2)
    assert_same(switched.values(), resident.values())


def test_a_checkpoint_of_a_capturable_optimizer_goes_on():
    param = Parameter(torch.ones(5))
    saved = AdamW([param], capturable=True).state_dict()
    optimizer = AdamW([param], offload="states")
    optimizer.load_state_dict(saved)
    param.grad = torch.ones(5)
    optimizer.step()
    assert optimizer.param_groups[0]["capturable"] is False


@pytest.mark.parametrize("how", ["pickled", "copied", "state dict"])
def test_a_copy_in_the_middle_goes_on_with_the_same_bits(how):
    resident, offloaded = (
        Training(MODES["exact-8bit"], "auto", offload=offload).step(2)
        for offload in (None, "states")
    )
    if how == "state dict":
        saved = copy.deepcopy(offloaded.optimizer.state_dict())
        offloaded.optimizer.load_state_dict(saved)
    else:
        again = copy.deepcopy if how == "copied" else lambda it: pickle.loads(pickle.dumps(it))
        offloaded.optimizer, offloaded.params = again((offloaded.optimizer, offloaded.params))
    assert offloaded.optimizer.offload == "states"
    assert_same(offloaded.step(2).values(), resident.step(2).values())


def test_a_saved_state_has_the_bytes_of_its_entries_alone():
    training = Training(MODES["exact-fp32"], "auto", offload="states").step()
    saved = io.BytesIO()
    torch.save(training.optimizer.state[training.params[4]], saved)
    assert saved.tell() < 4097 * 10 + 10_000


@pytest.mark.parametrize("staged", [False, True])
def test_late_frozen_and_moved_parameters_and_replaced_states(staged):
    def trained(offload):
        training = Training(MODES["exact-fp32"], "auto", sizes=(507, 4097, 63), offload=offload)
        training.step()
        late = Parameter(torch.linspace(-1, 1, 3000).to(BF16))
        training.optimizer.add_param_group({"params": [late]})
        training.params.append(late)
        training.step()
        training.params[0].requires_grad_(False).grad = None
        training.params[1].grad, late.grad = torch.ones(4097, dtype=BF16), None
        training.optimizer.step()
        training.params[1].data = training.params[1].detach().clone()
        training.step()
        state = training.optimizer.state[training.params[2]]
        state["exp_avg"] = torch.full_like(state["exp_avg"], 0.5)
        return training.step().values()

    assert_trains_as_resident(trained, staged)


def test_gradscaler_skips_and_unscales_as_resident():
    def trained(offload):
        torch.manual_seed(0)
        model = torch.nn.Linear(63, 507)
        optimizer = AdamW(model.parameters(), offload=offload)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        skipped = []
        for factor in (1.0, 1e38, 1.0):
            optimizer.zero_grad()
            scaler.scale(model(torch.full((4, 63), 0.5)).square().sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            skipped.append(optimizer.step_was_skipped)
        return skipped, [param.detach() for param in model.parameters()]

    (skipped, values), (skipped_too, expected) = trained("states"), trained(None)
    assert skipped == skipped_too == [False, True, False]
    assert_same(values, expected)


def test_trainers_clipping_inside_the_step():
    class Accelerator:
        distributed_type = type("Kind", (), {"value": "NO"})

        def clip_grad_norm_(self, *_, **__):
            raise AssertionError("not reached")

        def unscale_gradients(self):
            pass

    def trained(offload):
        training = Training(MODES["exact-fp32"], "auto", offload=offload).step()
        trainer = type("Trainer", (), {"accelerator": Accelerator()})()
        trainer.optimizer = training.optimizer
        fuse_clipping(trainer)
        norm = trainer.accelerator.clip_grad_norm_(training.params, 0.5)
        training.optimizer.step()
        return [norm, *training.values()]

    assert_same(trained("states"), trained(None))


def test_weights_that_somebody_else_has_written_lose_their_low_bits_as_resident():
    def trained(offload):
        training = Training(MODES["exact-fp32"], "auto", sizes=(4097, 63), offload=offload).step()
        marks = training.optimizer.state_dict() and [
            training.optimizer.state[param].mark.sample for param in training.params
        ]
        training.params[0].data.zero_()
        training.params[1].detach().zero_()
        with pytest.warns(UserWarning, match="written by somebody else"):
            assert training.optimizer.forget_stale_remainders() == 2
        return [torch.tensor([mark % 2**62 for mark in marks]), *training.step().values()]

    assert_same(trained("states"), trained(None))


def test_fp32_weights_are_saved_and_restored(tmp_path):
    model = torch.nn.Linear(63, 507).to(BF16)
    optimizer = AdamW(model.parameters(), offload="states")
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    fp32_weights.save_fp32(model, optimizer, tmp_path)
    again = copy.deepcopy(model)
    restored = AdamW(again.parameters(), offload="states")
    fp32_weights.load_fp32(again, restored, tmp_path)
    for param, copied in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(restored.state[copied]["remainder"], optimizer.state[param]["remainder"])


def test_a_kernel_that_raises_in_the_middle_is_not_forgotten(monkeypatch):
    training = Training(MODES["exact-fp32"], "eager", sizes=(507, 9000, 63), offload="states")
    saved = copy.deepcopy(training.step().optimizer.state_dict())
    weights = [param.detach().clone() for param in training.params]
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no more")
        return adamw_update._adamw_reference(*args)

    monkeypatch.setattr(adamw_update.ADAMW, "reference", failing)
    with pytest.raises(MemoryError, match="no more"):
        training.step()
    for use in (
        training.optimizer.step,
        training.optimizer.state_dict,
        training.optimizer.torch_state_dict,
        lambda: pickle.dumps(training.optimizer),
        training.optimizer.stale_weights,
    ):
        with pytest.raises(RuntimeError, match=r"broke off in its middle .MemoryError: no more"):
            use()
    # a checkpoint mends it
    monkeypatch.undo()
    for param, weight in zip(training.params, weights, strict=True):
        param.data.copy_(weight)
    training.optimizer.load_state_dict(saved)
    training.optimizer.step()
    assert training.optimizer.state[training.params[0]]["step"] == 2


def test_states_are_gone_with_the_optimizer_and_with_those_that_replace_them():
    with Scheduler("late").installed() as device:
        training = Training(MODES["exact-fp32"], "auto", sizes=(4097, 63), offload="states").step()
        whole = device.host_bytes
        assert whole == 4097 * 10 + 63 * 14  # that has amsgrad
        training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
        training.step()
        assert device.host_bytes == whole
        del training
        device.finish()
        assert device.host_bytes == 0


def test_the_host_waits_at_the_end_of_the_step():
    with pytest.raises(Race, match="the host"), Scheduler("late").installed():
        training = Training(MODES["exact-fp32"], "auto", sizes=(4097,), offload="states").step()
        (part,) = training.optimizer._plan.parts
        part.begin([param.grad for param in training.params], torch.ones(1, 9), None, 0)
        part.run()
        training.optimizer.state[training.params[0]]["exp_avg"].clone()


# the door


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"offload": "disk"}, ValueError, "offload must be one of .*'states'.* got 'disk'"),
        ({"offload": "states", "capturable": True}, ValueError, "capturable=True with offload"),
        ({"offload": "states", "release_gradients": True}, ValueError, "release_gradients=True"),
        ({"max_grad_norm": 1.0, "release_gradients": True}, ValueError, "max_grad_norm"),
        ({"release_gradients": 1}, TypeError, "release_gradients must be True or False"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(options, error, sentence):
    with pytest.raises(error, match=sentence):
        AdamW([torch.zeros(3, requires_grad=True)], **options)


def test_a_group_that_becomes_capturable_later_is_refused():
    param = Parameter(torch.ones(3))
    optimizer = AdamW([param], offload="states")
    with pytest.raises(ValueError, match="capturable=True with offload='states'"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "capturable": True})
    optimizer.param_groups[0]["capturable"] = True
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="capturable=True with offload='states'"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))


def test_too_little_host_memory_is_a_sentence_before_anything_is_made(monkeypatch):
    params = [Parameter(torch.ones(1000, dtype=BF16)), Parameter(torch.ones(500, dtype=FP32))]
    monkeypatch.setattr(host_memory, "available", lambda: 1000 * 10 + 500 * 8 - 1)
    with pytest.raises(RuntimeError, match=r"offloading needs .* GiB of host memory"):
        AdamW(params, offload="states")
    monkeypatch.setattr(host_memory, "available", lambda: 1000 * 10 + 500 * 8)
    optimizer = AdamW(params, offload="states")
    monkeypatch.setattr(host_memory, "available", lambda: 100)
    params[0].grad = torch.ones(1000, dtype=BF16)
    with pytest.raises(RuntimeError, match="offloading needs"):
        optimizer.step()
    assert not optimizer.state and torch.equal(params[0], torch.ones_like(params[0]))


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    param = Parameter(torch.ones(100, dtype=FP32))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(host_memory, "available", lambda: 3199)
    with pytest.raises(RuntimeError, match="for each of 4 processes"):
        AdamW([param], offload="states")
    monkeypatch.setattr(host_memory, "available", lambda: 3200)
    optimizer = AdamW([param], offload="states")
    # the others have made their states by now
    monkeypatch.setattr(host_memory, "available", lambda: 800)
    param.grad = torch.ones(100)
    optimizer.step()


def test_a_host_that_does_not_say_how_much_it_has_is_believed(monkeypatch):
    monkeypatch.setattr(host_memory, "available", lambda: None)
    AdamW([Parameter(torch.ones(100))], offload="states")


def test_a_frozen_parameter_needs_no_memory(monkeypatch):
    monkeypatch.setattr(host_memory, "available", lambda: 100)
    frozen = torch.ones(100, dtype=FP32)
    param = Parameter(torch.ones(2, dtype=FP32))
    optimizer = AdamW([frozen, param], offload="states")
    param.grad = torch.ones(2)
    optimizer.step()


def test_entries_of_others_in_a_state_stay_where_they_are():
    with Scheduler("late").installed() as device:
        training = Training(MODES["fp32-fp32"], "auto", sizes=(63,), offload="states").step()
        other = device.memory(8)
        training.optimizer.state[training.params[0]]["of somebody else"] = other
        training.step()
        assert training.optimizer.state[training.params[0]]["of somebody else"] is other


def test_weights_that_are_moved_away_leave_their_memory():
    training = Training(MODES["exact-fp32"], "auto", sizes=(4097,), offload="states").step()
    (param,) = training.params
    memory = torch.multiprocessing.reductions.StorageWeakRef(param.untyped_storage())
    param.data = param.data.clone()
    assert memory.expired()
