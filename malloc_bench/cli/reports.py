"""The commands that read a run: what to use, its leaderboard and tables, its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from malloc_bench.cli.arguments import Only, RunArg, pairs
from malloc_bench.cli.text import console, say

reports = typer.Typer()


@reports.command()
def recommend(
    run: RunArg,
    bytes: Annotated[str | None, typer.Option(help="The most a user's state may take: 5KB.")] = None,
    budget: Annotated[str | None, typer.Option(help="The same as a share of the full state's: 1/32, 3%.")] = None,
    read_ms: Annotated[float | None, typer.Option(min=0.0, help="The most that a read may take (p50).")] = None,
    at_least: Annotated[str | None, typer.Option(help="Of the full state's accuracy, what must be kept: 98%.")] = None,
    only: Only = None,
) -> None:
    """Which methods no other beats within your limits of bytes, time and accuracy."""
    from malloc_bench.cli.describe import stores
    from malloc_bench.report.recommend import Limits, print_recommended, share, size
    from malloc_bench.results import load_results

    limits = Limits(
        size=None if bytes is None else size(bytes),
        share=None if budget is None else share(budget),
        read_ms=read_ms,
        at_least=None if at_least is None else share(at_least),
    )
    print_recommended(load_results(run), limits, console(), run, pairs(only or []), stores)


@reports.command()
def leaderboard(
    run: RunArg,
    only: Only = None,
    sort: Annotated[str | None, typer.Option(help="A column to sort each table by: ndcg@10, read_ratio.")] = None,
    columns: Annotated[str | None, typer.Option(help="Columns by name, with commas: compressor,bytes_mean.")] = None,
) -> None:
    """Print a run's leaderboard: best per budget, then every method by budget and fidelity."""
    from malloc_bench.report.leaderboard import print_leaderboard
    from malloc_bench.results import load_results

    names = [each.strip() for each in (columns or "").split(",") if each.strip()]
    print_leaderboard(load_results(run), console(), run, only=pairs(only or []), sort=sort, columns=names)


@reports.command()
def tables(
    run: RunArg,
    table: Annotated[str | None, typer.Option(help="paper, pareto, significance, accuracy ...; else all.")] = None,
    format: Annotated[Literal["md", "csv", "latex"], typer.Option()] = "md",
) -> None:
    """The tables of a run, as text."""
    from malloc_bench.report.tables import TABLES, render_table
    from malloc_bench.results import load_results

    frame = load_results(run)
    say("\n".join(render_table(frame, name, format, run) for name in ([table] if table else TABLES)), end="")


@reports.command()
def merge(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, such as shards of one suite.")],
    out: Annotated[Path, typer.Option(help="The folder that they become.")],
) -> None:
    """Make one run of several: digests are checked, and cells that two have must agree."""
    from malloc_bench.run.merge import merge

    say(f"{merge(runs, out) / 'leaderboard.md'}")


@reports.command()
def report(run: RunArg) -> None:
    """Write a run's leaderboard, parquet and figures again from its rows."""
    from malloc_bench.report import write_report

    for path in write_report(run):
        say(path)
