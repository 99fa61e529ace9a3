"""Arguments and options that several commands take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from malloc_bench.results.labels import parted


def run_folder(name: str) -> Path:
    """A run's folder, by its path, its `results.parquet`, or its name below runs/ where the path is nothing."""
    path, usual = Path(name), Path("runs") / name
    if path.name == "results.parquet" and path.is_file():
        return path.parent
    return usual if not path.exists() and usual.is_dir() else path


SuiteArg = Annotated[str, typer.Argument(metavar="SUITE", help="A suite's file, or a shipped suite by name.")]
RunArg = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, or its name below runs/: quick.", parser=run_folder)
]
MethodArg = Annotated[str, typer.Argument(metavar="METHOD", help="Your class: file.py:Class or module:Class.")]
Out = Annotated[Path | None, typer.Option(help="Where results go; runs/NAME by default.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs.")]


Only = Annotated[
    list[str] | None,
    typer.Option(
        help="KEY=VALUE of dataset, task, backbone, compressor, family, budget or seed; more by commas or "
        "repeated: values of one key add up."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the cells and an estimate; run nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars and no leaderboard.")]


def shard(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)):
        raise typer.BadParameter(f"expected I/N, such as 3/16, not '{text}'", param_hint="--shard")
    return int(match[1]), int(match[2])


def asked(option: str, read: Callable[[str], float], text: str | None) -> float | None:
    """The number that an option's text says; the ValueError of what is none names the option."""
    try:
        return None if text is None else read(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def pairs(items: list[str]) -> dict[str, list[str]]:
    """`a=1,b=x`, `a=2`: the values of each key; a comma inside of brackets is a label's own."""
    found: dict[str, list[str]] = {}
    for item in (part.strip() for each in items for part in parted(each)):
        key, value = given.groups() if (given := re.fullmatch(r"(\w*)=(.*)", item, re.DOTALL)) else ("", item)
        if given is None and found:
            key = next(reversed(found))  # compressor=snapkv,kivi(bits=4)
        if not key or not value:
            raise ValueError(f"--only {' '.join(items)}: expected KEY=VALUE, as in dataset=ml-1m,family=eviction")
        found.setdefault(key, []).append(value)
    return found
