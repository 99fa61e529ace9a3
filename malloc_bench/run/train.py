"""Train the backbones of a suite ahead of its run, where one process would take too long: by those of torchrun."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from malloc_bench.data import DataError
from malloc_bench.paths import home
from malloc_bench.run.progress import watching
from malloc_bench.run.runner import device_of, had, settled
from malloc_bench.run.session import Session, titled
from malloc_bench.suite import suite as suites
from malloc_bench.suite.cells import Cell
from malloc_bench.suite.plan import checkpoint_folder, groups, make_plan
from malloc_bench.suite.suite import Suite, load_suite
from malloc_bench.training import ranks
from malloc_bench.training.checkpoints import Fit


def train(
    suite: Suite | str,
    *,
    only: Mapping[str, str | Sequence[str]] | None = None,
    offline: bool = False,
    device: str = "auto",
    quiet: bool = False,
) -> list[tuple[Cell, Fit]]:
    """Leave the backbones that a suite's cells need, adapted ones too, in the cache, where `run_suite` finds them.

    Under torchrun its processes train each one together (`ranks`); the list of a cell of each and its fit is empty in
    all but the first. Raises SuiteError, DataError, ResultsError.
    """
    suite = suite if isinstance(suite, Suite) else load_suite(suite)
    with ranks.met(device_of(device)) as on:
        alone = ranks.rank() == 0
        if not alone:
            logging.getLogger("malloc_bench").setLevel(logging.ERROR)  # the first one says it
        asked, quiet = suites.only(suite.cells(), only or {}), quiet or not alone
        ranks.first(lambda: had(suite, asked, offline, quiet) is None)  # the others find it prepared
        datasets, why = had(suite, asked, offline, True)
        for error in why.values():
            raise error
        result = make_plan([settled(cell, datasets, why, on) for cell in asked], datasets, home(), [], suite)
        found: dict[str, tuple[Cell, Fit]] = {}
        with watching(quiet, sum(cost.train for cost in result.costs.values())) as watch:
            session = Session(suite, home(), datasets, on, watch, result)
            for first, members in groups(result.plan):
                if first.data is None:
                    raise DataError(str(first.impossible))
                watch.group(titled(members), None)
                for folder, cell in _needed([each.cell for each in members if not each.cell.impossible]).items():
                    found[folder.name] = cell, session.train(cell)
        return list(found.values()) if alone else []


def _needed(cells: Sequence[Cell]) -> dict[Path, Cell]:
    """Of a group: the plain backbone, and each as a method adapts it, by the folder of its weights."""
    adapted = [cell for cell in cells if cell.compressor.structural]
    return {checkpoint_folder(cell): cell for cell in [*(cell.plain for cell in cells[:1]), *adapted]}
