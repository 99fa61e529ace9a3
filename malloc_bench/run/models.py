"""The backbone of a cell, made anew or as a run has trained it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from malloc_bench.backbones import Backbone, get_backbone
from malloc_bench.data import Dataset
from malloc_bench.data.tasks.tasks import Ranking
from malloc_bench.suite.cells import Cell
from malloc_bench.suite.plan import checkpoint_folder
from malloc_bench.training.checkpoints import finished, load_weights


def fresh(cell: Cell, data: Dataset, **changes: Any) -> Backbone:
    """Weights as they are before training, the same for the same seed, with the categories of the items where used.

    changes: parameters in place of the cell's. Raises ValueError where categories are used and the card has none.
    """
    backbone = made(cell, data, **changes)
    if backbone.uses_categories:
        if data.categories is None:
            raise ValueError(f"{cell.backbone.name} reads categories of items, and the card of {data.name} has none")
        backbone.categorise(torch.from_numpy(data.categories.copy()))
    return backbone


def made(cell: Cell, data: Dataset, **changes: Any) -> Backbone:
    """As `fresh`, without a look at any file."""
    torch.manual_seed(cell.seed)
    backbone = get_backbone(cell.backbone.name, data.n_items, data.has_time, **{**cell.backbone.params, **changes})
    return backbone.for_ranking() if isinstance(cell.task, Ranking) else backbone


def trained(cell: Cell, data: Dataset, run: Path, weights: str | None = None) -> tuple[Backbone, str]:
    """The backbone of a settled cell, adapted where its method does that, from a run's folder or the cache, and the

    sha256 of its weights; None: whichever they are. Raises FileNotFoundError where neither has them whole.
    """
    backbone, usual = fresh(cell, data), checkpoint_folder(cell)
    part = cell.compressor.build().structural
    if part:
        part.adapt(backbone)
    for folder in (run / "checkpoints" / usual.name, usual):
        fit = finished(folder)
        if fit is None or not fit.weights or weights not in (None, fit.weights):
            continue
        if load_weights(backbone, folder, fit.start) is not None:
            return backbone.eval(), fit.weights
    which = "" if weights is None else f"that its row was made with, {weights[:8]}, "
    raise FileNotFoundError(f"{run} has no weights {which}of {cell.backbone.label} ({usual.name}): run its suite first")
