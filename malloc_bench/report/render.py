"""Columns of a polars frame as text: Markdown, LaTeX, CSV and rich tables. Null is blank, never 0."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import polars as pl

if TYPE_CHECKING:
    from rich.table import Table

FORMATS = ("md", "csv", "latex")


class Column(NamedTuple):
    """One printed column. Where a terminal is narrow, lower ranks are shown first."""

    header: str
    text: Callable[[Mapping[str, Any]], str]  # a row of the frame -> its cell
    rank: int = 0
    left: bool = False
    most: int = 80  # characters that it is given where a terminal is narrow; words go on below


def words(name: str, header: str, rank: int = 0, most: int = 80) -> Column:
    """A column of text."""
    return Column(header, lambda row: "" if row[name] is None else str(row[name]), rank, True, most)


def number(name: str, header: str, spec: str, rank: int = 0, scale: float = 1.0) -> Column:
    """A column of numbers, each times `scale`, in a format such as `.4f`."""
    return Column(header, lambda row: digits(row[name], spec, scale), rank)


def interval(name: str, header: str, spec: str, rank: int = 0, scale: float = 1.0) -> Column:
    """A column of numbers with their intervals, `-0.0100 [-0.0130, -0.0070]`, from `name`, `name_lo` and `name_hi`."""

    def text(row: Mapping[str, Any]) -> str:
        value, lo, hi = (digits(row[f"{name}{end}"], spec, scale) for end in ("", "_lo", "_hi"))
        return f"{value} [{lo}, {hi}]" if lo and hi else value

    return Column(header, text, rank)


def digits(value: float | None, spec: str, scale: float = 1.0) -> str:
    """A number as text: blank for null and NaN, ∞ for infinity."""
    if value is None or math.isnan(value):
        return ""
    return "∞" if math.isinf(value) else format(value * scale, spec)


def significant(name: str, header: str, rank: int = 0, scale: float = 1.0) -> Column:
    """A column of numbers of any size with three significant digits and no exponent."""
    return Column(header, lambda row: three_digits(row[name], scale), rank)


def three_digits(value: float | None, scale: float = 1.0) -> str:
    """`0.00123`, `1.23`, `123`, `12,345`: three significant digits, no exponent."""
    if value is None or not math.isfinite(value) or value == 0:
        return digits(value, "g")
    places = 2 - math.floor(math.log10(abs(value * scale)))
    return digits(value, f",.{max(0, places)}f", scale)


# ---- labels


def budget_label(budget: str | None) -> str:
    """`50 %`, `16 slots`, `4096 bytes`, or blank, from the `budget` column."""
    value = json.loads(budget) if budget else None
    if isinstance(value, dict):
        return ", ".join(f"{size} {unit}" for unit, size in value.items())
    return "" if value is None else f"{100 * value:g} %"


# ---- renderers


def cells(frame: pl.DataFrame, columns: Sequence[Column]) -> list[list[str]]:
    """The text of every cell, row by row."""
    return [[column.text(row) for column in columns] for row in frame.iter_rows(named=True)]


def filled(frame: pl.DataFrame, columns: Sequence[Column]) -> list[Column]:
    """The columns that are not blank in every row."""
    rows = list(frame.iter_rows(named=True))
    return [column for column in columns if any(column.text(row) for row in rows)]


def markdown(frame: pl.DataFrame, columns: Sequence[Column]) -> str:
    """A pipe table; text left, numbers right."""
    rule = [":--" if column.left else "--:" for column in columns]
    lines = [[column.header for column in columns], rule, *cells(frame, columns)]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{
        "<": "$<$",
        ">": "$>$",
        "Δ": r"$\Delta$",
        "×": r"$\times$",
        "✓": r"$\checkmark$",
        "∞": r"$\infty$",
        "·": r"$\cdot$",
    },
}


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(char, char) for char in text)


def latex(frame: pl.DataFrame, columns: Sequence[Column], caption: str) -> str:
    """A `table` with booktabs rules; wants the packages booktabs, amssymb and graphicx."""
    body = [[column.header for column in columns], *cells(frame, columns)]
    head, *rest = (" & ".join(map(escape, line)) + r" \\" for line in body)
    align = "".join("l" if column.left else "r" for column in columns)
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        head,
        r"\midrule",
        *rest,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def csv(frame: pl.DataFrame) -> str:
    """Raw values under the frame's own names; null is empty."""
    return frame.write_csv()


def terminal(frame: pl.DataFrame, columns: Sequence[Column], title: str, width: int) -> Table:
    """A rich table for a terminal of `width` characters: rank 0, and of the others, lowest first, what fits."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    gap = 1 if width < 100 else 2
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, gap - 1, 0, 0),
    )
    shown = _fitting(frame, columns, width, gap)
    for column in shown:
        justify: Literal["left", "right"] = "left" if column.left else "right"
        longest = max((len(column.text(row)) for row in frame.iter_rows(named=True)), default=0)
        table.add_column(
            Text(_two_lines(column.header)), justify=justify, vertical="bottom", no_wrap=not column.left,
            overflow="fold", min_width=min(_most(column, width), longest) if column.left else None,
        )  # fmt: skip
    for line in cells(frame, shown):
        table.add_row(*map(Text, line))
    return table


def _fitting(frame: pl.DataFrame, columns: Sequence[Column], width: int, gap: int) -> list[Column]:
    lines = [[column.text(row) for row in frame.iter_rows(named=True)] for column in columns]
    wide = [max(map(len, [*_two_lines(c.header).split("\n"), *text])) for c, text in zip(columns, lines)]
    wide = [min(each, _most(c, width)) + gap for c, each in zip(columns, wide)]
    shown: set[int] = set()
    for i in sorted(range(len(columns)), key=lambda i: columns[i].rank):
        if columns[i].rank == 0 or sum(wide[j] for j in shown) + wide[i] <= width:
            shown.add(i)
    return [columns[i] for i in sorted(shown)]


def _most(column: Column, width: int) -> int:
    """Characters that a column is given before its words go on below."""
    return column.most if width < 100 else max(column.most, width // 4)


def _two_lines(header: str) -> str:
    """A header with its unit below it."""
    return header.replace(" (", "\n(").replace(" [", "\n[").replace("overlap@", "overlap\n@")
