"""Rows: one JSON file per cell, the truth of a run; `results.parquet` is derived from them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malloc_bench.files import (
    DIGEST,
    ResultsError,
    atomic_write,
    canonical_json,
    digest,
    file_digest,
    finite,
    plain,
    remove_leftovers,
    sealed,
)
from malloc_bench.registry import clipped, suggest
from malloc_bench.results.faults import fault, no_results
from malloc_bench.results.labels import budget_asked, budget_label, budget_labels, budget_text, label, share, size
from malloc_bench.results.versions import newest

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

__all__ = [
    "COLUMNS", "SCHEMA_VERSION", "ResultsError", "Row", "atomic_write", "budget_asked", "budget_label", "budget_labels",
    "budget_text", "canonical_json", "cell_id", "digest", "frame", "label", "load_results", "no_results",
    "read_rows", "remove_leftovers", "rows_of", "share", "size", "to_parquet", "write_per_user", "write_row",
]  # fmt: skip

log = logging.getLogger(__name__)

Row = dict[str, Any]

SCHEMA_VERSION = 2
AFTER = (1, 5, 10, 20, 50, 100)  # appended events, drift is measured after
STEPS = ("prefill", "compress", "append", "read")
REQUEST_STEPS = ("load", "unpack", "read", "append", "pack", "write")
CLIENTS = (1, 2)  # processes that ask a store at once
KNOWN = ("none", "full", "window")

#: column -> kind (text, whole, real, flag, or json: a nested value, kept as JSON text in the parquet), in their order.
COLUMNS: dict[str, str] = {
    **dict.fromkeys(("cell_id", "suite", "dataset", "task", "split", "backbone"), "text"),
    "backbone_params": "json",
    **dict.fromkeys(("family", "compressor"), "text"),
    "compressor_params": "json",
    "tuned": "text",  # sha256 of the file that the parameters were chosen by
    "structural": "flag",  # trained with the backbone: its differences carry training noise
    "budget": "text",  # see `budget_text`
    "budget_unit": "text",  # what the budget counts: bytes, slots or events
    "seed": "whole",
    **dict.fromkeys(("status", "reason"), "text"),
    **dict.fromkeys(("n_users", "n_targets"), "whole"),
    "state_between": "text",  # of a user's targets: rebuilt or appended
    **dict.fromkeys(("hr@5", "hr@10", "hr@50", "ndcg@5", "ndcg@10", "ndcg@50", "mrr", "loss"), "real"),
    **dict.fromkeys(("auc", "gauc", "logloss", "recall@5", "recall@10", "recall@50"), "real"),
    **{f"{floor}_{name}": "real" for floor in ("popular", "popular_7d") for name in ("hr@10", "ndcg@10")},
    "users_one_class": "whole",  # have liked all or no candidates: not in the GAUC
    **dict.fromkeys(("overlap@10", "agreement", "logit_error"), "real"),  # with the full state
    # what compressing from scratch keeps less what updates after N new events do; what appending alone keeps; users
    **{f"{name}@{n}": "real" for n in AFTER for name in ("drift", "appended", "drift_users")},
    **{f"delta_{name}{end}": "real" for name in ("ndcg@10", "gauc", "auc") for end in ("", "_lo", "_hi")},
    **dict.fromkeys(("p_value", "p_auc"), "real"),  # of delta_ndcg@10 or delta_gauc, and of delta_auc
    "p_noninferior": "real",  # one-sided, of a loss of 1 % or more of the full state's NDCG@10, or GAUC above 0.5
    # generated data: the best possible with no event, with all, with the newest in as many bytes
    **{f"ceiling_{known}_{name}": "real" for known in KNOWN for name in ("hr@5", "hr@10", "hr@50", "auc")},
    **dict.fromkeys(("bytes_full", "bytes_mean", "bytes_p50", "bytes_p99", "bytes_fixed"), "real"),
    "bytes_by_part": "json",  # of bytes_mean: part -> bytes, as `UserState.nbytes_by_part` names them
    **dict.fromkeys(("ratio", "share_at_floor"), "real"),
    **dict.fromkeys(("measured_users", "measured_candidates"), "whole"),  # at once, and tokens that read each history
    "measured_history": "whole",  # events of each history that was timed: the median of those evaluated
    "measured_bytes": "real",  # of the states of these histories, the mean
    **{f"{step}_ms_p{p}": "real" for step in STEPS for p in (50, 95, 99)},
    **{f"{step}_cpu_ms_p50": "real" for step in STEPS},
    **dict.fromkeys(("read_ratio", "read_ratio_lo", "read_ratio_hi"), "real"),  # to the full state's, round by round
    "timing": "text",  # ok, noisy (the ratio's interval is wide), busy (other work on the machine), or both
    # a request of one user that loads the state from a store and writes it back, at the median history, with
    # `measured_candidates`: of one process, step by step, over the full state's in the same rounds, and as many a
    # second as 1 and 2 client processes get served, which share the cores with one another and with a store's server
    "store": "text",  # lmdb, redis or dict
    **{f"request_ms_p{p}": "real" for p in (50, 95, 99)},
    **{f"request_{step}_ms_p{p}": "real" for step in REQUEST_STEPS for p in (50, 95, 99)},
    **dict.fromkeys(("request_ratio", "request_ratio_lo", "request_ratio_hi"), "real"),
    **{f"requests_per_s_{n}": "real" for n in CLIENTS},
    "request_timing": "text",  # as `timing`, or "failed: ..." with the reason
    "requests": "json",  # candidates -> all of these columns, of every number of candidates that was asked for
    **{f"{step}_flops": "real" for step in STEPS},
    "peak_bytes": "real",
    "measured_history_long": "whole",  # the longest history evaluated, and what it costs
    "measured_bytes_long": "real",
    **{f"{step}_ms_p50_long": "real" for step in STEPS},
    **dict.fromkeys(("read_ratio_long", "read_ratio_lo_long", "read_ratio_hi_long"), "real"),
    **{f"{step}_flops_long": "real" for step in STEPS},
    "peak_bytes_long": "real",
    "measured_weights": "text",  # trained, or fresh: a suite's own length is beyond what the trained ones serve
    # of all weights, and of tables of items and places; events that it was trained on, and how often
    **dict.fromkeys(("params", "params_embedding", "train_events", "train_epochs"), "whole"),
    "train_seconds": "real",
    "fit_seconds": "real",  # of what the method learns of training users, gathering it included
    **dict.fromkeys(("device", "amp"), "text"),  # amp: the arithmetic of training, fp32 or bf16
    "threads": "whole",
    "load": "real",
    **dict.fromkeys(("git_commit", "created_at"), "text"),
    "slices": "json",  # events of history, popularity -> n_users, ndcg@10, hr@10, overlap@10 or agreement, logit_error
    "steps": "json",  # of a trajectory: step -> n_users, and hr@10, ndcg@10, overlap@10 fed the truth, or its own items
    **dict.fromkeys(("per_user", "traceback"), "text"),  # path below the run folder; of what failed
    "values_digest": "text",  # sha256 of the per-user values
    **dict.fromkeys(("cell", "versions", "hashes", "hardware"), "json"),
    "schema_version": "whole",
    DIGEST: "text",  # sha256 of the canonical JSON of the row without it
}


# ---- identity


def cell_id(payload: Any) -> str:
    """sha256 (64 hex digits) of the canonical JSON of what makes a cell what it is."""
    return digest(payload)


def differing(one: Any, other: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    """What two payloads differ in: key path -> both values, None for a key that is not there."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = sorted({*one, *other})
        parts = (differing(one.get(key), other.get(key), f"{at}.{key}".lstrip(".")) for key in keys)
        return {path: values for part in parts for path, values in part.items()}
    return {} if one == other else {at: (one, other)}


# ---- files


def write_per_user(path: str | Path, columns: Mapping[str, np.ndarray | pl.Series]) -> str:
    """Write arrays or series of equal length (U,) or (U, n) as an atomic parquet; its sha256, for the row to keep.

    Raises ResultsError.
    """
    import polars as pl

    buffer = BytesIO()
    pl.DataFrame(dict(columns)).write_parquet(buffer)
    atomic_write(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def spoilt(rundir: str | Path, row: Row) -> str | None:
    """Which file that belongs to a row is not what was written, a path below the run folder; None: none is.

    One that is gone misleads nobody: a run may be kept or sent without them.
    """
    files = (row["hashes"] or {}).get("files", {})
    there = ((name, known) for name, known in files.items() if (Path(rundir) / name).exists())
    return next((name for name, known in there if file_digest(Path(rundir) / name) != known), None)


# ---- rows


def write_row(folder: str | Path, row: Mapping[str, Any]) -> Path:
    """Write `<folder>/<cell_id>.json`; columns not given, and NaN, become null. The same row gives the same bytes.

    Raises ValueError for an unknown column or what `faults.fault` finds; ResultsError where the file cannot be written.
    """
    for name in row:
        if name not in COLUMNS:
            raise ValueError(f"a row has no column '{name}'.{suggest(name, COLUMNS)}")
    whole = finite(plain(dict.fromkeys(COLUMNS) | dict(row) | {"schema_version": SCHEMA_VERSION}))
    if why := _fault(whole):
        raise ValueError(f"bad row: {why}")
    path = Path(folder) / f"{whole['cell_id']}.json"
    atomic_write(path, sealed(whole))
    return path


def read_rows(folder: str | Path, quarantine: bool = True) -> list[Row]:
    """All good rows of a folder, by cell id. A broken file, one that is not what was written (by its digest, and by its

    cell's id), one that holds what no row may, or one of another schema version, is not returned: it is named in a
    warning and moved to `<folder>/quarantine/`, or left alone with `quarantine=False`.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        row, why = read_row(path)
        if not why:
            rows.append(row)
        else:
            done = "quarantined" if quarantine and _set_aside(path) else "left out"
            log.warning("%s %s: %s (run its suite again to have it)", done, path, why)
    return rows


def _set_aside(path: Path) -> bool:
    """Move a broken file to the quarantine; False where the folder cannot be written."""
    try:
        (path.parent / "quarantine").mkdir(exist_ok=True)
        path.replace(path.parent / "quarantine" / path.name)
    except OSError:
        return False
    return True


def read_row(path: Path) -> tuple[Row, str | None]:
    """The row of a file and what is wrong with it."""
    try:
        row = json.loads(path.read_bytes())
        if not isinstance(row, dict):
            return {}, "not a row"
        if row.get("schema_version") != SCHEMA_VERSION:
            return {}, f"schema version {clipped(repr(row.get('schema_version')))}, this is {SCHEMA_VERSION}"
        if why := _fault(row):
            return {}, why
        if row.get(DIGEST) != (_digest({name: value for name, value in row.items() if name != DIGEST}) or ""):
            return {}, "its digest does not match"
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"not readable ({error})"
    return dict.fromkeys(COLUMNS) | row, None if row["cell_id"] == path.stem else "its name is not its cell id"


def _digest(content: Any) -> str | None:
    try:
        return digest(content)
    except ValueError:  # NaN, which was never written
        return None


def _fault(row: Row) -> str | None:
    """What is wrong with a row, or None."""
    if why := fault(row, COLUMNS):
        return why
    return "its cell_id is not that of its cell" if row.get("cell") and cell_id(row["cell"]) != row["cell_id"] else None


# ---- frames


def frame(rows: Sequence[Row]) -> pl.DataFrame:
    """Rows as a polars frame: all of COLUMNS in order, typed even where all values are null."""
    import polars as pl

    data = {name: [_cell(row.get(name), kind) for row in rows] for name, kind in COLUMNS.items()}
    return pl.DataFrame(data, schema=_schema())


def complete(frame: pl.DataFrame) -> pl.DataFrame:
    """A results frame of any age with all of COLUMNS in order; those that it lacks are null."""
    import polars as pl

    missing = [pl.lit(None, kind).alias(name) for name, kind in _schema().items() if name not in frame.columns]
    whole = frame.with_columns(missing)
    return whole.select(*COLUMNS, *(name for name in whole.columns if name not in COLUMNS))


def _schema() -> dict[str, Any]:
    import polars as pl

    types = {"text": pl.String, "json": pl.String, "whole": pl.Int64, "real": pl.Float64, "flag": pl.Boolean}
    return {name: types[kind] for name, kind in COLUMNS.items()}


def _cell(value: Any, kind: str) -> Any:
    if value is None or isinstance(value, str):
        return value
    return canonical_json(value) if kind == "json" else float(value) if kind == "real" else value


def load_results(rundir: str | Path) -> pl.DataFrame:
    """The results of a run folder: from `rows/` where there are any, else from `results.parquet`; or such a file's.

    Raises FileNotFoundError where the folder has neither, ResultsError where the parquet is not what was written.
    """
    rundir = Path(rundir)
    if any((rundir / "rows").glob("*.json")):
        return frame(newest(read_rows(rundir / "rows", quarantine=False), rundir))
    if (kept := rundir if rundir.suffix == ".parquet" else rundir / "results.parquet").is_file():
        return read_parquet(kept)
    raise no_results(rundir)


def rows_of(rundir: str | Path, kept: bool = False) -> list[Row]:
    """The rows of a run folder, or, where only its `results.parquet` is left, as in a commit, or kept, those of that.

    Raises ResultsError where that file is not what was written, FileNotFoundError where the folder has neither.
    """
    if not kept and (found := read_rows(Path(rundir) / "rows", quarantine=False)):
        return found
    nested = [name for name, kind in COLUMNS.items() if kind == "json"]
    rows = read_parquet(Path(rundir) / "results.parquet") if kept else load_results(rundir)
    return [row | {name: _parsed(row[name]) for name in nested} for row in rows.iter_rows(named=True)]


def to_parquet(rundir: str | Path) -> Path:
    """Derive `results.parquet` from the rows of a run folder; raises ResultsError where it cannot be written."""
    path = Path(rundir) / "results.parquet"
    rows, buffer = frame(newest(read_rows(Path(rundir) / "rows"))), BytesIO()
    rows.write_parquet(buffer, metadata={DIGEST: str(_frame_digest(rows))})
    atomic_write(path, buffer.getvalue())
    return path


def read_parquet(path: Path) -> pl.DataFrame:
    """A frame with all of COLUMNS; what an older schema version did not have is null."""
    import polars as pl

    try:
        found, known = pl.read_parquet(held := path.read_bytes()), pl.read_parquet_metadata(held).get(DIGEST)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ResultsError(f"{path} cannot be read ({why}): run again, or fetch it again") from None
    old = known is None and "schema_version" in found.columns and found["schema_version"].eq(1).all()
    if not old and known != _frame_digest(found):
        raise ResultsError(f"{path} is not what was written (its digest does not match): run again, or fetch it again")
    if odd := _frame_fault(found):
        raise ResultsError(f"{path}: {odd}: run again, or fetch it again")
    return complete(found)


def _frame_fault(frame: pl.DataFrame) -> str | None:
    """What is wrong with the first row of a frame that holds what no row may, or None."""
    for name, kind in _schema().items():
        if name in frame.columns and frame.schema[name] != kind:
            return f"column {name} is {frame.schema[name]}, expected {kind}"
    for row in frame.iter_rows(named=True):
        if why := fault(
            row | {name: _parsed(row.get(name)) for name, kind in COLUMNS.items() if kind == "json"}, COLUMNS
        ):
            return f"row {str(row.get('cell_id'))[:12]}: {why}"
    return None


def _parsed(text: str | None) -> Any:
    """A nested value; what is none as it is."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _frame_digest(rows: pl.DataFrame) -> str | None:
    return _digest(rows.to_dict(as_series=False))
