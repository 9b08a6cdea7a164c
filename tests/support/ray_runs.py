"""A small Ray on this machine, and what its training processes run."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def cluster(cpus: int) -> Iterator[None]:
    """Ray with so many CPUs, whose processes import fastft and the tests' helpers from here."""
    import ray

    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    # the path of a Unix socket has at most 107 characters, which pytest's folders use up
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:
        ray.init(
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            logging_level="ERROR",
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
            _temp_dir=short,
        )
        try:
            yield
        finally:
            ray.shutdown()


WAYS = ("stock", "by hand", "plugged", "packed")


def train(config: dict[str, Any]) -> None:
    """What each worker of Ray Train runs: a Trainer each way; what rank 0 finds goes to the file
    `config["found"]`."""
    import torch
    from ray.train import get_context

    found = {way: _trained(Path(config["folder"]) / way, way) for way in WAYS}
    if get_context().get_world_rank() == 0:
        torch.save(found, config["found"])


def _trained(folder: Path, way: str) -> dict[str, Any]:
    from ray.train.huggingface.transformers import prepare_trainer

    import fastft
    from support.plugged import trainer_of
    from support.trainers import logged

    trainer = trainer_of(folder, max_steps=4, ddp_backend="gloo")
    reporting = None
    if way == "by hand":
        trainer.optimizer, _ = fastft.adamw(trainer.model, trainer.args)
        trainer.add_callback(reporting := fastft.FusedLossCallback())
        fastft.fuse_clipping(trainer)
    elif way != "stock":
        reporting = fastft.plug(trainer, packing="collate" if way == "packed" else None)
    prepare_trainer(trainer).train()
    return {
        "losses": logged(trainer),
        "norms": logged(trainer, "grad_norm"),
        "fused": 0 if reporting is None else reporting.report.fused,
        "processes": trainer.args.world_size,
        "optimizer": type(trainer.optimizer.optimizer).__module__.partition(".")[0],
    }
