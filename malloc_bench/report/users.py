"""Values by user of a run's cells, and paired differences of two methods, seeds pooled, clustered by user."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from malloc_bench.evaluation import metrics
from malloc_bench.registry import told
from malloc_bench.results import spoilt

Values = dict[str, Any]  # arrays over the users of one cell, in ascending order


class Difference(NamedTuple):
    """Of two methods: the mean difference, its 95 % interval and two-sided p over users; wins, losses and ties."""

    delta: float
    lo: float
    hi: float
    p: float
    wins: int
    losses: int
    users: int


class Both(NamedTuple):
    """Values of two methods, arrays over the users whom both have, in ascending order of `user`."""

    user: np.ndarray
    length: np.ndarray
    a: np.ndarray
    b: np.ndarray


class Users:
    """The per-user values of a run's rows, read once each.

    frame: rows with `cell_id`, `seed`, `per_user` and `hashes`; folder: the run's, None where there is none.
    """

    def __init__(self, frame: pl.DataFrame, folder: str | Path | None) -> None:
        rows = frame.select("cell_id", "seed", "per_user", "hashes").iter_rows(named=True)
        self._rows = {row["cell_id"]: row for row in rows}
        self._folder = None if folder is None else Path(folder)
        self._read: dict[str, Values | None] = {}
        self._faults: dict[str, str] = {}  # file -> what is wrong with it

    def of(self, cell: str) -> Values | None:
        """`alike` (overlap, or agreement), `main` (NDCG@10, or what averages to the GAUC) and `length` of each `user`.

        None where a cell has no file of them, or another than was written.
        """
        if cell not in self._read:
            self._read[cell] = self._load(self._rows.get(cell))
        return self._read[cell]

    def lacking(self) -> str:
        """Which values could not be had, and why: the first file, and how many more."""
        first, *more = [f"{file} {why}" for file, why in self._faults.items()] or ["some values by user are not there"]
        return f"{first}, and {len(more)} more" if more else first

    def _load(self, row: Mapping[str, Any] | None) -> Values | None:
        if self._folder is None or row is None or not row["per_user"]:
            return None
        file, files = row["per_user"], json.loads(row["hashes"] or "{}")
        if not (self._folder / file).is_file():
            self._faults[file] = "is gone"
        elif bad := spoilt(self._folder, {"hashes": files}):
            self._faults[bad] = "is not what was written"
        else:
            try:
                return _values(pl.read_parquet((self._folder / file).read_bytes()))
            except (Exception, pl.exceptions.PanicException) as error:  # whatever a file may hold that has no digest
                self._faults[file] = f"holds no values by user ({told(error)})"
        return None

    def both(
        self, cells: Sequence[str], others: Sequence[str], what: str = "alike", run: Users | None = None
    ) -> Both | None:
        """Two methods' values (ids of their cells, one a seed), averaged over the seeds that both have.

        what: `alike` or `main`. run: that of the others, this one by default. None where some values are missing.
        """
        there = run or self
        mine, theirs = self._by_seed(cells), there._by_seed(others)
        pairs = [(self.of(mine[seed]), there.of(theirs[seed])) for seed in sorted(mine.keys() & theirs.keys())]
        found = [_joined(one, two, what) for one, two in pairs if one is not None and two is not None]
        if not found or len(found) < len(pairs):
            return None
        users = np.concatenate([each.user for each in found])
        values = (np.concatenate(arrays) for arrays in list(zip(*found))[1:])
        length, a, b = (metrics.by_user(each, users) for each in values)
        some = ~np.isnan(a + b)
        return Both(np.unique(users)[some], length[some], a[some], b[some]) if some.any() else None

    def _by_seed(self, cells: Iterable[str]) -> dict[int, str]:
        return {self._rows[each]["seed"]: each for each in cells if each in self._rows}


def _values(frame: pl.DataFrame) -> Values:
    """Of each user, from a file of a row a target or request."""
    users = frame["user"].to_numpy()
    names, numbered = np.unique(users, return_inverse=True)

    def by_user(values: Any) -> np.ndarray:
        return metrics.by_user(np.asarray(values, np.float64), numbered)

    alike = by_user(frame["overlap" if "overlap" in frame.columns else "agreement"])
    both = metrics.ndcg(frame["rank"], 10) if "rank" in frame.columns else None
    judged = by_user(both) if both is not None else _gauc(frame, numbered)
    return {"user": names, "alike": alike, "main": judged, "length": by_user(frame["length"])}


def _joined(one: Values, two: Values, what: str) -> Both:
    same = np.array_equal(one["user"], two["user"])
    users, i, j = (one["user"], ..., ...) if same else np.intersect1d(one["user"], two["user"], return_indices=True)
    return Both(users, one["length"][i], one[what][i], two[what][j])


def p_of(both: Both | None) -> float | None:
    """Two-sided p of their mean difference: the normal tail at it over its standard error; None without users."""
    if both is None:
        return None
    differences = both.a - both.b
    error = float(differences.std()) / math.sqrt(len(differences))
    return metrics.two_sided(float(differences.mean()), error, len(differences))


def difference(both: Both | None) -> Difference | None:
    """The mean of `a - b` with its bootstrap interval over users; None without any."""
    if both is None:
        return None
    wins, losses = int((both.a > both.b).sum()), int((both.a < both.b).sum())
    return Difference(*metrics.paired_bootstrap(both.a, both.b), wins, losses, len(both.a))


def columns_of(name: str, found: Difference | None) -> dict[str, float | None]:
    """A difference and the ends of its interval as columns, null where there is none."""
    values = (None, None, None) if found is None else (found.delta, found.lo, found.hi)
    return dict(zip((name, f"{name}_lo", f"{name}_hi"), values))


def _gauc(frame: pl.DataFrame, users: np.ndarray) -> np.ndarray:
    """A value for each user whose mean is the GAUC; NaN for one who liked all candidates or none."""
    items = np.stack(frame["items"].to_list())
    real = items > 0
    owner = np.broadcast_to(users[:, None], real.shape)[real]
    logits, labels = (np.stack(frame[name].to_list())[real] for name in ("logits", "labels"))
    found = metrics.lists(logits, labels, owner)
    some = ~np.isnan(metrics.auc_by_user(found)[0])
    values = np.full(len(some), np.nan)
    values[some] = metrics.gauc(found)
    return values
