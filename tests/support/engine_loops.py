"""A loop of one's own with Accelerator under the real engines: stock, with fastft's pieces by hand,
as `python -m fastft run` changes it, and resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from support import engines

STEPS, SAVED, ACCUMULATED = 4, 2, 2


def accelerator_of(engine: str) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    options: dict[str, Any] = {"gradient_accumulation_steps": ACCUMULATED}
    options["mixed_precision"] = "bf16" if "bf16" in engine else "no"
    if engine.startswith("DDP"):
        return Accelerator(cpu=True, **options)
    if engine.startswith("FSDP"):
        version = int(engine[4])
        given: dict[str, Any] = {
            "fsdp_version": version,
            "auto_wrap_policy": "transformer_based_wrap",
            "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": engines.state_dict_type(engine),
            "cpu_offload": "offload" in engine,
            "cpu_ram_efficient_loading": False,
        }
        if version == 1:
            given |= {"sync_module_states": False, "use_orig_params": "flat" not in engine}
        return Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(**given), **options)
    config = engines.deepspeed(engine)
    config |= {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATED,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), **options)


def optimizer_of(model: Any, kind: Any) -> Any:
    decays = [param for param in model.parameters() if param.ndim > 1]
    others = [param for param in model.parameters() if param.ndim < 2]
    groups = [{"params": decays, "weight_decay": 3.0}, {"params": others, "weight_decay": 0.0}]
    return kind(groups, lr=1e-2, betas=(0.9, 0.9), eps=1e-6)


def loop(
    engine: str, folder: Path, kind: Any, resume: bool = False, fused: Any = None
) -> dict[str, Any]:
    """Losses and norms of each step, evaluations, and the whole weights at the end."""
    from transformers import get_scheduler

    accelerator = accelerator_of(engine)
    model = engines.model(engine)
    if "flat" in engine:  # whose parameters are new ones
        model = accelerator.prepare(model)
    optimizer = optimizer_of(model, kind)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=99)
    rows = torch.stack([example["input_ids"] for example in engines.examples()])
    loader = DataLoader(rows, batch_size=2)
    if "flat" in engine:
        optimizer, loader, schedule = accelerator.prepare(optimizer, loader, schedule)
    else:
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    first = 0
    if resume:
        accelerator.load_state(str(folder))
        first = SAVED
        loader = accelerator.skip_first_batches(loader, SAVED * ACCUMULATED)
    found: dict[str, Any] = {"losses": [], "norms": [], "evaluations": []}
    with contextlib.nullcontext() if fused is None else fused(model) as report:
        step = first
        for ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                found["losses"].append(loss.item())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    found["norms"] += [] if norm is None else [float(norm)]
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            step += accelerator.sync_gradients
            if accelerator.sync_gradients and step == SAVED and not resume:
                accelerator.save_state(str(folder))
            if step == STEPS:
                break
        model.eval()
        with torch.no_grad():
            found["evaluations"].append(model(input_ids=rows[:2], labels=rows[:2]).loss.item())
        model.train()
    whole = engines.summoned if engine.startswith("FSDP1") else accelerator.get_state_dict
    found["after"] = {name: value.clone() for name, value in (whole(model) or {}).items()}
    found["optimizer"] = engines.chain(optimizer)
    found["fused"] = getattr(report, "fused", 0)
    found["model"] = {type(model).__name__, *(type(param).__name__ for param in model.parameters())}
    return found


@contextlib.contextmanager
def changed_by_run() -> Iterator[Any]:
    """What `python -m fastft run` does around a script."""
    from fastft.integrations.accelerator_loop import AcceleratorLoop
    from fastft.integrations.trainings import at_prepare

    changes = AcceleratorLoop(("loss", "optimizer"))
    with at_prepare(changes.before, changes.after):
        yield changes
    changes.restore()


def under(engine: str, folder: Path) -> dict[str, Any]:
    """Every way under one engine."""
    import fastft

    stock = torch.optim.AdamW
    found: dict[str, Any] = {"stock": loop(engine, folder / "stock", stock)}
    found["stock resumed"] = loop(engine, folder / "stock", stock, resume=True)
    by_hand = {"kind": fastft.AdamW, "fused": fastft.fused_loss}
    found["by hand"] = loop(engine, folder / "by hand", **by_hand)
    found["resumed"] = loop(engine, folder / "by hand", resume=True, **by_hand)
    with changed_by_run() as changes:
        found["run"] = loop(engine, folder / "run", stock)
        found["run"] |= {"lines": changes.lines, "fused": changes.report.fused}
    accelerator_of(engine)
    try:
        fastft.AdamW(engines.model(engine).parameters(), max_grad_norm=1.0)
        found["clipping inside"] = "made"
    except ValueError as error:
        found["clipping inside"] = str(error)
    before = dict(engines.model(engine).named_parameters())
    return found | {"before": {name: param.detach() for name, param in before.items()}}
