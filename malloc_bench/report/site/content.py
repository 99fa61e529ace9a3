"""What stands on the pages of a site: tables of text and links. Knows results only."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import polars as pl

from malloc_bench.report.board import GROUP, REST, aggregate, sections, side_by_side
from malloc_bench.report.judge import of_most_trainings, remark
from malloc_bench.report.leaderboard import COLUMNS_SHOWN, NOTES
from malloc_bench.report.paper import at_budgets, competes
from malloc_bench.report.render import Column, filled, number, words
from malloc_bench.results.labels import bare

KINDS = {"dataset": "Data sets", "backbone": "Backbones", "of": "Methods"}  # column of the rows -> heading
COUNTED = (
    "Fidelity: all that a method keeps of the full state's order beyond no history, averaged over every table that has "
    "headroom and methods of the budget. A method that is missing in one of them has no average; coverage says in how "
    "many it is. Of tables with one name, the newest run's counts. Methods without a budget stand where they fit."
)


class Run(NamedTuple):
    """A run's folder, as the site names it, and its rows."""

    name: str
    frame: pl.DataFrame


class Cell(NamedTuple):
    text: str
    href: str = ""
    left: bool = False


class Sheet(NamedTuple):
    """One table. folded: behind its title."""

    title: str
    heads: list[Cell]
    rows: list[list[Cell]]
    said: str = ""
    links: Sequence[Cell] = ()
    folded: bool = False


class Page(NamedTuple):
    file: str
    title: str
    sheets: list[Sheet]
    notes: Sequence[str] = ()


def file_of(kind: str, name: str) -> str:
    """`method-snapkv.html`; a name that is no plain word has a part of its sha256 behind it."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    known = plain if plain == name else f"{plain}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:8]}"
    return f"{'method' if kind == 'of' else kind}-{known}.html"


def pages(runs: Sequence[Run], left_out: Sequence[str] = ()) -> Iterator[Page]:
    """The first page, then one a data set, a backbone and a method."""
    rows = _rows(runs)
    lists = [_list(rows, kind, heading) for kind, heading in KINDS.items()]
    notes = [COUNTED, *(f"Left out: {line}" for line in left_out)]
    yield Page("index.html", "Leaderboard", [*_overall(rows), *lists, _runs(runs)], notes)
    for kind in KINDS:
        for name in sorted(rows[kind].unique()):
            own = rows.filter(pl.col(kind) == name)
            sheets = [_across(own)] if kind == "of" else _groups(own)
            yield Page(file_of(kind, name), name, sheets, NOTES)


def _rows(runs: Sequence[Run]) -> pl.DataFrame:
    """The boards of all runs: with the `run`, when it was made, and `of`: the method without its parameters."""
    parts = []
    for run, frame in zip(runs, side_by_side([run.frame for run in runs])):
        board = aggregate(frame).with_columns(
            pl.lit(run.name).alias("run"), pl.lit(run.frame["created_at"].max(), pl.String).alias("made")
        )
        parts.append(board)
    whole = pl.concat(parts)
    of = [
        bare(label) if method == "compose" else method for method, label in whole.select("method", "compressor").rows()
    ]
    return whole.with_columns(pl.Series("of", of, pl.String))


# ---- the first page


def _overall(rows: pl.DataFrame) -> Iterator[Sheet]:
    """For every task and budget, methods by their mean fidelity over all that is compared there."""
    placed = [at_budgets(part) for _, part in rows.group_by("run", maintain_order=True)]
    able = competes() & (pl.col("headroom") & pl.col("fidelity").is_not_null()) & (pl.col("within") != REST)
    newest = (
        (pl.concat(placed) if placed else at_budgets(rows))
        .filter(able)
        .sort("made", descending=True, nulls_last=True, maintain_order=True)
        .unique([*GROUP, "family", "compressor", "within"], keep="first", maintain_order=True)
    )
    shares = pl.col("within").str.extract(r"^([\d.]+) %$").cast(pl.Float64)
    newest = newest.filter(of_most_trainings().over(*GROUP, "within"))
    newest = newest.sort("task", -shares, "within", nulls_last=True, maintain_order=True)
    for (task, within), block in newest.group_by("task", "within", maintain_order=True):
        count = block.select(GROUP).n_unique()
        found = block.group_by("of", "family", "compressor", maintain_order=True).agg(
            pl.len().cast(pl.Int64).alias("n"),
            *(pl.col(name).mean() for name in ("fidelity", "ratio", "read_ratio")),
            pl.col("run").unique().sort().str.join(", "),
        )
        whole = pl.col("n") == count
        counted = ("fidelity", "ratio", "read_ratio")
        found = (
            found.with_columns(pl.when(whole).then(name).alias(name) for name in counted)
            .sort(-pl.col("n"), -pl.col("fidelity"), "compressor", nulls_last=True)
            .with_columns(pl.when(whole).then(pl.int_range(1, pl.len() + 1)).alias("place"))
        )
        columns = (
            number("place", "", ".0f"), *_method(), words("family", "family"),
            Column("coverage", lambda row, count=count: f"{row['n']} of {count}"),  # type: ignore[misc]
            number("fidelity", "fidelity", ".3f"), number("ratio", "state (% of full)", ".2f", scale=100),
            number("read_ratio", "read (× full)", ".2f"), words("run", "runs"),
        )  # fmt: skip
        tables = f"{count} table{'s' * (count > 1)}"
        yield _sheet(f"{str(task).capitalize()}, at {within}: {tables}", found.filter(whole), columns)
        if len(rest := found.filter(~whole)):
            yield _sheet(f"{len(rest)} methods that are not in all {tables}", rest, columns)._replace(folded=True)


def _list(rows: pl.DataFrame, kind: str, heading: str) -> Sheet:
    """All names of a kind, with their pages and how much there is of each."""
    found = rows.group_by(kind).agg(
        pl.col("family").unique().sort().str.join(", "),
        *(pl.col(each).n_unique().alias(f"n_{each}") for each in KINDS if each != kind),
        pl.len().alias("rows"),
        pl.col("run").unique().sort().str.join(", "),
    ).sort(kind)  # fmt: skip
    family = [words("family", "family")] if kind == "of" else []
    counts = [number(f"n_{each}", KINDS[each].lower(), ",.0f") for each in KINDS if each != kind]
    columns = (_named(kind), *family, *counts, number("rows", "rows", ",.0f"), words("run", "runs"))
    return _sheet(heading, found, columns)


def _runs(runs: Sequence[Run]) -> Sheet:
    lines = [
        {"run": run.name, "suite": ", ".join(sorted(run.frame["suite"].drop_nulls().unique())),
         **{status: int((run.frame["status"] == status).sum()) for status in ("ok", "skipped", "failed")},
         "made": str(run.frame["created_at"].max() or "")[:10]}
        for run in runs
    ]  # fmt: skip
    counts = [number(status, status, ",.0f") for status in ("ok", "skipped", "failed")]
    columns = (words("run", "folder"), words("suite", "suite"), *counts, words("made", "last row"))
    return _sheet("Runs", pl.DataFrame(lines, infer_schema_length=None), columns)


# ---- the other pages


def _groups(rows: pl.DataFrame) -> list[Sheet]:
    """A table for every run and group: tables of two runs are of other weights."""
    found = []
    for (run,), part in rows.group_by("run", maintain_order=True):
        for head, group in sections(part):
            first = group.row(0, named=True)
            links = [Cell(first[kind], file_of(kind, first[kind])) for kind in ("dataset", "backbone")]
            columns = [*_method(), *filled(group, COLUMNS_SHOWN[1:]), words("run", "run")]
            sheet = _sheet(f"{head}, run {run}", group, columns)
            found.append(sheet._replace(said=remark(group) or "", links=links))
    return found


def _across(rows: pl.DataFrame) -> Sheet:
    """One method in all tables that it is in."""
    where = (_named("dataset"), words("task", "task"), words("split", "split"), _named("backbone"))
    columns = [words("compressor", "compressor"), *where, *filled(rows, COLUMNS_SHOWN[1:]), words("run", "run")]
    return _sheet("In every table", rows, columns)


# ---- tables of text


def _method() -> tuple[Column]:
    return (words("compressor", "compressor")._replace(over="of"),)


def _named(kind: str) -> Column:
    """A name that links to its page."""
    return words(kind, KINDS[kind].lower().removesuffix("s"))._replace(over=kind)


def _sheet(title: str, rows: pl.DataFrame, columns: Sequence[Column]) -> Sheet:
    """A frame as text; a column's `over` names what its cells link to."""
    lines = [
        [
            Cell(text, file_of(column.over, row[column.over]) if column.over and text else "", column.left)
            for column in columns
            for text in [column.text(row)]
        ]
        for row in rows.iter_rows(named=True)
    ]
    return Sheet(title, [Cell(column.header, left=column.left) for column in columns], lines)
