"""The figures of a run, as files."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl

from malloc_bench.registry import literal
from malloc_bench.report.bars import latency_figure, parts_figure
from malloc_bench.report.board import groups_of, title
from malloc_bench.report.curves import curves_figure, history_figure
from malloc_bench.report.lines import WIDTHS, lay_out
from malloc_bench.report.pareto import pareto_figure
from malloc_bench.report.parts import told_apart
from malloc_bench.report.tables import sliced
from malloc_bench.report.task_figures import task_figures
from malloc_bench.results import atomic_write, digest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Key = TypeVar("Key", bound=Hashable)

LONGEST = 120  # letters of a file's name, before what all such files have

#: for print, two columns wide and one: name -> what draws it of a table's rows, its title and its width
PRINTED = {
    "pareto": pareto_figure,
    "curves": curves_figure,
    "bytes-by-part": parts_figure,
    "latency": latency_figure,
    "history": history_figure,
}


def write_figures(frame: pl.DataFrame, folder: str | Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Of every dataset, task, split and backbone those figures of PRINTED that there is data for.

    `pareto-<...>.<format>`, `pareto-<...>-narrow.<format>`, `curves-<...>.<format>` ...; png, svg or pdf, whose text is
    text. And those of `task_figures`, whose tables may be of several tasks.
    """
    paths = []
    tables = {key: _literal(rows) for key, rows in groups_of(sliced(*told_apart(frame)))}
    stems = file_stems({key: key for key in tables})
    for key, board in tables.items():
        head, stem = literal(title(board.row(0, named=True))), stems[key]
        blind = board["headroom"].eq(False).any()
        said = f"{head} · no headroom: accuracy judges nothing" if blind else head
        drawn: dict[str, Figure | None] = {
            f"{name}-{stem}{end}": draw(board, said, width)
            for name, draw in PRINTED.items()
            for end, width in WIDTHS.items()
        }
        for name, figure in drawn.items():
            paths += [written(figure, Path(folder) / f"{name}.{suffix}") for suffix in formats if figure is not None]
    for end, width in WIDTHS.items():
        several = {(name, *key): figure for name, key, figure in task_figures(frame, width)}
        for names, stem in file_stems({key: key for key in several}).items():
            paths += [written(several[names], Path(folder) / f"{stem}{end}.{suffix}") for suffix in formats]
    return paths


def _literal(board: pl.DataFrame) -> pl.DataFrame:
    """The rows with names that can be drawn."""
    names = ("family", "method", "compressor")
    return board.with_columns(pl.col(name).map_elements(literal, pl.String) for name in names)


def written(figure: Figure, path: Path) -> Path:
    """The figure in a file, whole, in the format of its suffix; the same figure makes the same file. Its path.

    It is laid out once, however many files are made of it: that takes as long as to draw it. Letters that no font has
    are boxes. Raises ResultsError.
    """
    from matplotlib import rc_context

    lay_out(figure)
    figure.set_layout_engine(None)
    buffer, suffix = BytesIO(), path.suffix[1:]
    dated = {"svg": "Date", "pdf": "CreationDate"}.get(suffix)
    settled: Any = {"svg.hashsalt": "malloc-bench", "svg.fonttype": "none", "pdf.fonttype": 42}
    with rc_context(settled), warnings.catch_warnings(action="ignore"):  # of what it draws as well as it can
        figure.savefig(buffer, format=suffix, dpi=200, metadata={dated: None} if dated else None)
    atomic_write(path, buffer.getvalue())
    return path


def file_stems(names: Mapping[Key, Sequence[str]]) -> dict[Key, str]:
    """A name of a file for each key, made of some names: in letters that every system takes, short, no two the same."""
    words = {
        key: [re.sub(r"[^\w.-]+", "_", str(each), flags=re.ASCII).strip("_") for each in names[key]] for key in names
    }
    plain = {key: "-".join(each) for key, each in words.items()}
    twice = Counter(plain.values())
    return {
        key: text if twice[text] == 1 and len(text) <= LONGEST else f"{text[:LONGEST]}-{digest(key)[:8]}"
        for key, text in plain.items()
    }
