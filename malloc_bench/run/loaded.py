"""A finished run to look into: its rows, trained backbones, and the states of its users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Compressor
from malloc_bench.data import get_dataset
from malloc_bench.data.errors import DataError
from malloc_bench.data.tasks.impressions import Impressions
from malloc_bench.data.tasks.splits import Split
from malloc_bench.data.tasks.trained import facts
from malloc_bench.evaluation.evaluate import asked_of, chunks
from malloc_bench.paths import home
from malloc_bench.registry import clipped
from malloc_bench.results import Row, load_results
from malloc_bench.run.fits import Fits
from malloc_bench.run.folder import read_manifest
from malloc_bench.run.models import trained
from malloc_bench.run.runner import one_row
from malloc_bench.state import Events, Fitted, Prefill, UserState
from malloc_bench.suite.cells import Cell
from malloc_bench.suite.plan import checkpoint_folder

if TYPE_CHECKING:
    import polars as pl

Which = str | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class States:
    """Some users of a cell: the state that its method keeps of them, the full one, and what reads both.

    state, full: `UserState` of B users. prefill: what the method was given. tokens: [B, M] events that read. backbone:
    whose `read(tokens, state)` gives [B, M, d].
    """

    state: UserState
    full: UserState
    prefill: Prefill
    tokens: Events
    backbone: Backbone

    def __repr__(self) -> str:
        return f"States({self.state!r} of {self.full!r}, read by {self.backbone.name})"


@dataclass(frozen=True)
class Run:
    """A run's folder: `rows` as a polars frame, `backbone(which)` and `states(which)` of a cell.

    which: the start of a cell's id, or a mapping of what only it has, as `--only` names it, for instance
    {"compressor": "snapkv", "budget": "0.25", "backbone": "sasrec"}. Raises ValueError where no row or several are
    meant, DataError where the data cannot be had, FileNotFoundError where there are no weights.
    """

    folder: Path

    @cached_property
    def rows(self) -> pl.DataFrame:
        return load_results(self.folder)

    def cell(self, which: Which) -> Cell:
        return Cell.of_row(self._row(which))

    def _row(self, which: Which) -> Row:
        asked = which if isinstance(which, str) else {k: [v] if isinstance(v, str) else v for k, v in which.items()}
        return one_row(self.folder, asked)

    def split(self, cell: Cell) -> Split | Impressions:
        """The cell's data, cut into training and test; raises DataError where they are not those of its row."""
        card = read_manifest(self.folder).get("datasets", {}).get(cell.dataset, {}).get("card", cell.dataset)
        assert cell.split is not None, "a row has it"
        data, was = get_dataset(card), cell.data or {}
        for what, now in data.identity().items():
            if what in was and was[what] != now:
                told = f"their {what} was {clipped(str(was[what]))} and is {clipped(str(now))}"
                raise DataError(f"{data.name}: not the data of this row, {told}: put the file or its card back")
        return cell.task.cut(data, cell.split)

    def backbone(self, which: Which) -> Backbone:
        """The trained backbone of a cell, as its method has adapted it."""
        row = self._row(which)
        cell, hashes = Cell.of_row(row), row["hashes"] or {}
        return trained(cell, self.split(cell).dataset, self.folder, hashes.get("weights"))[0]

    @torch.no_grad()
    def states(self, which: Which, users: int = 32) -> States:
        """Test users of a cell, those with the longest histories, compressed as the run did it; fits are reused."""
        cell, split, method, backbone, plain, fitted = self._fitted(which)
        rows = chunks(backbone, split)[-1][-users:]
        asked = asked_of(backbone, split, rows, cell.filter_seen)
        ids = torch.from_numpy(split.dataset.user_ids[split.test.users[rows]])
        prefill = backbone.prepare(
            asked.history, ids, method.needs, cell.seed, facts(split, method.needs), asked.tokens
        )
        full = plain.prefill(asked.history, ids)
        prefill = replace(prefill, whole=full.full_bytes())
        state = method.compress(prefill, cell.budget, fitted)
        return States(state, full.state, prefill, asked.tokens, backbone)

    def explained(self, which: Which) -> Sequence[str]:
        """What a cell's method makes of its budget with what it has learned, in words; fits are reused."""
        cell, _, method, _, _, fitted = self._fitted(which)
        return () if fitted is None else method.explain(fitted, cell.budget)

    def _fitted(self, which: Which) -> tuple[Cell, Split | Impressions, Compressor, Backbone, Backbone, Fitted | None]:
        """A cell, its data, its method, the backbone that it adapts and the plain one, and what it has learned."""
        row = self._row(which)
        cell, hashes = Cell.of_row(row), row["hashes"] or {}
        split, method = self.split(cell), cell.compressor.build()
        backbone, weights = trained(cell, split.dataset, self.folder, hashes.get("weights"))
        plain = trained(cell.plain, split.dataset, self.folder, hashes.get("reference"))[0]
        place = home() / "checkpoints" / checkpoint_folder(cell).name / "fits"
        fitted, _ = Fits(backbone, plain, split, place, weights, cell.seed).of(method, cell.budget)
        return cell, split, method, backbone, plain, fitted


def load_run(folder: str | Path) -> Run:
    """A run's folder, or that of its name below runs/; raises FileNotFoundError where it holds no results."""
    path = Path(folder)
    path = Path("runs") / path if not path.exists() and (Path("runs") / path).is_dir() else path
    run = Run(path)
    run.rows  # noqa: B018 - says at once that there are none
    return run
