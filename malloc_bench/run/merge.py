"""Several run folders as one: what shards of a suite, on one machine or many, have come to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from malloc_bench.files import ResultsError, atomic_write
from malloc_bench.report import write_report
from malloc_bench.results import COLUMNS, Row, rows_of, spoilt, write_row
from malloc_bench.run.folder import locked, read_manifest, write_manifest
from malloc_bench.run.manifest import joined

JUDGED = (
    "status",
    "n_users",
    "hr@",
    "ndcg@",
    "mrr",
    "auc",
    "gauc",
    "logloss",
    "recall@",
    "overlap",
    "agreement",
    "bytes_",
)


def merge(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Rows, per-user values, raw times and manifests of `runs` in the folder `out`, and its report.

    A folder may be what is committed of a run: `results.parquet` and the manifest. Every row is held against its
    digest, as are the files that belong to it. A cell that two runs have must have come to the same accuracy and bytes,
    to rounding; the first run's row is kept, but a finished one goes before a failed or skipped one. Raises
    ResultsError that names the runs and the cell.
    """
    rows: dict[str, Row] = {}
    owner: dict[str, Path] = {}
    folder = Path(out)
    for run in map(Path, runs):
        try:
            found = rows_of(run)
        except FileNotFoundError as error:
            raise ResultsError(f"{run} holds no rows: is it the folder of a run?") from error
        for row in found:
            known = rows.get(each := row["cell_id"])
            if known is not None and known["status"] == row["status"] == "ok" and (why := _differs(known, row)):
                raise ResultsError(f"{owner[each]} and {run} have other results for cell {each[:12]}: {why}")
            if known is None or (known["status"] != "ok" and row["status"] == "ok"):
                if bad := spoilt(run, row):
                    raise ResultsError(f"{run / bad} is not what was written: run that suite again first")
                rows[each], owner[each] = row, run
    with locked(folder):
        for each, row in rows.items():
            for name in _files(row):
                if (owner[each] / name).exists():
                    atomic_write(folder / name, (owner[each] / name).read_bytes())
            write_row(folder / "rows", {key: value for key, value in row.items() if key != "digest"})
        write_manifest(folder, joined([read_manifest(Path(run)) for run in runs]))
        write_report(folder)
    return folder


def _files(row: Row) -> Iterator[str]:
    yield from (row["hashes"] or {}).get("files", {})


def _differs(one: Row, other: Row) -> str | None:
    for name in (name for name in one if name.startswith(JUDGED) and COLUMNS.get(name) != "json"):
        a, b = one[name], other[name]
        same = (
            math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b
        )
        if not same:
            return f"{name} is {a} and {b}"
    return None
