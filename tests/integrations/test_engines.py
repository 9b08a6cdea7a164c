"""The real DeepSpeed, FSDP and DDP under Trainer and in a loop of one's own, two and three
processes on a CPU: trained as stock trains under that engine."""

from __future__ import annotations

import importlib.util
import os
import re

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from support import engines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
REPLACED = {"ZeRO-2 offload", "ZeRO-3 offload"}
# how each ends that the engine would train otherwise
BEFORE_TRAINER = (
    r"ValueError: {} trains here.*use Trainer\(optimizer_cls_and_kwargs=fastft.adamw_spec\(args\)\)"
)
DROPPED = (
    "ValueError: this Trainer was given a fastft.AdamW, but .* trains: DeepSpeed drops ours; use "
    "Trainer"
)
PARTS = "ValueError: the optimizer's max_grad_norm would clip to the norm of each process's part"
LOST = (
    "ValueError: .*DeepSpeedCPUAdam in this optimizer's place, which knows no "
    "{}=.*zero_force_ds_cpu_optimizer"
)


LEAK = (
    "PackingLeakError: Leaking does not keep packed sequences apart: other tokens in the first "
    "sequence move the outputs"
)
# of three processes: no size of the model is divided by them
THREE = ["DDP", "FSDP2", "ZeRO-2", "ZeRO-3"]


def row_of(engine):
    """The row of the table of ways."""
    if engine == "FSDP2 offload":
        return "FSDP2 + CPU offload"
    if "offload" in engine:
        kept = ", fastft's AdamW kept" if "kept" in engine else ""
        return f"DeepSpeed ZeRO + optimizer offload{kept}"
    kind = re.match(r"DDP|FSDP\d|ZeRO-\d", engine)[0]
    return f"DeepSpeed {kind}" if kind.startswith("ZeRO") else kind


def cases(named, **cells):
    """A parameter for each engine, with the marks of its row, which has another word for fp32 than
    for bf16; `cells` by column."""
    for engine in named:
        given = dict(cells)
        if engine in REPLACED and "optimizer" in given:
            given["optimizer"] = "stock"
        marked = given and "bf16" not in engine
        marks = [pytest.mark.way(row_of(engine), **given)] if marked else []
        absent = engine.startswith("ZeRO") and not DEEPSPEED
        marks += [pytest.mark.skipif(absent, reason="DeepSpeed is not installed")]
        yield pytest.param(engine, marks=marks, id=engine)


def sentences(engine):
    if engine == "DDP":
        return {"a leaking model on packed batches": LEAK}
    if engine.startswith("FSDP"):
        trainers_own = (
            "RuntimeError: Passing `optimizers` is not allowed if PyTorch FSDP is enabled"
        )
        return {
            "adamw(model, args)": BEFORE_TRAINER.format("FSDP"),
            "adamw(model) without args": trainers_own,
            "AdamW(...)": trainers_own,
            "a spec that clips": PARTS if engine.startswith("FSDP1") else "trained",
            "kahan": "trained",
            "a leaking model on packed batches": LEAK,
        }
    replaced = engine in REPLACED
    return {
        "adamw(model, args)": BEFORE_TRAINER.format("DeepSpeed"),
        "adamw(model) without args": DROPPED,
        "AdamW(...)": DROPPED,
        # stage 0 leaves gradients whole
        "a spec that clips": "trained"
        if engine == "ZeRO-0"
        else LOST.format("max_grad_norm")
        if replaced
        else PARTS,
        "kahan": LOST.format("rounding") if replaced else "trained",
        "a leaking model on packed batches": LEAK,
    }


def results_of(named, tmp_path_factory, what="trainer", world=2):
    """Of every engine, run once, whichever of pytest's workers comes first."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / f"engines {what} {world}"
    installed = [name for name in named if DEEPSPEED or not name.startswith("ZeRO")]
    with FileLock(f"{folder}.lock"):
        if not (folder / "found.pt").exists():
            folder.mkdir()
            torch.save(engines.run(installed, folder, what, world), folder / "found.pt")
        return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(engines.ENGINES, tmp_path_factory)


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    return results_of(engines.LOOPS, tmp_path_factory, "loop")


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    return results_of(THREE, tmp_path_factory, "loop", world=3)


def found_in(results, engine):
    found = results.get(engine, {"error": "not reached"})
    assert "error" not in found, found["error"]
    return found


def assert_trained_alike(ours, stock, in_bf16, before):
    """Losses, norms and weights of two trainings, and the names and dtypes of what they saved."""
    assert len(ours["losses"]) == len(stock["losses"]) > 0
    assert ours["losses"] == pytest.approx(stock["losses"], rel=2e-3 if in_bf16 else 1e-6)
    assert ours["norms"] == pytest.approx(stock["norms"], rel=5e-2 if in_bf16 else 1e-5)
    assert list(ours["after"]) == list(stock["after"]) and set(ours["after"]) <= set(before)
    for name, weight in ours["after"].items():
        first, other = before[name], stock["after"][name]
        assert weight.dtype == other.dtype and not torch.equal(weight, first), (
            f"{name} did not move"
        )
        way, apart = (other - first).float().norm(), (weight - other).float().norm()
        assert apart <= (0.5 if in_bf16 else 5e-3) * way, (
            f"{name} went {way:.3g} and ended {apart:.3g} from stock's"
        )


def assert_resumed(resumed, whole, stock_resumed, stock, to_the_bit=True):
    """What follows a checkpoint is to the bit what an uninterrupted training does, or where stock's
    is not, as far from it as stock's."""
    steps = len(resumed["losses"])
    if to_the_bit and (stock_resumed is None or _same(stock_resumed, stock, steps)):
        assert _same(resumed, whole, steps)
        return
    # moments that torch has gathered wrong (FSDP1 on a CPU) enlarge roundings
    assert resumed["losses"] == pytest.approx(stock_resumed["losses"], rel=1e-5)
    for name, weight in resumed["after"].items():
        torch.testing.assert_close(weight, stock_resumed["after"][name], rtol=1e-3, atol=1e-3)


def _same(resumed, whole, steps):
    return resumed["losses"] == whole["losses"][-steps:] and all(
        torch.equal(weight, resumed["after"][name]) for name, weight in whole["after"].items()
    )


@pytest.mark.parametrize("engine", cases(engines.ENGINES, loss="exact", optimizer="exact"))
def test_trains_and_resumes_as_stock_does_or_says_why_not(engine, results):
    found = found_in(results, engine)
    stock, ours = found["stock"], found["fastft"]
    assert ours["optimizer"][-1] == (
        "deepspeed.DeepSpeedCPUAdam" if engine in REPLACED else "fastft.AdamW"
    )
    assert ours["optimizer"][:-1] == stock["optimizer"][:-1]
    at_work = {"ZeRO": "DeepSpeedEngine", "FSDP1": "FullyShardedDataParallel", "FSDP2": "DTensor"}
    at_work["DDP"] = "DistributedDataParallel"
    assert at_work[re.match("ZeRO|FSDP.|DDP", engine)[0]] in ours["model"] & stock["model"]
    assert ours["fused"] == engines.STEPS * 2  # micro-steps; of this process
    assert_trained_alike(ours, stock, "bf16" in engine, ours["before"])
    for name, sentence in sentences(engine).items():
        said = found["refused"][name]
        assert re.match(sentence, said), f"{name}: {said}"


@pytest.mark.way("resume under each engine", loss="exact", optimizer="exact")
@pytest.mark.parametrize("engine", cases(name for name in engines.ENGINES if name != "FSDP1"))
def test_resumes_as_stock_does(engine, results):
    found = found_in(results, engine)
    whole = found["fastft"]
    assert_resumed(found["resumed"], whole, found.get("stock resumed"), found["stock"])


@pytest.mark.way("`merge_fsdp_weights`", loss="exact", optimizer="exact")
def test_a_merged_checkpoint_is_that_of_stock(results):
    """A fresh model has loaded it, key by key."""
    sharded, gathered = (found_in(results, name) for name in ("FSDP2 sharded checkpoint", "FSDP2"))
    merged = sharded["fastft"]["after"]
    assert merged.keys() == gathered["fastft"]["after"].keys()
    for name, weight in gathered["fastft"]["after"].items():
        assert torch.equal(merged[name], weight)


@pytest.mark.parametrize("engine", cases(engines.ENGINES, packing="exact"))
def test_packed_batches_train_as_the_same_texts_in_rows(engine, results):
    """The model is asked for leaks, sharded or not, and found exact."""
    found = found_in(results, engine)
    stock, ours = found["stock"], found["packed"]
    in_bf16 = "bf16" in engine
    assert ours["probes"] == ["exact"] and ours["fused"] == engines.STEPS * 2
    assert ours["losses"] == pytest.approx(stock["losses"], rel=2e-3 if in_bf16 else 1e-5)
    assert ours["norms"] == pytest.approx(stock["norms"], rel=5e-2 if in_bf16 else 1e-4)


@pytest.mark.parametrize("engine", cases(engines.ENGINES))
def test_plugged_in_one_line_it_trains_as_stock(engine, results):
    """With batches packed, too, of the same texts."""
    found = found_in(results, engine)
    stock, ours, lines = found["stock"], found["plugged"], found["plugged"]["lines"]
    in_bf16 = "bf16" in engine
    assert ours["losses"] == pytest.approx(stock["losses"], rel=2e-3 if in_bf16 else 1e-5)
    assert ours["norms"] == pytest.approx(stock["norms"], rel=5e-2 if in_bf16 else 1e-4)
    assert ours["fused"] == engines.STEPS * 2 and lines["loss"] == "fused at lm_head"
    assert ours["optimizer"] == found["fastft"]["optimizer"]
    assert lines["packing"].endswith("no padding, as before, attention fastft, probe exact")
    if engine in REPLACED:
        assert lines["optimizer"].startswith("left alone: DeepSpeedCPUAdam trains")
    elif engine == "DDP" or "FSDP2" in engine:
        assert lines["optimizer"].endswith("clipping inside")
    else:
        assert lines["optimizer"].endswith("clipping by Trainer, as gradients lie in flat parts")


@pytest.mark.parametrize("engine", cases(["FSDP2"]))
def test_gradients_on_the_host_train_as_resident_ones(engine, results):
    found = found_in(results, engine)
    ours, resident = found["gradients on the host"], found["plugged"]
    for name in ("losses", "norms"):
        assert ours[name] == resident[name]
    for name, weight in resident["after"].items():
        assert torch.equal(ours["after"][name], weight)


def assert_loop(found, engine, to_the_bit=True):
    """A loop with Accelerator, with fastft by hand and as `python -m fastft run` changes it."""
    in_bf16 = "bf16" in engine
    stock = found["stock"]
    fused = len(stock["losses"])
    for way in ("by hand", "run"):
        ours = found[way]
        assert_trained_alike(ours, stock, in_bf16, found["before"])
        near = 2e-2 if in_bf16 else 1e-6
        assert ours["evaluations"] == pytest.approx(stock["evaluations"], rel=near)
        assert ours["fused"] == fused
        trains = "deepspeed.DeepSpeedCPUAdam" if engine in REPLACED else "fastft.AdamW"
        assert ours["optimizer"] == [*stock["optimizer"][:-1], trains]
    replaced = "left alone: ZeRO's offload_optimizer puts DeepSpeedCPUAdam in its place"
    expected = replaced if engine in REPLACED else "AdamW"
    assert found["run"]["lines"] == {"loss": f"fused, {fused} times", "optimizer": expected}
    if engine in REPLACED:
        assert "DeepSpeedCPUAdam in this optimizer's place" in found["clipping inside"]
    elif engine.startswith(("DDP", "FSDP2", "ZeRO-0")):
        assert found["clipping inside"] == "made"
    else:
        assert "to the norm of each process's part" in found["clipping inside"]
    whole = found["by hand"]
    assert_resumed(found["resumed"], whole, found["stock resumed"], stock, to_the_bit)


def loop_cases(named):
    """As `cases`, under the rows of loops."""
    for case in cases(named):
        (engine,) = case.values
        kind = "DeepSpeed" if engine.startswith("ZeRO") else re.match(r"DDP|FSDP\d", engine)[0]
        row = pytest.mark.way(f"accelerate loop, {kind}", loss="exact", optimizer="exact")
        marked = engine not in REPLACED and "bf16" not in engine
        yield pytest.param(engine, marks=[*case.marks, *([row] if marked else [])], id=engine)


@pytest.mark.parametrize("engine", loop_cases(engines.LOOPS))
def test_a_loop_of_one_s_own_trains_and_resumes_as_stock_does(engine, loops):
    assert_loop(found_in(loops, engine), engine)


@pytest.mark.parametrize("engine", loop_cases(THREE))
def test_three_processes_that_divide_no_size(engine, of_three):
    # gloo adds the numbers of three in an order of its own
    assert_loop(found_in(of_three, engine), engine, to_the_bit=False)
