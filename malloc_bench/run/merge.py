"""Several run folders as one: what shards of a suite, on one machine or many, have come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from malloc_bench.files import ResultsError, atomic_write
from malloc_bench.report import write_report
from malloc_bench.results import COLUMNS, Row, canonical_json, read_row, read_rows, rows_of, spoilt, write_row
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
    to rounding; the first run's row is kept, but a finished one goes before a failed or skipped one. What `out` holds
    already is one of the runs, the last. Raises ResultsError that names the runs and the cell.
    """
    rows: dict[str, tuple[Row, Path]] = {}
    folder, every = Path(out), [*map(Path, runs)]
    if all(bad := [_unreadable(run) for run in every]):  # said once, before a file of each is warned of
        raise ResultsError(f"{'; '.join(map(str, bad))}: run that suite again first")
    for run in every:
        _add(rows, run)
    with locked(folder):
        if (folder / "results.parquet").is_file() or any((folder / "rows").glob("*.json")):
            _add(rows, folder, "; choose another folder (--out)")
            every.insert(0, folder)  # its sessions came before
        for row, run in rows.values():
            for name in (files := _files(row)):
                if (run / name).exists():
                    atomic_write(folder / name, (run / name).read_bytes())
            if row["hashes"] and files:  # what a run is kept without is not missed among what others have
                row["hashes"] = {**row["hashes"], "files": {name: files[name] for name in files if _has(run / name)}}
            write_row(folder / "rows", {key: value for key, value in row.items() if key != "digest"})
        whole = joined([read_manifest(run) for run in every])
        alike = {canonical_json(each): each for each in whole["sessions"]}  # of a run that is given twice
        write_manifest(folder, {**whole, "sessions": [*alike.values()]})
        write_report(folder)
    return folder


def bring_back(run: str | Path) -> list[str]:
    """Rows that `results.parquet` has and `rows/` has lost, or not as they were written, written there again: the names
    of their files. None where the parquet is all there is, or is not what was written."""
    folder, kept = Path(run) / "rows", Path(run) / "results.parquet"
    if not kept.is_file() or not any(folder.glob("*.json")):
        return []
    known = {row["cell_id"] for row in read_rows(folder)}
    try:
        lost = [row for row in rows_of(run, kept=True) if row["cell_id"] not in known]
    except ResultsError:
        return []
    return [write_row(folder, {key: value for key, value in row.items() if key != "digest"}).name for row in lost]


def there(*runs: Path) -> set[str]:
    """Names of the files that rows are in, good or not."""
    return {path.name for run in runs for path in (run / "rows").glob("*.json")}


def _unreadable(run: Path) -> str | None:
    """Why a run has rows of which none is good, or None."""
    why = None
    for path in sorted((run / "rows").glob("*.json")):
        _, bad = read_row(path)
        if not bad:
            return None
        why = why or f"{run} has no row that is as written ({path.name}: {bad})"
    return why


def _add(rows: dict[str, tuple[Row, Path]], run: Path, advice: str = "") -> None:
    """Put the rows of a run beside those of others, by cell, each with the run that it is of."""
    try:
        found = rows_of(run)
    except FileNotFoundError as error:
        raise ResultsError(f"{run} holds no rows: is it the folder of a run?") from error
    for row in found:
        known, owner = rows.get(each := row["cell_id"], (None, run))
        if known is not None and known["status"] == row["status"] == "ok" and (why := _differs(known, row)):
            raise ResultsError(f"{owner} and {run} have other results for cell {each[:12]}: {why}{advice}")
        if known is None or (known["status"] != "ok" and row["status"] == "ok"):
            if bad := spoilt(run, row):
                raise ResultsError(f"{run / bad} is not what was written: run that suite again first")
            rows[each] = row, run


def _has(path: Path) -> bool:
    """Whether files of this kind are kept."""
    return path.parent.is_dir() and any(path.parent.iterdir())


def _files(row: Row) -> dict[str, str]:
    return (row["hashes"] or {}).get("files", {})


def _differs(one: Row, other: Row) -> str | None:
    for name in (name for name in one if name.startswith(JUDGED) and COLUMNS.get(name) != "json"):
        a, b = one[name], other[name]
        same = (
            math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b
        )
        if not same:
            return f"{name} is {a} and {b}"
    return None
