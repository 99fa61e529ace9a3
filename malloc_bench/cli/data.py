"""The commands `malloc-bench data ...`: a thin layer over `malloc_bench.data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from malloc_bench.cli.text import console, grid, listing, plain, say

data = typer.Typer(help="Fetch, verify and describe data sets.")

NameArg = Annotated[str, typer.Argument(metavar="NAME", help="A name, or the file of a card of your own.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]


@data.command("list")
def data_list() -> None:
    """Every data set with its size."""
    from malloc_bench.cli import describe

    listing(*describe.listing("datasets", grouped=console().is_terminal))


@data.command("get")
def data_get(name: NameArg, offline: Offline = False) -> None:
    """Fetch a data set and keep it prepared."""
    from malloc_bench.data import get_dataset

    it = get_dataset(name, offline=offline)
    say(f"{it.name}: {it.n_users:,} users, {it.n_items:,} items, {it.n_events:,} events from {it.source}")
    for what, count in it.notes.items():
        say(f"{it.name}: {count:,} {what}")
    if it.tied:
        what = "of the same second as" if it.has_time else "of equal order with"
        say(f"{it.name}: {it.tied:.1%} of events are {what} the one before")


@data.command("card")
def data_card(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A log: csv, json lines, parquet, arrow, .gz, .zip.")],
    out: Annotated[Path | None, typer.Option(help="Where the card goes; beside the log by default.")] = None,
) -> None:
    """Write a first card of a log of your own, from a look at its beginning."""
    from malloc_bench.data.draft import draft

    card, doubts = draft(file, out)
    named = card if card.is_absolute() else f"./{card}"
    for doubt in doubts:
        say(f"to be looked at: {doubt}")
    say(f"{card}: a first card; see whether it is right, then go on with")
    say(f"  malloc-bench data stats {named}")
    say(f"  datasets: [{named}]   in a suite that lies here")
    say("  malloc-bench run mysuite.yaml")


@data.command("verify")
def data_verify(name: NameArg, offline: Offline = False) -> int:
    """Compare a data set with what its publisher says of it; exit code 1 where something differs."""
    from malloc_bench.data import load_card, verify

    differences = verify(name, offline=offline)
    published = load_card(name).published
    counts = ", ".join(published.model_dump(exclude_none=True)) if published else ""
    say("\n".join(differences) or f"{name}: " + (f"as published ({counts})" if counts else "nothing is published"))
    return 1 if differences else 0


@data.command("stats")
def data_stats(
    name: NameArg,
    offline: Offline = False,
    figure: Annotated[Path | None, typer.Option(help="Where the histogram of lengths goes, a PNG.")] = None,
) -> None:
    """Size, history lengths, repeats and times of a data set, and a histogram of the lengths."""
    from malloc_bench.data import get_dataset
    from malloc_bench.data.summary import describe, histogram

    dataset = get_dataset(name, offline=offline)
    told = describe(dataset)
    told["notes"] = [f"{count:,} {what}" for what, count in dataset.notes.items()] or "none"
    grid([(key, plain(value)) for key, value in told.items()])
    say(f"histogram of lengths: {histogram(dataset, figure)}")
