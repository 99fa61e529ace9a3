"""Columns of a polars frame as text: Markdown, LaTeX, CSV and rich tables. Null is blank, never 0."""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import polars as pl

from malloc_bench.registry import folded, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

FORMATS = ("md", "csv", "latex")
SMALLEST, LARGEST = 1e-6, 1e15  # numbers that are printed without an exponent


class Column(NamedTuple):
    """One printed column. Where a terminal is narrow, lower ranks are shown first."""

    header: str
    text: Callable[[Mapping[str, Any]], str]  # a row of the frame -> its cell
    rank: int = 0
    left: bool = False
    most: int = 80  # characters that it is given where a terminal is narrow; words go on below
    over: str = ""  # heading that neighbours share
    mark: Callable[[Mapping[str, Any]], str] = lambda row: ""  # how its cell stands out: best, second or not


class Block(NamedTuple):
    """One printed table of several."""

    title: str
    rows: pl.DataFrame
    columns: Sequence[Column]
    said: str | None = None  # what must be known before it is read
    notes: Sequence[str] = ()  # below it
    apart: str | None = None  # column of `rows`: where it changes, a rule


class Table(NamedTuple):
    """A table of a run by name: its numbers, and how they are printed (one block a group unless it says otherwise).

    make: the results frame and the run's folder (or None), whose values by user some tables need -> numbers.
    """

    make: Callable[..., pl.DataFrame]
    columns: Sequence[Column] = ()
    blocks: Callable[[pl.DataFrame], Iterator[Block]] | None = None
    by_user: bool = False  # `make` takes the folder too
    notes: Sequence[str] = ()  # below all of it


def words(name: str, header: str, rank: int = 0, most: int = 80) -> Column:
    """A column of text."""
    return Column(header, lambda row: "" if row[name] is None else str(row[name]), rank, True, most)


def number(name: str, header: str, spec: str, rank: int = 0, scale: float = 1.0) -> Column:
    """A column of numbers, each times `scale`, in a format such as `.4f`."""
    return Column(header, lambda row: digits(row[name], spec, scale), rank)


def p_value(name: str, header: str = "p (Holm)", rank: int = 0) -> Column:
    """A column of p with three digits; what is less is said to be."""

    def text(row: Mapping[str, Any]) -> str:
        return "<0.001" if row[name] is not None and row[name] < 0.001 else digits(row[name], ".3f")

    return Column(header, text, rank)


def interval(name: str, header: str, spec: str, rank: int = 0, scale: float = 1.0) -> Column:
    """A column of numbers with their intervals, `-0.0100 [-0.0130, -0.0070]`, from `name`, `name_lo` and `name_hi`."""

    def text(row: Mapping[str, Any]) -> str:
        value, lo, hi = (digits(row[f"{name}{end}"], spec, scale) for end in ("", "_lo", "_hi"))
        return f"{value} [{lo}, {hi}]" if lo and hi else value

    return Column(header, text, rank)


def digits(value: float | None, spec: str, scale: float = 1.0) -> str:
    """A number as text: blank for null and NaN, ∞ for infinity, an exponent where it has too many digits to read."""
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value * scale):
        return "∞"
    return format(value * scale, spec if abs(value * scale) < LARGEST else ".3g")


def significant(name: str, header: str, rank: int = 0, scale: float = 1.0) -> Column:
    """A column of numbers of any size with three significant digits."""
    return Column(header, lambda row: three_digits(row[name], scale), rank)


def three_digits(value: float | None, scale: float = 1.0) -> str:
    """`0.00123`, `1.23`, `123`, `12,345`, `1.2e-09`: three significant digits, no exponent that need not be."""
    if value is None or not math.isfinite(value) or abs(value * scale) < SMALLEST:
        return digits(value, ".3g", scale)
    places = 2 - math.floor(math.log10(abs(value * scale)))
    return digits(value, f",.{max(0, places)}f", scale)


# ---- renderers


def filled(frame: pl.DataFrame, columns: Sequence[Column]) -> list[Column]:
    """The columns that are not blank in every row."""
    rows = list(frame.iter_rows(named=True))
    return [column for column in columns if any(column.text(row) for row in rows)]


def markdown(frame: pl.DataFrame, columns: Sequence[Column]) -> str:
    """A pipe table; text left, numbers right; the best of a column bold, the second underlined."""
    heads = [f"{column.over}: {column.header}" if column.over else column.header for column in columns]
    rule = [":--" if column.left else "--:" for column in columns]
    rows = [[_MARKED[column.mark(row)].format(inline(column.text(row))) for column in columns]
            for row in frame.iter_rows(named=True)]  # fmt: skip
    lines = [list(map(inline, heads)), rule, *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


_MARKED = {"": "{}", "best": "**{}**", "second": "<u>{}</u>"}
_MARKED_LATEX = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}


def inline(text: str) -> str:
    """Text that stays on its line of Markdown and in its cell, and is neither HTML nor a link."""
    return _LIVE.sub(lambda found: _DEAD[found[0]], shown(folded(text)))


_DEAD = {"|": r"\|", "<": "&lt;", "&": "&amp;", "](": r"]\("}
_LIVE = re.compile(r"\||<(?=[A-Za-z/!?])|&(?=#?\w+;)|\]\(")  # `<50` and `a & b` are as they look


_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"[": "{[}", "]": "{]}"},  # after the end of a row a bracket would be a distance
    **{"\n": " ", "\r": " ", "\t": " ", "–": "--", "—": "---", "’": "'", "…": "..."},
    **{
        "<": "$<$",
        "|": "$|$",
        ">": "$>$",
        "Δ": r"$\Delta$",
        "×": r"$\times$",
        "✓": r"$\checkmark$",
        "∞": r"$\infty$",
        "·": r"$\cdot$",
        "≥": r"$\geq$",
        "≤": r"$\leq$",
        "≈": r"$\approx$",
        "→": r"$\to$",
    },
}


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands; ? for letters that its usual fonts have not."""
    return "".join(_LATEX.get(char) or (char if " " <= char < "\x7f" else _near(char)) for char in text)


def _near(char: str) -> str:
    """A letter of Latin 1, or the nearest of ASCII."""
    if "\xa1" <= char <= "\xff" and char != "\xad":
        return char
    near = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
    return "".join(_LATEX.get(each, each) for each in near if " " <= each < "\x7f") or "?"


def latex(
    frame: pl.DataFrame, columns: Sequence[Column], caption: str, apart: str | None = None, notes: Sequence[str] = ()
) -> str:
    """A `table` with booktabs rules; wants the packages booktabs, amssymb and graphicx.

    apart: a column of the frame, with a rule where it changes. notes: lines below the table.
    """
    head = " & ".join(escape(column.header) for column in columns) + r" \\"
    body, before = [], frame.row(0, named=True) if apart and len(frame) else {}
    for row in frame.iter_rows(named=True):
        if apart and row[apart] != before[apart]:
            body.append(r"\midrule")
        before = row
        cells = (_MARKED_LATEX[column.mark(row)].format(escape(column.text(row))) for column in columns)
        body.append(" & ".join(cells) + r" \\")
    align = "".join("l" if column.left else "r" for column in columns)
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        *_spanning(columns),
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\par\smallskip\raggedright\footnotesize {escape(note)}" for note in notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _spanning(columns: Sequence[Column]) -> list[str]:
    """A line of headings that neighbours share, or none."""
    if not any(column.over for column in columns):
        return []
    parts, rules, at = [], "", 1
    for over, group in itertools.groupby(columns, key=lambda column: column.over):
        wide = len(list(group))
        parts.append(rf"\multicolumn{{{wide}}}{{c}}{{{escape(over)}}}")
        rules += rf"\cmidrule(lr){{{at}-{at + wide - 1}}}" if over else ""
        at += wide
    return [" & ".join(parts) + r" \\", rules]


def csv(frame: pl.DataFrame) -> str:
    """Raw values under the frame's own names; null is empty."""
    return frame.write_csv()


def tell(console: Console, text: str, style: str = "") -> None:
    """Print text as it is: no markup, nothing that a terminal would obey."""
    from rich.text import Text

    console.print(Text(shown(text), style))


def terminal(frame: pl.DataFrame, columns: Sequence[Column], title: str, width: int) -> RichTable:
    """A rich table for a terminal of `width` characters, in columns that fit; below it, what had no room."""
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    texts = [[shown(column.text(row)) for row in frame.iter_rows(named=True)] for column in columns]
    longest = [max(map(cell_len, each), default=0) for each in texts]
    heads = [max(map(cell_len, _two_lines(column.header).split("\n"))) for column in columns]

    def wide(width: int) -> list[int]:
        return [min(max(pair), _most(c, width)) + _gap(width) for c, *pair in zip(columns, heads, longest)]

    given, gap, fitting = wide(width), _gap(width), _fitting(columns, wide(width), width)
    enough = next(each for each in range(width, 10_000) if sum(wide(each)) <= each or each == 9_999)
    table = Table(
        title=Text(shown(title), style="bold"),
        title_justify="left",
        caption=_no_room([each for i, each in enumerate(columns) if i not in fitting], enough),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, gap - 1, 0, 0),
    )
    spare = width - sum(given[i] for i in fitting)  # for words that would go on below
    for i in fitting:
        column, least = columns[i], given[i] - gap
        most = max(1, min(max(longest[i], least), least + spare))
        spare -= most - least if column.left else 0
        justify: Literal["left", "right"] = "left" if column.left else "right"
        table.add_column(
            Text(_two_lines(column.header)), justify=justify, vertical="bottom", no_wrap=not column.left,
            overflow="fold", width=most if column.left else None,
        )  # fmt: skip
    for line in zip(*(texts[i] for i in fitting)):
        table.add_row(*map(Text, line))
    return table


def _gap(width: int) -> int:
    """Blanks between two columns."""
    return 1 if width < 100 else 2


def _no_room(columns: Sequence[Column], enough: int) -> str | None:
    """Which columns a terminal is too narrow for, and how wide one must be."""
    if not columns:
        return None
    names = ", ".join(column.header.split(" [")[0] for column in sorted(columns, key=lambda each: each.rank))
    return f"No room for: {names}. A width of {enough} shows all (COLUMNS={enough})."


def _fitting(columns: Sequence[Column], wide: Sequence[int], width: int) -> list[int]:
    """Places of the columns that have room: the first one always, of the others those of the lowest ranks."""
    found = set(range(min(1, len(columns))))
    for i in sorted(range(1, len(columns)), key=lambda i: columns[i].rank):
        if sum(wide[j] for j in found) + wide[i] <= width:
            found.add(i)
    return sorted(found)


def _most(column: Column, width: int) -> int:
    """Characters that a column is given before its words go on below."""
    return min(column.most, max(8, width // 2)) if width < 100 else max(column.most, width // 4)


def _two_lines(header: str) -> str:
    """A header with its unit below it."""
    return header.replace(" (", "\n(").replace(" [", "\n[").replace("overlap@", "overlap\n@")
