"""What counts as equal, what differs and what it is called, on traces of trainings that nobody
ran."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.synthetic_traces import DECAY, NAMES, RATE, changed, trace

from fastft.commands.figures import figures
from fastft.commands.verdict import judge, merged, unreproducible
from fastft.commands.yardstick import Runs


def runs(fast=None, **options):
    stock = [trace(**options), trace(**options)]
    return Runs(stock, fast or [trace("fast", **options)], trace("noise", seed=1, **options))


def verdict_of(change, **options):
    return judge(runs([changed(trace("fast", **options), change)], **options))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    rounding=st.sampled_from([0.0, 1e-8, 1e-6, 1e-4]),
    steps=st.integers(1, 20),
    coarser=st.floats(0, 2.5),
    growth=st.floats(1, 1.6),
)
def test_rounding_is_no_difference(seed, rounding, steps, coarser, growth):
    """Nor is one that is coarser than stock's noise by a factor."""
    options = {"steps": steps, "growth": growth}
    # a run of a step or two says little of the noise; what is above the floor needs some
    rounding = rounding if steps >= 5 else min(rounding, 1e-8)
    stock = trace(rounding=rounding, seed=seed, **options)
    fast = [trace("fast", rounding * coarser, seed=seed + n, **options) for n in range(2)]
    noise = trace("noise", rounding, seed=seed, **options)
    found = judge(Runs([stock, stock], fast, noise))
    assert found.equal, found.findings


def test_the_same_bits():
    found = judge(runs(rounding=0.0))
    assert found.equal and found.same_bits == 12 and not found.notes


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), step=st.integers(0, 11), share=st.sampled_from([1e-3, -1e-2, 1]))
def test_a_loss_that_is_off(seed, step, share):
    def off(one, t):
        one.loss *= 1 + share * (t >= step)

    stock = [trace(seed=seed), trace(seed=seed)]
    fast = changed(trace("fast", seed=seed), off)
    found = judge(Runs(stock, [fast], trace("noise", seed=seed)))
    assert not found.equal and found.cause.what == "loss" and found.cause.step == step + 1


def scaled(kind, factor, names=NAMES):
    def change(step, t):
        setattr(
            step,
            kind,
            [
                value * (factor if name in names else 1)
                for name, value in zip(NAMES, getattr(step, kind), strict=True)
            ],
        )

    return change


def mean_of_means(step, t):
    labels = [micro.supervised for micro in step.micro]
    for micro in step.micro:
        micro.loss *= sum(labels) / (len(labels) * micro.supervised)
    step.loss = sum(step.micro_losses)


def of_micro(**changes):
    def change(step, t):
        for micro in step.micro:
            for name, value in changes.items():
                setattr(micro, name, value(micro))
        step.loss = sum(step.micro_losses)

    return change


def dropped(step, t):
    if t == 5:
        del step.micro[-1]


def other_masks(step, t):
    step.random, step.drew = step.random + " again", True
    step.loss *= 1.01


def stale(step, t):
    step.moved[1], step.projection[1] = 0.0, -2.0


def fewer_steps(one):
    return dataclasses.replace(one, steps=one.steps[:-1])


DEFECTS = {
    "ignored labels": of_micro(loss=lambda m: m.loss * 1.1, learning=lambda m: m.learning + 7),
    "shift of the labels": of_micro(loss=lambda m: m.loss * 1.1, shift=lambda m: 0),
    "gradient accumulation": mean_of_means,
    "labels": of_micro(targets=lambda m: m.targets + " shifted"),
    "batches": dropped,
    "random numbers": other_masks,
    "clipping": scaled("gradients", 0.5),
    "moments": scaled("moments", 0.9),
    "size of updates": scaled("moved", 0.7),
    "stale parameter": stale,
    "learning rate": lambda step, t: step.learning_rate.reverse() or step.learning_rate.append(0),
}


@pytest.mark.parametrize("what", DEFECTS)
def test_a_defect_has_its_name(what):
    found = verdict_of(DEFECTS[what])
    assert not found.equal and found.cause.what == what, found.findings


def test_every_label_divided_by_another_number():
    found = verdict_of(of_micro(loss=lambda micro: micro.loss / 2))
    assert found.cause.what == "gradient accumulation"
    assert "another number of items" in found.cause.sentence


def test_a_leak():
    fast = dataclasses.replace(trace("fast"), leak=0.02)
    assert judge(runs([fast])).cause.what == "leak between packed documents"
    assert judge(runs([dataclasses.replace(fast, leak=1e-6)])).equal


def test_a_leak_of_stock_is_stocks():
    leaking = [dataclasses.replace(trace(), leak=0.02)] * 2
    fast = dataclasses.replace(trace("fast"), leak=0.02)
    assert judge(Runs(leaking, [fast], trace("noise"))).equal


def test_decay_on_norms_by_what_the_weights_do():
    """The optimizer's groups say nothing of it."""
    decayed = [place for place, name in enumerate(NAMES) if "norm" in name]
    lost = [0.0] * len(NAMES)

    def decay(step, t):
        for place in decayed:
            lost[place] += RATE * DECAY * (step.projection[place] - lost[place])
            step.projection[place] -= lost[place]

    found = verdict_of(decay)
    assert found.cause.what == "weight decay", found.findings
    assert found.cause.parameters == [NAMES[place] for place in decayed]
    assert "norm weights" in found.cause.sentence


def test_decay_on_norms_by_the_groups():
    fast = dataclasses.replace(trace("fast"), weight_decay=[DECAY, DECAY, 0.0, DECAY, DECAY])
    found = judge(runs([fast]))
    assert found.cause.what == "weight decay" and "norm weights" in found.cause.sentence


def test_a_stale_parameter_is_named():
    assert verdict_of(stale).cause.parameters == ["attention.weight"]


def test_a_dropped_batch_is_said_to_be_dropped():
    cause = verdict_of(dropped).cause
    assert cause.step == 6 and "dropped" in cause.sentence


def test_a_training_that_ends_earlier():
    found = judge(runs([fewer_steps(trace("fast"))]))
    assert found.cause.what == "number of steps" and found.cause.step == 12


def test_a_parameter_that_is_not_trained():
    fast = trace("fast")
    fast.parameters[0] = "another"
    found = judge(runs([fast]))
    assert found.cause.what == "trained parameters" and "embed.weight" in found.cause.sentence


def test_random_numbers_of_a_pair_with_dropout():
    def drawn_twice(step, t):
        step.random += " again" * (t >= 3)

    base, stock = runs(), trace()
    assert judge(dataclasses.replace(base, dropout=(stock, trace("fast")))).equal
    fast = changed(trace("fast"), drawn_twice)
    found = judge(dataclasses.replace(base, dropout=(stock, fast)))
    assert found.cause.what == "random numbers" and found.cause.step == 4


def test_random_numbers_without_a_consequence_are_a_note():
    def redrawn(step, t):
        step.random += " again"

    found = verdict_of(redrawn)
    assert found.equal and "random states" in found.notes[0]


def test_a_gradient_that_is_rounding_alone_is_no_difference():
    """The bias of keys has none: AdamW makes whole steps of the rounding, each time others."""

    def noise_in_the_bias(size, turn):
        def change(step, t):
            step.gradients[2] = size
            step.moved[2] *= turn
            step.projection[2] += turn * t * RATE

        return change

    stock = changed(trace(), noise_in_the_bias(1e-9, 1))
    fast = changed(trace("fast"), noise_in_the_bias(3e-9, 0.3))
    noise = changed(trace("noise"), noise_in_the_bias(1.1e-9, 0.9))
    assert judge(Runs([stock, stock], [fast], noise)).equal


def test_nan_in_both_is_equal_and_in_one_is_not():
    def lost(step, t):
        step.loss = math.nan

    stock = [changed(trace(), lost)] * 2
    assert judge(Runs(stock, [changed(trace("fast"), lost)], changed(trace("noise"), lost))).equal
    assert verdict_of(lost).cause.what == "loss"


def off_by(share):
    def change(step, t):
        step.loss *= 1 + share * t
        step.moved = [value * (1 + 10 * share) for value in step.moved]

    return change


def test_what_is_closer_to_fp32_than_stock_is_equal():
    """bf16 weights: stock loses updates, a better optimizer does not."""
    options = {"dtype": "bfloat16", "rounding": 1e-5, "growth": 1.0}
    stock = [changed(trace(**options), off_by(0.02))] * 2
    noise = changed(trace("noise", **options), off_by(0.02))
    exact, fp32 = trace("fast", **options), trace("fp32", **options)
    assert not judge(Runs(stock, [exact], noise)).equal
    found = judge(Runs(stock, [exact], noise, fp32))
    assert found.equal and "loses every update" in found.notes[0]
    worse = changed(exact, off_by(0.05))
    assert not judge(Runs(stock, [worse], noise, fp32)).equal


@pytest.mark.parametrize("clipped", [False, True])
def test_a_norm_that_stock_sums_badly_is_no_difference(clipped):
    """torch's norm of some million fp32 numbers is off by 1e-4, and clipping scales by it."""

    def badly(step, t):
        exact = step.grad_norm
        step.grad_norm = exact * (1 + 3e-4)
        if clipped:
            step.gradients = [value * 0.5 / step.grad_norm for value in step.gradients]

    def well(step, t):
        if clipped:
            step.gradients = [value * 0.5 / step.grad_norm for value in step.gradients]

    stock, noise = changed(trace(), badly), changed(trace("noise"), badly)
    found = judge(Runs([stock, stock], [changed(trace("fast"), well)], noise))
    assert found.equal, found.findings
    twice = changed(changed(trace("fast"), well), scaled("gradients", 0.9))
    assert judge(Runs([stock, stock], [twice], noise)).cause.what == "clipping"


def test_two_stock_runs_on_other_batches_are_no_yardstick():
    other = changed(trace(), of_micro(targets=lambda micro: micro.targets + " of another seed"))
    assert "different batches from step 1" in unreproducible([trace(), other])
    assert unreproducible([trace(), trace(seed=1)]) is None


def test_two_stock_runs_with_other_weights_are_no_yardstick():
    other = changed(trace(), of_micro(loss=lambda micro: micro.loss * 1.1))
    assert "first step already" in unreproducible([trace(), other])


def test_processes_are_one_training():
    ranks = [dataclasses.replace(trace(seed=rank), rank=rank, world=2) for rank in range(2)]
    ranks[1].peak_process *= 3
    whole = merged(ranks)
    assert whole.steps[0].tokens == 2 * ranks[0].steps[0].tokens
    assert whole.steps[0].loss == pytest.approx(ranks[0].steps[0].loss)
    assert len(whole.parameters) == len(whole.steps[0].moved) == 2 * len(NAMES)
    assert whole.peak_process == ranks[1].peak_process
    assert judge(Runs([whole, whole], [whole])).equal


def test_what_all_processes_have_is_there_once():
    """Data parallel: else the gradients of two processes would have a norm of their own."""
    whole = merged([dataclasses.replace(trace(), rank=rank, world=2) for rank in range(2)])
    assert whole.parameters == NAMES and len(whole.steps[0].gradients) == len(NAMES)
    assert len(whole.steps[0].micro) == 4
    found = judge(Runs([whole, whole], [whole]))
    assert found.equal and found.sensitivity < 1e-5


def test_a_shard_of_one_process_that_is_stale_is_found():
    ranks = [dataclasses.replace(trace(seed=rank), rank=rank, world=2) for rank in range(2)]
    fast = merged([ranks[0], changed(ranks[1], stale)])
    found = judge(Runs([merged(ranks)] * 2, [fast]))
    assert found.cause.parameters == ["attention.weight (rank 1)"]


def faster(factor):
    def change(step, t):
        step.seconds /= factor

    return change


def test_speed_has_an_interval_and_warmup_does_not_count():
    def slow_start(step, t):
        step.seconds *= 100 if t < 2 else 1

    stock = [trace(seed=n) for n in range(2)]
    fast = [changed(changed(trace(seed=n + 2), faster(2)), slow_start) for n in range(2)]
    found = figures(fast, stock)
    assert found.speedup.low <= found.speedup.value <= found.speedup.high
    assert found.speedup.low < 2 < found.speedup.high and found.speedup.low > 1.8
    assert found.tokens_per_second.value == pytest.approx(120 / 0.25, rel=0.06)


def test_shares_of_padding_and_ignored_labels():
    found = figures([trace()])
    assert found.padding == pytest.approx(0.25)
    step = trace().steps
    labels = sum(one.supervised for one in step)
    assert found.ignored == pytest.approx(1 - labels / (60 * 2 * 12))


def test_a_training_without_tokens_is_timed_by_steps():
    images = changed(trace(), of_micro(tokens=lambda m: 0, padding=lambda m: 0))
    found = figures([changed(images, faster(2))], [images])
    assert found.speedup.value == pytest.approx(2) and found.padding == 0
