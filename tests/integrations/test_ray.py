"""Ray Tune and Ray Train with the real Ray: trials, and two workers, train as in stock."""

from __future__ import annotations

import pytest
import torch
from support import ray_runs
from support.searched import RATES, check_search

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of Ray
    pytest.mark.xdist_group("ray"),  # one Ray on a machine
]


@pytest.fixture(scope="module")
def cluster():
    with ray_runs.cluster(cpus=2):
        yield


@pytest.mark.way("Ray Tune", loss="exact", optimizer="exact")
def test_every_trial_trains_at_its_own_values_and_finds_what_stock_finds(cluster, tmp_path):
    from ray import tune

    def search(trainer, folder):
        return trainer.hyperparameter_search(
            direction="minimize",
            backend="ray",
            n_trials=1,  # of each rate
            hp_space=lambda trial: {
                "learning_rate": tune.grid_search([*RATES]),
                "adam_beta1": tune.choice([0.5]),
                "weight_decay": tune.choice([0.3]),
            },
            resources_per_trial={"cpu": 1},
            storage_path=str(folder / "ray"),
            max_failures=2,  # a process of Ray's own that dies at its start, on a busy machine
            verbose=0,
        )

    check_search(search, tmp_path)


@pytest.mark.way("Ray Train", loss="exact", optimizer="exact", packing="exact")
def test_two_workers_train_as_in_stock(cluster, tmp_path):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        ray_runs.train,
        train_loop_config={"folder": str(tmp_path), "found": str(tmp_path / "found.pt")},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    found = torch.load(tmp_path / "found.pt")
    stock = found.pop("stock")
    assert stock["processes"] == 2 and len(stock["losses"]) == 4 and stock["optimizer"] == "torch"
    for way, ours in found.items():
        assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-6), way
        assert ours["norms"] == pytest.approx(stock["norms"], rel=1e-5), way
        assert (ours["processes"], ours["fused"], ours["optimizer"]) == (2, 4, "fastft"), way
