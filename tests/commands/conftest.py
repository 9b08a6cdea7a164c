import gc

import pytest


@pytest.fixture(autouse=True, scope="package")
def libraries_are_not_collected():
    """Every training of a Trainer collects garbage: a third of a second among the libraries'
    objects, more than the training of a tiny model takes."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
