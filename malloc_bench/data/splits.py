"""Which events train, validate and test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from malloc_bench.data.dataset import Dataset
from malloc_bench.registry import UnknownName, suggest


@dataclass(frozen=True)
class Targets:
    """Events to be predicted: users [N] rows of the dataset, at [N] places in its flat arrays."""

    users: np.ndarray
    at: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True)
class Split:
    """A dataset cut up. train_end [U]: user u trains on events [offsets[u], train_end[u])."""

    name: str
    dataset: Dataset
    train_end: np.ndarray
    valid: Targets
    test: Targets


def leave_one_out(dataset: Dataset) -> Split:
    """Each user's last event is tested, the one before validates; users with fewer than 3 events only train."""
    first, end = dataset.offsets[:-1], dataset.offsets[1:]
    users = np.flatnonzero(end - first >= 3)
    train_end = end.copy()
    train_end[users] -= 2
    return Split("leave_one_out", dataset, train_end, Targets(users, end[users] - 2), Targets(users, end[users] - 1))


SPLITS = {"leave_one_out": leave_one_out}


def get_split(name: str, dataset: Dataset) -> Split:
    """The named split of a dataset; raises UnknownName."""
    if name not in SPLITS:
        raise UnknownName(f"no split is named '{name}'.{suggest(name, SPLITS)}")
    return SPLITS[name](dataset)
