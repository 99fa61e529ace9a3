"""Reports of a run, from its results only: leaderboard, tables, figures, the page."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from malloc_bench.results import atomic_write, load_results, spoilt, to_parquet

log = logging.getLogger(__name__)


def get_ready() -> None:
    """Load what reports are written with, a second's work: while others compute it costs nobody any time."""
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401

    from malloc_bench.report import figures, leaderboard, page, recommend  # noqa: F401


def write_report(rundir: str | Path) -> list[Path]:
    """Write `results.parquet`, `leaderboard.md|csv|tex`, `report.html` and `figures/` of a run folder from its rows.

    Every file is replaced whole; a parquet without rows beside it is the truth itself and stays. Files of a row that
    are not what was written are named in a warning. Raises FileNotFoundError where the folder holds no results,
    ResultsError where a file cannot be written.
    """
    from malloc_bench.report import figures, leaderboard, page, recommend
    from malloc_bench.report.users import Users

    rundir = Path(rundir)
    frame = load_results(rundir)
    for path in filter(None, (spoilt(rundir, {"hashes": json.loads(each)}) for each in frame["hashes"].drop_nulls())):
        log.warning("%s is not what was written: run the suite again to make it anew", rundir / path)
    paths = [to_parquet(rundir)] if any((rundir / "rows").glob("*.json")) else []
    best = recommend.best_per_budget(frame, Users(frame, rundir))
    for name, text in (
        ("leaderboard.md", leaderboard.to_markdown(frame, rundir, best)),
        ("leaderboard.csv", leaderboard.to_csv(frame)),
        ("leaderboard.tex", leaderboard.to_latex(frame)),
        ("report.html", page.to_html(frame, rundir, best)),
    ):
        atomic_write(rundir / name, text.encode())
        paths.append(rundir / name)
    return paths + figures.write_figures(frame, rundir / "figures")
