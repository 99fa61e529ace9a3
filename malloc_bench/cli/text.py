"""What several commands print with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    from rich.console import Console

    return Console()


def listing(kind: str) -> None:
    """A table of all that there is of a kind."""
    from rich.table import Table

    from malloc_bench.cli import describe

    heads, rows = describe.listing(kind)
    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    console().print(table, markup=False, highlight=False)


def grid(lines: list[tuple[str, str]], on: Console | None = None) -> None:
    """Labels in bold, and what belongs to each."""
    from rich.table import Column, Table
    from rich.text import Text

    table = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
    for label, text in lines:
        table.add_row(Text(label, "bold"), Text(text))
    (on or console()).print(table)


def plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
