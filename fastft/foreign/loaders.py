"""Datasets and loaders of others: torch's, `datasets`', accelerate's."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from fastft.foreign.objects import class_names


def is_dataset(dataset: Any) -> bool:
    """Whether `dataset` is a `datasets.Dataset`."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(dataset, datasets.Dataset)


def is_iterable_dataset(dataset: Any) -> bool:
    """Whether `dataset` is a `datasets.IterableDataset`."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(dataset, datasets.IterableDataset)


def is_transformed(dataset: Any) -> bool:
    """Whether a function of the user's makes the rows of a `datasets.Dataset` of what it stores.

    `dataset.format` says so too, but lists the columns each time.
    """
    return bool(dataset._format_type == "custom")


def chosen_rows(dataset: Any) -> Any:
    """Which rows of its table a `datasets.Dataset` has, numpy integers (N,); None: all of them, in
    order."""
    indices = dataset._indices
    return None if indices is None else indices.column(0).to_numpy()


def dispatches(loader: Any) -> bool:
    """Whether `loader` is accelerate's that reads on rank 0 and cuts every tensor of a batch
    between the ranks."""
    return "DataLoaderDispatcher" in class_names(loader)


def active_dataloader() -> Any:
    """The loader of accelerate that is being iterated; None without one."""
    loaders = sys.modules.get("accelerate.data_loader")
    return None if loaders is None else loaders.GradientState().active_dataloader


@contextlib.contextmanager
def loaders_forgotten(accelerator: Any) -> Iterator[None]:
    """Makes an Accelerator forget at the end which loaders it has prepared in this context."""
    before = list(accelerator._dataloaders)
    try:
        yield
    finally:
        accelerator._dataloaders[:] = before


def inner_loader(loader: Any) -> Any:
    """The loader inside DeepSpeed's adapter for sequence parallelism; any other as it is."""
    return loader.dl if "UlyssesSPDataLoaderAdapter" in class_names(loader) else loader
