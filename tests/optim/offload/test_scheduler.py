"""The tests' device finds each kind of defect that an engine may have, in every order, and lets
right ones pass."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduler import Freed, Race, Scheduler

in_every_order = pytest.mark.parametrize("order", ["late", "early", 0, 1, 2, 3])


def _floats(memory):
    return memory.view(torch.float32)


def _doubled(device, values, *, without=None):
    """Doubles host values on the device, piece by piece through two buffers, and adds each piece
    to `total` on the model's queue; `without` leaves out one of its waits."""

    def wait(name, queue, event):
        if name != without:
            queue.wait(event)

    host = _floats(device.host_memory(values.nbytes))
    host.copy_(values)
    inward, outward = device.queue(), device.queue()
    staging = [_floats(device.memory(16)) for _ in range(2)]
    emptied = [device.current().record() for _ in staging]
    total = torch.zeros(4)
    for i, piece in enumerate(host.split(4)):
        buffer = staging[i % 2]
        wait("reuse", inward, emptied[i % 2])
        inward.copy(buffer, piece)
        filled = inward.record()
        wait("in", device.current(), filled)
        device.current().launch(functools.partial(buffer.mul_, 2.0), [buffer], [buffer])
        total += buffer
        updated = device.current().record()
        wait("kernel", outward, updated)
        outward.copy(piece, buffer)
        emptied[i % 2] = outward.record()
    wait("model", device.current(), outward.record())
    if without != "host":
        outward.record().synchronize()
    return host.clone(), total


@in_every_order
def test_an_engine_with_all_its_waits_passes_and_computes_what_it_should(order):
    values = torch.randn(20)
    with Scheduler(order).installed() as device:
        doubled, total = _doubled(device, values)
    assert torch.equal(doubled, 2 * values)
    assert torch.allclose(total, 2 * values.view(5, 4).sum(0))


@given(st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_an_engine_with_all_its_waits_passes_in_orders_that_hypothesis_chooses(random):
    values = torch.randn(20)
    with Scheduler(random).installed() as device:
        assert torch.equal(_doubled(device, values)[0], 2 * values)


@in_every_order
@pytest.mark.parametrize("without", ["in", "reuse", "kernel", "host"])
def test_an_engine_without_one_of_its_waits_is_found(order, without):
    with pytest.raises(Race, match=r"test_scheduler.py:\d+ .* and offload/test_scheduler.py:\d+ "):
        with Scheduler(order).installed() as device:
            _doubled(device, torch.randn(20), without=without)


@in_every_order
def test_a_gradient_let_go_of_before_its_own_queue_has_waited_for_the_copy_is_found(order):
    with pytest.raises(Freed, match=r"test_scheduler.py:\d+.*(let go of|lost its memory)"):
        with Scheduler(order).installed() as device:
            side, host = device.queue(), device.host_memory(8)
            memory = torch.zeros(8, dtype=torch.uint8)
            side.wait(device.current().record())
            side.copy(host, memory)
            memory = None
            device.current().wait(side.record())


@in_every_order
def test_a_gradient_kept_until_the_model_has_waited_may_go(order):
    with Scheduler(order).installed() as device:
        side, host = device.queue(), device.host_memory(8)
        memory = torch.zeros(8, dtype=torch.uint8)
        side.wait(device.current().record())
        side.copy(host, memory)
        device.current().wait(side.record())
        memory = None


@in_every_order
def test_work_held_back_keeps_no_device_memory_alive(order):
    with pytest.raises(Freed):
        with Scheduler(order).installed() as device:
            side, memory = device.queue(), device.memory(8)
            side.wait(device.current().record())
            side.launch(lambda memory=memory: memory.zero_(), [], [memory])
            del memory


@in_every_order
def test_a_gradient_of_backward_that_a_side_queue_copies_without_waiting_is_found(order):
    weight = torch.randn(4, requires_grad=True)
    with pytest.raises(Race, match=r"current queue and .*queue 1"):
        with Scheduler(order).installed() as device:
            side, host = device.queue(), _floats(device.host_memory(16))
            (weight * weight).sum().backward()
            side.copy(host, weight.grad)


@in_every_order
def test_an_event_recorded_before_the_gradient_was_added_to_is_found(order):
    weight = torch.randn(4, requires_grad=True)
    with pytest.raises(Race):
        with Scheduler(order).installed() as device:
            side, host = device.queue(), _floats(device.host_memory(16))
            (weight * weight).sum().backward()
            event = device.current().record()
            (weight * weight).sum().backward()
            side.wait(event)
            side.copy(host, weight.grad)


@in_every_order
def test_one_event_orders_all_that_the_model_did_before_it(order):
    weights = [torch.randn(4, requires_grad=True) for _ in range(3)]
    with Scheduler(order).installed() as device:
        side = device.queue()
        host = [_floats(device.host_memory(16)) for _ in weights]
        sum((weight * weight).sum() for weight in weights).backward()
        side.wait(device.current().record())
        for to, weight in zip(host, weights, strict=True):
            side.copy(to, weight.grad)
            weight.detach().sum()  # the model goes on
        side.record().synchronize()
        assert all(torch.equal(to, w.grad) for to, w in zip(host, weights, strict=True))


@in_every_order
def test_a_weight_that_the_model_reads_before_a_side_queue_has_written_it_is_found(order):
    weight = torch.randn(4)
    with pytest.raises(Race, match=r"aten\.add"):
        with Scheduler(order).installed() as device:
            side = device.queue()
            side.wait(device.current().record())
            side.launch(lambda: weight.mul_(2), [weight], [weight])
            weight + 1


@in_every_order
def test_two_queues_that_write_the_same_bytes_are_found(order):
    with pytest.raises(Race, match=r"queue 1 and .*queue 2"):
        with Scheduler(order).installed() as device:
            memory = device.memory(8)
            allocated = device.current().record()
            for queue in (device.queue(), device.queue()):
                queue.wait(allocated)
                queue.launch(memory.zero_, [], [memory])


@in_every_order
def test_two_queues_that_write_neighbouring_bytes_pass(order):
    with Scheduler(order).installed() as device:
        memory = device.memory(8)
        allocated = device.current().record()
        for part in memory.split(4):
            queue = device.queue()
            queue.wait(allocated)
            queue.launch(part.zero_, [], [part])
            device.current().wait(queue.record())
        assert not memory.any()


@in_every_order
def test_the_host_writes_what_a_queue_has_still_to_read(order):
    with pytest.raises(Race, match="in the host"):
        with Scheduler(order).installed() as device:
            host, memory, side = device.host_memory(8), device.memory(8), device.queue()
            side.wait(device.current().record())
            host.zero_()
            side.copy(memory, host)
            host.fill_(1)


def test_what_the_current_queue_writes_to_the_host_is_not_there_before_the_host_has_waited():
    scheduler = Scheduler(watched=False)
    with scheduler.installed() as device:
        host = device.host_memory(8)
        device.current().copy(host, torch.ones(8, dtype=torch.uint8))
        assert (host == 0xFF).all()
        device.current().record().synchronize()
        assert (host == 1).all()


def test_memory_is_poisoned_when_fresh_and_between_its_last_use_and_the_next_write():
    with Scheduler(watched=False).installed() as device:
        memory, source, host = device.memory(4), device.host_memory(4), device.host_memory(4)
        assert memory.view(torch.float32).isnan() and host.view(torch.bfloat16).isnan().all()
        source.zero_()
        side = device.queue()
        side.wait(device.current().record())
        side.copy(memory, source)
        side.copy(host, memory)
        side.record().synchronize()
        assert (host == 0).all() and (memory == 0).all()
        side.copy(memory, source)
        assert (memory == 0xFF).all()
        side.copy(host, memory)
        side.copy(memory, source)  # poisoned behind the copy before it alone
        side.record().synchronize()
        assert (host == 0).all() and (memory == 0).all()


def test_an_event_that_nobody_recorded_is_an_error():
    with Scheduler().installed() as device:
        with pytest.raises(AssertionError, match="no queue has recorded"):
            device.queue().wait(None)


def test_a_fault_that_the_engine_swallows_is_raised_at_the_end():
    with pytest.raises(Race):
        with Scheduler().installed() as device:
            memory = device.memory(8)
            try:
                device.queue().launch(memory.zero_, [], [memory])
            except AssertionError:
                pass


def test_fresh_memory_may_still_be_in_use_by_the_queue_that_it_was_allocated_under():
    with pytest.raises(Race, match="the allocation at"):
        with Scheduler().installed() as device:
            memory = device.memory(8)
            device.queue().launch(memory.zero_, [], [memory])


def test_the_device_reaches_its_host_memory_and_views_of_it_alone():
    with Scheduler().installed() as device:
        host = device.host_memory(8)
        assert device.reaches(host) and device.reaches(host[4:].view(torch.float32))
        assert not device.reaches(device.memory(8)) and not device.reaches(torch.zeros(8))


def test_a_wait_that_is_ignored_is_counted():
    line = _doubled.__code__.co_firstlineno + 6
    scheduler = Scheduler(without=("offload/test_scheduler.py", range(line, line + 1)))
    with pytest.raises(Race):
        with scheduler.installed() as device:
            _doubled(device, torch.randn(20))
    assert scheduler.ignored > 0


def test_bytes_of_the_device_are_its_memory_the_parameters_and_their_gradients():
    weight = torch.nn.Parameter(torch.zeros(10))
    with Scheduler().installed() as device:
        device.count([weight])
        assert device.device_bytes == 40
        staging, host = device.memory(100), device.host_memory(50)
        assert (device.device_bytes, device.host_bytes) == (140, 50)
        weight.sum().backward()
        device.count()
        assert device.device_bytes == 180
        weight.grad = None
        del staging, host
        device.count()
        assert (device.device_bytes, device.device_peak) == (40, 180)
        assert (device.host_bytes, device.host_peak) == (0, 50)


def test_another_queue_may_be_the_current_one_for_a_while():
    weight = torch.zeros(4)
    with pytest.raises(Race):
        with Scheduler().installed() as device:
            with device.under(device.queue()):
                weight += 1
            weight + 1
