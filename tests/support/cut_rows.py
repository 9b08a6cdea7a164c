"""Trainer on two processes that cut the rows of a batch between them: accelerate's context
parallelism, DeepSpeed's sequence parallelism. Stock, with fastft, and on packs.

`run(kind, way, folder)` starts `torchrun` on this file: one training, since DeepSpeed makes its
groups once a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

PROCESSES, STEPS, LENGTH = 2, 4, 16


def run(kind: str, way: str, folder: Path) -> tuple[list[dict], str]:
    """What each rank found, of one training, and what both wrote.

    Args:
        kind: "context" or "sequence".
        way: "stock", "fused", or "packs", "plug packs", which must be refused.
        folder: for the results.
    """
    here = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    # DeepSpeed compiles with the ninja beside this Python
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    done = subprocess.run(
        [sys.executable, *launch, __file__, kind, way, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    files = [folder / f"{rank}.pt" for rank in range(PROCESSES)]
    output = done.stdout[-2000:] + done.stderr[-8000:]
    return [torch.load(file) for file in files if file.exists()], output


def settings(kind: str) -> dict:
    from accelerate import ParallelismConfig

    if kind == "context":
        shards = {"version": 2, "fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        shards |= {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        cut = ParallelismConfig(cp_size=PROCESSES)
        return {"parallelism_config": cut, "fsdp": True, "fsdp_config": shards}
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping")
    config = dict.fromkeys((*automatic, "gradient_accumulation_steps"), "auto")
    config |= {"zero_optimization": {"stage": 1}, "steps_per_print": 10**9}
    handler = DeepSpeedSequenceParallelConfig(
        sp_attn_implementation="sdpa", sp_seq_length_is_variable=True
    )
    cut = ParallelismConfig(sp_backend="deepspeed", sp_size=PROCESSES, sp_handler=handler)
    return {"parallelism_config": cut, "deepspeed": config}


def examples() -> list[dict]:
    """Of which the first process has fewer labels that count than the second."""
    tokens = torch.randint(0, 97, (32, LENGTH), generator=torch.Generator().manual_seed(5))
    labels = tokens.clone()
    labels[:, :5] = -100
    positions = torch.arange(LENGTH)
    return [
        {"input_ids": row, "labels": kept, "position_ids": positions}
        for row, kept in zip(tokens, labels, strict=True)
    ]


def train(kind: str, way: str, folder: Path) -> dict:
    import transformers

    import fastft
    from support.trainers import Curve, quiet_arguments, tiny_llama

    class Trainer(transformers.Trainer):
        def _prepare_input(self, data):
            # a transfer to a GPU makes them so, and the losses count on it
            given = super()._prepare_input(data)
            return given.contiguous() if isinstance(given, torch.Tensor) else given

    usual = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    usual |= {"gradient_accumulation_steps": 2, "seed": 3, "lr_scheduler_type": "constant"}
    usual |= {"use_cpu": False, "remove_unused_columns": False, **settings(kind)}
    args, curve = quiet_arguments(folder, **usual), Curve()
    model, given = tiny_llama(attn_implementation="sdpa"), {"train_dataset": examples()}
    callbacks: list = [curve]
    if way != "stock":
        given["optimizer_cls_and_kwargs"] = fastft.adamw_spec(args)
        callbacks.append(fastft.FusedLossCallback())
    if way.endswith("packs"):
        texts = [
            {name: each[name].tolist() for name in ("input_ids", "labels")} for each in examples()
        ]
        given |= {"train_dataset": texts}
    if way == "packs":
        given |= {"data_collator": fastft.PackingCollator()}
        given["train_dataset"] = fastft.pack(texts, 2 * LENGTH)
    trainer = Trainer(model, args, callbacks=callbacks, **given)
    try:
        if way == "plug packs":
            fastft.plug(trainer, packing=2 * LENGTH)
        trainer.train()
    except (ValueError, fastft.PackingLeakError) as error:
        return {"error": f"{type(error).__name__}: {error}", "steps": trainer.state.global_step}
    fused = callbacks[1].report.fused if way == "fused" else 0
    return {"losses": curve.losses, "norms": curve.norms, "fused": fused}


def main(kind: str, way: str, folder: Path) -> None:
    from support.engines import real_engines

    torch.set_num_threads(1)
    real_engines()
    torch.save(train(kind, way, folder), folder / f"{os.environ['RANK']}.pt")
    # without which gloo aborts now and then at the interpreter's end
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
