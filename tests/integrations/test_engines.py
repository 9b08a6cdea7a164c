"""The real DeepSpeed and FSDP2 under Trainer, two processes on a CPU: trained as stock trains under
that engine."""

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
INSTALLED = [
    name
    for name in engines.ENGINES
    if name.startswith("FSDP") or importlib.util.find_spec("deepspeed")
]
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


def sentences(engine):
    if engine.startswith("FSDP"):
        trainers_own = (
            "RuntimeError: Passing `optimizers` is not allowed if PyTorch FSDP is enabled"
        )
        return {
            "adamw(model, args)": BEFORE_TRAINER.format("FSDP"),
            "adamw(model) without args": trainers_own,
            "AdamW(...)": trainers_own,
            "a spec that clips": PARTS if engine == "FSDP1" else "trained",
            "kahan": "trained",
        }
    replaced = engine in REPLACED
    return {
        "adamw(model, args)": BEFORE_TRAINER.format("DeepSpeed"),
        "adamw(model) without args": DROPPED,
        "AdamW(...)": DROPPED,
        "a spec that clips": LOST.format("max_grad_norm") if replaced else PARTS,
        "kahan": LOST.format("rounding") if replaced else "trained",
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of every engine, run once, whichever of pytest's workers comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engines"
    with FileLock(f"{folder}.lock"):
        if not (folder / "found.pt").exists():
            folder.mkdir()
            torch.save(engines.run(INSTALLED, folder), folder / "found.pt")
        return torch.load(folder / "found.pt")


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_trains_and_resumes_as_stock_does_or_says_why_not(engine, results):
    if engine not in INSTALLED:
        pytest.skip("DeepSpeed is not installed (make test-all does it)")
    found = results.get(engine, {"error": "not reached"})
    assert "error" not in found, found["error"]
    stock, ours = found["stock"], found["fastft"]
    assert ours["optimizer"][-1] == (
        "deepspeed.DeepSpeedCPUAdam" if engine in REPLACED else "fastft.AdamW"
    )
    assert ours["optimizer"][:-1] == stock["optimizer"][:-1]
    at_work = {"ZeRO": "DeepSpeedEngine", "FSDP1": "FullyShardedDataParallel", "FSDP2": "DTensor"}
    assert at_work[engine.partition("-")[0]] in ours["model"] & stock["model"]
    in_bf16 = "bf16" in engine  # where stock's loss is made of bf16 logits
    assert len(ours["losses"]) == engines.STEPS
    assert ours["fused"] == engines.STEPS * 2  # micro-steps; of this process
    assert ours["losses"] == pytest.approx(stock["losses"], rel=2e-3 if in_bf16 else 1e-6)
    assert ours["norms"] == pytest.approx(stock["norms"], rel=2e-2 if in_bf16 else 1e-5)
    assert list(ours["after"]) == list(stock["after"]) and set(ours["after"]) <= set(ours["before"])
    for name, weight in ours["after"].items():
        before, other = ours["before"][name], stock["after"][name]
        assert weight.dtype == other.dtype and not torch.equal(weight, before), (
            f"{name} did not move"
        )
        way, apart = (other - before).float().norm(), (weight - other).float().norm()
        assert apart <= (0.5 if in_bf16 else 5e-3) * way, (
            f"{name} went {way:.3g} and ended {apart:.3g} from stock's"
        )
    if resumed := found.get("resumed"):
        assert resumed["losses"] == ours["losses"]
        assert all(
            torch.equal(weight, resumed["after"][name]) for name, weight in ours["after"].items()
        )
    for name, sentence in sentences(engine).items():
        said = found["refused"][name]
        assert re.match(sentence, said), f"{name}: {said}"


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_plugged_in_one_line_it_trains_as_stock(engine, results):
    """With batches packed, too, of the same texts."""
    if engine not in INSTALLED:
        pytest.skip("DeepSpeed is not installed (make test-all does it)")
    found = results.get(engine, {"error": "not reached"})
    assert "error" not in found, found["error"]
    stock, ours, lines = found["stock"], found["plugged"], found["plugged"]["lines"]
    in_bf16 = "bf16" in engine
    assert ours["losses"] == pytest.approx(stock["losses"], rel=2e-3 if in_bf16 else 1e-5)
    assert ours["norms"] == pytest.approx(stock["norms"], rel=2e-2 if in_bf16 else 1e-4)
    assert ours["fused"] == engines.STEPS * 2 and lines["loss"] == "fused at lm_head"
    assert ours["optimizer"] == found["fastft"]["optimizer"]
    # asked before the weights were sharded
    assert lines["packing"].endswith("no padding, as before, attention fastft, probe exact")
    if engine in REPLACED:
        assert lines["optimizer"].startswith("left alone: DeepSpeedCPUAdam trains")
    else:
        assert lines["optimizer"].endswith("clipping by Trainer, as gradients are sharded")
