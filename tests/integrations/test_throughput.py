"""What ThroughputCallback writes into Trainer's logs, and that a micro-step waits for nothing."""

import itertools
import types

import pytest
import torch
from support.counted_flops import all_counted, counted_flops
from support.device_mode import DeviceMode
from support.fused_trainings import arguments, assert_stock, examples, llama
from support.trainers import Curve, quiet_arguments, tiny_llama
from transformers import Trainer, TrainerCallback

import fastft
from fastft.integrations import peak_flops, stopwatch, throughput

LENGTHS = (24, 7, 12, 18)
RATES = {"tokens_per_second", "supervised_tokens_per_second"}
SHARES = {"data_share", "forward_share", "backward_share", "step_share"}
FLOPS = {"tflops_per_device", "causal_tflops_per_device"}
KEYS = RATES | SHARES | FLOPS | {"padding_share", "ignored_share", "peak_memory_gib"}
LOSSES = {"fused_losses", "materialised_places"}


class Reporter(TrainerCallback):
    """Stands where those of `report_to` stand: before the user's callbacks."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def texts(count=16):
    """Examples of four lengths by turns, whose first two labels are ignored."""
    rows = torch.randint(3, 97, (count, max(LENGTHS)))
    for row, length in zip(rows.tolist(), itertools.cycle(LENGTHS), strict=False):
        yield {"input_ids": row[:length], "labels": [-100, -100, *row[2:length]]}


def pad(batch):
    width = max(len(text["input_ids"]) for text in batch)

    def rows(key, fill):
        columns = [text[key] + [fill] * (width - len(text[key])) for text in batch]
        return torch.tensor(columns)

    ids = rows("input_ids", 0)
    mask = torch.tensor([[i < len(text["input_ids"]) for i in range(width)] for text in batch])
    return {"input_ids": ids, "labels": rows("labels", -100), "attention_mask": mask.long()}


def training(folder, callbacks, model=None, collator=pad, **changes):
    """A Trainer of batches of two texts, two of them a step."""
    model = model or all_counted(tiny_llama())
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    order = {"train_sampling_strategy": "sequential", "max_steps": 4, "logging_steps": 2}
    args = quiet_arguments(folder, **{**batches, **order, **changes})
    dataset = [*texts()]
    return Trainer(
        model,
        args,
        train_dataset=dataset,
        eval_dataset=dataset[:4],
        data_collator=collator,
        callbacks=callbacks,
    )


def figures(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def ticking(monkeypatch):
    """A clock on which every look takes a second."""
    clock = types.SimpleNamespace(perf_counter=map(float, itertools.count()).__next__)
    monkeypatch.setattr(stopwatch, "time", clock)


def test_all_keys_are_in_the_history_and_in_what_others_report(tmp_path, capsys):
    reporter = Reporter()
    trainer = training(
        tmp_path, [reporter, fastft.ThroughputCallback(), fastft.FusedLossCallback()]
    )
    trainer.train()
    first, second = figures(trainer)
    for seen, entry in zip(reporter.seen, (first, second), strict=False):
        assert KEYS | LOSSES <= seen.keys()
        assert all(seen[key] == entry[key] for key in KEYS | LOSSES)
        assert all(isinstance(entry[key], int | float) for key in KEYS | LOSSES)
        assert sum(entry[key] for key in SHARES) == pytest.approx(1)
        assert all(entry[key] > 0 for key in KEYS)
        assert entry["fused_losses"] == 4 and entry["materialised_places"] == 0
    assert KEYS.isdisjoint(reporter.seen[-1])  # that of the end
    assert capsys.readouterr().out.count("'tokens_per_second'") == 2  # PrinterCallback


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_figures_are_those_of_the_documents(packed, tmp_path, ticking):
    model = all_counted(tiny_llama())
    collator = fastft.PackingCollator(pad_to_multiple_of=16) if packed else pad
    callbacks = [fastft.ThroughputCallback(peak_flops=2e12)]
    callbacks += [fastft.PackingCallback(attention=False)] if packed else []
    flops = [
        counted_flops(model, input_ids=row, labels=row, attention_mask=torch.ones_like(row))
        for row in (torch.ones(1, n, dtype=torch.long) for n in LENGTHS)
    ]
    trainer = training(tmp_path, callbacks, model, collator)
    trainer.train()
    tokens, supervised = sum(LENGTHS), sum(LENGTHS) - 2 * len(LENGTHS)
    places = 32 + 32 if packed else 48 + 36
    for entry in figures(trainer):
        assert entry["padding_share"] == pytest.approx(1 - tokens / places)
        assert entry["ignored_share"] == pytest.approx(1 - supervised / tokens)
        # a step has four texts
        seconds = 2 * tokens / entry["tokens_per_second"]
        assert entry["supervised_tokens_per_second"] == pytest.approx(2 * supervised / seconds)
        rate = 2 * sum(flops) / seconds
        assert entry["tflops_per_device"] == pytest.approx(rate / 1e12)
        assert entry["mfu"] == pytest.approx(rate / 2e12)
        assert 0.5 < entry["causal_mfu"] / entry["mfu"] < 1


def test_evaluations_saving_and_logging_take_no_time(tmp_path, ticking):
    plain = training(tmp_path / "plain", [fastft.ThroughputCallback(flops=False)])
    plain.train()
    busy = training(
        tmp_path / "busy",
        [fastft.ThroughputCallback(flops=False)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    busy.train()
    for one, other in zip(figures(plain), figures(busy), strict=True):
        assert one["tokens_per_second"] == other["tokens_per_second"]
        assert one["data_share"] == other["data_share"]


def test_nothing_is_left_on_model_and_trainer(tmp_path):
    model, callback = llama(), fastft.ThroughputCallback(flops=False)
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=examples(), callbacks=[callback]
    )
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert_stock(model)
    assert trainer.callback_handler.callbacks == before


def test_an_exception_leaves_what_restore_and_the_next_training_take_away(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model, callback, stop = llama(), fastft.ThroughputCallback(flops=False), Stop()
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=2),
        train_dataset=examples(),
        callbacks=[stop, callback],
    )
    before = list(trainer.callback_handler.callbacks)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert len(model._forward_pre_hooks) == 2  # the other one counts for the record of the run
    callback.restore()
    callback.restore()
    assert_stock(model)
    assert trainer.callback_handler.callbacks == before
    trainer.remove_callback(stop)
    trainer.train()
    assert len([entry for entry in figures(trainer) if RATES <= entry.keys()]) == 2


def test_parts_that_are_unfrozen_on_the_way_are_counted_from_the_next_log_on(tmp_path):
    class Unfreeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.model.requires_grad_(state.global_step >= 2)

    model = all_counted(tiny_llama())
    model.model.requires_grad_(False)
    trainer = training(tmp_path, [Unfreeze(), fastft.ThroughputCallback()], model)
    trainer.train()
    before, after = (
        entry["tflops_per_device"] / entry["tokens_per_second"] for entry in figures(trainer)
    )
    assert after > 1.5 * before


def test_what_is_not_known_is_left_out_and_said(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(throughput.logger, "warning", warned.append)

    class Reads(torch.nn.Module):
        def forward(self, rows):
            return rows * float(rows.detach().sum() != 0)

    model = all_counted(tiny_llama())
    model.model.layers[0].mlp.act_fn = Reads()
    trainer = training(tmp_path, [fastft.ThroughputCallback()], model)
    trainer.train()
    for entry in figures(trainer):
        assert RATES | SHARES <= entry.keys() and not FLOPS & entry.keys()
    assert len(warned) == 1 and "does not run without numbers" in warned[0]


def test_flops_false_counts_none(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "document_flops", None)
    trainer = training(tmp_path, [fastft.ThroughputCallback(flops=False)])
    trainer.train()
    assert all(RATES <= entry.keys() and not FLOPS & entry.keys() for entry in figures(trainer))


@pytest.mark.parametrize("reason", ["DataParallel", "parallelism"])
def test_batches_that_are_cut_are_not_counted(reason, tmp_path, monkeypatch):
    warned, trainer = [], training(tmp_path, [fastft.ThroughputCallback()])
    monkeypatch.setattr(throughput.logger, "warning", warned.append)
    if reason == "DataParallel":
        monkeypatch.setattr(throughput, "_why_not", lambda args: f"{reason} ...")
    else:
        monkeypatch.setattr(throughput, "rows_are_cut", lambda: True)
    trainer.train()
    assert len(warned) == 1 and reason in warned[0]
    assert not any(RATES & entry.keys() for entry in figures(trainer))


def test_a_log_of_the_users_own_is_left_alone(tmp_path):
    reporter = Reporter()
    trainer = training(tmp_path, [reporter, fastft.ThroughputCallback(flops=False)])
    compute = trainer.compute_loss

    def logging_loss(*args, **kwargs):
        trainer.log({"loss": 1.0, "mine": 2.0})
        return compute(*args, **kwargs)

    trainer.compute_loss = logging_loss
    trainer.train()
    assert not any(RATES & seen.keys() for seen in reporter.seen if "mine" in seen)
    assert sum(RATES <= seen.keys() for seen in reporter.seen) == 2


def test_the_curve_is_that_without_it(tmp_path):
    curves = []
    for callbacks in ([], [fastft.ThroughputCallback(flops=False)]):
        curves.append(Curve())
        training(tmp_path, [curves[-1], *callbacks]).train()
    assert curves[0].losses == curves[1].losses and curves[0].norms == curves[1].norms


@pytest.mark.slow
def test_a_compiled_model_is_counted_too(tmp_path):
    model = all_counted(tiny_llama())
    trainer = training(
        tmp_path,
        [fastft.ThroughputCallback()],
        model,
        torch_compile=True,
        torch_compile_backend="eager",
    )
    trainer.train()
    assert all(KEYS <= entry.keys() for entry in figures(trainer))


def test_processes_add_up_in_one_collective_a_log(tmp_path, monkeypatch, ticking):
    alone = training(tmp_path / "alone", [fastft.ThroughputCallback()])
    alone.train()
    calls = []

    def all_reduce(numbers):
        calls.append(numbers)
        numbers *= 2

    monkeypatch.setattr(throughput, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    pair = training(tmp_path / "pair", [fastft.ThroughputCallback()])
    pair.train()
    assert len(calls) == 2
    for one, two in zip(figures(alone), figures(pair), strict=True):
        assert two["tokens_per_second"] == 2 * one["tokens_per_second"]
        same = FLOPS | SHARES | {"padding_share", "ignored_share"}
        assert {key: two[key] for key in same} == {key: one[key] for key in same}


class FakeEvent:
    """An event of a GPU, on which nothing has passed before somebody waits."""

    mode, made = None, 0

    def __init__(self, enable_timing=False):
        assert enable_timing
        FakeEvent.made += 1

    def record(self):
        self.passed = False

    def query(self):
        return self.passed

    def synchronize(self):
        self.mode.waited("synchronize")

    def elapsed_time(self, other):
        return 1000.0


def on_device(mode, **options):
    """A packed batch that was moved as Trainer moves it: the host knows its boundaries."""
    batch = fastft.PackingCollator(expand_on_device=True, **options)([*texts(3)])
    mode.host(batch.integers)
    if "padding_lengths" in batch.others:
        mode.host(batch.others["padding_lengths"])
    moved = batch.to(mode.device)
    return dict(moved)


def of_others(mode, *keys):
    """A packed batch with these keys alone, of which the host knows nothing."""
    batch = on_device(mode)
    return {key: batch[key].clone() for key in ("input_ids", "labels", *keys)}


BATCHES = {
    "padded": lambda mode: {key: value.clone() for key, value in pad([*texts(2)]).items()},
    "packed": on_device,
    "packed with padding": lambda mode: on_device(mode, pad_to_multiple_of=16),
    "boundaries": lambda mode: of_others(mode, "cu_seq_lens_q"),
    "positions": lambda mode: of_others(mode, "position_ids"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_micro_step_on_a_gpu_waits_for_nothing(kind, tmp_path, monkeypatch):
    mode = FakeEvent.mode = DeviceMode()
    collectives = []
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, name=name: collectives.append(name))
    cuda = types.SimpleNamespace(Event=FakeEvent, max_memory_allocated=lambda device: 2**30)
    monkeypatch.setattr(torch, "get_device_module", lambda device: cuda)
    monkeypatch.setattr(throughput, "peak_flops", lambda device, dtype: 1e12)
    model, callback = all_counted(tiny_llama()), fastft.ThroughputCallback()
    args = quiet_arguments(tmp_path)
    monkeypatch.setattr(type(args), "device", mode.device)
    state = types.SimpleNamespace(log_history=[])
    with mode, monkeypatch.context() as counting:
        batch = BATCHES[kind](mode)
        counting.setattr(throughput, "document_flops", polynomial)
        callback.on_train_begin(args, state, None, model=model)
        mode.waits.clear()
        for _ in range(3):
            callback.on_step_begin(args, state, None)
            for hook in model._forward_pre_hooks.values():
                hook(model, (), batch)
            for hook in model._forward_hooks.values():
                hook(model, (), None)
            callback.on_substep_end(args, state, None)
            callback.on_pre_optimizer_step(args, state, None)
            callback.on_step_end(args, state, None)
        assert mode.waits == [] and collectives == []
        logs = {"loss": 1.0, "learning_rate": 0.1}
        callback.on_log(args, state, None, logs=logs)
    assert mode.waits, "a log reads the numbers"
    n, seconds = LENGTHS[: 2 if kind == "padded" else 3], 18  # six spans in each of three steps
    assert logs["tokens_per_second"] * seconds == pytest.approx(3 * sum(n))
    assert logs["supervised_tokens_per_second"] * seconds == pytest.approx(
        3 * (sum(n) - 2 * len(n))
    )
    squares = sum(length**2 for length in n)
    assert logs["tflops_per_device"] * seconds == pytest.approx(3 * squares / 1e12)
    assert logs["peak_memory_gib"] == 1.0


def polynomial(model, inputs):
    """n² FLOPs for a document."""
    from fastft.flops.document_flops import DocumentFlops

    return DocumentFlops(((2, 0, 0),), (1.0,))


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 67.0),
        ("NVIDIA H100 PCIe", 756.0, 51.0),
        ("NVIDIA H200", 989.4, 67.0),
        ("NVIDIA H200 NVL", 835.0, 60.0),
        ("NVIDIA H20", 148.0, 44.0),
        ("NVIDIA H20-3e", 148.0, 44.0),
        ("NVIDIA GH200 480GB", 989.4, 67.0),
        ("NVIDIA GB200", 2500.0, 80.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA A10", 125.0, 31.2),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA L40S", 362.05, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None, None),
        ("NVIDIA A40-24Q", None, None),
        ("NVIDIA RTX A1000", None, None),
        ("Quadro GV100", None, None),
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA GeForce GTX 1080", None, None),
        ("AMD Instinct MI300X", 1307.4, 163.4),
        ("AMD Instinct MI350X", 2306.9, 144.2),
        ("AMD Instinct MI355X", 2516.6, 157.3),
    ],
)
def test_data_sheets(name, half, single):
    for dtype, tflops in ((torch.bfloat16, half), (torch.float16, half), (torch.float32, single)):
        found = peak_flops.of_name(name, dtype)
        assert found == (None if tflops is None else pytest.approx(tflops * 1e12))


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("Tesla T4", 65.0),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("Tesla V100-PCIE-16GB", 112.0),
        ("Tesla V100S-PCIE-32GB", 130.0),
    ],
)
def test_what_came_before_bf16_promises_none_of_it(name, half):
    assert peak_flops.of_name(name, torch.float16) == half * 1e12
    assert peak_flops.of_name(name, torch.bfloat16) is None


def test_bad_arguments_are_refused():
    for wrong in (0, -1.0):
        with pytest.raises(ValueError, match="peak_flops must be positive FLOP/s, got"):
            fastft.ThroughputCallback(peak_flops=wrong)
    with pytest.raises(TypeError, match="peak_flops must be a number of FLOP/s, got '1e12'"):
        fastft.ThroughputCallback(peak_flops="1e12")
    with pytest.raises(TypeError, match="flops must be True or False, got 'yes'"):
        fastft.ThroughputCallback(flops="yes")
