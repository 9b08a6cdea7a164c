"""Trainer, and a loop of one's own, under the real DeepSpeed and FSDP, on a few processes and a
CPU: stock, with fastft, plugged, and resumed.

`run(engines, folder)` starts `torchrun` on this file and returns what came of each way. accelerate
turns FSDP2 into DDP on a CPU without a word; `real_engines` makes it take the processes for GPUs.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import torch

STEPS, SAVED = 4, 2
GATHERED = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
ENGINES = {
    "DDP": None,
    "ZeRO-0": {"stage": 0},
    "ZeRO-1": {"stage": 1},
    "ZeRO-1 bf16": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-2 offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "ZeRO-2 offload, fastft's kept": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "ZeRO-3": GATHERED,
    "ZeRO-3 bf16": GATHERED,
    "ZeRO-3 offload": {**GATHERED, "offload_optimizer": {"device": "cpu"}},
    "ZeRO-3 offload, fastft's kept": {
        **GATHERED,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
    "FSDP1": None,  # stock torch cannot gather a state dict of it on a CPU
    "FSDP1 sharded checkpoint": None,
    "FSDP2": None,
    "FSDP2 offload": None,
    "FSDP2 sharded checkpoint": None,
}
LOOPS = [engine for engine in ENGINES if engine not in ("FSDP1", "ZeRO-3 bf16")]
LOOPS += ["FSDP1 flat, sharded checkpoint", "FSDP2 bf16"]


def run(engines: list[str], folder: Path, what: str = "trainer", world: int = 2) -> dict[str, dict]:
    """What rank 0 found under each engine, one after the other in the same processes, which cost
    more than the engines.

    `what` is "trainer" or "loop". An engine that fails has its `error` alone, and those after it
    are missing.
    """
    here = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world}",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    # DeepSpeed compiles with the ninja beside this Python
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment |= {"ACCELERATE_TORCH_DEVICE": "cpu", "PATH": path}
    whole = [*command, __file__, what, str(folder), *engines]
    done = subprocess.run(
        whole, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    found = {
        engine: torch.load(file) for engine in engines if (file := folder / f"{engine}.pt").exists()
    }
    output = done.stdout[-2000:] + done.stderr[-6000:]
    missing = next((engine for engine in engines if engine not in found), None)
    return found if missing is None else {**found, missing: {"error": output}}


def real_engines() -> None:
    """Makes accelerate and transformers take two processes on a CPU for two GPUs that talk through
    gloo."""
    import accelerate.state as state
    import accelerate.utils.dataclasses as dataclasses
    import transformers.training_args as training_args

    kinds = state.DistributedType

    def backend(self, cpu=False, *_, **__):
        return "gloo", kinds.MULTI_CPU if cpu else kinds.MULTI_GPU

    state.PartialState._prepare_backend = backend
    dataclasses.is_cuda_available = training_args.is_torch_bf16_gpu_available = lambda: True
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.Tensor.pin_memory = lambda self, *_: self  # of what FSDP2 offloads


def deepspeed(engine: str) -> dict:
    config = {name: "auto" for name in ("train_batch_size", "train_micro_batch_size_per_gpu")}
    config |= {name: "auto" for name in ("gradient_accumulation_steps", "gradient_clipping")}
    config |= {
        "zero_optimization": ENGINES[engine],
        "bf16": {"enabled": "bf16" in engine},
        "steps_per_print": 10**9,
    }
    return config | ({"zero_force_ds_cpu_optimizer": False} if "kept" in engine else {})


def arguments(engine: str, folder: Path, **changes):
    from transformers import TrainingArguments

    if engine == "DDP":
        how = {"use_cpu": True, "ddp_backend": "gloo"}
    elif engine.startswith("FSDP"):
        version = int(engine[4])
        config = {
            "version": version,
            "fsdp_version": version,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        }
        config |= {
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": state_dict_type(engine),
            "cpu_offload": "offload" in engine,
        }
        if version == 1:
            config |= {"sync_module_states": False, "cpu_ram_efficient_loading": False}
        how = {"fsdp": True if version == 2 else "full_shard auto_wrap", "fsdp_config": config}
    else:
        how = {"deepspeed": deepspeed(engine)}
    # such a rate and decay that L2 in the place of decoupled decay would show in the losses
    usual = {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "weight_decay": 3.0,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-6,
    }
    usual |= {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
        "seed": 7,
    }
    usual |= {
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "report_to": "none",
    }
    usual |= {"disable_tqdm": True, "bf16": "bf16" in engine, "lr_scheduler_type": "constant"}
    return TrainingArguments(str(folder), **{**usual, **how, **changes})


def model(engine: str):
    from support.trainers import tiny_llama

    return tiny_llama(num_hidden_layers=2).to(torch.bfloat16 if "bf16" in engine else torch.float32)


class Mixing(torch.nn.Embedding):
    """Tokens that see their whole row, whatever is packed into it."""

    def forward(self, tokens):
        embedded = super().forward(tokens)
        return embedded + embedded.mean(1, keepdim=True)


def leaking_model():
    from transformers import LlamaForCausalLM

    from support.trainers import tiny_llama

    class Leaking(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.embed_tokens = Mixing(config.vocab_size, config.hidden_size)
            self.post_init()

    return tiny_llama(num_hidden_layers=2, kind=Leaking)


def examples():
    tokens = torch.randint(0, 97, (32, 12), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(
    engine: str, folder: Path, resume: str | None = None, plug: dict | None = None, **options
) -> dict:
    """A Trainer's losses, norms, weights before and after, and the classes of its optimizer and
    what it wraps; with `plug`, the options of `fastft.plug`, its lines too."""
    from transformers import Trainer

    args = arguments(engine, folder, **({"save_strategy": "no"} if engine == "FSDP1" else {}))
    options = {name: make(args) for name, make in options.items()}
    trainer = Trainer(model=model(engine), args=args, train_dataset=examples(), **options)
    plugged = None if plug is None else _plugged(trainer, plug)
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    history = trainer.state.log_history
    model_classes = {type(param).__name__ for param in trainer.model_wrapped.parameters()}
    reports = [
        callback.report
        for callback in trainer.callback_handler.callbacks
        if hasattr(callback, "report")
    ]
    return {
        "fused": sum(report.fused for report in reports),
        "probes": [
            callback.probe
            for callback in trainer.callback_handler.callbacks
            if hasattr(callback, "probe")
        ],
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "norms": [
            float(entry["grad_norm"]) for entry in history if entry.get("grad_norm") is not None
        ],
        "before": {
            name: param.detach().clone() for name, param in model(engine).named_parameters()
        },
        "after": weights(engine, trainer, folder),
        "optimizer": chain(trainer.optimizer),
        "model": {type(trainer.model_wrapped).__name__, *model_classes},
        "lines": {} if plugged is None else plugged.lines,
    }


def chain(optimizer) -> list[str]:
    """The classes of an optimizer and of what it wraps."""
    found = []
    while optimizer is not None:
        found.append(f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}")
        optimizer = getattr(optimizer, "optimizer", None)
    return found


def state_dict_type(engine: str) -> str:
    return "SHARDED_STATE_DICT" if "sharded" in engine else "FULL_STATE_DICT"


def _plugged(trainer, options):
    import fastft

    return fastft.plug(trainer, **options)


def weights(engine: str, trainer, folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights, whole, under the model's own names."""
    from safetensors.torch import load_file

    if engine.startswith("FSDP1"):
        return summoned(trainer.model_wrapped)
    if "sharded" in engine:
        return merged(engine, folder / f"checkpoint-{STEPS}" / "pytorch_model_fsdp_0")
    return load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors")


def merged(engine: str, shards: Path) -> dict[str, torch.Tensor]:
    """What `accelerate merge-weights` makes of a sharded checkpoint, which a fresh model loads."""
    from accelerate.utils import merge_fsdp_weights
    from safetensors.torch import load_file

    merge_fsdp_weights(str(shards), str(shards.parent / "merged"))
    found = load_file(shards.parent / "merged" / "model.safetensors")
    model(engine).load_state_dict(found)
    return found


def summoned(model) -> dict[str, torch.Tensor]:
    """The whole weights inside FSDP1, whose own state dict dies in stock torch on a CPU."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model):
        return {
            name.replace("_fsdp_wrapped_module.", ""): param.detach().clone()
            for name, param in model.named_parameters()
        }


def refused(engine: str, folder: Path) -> dict[str, str]:
    """How each thing ends that this engine would train otherwise."""
    import fastft

    def named(args):
        return {"optimizers": fastft.adamw(model(engine), args)}

    def by_hand(args):  # args are not given, so that only train begin can tell
        given = {"lr": args.learning_rate, "weight_decay": 3.0, "betas": (0.9, 0.9), "eps": 1e-6}
        made = model(engine)
        return {"model": made, "optimizers": fastft.adamw(made, **given)}

    def by_class(args):
        made = model(engine)
        return {"model": made, "optimizers": (fastft.AdamW(made.parameters()), None)}

    def spec(**given):
        return lambda args: {"optimizer_cls_and_kwargs": fastft.adamw_spec(**given)}

    values = {"lr": 1e-2, "betas": (0.9, 0.9), "eps": 1e-6}
    ways = {
        "adamw(model, args)": named,
        "adamw(model) without args": by_hand,
        "AdamW(...)": by_class,
    }
    ways |= {
        "a spec that clips": spec(max_grad_norm=0.5, **values),
        "kahan": spec(rounding="kahan", **values),
    }
    ways["a leaking model on packed batches"] = lambda args: {
        "model": leaking_model(),
        "data_collator": fastft.PackingCollator(),
    }
    return {name: outcome(engine, folder, way) for name, way in ways.items()}


def outcome(engine: str, folder: Path, way) -> str:
    from transformers import Trainer

    import fastft

    try:
        args = arguments(engine, folder, save_strategy="no")
        options = {"model": model(engine), **way(args)}
        callbacks = [fastft.FusedLossCallback()]
        trainer = Trainer(args=args, train_dataset=examples(), callbacks=callbacks, **options)
        trainer.train()
    except (ValueError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
    else:
        found = "trained"
    everywhere = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, found)
    assert set(everywhere) == {found}, everywhere  # no process goes on alone, or waits for another
    return found


def under(engine: str, folder: Path) -> dict:
    """Every way under one engine."""
    import fastft

    fast = {
        "optimizer_cls_and_kwargs": fastft.adamw_spec,
        "callbacks": lambda args: [fastft.FusedLossCallback()],
    }
    found = {
        "stock": train(engine, folder / "stock"),
        "fastft": train(engine, folder / "fastft", **fast),
    }
    found["plugged"] = train(engine, folder / "plugged", plug={"packing": "collate"})
    if engine == "FSDP2":
        held = {"packing": "collate", "offload": "gradients"}
        found["gradients on the host"] = train(engine, folder / "held", plug=held)
    packs = {**fast, "data_collator": lambda args: fastft.PackingCollator()}
    found["packed"] = train(engine, folder / "packed", **packs)
    if engine != "FSDP1":
        found["resumed"] = train(engine, folder / "fastft", f"checkpoint-{SAVED}", **fast)
    if "offload" in engine or engine == "FSDP1 sharded checkpoint":  # not to the bit in stock
        found["stock resumed"] = train(engine, folder / "stock", f"checkpoint-{SAVED}")
    return {**found, "refused": refused(engine, folder / "refused")}


def main(what: str, folder: Path, engines: list[str]) -> None:
    from support import engine_loops

    torch.set_num_threads(1)
    real_engines()
    for engine in engines:
        # which the one before has left
        for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
            os.environ.pop(variable, None)
        results = (under if what == "trainer" else engine_loops.under)(engine, folder / engine)
        if torch.distributed.get_rank() == 0:
            torch.save(results, folder / f"{engine}.pt")
        gc.collect()
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
