from __future__ import annotations

import pytest
from support.searched import RATES, check_search

optuna = pytest.importorskip("optuna")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of Optuna


@pytest.mark.way("Optuna", loss="exact", optimizer="exact")
def test_every_trial_trains_at_its_own_values_and_finds_what_stock_finds(tmp_path):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {"learning_rate": RATES, "adam_beta1": (0.5, 0.9), "weight_decay": (0.0, 0.3)}

    def search(trainer, folder):
        return trainer.hyperparameter_search(
            direction="minimize",
            backend="optuna",
            n_trials=len(RATES),
            hp_space=lambda trial: {
                name: trial.suggest_float(name, *ends, log=name == "learning_rate")
                for name, ends in space.items()
            },
            sampler=optuna.samplers.RandomSampler(seed=1),
        )

    check_search(search, tmp_path)
