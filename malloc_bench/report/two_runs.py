"""Two runs against each other: rows that both have, paired over users where values by user are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from malloc_bench.evaluation.metrics import holm
from malloc_bench.registry import clipped, shown
from malloc_bench.report.board import GROUP, groups_of, sections, select, side_by_side
from malloc_bench.report.judge import alike, main
from malloc_bench.report.lineage import protocol
from malloc_bench.report.recommend import LEVEL
from malloc_bench.report.render import filled, interval, number, p_value, tell, terminal, words
from malloc_bench.report.users import Users, columns_of, difference
from malloc_bench.results import budget_labels, differing, load_results

if TYPE_CHECKING:
    from rich.console import Console


def two_runs(one: str | Path, other: str | Path, only: Mapping[str, Sequence[str]] | None = None) -> pl.DataFrame:
    """Rows that two runs both have, by data set, backbone, method and budget: the second against the first.

    `main` and `alike` are the second's less the first's, paired over users where values by user are there (then with
    interval, p and p_holm), plain differences elsewhere; `bytes_ratio` the second's mean bytes over the first's,
    `read_ratio` of reads, each over its own run's full state's: all of the trainings that both have. What the two
    differ in, null for nothing: `protocol`, of data, training and evaluation, `settings`, of the method under its
    label. `seeds`: those compared, where a run has others; `only_one` and `only_other`: how many rows the other run has
    not. only: rows, as `board.select` takes them. Raises ValueError where the two have nothing in common.
    """
    frames = side_by_side([load_results(each) for each in (one, other)])
    boards = [_by_budget(select(each, only or {})) for each in frames]
    key = [*GROUP, "compressor", "budget"]
    cells = [{row["cell_id"]: row for row in each.select(*_CELL).iter_rows(named=True)} for each in frames]
    protocols = [{name: protocol(row) for name, row in each.items()} for each in cells]
    rows = _alike(boards, key, protocols)
    users = [Users(frame, folder) for frame, folder in zip(frames, (one, other))]
    found = []
    for row in rows.iter_rows(named=True):
        mine, theirs = row["cell_ids_right"].split(), row["cell_ids"].split()
        paired = {what: difference(users[1].both(mine, theirs, what, users[0])) for what in ("main", "alike")}
        both = _by_seed([cells[1][each] for each in mine], [cells[0][each] for each in theirs])
        plain = {what: _mean([_less(a[what], b[what]) for a, b in both.values()]) for what in paired}
        sizes = {what: [_mean([side[i][what] for side in both.values()]) for i in (0, 1)] for what in _SIZES}
        values = {name: each for what in paired for name, each in columns_of(what, paired[what]).items()}
        differences = {name: plain.get(name) if each is None else each for name, each in values.items()}
        found.append(
            {
                **{name: row[name] for name in (*key, "n_users")},
                "protocol": _differing(protocols[0][theirs[0]], protocols[1][mine[0]]),
                "settings": _differing(*(_method(cells[i][each[0]]) for i, each in enumerate((theirs, mine)))),
                "seeds": None if len(both) == len(mine) == len(theirs) else ", ".join(map(str, both)),
                **differences,
                "equal": _equal(list(both.values())),
                "p": None if paired["main"] is None else paired["main"].p,
                "bytes_ratio": _over(*sizes["bytes_mean"]),
                "read_ratio": _over(*sizes["read_ratio"]),
            }
        )
    types = {**dict.fromkeys(("main", "alike", "p", "bytes_ratio", "read_ratio"), pl.Float64()), "equal": pl.Boolean()}
    types |= dict.fromkeys(("protocol", "settings", "seeds"), pl.String())
    table = pl.DataFrame(found, schema_overrides=types, infer_schema_length=None)
    only_in = {name: len(board) - len(rows) for name, board in zip(("only_one", "only_other"), boards)}
    table = table.with_columns(pl.lit(n).alias(name) for name, n in only_in.items())
    if table.is_empty():
        raise ValueError(f"{one} and {other} have no method, budget, data set and backbone in common")
    parts = [rows.with_columns(_holm(rows["p"])) for _, rows in groups_of(table)]
    return pl.concat(parts)


_SIZES = ("bytes_mean", "read_ratio")
#: what is read of a row
_CELL = ("cell_id", "seed", "cell", "hashes", main().alias("main"), alike().alias("alike"), *_SIZES)


def _by_budget(board: pl.DataFrame) -> pl.DataFrame:
    """A row for each budget of states that meet several."""
    budgets = [budget_labels(label) or [label] for label in board["budget"]]
    return board.with_columns(pl.Series("budget", budgets, pl.List(pl.String))).explode("budget", empty_as_null=True)


def _by_seed(mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[int, tuple[Any, Any]]:
    """Rows of the trainings that both have, side by side."""
    first, second = ({row["seed"]: row for row in each} for each in (mine, theirs))
    return {seed: (first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())}


def _mean(values: Sequence[float | None]) -> float | None:
    some = [each for each in values if each is not None]
    return sum(some) / len(some) if some else None


def _method(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"compressor": json.loads(row["cell"] or "{}").get("compressor", {})}


def _alike(
    boards: Sequence[pl.DataFrame], key: Sequence[str], protocols: Sequence[Mapping[str, Mapping[str, Any]]]
) -> pl.DataFrame:
    """Rows of two boards side by side under one key; where a run has it by several protocols, those that differ least.

    What a run tells such rows apart by (`lineage.apart`) the other, which has but one of them, does not say.
    """
    shown = ["n_users", "cell_ids"]
    bare = pl.col("backbone").str.replace(r" \[.*\]$", "").alias("bare")
    first, second = (board.select(*key, *shown, bare).with_row_index("place") for board in boards)
    on = ["bare" if name == "backbone" else name for name in key]
    rows = first.join(second, on=on, how="inner", nulls_equal=True)
    pairs = ((row["cell_ids"].split()[0], row["cell_ids_right"].split()[0]) for row in rows.iter_rows(named=True))
    far = [len(differing(protocols[0][mine], protocols[1][theirs])) for mine, theirs in pairs]
    nearest = rows.with_columns(pl.Series("far", far, pl.Int64)).sort("far", "place", "place_right")
    for place in ("place", "place_right"):
        nearest = nearest.unique(place, keep="first", maintain_order=True)
    return nearest.sort("place")


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    return ", ".join(f"{path} {a}, then {b}" for path, (a, b) in differing(first, second).items()) or None


def _holm(p: pl.Series) -> pl.Series:
    return pl.Series("p_holm", holm(p), pl.Float64, nan_to_null=True)


def _equal(both: Sequence[tuple[Any, Any]]) -> bool | None:
    """Whether rows of one training have the same values, of every training; None where none has any."""
    values = [[side[what] for what in ("main", "alike", "bytes_mean")] for pair in both for side in pair]
    return values[::2] == values[1::2] if any(each is not None for side in values for each in side) else None


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


RUNS = (
    words("compressor", "compressor", most=19),
    words("budget", "budget", most=9),
    number("bytes_ratio", "bytes (×)", ".3f"),
    interval("alike", "Δ order [95 % interval]", "+z.4f", rank=1),
    interval("main", "Δ accuracy [95 % interval]", "+z.4f"),
    p_value("p_holm", "p (Holm) of accuracy"),
    number("read_ratio", "read (×)", ".2f", rank=2),
)


def _few(rows: pl.DataFrame, name: str) -> list[tuple[str, str]]:
    return rows.drop_nulls(name).select("compressor", name).unique(maintain_order=True).rows()[:3]


def print_two_runs(found: pl.DataFrame, console: Console, most: int = 20) -> None:
    """Print what `two_runs` found: how many rows changed, and of each table the `most` that changed most."""
    for head, rows in sections(found):
        changed, sure = rows.filter(~pl.col("equal")), rows.filter(pl.col("p_holm") < LEVEL).height
        said = f"{len(rows)} rows in both, {rows['equal'].sum()} equal, {sure} surely of another accuracy"
        lost = rows["equal"].null_count()
        tell(console, f"{head}: {said}{f', {lost} with nothing to compare' if lost else ''}")
        for other in rows["protocol"].drop_nulls().unique(maintain_order=True).head(3):
            tell(console, f"Not the methods alone differ: {clipped(shown(other), 300)}", "bold yellow")
        for label, other in _few(rows, "settings"):
            tell(console, f"{label} is not the same method: {clipped(shown(other), 300)}", "bold yellow")
        for label, seeds in _few(rows, "seeds"):
            tell(console, f"{label}: over the trainings that both have ({f'seed {seeds}' if seeds else 'none'})", "dim")
        if len(changed):
            first = changed.sort(pl.col("main").abs(), descending=True, nulls_last=True).head(most)
            console.print(terminal(first, filled(first, RUNS), "what changed most", console.width))
        console.print()
    one, other = found.select("only_one", "only_other").row(0)
    if one or other:
        tell(console, f"Not compared: {one} rows of the first run and {other} of the second, which the other has not.")
