"""The commands `malloc-bench data ...`: a thin layer over `malloc_bench.data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from malloc_bench.cli.text import grid, listing, plain

data = typer.Typer(help="Fetch, verify and describe data sets.")

NameArg = Annotated[str, typer.Argument(metavar="NAME")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]


@data.command("list")
def data_list() -> None:
    """Every data set with its size."""
    listing("datasets")


@data.command("get")
def data_get(name: NameArg, offline: Offline = False) -> None:
    """Fetch a data set and keep it prepared."""
    from malloc_bench.data import get_dataset

    it = get_dataset(name, offline=offline)
    print(f"{name}: {it.n_users:,} users, {it.n_items:,} items, {it.n_events:,} events from {it.source}")
    for what, count in it.notes.items():
        print(f"{name}: {count:,} {what}")
    if it.tied:
        print(f"{name}: {it.tied:.1%} of events are of the same second as the one before")


@data.command("verify")
def data_verify(name: NameArg, offline: Offline = False) -> int:
    """Compare a data set with what its publisher says of it; exit code 1 where something differs."""
    from malloc_bench.data import load_card, verify

    differences = verify(name, offline=offline)
    published = load_card(name).published
    counts = ", ".join(published.model_dump(exclude_none=True)) if published else ""
    print("\n".join(differences) or f"{name}: " + (f"as published ({counts})" if counts else "nothing is published"))
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
    print(f"histogram of lengths: {histogram(dataset, figure)}")
