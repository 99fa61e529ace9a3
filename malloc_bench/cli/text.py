"""What several commands print with: text that no terminal obeys, in characters that its encoding has."""

from __future__ import annotations

import codecs
import json
import logging
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

from malloc_bench.registry import CONTROL, folded, shown

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 2_000  # columns of a terminal: COLUMNS may say anything

_PLAIN = {
    "Δ": "d",
    "×": "x",
    "≥": ">=",
    "≤": "<=",
    "±": "+-",
    "→": "->",
    "–": "-",
    "—": "-",
    "’": "'",
    "…": "...",
    "·": "-",
    "✓": "+",
    "≈": "~",
}


def say(text: object, *, end: str = "\n", err: bool = False) -> None:
    """Print to standard output or error, with control characters from files and names shown as escapes."""
    print(shown(str(text)), end=end, file=sys.stderr if err else sys.stdout)


def say_json(value: object) -> None:
    """Print as JSON, with the same characters as its own escapes."""
    say(CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, indent=1, ensure_ascii=False)))


def set_up() -> None:
    """Let standard output and error take any text, and warnings of ours go to the latter, one line each."""
    codecs.register_error("malloc_bench", _degraded)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="malloc_bench")
    log = logging.getLogger("malloc_bench")
    if not any(isinstance(each, _Warnings) for each in log.handlers):
        log.addHandler(_Warnings(logging.WARNING))


def _degraded(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding has not: x for ×, e for é, ? where nothing is near."""
    assert isinstance(error, UnicodeEncodeError)
    text = ""
    for character in error.object[error.start : error.end]:
        near = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        text += _PLAIN.get(character) or near or "?"
    return text, error.end


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(folded(record.getMessage()), err=True)


def console() -> Console:
    from rich.console import Console

    found = Console()
    if 0 < found.width <= WIDEST:
        return found
    return Console(width=min(found.width, WIDEST) or 80)  # COLUMNS=0 is that of no terminal


def listing(heads: list[str], rows: list[list[str]]) -> None:
    """A table; where nobody looks at it, such as in a pipe, a line a row, tabs between, nothing cut."""
    from rich.table import Table

    on = console()
    if not on.is_terminal:
        for row in [heads, *rows]:
            say("\t".join(map(folded, row)).rstrip())
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate(heads):  # names are there to be copied: they are never cut
        table.add_column(head, no_wrap=not i, min_width=max(len(shown(row[0])) for row in rows) if not i else None)
    for row in rows:
        table.add_row(*map(shown, row))
    on.print(table, markup=False, highlight=False)


def grid(lines: list[tuple[str, str]], on: Console | None = None) -> None:
    """Labels in bold, and what belongs to each."""
    from rich.table import Column, Table
    from rich.text import Text

    table = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
    for label, text in lines:
        table.add_row(Text(shown(label), "bold"), Text(shown(text)))
    (on or console()).print(table)


def plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
