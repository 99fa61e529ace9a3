"""A static site over many runs: plain HTML that needs no network and no script, the same from the same results."""

from __future__ import annotations

import logging
from pathlib import Path

import jinja2

from malloc_bench.report.site.content import Run, pages
from malloc_bench.results import ResultsError, atomic_write, load_results

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
MARK = b'<meta name="generator" content="malloc-bench site">'


def write_site(folder: str | Path, out: str | Path) -> list[Path]:
    """Write the pages of all runs below `folder` (or of the run that it is) to `out`; their paths, `index.html` first.

    Pages of an earlier site in `out` that this one does not have are removed.

    A run that is not what was written is left out, with a warning and a line on the first page. Raises
    FileNotFoundError where there is no run, ResultsError where a file cannot be written.
    """
    runs, left_out = _runs(Path(folder))
    if not runs:
        raise FileNotFoundError(f"{folder} holds no runs: expected folders with rows/*.json or results.parquet")
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    template, style = env.get_template("page.html"), (HERE / "style.css").read_text(encoding="utf-8")
    written = []
    for page in pages(runs, left_out):
        path = Path(out) / page.file
        atomic_write(path, template.render(page=page, style=style).encode("utf-8", "replace"))
        written.append(path)
    for path in set(Path(out).glob("*.html")) - set(written):
        if path.is_symlink() or not path.is_file():
            continue
        with path.open("rb") as file:
            if MARK in file.read(1000):  # of a method or data set that no run has any more
                path.unlink()
    return written


def _runs(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs below a folder by name, and lines on those that cannot be used."""
    runs, left_out = [], []
    for path in [folder, *sorted(each for each in folder.glob("*") if each.is_dir())]:
        name = path.relative_to(folder).as_posix() if path != folder else folder.resolve().name
        try:
            frame = load_results(path)
        except FileNotFoundError:
            continue
        except ResultsError as error:
            log.warning("left out: %s", error)
            left_out.append(f"{name}: is not what was written")
            continue
        runs.append(Run(name, frame))
    return runs, left_out
