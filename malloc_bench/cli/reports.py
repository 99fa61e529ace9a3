"""The commands that read a run: what to use, its leaderboard and tables, its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from malloc_bench.cli.arguments import Only, RunArg, asked, pairs, run_folder
from malloc_bench.cli.text import console, say

reports = typer.Typer()


@reports.command()
def recommend(
    run: RunArg,
    bytes: Annotated[str | None, typer.Option(help="The most a user's state may take: 5KB.")] = None,
    budget: Annotated[str | None, typer.Option(help="The same as a share of the full state's: 1/32, 3%.")] = None,
    read_ms: Annotated[float | None, typer.Option(min=0.0, help="The most that a read may take (p50).")] = None,
    at_least: Annotated[
        str | None, typer.Option(help="Of the full state's accuracy, what its interval must keep: 98%.")
    ] = None,
    only: Only = None,
) -> None:
    """Which methods no other beats within your limits of bytes, time and accuracy."""
    from malloc_bench.cli.describe import stores
    from malloc_bench.report.recommend import Limits, print_recommended, share
    from malloc_bench.results import load_results, size

    limits = Limits(
        size=asked("--bytes", size, bytes),
        share=asked("--budget", share, budget),
        read_ms=read_ms,
        at_least=asked("--at-least", share, at_least),
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

    names = [] if columns is None else [each.strip() for each in columns.split(",")]
    print_leaderboard(load_results(run), console(), run, only=pairs(only or []), sort=sort, columns=names)


@reports.command()
def tables(
    run: RunArg,
    table: Annotated[str | None, typer.Option(help="paper, pareto, significance, accuracy ...; else all.")] = None,
    format: Annotated[Literal["md", "csv", "latex"], typer.Option()] = "md",
    only: Only = None,
) -> None:
    """The tables of a run, as text."""
    from malloc_bench.report.tables import TABLES, render_table
    from malloc_bench.results import load_results

    frame, chosen = load_results(run), pairs(only or [])
    names = [table] if table else TABLES
    say("\n".join(render_table(frame, name, format, run, chosen) for name in names), end="")


@reports.command()
def fit(
    run: RunArg,
    law: Annotated[str, typer.Option(help="model, data, cache, flops or compression.")],
    metric: Annotated[str | None, typer.Option(help="The column that falls, or whose distance to 1 does.")] = None,
    hold: Annotated[
        int | None, typer.Option(min=1, help="So many of the largest are held out: 2 of 7 or more, else 1.")
    ] = None,
    bootstraps: Annotated[int, typer.Option(min=0, help="For intervals and for the verdict.")] = 200,
    only: Only = None,
) -> None:
    """Fit a law to a run's rows, and judge it by what it says of the largest, which it never saw."""
    from malloc_bench.report.figures import written
    from malloc_bench.report.laws import drawn, fitted, told
    from malloc_bench.results import atomic_write, load_results

    def report(done: int, total: int) -> None:
        say(f"fitted {done} of {total}", err=True)

    found = fitted(load_results(run), law, metric, hold, bootstraps, pairs(only or []), report)
    if not any(each.forms for each in found):  # and a page of it would replace one that says something
        why = f"{found[0].group}: {found[0].why}" + (f", and {len(found) - 1} more" if len(found) > 1 else "")
        raise ValueError(f"{run}: no law could be fitted ({why}): another --metric or --only, or a smaller --hold")
    text = told(law, found)
    say(text)
    figure = drawn(law, found)
    name = f"law-{law}" if metric is None else f"law-{law}-{metric}"  # another metric is another page
    path = run / f"{name}.md"
    other = path.exists() and path.read_bytes() != text.encode()
    atomic_write(path, text.encode())
    say(f"{path}{' (replaced: what was there said otherwise)' if other else ''}")
    if figure is not None:
        say(written(figure, run / "figures" / f"{name}.png"))


@reports.command()
def merge(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs, such as shards of one suite.")],
    out: Annotated[Path, typer.Option(help="The folder that they become.")],
) -> int:
    """Make one run of several: digests are checked, cells that two have must agree; exit code 1 if one is left out."""
    from malloc_bench.results import read_rows
    from malloc_bench.run.merge import merge, there

    folders = [run_folder(run) for run in runs]
    given = there(*folders, out)
    say(f"{merge(folders, out) / 'leaderboard.md'}")
    kept = read_rows(out / "rows", quarantine=False)  # not `there`: a spoilt file of `out` stays where it is
    if lost := len(given - {f"{row['cell_id']}.json" for row in kept}):
        say(f"{lost} of {len(given)} rows were left out, as warned above", err=True)
    return 1 if lost else 0


@reports.command()
def verify(
    run: RunArg,
    recompute: Annotated[int, typer.Option(min=0, help="Also compute so many cells again, drawn at random.")] = 0,
    seed: Annotated[int, typer.Option(help="Of that draw.")] = 0,
) -> int:
    """Hold a run against its digests: rows, parquet, manifest and files by user; exit code 1 if any is damaged."""
    from malloc_bench.run import runner, verify

    found = verify.verify(run)
    for line in found.damaged:
        say(f"damaged: {line}")
    say(found)
    differing = 0
    for cell in verify.sample(run, recompute, seed) if recompute else ():
        lines = runner.reproduce(run, cell)
        differing += bool(lines)
        say(f"{cell[:12]}: {'; '.join(lines) or 'reproduced'}")
    return 1 if found.damaged or differing else 0


@reports.command()
def report(run: RunArg) -> None:
    """Write a run's leaderboard, parquet and figures again from its rows; rows that only the parquet has come back."""
    from malloc_bench.report import write_report
    from malloc_bench.run.merge import bring_back

    for name in bring_back(run):
        say(f"{run}/rows/{name} was lost: written again from results.parquet", err=True)
    for path in write_report(run):
        say(path)


@reports.command()
def site(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of runs, such as results/; or one run.")],
    out: Annotated[Path, typer.Option(help="Where the pages go.")] = Path("site"),
) -> None:
    """A static site over many runs: the whole leaderboard, and a page a data set, a backbone and a method."""
    from malloc_bench.report.site import write_site

    written = write_site(folder, out)
    say(f"{written[0]} and {len(written) - 1} more pages")
