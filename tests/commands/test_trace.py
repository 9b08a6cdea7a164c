"""What is recorded of a training: that it is right, and that recording it changes nothing."""

import math
import os

import pytest
import torch
from support.recorded_trainings import recorded, texts, trainer_of
from support.trainers import Curve
from transformers import TrainerCallback

import fastft
from fastft.commands.trace import Micro, Step, Trace
from fastft.integrations.recorder.recorder import Recorder, record
from fastft.integrations.recorder.weights import random_states


def test_a_trace_is_the_same_after_saving_and_loading(tmp_path):
    step = Step(1.5, [Micro(1.0, tokens=3), Micro(0.5, tokens=4)], moved=[math.pi, math.inf])
    trace = Trace("stock", parameters=["a", "b"], steps=[step, Step(1.25, [Micro(1.25)])])
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace
    assert os.listdir(tmp_path) == ["trace.json"]
    assert (step.tokens, step.micro_losses) == (7, [1.0, 0.5])


@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.2}, {"plug": "collate", "max_grad_norm": 0.1}, {"dtype": torch.bfloat16}],
    ids=str,
)
def test_recording_changes_no_bit(tmp_path, options):
    options = dict(options)
    packing = options.pop("plug", None)
    outcomes = []
    for records in (False, True):
        curve = Curve()
        trainer = trainer_of(tmp_path, callbacks=[curve], num_train_epochs=1, **options)
        if packing:
            fastft.plug(trainer, packing=packing)
        if records:
            record(trainer, Recorder(Trace("stock"), 3, lambda: None))
        trainer.train()
        weights = [weight.detach() for weight in trainer.model.parameters()]
        outcomes.append((curve.losses, curve.norms, random_states(), weights))
    (*stock, before), (*seen, after) = outcomes
    assert stock == seen and len(stock[0]) == 3
    assert all(map(torch.equal, before, after))


class Truth(TrainerCallback):
    """Keeps what the recorder must find, with plain torch."""

    def __init__(self):
        self.gradients, self.moved, self.moments = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        params = [*model.parameters()]
        self.gradients.append([float(p.grad.double().norm()) for p in params])
        self.before = [p.detach().double() for p in params]

    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        params = [*model.parameters()]
        changes = (p.detach().double() - b for p, b in zip(params, self.before, strict=True))
        self.moved.append([float(change.norm()) for change in changes])
        states = (optimizer.optimizer.state[p] for p in params)
        self.moments.append([float(state["exp_avg"].double().norm()) for state in states])


def test_what_is_recorded_is_what_happened(tmp_path):
    truth, curve = Truth(), Curve()
    trainer = trainer_of(tmp_path, callbacks=[truth, curve], max_grad_norm=0.1, seed=3)
    trace = Trace("stock")
    record(trainer, Recorder(trace, 9, lambda: None))
    trainer.train()
    assert trace.ended == "steps" and len(trace.steps) == 9
    assert trace.parameters == [name for name, _ in trainer.model.named_parameters()]
    assert [step.loss for step in trace.steps] == pytest.approx(curve.losses)
    assert [step.grad_norm for step in trace.steps] == pytest.approx(curve.norms)
    for name in ("gradients", "moved", "moments"):
        found = [number for step in trace.steps for number in getattr(step, name)]
        expected = [number for numbers in getattr(truth, name) for number in numbers]
        assert found == pytest.approx(expected, rel=1e-5), name
    rates = [entry["learning_rate"] for entry in trainer.state.log_history[:-1]]
    assert [step.learning_rate[0] for step in trace.steps] == pytest.approx(rates)
    assert trace.weight_decay[0] == 0.1 and trace.weight_decay[-2] == 0.0  # the last norm
    epoch, documents = trace.steps[:3], texts()
    assert sum(step.tokens for step in epoch) == sum(len(d["input_ids"]) for d in documents)
    assert sum(m.documents for step in epoch for m in step.micro) == len(documents)
    supervised = sum(label != -100 for d in documents for label in d["labels"][1:])
    assert sum(step.supervised for step in epoch) == supervised
    assert sum(step.ignored for step in epoch) == sum(s.tokens for s in epoch) - supervised
    assert all(m.learning == m.supervised and m.shift == 1 for s in epoch for m in s.micro)
    assert not any(step.drew for step in epoch) and trace.peak_process >= 0


def test_a_packed_training_has_the_same_batches_without_padding(tmp_path):
    trace = recorded(tmp_path, steps=3)
    assert sum(step.padding for step in trace.steps) > 0
    packed = recorded(tmp_path, "fast", steps=3, packing="collate")
    assert sum(step.padding for step in packed.steps) == 0
    assert [step.batches for step in packed.steps] == [step.batches for step in trace.steps]
    assert packed.lines and packed.fused == 6 and packed.leak == 0.0


def test_gradients_are_those_after_clipping_also_where_the_step_clips(tmp_path):
    stock, fast = (
        recorded(tmp_path, variant, steps=2, max_grad_norm=0.1) for variant in ("stock", "fast")
    )
    assert fast.lines["optimizer"] == "AdamW, clipping inside"
    for one, other in zip(stock.steps, fast.steps, strict=True):
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5) and one.grad_norm > 0.2
        assert math.hypot(*one.gradients) == pytest.approx(0.1, rel=1e-3)
        assert one.gradients == pytest.approx(other.gradients, rel=1e-4)


def test_without_clipping_the_norm_is_that_of_the_gradients(tmp_path):
    clipped, free = (recorded(tmp_path, steps=1, max_grad_norm=m).steps[0] for m in (0.1, 0))
    assert free.grad_norm == pytest.approx(clipped.grad_norm, rel=1e-5)
    assert free.grad_norm == pytest.approx(math.hypot(*free.gradients))


def test_moments_of_8_bits_are_dequantised(tmp_path):
    stock = recorded(tmp_path, steps=2)
    fast = recorded(tmp_path, "fast", steps=2, options={"moments": "8bit"})
    assert stock.steps[1].moments == pytest.approx(fast.steps[1].moments, rel=0.03)


def test_an_update_below_a_bf16_weights_last_place_counts_where_its_bits_are_kept(tmp_path):
    small = {"dtype": torch.bfloat16, "learning_rate": 1e-5, "steps": 3}
    stock, fast, fp32 = (recorded(tmp_path, v, **small) for v in ("stock", "fast", "fp32"))
    assert (fast.dtype, fp32.dtype, fp32.compute_dtype) == ("bfloat16", "float32", "float32")
    for lost, kept, all_of_it in zip(stock.steps, fast.steps, fp32.steps, strict=True):
        assert math.hypot(*kept.moved) == pytest.approx(math.hypot(*all_of_it.moved), rel=0.1)
        assert math.hypot(*lost.moved) < 0.8 * math.hypot(*kept.moved)


def test_a_projection_is_off_by_about_what_the_weights_are_off(tmp_path):
    trace = recorded(tmp_path, steps=4)
    for number, name in enumerate(trace.parameters):
        places = [trace.projection0[number], *(step.projection[number] for step in trace.steps)]
        moves = [step.moved[number] for step in trace.steps]
        shares = [abs(b - a) / m for a, b, m in zip(places, places[1:], moves, strict=False)]
        assert 1e-3 < max(shares) < 6, name


def test_nothing_is_evaluated_or_saved_and_schedules_are_those_of_the_whole_training(tmp_path):
    class Evaluations(TrainerCallback):
        count = 0

        def on_evaluate(self, *args, **kwargs):
            self.count += 1

    counter = Evaluations()
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options = {"callbacks": [counter], "num_train_epochs": 100, **often}
    trace = recorded(tmp_path, steps=2, eval_dataset=texts(4), **options)
    assert counter.count == 0 and not list(tmp_path.glob("checkpoint-*"))
    assert trace.steps[1].learning_rate[0] == pytest.approx(1e-3 * 299 / 300)


def test_a_training_that_is_shorter(tmp_path):
    trace = recorded(tmp_path, steps=50, num_train_epochs=1)
    assert trace.ended == "script" and len(trace.steps) == 3


def test_the_recorder_is_gone_behind_its_last_step(tmp_path):
    trainer = trainer_of(tmp_path, num_train_epochs=1)
    clip = trainer.accelerator.clip_grad_norm_
    record(trainer, Recorder(Trace("stock"), 2, lambda: None))
    trainer.train()
    assert "training_step" not in vars(trainer)
    assert trainer.accelerator.clip_grad_norm_ == clip
    assert not trainer.model.lm_head._forward_pre_hooks


def test_a_gradient_that_is_none_is_not_a_number(tmp_path):
    def freeze_by_detaching(model):
        model.model.layers[1].mlp.register_forward_hook(lambda *args: args[-1].detach())
        return model

    trace = recorded(tmp_path, steps=1, adapt=freeze_by_detaching)
    norms = dict(zip(trace.parameters, trace.steps[0].gradients, strict=True))
    for name, norm in norms.items():
        before_the_cut = "layers.1.mlp" in name or "layers.1.post_attention" in name
        assert math.isnan(norm) == before_the_cut, name
